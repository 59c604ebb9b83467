"""Weights of examples, [T, N]: N in sum over a problem's valid examples, 0 for malformed ones.

`agreement` is the exception: advantages of a policy gradient, which sum to 0.
"""

import math
from collections.abc import Sequence as Seq

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.stats import weibull_min
from torch import Tensor

from mass import outer, scorer
from mass.choices.kit import Kit
from mass.practice import Practice, features, seed_of
from mass.problems import Problem
from mass.rewards import canonical, find_answer, vote


def uniform(kit: Kit, problems: Seq[Problem], practice: Practice) -> Tensor:
    """All valid examples alike."""
    if not practice.valid_TN.any():
        return torch.zeros_like(practice.valid_TN, dtype=torch.float32)
    return scorer.weights(torch.zeros_like(practice.valid_TN, dtype=torch.float32), practice.valid_TN, 1.0)


def scored(kit: Kit, problems: Seq[Problem], practice: Practice) -> Tensor:
    """By the trained scorer, as in training."""
    assert kit.head is not None
    if not practice.valid_TN.any():
        return torch.zeros_like(practice.valid_TN, dtype=torch.float32)
    texts = [p.text for p in problems]
    with torch.no_grad():
        task_TF, example_TNF = features(
            kit.lm, kit.parts, kit.prompts, practice, texts, kit.depths, kit.pool_kind
        )
        score_TN = torch.func.functional_call(kit.head, dict(kit.eta or {}), (task_TF, example_TNF))
        return scorer.weights(score_TN, practice.valid_TN, kit.temperature)


def by_truth(kit: Kit, problems: Seq[Problem], practice: Practice) -> Tensor:
    """Alike on the examples that are right and of the problem's family, 0 for all others: no scorer can know more."""
    assert kit.truth is not None
    good_TN = practice.valid_TN.clone()
    for t, (p, own) in enumerate(zip(problems, practice.examples, strict=True)):
        for i, e in enumerate(own):
            known = kit.truth(p, e.problem, e.solution) if e.valid else None
            good_TN[t, i] &= known is not None and known.right and known.kin
    return scorer.weights(torch.zeros_like(good_TN, dtype=torch.float32), good_TN, 1.0)


def shuffled(kit: Kit, problems: Seq[Problem], practice: Practice) -> Tensor:
    """Those of the scorer, dealt anew among the valid examples of each problem: the control for which example has which."""
    weight_TN = scored(kit, problems, practice)
    for t, p in enumerate(problems):
        valid = practice.valid_TN[t].nonzero().squeeze(1)
        draw = np.random.default_rng(seed_of(kit.seed, "shuffled", p.text))
        weight_TN[t, valid] = weight_TN[t, valid[draw.permutation(len(valid)).tolist()]]
    return weight_TN


def best_scored(kit: Kit, problems: Seq[Problem], practice: Practice) -> Tensor:
    """All weight on the example that the scorer gives the largest share, if that is `knobs.threshold` or more.

    VDS-TTT: arXiv 2505.19475. Our scorer's scores have no zero, so the threshold is one of their softmax.
    """
    share_TN = scored(kit, problems, practice) / max(1, practice.valid_TN.shape[1])
    if not practice.valid_TN.any():
        return share_TN
    best_T = share_TN.argmax(1, keepdim=True)
    sure = share_TN.gather(1, best_T) >= kit.knobs.threshold
    return torch.zeros_like(share_TN).scatter(1, best_T, sure * float(share_TN.shape[1]))


def agreement(kit: Kit, problems: Seq[Problem], practice: Practice) -> Tensor:
    """Advantage of each own answer within its problem, where the reward is 1 for what the majority answers, else 0.

    TTRL: Zuo et al., arXiv 2504.16084; GRPO: arXiv 2402.03300. All 0 where every sample gets the same reward.
    """
    reward_TN = torch.full(practice.valid_TN.shape, math.nan, device=practice.valid_TN.device)
    for t, own in enumerate(practice.examples):
        said = [find_answer(e.solution) for e in own]
        most = (vote(said) or "").casefold()
        for i, answer in enumerate(said):
            reward_TN[t, i] = float(answer is not None and canonical(answer).casefold() == most)
    known_TN = reward_TN.masked_fill(~practice.valid_TN, math.nan)
    return outer.group_advantage(known_TN, 1e-6)


def shortest(kit: Kit, problems: Seq[Problem], practice: Practice) -> Tensor:
    """All weight on the own answer that ended first (where none ended, on the first that states an answer)."""
    weight_TN = torch.zeros(practice.valid_TN.shape, device=practice.valid_TN.device)
    for t, own in enumerate(practice.rollouts):
        stated = [i for i, example in enumerate(practice.examples[t]) if example.valid]
        if stated:
            weight_TN[t, min(stated, key=lambda i: (not own[i].finished, len(own[i].tokens)))] = len(own)
    return weight_TN


def probable(kit: Kit, problems: Seq[Problem], practice: Practice) -> Tensor:
    """By the model's own probability of each own answer, a text counted once, improbable ones pruned.

    RPC: Zhou et al., arXiv 2502.00511. As in their code, a text's probability is exp of its tokens' mean log-prob.
    """
    weight_TN = torch.zeros(practice.valid_TN.shape, device=practice.valid_TN.device)
    for t, (own, examples) in enumerate(zip(practice.rollouts, practice.examples, strict=True)):
        stated = [i for i, example in enumerate(examples) if example.valid]
        if not stated:
            continue
        p = np.exp([np.mean(own[i].logprobs) for i in stated])
        kept = {own[i].text: (i, x) for i, x, low in zip(stated, p, improbable(p), strict=True) if not low}
        total = sum(x for _, x in kept.values())
        for i, x in kept.values():
            weight_TN[t, i] = len(own) * x / total
    return weight_TN


def improbable(p: np.ndarray) -> np.ndarray:
    """Which of some probabilities to prune: those below the mean that a mixture of two Weibull distributions, fitted
    to them by maximum likelihood, gives to its component of lower mean (start and bounds of the fit as in RPC's code).
    """

    def log_parts(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        w, k1, scale1, k2, scale2 = x
        first = math.log(w) + weibull_min.logpdf(p, k1, scale=scale1)
        return first, math.log(1 - w) + weibull_min.logpdf(p, k2, scale=scale2)

    with np.errstate(all="ignore"):
        fit = minimize(
            lambda x: -np.logaddexp(*log_parts(x)).sum(),
            [0.5, 1.0, 1.0, 1.5, 2.0],
            bounds=[(0.2, 0.8)] + [(0.01, None)] * 4,
        ).x
        first, second = log_parts(fit)
        if weibull_min.mean(fit[1], scale=fit[2]) < weibull_min.mean(fit[3], scale=fit[4]):
            first, second = second, first
        return (first < second) & (p < p.mean())
