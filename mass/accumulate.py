"""An outer step in parts: as many tasks at once as memory takes, the same gradients as all at once.

Every loss is a mean over tasks and no task sees another, so the step's gradient is the mean of the parts' gradients,
weighted by their numbers of tasks. The parts are worked one after another and only sums are kept.
"""

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from mass import episode, solver
from mass.episode import Result
from mass.lora import Adapter
from mass.problems import Task
from mass.setting import Setting

# Metrics that add up over parts and ranks; the others are means over tasks.
SUMS = ("tokens/", "verifier/failures")


def run(
    setting: Setting,
    tasks: Sequence[Task],
    step: int,
    policy: Adapter,
    eta: Mapping[str, Tensor],
    log_lr: Mapping[str, Tensor],
    *,
    at_once: int | None,
    show: int = 0,
) -> Result:
    """`episode.run` over `tasks` (`solver.run` where there is no inner loop), `at_once` of them at a time (None: all). Practice,
    weights and answers are those of the first part."""

    def one(part: Sequence[Task], show: int) -> Result:
        if setting.recipe.inner.steps == 0:
            return solver.run(setting, part, step, policy, eta, show=show)
        return episode.run(setting, part, step, policy, eta, log_lr, show=show)

    n = at_once or len(tasks)
    parts = [tasks[i : i + n] for i in range(0, len(tasks), n)]
    whole = one(parts[0], show)
    if len(parts) == 1:
        return whole
    total = {key: g * len(parts[0]) for key, g in whole.gradients.items()}
    results = [whole]
    for part in parts[1:]:
        other = one(part, 0)
        for key, g in other.gradients.items():
            total[key] += g * len(part)
        for name, seconds in other.seconds.items():
            whole.seconds[name] = whole.seconds.get(name, 0.0) + seconds
        results.append(other)
    whole.gradients = {key: g / len(tasks) for key, g in total.items()}
    whole.metrics, whole.counts = _mean(results)
    return whole


def _mean(results: Sequence[Result]) -> tuple[dict[str, float], dict[str, int]]:
    """Over parts: sums of tokens and failures, of the rest means over what the parts' values are means of."""
    metrics, counts = {}, {}
    for key in results[0].metrics:
        known = [(r.metrics[key], r.counts[key]) for r in results if math.isfinite(r.metrics[key])]
        count = sum(n for _, n in known)
        total = sum(x * n for x, n in known)
        if key.startswith(SUMS):
            metrics[key], counts[key] = total, 1
        else:
            metrics[key], counts[key] = total / count if count else math.nan, count
    return metrics, counts
