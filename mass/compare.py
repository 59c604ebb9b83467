"""Statistics of an evaluation, all of them of scipy and statsmodels: what is random is which problems were drawn.

P problems are answered by every arm, so arms are compared on the same problems: paired bootstrap, McNemar's exact test,
Holm's correction over all comparisons of a table. No torch here.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np

from mass.errors import MassError

RESAMPLES = 9999
LEVEL = 0.95


class Paired(NamedTuple):
    """One arm against another. `won`: problems that it alone has right, `lost`: that the other alone has; `p`: McNemar."""

    difference: float
    interval: tuple[float, float] | None
    won: int
    lost: int
    p: float


def require() -> None:
    """Raise MassError that names the extra where a package is missing; call it before costly work."""
    for package in ("statsmodels", "matplotlib"):
        if find_spec(package) is None:
            raise MassError(f"mass-eval needs {package}, which is not installed: pip install 'mass[eval]'")


def interval(value_P: Sequence[float] | np.ndarray, seed: int = 0) -> tuple[float, float] | None:
    """95 % percentile bootstrap interval of the mean over problems; None for fewer than two. The same for a seed.

    Values that are all alike have an interval of no width: the bootstrap knows nothing that it has not seen.
    """
    from scipy.stats import bootstrap

    x = np.asarray(value_P, float)
    if len(x) < 2:
        return None
    found = bootstrap(
        (x,),
        np.mean,
        n_resamples=RESAMPLES,
        # at most 80 MB at once
        batch=max(1, 10_000_000 // len(x)),
        confidence_level=LEVEL,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(found.low), float(found.high)


def paired(right_P: Sequence[bool] | np.ndarray, other_P: Sequence[bool] | np.ndarray) -> Paired:
    """Difference of two shares on the same problems: its paired bootstrap interval, and McNemar's exact two-sided test."""
    from statsmodels.stats.contingency_tables import mcnemar

    a, b = np.asarray(right_P, bool), np.asarray(other_P, bool)
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise ValueError(f"{a.shape} and {b.shape} are not answers to the same problems")
    won, lost = int((a & ~b).sum()), int((~a & b).sum())
    table = [[int((a & b).sum()), won], [lost, int((~a & ~b).sum())]]
    p = float(mcnemar(table, exact=True).pvalue)
    difference = a.astype(float) - b
    return Paired(float(difference.mean()), interval(difference), won, lost, p)


def holm(p: Sequence[float]) -> list[float]:
    """Each p after Holm's correction over all of them (family-wise, no assumption on how they depend on each other)."""
    from statsmodels.stats.multitest import multipletests

    return [float(x) for x in multipletests(list(p), method="holm")[1]] if len(p) else []
