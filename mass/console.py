"""The console scripts. PyTorch and transformers take seconds to import: before that, `mass-train` reads what was typed and says a
mistake in it, and while they are imported, nothing looks for garbage."""

import contextlib
import gc
import sys
from collections.abc import Iterator, Sequence

from mass.recipe import command_line


def train(argv: Sequence[str] | None = None) -> None:
    """`mass-train RECIPE [KEY=VALUE ...]`, and what `deepspeed launch/meta_train.py` runs. Exits 0, 2 on user errors, 3 when
    another rank ended or stalled the run, 130 when Ctrl-C ended it at once."""
    order = command_line(
        argv,
        "mass-train",
        "Meta-train the recipe's model: each outer step T tasks a rank, through their inner loops, to one DeepSpeed step.",
    )
    # before the loop, which would save first, or the second Ctrl-C in it
    with _ending("mass-train"):
        with _importing():
            from mass import train
        train.follow(order)


def adapt(argv: Sequence[str] | None = None) -> int:
    """`mass-adapt`. Returns the exit code."""
    with _ending("mass-adapt"):
        with _importing():
            from mass.command import main
        return main(argv)


def evaluate(argv: Sequence[str] | None = None) -> int:
    """`mass-eval`. Returns the exit code."""
    with _ending("mass-eval"):
        with _importing():
            from mass.evaluate import main
        return main(argv)


@contextlib.contextmanager
def _importing() -> Iterator[None]:
    """What is imported lives as long as the process: to look through it for garbage, again and again while it grows and once
    more at the end, takes a quarter of the time of a command that does nothing else."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@contextlib.contextmanager
def _ending(name: str) -> Iterator[None]:
    """Ctrl-C where nobody else heeds it."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr, flush=True)
        sys.exit(130)
