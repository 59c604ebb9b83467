"""mass-eval: whole calls, resuming, and the report."""

import dataclasses
import json
import os
import re
import shutil
import signal
import threading
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from folders import COUNT, DATA, make_run
from ranks import Ranks

from mass import answers, arms, compare, evaluate, filerun
from mass.choices.kit import sample
from mass.errors import MassError
from mass.filerun import adapt_problems
from mass.kit import build_kit
from mass.model import load
from mass.records import Made, Record
from mass.rewards import Verifier, find_answer
from mass.wanted import plan


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs"), "r")


def rows(path: Path) -> list[dict[str, Any]]:
    return [{**json.loads(line), "seconds": None} for line in path.read_text().splitlines()]


# ---- whole calls


ARMS = "none,vote,quest,mass,mass[inner.steps=1],base:quest"


@pytest.fixture(scope="module")
def done(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eval") / "out"
    assert evaluate.main(["--run", str(run), "--methods", ARMS, "--batch", "4", "--out", str(folder)]) == 0
    return folder


def test_an_arm_answers_as_its_method_does_alone(run: Path, done: Path) -> None:
    tasks = evaluate.held_out(plan(str(run), None), [], made=False).tasks
    problems = [task.problem for task in tasks]
    whole = build_kit(plan(str(run), None))
    bare = dataclasses.replace(whole, policy=None, head=None)
    one = dataclasses.replace(whole, steps=1)
    found = {}
    for name, kit, method in (("mass", whole, "mass"), ("mass[inner.steps=1]", one, "mass"), ("base:quest", bare, "quest")):  # fmt: skip
        arm = arms.parse(name, plan(str(run), None), [], (str(run), None))[0]
        found[name] = rows(done / arm.file)
        records = {x.id: x for x in adapt_problems(kit, problems, method, 4, baselines=False)}
        assert [row["id"] for row in found[name]] == [p.id for p in problems]
        for row, task in zip(found[name], tasks, strict=True):
            record = records[row["id"]]
            assert row["solution"] == record.solution and row["tokens"] == dataclasses.asdict(record.tokens)
            assert row["score"] == float(record.answer == task.answer) and len(row["truth"]) == 4
    assert {len(row["steps"]) for row in found["mass"]} == {2}
    assert {len(row["steps"]) for row in found["mass[inner.steps=1]"]} == {1}
    assert [row["solution"] for row in found["base:quest"]] != [row["solution"] for row in found["mass"]]
    weights = sum(x.numel() for x in load(str(DATA / "families"), dtype="fp32", device="cpu")[0].parameters())
    first = found["mass"][0]
    assert first["flops"] == weights * (2 * first["tokens"]["generated"] + 6 * first["tokens"]["trained"])
    # a world judges practice, not own answers
    assert any(any(x is not None for x in row["truth"]) for row in found["mass"])
    vote = rows(done / "vote.jsonl")
    assert all(x is None for row in vote for x in row["truth"])
    # of every row its method, in the third of five words
    for row in vote:
        named = [own for e in row["examples"] if len(own := e["solution"].split()[3::5]) == 4]
        right = row["reference"].split()[2]
        most = [max(column, key=column.count) for column in zip(*named, strict=True)]
        assert row["vote_rules"]["rows"] == (most == [right] * 4)
        every = [x for own in named for x in own]
        assert row["vote_rules"]["one"] == (max(every, key=every.count) == right)
        assert row["vote_rules"]["generous"] >= (every.count(right) == max(map(every.count, every)))
    assert {row["vote_rules"]["one"] for row in vote} == {True, False}


def test_operations_are_those_of_the_blocks_that_a_gradient_reaches(tmp_path: Path) -> None:
    argv = [
        "--model",
        "tiny:llama",
        "--problems",
        "gym:chain_sum",
        "--methods",
        "none,random",
        "--limit",
        "2",
    ]
    keys = ["model.dtype=fp32", "problems.train=[gym:chain_sum]", "problems.size=20", "prompt.style=plain"]
    keys += ["prompt.pool=4", "prompt.generate_shots=1", "generate.examples=2", "generate.answer_tokens=4"]
    found = {}
    for last in ("null", "1"):
        assert evaluate.main([*argv, "--out", str(tmp_path / last), *keys, f"lora.last={last}"]) == 0
        found[last] = {method: rows(tmp_path / last / f"{method}.jsonl") for method in ("none", "random")}
    model = load("tiny:llama", dtype="fp32", device="cpu")[0]
    lower = model.model.layers[:-1]
    below = sum(m.weight.numel() for m in lower.modules() if isinstance(m, torch.nn.Linear))
    assert below > 0
    forward = 2 * sum(x.numel() for x in model.parameters())
    for whole, upper in zip(found["null"]["random"], found["1"]["random"], strict=True):
        tokens = whole["tokens"]
        assert tokens["trained"] == upper["tokens"]["trained"] > 0
        written = tokens["generated"] - upper["tokens"]["generated"]
        assert whole["flops"] - upper["flops"] == 4 * below * tokens["trained"] + forward * written
    assert [x["flops"] for x in found["null"]["none"]] == [x["flops"] for x in found["1"]["none"]]


def test_every_try_of_a_vote_is_verified(run: Path, tmp_path: Path) -> None:
    tasks = evaluate.held_out(plan(str(run), None), [], made=False).tasks
    kit = build_kit(plan(str(run), None))
    drawn = sample(kit, [task.problem for task in tasks], [range(4)] * COUNT)
    said = [[find_answer(r.text) for r in own] for own in drawn]
    # the reference of some problems is what one of the tries says, whatever the vote makes of them
    wanted_by = [said[i][i % 4] or task.answer if i % 2 else task.answer for i, task in enumerate(tasks)]
    path = tmp_path / "problems.jsonl"
    lines = [
        json.dumps({"problem": task.problem.text, "answer": x})
        for task, x in zip(tasks, wanted_by, strict=True)
    ]
    path.write_text("\n".join(lines))
    out = tmp_path / "out"
    argv = ["--run", str(run), "--problems", str(path), "--methods", "none,vote", "--out", str(out)]
    assert evaluate.main(argv) == 0
    own = rows(out / "vote.jsonl")
    wanted = [[float(x == answer) for x in texts] for texts, answer in zip(said, wanted_by, strict=True)]
    assert [row["tries"] for row in own] == wanted and all(
        not row["tries"] for row in rows(out / "none.jsonl")
    )
    assert all(row["score"] <= max(row["tries"]) for row in own)
    # answers of one line; a tie is the truth's
    leads = [
        x in texts and texts.count(x) == max(map(texts.count, texts))
        for x, texts in zip(wanted_by, said, strict=True)
    ]
    assert [row["vote_rules"] for row in own] == [{"rows": None, "one": None, "generous": x} for x in leads]
    found = json.loads((out / "results.json").read_text())
    none, vote = found["arms"]
    any_right = sum(max(scores) for scores in wanted) / COUNT
    assert none["tries"] is None and 1 > any_right > vote["accuracy"]
    tries = vote["tries"]
    assert (tries["least"], tries["most"], tries["any"], tries["at"][3]) == (4, 4, any_right, any_right)
    assert tries["at"][0] == pytest.approx(np.mean(wanted)) and tries["at"] == sorted(tries["at"])
    assert set(vote["vote_rules"]) == {"generous"} and vote["accuracy"] < vote["vote_rules"]["generous"][
        "accuracy"
    ] == np.mean(leads)
    assert (
        f"| {any_right:.3f} n = 4 | most generous {np.mean(leads):.3f} |" in (out / "results.md").read_text()
    )
    # an answer that is chosen among the tries has them; one that is learned from them has not
    with Verifier() as verifier:
        for method, has in (("pick", True), ("rpc", True), ("vds", False), ("ttrl", False), ("auto", False)):
            arm = arms.Arm(method, plan(str(run), None), method)
            record = Record("x", "", method, examples=(Made("", tasks[0].solution, 1.0, True, ""),))
            assert answers._tries(arm, tasks[0], record, verifier) == ([1.0] if has else [])
            # theirs is no vote in which each try has one
            assert answers._vote_rules(arm, tasks[0], record, [1.0], verifier) is None


class Links(HTMLParser):
    """Everything in a page that could make a browser fetch something."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            self.ids += [str(value)] if name == "id" else []
            if name.rpartition(":")[2] in ("href", "src", "srcset", "data", "action") or name.startswith(
                "on"
            ):
                self.links.append(str(value))


def test_the_report_has_the_numbers_of_the_rows_and_loads_nothing(run: Path, done: Path) -> None:
    step = plan(str(run), None).step
    found = json.loads((done / "results.json").read_text())
    names = ARMS.split(",")
    assert [arm["arm"] for arm in found["arms"]] == names and found["problems"] == COUNT
    for arm, name in zip(found["arms"], ("none", "vote", "quest", "mass"), strict=False):
        own = rows(done / f"{name}.jsonl")
        assert arm["right"] == sum(row["score"] == 1 for row in own)
        assert arm["tokens"] == pytest.approx(np.mean([sum(row["tokens"].values()) for row in own]))
    assert (
        found["arms"][0]["trained"]
        == 0
        < found["arms"][3]["trained"]
        == pytest.approx(2 * found["arms"][4]["trained"])
    )
    # vote and quest are compared with the rivals before them, the three others with all
    assert len(found["comparisons"]) == 1 + 2 + 3 * 3
    assert found["versions"]["torch"] == torch.__version__ and "--methods" in found["command"]
    answered = {name: str(step) for name in names} | {"base:quest": str(DATA / "families")}
    assert found["weights"] == answered
    markdown = (done / "results.md").read_text()
    assert f"weights: {step}, {DATA / 'families'};" in markdown
    assert f"| mass[inner.steps=1] | {found['arms'][4]['accuracy']:.3f} [" in markdown

    page = (done / "results.html").read_text()
    reader = Links()
    reader.feed(page)
    assert {"svg", "table"} <= reader.tags and not {"script", "link", "img", "iframe"} & reader.tags
    assert page.count("<svg") == 4 and all(link.startswith("#") for link in reader.links)
    assert not re.search(r"url\((?!#)|@import|https?://", page), "nothing is fetched"
    # each mark and clip that a plot uses is in the page
    used = {link[1:] for link in reader.links} | set(re.findall(r"url\(#([^)]+)\)", page))
    assert used and used <= set(reader.ids) and len(reader.ids) == len(set(reader.ids))
    assert "currentColor" in page and "#010203" not in page
    assert "prefers-color-scheme: dark" in page and "@media print" in page


def killed(argv: list[str], calls: int) -> None:
    """mass-eval that is killed in its write number `calls`, in the middle of a line."""
    real, counted = filerun.append, []

    def append(path: Path, lines: Sequence[str]) -> None:
        counted.append(path)
        if len(counted) < calls:
            real(path, lines)
            return
        with open(path, "ab") as file:
            file.write("".join(line + "\n" for line in lines).encode()[:1500])
        os.kill(os.getpid(), signal.SIGKILL)

    filerun.append = append
    evaluate.main(argv)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_killed_call_goes_on_to_the_same_files(ranks: Ranks, run: Path, done: Path, tmp_path: Path) -> None:
    argv = ["--run", str(run), "--methods", ARMS, "--batch", "4", "--out", str(tmp_path / "out"), "--resume"]
    # in an arm that has its examples from another
    assert ranks("test_evaluate:killed", argv, 11).codes == [-signal.SIGKILL]
    assert not (tmp_path / "out" / "results.json").exists()
    last = ranks("mass.evaluate:main", argv).good()
    # all is there: one of two processes makes the table, and the credit without arms
    table = ranks("mass.evaluate:main", argv, world=2).good()
    credit = ranks(
        "mass.evaluate:main",
        [*argv[:2], "--credit", "2", "meta_gradient.mode=reverse", "--out", str(tmp_path / "c")],
        world=2,
    ).good()
    assert "10 problems" in table.out[0] and not table.out[1].strip()
    assert "Is the credit right" in credit.out[0] and not credit.out[1].strip()
    assert "none: 10 of 10 problems have their answer" in last.err[0]
    names = sorted(path.name for path in done.iterdir())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names and len(names) == 10
    for name in names:
        if name.endswith(".jsonl"):
            assert rows(tmp_path / "out" / name) == rows(done / name)
    whole, again = (json.loads((x / "results.json").read_text()) for x in (done, tmp_path / "out"))
    assert again["comparisons"] == whole["comparisons"] and again["sources"] == whole["sources"]


def test_nothing_is_loaded_when_nothing_is_left(
    run: Path, done: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(answers, "load", lambda *_, **__: pytest.fail("a model is loaded"))
    hashed = []
    real = arms.settings_key
    monkeypatch.setattr(arms, "settings_key", lambda *of: hashed.append(of) or real(*of))
    argv = ["--run", str(run), "--batch", "4", "--out", str(done), "--resume"]
    assert evaluate.main([*argv, "--methods", ARMS]) == 0
    assert len(hashed) == 6, "what an arm depends on is hashed once, not for every problem"
    said = capsys.readouterr()
    assert "10 problems" in said.out and "vs none" in said.out
    # a kill may come when all answers are there but not in order yet; put back for the other tests
    lines = (done / "mass.jsonl").read_bytes().splitlines(True)
    (done / "mass.jsonl").write_bytes(b"".join(reversed(lines)))
    assert evaluate.main([*argv, "--methods", ARMS]) == 0
    assert (done / "mass.jsonl").read_bytes() == b"".join(lines)
    assert evaluate.main([*argv, "--methods", ARMS, "inner.lr=1"]) == 2
    assert "other settings" in capsys.readouterr().err


def test_a_report_is_not_replaced_by_one_that_has_less(
    run: Path, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(answers, "load", lambda *_, **__: pytest.fail("a model is loaded"))
    monkeypatch.setattr(evaluate.attribution, "build_kit", lambda *_: pytest.fail("a model is loaded"))
    out = shutil.copytree(done, tmp_path / "out")
    argv = ["--run", str(run), "--batch", "4", "--out", str(out), "--resume"]
    before = (out / "results.json").read_text()
    whole = "'none,vote,quest,mass,mass[inner.steps=1],base:quest,pick'"
    for more, sentence in [
        (["--methods", "mass,pick"], f"the arms none, vote, quest, mass[inner.steps=1], base:quest, which this call does not name, and would be replaced. Name all of them, with the settings that they had: --methods {whole}"),
        (["--credit", "2", "meta_gradient.mode=reverse"], "has the arms none, vote,"),
    ]:  # fmt: skip
        assert evaluate.main([*argv, *more]) == 2
        assert sentence in capsys.readouterr().err
    assert (out / "results.json").read_text() == before
    # what another call has written while this one answered
    few = arms.parse("mass", plan(str(run), None), [], (str(run), None))
    with pytest.raises(MassError, match="has the arms none, vote,"):
        evaluate._measured(SimpleNamespace(credit=None), [], None, few, None, [], out)  # type: ignore[arg-type]
    # an arm whose file is gone is none, and a credit is kept
    (out / "vote.jsonl").unlink()
    less = ARMS.replace("vote,", "")
    assert evaluate.main([*argv, "--methods", less]) == 0
    found = json.loads((out / "results.json").read_text())
    assert [arm["arm"] for arm in found["arms"]] == less.split(",")
    (out / "results.json").write_text(json.dumps({**found, "credit": {"problems": 3}}))
    capsys.readouterr()
    assert evaluate.main([*argv, "--methods", less]) == 2
    assert (
        "has the credit of 3 problems, and would be replaced. Give --credit as well"
        in capsys.readouterr().err
    )


def test_another_call_s_report_is_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A process of the same call leaves the table to the one that is at it; a call of its own makes its table afterwards."""
    with evaluate._claimed(tmp_path, wait=False) as ours:
        assert ours
        with evaluate._claimed(tmp_path, wait=False) as second:
            assert not second
        held = threading.Event()

        def other() -> None:
            with evaluate._claimed(tmp_path, wait=True) as later:
                assert later
                held.set()

        waiting = threading.Thread(target=other)
        waiting.start()
        assert not held.wait(0.3)
    waiting.join(20)
    assert held.is_set() and f"another call is at its report in {tmp_path}" in capsys.readouterr().err


def test_bad_input_is_a_sentence_before_any_model_is_loaded(
    run: Path, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(answers, "load", lambda *_, **__: pytest.fail("a model is loaded"))
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "file").write_text("")
    of_run, new = ["--run", str(run)], ["--out", str(tmp_path / "new")]
    cases = [
        ([*of_run, *new, "--methods", "mas"], "arm mas: method 'mas': did you mean mass?"),
        ([*of_run, "--out", str(done)], "exists, and nothing is overwritten.*--resume"),
        ([*of_run, "--out", str(tmp_path / "file")], "is a file"),
        ([*of_run, *new, "--problems", str(tmp_path / "empty.jsonl")], "empty.jsonl holds no problem"),
        ([*of_run, *new, "--problems", "gym:chain_sun"], "the nearest is 'chain_sum'"),
        ([*of_run, *new, "--problems", str(tmp_path / "none.jsonl")], "There is no problem file"),
        ([*of_run, *new, "problems.heldout=null", "problems.heldout_size=0"], "no held-out problems"),
        ([*of_run, *new, "--limit", "0"], "--limit 0: it wants 1 or more"),
        ([*of_run, *new, "--budget", "3"], "--budget 3 is less than generate.answer_tokens"),
        (["--model", "tiny:llama", *new], "name the problems"),
        (["--model", "tiny:llama", "--problems", "world:families"], "--out FOLDER is wanted"),
        (["--run", str(tmp_path / "no")], "there is no such folder"),
    ]  # fmt: skip
    for argv, sentence in cases:
        assert evaluate.main(argv) == 2, argv
        said = capsys.readouterr()
        assert re.search(sentence, said.err) and said.out == "" and "Traceback" not in said.err, (
            argv,
            said.err,
        )
    assert not (tmp_path / "new").exists()
    monkeypatch.setattr(compare, "find_spec", lambda name: None if name == "statsmodels" else name)
    assert evaluate.main([*of_run, *new]) == 2
    assert "needs statsmodels, which is not installed: pip install 'mass[eval]'" in capsys.readouterr().err
