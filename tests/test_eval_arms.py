"""mass-eval: the oracle of planted worlds, runs without an inner loop, and several processes that share the answers."""

import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks
from test_evaluate import killed, make_run, rows
from tiny import tiny_kit

from mass import arms, evaluate
from mass.choices import by_truth, training_problems
from mass.errors import MassError
from mass.methods import METHODS, solve
from mass.practice import Practice
from mass.problems import Problem
from mass.prompts import Example
from mass.wanted import plan
from mass.worlds import Truth

FEW = "oracle[generate.examples=2]"
NAMES = f"none,quest,oracle,{FEW}"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs"), "r")


@pytest.fixture(scope="module")
def alone(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eval") / "out"
    assert evaluate.main(["--run", str(run), "--methods", NAMES, "--batch", "3", "--out", str(folder)]) == 0
    return folder


# ---- oracle


def test_the_oracle_s_weights_are_the_truth() -> None:
    known: dict[str, Truth | None] = {
        "good": Truth(True, True, None),
        "wrong": Truth(False, True, True),
        "other family": Truth(True, False, True),
        "unknown": None,
    }
    kit = tiny_kit(truth=lambda p, problem, solution: known[problem] if p.id == "t" else None)
    own = [["good", "wrong", "good", "other family", "unknown", "good"], ["wrong"] * 6, ["good"] * 6]
    examples = [[Example(x, "", True, "") for x in row] for row in own]
    examples[0][5] = Example("good", "", False, "copy")
    valid_TN = torch.tensor([[e.valid for e in row] for row in examples])
    practice: Any = Practice([], [], examples, None, valid_TN)  # type: ignore[arg-type]
    problems = [Problem("t", "a"), Problem("t", "b"), Problem("u", "c")]
    assert by_truth(kit, problems, practice).tolist() == [[3, 0, 3, 0, 0, 0], [0] * 6, [0] * 6]


def test_the_oracle_trains_on_right_examples_alone(alone: Path) -> None:
    oracle, few, quest = (rows(alone / arms.file_of(name)) for name in ("oracle", FEW, "quest"))
    for row, other in zip(oracle, quest, strict=True):
        # the same examples, but for what they weigh
        assert [e["problem"] for e in row["examples"]] == [e["problem"] for e in other["examples"]]
    seen = set()
    for row in [*oracle, *few]:
        good = [x is not None and x[0] and x[1] for x in row["truth"]]
        assert [e["weight"] > 0 for e in row["examples"]] == good
        assert len({e["weight"] for e in row["examples"] if e["weight"]}) <= 1
        assert bool(row["steps"]) == any(good) and bool(row["tokens"]["trained"]) == any(good)
        if not any(good) and any(e["valid"] for e in row["examples"]):
            assert row["note"] == "no example is right and of the problem's family: there was no update"
        seen.add(any(good))
    assert seen == {True, False}, "both kinds of problems"
    found = json.loads((alone / "results.json").read_text())
    assert next(x for x in found["arms"] if x["arm"] == "oracle")["truth"]["auc"] == 1.0


def test_the_oracle_wants_problems_of_a_world(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text(json.dumps({"problem": "1 + 1", "answer": "2"}) + "\n")
    own = ["--run", str(run), "--problems", str(file), "--out", str(tmp_path / "out")]
    assert evaluate.main([*own, "--problems", "world:families", "--methods", "none,base:oracle"]) == 2
    said = capsys.readouterr().err
    assert "arm base:oracle: its weights are the truth" in said and "problems of mine" in said
    assert not (tmp_path / "out").exists()
    wanted = plan(str(run), None)
    tasks = evaluate.held_out(wanted, [], made=False).tasks
    assert "oracle" in [arm.name for arm in arms.every_usable(wanted, tasks)[0]]
    mixed = [*tasks, replace(tasks[0], entry=None)]
    usable, reasons = arms.every_usable(wanted, mixed)
    assert "oracle" not in [arm.name for arm in usable]
    assert any(x.startswith("oracle is left out: ") and "planted world" in x for x in reasons)
    with pytest.raises(MassError, match="oracle weighs by the truth"):
        solve(tiny_kit(), [Problem("a", "1 + 1")], "oracle")


# ---- without an inner loop


def test_a_run_without_an_inner_loop_is_evaluated_without_updates(run: Path) -> None:
    wanted = plan(str(run), None, ["inner.steps=0"])
    assert wanted.default_method == "none" and plan(str(run), None).default_method == "mass"
    usable, reasons = arms.every_usable(wanted, evaluate.held_out(wanted, [], made=False).tasks)
    # the run has a scorer, and no problems to draw from
    free = {name for name, row in METHODS.items() if not row.update and row.examples is not training_problems}
    assert {arm.name for arm in usable} == free and {"none", "vote", "in-context"} <= free
    assert all("inner.steps=0 takes no step" in x for x in reasons if x.startswith(("mass", "quest", "ttrl")))
    assert len(usable) + len(reasons) == len(METHODS) + 1
    for name, sentence in [
        ("quest", "arm quest: method quest updates, and inner.steps=0 takes no step"),
        ("base:mass", "arm base:mass: method mass weighs by a trained scorer, and there is none here"),
        (
            "mass[inner.steps=0]",
            r"arm mass\[inner.steps=0\]: method mass updates, and inner.steps=0 takes no step",
        ),
    ]:
        own = ["inner.steps=0"] if "[" not in name else []
        with pytest.raises(MassError, match=sentence):
            arms.parse(name, plan(str(run), None, own), own, (str(run), None))
    assert (
        arms.parse("mass[inner.steps=2]", wanted, ["inner.steps=0"], (str(run), None))[
            0
        ].plan.recipe.inner.steps
        == 2
    )


# ---- processes


def killed_second(argv: list[str], calls: int) -> None:
    """A call whose second process is killed at its call number `calls` of the file's `append`."""
    import os

    if os.environ["RANK"] == "1":
        killed(argv, calls)
    evaluate.main(argv)


def same(out: Path, whole: Path) -> None:
    """The same files row for row, and the same numbers of all that is no time."""
    names = sorted(path.name for path in whole.iterdir())
    assert sorted(path.name for path in out.iterdir()) == names and len(names) == 8
    for name in names:
        if name.endswith(".jsonl"):
            assert rows(out / name) == rows(whole / name)
    ours, theirs = (json.loads((x / "results.json").read_text()) for x in (out, whole))
    for key in ("problems", "comparisons", "sources", "left_out", "repeated"):
        assert ours[key] == theirs[key]
    assert [x["right"] for x in ours["arms"]] == [x["right"] for x in theirs["arms"]]


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_answer_what_one_does(ranks: Ranks, run: Path, alone: Path, tmp_path: Path) -> None:
    own = ["--run", str(run), "--methods", NAMES, "--batch", "3", "--out"]
    both = ranks("mass.evaluate:main", [*own, str(tmp_path / "two")], world=2).good()
    same(tmp_path / "two", alone)
    # both answered some of every arm, one announced it, and whoever was last has the table
    assert [text.count(": done in") for text in both.err] == [4, 4]
    assert both.err[0].count("10 problems, 4 arms") == 1 and "10 problems, 4 arms" not in both.err[1]
    assert any("10 problems" in text for text in both.out)

    half = ranks("test_eval_arms:killed_second", [*own, str(tmp_path / "half")], 3, world=2)
    assert half.codes == [0, -signal.SIGKILL] and half.out[0] == ""
    assert not (tmp_path / "half" / "results.json").exists()
    ranks("mass.evaluate:main", [*own, str(tmp_path / "half"), "--resume"], world=2).good()
    same(tmp_path / "half", alone)
    # the launcher ends the others
    again = ranks("mass.evaluate:main", [*own, str(tmp_path / "half")], world=2)
    assert "nothing is overwritten" in again.err[0]
    same(tmp_path / "half", alone)
