"""What is logged of an outer step: means over its tasks, and what the truth of its examples tells where it is known."""

import math
from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from mass import outer, scorer
from mass.outer_loss import OuterLoss
from mass.practice import Practice, Tuned
from mass.problems import Task, truth


def step_metrics(
    practice: Practice,
    score_TN: Tensor,
    weight_TN: Tensor,
    by_score_TN: Tensor,
    tuned: Tuned,
    before: OuterLoss,
    after: OuterLoss,
    counts_T: Tensor,
) -> tuple[dict[str, float], dict[str, int]]:
    """Metrics, and what those are means of that are not means over all T tasks."""
    valid_TN = practice.valid_TN
    examples = [e for own in practice.examples for e in own]
    rollouts = [r for own in practice.rollouts for r in own]
    has_T = valid_TN.any(1)
    length_TN = torch.tensor([[float(len(r.tokens)) for r in own] for own in practice.rollouts])
    related = [
        outer.correlation(-credit_N[valid_N].cpu(), length_N[valid_N.cpu()])
        for credit_N, length_N, valid_N in zip(by_score_TN, length_TN, valid_TN, strict=True)
    ]
    related = [x for x in related if math.isfinite(x)]
    out = {
        "meta/exploded": (tuned.exploded_T & has_T).float().mean().item(),
        "inner/loss_first": _mean(tuned.before_T[has_T]),
        "inner/loss_last": math.nan if tuned.after_T is None else _mean(tuned.after_T[has_T]),
        "inner/clipped": tuned.trajectory.clipped_T.float().mean().item(),
        "inner/padding": practice.packed.padding,
        "scorer/effective_examples": _mean(scorer.effective_examples(weight_TN)[has_T]),
        "scorer/score_std": _mean(scorer.saturation(score_TN.detach(), valid_TN)[has_T].sqrt()),
        "generator/valid": valid_TN.float().mean().item(),
        "generator/length": sum(len(r.tokens) for r in rollouts) / len(rollouts),
        "generator/empty_tasks": 1 - has_T.float().mean().item(),
        "generator/credit_length_correlation": sum(related) / len(related) if related else math.nan,
        # Credits of a task sum to zero: their root mean square is their standard deviation.
        "credit/spread": _mean(by_score_TN[counts_T].square().mean(1).sqrt()),
        "verifier/failures": float(before.failures + after.failures),
        "tokens/generated": float(sum(len(r.tokens) for r in rollouts)),
        "tokens/trained": float(practice.packed.size * len(tuned.trajectory.steps)),
        "tokens/outer": float(before.tokens + after.tokens),
    }
    for reason in ("no_solution", "no_answer", "truncated", "copy", "duplicate"):
        out[f"generator/{reason}"] = sum(e.reason == reason for e in examples) / len(examples)
    out["generator/no_solution"] += sum(e.reason == "empty" for e in examples) / len(examples)
    judged = {
        "meta/loss": after.loss_T,
        "meta/loss_before": before.loss_T,
        "meta/gain": before.loss_T - after.loss_T,
    }
    if before.solved_T is not None and after.solved_T is not None:
        judged |= {"reward/solve_before": before.solved_T, "reward/solve_after": after.solved_T}
    # without a verdict there is no value
    out |= {key: _mean(x_T[~x_T.isnan()]) for key, x_T in judged.items()}
    has = int(has_T.sum())
    counts = dict.fromkeys(
        ("inner/loss_first", "inner/loss_last", "scorer/effective_examples", "scorer/score_std"), has
    )
    counts |= {key: int((~x_T.isnan()).sum()) for key, x_T in judged.items()}
    counts |= {
        "credit/spread": int(counts_T.sum()),
        "generator/credit_length_correlation": len(related),
        "inner/padding": practice.packed.tokens_TPS.numel(),
    }
    return out, counts | {key: 1 for key in out if key.startswith(("tokens/", "verifier/"))}


def known_truth(practice: Practice, tasks: Seq[Task]) -> tuple[Tensor, Tensor]:
    """Which examples are right and of their target's family, and of which valid ones that is known; both [T, N] bool."""
    truths = [
        [truth(task, e.problem, e.solution) if e.valid else None for e in own]
        for task, own in zip(tasks, practice.examples, strict=True)
    ]
    good = [[x is not None and x.right and x.kin for x in own] for own in truths]
    known = [[x is not None for x in own] for own in truths]
    device = practice.valid_TN.device
    return torch.tensor(good, device=device), torch.tensor(known, device=device)


def truth_metrics(
    practice: Practice,
    tasks: Seq[Task],
    score_TN: Tensor,
    by_score_TN: Tensor,
    advantage_TN: Tensor,
    counts_T: Tensor,
) -> tuple[dict[str, float], dict[str, int]]:
    """What only the truth of the examples can tell, NaN where it is not known; and of how many pairs or examples it is a mean."""
    good_TN, known_TN = known_truth(practice, tasks)
    counted_TN = known_TN & counts_T.unsqueeze(1)
    found = {
        "scorer/auc": outer.ordered_pairs(score_TN, good_TN, known_TN),
        "credit/auc": outer.ordered_pairs(-by_score_TN, good_TN, counted_TN),
        "generator/auc": outer.ordered_pairs(advantage_TN, good_TN, known_TN),
        "generator/right": (float(good_TN[known_TN].sum()), int(known_TN.sum())),
    }
    values = {key: won / count if count else math.nan for key, (won, count) in found.items()}
    return values, {key: count for key, (_, count) in found.items()}


def _mean(x: Tensor) -> float:
    return x.mean().item() if x.numel() else math.nan
