"""launch/meta_bench.py: every engine and peer computes the same gradient, and one command measures it."""

import contextlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from chain import save_chain, save_problems
from tiny import tiny_kit

from mass import choices
from mass.errors import MassError
from mass.problems import Problem

LAUNCH = Path(__file__).resolve().parents[1] / "launch"
sys.path.insert(0, str(LAUNCH))

import meta_bench  # noqa: E402
import meta_bench_adapt as bench_adapt  # noqa: E402
import meta_bench_gradients as gradients  # noqa: E402
import meta_bench_methods as methods  # noqa: E402

NARROW = {
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
methods.SHAPES["narrow"] = methods.SHAPES["SmolLM2-135M"] | NARROW


def case(**changes: Any) -> dict[str, Any]:
    common = {
        "case": "grid",
        "engine": "reverse",
        "examples": 3,
        "K": 2,
        "tokens": 16,
        "tasks": 2,
        "layers": 2,
    }
    common |= {"device": "cpu", "dtype": "fp64", "init": True, "threads": 1, "shape": "narrow"}
    return common | changes


# Hugging Face's norms round to fp32, and finite differences are what they are.
BOUNDS = {"finite_difference": 1e-2, "blockwise": 1e-6, "blockwise_kept": 1e-6}


@pytest.mark.parametrize("kind", ["grid", "real"])
@pytest.mark.parametrize(
    "engine", [e for e in gradients.ENGINES if e not in ("first_order", "unrolled", "finite_difference_one")]
)
def test_engines_and_peers_agree(engine: str, kind: str) -> None:
    pytest.importorskip(engine if engine in ("torchopt", "higher") else "torch")
    truth = methods.unrolled(methods.build(case(case=kind)))
    # central differences of a float64 model whose norms round to fp32 are too noisy to be compared
    dtype = "fp32" if engine.startswith("finite") else "fp64"
    got = methods.METHODS[engine](methods.build(case(case=kind, dtype=dtype)))
    assert truth.init is not None and got.init is not None
    assert gradients.distance([got.weight_TN], [truth.weight_TN]) < BOUNDS.get(engine, 1e-7)
    assert gradients.distance(list(got.init.values()), list(truth.init.values())) < BOUNDS.get(engine, 1e-7)
    assert truth.weight_TN.abs().min() > 0


def test_products_are_counted_against_first_order() -> None:
    engines = ("first_order", "unrolled", "reverse", "blockwise", "blockwise_kept")
    counts = {e: gradients.check(case(engine=e, tasks=1, layers=6, dtype="fp32")) for e in engines}
    assert counts["first_order"]["products"] == pytest.approx(1)
    assert counts["unrolled"]["least"] == 2.0
    # the adapter's own products are no small part of so narrow a model: 2 and 3 are for wide ones
    assert 1.9 < counts["unrolled"]["products"] < 2.6
    # both of its two steps are recorded: nothing is done twice
    assert counts["reverse"]["products"] == pytest.approx(counts["unrolled"]["products"], abs=0.05)
    assert counts["blockwise"]["products"] > counts["blockwise_kept"]["products"] + 1
    assert counts["reverse"]["rel_error"] < 1e-4


def test_cases_have_one_name_each() -> None:
    import argparse

    parser = argparse.ArgumentParser()
    gradients.add_arguments(parser)
    short, full = (gradients.cases(parser.parse_args(words)) for words in ([], ["--full"]))
    for cases in (short, full):
        names = [gradients.name(c) for c in cases]
        assert len(set(names)) == len(names)
    assert {(c["K"], c["tokens"], c["tasks"]) for c in full if c["case"] == "grid"} == {
        (k, s, t) for k in (1, 2, 4, 8) for s in (64, 128, 256, 512) for t in (1, 4, 8)
    }
    assert {c["K"] for c in short} == {1, 2, 4, 8}


def test_median_ratio_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """The command with measurements made up: medians, ratios, a failed case, and all files."""
    seen: list[tuple[str, bool]] = []
    times = {"first_order": iter([1.0, 9.0, 2.0]), "blockwise": iter([8.0, 6.0, 7.0])}

    def isolated(command: str, one: dict[str, Any]) -> dict[str, Any]:
        seen.append((one["engine"], one["check"]))
        if one["engine"] == "reverse":
            return {"error": "no memory"}
        if one["check"]:
            return {"peak_gb": 2.0 if one["engine"] == "first_order" else 0.5, "rel_error": 1e-6}
        return {"seconds": next(times[one["engine"]]), "malloc_gb": 1.0, "seconds_sweep": 4.0}

    monkeypatch.setattr(meta_bench, "isolated", isolated)
    files = {kind: tmp_path / f"out.{kind}" for kind in ("json", "markdown", "plot")}
    files["plot"] = tmp_path / "out.png"
    picked = [f"{e}/K2/tokens64/tasks1" for e in ("first_order", "blockwise", "reverse")]
    words = [x for kind, file in files.items() for x in (f"--{kind}", str(file))]
    meta_bench.main(["--cases", *picked, *words])
    # interleaved: all cases, then all again; what failed is not tried again
    assert [e for e, _ in seen] == ["first_order", "reverse", "blockwise", *["first_order", "blockwise"] * 3]
    assert [check for _, check in seen] == [True] * 3 + [False] * 6
    rows = {row["engine"]: row for row in json.loads(files["json"].read_text())}
    assert rows["blockwise"]["seconds"] == 7.0 and rows["first_order"]["seconds"] == 2.0
    assert rows["blockwise"]["time_ratio"] == 3.5 and rows["blockwise"]["peak_ratio"] == 0.25
    assert rows["blockwise"]["sweep_ratio"] == 2.0
    assert {"engine", "K", "tokens", "tasks", "seconds", "peak_gb", "rel_error"} <= rows["blockwise"].keys()
    assert rows["reverse"]["error"] == "no memory"
    assert "reverse/K2/tokens64/tasks1 failed: no memory" in " ".join(capsys.readouterr().out.split())
    assert files["markdown"].read_text().count("\n| ") >= 3
    assert files["plot"].read_bytes().startswith(b"\x89PNG")


def test_what_was_measured_before_ctrl_c_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [case(engine=engine) for engine in ("first_order", "reverse")]
    calls: list[bool] = []

    def isolated(command: str, row: dict[str, Any]) -> dict[str, Any]:
        calls.append(row["check"])
        if len(calls) == 4:
            raise KeyboardInterrupt
        return {"peak_gb": 1.0} if row["check"] else {"seconds": 2.0}

    monkeypatch.setattr(meta_bench, "isolated", isolated)
    first, second = meta_bench.run("gradients", gradients, cases, 1, 1)
    assert (first["peak_gb"], first["seconds"], second["peak_gb"]) == (1.0, 2.0, 1.0)
    assert "seconds" not in second and len(gradients.finish([first, second])) == 2
    assert meta_bench.table(gradients, [first, second]).row_count == 2


def test_a_case_that_dies_says_why() -> None:
    row = meta_bench.isolated(
        "gradients", case(engine="no_such_engine", check=False, shape="SmolLM2-135M", layers=1)
    )
    assert "no_such_engine" in row["error"]


def test_a_case_that_is_killed_says_so_whatever_it_had_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def ended(code: int, said: str) -> str:
        words = [sys.executable, "-c", f"import os, sys; sys.stderr.write({said!r}); sys.stderr.flush(); "]
        words[-1] += f"os.kill(os.getpid(), {-code})" if code < 0 else f"sys.exit({code})"
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert done.returncode == code
        monkeypatch.setattr(meta_bench.subprocess, "run", lambda *_, **__: done)
        row = meta_bench.isolated("gradients", case(check=False))
        monkeypatch.undo()
        return str(row["error"])

    assert ended(-9, "a warning\n") == ended(-9, "") == "ended by signal 9 (out of memory?)"
    assert ended(1, "line\nValueError: why\n") == "ValueError: why"
    assert ended(3, "") == "ended with status 3 and said nothing"


def test_a_file_that_cannot_be_written_is_refused_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(meta_bench, "run", lambda *_: pytest.fail("measured"))

    def refusal(*words: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            meta_bench.main(["--cases", "blockwise/K1/*", *words])
        assert stopped.value.code == 2
        return " ".join(capsys.readouterr().err.split())

    for option in ("--json", "--markdown", "--plot"):
        nowhere = tmp_path / "none" / "rows.png"
        assert f"{option} {nowhere}: there is no folder {nowhere.parent}" in refusal(option, str(nowhere))
    assert f"--json {tmp_path}: this is a folder" in refusal("--json", str(tmp_path))
    assert "no picture has this ending; the endings are" in refusal("--plot", str(tmp_path / "rows.txt"))
    monkeypatch.setattr(meta_bench.importlib.util, "find_spec", lambda name: None)
    assert "needs matplotlib, which is not installed" in refusal("--plot", str(tmp_path / "rows.png"))


def test_what_is_not_timed_has_no_rounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """`plan` measures memory alone: each case is started once."""
    started: list[bool] = []
    monkeypatch.setattr(meta_bench, "isolated", lambda _, row: started.append(row["check"]) or {})
    meta_bench.main(["plan", "--cases", "tiny/ranks1/*", "--json", str(tmp_path / "rows.json")])
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert started == [True] * len(rows) == [True] * 4 and {row["rounds"] for row in rows} == {0}
    with pytest.raises(SystemExit):
        meta_bench.main(["plan", "--rounds", "3"])
    assert "unrecognized arguments: --rounds 3" in capsys.readouterr().err


def test_unknown_case_is_refused(capsys: Any) -> None:
    with pytest.raises(SystemExit) as stopped:
        meta_bench.main(["--cases", "nothing/*"])
    assert stopped.value.code == 2 and "no case has such a name" in capsys.readouterr().err


def test_script_and_mass_adapt_and_answer_alike(tmp_path: Path) -> None:
    """The yardstick of `adapt` computes what mass computes: the same adapter from the same examples, the same answers."""
    problems = save_problems(tmp_path / "p.jsonl")
    settings = [f"problems.train={problems}", "prompt.pool=6", "prompt.generate_shots=1", "inner.clip=0.05"]
    settings += ["generate.max_new_tokens=16", "generate.answer_tokens=8"]
    common = {"model": str(save_chain(tmp_path / "chain")), "tasks": 4, "examples": 3, "K": 2, "compare": 4}
    common |= {"device": "cpu", "settings": settings, "threads": 1, "check": False}
    kit, targets = bench_adapt.build(common)
    room = choices.Room(None, kit.steps, False, [[] for _ in targets])
    practice = choices.self_made(kit, targets, room)
    weight_TN = choices.uniform(kit, targets, practice)
    adapter = choices.fine_tuned(kit, targets, practice, weight_TN).adapter
    wrapped = bench_adapt.wrap(kit)
    for t in range(4):
        bench_adapt.script(kit, wrapped, targets[t], practice.examples[t])
        found = dict(wrapped.model.named_parameters())
        for key, wanted in adapter.items():
            name = f"base_model.model.{key[:-1]}lora_{key[-1]}.default.weight"
            assert torch.allclose(found[name], wanted[t], rtol=1e-4, atol=1e-7), key
            assert key.endswith(".A") or not torch.equal(found[name], wrapped.start[name])
    assert practice.valid_TN.sum() > 6
    assert bench_adapt.measure(common | {"engine": "script", "check": True}) == {"identical": 4}
    rows = [common | {"engine": e} | bench_adapt.measure(common | {"engine": e}) for e in bench_adapt.ENGINES]
    assert all(row["generated"] > 0 and row["trained"] > 0 for row in rows)
    assert rows[0]["generated"] == rows[1]["generated"]
    done = bench_adapt.finish(rows)
    assert done[2]["ratio"] == 1 and done[0]["per_minute"] == 60 * 4 / done[0]["seconds"]


def test_more_problems_than_there_are_is_refused_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_adapt, "build_kit", lambda wanted: wanted)
    own = [f"problems.train={save_problems(tmp_path / 'p.jsonl')}", "prompt.pool=6"]
    one = {"model": "tiny:llama", "examples": 3, "K": 1, "device": "cpu", "settings": own}
    assert len(bench_adapt.build(one | {"tasks": 34})[1]) == 34
    with pytest.raises(MassError, match=r"--tasks 35: problems.train gives 34 beside the 6 .* problems.size"):
        bench_adapt.build(one | {"tasks": 35})


class Silent:
    """In place of a PEFT model: ends every text at once, and remembers how it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[bool, int, int]] = []

    def disable_adapter(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def named_parameters(self) -> list[Any]:
        return []

    def generate(self, *, input_ids: torch.Tensor, generation_config: Any, **_: Any) -> torch.Tensor:
        how = generation_config
        self.asked.append((how.do_sample, how.max_new_tokens, how.num_return_sequences))
        ended = torch.nn.functional.pad(input_ids, (0, 1), value=how.eos_token_id[0])
        return ended.repeat(how.num_return_sequences, 1)


@pytest.mark.parametrize("count", [1, 3])
def test_the_script_samples_its_examples_as_mass_does_and_answers_greedily(count: int) -> None:
    model = Silent()
    kit = tiny_kit(examples=count)
    bench_adapt.script(kit, bench_adapt.Wrapped(model, {}), Problem("p", "2 + 3 ="))  # type: ignore[arg-type]
    write, answer = kit.writing.max_new_tokens, kit.answering.max_new_tokens
    assert model.asked == [(True, write, count), (False, answer, 1)] and write != answer


@pytest.mark.slow
@pytest.mark.multiprocess
def test_the_command(tmp_path: Path) -> None:
    words = ["--layers", "1", "--examples", "1", "--rounds", "1", "--cases", "blockwise/K1/tokens128/tasks1"]
    command = [sys.executable, str(LAUNCH / "meta_bench.py"), *words, "--json", str(tmp_path / "rows.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert row["seconds"] > 0 and 0 < row["peak_gb"] < 2 and row["rel_error"] < 1e-4
    assert 0 < row["seconds_sweep"] < row["seconds"]
