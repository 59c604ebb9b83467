"""Which problems are trained on, held out and shown as shots, and in which order training meets them. No torch here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any, NamedTuple

from mass.errors import MassError
from mass.problems import Task, content_key, free_id, shuffled, task_key


class Split(NamedTuple):
    """`removed` counts the training problems left out: repeated, or held out as well."""

    train: list[Task]
    heldout: list[Task]
    removed: int


def split_tasks(train: Sequence[Task], heldout: Sequence[Task] | None, heldout_size: int, seed: int) -> Split:
    """Training and held-out tasks that share no problem text; repeated training problems count once.

    Without a held-out source `heldout_size` training problems are held out, but at most a quarter, chosen by a seeded
    hash of their ids. With one, it stays whole and what it shares with the training problems leaves those; except
    that of a gym family, which may be small, the shared problems are held out only up to a quarter of its training
    problems and stay with training beyond that.
    """
    distinct = list({task_key(task.problem): task for task in reversed(train)}.values())[::-1]
    if heldout is None:
        count = min(heldout_size, max(len(distinct) // 4, 1))
        if count and len(distinct) < 2:
            raise MassError(
                "One training problem cannot be split. Set problems.heldout, or problems.heldout_size=0 for none."
            )
        kept = shuffled(distinct, f"{seed}:heldout")[:count]
    else:
        kept = list(heldout)
        trained = {content_key(task.problem.text) for task in distinct}
        for family in sorted({task.source for task in heldout if task.entry is not None}):
            ours = [task for task in shuffled(kept, f"{seed}:heldout") if task.source == family]
            shared = [task for task in ours if content_key(task.problem.text) in trained]
            room = sum(task.source == family for task in distinct) // 4 - (len(ours) - len(shared))
            dropped = {task.problem.id for task in shared[max(room, 0) :]}
            kept = [task for task in kept if task.problem.id not in dropped]
    held = {content_key(task.problem.text) for task in kept}
    left = [task for task in distinct if content_key(task.problem.text) not in held]
    if not left:
        raise MassError("Every training problem is also held out. Set problems.heldout to another source.")
    taken = {task.problem.id for task in left}
    kept = [replace(task, problem=replace(task.problem, id=free_id(task.problem.id, taken))) for task in kept]
    return Split(left, kept, len(train) - len(left) - (len(kept) if heldout is None else 0))


def in_turn(tasks: Sequence[Task]) -> list[Task]:
    """The tasks of all sources in turn, each source's in their order: the first few of many are then of all of them."""
    sources: dict[str, list[Task]] = {}
    for task in tasks:
        sources.setdefault(task.source, []).append(task)
    return [task for some in zip_longest(*sources.values()) for task in some if task is not None]


def draw_pool(tasks: Sequence[Task], size: int, seed: int) -> tuple[list[Task], list[Task]]:
    """(`size` tasks set aside as few-shot shots, the others in their order); at most half of them are set aside."""
    pool = shuffled(tasks, f"{seed}:pool")[: min(size, len(tasks) // 2)]
    drawn = {task.problem.id for task in pool}
    return pool, [task for task in tasks if task.problem.id not in drawn]


@dataclass
class Cursor:
    """Where training stands in its tasks: `position` counts the tasks that all ranks together have taken.

    The order is a new seeded permutation each epoch. A global batch is a consecutive slice of it, of which rank r takes
    the r-th part, so W ranks with n tasks each see what one rank with W * n sees. A batch may reach over the end of
    an epoch into the next.
    """

    tasks: Sequence[Task]
    seed: int
    position: int = 0
    _epoch: int = field(default=-1, init=False, repr=False)
    _order: list[Task] = field(default_factory=list, init=False, repr=False)

    def next(self, n: int, rank: int = 0, world: int = 1) -> list[Task]:
        """The next `n` tasks of this rank; every rank must call it with the same `n`."""
        start = self.position + rank * n
        self.position += world * n
        return [self._at(i) for i in range(start, start + n)]

    def _at(self, position: int) -> Task:
        epoch, place = divmod(position, len(self.tasks))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, shuffled(self.tasks, f"{self.seed}:epoch:{epoch}")
        return self._order[place]

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: plain JSON."""
        return {
            "position": self.position,
            "seed": self.seed,
            "tasks": len(self.tasks),
            "digest": digest(self.tasks),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any], tasks: Sequence[Task]) -> Cursor:
        """Raises MassError when `tasks` are not those of the run that was saved (ids, texts and answers)."""
        cursor = cls(tasks, state["seed"], state["position"])
        if digest(tasks) != state["digest"]:
            raise MassError(
                f"The training problems changed since the checkpoint: {state['tasks']} then, {len(tasks)} now, or other "
                "texts or answers. Restore problems.*, or start another run (run.name)."
            )
        return cursor


def digest(tasks: Sequence[Task]) -> str:
    """16 hexadecimal digits of the ids, texts and answers of problems, whatever their order."""
    found = hashlib.sha256()
    for parts in sorted((task.problem.id, task.problem.text, task.answer) for task in tasks):
        found.update(json.dumps(parts).encode())
    return found.hexdigest()[:16]
