"""Equal budgets: no method spends more tokens than it is given, also one made of a new row."""

import random
from dataclasses import replace
from itertools import accumulate
from typing import Any

import pytest
from handmade import GRIDS, PLAIN, SUMS

from mass import choices
from mass.choices import Kit, examples
from mass.choices.budget import fill
from mass.generate import Rollout
from mass.methods import METHODS, Method, solve
from mass.practice import Practice, pack_examples
from mass.prompts import Example
from mass.worlds import Truth


@pytest.mark.usefixtures("answers")
@pytest.mark.parametrize("method", list(METHODS))
def test_no_method_spends_more_than_the_budget(
    kit: Kit, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if method in ("quest", "mass", "shuffled", "oracle", "tt-si", "in-context"):
        # examples that a random model writes are malformed: count every one as valid
        whole = lambda text, finished: Example(text or "x", "Answer: 3", True, "")  # noqa: E731
        monkeypatch.setattr(examples, "parse_example", whole)
        monkeypatch.setattr(choices.examples, "read_examples", _read(whole))
    written = Rollout([1] * 20, [0.0] * 20, True, "Problem: What is 1 + 1?\nSolution: Answer: 2")
    taught = replace(kit, teacher=lambda texts, shots, seeds: [[written] * len(own) for own in seeds])
    taught = replace(taught, truth=lambda *_: Truth(True, True, None))
    problems = [SUMS, PLAIN] if method != "ttt" else [SUMS, GRIDS]
    counts = []
    for budget in (8, 60, 900):
        records = solve(replace(taught, budget=budget), problems, method)
        for record in records:
            spent = record.tokens.generated + record.tokens.trained
            assert record.error is None and 0 < spent <= budget, (method, budget, record.tokens)
            assert record.votes >= 1
        counts.append(len(records[0].examples))
        alone = solve(replace(taught, budget=budget), problems[1:], method)[0]
        assert (alone.tokens, alone.solution, alone.votes) == (
            records[1].tokens,
            records[1].solution,
            records[1].votes,
        )
    if METHODS[method].examples and method not in ("tt-d",):
        assert counts[-1] > counts[0]
    if method in ("vote", "rpc", "pick", "first-finish"):
        assert 900 - 8 < records[0].tokens.generated and records[0].votes == counts[-1]


def _read(parse: Any) -> Any:
    def read(lm: Any, prompts: Any, texts: Any, rollouts: Any, shots: Any) -> Practice:
        made = [
            choices.examples.filter_examples([parse(r.text, r.finished) for r in own], text)
            for own, text in zip(rollouts, texts, strict=True)
        ]
        packed, valid_TN = pack_examples(lm, prompts, made, shots)
        return Practice([], rollouts, made, packed, valid_TN)

    return read


def test_as_many_samples_as_one_after_the_other_would_have() -> None:
    """Lengths that differ as those of texts do: a short sample still fits where one of mean length would not."""
    draw = random.Random(0)
    lengths = [[1 + min(127, int(draw.expovariate(1 / 60))) for _ in range(2000)] for _ in range(60)]

    def rollouts(which: list[range]) -> list[list[Rollout]]:
        return [
            [Rollout([1] * own[j], [0.0] * own[j], True, "") for j in some]
            for own, some in zip(lengths, which, strict=True)
        ]

    def cost(t: int, own: list[Rollout]) -> list[int]:
        return list(accumulate(len(r.tokens) for r in own))

    for room in (1, 40, 256, 1024):
        found = fill([room] * 60, 128, rollouts, cost, [[]] * 60)
        assert [len(own) for own in found] == [sum(x <= room for x in accumulate(own)) for own in lengths]


def test_a_budget_without_room_for_an_example_says_so(kit: Kit) -> None:
    record = solve(replace(kit, budget=8), [PLAIN], "quest")[0]
    assert record.note == "the budget has no room for an example" and record.solution == record.base_solution
    with pytest.raises(ValueError, match="does not pay for one answer"):
        solve(replace(kit, budget=7), [PLAIN], "none")


def test_another_method_is_a_row(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    row = Method(
        choices.own_answers, choices.probable, choices.fine_tuned, choices.small_margin, choices.greedy
    )
    monkeypatch.setitem(METHODS, "mine", row)
    (record,) = solve(replace(kit, budget=200), [PLAIN], "mine")
    assert record.error is None and record.tokens.generated + record.tokens.trained <= 200
