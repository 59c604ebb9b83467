"""What a run says of itself: how it begins, the table of one task, the memory it held."""

import resource

import torch

from mass.checkpoint import Run
from mass.distributed import World
from mass.episode import Result
from mass.log import RunLog, SampleRow, SampleTable
from mass.problems import Task
from mass.recipe import Recipe, dump
from mass.rewards import find_answer
from mass.setting import Setting


def introduce(
    log: RunLog,
    recipe: Recipe,
    run: Run,
    setting: Setting,
    world: World,
    train: int,
    heldout: int,
    first: int,
) -> None:
    log.text("recipe", dump(recipe))
    size = sum(p.numel() for p in setting.lm.hf.parameters())
    where = f"{world.size} process{'es' if world.size > 1 else ''} on {world.device.type}"
    log.say(f"{recipe.model.path}: {size / 1e6:.1f} M parameters in {recipe.model.dtype}, {where}")
    log.say(f"{train} training problems, {heldout} held out, {len(setting.pool)} kept as few-shot examples")
    if recipe.inner.steps:
        log.say(f"meta-gradient: {setting.engine}, K = {recipe.inner.steps} ({setting.why})")
    else:
        log.say(f"no inner loop (inner.steps=0): outer.loss={recipe.outer.loss} trains the policy alone")
    if run.start is not None:
        log.say(f"continuing {run.start} at step {first}")
    for line in run.changed:
        log.warn(f"changed since this run began: {line}")
    for name in run.aside:
        log.warn(f"set aside: {name}")


def table(task: Task, result: Result) -> SampleTable:
    rows = [
        SampleRow(e.problem, e.solution, e.valid, e.reason, weight, credit)
        for e, weight, credit in zip(
            result.practice.examples[0],
            result.weight_TN[0].tolist(),
            result.credit_TN[0].tolist(),
            strict=True,
        )
    ]
    before, after = (find_answer(texts[0]) if texts else None for texts in result.answers)
    return SampleTable(task.problem.text, rows, task.problem.id, task.answer, before, after)


def peak_gb(device: torch.device) -> float:
    """Most memory held so far, GB: of the GPU where the run is on one, else resident memory of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    # Linux counts these in KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
