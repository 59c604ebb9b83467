"""Meta-training: one loop, read from top to bottom in `_train`.

Each outer step: T tasks a rank -> `episode.run` makes the gradients of the outer parameters -> one DeepSpeed step.
"""

import math
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mass import accumulate, checkpoint, distributed, lora, plan, report, state
from mass.checkpoint import Run
from mass.distributed import World
from mass.errors import MassError
from mass.heldout import evaluate
from mass.log import RunLog, summary_writer
from mass.prepare import check_context, deepspeed_config, make_outer, make_setting, tasks_of
from mass.probe import probe
from mass.recipe import Order, Recipe, dump
from mass.setting import kit as test_time_kit
from mass.splits import Cursor, in_turn
from mass.watchdog import Watchdog, watching

# these are left out where no rank has a value: most problems have no truth to hold an example against
KNOWN = ("scorer/auc", "credit/auc", "generator/auc", "generator/right")


def follow(order: Order) -> None:
    """Do what a command line asks for, as `mass.console.train` says."""
    try:
        if order.plan is not None:
            print(plan.report(order.recipe, *plan.machines(order.plan)))
        elif order.probe is not None:
            look(order.recipe, order.probe)
        else:
            train(order.recipe)
    except MassError as error:
        if os.environ.get("RANK", "0") == "0" or not dist.is_initialized():
            print(f"mass-train: {error}", file=sys.stderr, flush=True)
        # Peers may wait in a collective that this rank will never join: no orderly farewell, the launcher ends them.
        os._exit(2) if dist.is_initialized() and dist.get_world_size() > 1 else sys.exit(2)
    finally:
        distributed.stop()


def train(recipe: Recipe) -> None:
    """Run (or continue) the recipe's meta-training to its last outer step, or to SIGINT / SIGTERM."""
    torch.set_num_threads(recipe.run.threads)
    torch.manual_seed(recipe.run.seed)
    world = distributed.start(recipe.model.device, recipe.run.patience)
    with watching(world.rank, world.size, recipe.run.patience) as watch:
        _train(recipe, world, watch)


def _train(recipe: Recipe, world: World, watch: Watchdog) -> None:
    deepspeed_config(recipe, world)  # its errors come before the model is loaded
    run = _on_main(world, lambda: _open(recipe))
    train_tasks, heldout, pool = tasks_of(recipe)
    began = checkpoint.read_meta(run.start)["extra"] if run.start else None
    if world.main:
        print(f"loading {recipe.model.path}", flush=True)
    setting, fingerprint = make_setting(recipe, world, pool, began)
    if run.start is None:
        # a run that has begun goes on: its problems cannot be changed any more
        check_context(setting, train_tasks)
    policy_shape = setting.lm.shape
    assert policy_shape is not None
    cursor = Cursor(train_tasks, recipe.run.seed)
    outer = make_outer(recipe, setting, world)
    first = 0
    skipped = 0
    if run.start is not None:
        contents = checkpoint.load(run.start, setting.lm.lora, fingerprint)
        cursor = Cursor.from_state(contents.meta["cursor"], train_tasks)
        first, skipped = contents.meta["step"], contents.meta["skipped"]
        if first > recipe.outer.steps:
            raise MassError(
                f"outer.steps={recipe.outer.steps}: {run.start} is at step {first} already. Raise outer.steps"
            )
        state.restore(outer, contents, world)
    opened = run
    # every rank has got here
    distributed.any_rank(False)
    if run.branches:
        # before the run folder says that it is a run: `auto` is to find the start, whenever this is killed
        state.save(run, recipe, setting, outer, cursor, first, skipped, fingerprint, world)
    run = _on_main(world, lambda: checkpoint.commit(opened))
    log = RunLog(
        run.folder,
        rank=world.rank,
        total_steps=recipe.outer.steps,
        tensorboard=recipe.log.tensorboard,
        start_step=first,
        skipped=skipped,
    )
    report.introduce(log, recipe, run, setting, world, len(train_tasks), len(heldout), first)
    stop = _Stop()
    watch.armed = True
    in_a_row = 0
    saved = first

    # One iteration more than there are steps: the last evaluation and the last save run the same lines as the others.
    for step in range(first, recipe.outer.steps + 1):
        begin = time.perf_counter()
        done = step == recipe.outer.steps
        leaving = distributed.any_rank(stop.asked)
        policy, eta, log_lr = outer.values("policy"), outer.values("scorer"), outer.values("inner_lr")
        metrics: dict[str, float] = {}

        if heldout and _evaluates(recipe, step) and not leaving:
            count = min(len(heldout), recipe.evaluate.problems)
            log.say(
                f"answering {count} held-out problems, without {'and with ' * bool(recipe.inner.steps)}update"
            )
            metrics |= evaluate(
                test_time_kit(setting, policy, eta, log_lr),
                in_turn(heldout)[:count],
                {task.source for task in train_tasks},
                setting.verifier,
                # what training has memory for
                batch=recipe.outer.together,
                rank=world.rank,
                world=world.size,
            )
            told = f"held-out at step {step}: {_percent(metrics['heldout/none'])} without update"
            log.say(told + (f", {_percent(metrics['heldout/mass'])} with" if recipe.inner.steps else ""))

        if step > saved and (done or leaving or step % recipe.save.every == 0):
            before = time.perf_counter()
            state.save(run, recipe, setting, outer, cursor, step, skipped, fingerprint, world)
            metrics["time/save"] = time.perf_counter() - before
            saved = step

        if done or leaving:
            if done and metrics:
                log.scalars(step, metrics)
            break

        tasks = cursor.next(recipe.outer.tasks, world.rank, world.size)
        show = recipe.log.samples_every and step % recipe.log.samples_every == 0
        result = accumulate.run(
            setting,
            tasks,
            step,
            policy,
            eta,
            log_lr,
            at_once=recipe.outer.tasks_at_once,
            show=1 if show else 0,
        )
        # without an inner loop the scorer stays as it began
        learning = ("policy", "scorer") if recipe.inner.steps else ("policy",)
        rates = {group: outer.learning_rate(group) for group in learning}
        applied, norms = outer.step(result.gradients)
        in_a_row = 0 if applied else in_a_row + 1
        skipped += not applied

        metrics |= _reduce(result.metrics, result.counts)
        metrics |= {f"{group}/grad_norm": norms[group] for group in learning}
        metrics |= {f"time/{part}": seconds for part, seconds in result.seconds.items()}
        metrics |= {"time/step": time.perf_counter() - begin, "meta/skipped_steps": skipped}
        metrics |= {"inner/lr": _rate(recipe, log_lr)} if recipe.inner.steps else {}
        metrics |= {f"outer/lr_{group}": lr for group, lr in rates.items()} | {
            "memory/peak_gb": report.peak_gb(world.device)
        }
        log.scalars(step, metrics)
        log.line(step, metrics)
        if show:
            log.samples(step, [report.table(tasks[0], result)])
        if in_a_row >= recipe.outer.max_skipped:
            good = checkpoint.newest_good(run.folder)
            raise MassError(
                f"{in_a_row} outer steps in a row had a gradient that is not finite (outer.max_skipped). "
                f"The last good checkpoint is {good or 'none: nothing was saved'}. Lower inner.lr or outer.lr_policy."
            )

    log.close()
    if leaving and not done:
        log.say(f"stopped at step {saved} on request; run.resume=auto continues")
    else:
        log.say(f"done: {run.folder}. Next: mass-adapt --run {run.folder} --problem '...'")


def look(recipe: Recipe, tasks: int) -> None:
    """`mass-train RECIPE --probe`: what mass/probe.py finds on the first tasks, before anything is trained."""
    torch.set_num_threads(recipe.run.threads)
    torch.manual_seed(recipe.run.seed)
    if recipe.inner.steps == 0:
        raise MassError(
            "--probe looks at an inner loop, and inner.steps=0 has none: set inner.steps=1 or more"
        )
    world = distributed.start(recipe.model.device)
    if world.size > 1:
        raise MassError(
            f"--probe runs in one process, and there are {world.size}. Type mass-train RECIPE --probe"
        )
    train_tasks, _, pool = tasks_of(recipe)
    setting, _ = make_setting(recipe, world, pool, None)
    check_context(setting, train_tasks)
    policy = lora.fresh(setting.lm.lora, recipe.lora.rank, torch.Generator().manual_seed(recipe.run.seed))
    eta = {key: p.detach() for key, p in setting.head.named_parameters()}
    if tasks > len(train_tasks):
        _say(f"{tasks} tasks asked for, and there are {len(train_tasks)}: all of them are looked at")
    chosen = Cursor(train_tasks, recipe.run.seed).next(min(tasks, len(train_tasks)))
    for line in probe(setting, chosen, policy, eta, _say).lines:
        print(line, flush=True)


def _say(text: str) -> None:
    print(f"mass-train: {text}", file=sys.stderr, flush=True)


def _open(recipe: Recipe) -> Run:
    if recipe.log.tensorboard:
        summary_writer()
    r = recipe.run
    return checkpoint.open_run(Path(r.folder), r.name, dump(recipe), r.resume)


def _on_main(world: World, work: Callable[[], Run]) -> Run:
    """Have rank 0 do what is done to the run folder and tell the others; an error there is every rank's error."""
    found: list[Any] = [None]
    if world.main:
        try:
            found = [work()]
        except MassError as error:
            found = [error]
    if world.size > 1:
        dist.broadcast_object_list(found)
    if isinstance(found[0], MassError):
        raise found[0]
    return found[0]


def _reduce(metrics: Mapping[str, float], counts: Mapping[str, int]) -> dict[str, float]:
    """Over ranks: sums of `tokens/` and the like, and of the rest the mean over what each rank's value is a mean of."""
    keys = sorted(metrics)
    share = [counts[key] if math.isfinite(metrics[key]) else 0 for key in keys]
    flat = [metrics[key] * n if n else 0.0 for key, n in zip(keys, share, strict=True)]
    total = distributed.reduce_sum([*flat, *map(float, share)])
    out = {}
    for i, key in enumerate(keys):
        count = total[len(keys) + i]
        if not count and key in KNOWN:
            continue
        out[key] = total[i] / count if count else math.nan
        if key.startswith(accumulate.SUMS):
            out[key] = total[i]
    return out


def _rate(recipe: Recipe, log_lr: Mapping[str, Tensor]) -> float:
    return sum(x.exp().item() for x in log_lr.values()) / len(log_lr) if log_lr else recipe.inner.lr


def _evaluates(recipe: Recipe, step: int) -> bool:
    """Before the first step, every N steps, and after the last; a run of fewer than N steps is a trial without any."""
    every, steps = recipe.evaluate.every, recipe.outer.steps
    return 0 < every <= steps and (step == steps or step % every == 0)


def _percent(x: float) -> str:
    return f"{100 * x:.0f} %"


class _Stop:
    """SIGINT or SIGTERM asks the loop to finish its step, save and leave; a second SIGINT ends at once."""

    def __init__(self) -> None:
        self.asked = False
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, self._ask)

    def _ask(self, number: int, frame: object) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True
        if os.environ.get("RANK", "0") == "0":
            print(
                "stopping after this step, with a save (Ctrl-C again: at once)", file=sys.stderr, flush=True
            )
