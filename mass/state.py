"""The whole training state between the ranks and the run folder: collected and written by rank 0, put back on every rank."""

import json
from typing import Any

import torch
import torch.distributed as dist

from mass import checkpoint, distributed
from mass.checkpoint import Contents, Run
from mass.distributed import World
from mass.engine import Outer
from mass.errors import MassError
from mass.log import write_atomic
from mass.prepare import asked_for
from mass.problems import Task
from mass.recipe import Recipe
from mass.setting import Setting
from mass.splits import Cursor


def save(
    run: Run,
    recipe: Recipe,
    setting: Setting,
    outer: Outer,
    cursor: Cursor,
    step: int,
    skipped: int,
    fingerprint: str,
    world: World,
) -> None:
    """Collect the state of all ranks; rank 0 writes it, and what it could not write is every rank's error."""
    state = outer.state()
    log_lr = outer.values("inner_lr")
    state |= {f"value:inner_lr/{name}": x for name, x in log_lr.items()}
    policy, eta = outer.values("policy"), outer.values("scorer")
    rng = distributed.gather_bytes(torch.get_rng_state())
    failure: list[Any] = [None]
    if world.main:
        assert setting.lm.shape is not None
        contents = Contents(
            policy=policy,
            shape=setting.lm.shape,
            base_name=setting.lm.name,
            scorer={key: x.cpu() for key, x in eta.items()},
            optimizer={key: x.cpu() for key, x in state.items()},
            rng=rng,
            meta={
                "cursor": cursor.state(),
                "skipped": skipped,
                "fingerprint": fingerprint,
                "extra": {
                    "inner_lr": {name: x.exp().item() for name, x in log_lr.items()},
                    "engine": [setting.engine, setting.recompute, setting.checkpoint],
                    "asked": asked_for(recipe),
                },
            },
        )
        try:
            shots = run.folder / "shots.jsonl"
            text = "".join(map(_shot, setting.pool))
            # a start that ended before its first step may have left those of another recipe
            if not shots.exists() or shots.read_bytes() != text.encode():
                write_atomic(shots, text)
            checkpoint.save(run, step, contents, recipe.save.keep)
        except (MassError, OSError) as error:
            failure = [
                error if isinstance(error, MassError) else MassError(f"saving to {run.folder}: {error}")
            ]
    if world.size > 1:
        dist.broadcast_object_list(failure)
    if failure[0] is not None:
        raise failure[0]


def _shot(task: Task) -> str:
    row = {
        "id": task.problem.id,
        "problem": task.problem.text,
        "solution": task.solution,
        "answer": task.answer,
    }
    return json.dumps(row | {"source": task.source}, ensure_ascii=False) + "\n"


def restore(outer: Outer, contents: Contents, world: World) -> None:
    prefix = "value:inner_lr/"
    log_lr = {key.removeprefix(prefix): x for key, x in contents.optimizer.items() if key.startswith(prefix)}
    groups = {"policy": contents.policy, "scorer": contents.scorer, "inner_lr": log_lr}
    outer.load(groups, contents.optimizer)
    if world.size == len(contents.rng):
        torch.set_rng_state(contents.rng[world.rank].cpu())
