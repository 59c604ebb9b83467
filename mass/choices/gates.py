"""Gates: which problems get an update. The others are answered as by `none`."""

import math
from collections.abc import Sequence as Seq

import numpy as np
from scipy.special import softmax

from mass.choices.kit import Gated, Kit, sample
from mass.generate import Rollout
from mass.problems import Problem
from mass.rewards import canonical, find_answer


def small_margin(kit: Kit, problems: Seq[Problem]) -> list[Gated]:
    """Open where the model hesitates: the two likeliest candidates differ by less than `knobs.margin`.

    TT-SI: Acikgoz et al., arXiv 2510.07841, where the candidates are an agent's actions. Here they are the different
    answers of `knobs.gate_samples` own solutions, each as likely as the likeliest text that states it.
    """
    most = kit.knobs.gate_samples
    if kit.budget is not None:
        # one greedy answer has to fit behind it
        most = min(most, kit.budget // kit.answering.max_new_tokens - 1)
    if most < 1:
        note = "the budget has no room for the gate: answered without update"
        return [Gated(False, [], note) for _ in problems]
    out = []
    for own in sample(kit, problems, [range(most)] * len(problems)):
        u = margin(own)
        says = f"margin {u:.3f}, the gate opens under {kit.knobs.margin:g}"
        closed = f"the gate is closed ({says}): answered without update"
        out.append(Gated(u < kit.knobs.margin, own, f"gate: {says}" if u < kit.knobs.margin else closed))
    return out


def margin(own: Seq[Rollout]) -> float:
    """p(1) - p(2) of a softmax over the log-likelihoods of the candidates; 1 for one candidate, 0 for none."""
    likeliest: dict[str, float] = {}
    for rollout in own:
        answer = find_answer(rollout.text)
        if answer is not None:
            key = canonical(answer).casefold()
            likeliest[key] = max(likeliest.get(key, -math.inf), math.fsum(rollout.logprobs))
    if not likeliest:
        return 0.0
    p = np.sort(softmax(list(likeliest.values())))[::-1]
    return float(p[0] - (p[1] if len(p) > 1 else 0.0))
