"""Methods whose answer is chosen among samples, and the vote that every method is compared with."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from handmade import PROBLEMS
from tiny import tiny_kit

from mass import choices
from mass import method as method_module
from mass.choices import Kit
from mass.generate import Rollout
from mass.methods import solve
from mass.practice import Practice
from mass.prompts import Example
from mass.rewards import find_answer, vote


@pytest.fixture(scope="module")
def kit() -> Kit:
    return tiny_kit()


@pytest.mark.usefixtures("answers")
def test_vote_is_its_own_baseline(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    sample = choices.kit.sample
    monkeypatch.setattr(method_module, "sample", lambda *args: drawn.append(args))
    kit = replace(kit, examples=9)
    for method in ("vote", "pick", "first-finish", "rpc"):
        for record in solve(kit, PROBLEMS, method):
            assert record.votes == 9 and record.tokens.trained == 0 and record.steps == ()
            assert record.vote_answer == vote([e.solution[:1] for e in record.examples])
            if method == "vote":
                assert record.answer == record.vote_answer and record.solution[:1].strip(".") == record.answer
    assert not drawn
    # sampled text is a function of the problem and the sample's number
    (own,) = sample(kit, PROBLEMS[:1], [[4, 2]])
    (record,) = solve(kit, PROBLEMS[:1], "vote")
    assert [r.text for r in own] == [record.examples[4].solution, record.examples[2].solution]


@pytest.mark.usefixtures("handmade", "answers")
def test_vote_spends_what_the_method_spent(kit: Kit) -> None:
    records = solve(kit, PROBLEMS[:2], "quest")
    for record, problem in zip(records, PROBLEMS[:2], strict=True):
        budget = record.tokens.generated + record.tokens.trained
        (own,) = choices.kit.sample(kit, [problem], [range(record.votes + 1)])
        spent = np.cumsum([len(r.tokens) for r in own])
        assert record.votes > 20 and spent[-2] <= budget
        # nearly all of it: no whole answer of mean length would fit any more
        assert budget - spent[-2] < max(spent[-1] - spent[-2], spent[-2] / record.votes)
        assert record.vote_answer == vote([find for r in own[:-1] if (find := r.text[:1])])


def test_budget_rounds_keep_to_the_budget(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [8, 1, 1, 1, 8, 8, 2, 1, 1, 1] * 40
    counted: list[int] = []

    def sample(kit: Kit, problems: Any, which: Sequence[Sequence[int]]) -> list[list[Rollout]]:
        counted.extend(j for own in which for j in own)
        return [[Rollout([0] * lengths[j], [], True, "") for j in own] for own in which]

    monkeypatch.setattr(method_module, "sample", sample)
    for budget in (1, 8, 9, 10, 57, 200, 333):
        counted.clear()
        (own,) = method_module._votes(kit, PROBLEMS[:1], [budget], [[]])
        spent = sum(len(r.tokens) for r in own)
        assert spent <= max(budget, 8) and budget - spent < 8
        assert counted == list(range(len(counted)))


@pytest.mark.usefixtures("answers")
def test_first_finish_takes_the_shortest_and_pick_the_best_scored(
    kit: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sample(kit: Kit, problems: Any, which: Sequence[Sequence[int]]) -> list[list[Rollout]]:
        own: list[Any] = [
            ([1] * 8, False, "xx"),
            ([1] * 5, True, "yy"),
            ([1] * 3, True, ""),
            ([1] * 4, True, "zz"),
        ]
        return [[Rollout(tokens, [-1.0] * len(tokens), *rest) for tokens, *rest in own] for _ in problems]

    monkeypatch.setattr(choices.examples, "sample", sample)
    kit = replace(kit, examples=4)
    (record,) = solve(kit, PROBLEMS[:1], "first-finish", baselines=False)
    assert (record.answer, record.solution) == ("z", "zz") and record.tokens.generated == 20
    assert [e.reason for e in record.examples] == ["", "", "no_answer", ""]
    monkeypatch.setattr(choices.weights.scorer, "weights", lambda *_: torch.tensor([[0.5, 2.0, 0.0, 1.5]]))
    (record,) = solve(kit, PROBLEMS[:1], "pick", baselines=False)
    assert (record.answer, record.solution) == ("y", "yy")


def test_no_own_answer_states_one(kit: Kit) -> None:
    for method in ("vote", "rpc", "pick", "first-finish"):
        (record,) = solve(kit, PROBLEMS[:1], method)
        assert (
            record.answer is None and record.solution == "" and record.note.startswith("none of 3 examples")
        )


def test_majority_with_equal_weights_is_rewards_vote() -> None:
    draw = np.random.default_rng(0)
    for _ in range(200):
        said = draw.choice(["4", "4.0", "5", "Yes", "yes", "1,000", "1000", ""], size=draw.integers(1, 8))
        examples = [Example("", f"so\nAnswer: {x}" if x else "hm", bool(x), "") for x in said]
        weights = [1 / 3 if x else 0.0 for x in said]
        drawn = [Rollout([], [], True, "")] * len(said)
        assert choices.answers._weighted_vote(examples, drawn, weights).answer == vote(
            [find_answer(e.solution) for e in examples]
        )
    examples = [Example("", f"Answer: {x}", True, "") for x in ("a", "b", "b", "c")]
    drawn = [Rollout([], [], x != "c", "") for x in ("a", "b", "b", "c")]
    assert choices.answers._weighted_vote(examples, drawn, [1.0, 0.2, 0.3, 0.9]).answer == "a"
    found = choices.answers._weighted_vote(examples, drawn, [1.0, 0.5, 0.6, 0.9])
    assert found.answer == "b" and found.solution == examples[2].solution and found.finished
    cut = choices.answers._weighted_vote(examples, drawn, [1.0, 0.2, 0.3, 1.9])
    assert cut.answer == "c" and not cut.finished


def test_rpc_weighs_by_probability_once_per_text(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    def rollout(text: str, p: float) -> Rollout:
        return Rollout([1, 2], [float(np.log(p))] * 2, True, text)

    own = [rollout("Answer: 1", 0.9)] + [rollout("Answer: 2", 0.6)] * 3 + [rollout("no", 0.99)]
    examples = [choices.examples._own("", r) for r in own]
    monkeypatch.setattr(choices.weights, "improbable", lambda p: np.zeros(len(p), bool))
    valid_TN = torch.tensor([[e.valid for e in examples]])
    practice = Practice([], [own], [examples], None, valid_TN)  # type: ignore[arg-type]
    weight_TN = choices.probable(kit, [], practice)
    assert weight_TN[0, 0] == pytest.approx(3) and weight_TN.sum() == pytest.approx(5)
    assert sorted(weight_TN[0].tolist())[:3] == [0, 0, 0]


def test_improbable_cuts_the_lower_of_two_groups() -> None:
    draw = np.random.default_rng(0)
    low, high = draw.uniform(0.05, 0.15, 20), draw.uniform(0.7, 0.9, 30)
    cut = choices.weights.improbable(np.concatenate([low, high]))
    assert cut[:20].mean() > 0.9 and not cut[20:].any()
    for few in ([0.5], [0.5, 0.5], [0.1, 0.2, 0.9]):
        assert not choices.weights.improbable(np.array(few))[np.argmax(few)]
