"""Attention in tiles: the same numbers and derivatives as over whole rows, from fewer scores."""

from dataclasses import replace
from typing import Any

import pytest
import references
import torch
import worlds
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from mass import attention, blocks, forward
from mass.batch import Packed, Sequence, pack


def ragged(share: bool, *more: int) -> Packed:
    """Two tasks; lengths of several sizes of tile, one sequence absent. `more`: lengths of both tasks."""
    head = list(range(3, 23)) if share else []
    lengths = [[5, 30, 9, 17, *more], [40, 3, 12, *more]]
    tasks: list[list[Sequence | None]] = [
        [Sequence([*head, *range(100, 100 + n)], len(head) + 1) for n in own] for own in lengths
    ]
    return pack([tasks[0], [*tasks[1], None]], 0, share=share)


def whole_mask(packed: Packed) -> Tensor:
    """What every token may look at, [B, 1, S, S]: a sequence is where position ids go up by one."""
    if packed.mask_B1SS is not None:
        return packed.mask_B1SS
    step = torch.ones_like(packed.positions_BS)
    step[:, 1:] = (packed.positions_BS[:, 1:] != packed.positions_BS[:, :-1] + 1).long()
    segment = step.cumsum(1)
    return ((segment.unsqueeze(1) == segment.unsqueeze(2)).tril()).unsqueeze(1)


def heads(packed: Packed, count: int, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    B, S = packed.tokens_BS.shape
    return torch.randn(B, count, S, 4, generator=g, dtype=torch.float64)


def seen(packed: Packed) -> Tensor:
    """True [B, S] for the tokens that belong to a sequence."""
    return packed.tokens_BS != 0


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("written_out", [False, True])
def test_tiles_give_what_whole_rows_give(share: bool, written_out: bool, additive: bool) -> None:
    packed = ragged(share)
    assert packed.tiles is not None
    mask = whole_mask(packed)
    if additive:
        mask = torch.zeros((), dtype=torch.float64).masked_fill(~mask, torch.finfo(torch.float64).min)
    q, k, v = (heads(packed, 2, seed).requires_grad_() for seed in range(3))
    keep = seen(packed)[:, None, :, None]
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3) * keep
    with attention.Tiled(packed.tiles, written_out):
        got = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3)
    assert torch.isfinite(got).all()
    assert torch.allclose(got * keep, want, rtol=0, atol=1e-12)
    by_got, by_want = (torch.autograd.grad((x * keep).square().sum(), (q, k, v)) for x in (got, want))
    for a, b in zip(by_got, by_want, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("bad", [0, 1])
@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("written_out", [False, True])
def test_what_is_not_finite_stays_in_its_own_task(share: bool, written_out: bool, bad: int) -> None:
    """A tile's padding is taken from nobody: a NaN there would get through the mask, and back."""
    # lengths that are nearly those of others share a tile with them
    packed = ragged(share, 31, 13)
    assert packed.tiles is not None and any((key < 0).any() for _, key in packed.tiles.groups)
    tasks, rows, _ = packed.tokens_TPS.shape
    own = torch.arange(tasks).repeat_interleave(rows) == bad
    keep = (seen(packed) & ~own.unsqueeze(1))[:, None, :, None]

    def run(value: float) -> tuple[Tensor, ...]:
        leaves = [heads(packed, 2, seed) for seed in range(3)]
        for x in leaves:
            x[own] *= value
            x.requires_grad_()
        with attention.Tiled(packed.tiles, written_out):
            out = F.scaled_dot_product_attention(*leaves, attn_mask=whole_mask(packed), scale=0.3)
        others = out.masked_fill(~keep, 0.0)
        grads = torch.autograd.grad(out.square().sum(), leaves)
        return others, *(g.masked_fill(~keep, 0.0) for g in grads)

    for got, want in zip(run(torch.nan), run(1.0), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("share", [False, True])
def test_tiles_hold_every_token_once_and_fewer_scores(share: bool) -> None:
    packed = ragged(share)
    assert packed.tiles is not None
    queries = torch.cat([q.flatten() for q, _ in packed.tiles.groups])
    real = queries[queries >= 0]
    assert sorted(real.tolist()) == seen(packed).flatten().nonzero().flatten().tolist()
    back = packed.tiles.back_BS
    assert (queries[back[real]] == real).all()
    assert (back[~seen(packed).flatten()] == queries.numel()).all()
    scores = sum(q.shape[0] * q.shape[1] * k.shape[1] for q, k in packed.tiles.groups)
    B, S = packed.tokens_BS.shape
    assert scores < 0.6 * B * S * S


def test_rows_of_one_sequence_have_no_tiles() -> None:
    assert pack([[Sequence([1, 2, 3], 1)] * 4], 0, row=3).tiles is None


def test_written_out_attention_has_numeric_first_and_second_derivatives() -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, n, 3, generator=g, dtype=torch.float64).requires_grad_() for n in (4, 5, 5))
    mask = torch.zeros(2, 1, 4, 5, dtype=torch.float64)
    mask[0, :, :, 3:] = torch.finfo(torch.float64).min

    def call(*x: Tensor) -> Tensor:
        return attention.attend(*x, mask)

    assert torch.autograd.gradcheck(call, (q, k, v), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, (q, k, v), check_fwd_over_rev=True)

    def tangent(*x: Tensor) -> Any:
        return torch.func.jvp(call, x, (v[:, :, :4] * 0.5, k + 1, v * v))[1]

    assert torch.autograd.gradcheck(tangent, (q, k, v))


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("engine", worlds.EXACT)
def test_meta_gradients_in_tiles_equal_whole_rows(engine: str, share: bool) -> None:
    """Against the same world without its tiles, which multiplies whole rows, and against unrolling example by example."""
    world = worlds.make("qwen3")
    rows = [
        [s and replace(s, tokens=s.tokens * (1 + 3 * (i % 2))) for i, s in enumerate(task)]
        for task in world.examples
    ]
    rows = worlds.alike(rows) if share else rows
    packed = pack(rows, 0, share=share)
    assert packed.tiles is not None
    cut = replace(world, examples=rows, packed=packed)
    whole = replace(cut, packed=replace(packed, tiles=None))
    rule, lr = worlds.RULES["sgd"]
    got, want = (worlds.meta(w, engine, rule, lr, 2, need_init=True) for w in (cut, whole))
    truth = references.unroll(whole, rule, lr, 2)
    assert got.init is not None and want.init is not None
    for one in (want.weight_TN, truth.weight_TN):
        assert worlds.error(got.weight_TN, one) < 1e-11
    assert worlds.error(got.init, want.init) < 1e-11


def test_first_order_passes_and_both_kinds_of_context_count_fewer_scores() -> None:
    """Fewer, seen from what the kernel is called with."""
    packed = ragged(False)
    q = heads(packed, 2, 0)
    areas: list[int] = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is F.scaled_dot_product_attention:
                areas.append(args[0].shape[0] * args[0].shape[2] * args[1].shape[2])
            return func(*args, **(kwargs or {}))

    with Watch(), blocks.tiled(packed):
        F.scaled_dot_product_attention(q, q, q, attn_mask=whole_mask(packed))
    B, S = packed.tokens_BS.shape
    assert 1 < len(areas) and sum(areas) < 0.6 * B * S * S


def test_models_call_attention_as_the_tiles_know_it(monkeypatch: pytest.MonkeyPatch) -> None:
    world = worlds.make()
    calls: list[bool] = []
    attend = attention.attend
    monkeypatch.setattr(
        attention,
        "attend",
        lambda *x: calls.append(x[0].shape[2] < world.packed.tokens_BS.shape[1]) or attend(*x),
    )
    with sdpa_kernel(SDPBackend.MATH):
        forward.token_logprobs(world.hf, world.layers, world.packed, world.start, second_order=True)
    assert world.packed.tiles is not None and calls and all(calls)
