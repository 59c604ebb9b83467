"""Held-out problems while training: answered without update and by `mass`, and what is known of the examples behind it.

A run without an inner loop has no `mass`: it answers without update alone."""

import math
import time
from collections.abc import Sequence as Seq
from collections.abc import Set

import torch

from mass import distributed, outer
from mass.choices import Kit
from mass.methods import Record, solve
from mass.problems import Task, truth
from mass.rewards import Verifier

# a task; solved and judged without update and with it; what `_known` gives
WIDTH = 11


def evaluate(
    kit: Kit,
    tasks: Seq[Task],
    trained: Set[str],
    verifier: Verifier,
    *,
    batch: int,
    rank: int = 0,
    world: int = 1,
) -> dict[str, float]:
    """Scalars by tag: heldout/*; where some tasks are of a source in `trained` and some are not, also seen/* and unseen/*.

    Ranks take every W-th task, `batch` of them at once; each returns the result of all.
    """
    begin = time.perf_counter()
    sums = {group: [0.0] * WIDTH for group in ("seen", "unseen")}
    own = tasks[rank::world]
    for i in range(0, len(own), batch):
        some = own[i : i + batch]
        problems = [task.problem for task in some]
        without = solve(kit, problems, "none", baselines=False)
        records = solve(kit, problems, "mass", baselines=False) if kit.steps else without
        for task, first, record in zip(some, without, records, strict=True):
            counts = [
                1.0,
                *_solved(verifier, first, task),
                *_solved(verifier, record, task),
                *_known(record, task),
            ]
            group = "seen" if task.source in trained else "unseen"
            sums[group] = [x + y for x, y in zip(sums[group], counts, strict=True)]
    kit.lm.settle()
    total = distributed.reduce_sum([*sums["seen"], *sums["unseen"]])
    seen, unseen = total[:WIDTH], total[WIDTH:]
    updates = kit.steps > 0
    both = [x + y for x, y in zip(seen, unseen, strict=True)]
    out = _scalars("heldout", both, updates)
    out["heldout/failures"] = both[0] - both[2] + updates * (both[0] - both[4])
    if seen[0] and unseen[0]:
        out |= _scalars("seen", seen, updates) | _scalars("unseen", unseen, updates)
    return out | {"time/evaluate": time.perf_counter() - begin}


def _solved(verifier: Verifier, record: Record, task: Task) -> list[float]:
    """1 for a problem that was solved (a part of the score does not count), and 1 for one that was judged."""
    score = verifier.verify(record.solution, task).score
    return [float(score == 1.0), float(math.isfinite(score))]


def _known(record: Record, task: Task) -> list[float]:
    """Pairs in the right order and pairs; good examples and examples of known truth; honest checks and checks."""
    found = [(e.weight, truth(task, e.problem, e.solution)) for e in record.examples if e.valid]
    known = [(weight, x) for weight, x in found if x is not None]
    good = torch.tensor([[x.right and x.kin for _, x in known]], dtype=torch.bool)
    weight = torch.tensor([[weight for weight, _ in known]])
    won, pairs = outer.ordered_pairs(weight, good, torch.ones_like(good))
    checks = [x.honest for _, x in known if x.honest is not None]
    return [won, float(pairs), float(good.sum()), float(len(known)), float(sum(checks)), float(len(checks))]


def _scalars(group: str, sums: Seq[float], updates: bool) -> dict[str, float]:
    _, none, judged, mass, judged_mass, won, pairs, good, known, *checks = sums
    none = none / judged if judged else math.nan
    out = {f"{group}/none": none}
    if updates:
        mass = mass / judged_mass if judged_mass else math.nan
        out |= {f"{group}/mass": mass, f"{group}/gain": mass - none}
    if known:
        out |= {f"{group}/auc": won / pairs if pairs else math.nan, f"{group}/right": good / known}
    if checks[1]:
        out[f"{group}/honest"] = checks[0] / checks[1]
    return out
