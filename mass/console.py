"""`mass-train`: what was typed is read, and a mistake in it said, before PyTorch and transformers are imported, which takes
seconds."""

from collections.abc import Sequence

from mass.recipe import command_line


def train(argv: Sequence[str] | None = None) -> None:
    """`mass-train RECIPE [KEY=VALUE ...]`, and what `deepspeed launch/meta_train.py` runs. Exits 0, 2 on user errors, 3 when
    another rank ended or stalled the run."""
    order = command_line(
        argv,
        "mass-train",
        "Meta-train the recipe's model: each outer step T tasks a rank, through their inner loops, to one DeepSpeed step.",
    )
    from mass import train

    train.follow(order)
