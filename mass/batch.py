"""Ragged examples of T tasks -> one rectangle of tokens in which little is padding.

A task's sequences are packed, several to a row, so that a batch of unlike lengths costs what its tokens cost. Position
ids restart at each sequence; the model's mask code reads them as the borders, so no sequence sees another. Losses are
computed at target positions only: the logits of a prompt token are never made.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sequence:
    """One training sequence: the first `prompt` tokens are context, the others are to be learned."""

    tokens: list[int]
    prompt: int


@dataclass(frozen=True)
class Packed:
    """T tasks x P rows x S tokens, and where its M target tokens are.

    tokens_TPS, positions_TPS   int64; position restarts at 0 with each sequence and at each pad token
    place_M    int64, index into the T*P*S hidden states whose next token is the target
    label_M    int64, the target token
    owner_M    int64, t * N + n: the example that the target token belongs to
    count_TN   int64, target tokens of each example (0: absent or malformed)
    padding    share of the T*P*S tokens that are padding
    """

    tokens_TPS: Tensor
    positions_TPS: Tensor
    place_M: Tensor
    label_M: Tensor
    owner_M: Tensor
    count_TN: Tensor
    padding: float

    @property
    def tokens_BS(self) -> Tensor:
        return self.tokens_TPS.flatten(0, 1)

    @property
    def positions_BS(self) -> Tensor:
        return self.positions_TPS.flatten(0, 1)

    @property
    def size(self) -> int:
        """Tokens that are not padding."""
        return round(self.tokens_TPS.numel() * (1 - self.padding))

    def sum_by_example(self, value_M: Tensor) -> Tensor:
        """Add up a value per target token over each example: [M] -> [T, N]."""
        zero = torch.zeros(self.count_TN.numel(), dtype=value_M.dtype, device=value_M.device)
        return zero.index_add(0, self.owner_M, value_M).view(self.count_TN.shape)

    def mean_by_example(self, value_M: Tensor) -> Tensor:
        """Mean over each example's target tokens, [T, N]; 0 for an example without any."""
        return self.sum_by_example(value_M) / self.count_TN.clamp(min=1)

    def spread(self, value_TN: Tensor) -> Tensor:
        """The transpose of `mean_by_example`: each target token's share of its example's value, [M]."""
        return (value_TN / self.count_TN.clamp(min=1)).flatten()[self.owner_M]


def pack(
    tasks: Seq[Seq[Sequence | None]], pad: int, device: torch.device | str = "cpu", row: int | None = None
) -> Packed:
    """Pack N sequences (None: absent) of each of T tasks. Every task gets the same number of rows.

    `row` caps the tokens of a row (default: chosen, at most four times the longest sequence, since attention costs grow
    with the square of a row's length). A sequence is never cut: the caller has to keep to the model's context.
    """
    most = max((len(task) for task in tasks), default=0)
    lengths = [[len(s.tokens) for s in task if s is not None] for task in tasks]
    longest = max((n for task in lengths for n in task), default=1)
    width, bins = _choose(lengths, longest, row)
    height = max(1, max((max(b, default=-1) + 1 for b in bins), default=1))
    shape = (len(tasks), height, width)
    tokens = torch.full(shape, pad, dtype=torch.long)
    positions = torch.zeros(shape, dtype=torch.long)
    count = torch.zeros(len(tasks), most, dtype=torch.long)
    place: list[Tensor] = []
    label: list[Tensor] = []
    owner: list[Tensor] = []
    for t, task in enumerate(tasks):
        filled = [0] * height
        present = [(n, s) for n, s in enumerate(task) if s is not None]
        for (n, s), p in zip(present, bins[t], strict=True):
            start, length, first = filled[p], len(s.tokens), max(s.prompt, 1)
            row_tokens = torch.tensor(s.tokens, dtype=torch.long)
            tokens[t, p, start : start + length] = row_tokens
            positions[t, p, start : start + length] = torch.arange(length)
            filled[p] += length
            targets = max(0, length - first)
            place.append((t * height + p) * width + start + first - 1 + torch.arange(targets))
            label.append(row_tokens[first:])
            owner.append(torch.full((targets,), t * most + n))
            count[t, n] = targets

    def join(parts: list[Tensor]) -> Tensor:
        return torch.cat(parts).to(device) if parts else torch.zeros(0, dtype=torch.long, device=device)

    padding = 1 - sum(n for task in lengths for n in task) / (shape[0] * shape[1] * shape[2])
    return Packed(
        tokens.to(device),
        positions.to(device),
        join(place),
        join(label),
        join(owner),
        count.to(device),
        padding,
    )


# A token's linear layers cost about as much as attending to this many keys costs it: rows longer than the longest
# sequence trade padding against attention at this rate.
_KEYS_PER_TOKEN = 4096


def _choose(lengths: list[list[int]], longest: int, row: int | None) -> tuple[int, list[list[int]]]:
    """The row width with the least work, and the row of each task's sequences (first fit, longest first)."""
    total = max((sum(task) for task in lengths), default=1)
    top = max(longest, min(total, row or 4 * longest))
    widths = sorted({longest, top, *(longest + (top - longest) * i // 24 for i in range(25))})
    best: tuple[float, int, list[list[int]]] | None = None
    for width in widths:
        bins = [_first_fit(task, width) for task in lengths]
        height = max((max(b, default=-1) + 1 for b in bins), default=1)
        work = height * width * (_KEYS_PER_TOKEN + width)
        if best is None or work < best[0]:
            best = (work, width, bins)
    assert best is not None
    return best[1], best[2]


def _first_fit(lengths: list[int], width: int) -> list[int]:
    room: list[int] = []
    bins = [0] * len(lengths)
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        for p, free in enumerate(room):
            if lengths[i] <= free:
                break
        else:
            p = len(room)
            room.append(width)
        room[p] -= lengths[i]
        bins[i] = p
    return bins
