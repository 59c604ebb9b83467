"""The problems of a recipe: to train on, held out, and set aside as shots; no problem text is in two of them."""

from typing import Any, NamedTuple

from mass.problems import Task, load_tasks
from mass.recipe import Recipe
from mass.splits import draw_pool, split_tasks


class Tasks(NamedTuple):
    """Disjoint by content (`mass.problems.content_key`)."""

    train: list[Task]
    heldout: list[Task]
    pool: list[Task]


def load_named(recipe: Recipe, sources: list[str], split: str, size: int, weights: Any = None) -> list[Task]:
    """Tasks of some sources, with the settings that the recipe has for them."""
    p = recipe.problems
    return load_tasks(
        sources,
        split=split,
        size=size,
        weights=weights,
        gym=p.gym,
        world=p.world,
        columns=vars(p.columns),
        verifier=p.verifier,
        demonstrations=p.demonstrations,
        seed=recipe.run.seed,
    )


def load_all(recipe: Recipe) -> Tasks:
    """Everything that a run of the recipe works with, always the same. Raises MassError for a source that cannot be used."""
    p, seed = recipe.problems, recipe.run.seed
    found = load_named(recipe, p.train, p.split, p.size, p.weights)
    held = None if p.heldout is None else load_named(recipe, p.heldout, p.heldout_split, p.heldout_size)
    split = split_tasks(found, held, p.heldout_size, seed)
    pool, rest = draw_pool(split.train, recipe.prompt.pool, seed)
    return Tasks(rest, split.heldout, pool)
