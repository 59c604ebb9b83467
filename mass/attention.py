"""Attention over packed rows in tiles: a sequence meets the keys that it can see, not its whole row.

A row of a packed batch holds several sequences, and none sees another, so most of the row's [S, S] scores are masked out.
That is little beside the products of the layers while a fused kernel makes them, but second derivatives need the scores
written out, several times over. Here queries and keys of each sequence are gathered into tiles first: sequences of like
length together, a shared prefix once for itself and once more for every sequence that sees it.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True)
class Tiles:
    """Where the tiles of a batch of B rows of S tokens lie in its B*S tokens, int64; -1: padding of a tile.

    groups     for each size of tile: the places of its queries [L, Q] and of its keys [L, K], L tiles
    back_BS    each token's place among all queries [sum of L*Q], one behind the last for what no tile has (row padding)
    """

    groups: tuple[tuple[Tensor, Tensor], ...]
    back_BS: Tensor

    def map(self, change: Callable[[Tensor], Tensor]) -> "Tiles":
        """The same with `change` applied to every tensor."""
        return Tiles(tuple((change(q), change(k)) for q, k in self.groups), change(self.back_BS))


def tiles(spans: Iterable[tuple[int, int, int, int]], rows: int, width: int) -> Tiles | None:
    """Tiles for sequences (row, start, end, head): tokens start to end of a row, which see themselves and the row's first
    `head` tokens. None where whole rows would be no more scores."""
    sizes: dict[tuple[int, int], list[tuple[list[int], list[int]]]] = defaultdict(list)
    for row, start, end, head in spans:
        own = list(range(row * width + start, row * width + end))
        keys = list(range(row * width, row * width + head)) + own
        if own:
            # lengths within a factor of 1.4 share a tile's size
            sizes[round(2 * math.log2(len(own))), round(2 * math.log2(len(keys)))].append((own, keys))
    back = torch.full((rows * width,), -1, dtype=torch.long)
    groups = []
    above = 0
    for members in sizes.values():
        query, key = (
            torch.full((len(members), max(len(one[i]) for one in members)), -1, dtype=torch.long)
            for i in (0, 1)
        )
        for line, (own, keys) in enumerate(members):
            query[line, : len(own)] = torch.tensor(own)
            key[line, : len(keys)] = torch.tensor(keys)
            back[query[line, : len(own)]] = above + line * query.shape[1] + torch.arange(len(own))
        groups.append((query, key))
        above += query.numel()
    if sum(q.shape[0] * q.shape[1] * k.shape[1] for q, k in groups) >= rows * width**2:
        return None
    return Tiles(tuple(groups), torch.where(back < 0, above, back))


class Tiled(TorchFunctionMode):
    """Calls of `scaled_dot_product_attention` that are over a packed batch's rows, in its tiles. `written_out`: of
    operations that can be differentiated twice and in forward mode; such calls are also made so where there are no tiles.
    """

    def __init__(self, tiles: Tiles | None, written_out: bool) -> None:
        super().__init__()
        self._tiles = tiles
        self._written_out = written_out
        # the masks of the tiles, made once for each mask of the model; the mask itself is kept lest its id be another's
        self._masks: dict[int, tuple[Tensor, list[Tensor]]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return self._attend(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        rest: dict[str, Any] = {"dropout_p": dropout_p, "scale": scale, "enable_gqa": enable_gqa}
        square = query.dim() == 4 and query.shape[2] == key.shape[2]
        known = square and (attn_mask is None) == is_causal and dropout_p == 0
        known = known and (attn_mask is None or (attn_mask.dim() == 4 and attn_mask.shape[1] == 1))
        if not known:
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask=attn_mask, is_causal=is_causal, **rest
            )
        B, H, S, _ = query.shape
        if enable_gqa and self._written_out:
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        if self._tiles is None or attn_mask is None or len(self._tiles.back_BS) != B * S:
            if not self._written_out:
                return F.scaled_dot_product_attention(
                    query, key, value, attn_mask=attn_mask, is_causal=is_causal, **rest
                )
            return attend(query, key, value, _additive(attn_mask, query), scale)
        flat = [x.transpose(1, 2).flatten(0, 1) for x in (query, key, value)]
        outs = []
        for (query_LQ, key_LK), mask in zip(self._tiles.groups, self._of(attn_mask, B, query), strict=True):
            # Padding is zero, and not some token of another task: what is not finite there would get through a finite mask.
            q, k, v = (
                x.index_select(0, at.clamp(min=0).flatten())
                .unflatten(0, at.shape)
                .masked_fill((at < 0).unsqueeze(-1).unsqueeze(-1), 0.0)
                .transpose(1, 2)
                for x, at in zip(flat, (query_LQ, key_LK, key_LK), strict=True)
            )
            if self._written_out:
                out = attend(q, k, v, mask, scale)
            else:
                out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **rest)
            outs.append(out.transpose(1, 2).flatten(0, 1))
        outs.append(outs[0].new_zeros(1, *outs[0].shape[1:]))
        return torch.cat(outs).index_select(0, self._tiles.back_BS).view(B, S, H, -1).transpose(1, 2)

    def _of(self, mask_B1SS: Tensor, B: int, query: Tensor) -> list[Tensor]:
        """The additive mask [L, 1, Q, K] of each group of tiles."""
        known = self._masks.get(id(mask_B1SS))
        if known is None:
            assert self._tiles is not None
            S = mask_B1SS.shape[-1]
            whole = _additive(mask_B1SS, query).expand(B, 1, S, S)
            made = []
            for query_LQ, key_LK in self._tiles.groups:
                row, i = query_LQ.clamp(min=0).unsqueeze(2) // S, query_LQ.clamp(min=0).unsqueeze(2) % S
                mask_LQK = whole[row, 0, i, key_LK.clamp(min=0).unsqueeze(1) % S]
                # a finite least: a query that is padding sees all alike, and nothing is made of it
                least = torch.finfo(whole.dtype).min
                made.append(mask_LQK.masked_fill((key_LK < 0).unsqueeze(1), least).unsqueeze(1))
            known = self._masks[id(mask_B1SS)] = (mask_B1SS, made)
        return known[1]


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None = None) -> Tensor:
    """Attention [..., Q, d] written out, differentiable any number of times and in forward mode.

    `mask` is added to the scores; every query has to see something. Half precision is computed in fp32, as torch's own
    written-out kernel does.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    wide = torch.float32 if query.dtype in (torch.bfloat16, torch.float16) else query.dtype
    q, k, v = (x.to(wide, memory_format=torch.contiguous_format) for x in (query * scale, key, value))
    weight = _Softmax.apply(q @ k.mT, mask.to(wide))
    return (weight @ v).to(query.dtype)


class _Softmax(torch.autograd.Function):
    """softmax(score + mask) over the last axis. Its Jacobian is symmetric, so that tangent and cotangent are made by one
    operation, which torch differentiates; its own forward mode makes the softmax again in half a dozen."""

    generate_vmap_rule = True

    @staticmethod
    def forward(score: Tensor, mask: Tensor) -> Tensor:
        return torch.softmax(score + mask, -1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return torch.ops.aten._softmax_backward_data(grad, weight, -1, weight.dtype), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, mask: None) -> Tensor:
        (weight,) = ctx.saved_tensors
        return torch.ops.aten._softmax_backward_data(tangent, weight, -1, weight.dtype)


def _additive(mask: Tensor | None, query: Tensor) -> Tensor:
    """A mask to add: of a boolean one, or the causal one where there is none."""
    if mask is None:
        S = query.shape[2]
        mask = torch.ones(1, 1, S, S, dtype=torch.bool, device=query.device).tril()
    if mask.dtype != torch.bool:
        return mask
    least = torch.finfo(query.dtype).min
    return torch.zeros((), dtype=query.dtype, device=query.device).masked_fill(~mask, least)
