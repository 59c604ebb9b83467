"""Grids of digits as text (ARC), and the views of them that can be undone: the eight symmetries of a square, colours renamed.

Rows are lines, cells are digits 0 to 9 with a space between. No torch here.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Grid = np.ndarray

_ROW = re.compile(r"\d(?: \d)*")

# name -> (turn, turn back)
SYMMETRIES: dict[str, tuple[Callable[[Grid], Grid], Callable[[Grid], Grid]]] = {
    "identity": (lambda g: g, lambda g: g),
    "rotate 90": (lambda g: np.rot90(g), lambda g: np.rot90(g, -1)),
    "rotate 180": (lambda g: np.rot90(g, 2), lambda g: np.rot90(g, 2)),
    "rotate 270": (lambda g: np.rot90(g, 3), lambda g: np.rot90(g, -3)),
    "flip left-right": (np.fliplr, np.fliplr),
    "flip up-down": (np.flipud, np.flipud),
    "transpose": (lambda g: g.T, lambda g: g.T),
    "anti-transpose": (lambda g: np.rot90(g, 2).T, lambda g: np.rot90(g.T, 2)),
}
SAME_COLOURS = tuple(range(10))


def read(text: str) -> Grid | None:
    """The grid that a text is, int [rows, columns]; None when it is none (other words, rows of unlike length)."""
    rows = [line.strip() for line in text.strip().splitlines()]
    if not rows or not all(_ROW.fullmatch(row) for row in rows) or len({len(row) for row in rows}) > 1:
        return None
    return np.array([[int(cell) for cell in row.split()] for row in rows])


def write(grid: Sequence[Sequence[int]] | Grid) -> str:
    """A grid as text."""
    return "\n".join(" ".join(str(int(cell)) for cell in row) for row in grid)


@dataclass(frozen=True)
class View:
    """A symmetry, by name, and what each colour is called: cell c becomes colours[c]."""

    symmetry: str = "identity"
    colours: tuple[int, ...] = SAME_COLOURS

    def apply(self, text: str) -> str:
        """The text's grid in this view; a text that is no grid stays as it is in the view that changes nothing only."""
        return self._through(text, SYMMETRIES[self.symmetry][0], self.colours)

    def undo(self, text: str) -> str:
        """What `apply` made this text of. Raises ValueError when it is no grid."""
        back = tuple(self.colours.index(c) for c in range(10))
        return self._through(text, SYMMETRIES[self.symmetry][1], back)

    def _through(self, text: str, turn: Callable[[Grid], Grid], colours: tuple[int, ...]) -> str:
        if self == View():
            return text
        grid = read(text)
        if grid is None:
            raise ValueError("not a grid")
        return write(turn(np.array(colours)[grid]))


def by_majority(texts: Sequence[str]) -> list[str]:
    """Two grids put together from those of the commonest shape: each row the commonest row, each column likewise."""
    grids = [grid for grid in map(read, texts) if grid is not None]
    if not grids:
        return []
    shape = Counter(grid.shape for grid in grids).most_common(1)[0][0]
    alike = [grid for grid in grids if grid.shape == shape]

    def commonest(rows: Sequence[Grid]) -> tuple[int, ...]:
        return Counter(tuple(row.tolist()) for row in rows).most_common(1)[0][0]

    by_row = np.array([commonest([grid[i] for grid in alike]) for i in range(shape[0])])
    by_column = np.array([commonest([grid[:, j] for grid in alike]) for j in range(shape[1])]).T
    return [write(by_row), write(by_column)]
