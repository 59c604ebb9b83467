"""Test time: the table of methods, and what is done with T problems by one of them or by method `auto`.

A method is five choices (`mass.method.Method`), one row of `METHODS`. Nothing carries over from one call to the next: the
adapters live in a call of `solve`, and no reference answer is in reach (`Problem` has none). docs/test-time.md names the
paper of each method and says where ours differs.
"""

import difflib
from collections.abc import Sequence as Seq
from dataclasses import replace

from mass.choices import (
    Gated,
    Kit,
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
from mass.choices.examples import check_pool, training_problems_for
from mass.choices.kit import overlong
from mass.choices.signals import signals
from mass.chooser import CANDIDATES, Chooser
from mass.errors import MassError
from mass.generate import Rollout
from mass.method import Method, carry_out
from mass.problems import Problem
from mass.records import Record
from mass.schema import Guard
from mass.worlds import WORLDS

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
            f"method {name} draws training problems, and there are none here: set problems.train=FILE.jsonl and prompt.pool "
            "above 0 beside a bare model, or train the run with prompt.pool=16."
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


def check(
    name: str,
    *,
    guard: Guard,
    examples: int,
    pool: int | None,
    budget: int | None,
    answer_tokens: int,
    fitted: Chooser | None,
) -> None:
    """Raise MassError for settings that a method which was found cannot work under.

    `pool`: how many training problems there are at most (None: not known); `fitted`: of `auto`."""
    if name == AUTO:
        if fitted is not None and budget not in (None, fitted.budget):
            raise MassError(
                f"method auto was fitted under --budget {fitted.budget}, not {budget}: leave it out, or fit again."
            )
        if fitted is not None and fitted.budget < answer_tokens:
            raise MassError(
                f"method auto was fitted under --budget {fitted.budget}, which is less than generate.answer_tokens="
                f"{answer_tokens}, which one answer may take: lower that, or fit again."
            )
        return
    row = METHODS[name]
    if row.update is policy_gradient and guard != Guard():
        raise MassError(f"method {name} is no fine-tuning, which the guards are for: leave guard.* out.")
    if row.examples is training_problems and pool is not None:
        check_pool(examples, pool, budget)


def find_for(kit: Kit, name: str) -> Method:
    """`find` and `check` with what a kit has."""
    row = find(
        name,
        has_scorer=kit.head is not None,
        has_pool=bool(kit.pool),
        has_teacher=kit.teacher is not None,
        has_chooser=kit.chooser is not None,
        has_truth=kit.truth is not None,
        steps=kit.steps,
    )
    check(
        name,
        guard=kit.guard,
        examples=kit.examples,
        pool=len(kit.pool),
        budget=kit.budget,
        answer_tokens=kit.answering.max_new_tokens,
        fitted=kit.chooser,
    )
    return row


def solve(kit: Kit, problems: Seq[Problem], method: str, *, baselines: bool = True) -> list[Record]:
    """Adapt to T problems at once and answer them, each with an adapter of its own; one Record a problem, in order.

    A problem's record does not depend on what shares its batch, but for rounding and `seconds`. One whose prompt does
    not fit the model's context, or that leaves too few problems to show or to draw, is a record with an `error`. The model
    and its adapter are left as they were found. `baselines` also answers without update and by vote (their cost is in no
    record). Raises MassError for a method that needs what the kit lacks.
    """
    row = find_for(kit, method)
    if method == AUTO:
        return _auto(kit, problems, baselines)
    if kit.budget is not None and kit.budget < kit.answering.max_new_tokens:
        raise ValueError(f"a budget of {kit.budget} tokens does not pay for one answer")
    errors = [_unfit(kit, row, p) for p in problems]
    records = {t: Record(p.id, p.text, method, error=errors[t]) for t, p in enumerate(problems) if errors[t]}
    fit = [t for t in range(len(problems)) if t not in records]
    marks = [kit.clock()]
    gated = [Gated(True, [])] * len(fit)
    if row.gate and fit:
        gated = row.gate(kit, [problems[t] for t in fit])
    seconds = (kit.clock() - marks[0]) / max(1, len(fit))
    for is_open, choices in ((True, row), (False, METHODS["none"])):
        group = [(t, gate) for t, gate in zip(fit, gated, strict=True) if gate.open is is_open]
        if group:
            done = carry_out(
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
    return carry_out(kit, problems, said, METHODS[name], baselines, gated)


def _auto(kit: Kit, problems: Seq[Problem], baselines: bool) -> list[Record]:
    chooser = kit.chooser
    assert chooser is not None
    kit = replace(kit, budget=chooser.budget)
    errors = [_unfit(kit, METHODS["none"], p) for p in problems]
    records = {t: Record(p.id, p.text, AUTO, error=errors[t]) for t, p in enumerate(problems) if errors[t]}
    fit = [t for t in range(len(problems)) if t not in records]
    if not fit:
        return [records[t] for t in range(len(problems))]
    started = kit.clock()
    seen_PS, drawn = signals(kit, [problems[t] for t in fit], chooser.samples)
    seconds = (kit.clock() - started) / len(fit)
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


def _unfit(kit: Kit, row: Method, problem: Problem) -> str | None:
    """Why a row of the table cannot be used on a problem. A fault of one problem must not end those of all others."""
    try:
        return _misfit(kit, row, problem)
    except MassError as error:
        return str(error)


def _misfit(kit: Kit, row: Method, problem: Problem) -> str | None:
    if row.examples is leave_one_out and len(problem.demonstrations) < 2:
        count = len(problem.demonstrations)
        return (
            f"method ttt learns from a problem's demonstrations, two or more, and this one has {count or 'none'}: give "
            'it a key "demonstrations", or set problems.demonstrations=10 to take solved problems of its subject'
        )
    if row.examples is training_problems:
        training_problems_for(kit, problem)
    shots = shots_for(kit, problem)
    error = overlong(kit, kit.prompts.solve(problem.text, shots.solve), kit.answering)
    if error is None and row.examples is self_made:
        error = overlong(kit, kit.prompts.generate(problem.text, shots.generate), kit.writing)
    return error
