"""Ragged examples of T tasks -> one rectangle of tokens in which little is padding.

A task's sequences are packed, several to a row, so that a batch of unlike lengths costs what its tokens cost. Position
ids restart at each sequence; the model's mask code reads them as the borders, so no sequence sees another. Where asked,
a prefix that a task's sequences have in common (a prompt with N samples, the same few-shot examples) stands once in a
row and every one of them attends to it, by an explicit mask. Losses are computed at target positions only: the logits of
a prompt token are never made.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mass import attention
from mass.attention import Tiles


@dataclass(frozen=True)
class Sequence:
    """One training sequence: the first `prompt` tokens are context, the others are to be learned, except those at the
    positions `skip` (what stands between several solutions)."""

    tokens: list[int]
    prompt: int
    skip: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Packed:
    """T tasks x P rows x S tokens, and where its M target tokens are.

    tokens_TPS, positions_TPS   int64; position restarts at 0 with each sequence and at each pad token
    place_M    int64, index into the T*P*S hidden states: the one that predicts the target token
    own_M      int64, the same for the target token's own hidden state
    label_M    int64, the target token
    owner_M    int64, t * N + n: the example that the target token belongs to
    count_TN   int64, target tokens of each example (0: absent or malformed)
    length_TN  int64 on the CPU, tokens of each example's whole sequence (0: absent)
    padding    share of the T*P*S tokens that are padding
    mask_B1SS  bool, True where a query (third axis) may look at a key; None: the position ids say it all
    tiles      where its sequences lie, for attention that leaves out the rest of their rows; None: nothing to leave out
    """

    tokens_TPS: Tensor
    positions_TPS: Tensor
    place_M: Tensor
    own_M: Tensor
    label_M: Tensor
    owner_M: Tensor
    count_TN: Tensor
    length_TN: Tensor
    padding: float
    mask_B1SS: Tensor | None = None
    tiles: Tiles | None = None

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

    def only(self, keep_M: Tensor) -> "Packed":
        """The same sequences with the target tokens `keep_M` (bool) alone."""
        owner_M = self.owner_M[keep_M]
        count_TN = torch.bincount(owner_M, minlength=self.count_TN.numel()).view(self.count_TN.shape)
        return replace(
            self,
            place_M=self.place_M[keep_M],
            own_M=self.own_M[keep_M],
            label_M=self.label_M[keep_M],
            owner_M=owner_M,
            count_TN=count_TN,
        )

    def spread(self, value_TN: Tensor) -> Tensor:
        """The transpose of `mean_by_example`: each target token's share of its example's value, [M]."""
        return (value_TN / self.count_TN.clamp(min=1)).flatten()[self.owner_M]


def pack(
    tasks: Seq[Seq[Sequence | None]],
    pad: int,
    device: torch.device | str = "cpu",
    row: int | None = None,
    share: bool = False,
) -> Packed:
    """Pack N sequences (None: absent) of each of T tasks. Every task gets the same number of rows.

    `row` caps the tokens of a row (default: chosen, at most eight times the longest sequence, since attention costs grow
    with the square of a row's length). A sequence is never cut: the caller has to keep to the model's context.
    `share` puts the common prefix of a task's sequences once into a row. For models whose layers all attend to the
    whole context: the mask knows no sliding window (`blocks.attends_fully`).
    """
    most = max((len(task) for task in tasks), default=0)
    present = [[(n, s) for n, s in enumerate(task) if s is not None] for task in tasks]
    prefix = [_common([s for _, s in task]) if share else 0 for task in present]
    lengths = [[len(s.tokens) - p for _, s in task] for task, p in zip(present, prefix, strict=True)]
    longest = max((n + p for task, p in zip(lengths, prefix, strict=True) for n in task), default=1)
    width, bins = _choose(lengths, prefix, longest, row)
    height = max(1, max((max(b, default=-1) + 1 for b in bins), default=1))
    shape = (len(tasks), height, width)
    tokens = torch.full(shape, pad, dtype=torch.long)
    positions = torch.zeros(shape, dtype=torch.long)
    # 0: padding; -1: a shared prefix; 1, 2, ...: a sequence of its row
    segment = torch.zeros(shape, dtype=torch.long)
    count = torch.zeros(len(tasks), most, dtype=torch.long)
    whole = torch.zeros(len(tasks), most, dtype=torch.long)
    columns: list[list[Tensor]] = [[], [], [], []]
    spans: list[tuple[int, int, int, int]] = []
    filled_tokens = 0
    for t, task in enumerate(present):
        filled = [0] * height
        for (n, s), p in zip(task, bins[t], strict=True):
            head, length, first = prefix[t], len(s.tokens), max(s.prompt, 1)
            row_tokens = torch.tensor(s.tokens, dtype=torch.long)
            if filled[p] == 0 and head:
                tokens[t, p, :head] = row_tokens[:head]
                positions[t, p, :head] = torch.arange(head)
                segment[t, p, :head] = -1
                spans.append((t * height + p, 0, head, 0))
                filled[p] = head
            start = filled[p]
            end = start + length - head
            tokens[t, p, start:end] = row_tokens[head:]
            positions[t, p, start:end] = torch.arange(head, length)
            segment[t, p, start:end] = n + 1
            spans.append((t * height + p, start, end, head))
            filled[p] = end
            # Where token j of the sequence lies in the T*P*S hidden states.
            at = torch.cat([torch.arange(head), torch.arange(start, end)]) + (t * height + p) * width
            target = torch.tensor([j for j in range(first, length) if j not in s.skip], dtype=torch.long)
            owner = torch.full((len(target),), t * most + n)
            for column, part in zip(
                columns, (at[target - 1], at[target], row_tokens[target], owner), strict=True
            ):
                column.append(part)
            count[t, n], whole[t, n] = len(target), length
        filled_tokens += sum(filled)
    place, own, label, owners = (
        torch.cat(c).to(device) if c else count.new_zeros(0).to(device) for c in columns
    )
    mask = _mask(segment.flatten(0, 1)).to(device) if any(prefix) else None
    cut = attention.tiles(spans, len(tasks) * height, width)
    padding = 1 - filled_tokens / max(1, tokens.numel())
    return Packed(
        tokens.to(device),
        positions.to(device),
        place,
        own,
        label,
        owners,
        count.to(device),
        whole,
        padding,
        mask,
        cut and cut.map(lambda x: x.to(device)),
    )


# A shared prefix shorter than this is not worth an explicit mask.
_SHORT = 16


def _common(sequences: Seq[Sequence]) -> int:
    """How many prompt tokens all sequences of a task begin with; 0 when there is nothing to share."""
    if len(sequences) < 2:
        return 0
    most = min(min(s.prompt, len(s.tokens)) for s in sequences)
    first = sequences[0].tokens
    for i in range(most):
        if any(s.tokens[i] != first[i] for s in sequences):
            most = i
            break
    return most if most >= _SHORT else 0


def _mask(segment_BS: Tensor) -> Tensor:
    """Causal, inside a sequence and from a sequence to its row's shared prefix; a pad token sees itself. [B, 1, S, S]."""
    query, key = segment_BS.unsqueeze(2), segment_BS.unsqueeze(1)
    causal = torch.ones(segment_BS.shape[1], segment_BS.shape[1], dtype=torch.bool).tril()
    diagonal = torch.eye(segment_BS.shape[1], dtype=torch.bool)
    seen = ((query == key) | ((key == -1) & (query > 0))) & causal & (query != 0)
    return (seen | diagonal).unsqueeze(1)


# A token's linear layers cost about as much as attending to this many keys costs it: rows longer than the longest
# sequence trade padding against attention at this rate.
_KEYS_PER_TOKEN = 4096


def _choose(
    lengths: list[list[int]], prefix: list[int], longest: int, row: int | None
) -> tuple[int, list[list[int]]]:
    """The row width with the least work, and the row of each task's sequences (first fit, longest first)."""
    total = max((sum(task) + p for task, p in zip(lengths, prefix, strict=True)), default=1)
    top = max(longest, min(total, row or 8 * longest))
    widths = sorted({longest, top, *(longest + (top - longest) * i // 24 for i in range(25))})
    best: tuple[float, int, list[list[int]]] | None = None
    for width in widths:
        bins = [_first_fit(task, width - p) for task, p in zip(lengths, prefix, strict=True)]
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
        fits = [p for p, free in enumerate(room) if lengths[i] <= free]
        if not fits:
            room.append(width)
        bins[i] = fits[0] if fits else len(room) - 1
        room[bins[i]] -= lengths[i]
    return bins
