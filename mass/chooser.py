"""Which method a problem gets: a logistic regression for each method from cheap signals to "answers right".

Fitted by statsmodels on problems with known answers, kept as JSON beside the run. The question that it answers is the one
that the authors of test-time training leave open: does this problem need an update at all?
"""

import dataclasses
import json
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import expit

from mass.errors import MassError
from mass.keys import said

# cheapest first: of methods that promise the same, the first is taken
CANDIDATES = ("none", "vote", "pick", "in-context", "mass", "ttt")
SIGNALS = ("margin", "entropy", "length", "spread")
FILE = "auto.json"
# of the coefficients, so that a method that is always right or never keeps finite ones
RIDGE = 0.01
LEAST = 10


@dataclass(frozen=True)
class Chooser:
    """budget: tokens of a problem; samples: own answers that the signals are read from; mean, scale: of each signal in the
    development problems; coefficients: of each method, the constant first; right: its share of them answered right; step,
    settings: what answered them, a step of the run and recipe keys (None: a file of an earlier version does not say)."""

    budget: int
    samples: int
    problems: int
    mean: tuple[float, ...]
    scale: tuple[float, ...]
    coefficients: Mapping[str, tuple[float, ...]]
    right: Mapping[str, float]
    step: str | None = None
    settings: Mapping[str, Any] | None = None

    def unlike(self, step: str, settings: Mapping[str, Any]) -> str:
        """What is another than when it was fitted, and the way out; "" where nothing is, or nothing is known."""
        if self.step is not None and self.step != step:
            return f"at {self.step}, not {step}: name that step in --run, or fit again."
        own = self.settings or {}
        # a key that is newer than the file had no other value then
        for key, value in own.items():
            if key in settings and settings[key] != value:
                return f"with {said(key, value)}, not {settings[key]!r}: give the same, or fit again."
        return ""

    def chances(self, signal_S: np.ndarray) -> dict[str, float]:
        """How likely each method is to answer right."""
        z_S = (signal_S - np.array(self.mean)) / np.array(self.scale)
        return {name: float(expit(c[0] + z_S @ np.array(c[1:]))) for name, c in self.coefficients.items()}

    def choose(self, signal_S: np.ndarray, among: Seq[str]) -> tuple[str, str]:
        """The method with the best chance among those named, and a sentence that says why."""
        chance = {name: p for name, p in self.chances(signal_S).items() if name in among}
        best = max((name for name in CANDIDATES if name in chance), key=lambda name: round(chance[name], 9))
        said = ", ".join(f"{name} {p:.2f}" for name, p in sorted(chance.items(), key=lambda x: -x[1]))
        seen = ", ".join(f"{name} {x:.2f}" for name, x in zip(SIGNALS, signal_S, strict=True))
        return best, f"auto chose {best} (chance to be right: {said}; from {seen})"


def fit(signal_PS: np.ndarray, right: Mapping[str, Seq[float]], budget: int, samples: int) -> Chooser:
    """`right[method][p]`: 1 or 0, NaN where the method could not be used on problem p.

    Raises MassError with too few problems, or without statsmodels.
    """
    if len(signal_PS) < LEAST:
        raise MassError(f"auto is fitted on {LEAST} problems or more; there are {len(signal_PS)}")
    try:
        import statsmodels.api as sm
    except ImportError:
        raise MassError("fitting auto needs statsmodels: pip install 'mass[eval]'") from None
    mean, scale = signal_PS.mean(0), signal_PS.std(0)
    # a signal that never differs says nothing
    scale[scale < 1e-9] = 1.0
    design = sm.add_constant((signal_PS - mean) / scale, has_constant="add")
    coefficients, shares = {}, {}
    for name, outcome in right.items():
        y = np.asarray(outcome, float)
        known = np.isfinite(y)
        if known.sum() < LEAST:
            continue
        model = sm.GLM(y[known], design[known], family=sm.families.Binomial())
        found = model.fit_regularized(alpha=RIDGE, L1_wt=0.0)
        coefficients[name] = tuple(float(x) for x in found.params)
        shares[name] = float(y[known].mean())
    if "none" not in coefficients:
        raise MassError(
            f"auto falls back on answers without update (none), and fewer than {LEAST} of them have a verdict: give more problems"
        )
    return Chooser(
        budget, samples, len(signal_PS), tuple(mean.tolist()), tuple(scale.tolist()), coefficients, shares
    )


def save(chooser: Chooser, folder: Path) -> Path:
    """Write auto.json into a run folder; the former one is replaced as a whole."""
    path = folder / FILE
    text = json.dumps({"signals": SIGNALS, **dataclasses.asdict(chooser)}, indent=2, allow_nan=False)
    part = path.with_suffix(".part")
    part.write_text(text + "\n", encoding="utf-8")
    part.replace(path)
    return path


def load(folder: Path) -> Chooser | None:
    """The chooser of a run folder; None where none was fitted. Raises MassError for a file that cannot be used."""
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if tuple(data.pop("signals")) != SIGNALS:
            raise ValueError("other signals")
        vectors = {key: tuple(float(x) for x in data[key]) for key in ("mean", "scale")}
        found = {name: tuple(float(x) for x in c) for name, c in data["coefficients"].items()}
        if "none" not in found or {len(x) for x in vectors.values()} != {len(SIGNALS)}:
            raise ValueError("no method none, or not as many numbers as signals")
        if not set(found) <= set(CANDIDATES) or {len(c) for c in found.values()} != {len(SIGNALS) + 1}:
            raise ValueError("unknown methods or wrong coefficients")
        if not isinstance(data.get("settings") or {}, dict):
            raise ValueError("settings that are none")
        return Chooser(
            **{**data, **vectors, "coefficients": found, "budget": int(data["budget"])},
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise MassError(f"{path} cannot be used ({error}): fit it again with mass-adapt fit") from None
