"""The problems of an evaluation: none that a run of one of its arms has trained on or shows in its prompts."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from mass import checkpoint
from mass.arms import Arm
from mass.errors import MassError
from mass.problems import Task, content_key, has_truth, task_key
from mass.recipe import load as load_recipe
from mass.sources import load_all, load_named
from mass.splits import digest, in_turn
from mass.wanted import Plan


class Problems(NamedTuple):
    """The problems that all arms answer; how many were left out because a run has trained on them or shows them, and how
    many because another one has the same content; and the sources that a run has trained on."""

    tasks: list[Task]
    left_out: int
    repeated: int
    trained: list[str]


def _check_same(step: Path, train: Sequence[Task]) -> None:
    """Raise MassError unless these are the problems that a run was trained on: else nobody knows which those were."""
    # training that goes on may have dropped the step meanwhile
    checkpoint.verify(step)
    saved = checkpoint.read_meta(step).get("cursor", {}).get("digest")
    if saved is not None and saved != digest(train):
        raise MassError(
            f"{step.parent}: the problems that it was trained on have changed since (problems.train of its recipe.yaml), so "
            "which of these problems it has met cannot be told. Restore them, or train again"
        )


def first(tasks: Sequence[Task], count: int) -> list[Task]:
    """The first `count` tasks, of all sources in turn; all of them in their order where there are no more."""
    if count >= len(tasks):
        return list(tasks)
    # a world is one source: its families stand mixed as they were drawn
    known = [replace(x, source=f"world:{x.entry['world']}") if x.entry and has_truth(x) else x for x in tasks]
    own = {task.problem.id: task for task in tasks}
    return [own[task.problem.id] for task in in_turn(known)[:count]]


def held_out(wanted: Plan, chosen: Sequence[Arm], *, made: bool, limit: int | None = None) -> Problems:
    """The problems to answer: those of the run, or (`made`) those of the recipe's problems.heldout alone.

    None has the content of a problem that one of the arms' runs has trained on or shows in its prompts.
    """
    recipe = wanted.recipe
    met: set[str] = set()
    sources: set[str] = set()
    begun = {arm.plan.step for arm in chosen if arm.plan.step} | ({wanted.step} if wanted.step else set())
    for run, own_steps in itertools.groupby(sorted(begun), key=lambda step: step.parent):
        # as it was trained, whatever this call changes
        own = load_all(load_recipe(run / "recipe.yaml", [], training=False))
        for step in own_steps:
            _check_same(step, own.train)
        met |= {content_key(task.problem.text) for task in [*own.train, *own.pool]}
        sources |= {task.source for task in own.train}
    if not wanted.step:
        shown = [source for source in recipe.problems.train if source]
        p = recipe.problems
        for task in load_named(recipe, shown, p.split, p.size, p.weights) if shown else []:
            met.add(content_key(task.problem.text))
            sources.add(task.source)
    p = recipe.problems
    if made:
        found = load_named(recipe, p.heldout or [], p.heldout_split, limit or p.heldout_size)
    else:
        found = load_all(recipe).heldout
    distinct = {task_key(task.problem): task for task in reversed(found)}
    tasks = [task for task in reversed(distinct.values()) if content_key(task.problem.text) not in met]
    if not tasks:
        raise MassError(
            f"no problem is left of {len(found)}: the run has trained on all of them. Name others with --problems"
            if found
            else "there are no held-out problems: this run has problems.heldout_size=0. Name some with --problems"
        )
    left_out = len(distinct) - len(tasks)
    if limit is not None:
        tasks = first(tasks, limit)
    return Problems(tasks, left_out, len(found) - len(distinct), sorted(sources))
