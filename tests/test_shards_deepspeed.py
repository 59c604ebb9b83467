"""DeepSpeed makes and holds the parts of a sharded base: its own tools see them, the base is never whole, nothing is patched."""

import gc
import weakref

import pytest
import torch
from ranks import Ranks
from tiny import tiny
from torch import Tensor, nn
from torch.nn import functional as F

from mass import distributed
from mass.memory import Live
from mass.shards import Shards

# What a context of deepspeed.zero.Init replaces, or leaves behind.
PATCHED = (
    (F, "linear"), (nn.Module, "__init_subclass__"), (nn.Module, "apply"), (nn.Module, "_old_apply"),
    (nn.Linear, "__init__"), (nn.Linear, "_old_init"), (Tensor, "__new__"), (Tensor, "__old_new__"), (torch, "empty"),
    (torch, "tensor"),
)  # fmt: skip


def state() -> list[object]:
    return [getattr(owner, name, None) for owner, name in PATCHED]


def take(dtype: torch.dtype, **how: bool) -> tuple[nn.Module, dict[str, Tensor], Shards, int]:
    """A sharded model, its values, and the most bytes that were held while its parts were made and filled."""
    hf, _ = tiny("llama", dtype, num_hidden_layers=8)
    values = dict(hf.named_parameters())
    shards = Shards(torch.device("cpu"), **how)
    with Live() as live:
        shards.take(hf, lambda name, low, high: values[name].flatten()[low:high], dtype)
    return hf, values, shards, live.peak


def on_each_rank() -> None:
    world = distributed.start("cpu")
    before = state()
    for dtype, how in ((torch.float64, {}), (torch.bfloat16, {"in_main_memory": True})):
        hf, values, shards, peak = take(dtype, **how)
        parts = [unit.part.nbytes for unit in shards.units]
        # one unit is whole, and for a moment the one before it, until a thread of gloo's lets it go
        assert peak <= sum(parts) + 2 * world.size * max(parts), "no more than that is whole"
        # one rank's part is all there is, and DeepSpeed counts as the rounds do
        for unit, parameter in zip(shards.units, shards.parameters(), strict=True):
            assert parameter.ds_status.name == "NOT_AVAILABLE" and parameter.numel() == 0  # type: ignore[attr-defined]
            assert len(unit.part) == -(-unit.size // world.size) and unit.part.dtype == dtype
        whole_to_deepspeed(shards, values)
        changed_by_deepspeed(shards, hf)
        part = weakref.ref(shards.units[0].part)
        del hf, values, shards, unit, parameter
        gc.collect()
        assert part() is None, "a base that nobody wants any more is given up"
    assert [x == y for x, y in zip(before, state(), strict=True)] == [True] * len(before)
    distributed.stop()


def whole_to_deepspeed(shards: Shards, values: dict[str, Tensor]) -> None:
    """A unit, gathered by DeepSpeed's own context, has every matrix, and is given up after it."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(shards.parameters()):
        for unit in shards.units:
            assert unit.parameter.shape == (unit.size,)
            for i, name in enumerate(unit.names):
                assert torch.equal(unit.view(unit.parameter.detach(), i), values[name]), name
    assert all(parameter.numel() == 0 for parameter in shards.parameters())


def changed_by_deepspeed(shards: Shards, hf: nn.Module) -> None:
    """What DeepSpeed's context writes is what the layers gather: there is one copy of the part."""
    import deepspeed

    name = "model.layers.1.mlp.up_proj.weight"
    u, i = shards._place[name]
    unit = shards.units[u]
    x = torch.ones(1, 64, dtype=unit.part.dtype)
    layer = hf.get_submodule(name.removesuffix(".weight"))
    before = layer(x)
    shards.settle()
    with deepspeed.zero.GatheredParameters([unit.parameter], modifier_rank=0):
        # what another rank writes is not sent
        unit.view(unit.parameter.data, i).fill_(2.0 if shards.rank == 0 else 3.0)
    assert before.abs().max() < 100
    assert torch.equal(layer(x), torch.full((1, unit.shapes[i][0]), 128.0, dtype=x.dtype))
    shards.settle()


@pytest.mark.multiprocess
@pytest.mark.parametrize("world", [1, 3])
def test_deepspeed_holds_the_parts(ranks: Ranks, world: int) -> None:
    ranks("test_shards_deepspeed:on_each_rank", world=world).good()
