"""Pick the next token of every row: greedy, temperature, top-k, top-p, min-p, from numbers drawn by the row itself.

The cuts mean what they mean in `transformers`, in its order (temperature, top-k, top-p, min-p), with one thing said
more exactly: tokens that tie with the last one kept are kept too. No sort and no noise over the vocabulary: one
uniform number a row goes through the inverse of the distribution function, and top-p is a rejection test (a token
belongs to the nucleus when the tokens above it weigh less than top_p), so nearly every row needs one cheap pass.

Top-p: Holtzman et al., arXiv 1904.09751. Min-p: Nguyen et al., arXiv 2407.01082.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mass.errors import MassError

BLOCK = 128
TRIES = 4
# Rows in one pass: their fp32 weights stay in a core's cache.
ROWS_AT_ONCE = 4


@dataclass(frozen=True)
class Cuts:
    """How a token is drawn. temperature 0 is greedy; top_p 1, top_k 0 and min_p 0 cut nothing."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise MassError(f"temperature must be 0 (greedy) or more, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise MassError(f"top_p must be above 0 and at most 1 (1: no cut), not {self.top_p}")
        if self.top_k < 0:
            raise MassError(f"top_k must be 0 (no cut) or more, not {self.top_k}")
        if not 0 <= self.min_p <= 1:
            raise MassError(f"min_p must lie between 0 (no cut) and 1, not {self.min_p}")

    @property
    def uniforms(self) -> int:
        """Uniform numbers that one token may use."""
        if self.temperature == 0:
            return 0
        return 1 if self.top_p == 1 else TRIES + 1


def row_uniforms(seeds: Sequence[int], tokens: int, cuts: Cuts) -> Tensor:
    """Numbers in [0, 1) for each row and token, fp64 [rows, tokens, cuts.uniforms]; a row's depend on its seed only.

    A longer row begins with the numbers of a shorter one. Philox: Salmon et al., SC 2011.
    """
    shape = (tokens, cuts.uniforms)
    drawn = [np.random.Generator(np.random.Philox(seed)).random(shape) for seed in seeds]
    return torch.from_numpy(np.stack(drawn)) if drawn else torch.empty(0, *shape, dtype=torch.float64)


def pick(logits_BV: Tensor, uniform_BU: Tensor, cuts: Cuts) -> tuple[Tensor, Tensor]:
    """One token a row: (tokens int64 [B], log-probs fp32 [B] at temperature 1 without any cut).

    `uniform_BU` holds `cuts.uniforms` numbers a row. A row's token depends on its logits and numbers alone.
    """
    rows = logits_BV.shape[0] if logits_BV.device.type != "cpu" else ROWS_AT_ONCE
    picked = [
        _pick(logits, uniform, cuts)
        for logits, uniform in zip(logits_BV.split(rows), uniform_BU.split(rows), strict=True)
    ]
    return torch.cat([tokens for tokens, _ in picked]), torch.cat([logprobs for _, logprobs in picked])


def _pick(logits_BV: Tensor, uniform_BU: Tensor, cuts: Cuts) -> tuple[Tensor, Tensor]:
    score_BV = logits_BV.float()
    peak_B1, best_B1 = score_BV.max(-1, keepdim=True)
    score_BV = score_BV - peak_B1
    weight_BV = score_BV.exp()
    log_total_B1 = weight_BV.sum(-1, keepdim=True).log_()
    token_B1 = best_B1 if cuts.temperature == 0 else _draw_cut(score_BV, weight_BV, uniform_BU, cuts)
    logprob_B1 = score_BV.gather(1, token_B1) - log_total_B1
    return token_B1.squeeze(1), logprob_B1.squeeze(1)


def _draw_cut(score_BV: Tensor, weight_BV: Tensor, uniform_BU: Tensor, cuts: Cuts) -> Tensor:
    """Tokens [B, 1] from scores whose largest is 0 and their exponentials; may overwrite the latter."""
    if cuts.temperature != 1:
        torch.div(score_BV, cuts.temperature, out=weight_BV).exp_()
    if 0 < cuts.top_k < score_BV.shape[1]:
        last_B1 = score_BV.topk(cuts.top_k, dim=-1).values[:, -1:]
        weight_BV.masked_fill_(score_BV < last_B1, 0)
    # the nucleus is a share of what top-k left, before min-p
    bound_B1 = cuts.top_p * weight_BV.sum(-1, keepdim=True)
    if cuts.min_p > 0:
        # the largest weight is 1
        weight_BV.masked_fill_(weight_BV < cuts.min_p, 0)
    token_B1 = _draw(weight_BV, uniform_BU[:, :1])
    if cuts.top_p == 1:
        return token_B1
    rows = _outside(score_BV, weight_BV, bound_B1, token_B1)
    for attempt in range(1, TRIES):
        if not len(rows):
            return token_B1
        score_BV, weight_BV, bound_B1 = score_BV[rows], weight_BV[rows], bound_B1[rows]
        uniform_BU = uniform_BU[rows]
        # `where` maps the rows left to rows of the answer
        where = rows if attempt == 1 else where[rows]
        again_B1 = _draw(weight_BV, uniform_BU[:, attempt : attempt + 1])
        token_B1[where] = again_B1
        rows = _outside(score_BV, weight_BV, bound_B1, again_B1)
    if len(rows):
        weight_BV = _nucleus(score_BV[rows], weight_BV[rows], bound_B1[rows])
        token_B1[where[rows]] = _draw(weight_BV, uniform_BU[rows, TRIES:])
    return token_B1


def _outside(score_BV: Tensor, weight_BV: Tensor, bound_B1: Tensor, token_B1: Tensor) -> Tensor:
    """Rows whose token is outside the nucleus: the tokens above it weigh `bound_B1` or more."""
    above = score_BV > score_BV.gather(1, token_B1)
    return ((weight_BV * above).sum(-1, keepdim=True) >= bound_B1).squeeze(1).nonzero().squeeze(1)


def _nucleus(score_BV: Tensor, weight_BV: Tensor, bound_B1: Tensor) -> Tensor:
    """The weights with everything outside the nucleus at 0, by a full sort."""
    order_BV = score_BV.sort(dim=-1, descending=True)
    sorted_BV = weight_BV.gather(1, order_BV.indices)
    inside_BV = sorted_BV.double().cumsum(-1) - sorted_BV < bound_B1
    last_B1 = order_BV.values.gather(1, inside_BV.sum(-1, keepdim=True) - 1)
    return weight_BV.masked_fill(score_BV < last_B1, 0)


def _draw(weight_BV: Tensor, uniform_B1: Tensor) -> Tensor:
    """Token [B, 1] with probability weight / sum of the row's weights: first the block of 128 tokens, then the token."""
    short = -weight_BV.shape[1] % BLOCK
    if short:
        weight_BV = torch.nn.functional.pad(weight_BV, (0, short))
    block_BCK = weight_BV.unflatten(1, (-1, BLOCK))
    total_BC = block_BCK.sum(-1).double()
    block_B1, rest_B1 = _invert(total_BC, uniform_B1)
    inner_BK = block_BCK.take_along_dim(block_B1.unsqueeze(2), 1).squeeze(1).double()
    inner_B1, _ = _invert(inner_BK, rest_B1)
    return block_B1 * BLOCK + inner_B1


def _invert(weight_BC: Tensor, uniform_B1: Tensor) -> tuple[Tensor, Tensor]:
    """(index [B, 1] of the first entry whose running sum exceeds uniform * total, the uniform number left within it)."""
    sum_BC = weight_BC.cumsum(-1)
    # below 1 by more than the rounding of the product, or the search could run past the last entry
    target_B1 = uniform_B1.clamp(max=1 - 2.0**-48) * sum_BC[:, -1:]
    index_B1 = torch.searchsorted(sum_BC, target_B1, right=True)
    weight_B1 = weight_BC.gather(1, index_B1)
    before_B1 = sum_BC.gather(1, index_B1) - weight_B1
    return index_B1, ((target_B1 - before_B1) / weight_B1).clamp(0, 1)
