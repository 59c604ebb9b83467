"""mass-eval --credit: of a run's own examples for held-out problems, whether their credit says what leaving them out does.

`measure` makes a row for each example, `summary` the numbers of a report; docs/evaluation.md says how each is made.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mass import checkpoint, compare, credit, episode, metrics, outer
from mass.choices import Kit, Room, self_made
from mass.choices.kit import overlong
from mass.disjoint import first
from mass.errors import MassError
from mass.kit import build_kit
from mass.lora import Adapter
from mass.model import context_length
from mass.practice import Practice, features, solve_sequence
from mass.prepare import NO_ENGINE
from mass.problems import Task
from mass.prompts import pick_shots
from mass.rewards import Verifier
from mass.setting import Setting, TaskBatch, rate_name, task_batch
from mass.wanted import Plan

# the weights under which credit and truth are taken: ending of a row's keys -> what they are called
UNDER = {"": "scorer's weights", "_uniform": "uniform weights"}
# key of a row -> what it is called
MEASURES = {
    "credit": "meta-gradient, scorer's weights",
    "credit_uniform": "meta-gradient, uniform weights",
    "one_step": "one-step dot product",
    "score": "score of the scorer",
    "change": "left out, scorer's weights",
    "change_uniform": "left out, uniform weights",
}


def choose(plan: Plan, tasks: Sequence[Task], count: int) -> list[Task]:
    """The first `count` tasks of all sources in turn, asked as in training: without a problem's own demonstrations. Raises
    MassError where there is no scorer to measure; loads nothing."""
    if plan.step is None:
        raise MassError("--credit is about a trained scorer: it wants a run, --run FOLDER")
    if not plan.recipe.inner.steps:
        raise MassError(
            "--credit is about the steps of an update, and inner.steps=0 takes none: leave it out"
        )
    _engine(plan)
    return [
        dataclasses.replace(task, problem=dataclasses.replace(task.problem, demonstrations=()))
        for task in first(tasks, count)
    ]


def measure(
    plan: Plan, tasks: Sequence[Task], batch: int, say: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """`problems` and `examples`: rows of plain numbers (None where there is none), and what they were made with.

    The examples are those that method `mass` would write for the same problems. The outer loss is that of the reference
    solution, whatever the run was trained on: verified answers are sampled, which would drown what one example does.
    """
    kit = build_kit(plan)
    setting, log_lr = _setting(plan, kit)
    fitting = [task for task in tasks if _fits(kit, task)]
    problems: list[dict[str, Any]] = []
    examples: list[dict[str, Any]] = []
    size = min(batch, plan.recipe.outer.together)
    for i in range(0, len(fitting), size):
        some = fitting[i : i + size]
        say(f"credit: problems {i + 1} to {i + len(some)} of {len(fitting)}")
        _rows(setting, kit, some, log_lr, problems, examples)
    return {
        "engine": setting.engine,
        "steps": setting.recipe.inner.steps,
        "reach": credit.REACH,
        "asked": plan.recipe.generate.examples,
        "too_long": len(tasks) - len(fitting),
        "problems": problems,
        "examples": examples,
    }


def summary(found: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of a report, and the points of its plot, of what `measure` has found.

    A correlation is Spearman's within a problem, a mean over the problems that have one (three examples or more, not all
    alike), with its bootstrap interval. Where an inner loop exploded there is no credit, and no truth to hold it against.
    """
    groups: list[list[Mapping[str, Any]]] = [[] for _ in found["problems"]]
    for row in found["examples"]:
        groups[row["place"]].append(row)
    measures = [
        {
            "measure": name,
            **{f"with_change{end}": _correlation(groups, key, f"change{end}") for end in UNDER},
            "with_length": _correlation(groups, key, "tokens"),
            "auc": _auc(groups, key),
        }
        for key, name in MEASURES.items()
    ]
    return {
        **{key: found[key] for key in ("engine", "steps", "reach", "asked", "too_long")},
        "problems": len(groups),
        "examples": len(found["examples"]),
        "known": sum(row["good"] is not None for row in found["examples"]),
        "good": _mean([float(row["good"]) for row in found["examples"] if row["good"] is not None]),
        "loss_before": _mean([row.get("loss_before") for row in found["problems"]]),
        "measures": measures,
        "smoothness": [_smoothness(found["problems"], end, name) for end, name in UNDER.items()],
        # of each problem
        "points": [
            {
                key: [row[key] for row in rows]
                for key in ("credit", "credit_uniform", "one_step", "change", "change_uniform", "good")
            }
            for rows in groups
        ],
    }


# ---- measuring


def _engine(plan: Plan) -> tuple[str, bool, bool]:
    """(engine, recompute, first-order passes block by block) of the run: as its recipe says, or as `auto` chose."""
    assert plan.step is not None
    r = plan.recipe
    saved = checkpoint.read_meta(plan.step).get("extra", {}).get("engine")
    if r.meta_gradient.mode != "auto":
        return r.meta_gradient.mode, True, r.inner.checkpoint
    # a run without an inner loop has chosen none
    if saved is None or saved[0] == NO_ENGINE:
        raise MassError(
            f"{plan.step} does not say which meta-gradient engine the run chose: add meta_gradient.mode=reverse (or another)"
        )
    return saved[0], saved[1], saved[2]


def _setting(plan: Plan, kit: Kit) -> tuple[Setting, dict[str, Tensor]]:
    """The run as it trained, but for the outer loss and truncation; and the logarithms of its learned inner rates."""
    assert plan.step is not None and kit.head is not None
    r = plan.recipe
    engine, recompute, again = _engine(plan)
    if engine == "blockwise" and kit.parts is None:
        raise MassError("meta_gradient.mode=blockwise: this model has no blocks to take one by one")
    recipe = dataclasses.replace(
        r,
        outer=dataclasses.replace(r.outer, loss="gold", lr_policy=0.0, gamma=0.0, through_init=False),
        meta_gradient=dataclasses.replace(r.meta_gradient, truncate=None),
    )
    pool = list(kit.pool)
    # no answer is verified: the verifier never starts its process
    setting = Setting(
        recipe, kit.lm, kit.parts, engine, recompute, again, "", kit.prompts, pool, Verifier(), kit.rule, kit.head
    )  # fmt: skip
    learned = r.inner.learned_lr != "no"
    log_lr = {rate_name(setting, key): x.log().view(1) for key, x in kit.lr.items()} if learned else {}
    return setting, log_lr


def _fits(kit: Kit, task: Task) -> bool:
    """Whether the context holds what an example is written after, and the target with its reference solution."""
    p = task.problem
    shots = pick_shots(kit.pool, kit.solve_shots, kit.seed, p.id, pairs=kit.generate_shots)
    if overlong(kit, kit.prompts.generate(p.text, shots.generate), kit.writing):
        return False
    whole = solve_sequence(kit.prompts, p.text, task.solution, shots.solve)
    return len(whole.tokens) <= context_length(kit.lm.hf)


def _rows(
    setting: Setting,
    kit: Kit,
    tasks: Sequence[Task],
    log_lr: Mapping[str, Tensor],
    problems: list[dict[str, Any]],
    examples: list[dict[str, Any]],
) -> None:
    """Append the rows of T problems."""
    policy = kit.policy if kit.author is None else kit.author
    assert policy is not None
    room = Room(None, setting.recipe.inner.steps, False, [[] for _ in tasks])
    practice = self_made(kit, [task.problem for task in tasks], room)
    of_problem: dict[str, list[Any]] = {}
    of_example: dict[str, list[Any]] = {"tokens": practice.packed.count_TN.tolist()}
    if practice.valid_TN.any():
        score_TN = _scores(setting, practice, tasks)
        batch = task_batch(setting, tasks, practice, policy, log_lr, credit.STEP)
        dot_TN, before_T = credit.one_step(batch)
        of_problem["loss_before"] = before_T.tolist()
        of_example |= {"score": score_TN.tolist(), "one_step": dot_TN.tolist()}
        eta = {key: p.detach() for key, p in setting.head.named_parameters()}
        for end in UNDER:
            if end:
                eta, score_TN = (
                    {key: torch.zeros_like(x) for key, x in eta.items()},
                    torch.zeros_like(score_TN),
                )
            for rows, values in zip(
                (of_problem, of_example),
                _under(batch, eta, score_TN, policy, log_lr),
                strict=True,
            ):
                rows |= {f"{key}{end}": x.tolist() for key, x in values.items()}
    good_TN, known_TN = metrics.known_truth(practice, tasks)
    for t, task in enumerate(tasks):
        valid_N = practice.valid_TN[t].tolist()
        place = len(problems)
        problems.append(
            {"id": task.problem.id, "source": task.source, "examples": len(valid_N), "valid": sum(valid_N)}
            | {key: _finite(x[t]) for key, x in of_problem.items()}
        )
        for i in [i for i, ok in enumerate(valid_N) if ok]:
            made = practice.examples[t][i]
            examples.append(
                {"place": place, "example": i}
                | {key: _finite(x[t][i]) for key, x in of_example.items()}
                | {"good": bool(good_TN[t, i]) if known_TN[t, i] else None}
                | {"problem": made.problem, "solution": made.solution}
            )


def _scores(setting: Setting, practice: Practice, tasks: Sequence[Task]) -> Tensor:
    s = setting.recipe.scorer
    texts = [task.problem.text for task in tasks]
    inputs = features(setting.lm, setting.parts, setting.prompts, practice, texts, s.layers, s.pool)
    with torch.no_grad():
        return setting.head(*inputs)


def _under(
    batch: TaskBatch,
    eta: Mapping[str, Tensor],
    score_TN: Tensor,
    policy: Adapter,
    log_lr: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What is measured under one kind of weights, for each problem [T] and for each example [T, N]."""
    practice = batch.practice
    result = episode.run(batch.setting, batch.tasks, credit.STEP, policy, eta, log_lr, practice=practice)
    change_TN, whole = credit.left_out(batch, score_TN)
    smooth = credit.smoothness(batch, score_TN, whole)
    # without a credit: the inner loop exploded, or there are no two examples to weigh
    lost_T = whole.exploded_T | ~torch.isfinite(smooth.agreement_T)
    per_problem = {
        "agreement": smooth.agreement_T,
        "curvature": smooth.curvature_T,
        "moved": smooth.moved_T,
        # the credit is that of a lower loss
        "slope": -(result.credit_TN * smooth.direction_TN).sum(1),
    }
    per_problem = {key: x.masked_fill(lost_T, math.nan) for key, x in per_problem.items()}
    per_example = {"credit": result.credit_TN, "change": change_TN}
    per_example = {key: x.masked_fill(lost_T.unsqueeze(1), math.nan) for key, x in per_example.items()}
    exploded_T = whole.exploded_T & practice.valid_TN.any(1)
    return per_problem | {"loss": whole.loss_T, "exploded": exploded_T}, per_example | {
        "weight": result.weight_TN
    }


def _finite(x: Any) -> Any:
    return None if isinstance(x, float) and not math.isfinite(x) else x


# ---- the numbers of a report


def _correlation(groups: Sequence[Sequence[Mapping[str, Any]]], a: str, b: str) -> dict[str, Any] | None:
    """None for a measure with itself, and where no problem has a correlation."""
    found = []
    for rows in groups if a != b else []:
        pairs = [(row[a], row[b]) for row in rows if row.get(a) is not None and row.get(b) is not None]
        x, y = (torch.tensor([pair[k] for pair in pairs], dtype=torch.float64) for k in (0, 1))
        found.append(credit.rank_correlation(x, y))
    return _interval(found)


def _interval(values: Sequence[float | None]) -> dict[str, Any] | None:
    finite = [x for x in values if x is not None and math.isfinite(x)]
    if not finite:
        return None
    return {"mean": _mean(finite), "interval": compare.interval(finite), "problems": len(finite)}


def _auc(groups: Sequence[Sequence[Mapping[str, Any]]], key: str) -> float | None:
    won, pairs = 0.0, 0
    for rows in groups:
        known = [
            (row[key], row["good"]) for row in rows if row["good"] is not None and row.get(key) is not None
        ]
        value_TN = torch.tensor([[x for x, _ in known]], dtype=torch.float64)
        good_TN = torch.tensor([[good for _, good in known]], dtype=torch.bool)
        ordered = outer.ordered_pairs(value_TN, good_TN, torch.ones_like(good_TN))
        won, pairs = won + ordered[0], pairs + ordered[1]
    return won / pairs if pairs else None


def _smoothness(problems: Sequence[Mapping[str, Any]], end: str, name: str) -> dict[str, Any]:
    """`slope`: over problems, the rank correlation of the slope that the credit predicts with the one that is found."""
    curvature = [row[f"curvature{end}"] for row in problems if row.get(f"curvature{end}") is not None]
    pairs = [
        (row[f"slope{end}"], row[f"moved{end}"])
        for row in problems
        if row.get(f"slope{end}") is not None and row.get(f"moved{end}") is not None
    ]
    slope = credit.rank_correlation(
        *(torch.tensor([pair[k] for pair in pairs], dtype=torch.float64) for k in (0, 1))
    )
    return {
        "weights": name,
        "loss": _mean([row.get(f"loss{end}") for row in problems]),
        "exploded": sum(bool(row.get(f"exploded{end}")) for row in problems),
        "agreement": _interval([row.get(f"agreement{end}") for row in problems]),
        "curvature": float(np.median(curvature)) if curvature else None,
        "slope": _finite(slope),
    }


def _mean(values: Sequence[float | None]) -> float | None:
    finite = [x for x in values if x is not None]
    return sum(finite) / len(finite) if finite else None
