"""The problems of an evaluation: none that a run of one of its arms has trained on or shows in its prompts."""

from collections.abc import Sequence
from typing import NamedTuple

from mass.arms import Arm
from mass.errors import MassError
from mass.kit import Plan
from mass.problems import Task, content_key
from mass.recipe import load as load_recipe
from mass.sources import load_all, load_named


class Problems(NamedTuple):
    """The problems that all arms answer; how many were left out because a run has trained on them or shows them, and how
    many because another one has the same content; and the sources that a run has trained on."""

    tasks: list[Task]
    left_out: int
    repeated: int
    trained: list[str]


def held_out(wanted: Plan, chosen: Sequence[Arm], *, made: bool, limit: int | None = None) -> Problems:
    """The problems to answer: those of the run, or (`made`) those of the recipe's problems.heldout alone.

    None has the content of a problem that one of the arms' runs has trained on or shows in its prompts.
    """
    recipe = wanted.recipe
    met: set[str] = set()
    sources: set[str] = set()
    runs = {arm.plan.step.parent for arm in chosen if arm.plan.step}
    runs |= {wanted.step.parent} if wanted.step else set()
    for run in sorted(runs):
        # as it was trained, whatever this call changes
        own = load_all(load_recipe(run / "recipe.yaml", [], training=False))
        met |= {content_key(task.problem.text) for task in [*own.train, *own.pool]}
        sources |= {task.source for task in own.train}
    if not wanted.step:
        shown = [source for source in recipe.problems.train if source]
        for task in load_named(recipe, shown, recipe.problems.split, recipe.problems.size) if shown else []:
            met.add(content_key(task.problem.text))
            sources.add(task.source)
    p = recipe.problems
    if made:
        found = load_named(recipe, p.heldout or [], p.heldout_split, limit or p.heldout_size)
    else:
        found = load_all(recipe).heldout
    distinct = {content_key(task.problem.text): task for task in reversed(found)}
    tasks = [task for key, task in reversed(distinct.items()) if key not in met]
    if not tasks:
        raise MassError(
            f"no problem is left of {len(found)}: the run has trained on all of them. Name others with --problems"
            if found
            else "there are no held-out problems: this run has problems.heldout_size=0. Name some with --problems"
        )
    left_out = len(distinct) - len(tasks)
    return Problems(tasks[:limit], left_out, len(found) - len(distinct), sorted(sources))
