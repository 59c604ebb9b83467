"""Pick the next token of every row: greedy, temperature, top-k, top-p, min-p, from numbers drawn by the row.

The cuts mean what they mean in `transformers`, in its order (temperature, top-k, top-p, min-p), with one
thing said more exactly: tokens that tie with the last one kept are kept too. No sort and no noise over the
vocabulary: one uniform number a row goes through the inverse of the distribution function, and top-p is a
rejection test (a token belongs to the nucleus when the tokens above it weigh less than top_p), so a row
rarely needs a second pass.

Top-p: Holtzman et al., arXiv 1904.09751. Min-p: Nguyen et al., arXiv 2407.01082.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mass.errors import MassError

BLOCK = 128
TRIES = 4
# Logits in one pass on a CPU: their fp32 weights stay in a core's cache.
LOGITS_AT_ONCE = 2**18


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
    """Numbers in [0, 1), fp64 [rows, tokens, cuts.uniforms]; a row's depend on its seed only.

    A longer row begins with the numbers of a shorter one. Philox: Salmon et al., SC 2011.
    """
    shape = (tokens, cuts.uniforms)
    drawn = [np.random.Generator(np.random.Philox(seed)).random(shape) for seed in seeds]
    return torch.from_numpy(np.stack(drawn)) if drawn else torch.empty(0, *shape, dtype=torch.float64)


def pick(logits_BV: Tensor, uniform_BU: Tensor, cuts: Cuts) -> tuple[Tensor, Tensor]:
    """One token a row: (tokens int64 [B], log-probs fp32 [B] at temperature 1 without any cut).

    `uniform_BU` holds `cuts.uniforms` numbers a row. A row's token depends on its logits and numbers alone. Where the
    logits are no numbers (a model that has broken down) the token is 0 and its log-prob NaN.
    """
    rows = max(LOGITS_AT_ONCE // logits_BV.shape[1], 1) if logits_BV.device.type == "cpu" else len(logits_BV)
    parts = zip(logits_BV.split(rows), uniform_BU.split(rows), strict=True)
    picked = [_pick(logits, uniform, cuts) for logits, uniform in parts]
    return torch.cat([tokens for tokens, _ in picked]), torch.cat([logprobs for _, logprobs in picked])


def _pick(logits_BV: Tensor, uniform_BU: Tensor, cuts: Cuts) -> tuple[Tensor, Tensor]:
    short = -logits_BV.shape[1] % BLOCK
    if short:
        logits_BV = F.pad(logits_BV, (0, short), value=-torch.inf)
    score_BV = logits_BV.float()
    best_BC = score_BV.unflatten(1, (-1, BLOCK)).amax(-1)
    peak_B1 = best_BC.amax(-1, keepdim=True)
    broken_B1 = ~peak_B1.isfinite()
    if broken_B1.any():
        first_V = torch.full_like(score_BV[0], -torch.inf)
        first_V[0] = 0
        score_BV, peak_B1 = torch.where(broken_B1, first_V, score_BV), peak_B1.masked_fill(broken_B1, 0)
        best_BC = score_BV.unflatten(1, (-1, BLOCK)).amax(-1)
    score_BV = score_BV - peak_B1
    weight_BV = score_BV.exp()
    total_BC = _block_sums(weight_BV)
    log_total_B1 = total_BC.sum(-1, keepdim=True).log()
    if cuts.temperature == 0:
        # in two steps, each at the speed of memory: argmax over a whole row is not
        block_B1 = best_BC.argmax(-1, keepdim=True)
        inner_BK = score_BV.unflatten(1, (-1, BLOCK)).take_along_dim(block_B1.unsqueeze(2), 1).squeeze(1)
        token_B1 = block_B1 * BLOCK + inner_BK.argmax(-1, keepdim=True)
    elif cuts == Cuts():
        token_B1 = _draw(weight_BV, total_BC, uniform_BU)
    else:
        token_B1 = _draw_cut(score_BV, weight_BV, uniform_BU, cuts)
    logprob_B1 = (score_BV.gather(1, token_B1) - log_total_B1).masked_fill(broken_B1, torch.nan)
    return token_B1.squeeze(1), logprob_B1.squeeze(1).float()


def _draw_cut(score_BV: Tensor, weight_BV: Tensor, uniform_BU: Tensor, cuts: Cuts) -> Tensor:
    """Tokens [B, 1] from scores whose largest is 0 and their exponentials; overwrites the latter."""
    if cuts.temperature != 1:
        torch.div(score_BV, cuts.temperature, out=weight_BV).exp_()
    if 0 < cuts.top_k < score_BV.shape[1]:
        last_B1 = score_BV.topk(cuts.top_k, dim=-1).values[:, -1:]
        weight_BV.masked_fill_(score_BV < last_B1, 0)
    total_BC = _block_sums(weight_BV)
    # the nucleus is a share of what top-k left, before min-p
    bound_B1 = cuts.top_p * total_BC.sum(-1, keepdim=True)
    if cuts.min_p > 0:
        # the largest weight is 1
        weight_BV.masked_fill_(weight_BV < cuts.min_p, 0)
        total_BC = _block_sums(weight_BV)
    token_B1 = _draw(weight_BV, total_BC, uniform_BU[:, :1])
    if cuts.top_p == 1:
        return token_B1
    left = torch.arange(len(token_B1), device=token_B1.device)
    for attempt in range(1, TRIES + 1):
        outside = _outside(score_BV, weight_BV, bound_B1, token_B1[left])
        if not len(outside):
            return token_B1
        left, score_BV, weight_BV = left[outside], score_BV[outside], weight_BV[outside]
        bound_B1, uniform_BU = bound_B1[outside], uniform_BU[outside]
        if attempt == TRIES:
            weight_BV = _nucleus(score_BV, weight_BV, bound_B1)
        token_B1[left] = _draw(weight_BV, _block_sums(weight_BV), uniform_BU[:, attempt : attempt + 1])
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


def _block_sums(weight_BV: Tensor) -> Tensor:
    """The weights of each block of tokens, fp64 [B, blocks]."""
    return weight_BV.unflatten(1, (-1, BLOCK)).sum(-1).double()


def _draw(weight_BV: Tensor, total_BC: Tensor, uniform_B1: Tensor) -> Tensor:
    """Token [B, 1] with probability weight / sum of the row's: first its block, then the token in it."""
    block_B1, rest_B1 = _invert(total_BC, uniform_B1)
    inner_BK = weight_BV.unflatten(1, (-1, BLOCK)).take_along_dim(block_B1.unsqueeze(2), 1).squeeze(1)
    inner_B1, _ = _invert(inner_BK.double(), rest_B1)
    return block_B1 * BLOCK + inner_B1


def _invert(weight_BC: Tensor, uniform_B1: Tensor) -> tuple[Tensor, Tensor]:
    """First entry [B, 1] whose running sum exceeds uniform * total, and the uniform number left within it."""
    sum_BC = weight_BC.cumsum(-1)
    # below 1 by more than the rounding of the product, or the search could run past the last entry
    target_B1 = uniform_B1.clamp(max=1 - 2.0**-48) * sum_BC[:, -1:]
    index_B1 = torch.searchsorted(sum_BC, target_B1, right=True)
    weight_B1 = weight_BC.gather(1, index_B1)
    before_B1 = sum_BC.gather(1, index_B1) - weight_B1
    return index_B1, ((target_B1 - before_B1) / weight_B1).clamp(0, 1)
