"""`mass-train`: what was typed is read, and a mistake in it said, before PyTorch and transformers are imported, which takes
seconds."""

import sys
from collections.abc import Sequence

from mass.recipe import command_line


def train(argv: Sequence[str] | None = None) -> None:
    """`mass-train RECIPE [KEY=VALUE ...]`, and what `deepspeed launch/meta_train.py` runs. Exits 0, 2 on user errors, 3 when
    another rank ended or stalled the run, 130 when Ctrl-C ended it at once."""
    order = command_line(
        argv,
        "mass-train",
        "Meta-train the recipe's model: each outer step T tasks a rank, through their inner loops, to one DeepSpeed step.",
    )
    try:
        from mass import train

        train.follow(order)
    except KeyboardInterrupt:
        # before the loop, which would save first, or the second Ctrl-C in it
        print("mass-train: interrupted", file=sys.stderr, flush=True)
        sys.exit(130)
