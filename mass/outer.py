"""Outer losses, the credit, and the policy gradient: everything between an adapted model and the outer optimizer step.

Formulas are those of docs/mathematics.md. MASS: arXiv 2603.03524. Clipped policy gradient: PPO, arXiv 1707.06347;
group-relative advantage: GRPO, arXiv 2402.03300.
"""

import torch
from torch import Tensor

from mass.batch import Packed
from mass.forward import example_loss


def gold_loss(packed: Packed, logprob_M: Tensor) -> Tensor:
    """Cross-entropy of each task's reference solution, [T]."""
    return example_loss(packed, logprob_M).squeeze(1)


def verifier_loss(packed: Packed, logprob_M: Tensor, advantage_TG: Tensor) -> Tensor:
    """-(1/G) sum_j A_j (mean over the tokens of answer j of log pi), [T]."""
    return (advantage_TG * example_loss(packed, logprob_M)).mean(1)


def group_advantage(reward_TG: Tensor, min_spread: float) -> Tensor:
    """(r - mean) / std within each task, [T, G]. A failed verdict (NaN) takes no part; no spread, no advantage."""
    known = torch.isfinite(reward_TG)
    return _standardise(reward_TG.nan_to_num(), known, min_spread)


def credit_advantage(
    credit_TN: Tensor, valid_TN: Tensor, min_spread: float, malformed_penalty: float
) -> Tensor:
    """Advantage of each generated example, [T, N]: the credit (-dL/ds, say) standardised over the task's valid examples.

    A malformed example gets -penalty. Standardised credit has no natural zero, so a task
    whose credits hardly differ (standard deviation under `min_spread`) gives none: it would amplify noise.
    """
    advantage = _standardise(credit_TN, valid_TN, min_spread)
    return torch.where(valid_TN, advantage, -malformed_penalty)


def normalised(by_score_TN: Tensor, min_spread: float) -> Tensor:
    """dL/ds scaled to root mean square 1 in each task (the scorer's gradient); 0 where it is under `min_spread`."""
    rms_T1 = by_score_TN.square().mean(1, keepdim=True).sqrt()
    return torch.where(rms_T1 > min_spread, by_score_TN / rms_T1.clamp(min=1e-30), 0.0)


def policy_loss(
    packed: Packed,
    logprob_M: Tensor,
    old_M: Tensor,
    kl_M: Tensor | None,
    advantage_TN: Tensor,
    *,
    ratio_clip: float,
    beta: float,
    unrewarded_M: Tensor | None = None,
    beta_unrewarded: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Clipped policy gradient plus beta KL(policy || reference), per example [T, N], and that KL [T, N].

    ratio = pi / pi_old of each token; the loss of an example is the mean over its tokens of -min(ratio A, clip(ratio) A).
    `kl_M`: the divergence at each token (`mass.forward`), whose mean is an example's; None when both betas are 0.
    `unrewarded_M` (bool): tokens that have no advantage and the coefficient `beta_unrewarded` (see `mass.practice.unrewarded`).
    """
    ratio_M = (logprob_M - old_M).exp()
    a_M = advantage_TN.flatten()[packed.owner_M]
    if unrewarded_M is not None:
        a_M = a_M.masked_fill(unrewarded_M, 0.0)
    surrogate_M = torch.minimum(ratio_M * a_M, ratio_M.clamp(1 - ratio_clip, 1 + ratio_clip) * a_M)
    loss_TN = -packed.mean_by_example(surrogate_M)
    if kl_M is None:
        return loss_TN, torch.zeros_like(loss_TN)
    held_M = beta * kl_M if unrewarded_M is None else torch.where(unrewarded_M, beta_unrewarded, beta) * kl_M
    return loss_TN + packed.mean_by_example(held_M), packed.mean_by_example(kl_M)


def correlation(x: Tensor, y: Tensor) -> float:
    """Pearson correlation of two flat tensors; NaN under three points or without spread."""
    if x.numel() < 3 or x.std() == 0 or y.std() == 0:
        return float("nan")
    return torch.corrcoef(torch.stack([x.float(), y.float()]))[0, 1].item()


def ordered_pairs(value_TN: Tensor, good_TN: Tensor, known_TN: Tensor) -> tuple[float, int]:
    """How many pairs of a good and a bad example of one task have the good one's value on top (ties count a half), and
    how many pairs there are. The first over the second is the AUC within tasks; scores of two tasks do not compare."""
    good_TN, bad_TN = good_TN & known_TN, ~good_TN & known_TN
    pairs_TNN = good_TN.unsqueeze(2) & bad_TN.unsqueeze(1)
    ahead_TNN = value_TN.unsqueeze(2) - value_TN.unsqueeze(1)
    won = ((ahead_TNN > 0) & pairs_TNN).sum() + 0.5 * ((ahead_TNN == 0) & pairs_TNN).sum()
    return won.item(), int(pairs_TNN.sum())


def auc(value_TN: Tensor, good_TN: Tensor, known_TN: Tensor) -> float:
    """Chance that a good example has a higher value than a bad one of its task; NaN where no task has both."""
    won, pairs = ordered_pairs(value_TN, good_TN, known_TN)
    return won / pairs if pairs else float("nan")


def _standardise(value: Tensor, known: Tensor, min_spread: float) -> Tensor:
    count = known.sum(1, keepdim=True)
    mean = (value * known).sum(1, keepdim=True) / count.clamp(min=1)
    centred = (value - mean) * known
    std = (centred.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    return torch.where((std > min_spread) & (count > 1), centred / std.clamp(min=1e-30), 0.0)
