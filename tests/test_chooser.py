"""mass.chooser and mass.fit: method auto, fitted on problems with answers, kept as JSON, and what it then chooses."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_kit

from mass import choices, chooser, fit, method
from mass.choices import Kit
from mass.choices.signals import signals
from mass.chooser import Chooser
from mass.errors import MassError
from mass.generate import Rollout
from mass.methods import solve
from mass.problems import Problem, Task

SURE = np.array([1.0, 0.0, 0.5, 0.0])
TORN = np.array([0.0, 1.4, 0.5, 0.0])


@pytest.fixture(scope="module")
def kit() -> Kit:
    return tiny_kit(budget=200)


def learned() -> Chooser:
    """vote is right where samples agree, mass where they do not."""
    draw = np.random.default_rng(0)
    agree = draw.random(200)
    seen = np.stack([agree, 1.4 * (1 - agree), draw.random(200), np.zeros(200)], 1)
    vote = (draw.random(200) < agree).astype(float)
    mass = (draw.random(200) < 1 - agree).astype(float)
    ttt = np.where(draw.random(200) < 0.01, 1.0, math.nan)
    return chooser.fit(
        seen, {"none": [0.0] * 200, "vote": vote.tolist(), "mass": mass.tolist(), "ttt": ttt.tolist()}, 200, 4
    )


def test_fit_finds_which_signal_tells(tmp_path: Path) -> None:
    found = learned()
    # too few problems had demonstrations
    assert set(found.coefficients) == {"none", "vote", "mass"} and found.right["none"] == 0
    assert found.choose(SURE, chooser.CANDIDATES)[0] == "vote"
    name, why = found.choose(TORN, chooser.CANDIDATES)
    assert (
        name == "mass"
        and why.startswith("auto chose mass (chance to be right: mass 0.")
        and "margin 0.00" in why
    )
    assert found.choose(TORN, ["none", "vote"])[0] == "vote"
    chance = found.chances(np.array([0.5, 0.7, 0.5, 0.0]))
    assert chance["vote"] == pytest.approx(0.5, abs=0.12) and chance["none"] < 0.05
    path = chooser.save(found, tmp_path)
    assert json.loads(path.read_text())["signals"] == list(chooser.SIGNALS)
    assert chooser.load(tmp_path) == found and chooser.load(tmp_path / "no") is None
    for damage in ('"margin"', '"none"', '"budget"'):
        path.write_text(path.read_text().replace(damage, '"x"'))
        with pytest.raises(MassError, match="auto.json cannot be used .* fit it again"):
            chooser.load(tmp_path)
        chooser.save(found, tmp_path)
    with pytest.raises(MassError, match="auto is fitted on 10 problems or more; there are 3"):
        chooser.fit(np.zeros((3, 4)), {"none": [1.0] * 3}, 200, 4)


def test_what_could_not_be_used_is_not_written(kit: Kit) -> None:
    """A choice without the method that it falls back on, and problems that do not fit the model's context."""
    seen, few = np.random.default_rng(0).normal(size=(12, len(chooser.SIGNALS))), [math.nan] * 3 + [1.0] * 9
    with pytest.raises(MassError, match="fewer than 10 of them have a verdict"):
        chooser.fit(seen, {"none": few, "vote": [1.0] * 12}, 100, 2)
    tasks = [
        Task(Problem(f"t{i}", "x " * (9999 * (i > 8))), "1", "Answer: 1", "f", "exact") for i in range(12)
    ]
    with pytest.raises(MassError, match="auto is fitted on 10 problems or more; 9 of these fit"):
        fit.fit(replace(kit, budget=120), tasks, batch=6, samples=2)


def test_equal_chances_take_the_cheapest() -> None:
    flat = (0.0,) * 5
    even = Chooser(9, 4, 10, (0.0,) * 4, (1.0,) * 4, {"mass": flat, "vote": flat, "none": flat}, {})
    assert (
        even.choose(SURE, ["mass", "vote"])[0] == "vote" and even.choose(SURE, ["mass", "none"])[0] == "none"
    )


def test_signals(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    said = ["Answer: 3", "Answer: 3.", "Answer: 4", "hm"]
    own = [Rollout([1] * (i + 1), [0.0] * (i + 1), True, text) for i, text in enumerate(said)]
    monkeypatch.setattr(choices.signals, "sample", lambda kit, problems, which: [own for _ in problems])
    monkeypatch.setattr(choices.examples, "sample", lambda kit, problems, which: [[] for _ in problems])
    ((margin, entropy, length, spread),), drawn = signals(kit, [Problem("a", "x")], 4)
    assert margin == pytest.approx(0.25) and length == pytest.approx(2.5 / 8) and drawn == [own]
    assert entropy == pytest.approx(0.5 * math.log(2) + 2 * 0.25 * math.log(4)) and spread == 0
    monkeypatch.setattr(choices.weights.scorer, "weights", lambda *_: torch.tensor([[1.0, 2.0, 1.0, 0.0]]))
    assert signals(kit, [Problem("a", "x")], 4)[0][0, 3] == pytest.approx(np.std([1, 2, 1]))


def test_auto_answers_as_the_method_it_chose_and_says_why(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (choices.answers, choices.examples, choices.kit, choices.weights, choices.signals, method):
        monkeypatch.setattr(module, "find_answer", lambda text, **_: text[:1] or None)
    problems = [Problem("a", "What is 4 + 3?"), Problem("b", "2, 4, 6, ?"), Problem("long", "word " * 3000)]
    with pytest.raises(MassError, match="method auto is not fitted here: mass-adapt fit"):
        solve(kit, problems, "auto")
    names = iter(["vote", "none"])
    fitted = replace(kit, chooser=learned())
    monkeypatch.setattr(Chooser, "choose", lambda *_: (name := next(names), f"auto chose {name}"))
    records = solve(fitted, problems, "auto")
    assert records[2].error and "too long" in records[2].error and {r.method for r in records} == {"auto"}
    vote, none = (solve(kit, problems[i : i + 1], ("vote", "none")[i])[0] for i in range(2))
    # the vote begins with the samples that the choice was made by
    assert (records[0].answer, records[0].tokens) == (vote.answer, vote.tokens)
    assert records[0].note == "auto chose vote" and records[1].solution == none.solution
    own = choices.kit.sample(kit, problems[1:2], [range(4)])[0]
    assert records[1].tokens.generated == none.tokens.generated + sum(len(r.tokens) for r in own)
    assert all(r.tokens.generated + r.tokens.trained <= 200 for r in records)
    with pytest.raises(MassError, match="auto was fitted under --budget 200, not 300"):
        solve(replace(fitted, budget=300), problems, "auto")
    long = replace(fitted, answering=replace(fitted.answering, max_new_tokens=201))
    with pytest.raises(MassError, match="under --budget 200, which is less than generate.answer_tokens=201"):
        solve(replace(long, budget=None), problems, "auto")


def test_fit_asks_every_method_and_grades_it(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = (("1 + 1", "2"), ("2 + 1", "3"))
    tasks: list[Task] = []
    for i in range(12):
        problem = Problem(f"t{i}", f"What is {i} + 1?", shown if i % 2 else ())
        tasks.append(Task(problem, str(i + 1), f"Answer: {i + 1}", "sums", "numeric"))
    asked: list[tuple[str, int]] = []
    solved = fit.solve_drawn

    def spied(kit: Kit, problems: Any, name: str, *rest: Any, **more: Any) -> Any:
        asked.append((name, len(problems)))
        done = solved(kit, problems, name, *rest, **more)
        if name != "vote":
            return done
        truth = {t.problem.id: t.solution for t in tasks}
        return [replace(r, solution=truth[r.id], answer="x") for r in done]

    monkeypatch.setattr(fit, "solve_drawn", spied)
    found = fit.fit(replace(kit, budget=120), tasks, batch=6, samples=2)
    assert [x for x in asked if x[0] != "ttt"] == [(n, 6) for _ in range(2) for n in chooser.CANDIDATES[:-1]]
    assert [x for x in asked if x[0] == "ttt"] == [("ttt", 3)] * 2
    assert found.right == {"none": 0, "vote": 1, "pick": 0, "in-context": 0, "mass": 0}
    assert found.choose(SURE, chooser.CANDIDATES)[0] == "vote" and found.problems == 12
