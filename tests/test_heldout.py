"""Held-out problems while training: shares, groups of sources, the truth of the examples, and ranks."""

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scipy.stats import mannwhitneyu

from mass import heldout
from mass.choices import Kit
from mass.problems import Problem, Task
from mass.records import Made, Record
from mass.rewards import Verdict, Verifier
from mass.worlds import Truth

ANSWERS = {"none": "Answer: 1", "mass": "Answer: 2"}
# (weight, right, kin, honest) of each task's examples; None: malformed
EXAMPLES: list[list[Any]] = [
    [(3.0, True, True, True), (1.0, False, True, False), (2.0, True, False, True), None],
    [(0.5, True, True, None), (0.5, False, True, None), (3.0, False, True, True)],
    [(1.0, True, True, True), (2.0, True, True, True)],
    [],
    [(2.0, True, True, False), (0.0, False, True, True)],
]
SOURCES = ["a", "b", "a", "c", "b"]
# of tasks 0 to 4: answered rightly by none, by mass
REFERENCE = ["1", "2", "2", "3", "2"]


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> list[Task]:
    """Five tasks whose records and truths are made up; the answers of a method are the same for all of them."""

    def solve(kit: Kit, problems: list[Problem], method: str, *, baselines: bool) -> list[Record]:
        assert not baselines and len(problems) <= 2
        return [
            Record(
                p.id,
                p.text,
                method,
                solution=ANSWERS[method],
                examples=tuple(
                    Made(f"{i}", "", x[0] if x else 0.0, x is not None, "")
                    for i, x in enumerate(EXAMPLES[int(p.id)])
                )
                if method == "mass"
                else (),
            )
            for p in problems
        ]

    def truth(task: Task, problem: str, solution: str) -> Truth | None:
        return Truth(*EXAMPLES[int(task.problem.id)][int(problem)][1:]) if task.entry else None

    monkeypatch.setattr(heldout, "solve", solve)
    monkeypatch.setattr(heldout, "truth", truth)
    return [
        Task(Problem(str(i), f"problem {i}"), REFERENCE[i], "", SOURCES[i], "exact", {"known": True})
        for i in range(5)
    ]


def evaluate(tasks: list[Task], trained: set[str], **more: Any) -> dict[str, float]:
    kit: Any = SimpleNamespace(lm=SimpleNamespace(settle=lambda: None), steps=2)
    found = heldout.evaluate(kit, tasks, trained, Verifier(), batch=2, **more)
    assert found.pop("time/evaluate") >= 0
    return found


def within(which: list[int]) -> float:
    """AUC of the weights, pair by pair, with scipy's U."""
    won, pairs = 0.0, 0
    for t in which:
        known = [x for x in EXAMPLES[t] if x is not None]
        good, bad = ([x[0] for x in known if (x[1] and x[2]) is kind] for kind in (True, False))
        if good and bad:
            won += mannwhitneyu(good, bad).statistic
            pairs += len(good) * len(bad)
    return won / pairs


def test_shares_over_all_held_out_problems(tasks: list[Task]) -> None:
    found = evaluate(tasks, {"a", "b", "c"})
    assert found == pytest.approx(
        {
            "heldout/none": 1 / 5,
            "heldout/mass": 3 / 5,
            "heldout/gain": 2 / 5,
            "heldout/auc": within([0, 1, 2, 3, 4]),
            "heldout/right": 5 / 10,
            "heldout/honest": 6 / 8,
            "heldout/failures": 0,
        }
    )


def test_problems_of_sources_without_training_are_also_shown_apart(tasks: list[Task]) -> None:
    found = evaluate(tasks, {"a", "c", "other"})
    assert found["heldout/mass"] == 3 / 5
    assert found["unseen/none"] == 0 and found["unseen/mass"] == found["unseen/gain"] == 1
    assert found["unseen/auc"] == pytest.approx(within([1, 4]))
    assert (found["seen/none"], found["seen/mass"]) == (1 / 3, 1 / 3)
    assert found["seen/auc"] == pytest.approx(within([0, 2, 3])) and found["seen/right"] == 3 / 5
    assert found["unseen/right"] == 2 / 5 and found["unseen/honest"] == 2 / 3
    # nothing to set apart where all of them are
    assert not any("seen/" in tag for trained in (set(), {"a", "b", "c"}) for tag in evaluate(tasks, trained))


def test_nothing_is_said_of_a_truth_that_is_not_known(tasks: list[Task]) -> None:
    plain = [replace(task, entry=None) for task in tasks]
    assert set(evaluate(plain, {"a"})) == {
        f"{group}/{tag}" for group in ("heldout", "seen", "unseen") for tag in ("none", "mass", "gain")
    } | {"heldout/failures"}


def test_ranks_share_the_problems(tasks: list[Task], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = evaluate(tasks, {"a"})
    sums: list[list[float]] = []
    monkeypatch.setattr(heldout.distributed, "reduce_sum", lambda x: (sums.append(x), x)[1])
    for rank in range(2):
        evaluate(tasks, {"a"}, rank=rank, world=2)
    both = torch.tensor(sums).sum(0).tolist()
    monkeypatch.setattr(heldout.distributed, "reduce_sum", lambda _: both)
    assert evaluate(tasks, {"a"}, rank=0, world=2) == whole


def test_an_answer_without_verdict_is_left_out_and_counted(tasks: list[Task]) -> None:
    whole, broken = evaluate(tasks, set()), replace(tasks[0], verifier="numeric", answer="no number")
    assert whole["heldout/failures"] == 0
    found, others = evaluate([broken, *tasks[1:]], set()), evaluate(tasks[1:], set())
    assert found["heldout/failures"] == 2
    assert [found[f"heldout/{x}"] for x in ("none", "mass")] == [
        others[f"heldout/{x}"] for x in ("none", "mass")
    ]
    nothing = evaluate([broken], set())
    assert math.isnan(nothing["heldout/mass"]) and math.isnan(nothing["heldout/gain"])


def test_a_part_of_the_score_is_no_solved_problem(tasks: list[Task], monkeypatch: pytest.MonkeyPatch) -> None:
    """As mass-eval counts: reasoning-gym's families give a part of the score for an answer that holds the right one."""
    monkeypatch.setattr(Verifier, "verify", lambda *_: Verdict(0.5, "partial"))
    found = evaluate(tasks, set())
    assert found["heldout/none"] == found["heldout/mass"] == found["heldout/failures"] == 0
