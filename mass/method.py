"""One method on T problems at once: its five choices one after the other, the baselines, and what came of each problem.

A choice is a function of `mass.choices`, None where there is nothing to choose.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from mass.choices import (
    Answered,
    Gated,
    Kit,
    Room,
    Updated,
    Work,
    agreement,
    best,
    best_scored,
    by_truth,
    fine_tuned_on_best,
    greedy,
    majority,
    over_views,
    own_answers,
    own_samples,
)
from mass.choices.budget import fill
from mass.choices.kit import greedily, sample
from mass.generate import Rollout
from mass.practice import Practice
from mass.problems import Problem
from mass.records import Made, Record, Seconds, StepLoss, Tokens
from mass.rewards import find_answer, vote

Examples = Callable[[Kit, Seq[Problem], Room], Practice]
Weights = Callable[[Kit, Seq[Problem], Practice], Tensor]
Update = Callable[[Kit, Seq[Problem], Practice, Tensor], Updated]
Gate = Callable[[Kit, Seq[Problem]], list[Gated]]
Answer = Callable[[Kit, Work], list[Answered]]


@dataclass(frozen=True)
class Method:
    """Five choices, a row of `mass.methods.METHODS`.

    examples   where practice comes from: self-made, own answers, training problems, or none
    weights    how much each example counts
    update     what the adapters do with them: K fine-tuning steps, or nothing
    gate       which problems get any of this; the others are answered as by `none`
    answer     greedy, with examples in the prompt, a vote, or one of the own answers
    """

    examples: Examples | None
    weights: Weights | None
    update: Update | None
    gate: Gate | None
    answer: Answer


def carry_out(
    kit: Kit, problems: Seq[Problem], name: str, row: Method, baselines: bool, gated: Seq[Gated]
) -> list[Record]:
    """The records of T problems, called `name`, that fit the model's context; `gated` is what each one's gate said and drew.

    All of them are updated: a problem whose gate is closed belongs into a call with the row of `none`. `baselines` also
    answers without update and by vote.
    """
    T = len(problems)
    marks = [kit.clock()]
    practice = row.examples(kit, problems, _room(kit, row, gated)) if row.examples else None
    marks.append(kit.clock())
    weight_TN = row.weights(kit, problems, practice) if row.weights and practice else None
    marks.append(kit.clock())
    updated = None
    if row.update and practice and weight_TN is not None and (weight_TN != 0).any():
        updated = row.update(kit, problems, practice, weight_TN)
    learns = (weight_TN != 0).any(1).tolist() if weight_TN is not None else [False] * T
    moved = [has and updated is not None and updated.ok[t] for t, has in enumerate(learns)]
    marks.append(kit.clock())
    work = Work(problems, practice, weight_TN, updated, moved, None)
    before = [_tokens(work, t, row, gated[t], None) for t in range(T)]
    if kit.budget is not None:
        work = replace(work, left=[kit.budget - x.generated - x.trained for x in before])
    answered = row.answer(kit, work)
    marks.append(kit.clock())
    seconds = Seconds(*[(after - before) / T for before, after in zip(marks, marks[1:], strict=False)])

    tokens = [_tokens(work, t, row, gated[t], answered[t]) for t in range(T)]
    base: list[Answered | None] = [None] * T
    votes: list[list[Rollout]] = [[] for _ in problems]
    if baselines:
        same = [row.answer is greedy and not moved[t] for t in range(T)]
        others = iter(greedily(kit, [p for p, done in zip(problems, same, strict=True) if not done]))
        base = [answered[t] if same[t] else next(others) for t in range(T)]
        have = practice.rollouts if practice and row.examples in OWN else [gate.drawn for gate in gated]
        spent = [x.generated + x.trained if kit.budget is None else kit.budget for x in tokens]
        votes = _votes(kit, problems, spent, have)
    records = []
    for t, p in enumerate(problems):
        first = base[t] or Answered(None, "", 0)
        records.append(
            Record(
                p.id,
                p.text,
                name,
                answered[t].answer,
                first.answer,
                vote([find_answer(r.text) for r in votes[t]]),
                len(votes[t]),
                answered[t].solution,
                first.solution,
                _made(work, t),
                _losses(work, t),
                tokens[t],
                seconds,
                "; ".join(filter(None, [gated[t].note, _note(work, row, t)])),
                finished=answered[t].finished,
            )
        )
    return records


# the choices whose examples are own answers 0, 1, ..., as a gate and the vote draw them
OWN = (own_answers, own_samples)


def _room(kit: Kit, row: Method, gated: Seq[Gated]) -> Room:
    """What is left for examples: the budget without the gate's samples and without what the answer may take."""
    passes = kit.steps if row.update else 0
    have = [gate.drawn for gate in gated]
    single = row.update is fine_tuned_on_best
    if kit.budget is None:
        return Room(None, passes, single, have)
    spent = [0 if row.examples in OWN else sum(len(r.tokens) for r in own) for own in have]
    left = [kit.budget - x for x in spent]
    if row.answer is over_views:
        # half for learning, what is left of the whole for the views
        left = [min(x // 2, x - kit.answering.max_new_tokens) for x in left]
    elif row.answer not in (majority, best):
        left = [x - kit.answering.max_new_tokens for x in left]
    return Room(left, passes, single, have)


def _votes(
    kit: Kit, problems: Seq[Problem], budget: Seq[int], have: Seq[Seq[Rollout]]
) -> list[list[Rollout]]:
    """Samples 0, 1, ... of each problem until its next one would go over its budget of tokens; at least one."""
    return fill(
        budget,
        kit.answering.max_new_tokens,
        lambda which: sample(kit, problems, which),
        lambda _, own: np.cumsum([len(r.tokens) for r in own]).tolist(),
        have,
        least=1,
    )


def _tokens(work: Work, t: int, row: Method, gated: Gated, answered: Answered | None) -> Tokens:
    generated = answered.tokens if answered else 0
    trained = 0
    if row.examples not in OWN:
        generated += sum(len(r.tokens) for r in gated.drawn)
    if work.practice:
        generated += sum(len(r.tokens) for r in work.practice.rollouts[t])
    if work.practice and work.updated and work.weight_TN is not None:
        # each example whole: what of its prompt is shared in a packed row depends on the batch
        size_N = work.practice.packed.length_TN[t] * (work.weight_TN[t] != 0).cpu()
        trained = int(size_N.sum()) * work.updated.steps
    return Tokens(generated, trained)


def _made(work: Work, t: int) -> tuple[Made, ...]:
    if work.practice is None or work.weight_TN is None:
        return ()
    own = work.practice.examples[t]
    # the weights add up to the batch's longest list of examples
    scale = len(own) / max(1, work.weight_TN.shape[1])
    return tuple(
        Made(e.problem, e.solution, weight * scale, e.valid, e.reason)
        for e, weight in zip(own, work.weight_TN[t].tolist(), strict=False)
    )


def _losses(work: Work, t: int) -> tuple[StepLoss, ...]:
    if work.updated is None:
        return ()
    at = work.updated.losses[t]
    return tuple(StepLoss(before, after) for before, after in zip(at, at[1:], strict=False))


def _note(work: Work, row: Method, t: int) -> str:
    if work.practice is None:
        return ""
    own = work.practice.examples[t]
    if not own:
        return "the budget has no room for an example"
    if not work.practice.valid_TN[t].any():
        reasons = Counter(e.reason for e in own)
        counts = ", ".join(f"{reason} {n}" for reason, n in reasons.most_common())
        return f"none of {len(own)} examples is valid ({counts}): they were not used"
    if row.update and work.weight_TN is not None and not work.weight_TN[t].any():
        return NO_WEIGHT.get(row.weights, "no example has a weight: there was no update")  # type: ignore[arg-type]
    return work.updated.notes[t] if work.updated else ""


# why all weights may be zero although there are valid examples
NO_WEIGHT: Mapping[Weights, str] = {
    agreement: "all samples have the same reward: there was no update",
    by_truth: "no example is right and of the problem's family: there was no update",
    best_scored: "no own answer reaches the threshold: there was no update",
}
