"""Texts that several methods draw by the same call are drawn once."""

import time
from collections.abc import Callable

from mass.generate import Rollout

Drawn = list[list[Rollout]]


class Texts:
    """What one base model has written, by all that it depends on: a call that was made before is not made again.

    Only whole calls: the same row among other rows has the same text, but for the rounding of matrix products of other
    sizes. `spared`: the seconds that the calls not made took when they were made.
    """

    def __init__(self) -> None:
        self.found: dict[str, tuple[Drawn, float]] = {}
        self.spared = 0.0

    def draw(self, key: str, draw: Callable[[], Drawn]) -> Drawn:
        """`draw()`, or what it gave when `key` was new."""
        if key in self.found:
            self.spared += self.found[key][1]
        else:
            begin = time.perf_counter()
            drawn = draw()
            self.found[key] = drawn, time.perf_counter() - begin
        return [list(own) for own in self.found[key][0]]
