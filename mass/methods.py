"""Test time: what a method does with T problems at once. Each method is five choices, one row of `METHODS`.

examples   where practice comes from: self-made, own answers, training problems, or none
weights    how much each example counts
update     what the adapters do with them: K fine-tuning steps, or nothing
gate       which problems get any of this; the others are answered as by `none`
answer     greedy, with examples in the prompt, a vote, or one of the own answers

A choice is a function of `mass.choices`, None where there is nothing to choose. Nothing carries over from one call to the next: the
adapters live in a call of `solve`, and no reference answer is in reach (`Problem` has none). docs/test-time.md names the
paper of each method and says where ours differs.
"""

import difflib
import time
from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from mass.choices import (
    Answered,
    Kit,
    Work,
    best,
    fine_tuned,
    greedily,
    greedy,
    in_context,
    majority,
    overlong,
    own_answers,
    probable,
    sample,
    scored,
    self_made,
    shortest,
    shots_for,
    training_problems,
    uniform,
)
from mass.errors import MassError
from mass.generate import Rollout
from mass.practice import Practice, Tuned, solve_sequence
from mass.problems import Problem
from mass.rewards import find_answer, vote

Examples = Callable[[Kit, Seq[Problem]], Practice]
Weights = Callable[[Kit, Seq[Problem], Practice], Tensor]
Update = Callable[[Kit, Practice, Tensor], Tuned]
Gate = Callable[[Kit, Seq[Problem]], list[bool]]
Answer = Callable[[Kit, Work], list[Answered]]


@dataclass(frozen=True)
class Method:
    """One row: see the top of this file."""

    examples: Examples | None
    weights: Weights | None
    update: Update | None
    gate: Gate | None
    answer: Answer


# ---- the table

METHODS: dict[str, Method] = {
    #                    examples           weights   update      gate  answer
    "none": Method(None, None, None, None, greedy),
    # self-consistency: Wang et al., arXiv 2203.11171
    "vote": Method(own_answers, uniform, None, None, majority),
    # RPC: Zhou et al., arXiv 2502.00511
    "rpc": Method(own_answers, probable, None, None, majority),
    # First Finish Search: Agarwal et al., arXiv 2505.18149
    "first-finish": Method(own_answers, shortest, None, None, best),
    # best of n: Cobbe et al., arXiv 2110.14168, with our scorer as the verifier
    "pick": Method(own_answers, scored, None, None, best),
    # self-made demonstrations: Kim et al. (SG-ICL), arXiv 2206.08082, chosen by our scorer
    "in-context": Method(self_made, scored, None, None, in_context),
    # the control "random training data" of MASS
    "random": Method(training_problems, uniform, fine_tuned, None, greedy),
    # QueST: Song et al., arXiv 2605.13369; also the arm TT-SS of MASS
    "quest": Method(self_made, uniform, fine_tuned, None, greedy),
    # MASS: Kaya and Rui, arXiv 2603.03524
    "mass": Method(self_made, scored, fine_tuned, None, greedy),
}


def find(name: str, *, has_scorer: bool, has_pool: bool) -> Method:
    """The row of a method. Raises MassError when there is none of that name or it needs what is not there."""
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=1)
        hint = f"did you mean {near[0]}?" if near else "unknown."
        raise MassError(f"method {name!r}: {hint} The methods are {', '.join(METHODS)}.")
    method = METHODS[name]
    if method.weights is scored and not has_scorer:
        free = [other for other, row in METHODS.items() if row.weights is not scored]
        raise MassError(
            f"method {name} weighs by a trained scorer, and there is none here: name a run folder that mass-train "
            f"made, or use a method without one ({', '.join(free)})."
        )
    if method.examples is training_problems and not has_pool:
        raise MassError(
            f"method {name} draws training problems, and there are none here: set problems.train=FILE.jsonl."
        )
    return method


# ---- records


@dataclass(frozen=True)
class Made:
    """One example: its weight, and why it is malformed (`reason`, "" when valid)."""

    problem: str
    solution: str
    weight: float
    valid: bool
    reason: str


@dataclass(frozen=True)
class StepLoss:
    """The weighted inner loss before and after one step of the update."""

    before: float
    after: float


@dataclass(frozen=True)
class Tokens:
    """`generated`: sampled for examples and answer. `trained`: tokens of the valid examples, each whole, times K."""

    generated: int = 0
    trained: int = 0


@dataclass(frozen=True)
class Seconds:
    """A problem's share of its batch's wall time, without the baselines."""

    generate: float = 0.0
    score: float = 0.0
    adapt: float = 0.0
    answer: float = 0.0


@dataclass(frozen=True)
class Record:
    """What came of one problem. `mass-adapt --json` prints these fields.

    answer          None where `solution`, its text, states none
    base_answer     greedy by the same weights without update; None also where no baselines were asked for
    vote_answer     majority of `votes` samples of those weights, of as many tokens as the method spent
    steps           one for each step of the update; empty without
    note            what is worth knowing: no valid example, an update that was dropped
    error           why there is no answer at all (all else is then empty); None when there is nothing wrong
    finished        `solution` ended by itself, not at generate.answer_tokens
    """

    id: str
    problem: str
    method: str
    answer: str | None = None
    base_answer: str | None = None
    vote_answer: str | None = None
    votes: int = 0
    solution: str = ""
    base_solution: str = ""
    examples: tuple[Made, ...] = ()
    steps: tuple[StepLoss, ...] = ()
    tokens: Tokens = Tokens()
    seconds: Seconds = Seconds()
    note: str = ""
    error: str | None = None
    finished: bool = True


def solve(kit: Kit, problems: Seq[Problem], method: str, *, baselines: bool = True) -> list[Record]:
    """Adapt to T problems at once and answer them, each with an adapter of its own; one Record a problem, in order.

    A problem's record does not depend on what shares its batch, but for rounding and `seconds`. One whose prompt does
    not fit the model's context is a record with an `error`. The model and its adapter are left as they were found.
    `baselines` also answers without update and by vote (their cost is in no record). Raises MassError for a method that
    needs what the kit lacks.
    """
    row = find(method, has_scorer=kit.head is not None, has_pool=bool(kit.pool))
    errors = [_unfit(kit, row, p) for p in problems]
    records = {t: Record(p.id, p.text, method, error=errors[t]) for t, p in enumerate(problems) if errors[t]}
    fit = [t for t in range(len(problems)) if t not in records]
    opened = row.gate(kit, [problems[t] for t in fit]) if row.gate and fit else [True] * len(fit)
    for is_open, choices in ((True, row), (False, METHODS["none"])):
        group = [t for t, gate in zip(fit, opened, strict=True) if gate is is_open]
        if group:
            done = _solve(kit, [problems[t] for t in group], method, choices, baselines)
            if not is_open:
                done = [
                    replace(record, note="the gate is closed: answered without update") for record in done
                ]
            records |= zip(group, done, strict=True)
    return [records[t] for t in range(len(problems))]


def _solve(kit: Kit, problems: Seq[Problem], name: str, row: Method, baselines: bool) -> list[Record]:
    T = len(problems)
    marks = [time.perf_counter()]
    practice = row.examples(kit, problems) if row.examples else None
    marks.append(time.perf_counter())
    weight_TN = row.weights(kit, problems, practice) if row.weights and practice else None
    marks.append(time.perf_counter())
    tuned = None
    if row.update and practice and weight_TN is not None and practice.valid_TN.any():
        tuned = row.update(kit, practice, weight_TN)
    has_T = practice.valid_TN.any(1).tolist() if practice else [False] * T
    kept_T = (~tuned.exploded_T).tolist() if tuned else [False] * T
    moved = [has and kept for has, kept in zip(has_T, kept_T, strict=True)]
    marks.append(time.perf_counter())
    work = Work(problems, practice, weight_TN, tuned, moved)
    answered = row.answer(kit, work)
    marks.append(time.perf_counter())
    seconds = Seconds(*[(after - before) / T for before, after in zip(marks, marks[1:], strict=False)])

    tokens = [_tokens(kit, work, t, answered[t]) for t in range(T)]
    base: list[Answered | None] = [None] * T
    votes: list[list[Rollout]] = [[] for _ in problems]
    if baselines:
        same = [row.answer is greedy and not moved[t] for t in range(T)]
        others = iter(greedily(kit, [p for p, done in zip(problems, same, strict=True) if not done], kit.one))
        base = [answered[t] if same[t] else next(others) for t in range(T)]
        have = practice.rollouts if practice and row.examples is own_answers else votes
        votes = _votes(kit, problems, [x.generated + x.trained for x in tokens], have)
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
                _note(work, t),
                finished=answered[t].finished,
            )
        )
    return records


def _votes(
    kit: Kit, problems: Seq[Problem], budget: Seq[int], have: Seq[Seq[Rollout]]
) -> list[list[Rollout]]:
    """Samples 0, 1, ... of each problem until its next one would go over its budget of tokens; at least one.

    In rounds over all problems: how many samples fit is known only when their lengths are.
    """
    drawn = [list(own) for own in have]
    while True:
        more = [
            _more(own, most, kit.answering.max_new_tokens) for own, most in zip(drawn, budget, strict=True)
        ]
        if not any(more):
            break
        which = [range(len(own), len(own) + n) for own, n in zip(drawn, more, strict=True)]
        for own, new in zip(drawn, sample(kit, problems, which), strict=True):
            own += new
    within = [
        np.cumsum([len(r.tokens) for r in own]) <= most for own, most in zip(drawn, budget, strict=True)
    ]
    return [own[: max(1, int(fits.sum()))] for own, fits in zip(drawn, within, strict=True)]


def _more(own: Seq[Rollout], budget: int, longest: int) -> int:
    """How many further samples fit a budget for certain (none drawn yet), or by the mean length of those drawn."""
    if not own:
        return max(1, budget // longest)
    spent = sum(len(r.tokens) for r in own)
    return max(0, (budget - spent) * len(own) // spent)


def _unfit(kit: Kit, row: Method, problem: Problem) -> str | None:
    shots = shots_for(kit, problem)
    error = overlong(kit, kit.prompts.solve(problem.text, shots.solve), kit.answering)
    if error is None and row.examples is self_made:
        error = overlong(kit, kit.prompts.generate(problem.text, shots.generate), kit.writing)
    return error


def _tokens(kit: Kit, work: Work, t: int, answered: Answered) -> Tokens:
    generated = answered.tokens
    trained = 0
    if work.practice:
        generated += sum(len(r.tokens) for r in work.practice.rollouts[t])
    if work.practice and work.tuned:
        # each example whole: what of its prompt is shared in a packed row depends on the batch
        shots = shots_for(kit, work.problems[t]).solve
        valid = [e for e in work.practice.examples[t] if e.valid]
        size = sum(len(solve_sequence(kit.prompts, e.problem, e.solution, shots).tokens) for e in valid)
        trained = size * len(work.tuned.trajectory.steps)
    return Tokens(generated, trained)


def _made(work: Work, t: int) -> tuple[Made, ...]:
    if work.practice is None or work.weight_TN is None:
        return ()
    return tuple(
        Made(e.problem, e.solution, weight, e.valid, e.reason)
        for e, weight in zip(work.practice.examples[t], work.weight_TN[t].tolist(), strict=True)
    )


def _losses(work: Work, t: int) -> tuple[StepLoss, ...]:
    if work.tuned is None or work.weight_TN is None or not work.weight_TN[t].any():
        return ()
    weight_N = work.weight_TN[t]
    steps = work.tuned.trajectory.steps
    at = [float((weight_N * step.loss_TN[t]).sum() / len(weight_N)) for step in steps] + [
        float(work.tuned.after_T[t])
    ]
    return tuple(StepLoss(before, after) for before, after in zip(at, at[1:], strict=False))


def _note(work: Work, t: int) -> str:
    if work.practice is None:
        return ""
    if not work.practice.valid_TN[t].any():
        reasons = Counter(e.reason for e in work.practice.examples[t])
        counts = ", ".join(f"{reason} {n}" for reason, n in reasons.most_common())
        return f"none of {len(work.practice.examples[t])} examples is valid ({counts}): they were not used"
    if work.tuned and not work.moved[t]:
        before, after = float(work.tuned.before_T[t]), float(work.tuned.after_T[t])
        return f"the inner loss went from {before:.3g} to {after:.3g}: the update was dropped"
    return ""
