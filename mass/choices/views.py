"""Views of a problem with demonstrations: other orders of them and, for grids, symmetries and renamed colours.

Akyurek et al., arXiv 2411.07279: a problem seen in another view is the same problem, and its answer can be turned back.
"""

from dataclasses import dataclass, replace

import numpy as np

from mass import grids
from mass.choices.kit import Kit
from mass.demonstrations import stated
from mass.grids import SYMMETRIES, View
from mass.practice import seed_of
from mass.problems import Problem

# orders of the demonstrations that are answered: for grids in each symmetry, for text in all
GRID_ORDERS, TEXT_ORDERS = 2, 5


@dataclass(frozen=True)
class Seen:
    """A problem in one view, with its demonstrations as shots."""

    view: View
    problem: Problem
    shots: tuple[tuple[str, str], ...]

    def undo(self, answer: str) -> str | None:
        """The answer as the problem itself wants it; None when it cannot be turned back, being no grid."""
        try:
            return self.view.undo(answer)
        except ValueError:
            return None


def views(kit: Kit, problem: Problem) -> list[Seen]:
    """The views in which a problem is answered, the problem as it is first; the same ones for the same seed and text."""
    draw = np.random.default_rng(seed_of(kit.seed, "views", problem.text))
    names = list(SYMMETRIES) if problem.grids else ["identity"]
    out = []
    for turn in range(GRID_ORDERS if problem.grids else TEXT_ORDERS):
        for name in names:
            first = turn == 0 and name == "identity"
            order = np.arange(len(problem.demonstrations))
            colours = grids.SAME_COLOURS
            if not first:
                order = draw.permutation(order)
                colours = colours_of(draw) if problem.grids else colours
            out.append(seen_as(problem, View(name, colours), order.tolist()))
    kept: dict[tuple[str, object], Seen] = {}
    for one in out:
        kept.setdefault((one.problem.text, one.shots), one)
    return list(kept.values())


def seen_as(problem: Problem, view: View, order: list[int]) -> Seen:
    """The problem with the demonstrations `order` in that order, all in one view."""
    pairs = tuple(
        (view.apply(given), view.apply(output))
        for given, output in (problem.demonstrations[i] for i in order)
    )
    shots = tuple((given, stated(output)) for given, output in pairs)
    return Seen(view, replace(problem, text=view.apply(problem.text), demonstrations=pairs), shots)


def colours_of(draw: np.random.Generator) -> tuple[int, ...]:
    """Colours 1 to 9 renamed at random; 0, the background of most tasks, stays."""
    return (0, *(int(c) for c in draw.permutation(np.arange(1, 10))))
