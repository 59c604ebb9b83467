"""Run folders with hand-made contents, nothing trained: what `mass.checkpoint` writes and reads, and how it is compared."""

from pathlib import Path

import torch
from torch import Tensor, nn

from mass.checkpoint import Run, commit, open_run, steps
from mass.lora import Layers, LoraLinear, LoraShape, fresh
from mass.stepfolder import Contents

RECIPE = "run: {name: a, folder: f, resume: 'no', seed: 0}\nmodel: {path: m}\nlora: {rank: 2, targets: [all-linear]}\nouter: {steps: 10}\n"
SHAPE = LoraShape(2, 4.0, ("all-linear",))


def make_layers(width: int = 6) -> Layers:
    names = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj")
    return {name: LoraLinear(nn.Linear(width, 8), SHAPE.scale) for name in names}


def contents(seed: int = 0, ranks: int = 2, size: int = 5) -> Contents:
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    moment = noise(size, 3)
    policy = {key: noise(*x.shape) for key, x in fresh(make_layers(), 2, generator).items()}
    return Contents(
        policy=policy,
        shape=SHAPE,
        base_name="tiny:llama",
        scorer={"net.0.weight": noise(4, 3), "net.0.bias": torch.tensor([float("nan"), -0.0, 1e-45])},
        # two names for one memory, a transposed view, a scalar, an empty one
        optimizer={
            "m:a": moment,
            "v:a": moment,
            "t": moment.T,
            "step": torch.tensor(seed, dtype=torch.int64),
            "empty": torch.zeros(0, 2),
        },
        rng=[
            torch.randint(256, (40 + rank,), generator=generator, dtype=torch.uint8) for rank in range(ranks)
        ],
        meta={
            "cursor": {"epoch": seed, "order": [3, 1, 2]},
            "counters": {"skipped": 0},
            "fingerprint": "f00",
        },
    )


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, NaN and the sign of zero included."""
    return (
        a.dtype == b.dtype and a.shape == b.shape and a.contiguous().numpy().tobytes() == b.numpy().tobytes()
    )


def assert_same(got: Contents, want: Contents) -> None:
    for name in ("policy", "scorer", "optimizer"):
        mine, theirs = getattr(got, name), getattr(want, name)
        assert mine.keys() == theirs.keys()
        assert all(same(theirs[key], mine[key]) for key in mine), name
    assert len(got.rng) == len(want.rng)
    assert all(same(a, b) for a, b in zip(want.rng, got.rng, strict=True))
    assert (got.shape, got.base_name) == (want.shape, want.base_name)
    assert got.meta | want.meta == got.meta


def begin(tmp_path: Path, resume: str | Path = "no", recipe: str = RECIPE, name: str = "a") -> Run:
    return commit(open_run(tmp_path, name, recipe, resume))


def names(run: Run) -> list[str]:
    return [step.name for step in steps(run.folder)]


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.glob(".*") if path.name != ".lock"]
