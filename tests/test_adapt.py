"""mass-adapt and mass.adapt on a run folder, a PEFT folder and a bare model, all of a tiny random model."""

import errno
import io
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from folders import make_tiny_run

from mass import command as command_module
from mass.command import main
from mass.methods import METHODS
from mass.records import Made, Seconds, StepLoss, Tokens
from mass.sources import load_all
from mass.wanted import plan

FIELDS = {
    "position": int, "key": str,
    "id": str, "problem": str, "method": str, "answer": str | None, "base_answer": str | None,
    "vote_answer": str | None, "votes": int, "solution": str, "base_solution": str, "examples": list, "steps": list,
    "tokens": dict, "seconds": dict, "note": str, "error": str | None, "finished": bool,
}  # fmt: skip
SHORT = ["generate.max_new_tokens=6", "generate.answer_tokens=5", "generate.examples=2"]


Command = Callable[..., SimpleNamespace]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_run(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    def call(*argv: str) -> SimpleNamespace:
        code = main(argv)
        out, err = capsys.readouterr()
        return SimpleNamespace(code=code, out=out, err=err)

    return call


def fits(value: Any, kind: Any) -> bool:
    return isinstance(value, kind)


def test_json_has_every_field_and_is_alone_on_standard_output(run: Path, command: Command) -> None:
    said = command("--run", str(run), "--json", "--problem", "What is 4 + 3?")
    assert said.code == 0 and said.out.count("\n") == 1
    record = json.loads(said.out)
    assert list(record) == list(FIELDS)
    assert all(fits(record[key], kind) for key, kind in FIELDS.items())
    assert record["method"] == "mass" and record["problem"] == "What is 4 + 3?" and record["error"] is None
    assert [set(e) for e in record["examples"]] == [{"problem", "solution", "weight", "valid", "reason"}] * 2
    assert set(record["tokens"]) == {"generated", "trained"}
    assert set(record["seconds"]) == {"generate", "score", "adapt", "answer"}
    # a random model writes no example: nothing moved, and it says so
    assert (
        record["note"].startswith("none of 2 examples is valid")
        and record["solution"] == record["base_solution"]
    )
    again = json.loads(
        command("--run", str(run / "step_000002"), "--json", "--problem", "What is 4 + 3?").out
    )
    assert {**again, "seconds": 0} == {**record, "seconds": 0}
    older = json.loads(
        command("--run", str(run / "step_000001"), "--json", "--problem", "What is 4 + 3?").out
    )
    assert older["solution"] != record["solution"]


def test_what_libraries_print_goes_to_standard_error(
    run: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = command_module.build_kit
    monkeypatch.setattr(command_module, "build_kit", lambda plan: print("noise") or build(plan))
    said = command("--run", str(run), "--json", "--problem", "x", "--method", "none")
    assert json.loads(said.out)["method"] == "none" and "noise" in said.err


def test_newest_good_step_is_taken_when_the_newest_is_damaged(
    run: Path, command: Command, tmp_path: Path
) -> None:
    copy = shutil.copytree(run, tmp_path / "r")
    (copy / "step_000002" / "scorer.safetensors").write_bytes(b"torn")
    damaged = command("--run", str(copy / "step_000002"), "--problem", "x")
    assert damaged.code == 2 and "scorer.safetensors" in damaged.err and "step_000001" in damaged.err
    assert plan(str(copy), None).step == (copy / "step_000001").resolve()


def test_peft_folder_and_bare_model_have_no_scorer(run: Path, command: Command) -> None:
    peft = str(run / "step_000002" / "policy")
    for target in (["--run", peft], ["--model", "tiny:llama"]):
        common = [*target, *SHORT, "model.dtype=fp32", "prompt.style=plain", "--problem", "x"]
        said = command(*common, "--json")
        assert said.code == 0 and json.loads(said.out)["method"] == "quest"
        assert "no trained scorer here, so the method is quest" in said.err
        said = command(*common, "--method", "mass")
        assert said.code == 2 and said.out == "" and "method mass weighs by a trained scorer" in said.err
    adapted = command(
        "--run", peft, *SHORT, "model.dtype=fp32", "--problem", "x", "--method", "none", "--json"
    )
    bare = command(
        "--model", "tiny:llama", *SHORT, "model.dtype=fp32", "--problem", "x", "--method", "none", "--json"
    )
    assert json.loads(adapted.out)["solution"] != json.loads(bare.out)["solution"]
    assert adapted.err == "" and bare.err == ""


def test_bare_model_takes_shots_from_problems_train(tmp_path: Path, command: Command) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text(
        "".join(json.dumps({"problem": f"What is {i} + 1?", "answer": str(i + 1)}) + "\n" for i in range(8))
    )
    common = ["--model", "tiny:llama", *SHORT, "--problem", "x", "--method", "random", "--json"]
    said = command(*common)
    assert said.code == 2 and "set problems.train=FILE.jsonl" in said.err
    said = command(*common, f"problems.train={file}", "prompt.pool=4")
    record = json.loads(said.out)
    assert len(record["steps"]) == 2 and record["steps"][0]["before"] > 0 and record["tokens"]["trained"] > 0
    assert all(e["valid"] and e["weight"] == 1 for e in record["examples"])


def test_file_with_bad_lines(run: Path, command: Command, tmp_path: Path) -> None:
    file, out = tmp_path / "p.jsonl", tmp_path / "out.jsonl"
    lines = [b'{"problem": "one", "id": "first"}', b"no json", b'{"problem": "caf\xe9"}', b'{"text": "x"}', b"",
             json.dumps({"problem": "long " * 2000}).encode(), b'{"problem": "two", "answer": "secret"}']  # fmt: skip
    file.write_bytes(b"\n".join(lines))
    said = command(
        "--run",
        str(run),
        "--file",
        str(file),
        "--json",
        "--batch",
        "2",
        "--out",
        str(out),
        "--method",
        "none",
    )
    assert said.code == 0
    # shown as they finish; the file has them in the order of the problems
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert sorted(out.read_text().splitlines()) == sorted(said.out.splitlines())
    assert [r["position"] for r in records] == [1, 2, 3, 4, 5, 6]
    assert [r["id"] for r in records[:4]] == ["first", "line 2", "line 3", "line 4"]
    assert [bool(r["error"]) for r in records] == [False, True, True, True, True, False]
    assert "line 2: not JSON" in records[1]["error"] and "line 3: not UTF-8" in records[2]["error"]
    assert "line 4: no 'problem'" in records[3]["error"] and "too long" in records[4]["error"]
    assert "secret" not in said.out
    # alone, without the others in its batch
    alone = command("--run", str(run), "--problem", "two", "--json", "--method", "none")
    assert {**json.loads(alone.out), "seconds": 0, "position": 6} == {**records[5], "seconds": 0}


def test_a_file_in_the_columns_of_the_run(
    run: Path, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run reads the keys that it was trained on; a file without any problem is refused before the model is loaded."""
    file = tmp_path / "p.jsonl"
    file.write_text('{"question": "one"}\n{"problem": "two"}\n')
    asked = ["--run", str(run), "--file", str(file), "--json", "--method", "none", "--no-baselines"]
    said = command(*asked, "problems.columns.problem=question")
    records = [json.loads(line) for line in said.out.splitlines()]
    assert [(r["problem"], r["error"]) for r in records] == [("one", None), ("two", None)]
    monkeypatch.setattr(command_module, "build_kit", lambda *_: pytest.fail("a model is loaded"))
    file.write_text('\n{"question": "one"}\nno json\n')
    said = command(*asked)
    assert said.code == 2 and said.out == ""
    assert "p.jsonl: none of its 2 lines holds a problem. Line 2: no 'problem'." in said.err
    assert "problems.columns.problem" in said.err


def test_standard_input(run: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    for data, ids in (
        (b'{"problem": "one", "id": "1"}\n{"problem": "two", "id": "2"}\n', ["1", "2"]),
        (b"What is\n4 + 3?", None),
    ):
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data)))
        said = command("--run", str(run), "-", "--json", "--method", "none", "--no-baselines")
        records = [json.loads(line) for line in said.out.splitlines()]
        if ids:
            assert [r["id"] for r in records] == ids
        else:
            assert [r["problem"] for r in records] == ["What is\n4 + 3?"]
        assert all(r["base_answer"] is None and r["votes"] == 0 for r in records)


def test_errors_are_one_sentence_and_exit_2(run: Path, command: Command, tmp_path: Path) -> None:
    empty, no_recipe, exists = tmp_path / "empty.jsonl", tmp_path / "folder", tmp_path / "out"
    empty.touch()
    exists.touch()
    no_recipe.mkdir()
    here, one = ["--run", str(run)], ["--problem", "x"]
    cases = [
        (["--run", "no/such", *one], "--run no/such: there is no such folder"),
        (["--run", str(no_recipe), *one], "is not a run folder: it has no recipe.yaml"),
        (one, "--run FOLDER .* or --model MODEL"),
        ([*here, "--model", "tiny:llama", *one], "a run names its own model"),
        (here, "one of --problem TEXT, --file F.jsonl and - .* none of them is given"),
        ([*here, *one, "--file", str(empty)], "--problem and --file are given"),
        ([*here, *one, "-"], "--problem and - are given"),
        ([*here, "--file", str(empty)], "empty.jsonl is empty"),
        ([*here, "--file", "none.jsonl"], "There is no problem file none.jsonl"),
        ([*here, "--problem", "  "], "The problem text cannot be used"),
        ([*here, *one, "--method", "mas"], "'mas': did you mean mass"),
        ([*here, *one, "--batch", "0"], "--batch 0: it wants 1 or more"),
        ([*here, *one, "--out", str(exists)], "exists, and nothing is overwritten"),
        ([*here, *one, "--out", str(tmp_path / "no" / "out")], "cannot be written"),
        ([*here, *one, "inner.step=1"], "inner.step: unknown key. Did you mean inner.steps"),
        ([*here, *one, "lora.rank=4"], "lora.rank=4: the saved adapter and scorer .* were not made so"),
        (
            [*here, *one, "inner.lr=0.1"],
            "inner.lr=0.1: this run learned its inner rate. .* inner.learned_lr=no",
        ),
        ([*here, *one, "model.path=tiny:qwen2", "--out", str(tmp_path / "none")], "another base model"),
        (["--model", "tiny:llama", *one, "inner.step=1"], "1 error\n  inner.step: unknown key"),
        (["--model", "no/such/model", *one], "there is no such folder"),
    ]
    for argv, sentence in cases:
        said = command(*argv)
        assert said.code == 2, argv
        assert said.out == "" and said.err.startswith("mass-adapt: ") and "Traceback" not in said.err
        assert re.search(sentence, said.err.split("mass-adapt: ")[-1], re.DOTALL), (argv, said.err)
    assert exists.read_text() == "" and not (tmp_path / "none").exists()


@pytest.mark.parametrize(("error", "code"), [(BrokenPipeError(), 0), (OSError(errno.ENOSPC, "full"), 2)])
def test_standard_output_that_takes_no_more(
    run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: OSError, code: int
) -> None:
    def gone(*_: Any) -> None:
        raise error

    with open(tmp_path / "pipe", "w") as pipe:
        monkeypatch.setattr(command_module, "_run", gone)
        monkeypatch.setattr(sys, "stdout", pipe)
        assert main(["--run", str(run), "--problem", "x"]) == code


@pytest.mark.parametrize("form", [[], ["--json"]], ids=["view", "json"])
@pytest.mark.parametrize("kept", [True, False], ids=["out", "no out"])
def test_a_reader_that_leaves_does_not_end_the_file(
    run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, form: list[str], kept: bool
) -> None:
    file, out = tmp_path / "p.jsonl", tmp_path / "out.jsonl"
    file.write_text("".join(json.dumps({"problem": f"{i}?"}) + "\n" for i in range(3)))
    reader, writer = os.pipe()
    os.close(reader)
    argv = ["--run", str(run), "--file", str(file), "--method", "none", "--batch", "1", "--no-baselines"]
    with open(writer, "w", encoding="utf-8") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert main([*argv, *form, *(["--out", str(out)] if kept else [])]) == 0
    if kept:
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        assert [row["problem"] for row in rows] == ["0?", "1?", "2?"]


def test_human_view_is_the_default(run: Path, command: Command) -> None:
    said = command("--run", str(run), "--problem", "What is 4 + 3?", "generate.examples=3")
    assert said.code == 0 and said.out.startswith("What is 4 + 3?") and "\x1b" not in said.out
    assert "answer before (none stated), by vote of " in said.out and said.err == ""


def test_page_names_every_method_option_and_field() -> None:
    page = (Path(__file__).parents[1] / "docs" / "test-time.md").read_text(encoding="utf-8")
    named = [*METHODS, *FIELDS, *(f.name for x in (Made, StepLoss, Tokens, Seconds) for f in fields(x))]
    assert not [name for name in named if f"`{name}`" not in page]
    options = [option for action in command_module._parser()._actions for option in action.option_strings]
    assert not [
        option
        for option in options
        if option not in (*page.split(), "-h", "--help") and f"`{option}" not in page
    ]


def test_budget_teacher_and_demonstrations_on_the_command_line(
    run: Path, command: Command, tmp_path: Path
) -> None:
    here = ["--run", str(run), "--json"]
    said = command(*here, "--problem", "x", "--method", "vote", "--budget", "23")
    record = json.loads(said.out)
    assert 19 <= record["tokens"]["generated"] <= 23 and record["votes"] == len(record["examples"]) > 2
    said = command(*here, "--problem", "x", "--method", "ttrl", "guard.restore=0.1")
    assert said.code == 2 and "leave guard.* out" in said.err
    said = command(*here, "--problem", "x", "--budget", "4")
    assert said.code == 2 and "--budget 4 is less than generate.answer_tokens=5" in said.err
    said = command(*here, "--problem", "x", "--method", "tt-d")
    assert said.code == 2 and "name it with --teacher" in said.err
    said = command(*here, "--problem", "x", "--method", "tt-d", "--teacher", "http://127.0.0.1:9/v1")
    assert said.code == 2 and "http://HOST:PORT/v1#MODEL" in said.err
    said = command(*here, "--problem", "x", "--method", "tt-d", "--teacher", "tiny:qwen2", "knobs.margin=1")
    assert said.code == 0 and len(json.loads(said.out)["examples"]) == 2
    file = tmp_path / "bbh.jsonl"
    rows = [{"id": str(i), "problem": f"{i}?", "answer": str(i), "subject": "s"} for i in range(4)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = command(
        *here, "--file", str(file), "--method", "ttt", "--no-baselines", "problems.demonstrations=3"
    )
    record = json.loads(said.out)
    assert record["error"] is None and len(record["steps"]) == 2
    assert {e["problem"] for e in record["examples"]} < {f"{i}?" for i in range(4)} - {record["problem"]}
    said = command(
        *here, "--problem", "x", "--no-baselines", "--method", "random", "guard.fisher=2", "guard.restore=0.1"
    )
    assert said.code == 0 and len(json.loads(said.out)["steps"]) == 2


def test_fit_on_the_command_line(run: Path, command: Command, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "r")
    dev, few = tmp_path / "dev.jsonl", tmp_path / "few.jsonl"
    rows = [json.dumps({"problem": f"What is {i} + 1?", "answer": str(i + 1)}) + "\n" for i in range(10)]
    dev.write_text("".join(rows))
    few.write_text(rows[0])
    fit = ["fit", "--run", str(copy), "--budget", "30"]
    said = command(*fit, "--file", str(few))
    assert said.code == 2 and "has 1 problems; auto is fitted on 10 or more" in said.err
    said = command("--run", str(copy), "--problem", "x", "--method", "auto")
    assert said.code == 2 and "mass-adapt fit --run RUN" in said.err
    # problems that the run knows say nothing of new ones: these are counted, and not fitted on
    known = load_all(plan(str(copy), None).recipe).train[:9]
    own = [json.dumps({"problem": t.problem.text, "answer": t.answer}) + "\n" for t in known]
    few.write_text("".join([*rows[:3], *own, rows[0]]))
    said = command(*fit, "--file", str(few))
    assert said.code == 2 and "has 3 problems" in said.err and "left out: 9 problems that the run" in said.err
    assert command(*fit, "--file", str(dev)).code == 0 and (copy / "auto.json").is_file()
    record = json.loads(command("--run", str(copy), "--problem", "x", "--method", "auto", "--json").out)
    assert record["method"] == "auto" and record["note"].startswith("auto chose none (chance to be right")
    assert record["tokens"]["generated"] <= 30
    for more, sentence in [
        (["--budget", "31"], "fitted under --budget 30, not 31"),
        (["generate.answer_tokens=31"], "under --budget 30, which is less than generate.answer_tokens=31"),
        (["inner.steps=1"], "method auto was fitted with inner.steps=2, not 1: give the same, or fit again"),
        (
            ["--run", str(copy / "step_000001")],
            "fitted at step_000002, not step_000001: name that step in --run",
        ),
    ]:
        said = command("--run", str(copy), "--problem", "x", "--method", "auto", *more)
        assert said.code == 2 and said.out == "" and sentence in said.err
