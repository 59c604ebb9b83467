"""Cheap signals of a problem, from a few own answers: what `auto` chooses by."""

import math
from collections import Counter
from collections.abc import Sequence as Seq
from dataclasses import replace

import numpy as np

from mass.choices.examples import own_answers
from mass.choices.kit import Kit, Room, sample
from mass.choices.weights import scored
from mass.generate import Rollout
from mass.problems import Problem
from mass.rewards import canonical, find_answer


def signals(kit: Kit, problems: Seq[Problem], samples: int) -> tuple[np.ndarray, list[list[Rollout]]]:
    """[P, S] in the order of `mass.chooser.SIGNALS`, and the own answers 0, 1, ... that they are read from.

    margin    share of the commonest answer less that of the next
    entropy   of the answers, in nats; no answer counts as one
    length    mean tokens of a sample, as a share of the longest allowed
    spread    standard deviation of the scorer's weights of those with an answer; 0 without a scorer
    """
    if kit.budget is not None:
        # one greedy answer has to fit behind them
        samples = max(0, min(samples, kit.budget // kit.answering.max_new_tokens - 1))
    drawn = sample(kit, problems, [range(samples)] * len(problems))
    spread = [0.0] * len(problems)
    if kit.head is not None and samples:
        small = replace(kit, examples=samples)
        practice = own_answers(small, problems, Room(None, 0, False, drawn))
        weight_TN = scored(small, problems, practice)
        spread = [
            float(w[ok].std(correction=0)) if ok.any() else 0.0
            for w, ok in zip(weight_TN, practice.valid_TN, strict=True)
        ]
    rows = [
        [*_votes(own), _length(own) / kit.answering.max_new_tokens, spread[t]] for t, own in enumerate(drawn)
    ]
    return np.array(rows), drawn


def _votes(own: Seq[Rollout]) -> tuple[float, float]:
    said = [find_answer(r.text) for r in own]
    count = Counter("" if x is None else canonical(x).casefold() for x in said)
    stated = sorted((n for answer, n in count.items() if answer), reverse=True)
    shares = [n / len(own) for n in count.values()]
    margin = (stated[0] - (stated[1] if len(stated) > 1 else 0)) / len(own) if stated else 0.0
    return margin, -math.fsum(p * math.log(p) for p in shares)


def _length(own: Seq[Rollout]) -> float:
    return sum(len(r.tokens) for r in own) / max(1, len(own))
