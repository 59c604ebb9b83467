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
    fine_tuned,
    fine_tuned_on_best,
    greedy,
    in_context,
    leave_one_out,
    majority,
    over_views,
    own_answers,
    own_samples,
    policy_gradient,
    probable,
    scored,
    self_made,
    shortest,
    shots_for,
    shuffled,
    small_margin,
    teacher_made,
    training_problems,
    uniform,
)
from mass.choices.budget import fill
from mass.choices.kit import greedily, overlong, sample
from mass.choices.signals import signals
from mass.chooser import CANDIDATES
from mass.errors import MassError
from mass.generate import Rollout
from mass.practice import Practice
from mass.problems import Problem
from mass.records import Made, Record, Seconds, StepLoss, Tokens
from mass.rewards import find_answer, vote
from mass.schema import Guard
from mass.worlds import WORLDS

Examples = Callable[[Kit, Seq[Problem], Room], Practice]
Weights = Callable[[Kit, Seq[Problem], Practice], Tensor]
Update = Callable[[Kit, Seq[Problem], Practice, Tensor], Updated]
Gate = Callable[[Kit, Seq[Problem]], list[Gated]]
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
    # few-shot test-time training: Akyurek et al., arXiv 2411.07279
    "ttt": Method(leave_one_out, uniform, fine_tuned, None, over_views),
    # QueST: Song et al., arXiv 2605.13369; also the arm TT-SS of MASS
    "quest": Method(self_made, uniform, fine_tuned, None, greedy),
    # TT-SI, and TT-D with a stronger model: Acikgoz et al., arXiv 2510.07841
    "tt-si": Method(self_made, uniform, fine_tuned, small_margin, greedy),
    "tt-d": Method(teacher_made, uniform, fine_tuned, small_margin, greedy),
    # VDS-TTT: arXiv 2505.19475
    "vds": Method(own_answers, best_scored, fine_tuned_on_best, None, greedy),
    # TTRL: Zuo et al., arXiv 2504.16084; with knobs.forking and knobs.band SPINE: Wu et al., arXiv 2511.17938
    "ttrl": Method(own_samples, agreement, policy_gradient, None, greedy),
    # MASS: Kaya and Rui, arXiv 2603.03524
    "mass": Method(self_made, scored, fine_tuned, None, greedy),
    # the control "random weights" of MASS
    "shuffled": Method(self_made, shuffled, fine_tuned, None, greedy),
    # the upper bound where the truth of every example is known
    "oracle": Method(self_made, by_truth, fine_tuned, None, greedy),
}


# the weights that a trained scorer gives
SCORED = (scored, shuffled, best_scored)
# chosen for each problem among some of the rows, by what `mass-adapt fit` has learned
AUTO = "auto"


def find(
    name: str,
    *,
    has_scorer: bool,
    has_pool: bool,
    has_teacher: bool = False,
    has_chooser: bool = False,
    has_truth: bool = False,
    steps: int = 1,
) -> Method:
    """The row of a method (of `auto` its first choice). Raises MassError when there is none of that name or it needs what
    is not there; `steps`: K, which a method that updates wants to be 1 or more."""
    if name == AUTO and has_chooser:
        return METHODS["none"]
    if name == AUTO:
        raise MassError(
            "method auto is not fitted here: mass-adapt fit --run RUN --file DEV.jsonl --budget TOKENS does that for a run."
        )
    if name not in METHODS:
        near = difflib.get_close_matches(name, [*METHODS, AUTO], n=1)
        hint = f"did you mean {near[0]}?" if near else "unknown."
        raise MassError(f"method {name!r}: {hint} The methods are {', '.join([*METHODS, AUTO])}.")
    method = METHODS[name]
    if method.weights in SCORED and not has_scorer:
        free = [other for other, row in METHODS.items() if row.weights not in (*SCORED, by_truth)]
        raise MassError(
            f"method {name} weighs by a trained scorer, and there is none here: name a run folder that mass-train "
            f"made, or use a method without one ({', '.join(free)})."
        )
    if method.examples is training_problems and not has_pool:
        raise MassError(
            f"method {name} draws training problems, and there are none here: set problems.train=FILE.jsonl, "
            "or train the run with prompt.pool=16."
        )
    if method.examples is teacher_made and not has_teacher:
        raise MassError(
            f"method {name} has its examples from a stronger model: name it with --teacher MODEL or "
            "--teacher http://HOST:PORT/v1#MODEL."
        )
    if method.weights is by_truth and not has_truth:
        raise MassError(
            f"method {name} weighs by the truth of each example, which only a planted world knows: it is an arm of mass-eval, "
            f"where every problem is of a world (--problems world:{next(iter(WORLDS))})."
        )
    if method.update and steps == 0:
        free = [other for other, row in METHODS.items() if not row.update]
        raise MassError(
            f"method {name} updates, and inner.steps=0 takes no step: set inner.steps=1 or more, or use a method "
            f"without update ({', '.join(free)})."
        )
    return method


def solve(kit: Kit, problems: Seq[Problem], method: str, *, baselines: bool = True) -> list[Record]:
    """Adapt to T problems at once and answer them, each with an adapter of its own; one Record a problem, in order.

    A problem's record does not depend on what shares its batch, but for rounding and `seconds`. One whose prompt does
    not fit the model's context is a record with an `error`. The model and its adapter are left as they were found.
    `baselines` also answers without update and by vote (their cost is in no record). Raises MassError for a method that
    needs what the kit lacks.
    """
    row = find(
        method,
        has_scorer=kit.head is not None,
        has_pool=bool(kit.pool),
        has_teacher=kit.teacher is not None,
        has_chooser=kit.chooser is not None,
        has_truth=kit.truth is not None,
        steps=kit.steps,
    )
    if method == AUTO:
        return _auto(kit, problems, baselines)
    if kit.budget is not None and kit.budget < kit.answering.max_new_tokens:
        raise ValueError(f"a budget of {kit.budget} tokens does not pay for one answer")
    if row.update is policy_gradient and kit.guard != Guard():
        raise MassError(f"method {method} is no fine-tuning, which the guards are for: leave guard.* out.")
    errors = [_unfit(kit, row, p) for p in problems]
    records = {t: Record(p.id, p.text, method, error=errors[t]) for t, p in enumerate(problems) if errors[t]}
    fit = [t for t in range(len(problems)) if t not in records]
    marks = [time.perf_counter()]
    gated = [Gated(True, [])] * len(fit)
    if row.gate and fit:
        gated = row.gate(kit, [problems[t] for t in fit])
    seconds = (time.perf_counter() - marks[0]) / max(1, len(fit))
    for is_open, choices in ((True, row), (False, METHODS["none"])):
        group = [(t, gate) for t, gate in zip(fit, gated, strict=True) if gate.open is is_open]
        if group:
            done = _solve(
                kit, [problems[t] for t, _ in group], method, choices, baselines, [g for _, g in group]
            )
            done = [
                replace(record, seconds=replace(record.seconds, generate=record.seconds.generate + seconds))
                for record in done
            ]
            records |= zip([t for t, _ in group], done, strict=True)
    return [records[t] for t in range(len(problems))]


def usable(kit: Kit, name: str, problem: Problem) -> bool:
    """Whether a row of the table can be used on a problem."""
    row = METHODS[name]
    lacks = (row.weights in SCORED and kit.head is None) or (row.update and not kit.steps)
    return not lacks and _unfit(kit, row, problem) is None


def solve_drawn(
    kit: Kit,
    problems: Seq[Problem],
    name: str,
    said: str,
    drawn: Seq[list[Rollout]],
    *,
    notes: Seq[str] | None = None,
    baselines: bool = True,
) -> list[Record]:
    """A row's records, called `said`, for problems that it is usable on and whose own answers 0, 1, ... are `drawn`.

    Methods that answer or learn from own answers begin with these; for the others they are a cost."""
    if not problems:
        return []
    gated = [Gated(True, own, note) for own, note in zip(drawn, notes or [""] * len(drawn), strict=True)]
    return _solve(kit, problems, said, METHODS[name], baselines, gated)


def _auto(kit: Kit, problems: Seq[Problem], baselines: bool) -> list[Record]:
    chooser = kit.chooser
    assert chooser is not None
    if kit.budget not in (None, chooser.budget):
        raise MassError(
            f"method auto was fitted under --budget {chooser.budget}, not {kit.budget}: leave it out, or fit again."
        )
    kit = replace(kit, budget=chooser.budget)
    errors = [_unfit(kit, METHODS["none"], p) for p in problems]
    records = {t: Record(p.id, p.text, AUTO, error=errors[t]) for t, p in enumerate(problems) if errors[t]}
    fit = [t for t in range(len(problems)) if t not in records]
    if not fit:
        return [records[t] for t in range(len(problems))]
    started = time.perf_counter()
    seen_PS, drawn = signals(kit, [problems[t] for t in fit], chooser.samples)
    seconds = (time.perf_counter() - started) / len(fit)
    groups: dict[str, list[tuple[int, list[Rollout], str]]] = {}
    for t, signal_S, own in zip(fit, seen_PS, drawn, strict=True):
        among = [name for name in CANDIDATES if usable(kit, name, problems[t])]
        name, why = chooser.choose(signal_S, among)
        groups.setdefault(name, []).append((t, own, why))
    for name, group in groups.items():
        where, own_answers, notes = zip(*group, strict=True)
        done = solve_drawn(
            kit, [problems[t] for t in where], name, AUTO, own_answers, notes=notes, baselines=baselines
        )
        for t, record in zip(where, done, strict=True):
            spent = replace(record.seconds, generate=record.seconds.generate + seconds)
            records[t] = replace(record, seconds=spent)
    return [records[t] for t in range(len(problems))]


def _solve(
    kit: Kit, problems: Seq[Problem], name: str, row: Method, baselines: bool, gated: Seq[Gated]
) -> list[Record]:
    T = len(problems)
    marks = [time.perf_counter()]
    practice = row.examples(kit, problems, _room(kit, row, gated)) if row.examples else None
    marks.append(time.perf_counter())
    weight_TN = row.weights(kit, problems, practice) if row.weights and practice else None
    marks.append(time.perf_counter())
    updated = None
    if row.update and practice and weight_TN is not None and (weight_TN != 0).any():
        updated = row.update(kit, problems, practice, weight_TN)
    learns = (weight_TN != 0).any(1).tolist() if weight_TN is not None else [False] * T
    moved = [has and updated is not None and updated.ok[t] for t, has in enumerate(learns)]
    marks.append(time.perf_counter())
    work = Work(problems, practice, weight_TN, updated, moved, None)
    before = [_tokens(work, t, row, gated[t], None) for t in range(T)]
    if kit.budget is not None:
        work = replace(work, left=[kit.budget - x.generated - x.trained for x in before])
    answered = row.answer(kit, work)
    marks.append(time.perf_counter())
    seconds = Seconds(*[(after - before) / T for before, after in zip(marks, marks[1:], strict=False)])

    tokens = [_tokens(work, t, row, gated[t], answered[t]) for t in range(T)]
    base: list[Answered | None] = [None] * T
    votes: list[list[Rollout]] = [[] for _ in problems]
    if baselines:
        same = [row.answer is greedy and not moved[t] for t in range(T)]
        others = iter(greedily(kit, [p for p, done in zip(problems, same, strict=True) if not done], kit.one))
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


def _unfit(kit: Kit, row: Method, problem: Problem) -> str | None:
    if row.examples is leave_one_out and len(problem.demonstrations) < 2:
        count = len(problem.demonstrations)
        return (
            f"method ttt learns from a problem's demonstrations, two or more, and this one has {count or 'none'}: give "
            'it a key "demonstrations", or set problems.demonstrations=10 to take solved problems of its subject'
        )
    shots = shots_for(kit, problem)
    error = overlong(kit, kit.prompts.solve(problem.text, shots.solve), kit.answering)
    if error is None and row.examples is self_made:
        error = overlong(kit, kit.prompts.generate(problem.text, shots.generate), kit.writing)
    return error


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
