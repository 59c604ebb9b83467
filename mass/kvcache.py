"""Keys and values for decoding many rows at once, and the attention that reads them.

A row's past has two parts. A prompt that several rows share is their prefix, stored once: their queries meet
it in one matrix product (as in Hydragen: Juravsky et al., arXiv 2402.05099). What is the row's alone is in
buffers whose columns are steps: all rows write column `end`, and the columns before a row's first are masked.
Buffers grow in chunks and are always read whole, because products over a slice of a buffer are several times
slower on a CPU than those over all of it.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from mass.errors import MassError

CHUNK = 32
ATTENTION = "mass_rows"


class RowLayer(CacheLayerMixin):
    """One layer: `keys`, `values` [row slots, heads, columns, width], `prefix` two [groups, heads, tokens, width]."""

    is_sliding = False

    def __init__(self, cache: "RowCache") -> None:
        super().__init__()
        self.cache = cache
        self.keys: Tensor = torch.empty(0)
        self.values: Tensor = torch.empty(0)
        self.prefix: tuple[Tensor, Tensor] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        # zeros: masked columns are multiplied by 0, which memory as found (NaN) would survive
        slots, columns = self.cache.slots, self.cache.capacity
        self.keys = key_states.new_zeros(slots, key_states.shape[1], columns, key_states.shape[3])
        self.values = value_states.new_zeros(slots, value_states.shape[1], columns, value_states.shape[3])
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write column `end` of every row; the buffers of the rows in use, whole."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows, end, column_1 = self.cache.rows, self.cache.end, self.cache.column_1
        keys, values = self.keys[:rows], self.values[:rows]
        if column_1 is None:
            keys[:, :, end : end + 1] = key_states
            values[:, :, end : end + 1] = value_states
        else:
            keys.index_copy_(2, column_1, key_states)
            values.index_copy_(2, column_1, value_states)
        self.cache.current = self
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.capacity, 0

    def get_seq_length(self) -> int:
        return self.cache.end

    def get_max_length(self) -> int:
        return -1


class RowCache(Cache):
    """The rows being decoded, [0, rows). One step: `reserve()`, a forward of one token a row, `advance()`.

    For each row `lengths` holds the tokens of its prefix (0: it has none), `groups` whose prefix it reads,
    `starts` its first column. `shape` counts the changes of the tensors that a step works on. `fixed`: between two of them
    the numbers of a step are in tensors that keep their place, so that a recorded step can be replayed.
    """

    def __init__(self, layers: int, slots: int, device: torch.device | str, fixed: bool = False) -> None:
        self.row_layers = [RowLayer(self) for _ in range(layers)]
        super().__init__(layers=list(self.row_layers))
        self.slots, self.device = slots, torch.device(device)
        self.rows, self.end, self.capacity, self.group_count, self.prefix_tokens = 0, 0, CHUNK, 0, 0
        self.lengths: list[int] = []
        self.groups: list[int] = []
        self.starts: list[int] = []
        self.current: RowLayer | None = None
        self.shape, self._shape_before = 0, -1
        # where a fixed cache writes: `end` as int64 [1]
        self.column_1 = torch.zeros(1, dtype=torch.long, device=self.device) if fixed else None
        self._bias: dict[int | None, Tensor] = {}
        self._table: RowTable | None = None

    def positions(self) -> Tensor:
        """Position of the next token of every row, int64 [rows]."""
        return self._ints(n + self.end - start for n, start in zip(self.lengths, self.starts, strict=True))

    def reserve(self) -> None:
        """Make room for the next column; columns that no row uses any more are given up first."""
        if self.end >= self.capacity:
            self._move(min(self.starts), 0)
        if self.column_1 is None or self.shape != self._shape_before:
            self._bias, self._shape_before = {}, self.shape
        else:
            for window, bias in self._bias.items():
                bias.copy_(self._make_bias(window))
        if self.column_1 is not None:
            self.column_1.fill_(self.end)

    def _move(self, begin: int, to: int) -> None:
        """Columns from `begin` on are now `to` and following, in buffers with room for one more."""
        count = self.end - begin
        self.capacity = (to + count) // CHUNK * CHUNK + CHUNK
        for layer in self.row_layers:
            if layer.is_initialized:
                keys, values = layer.keys, layer.values
                layer.lazy_initialization(keys, values)
                layer.keys[: self.rows, :, to : to + count] = keys[: self.rows, :, begin : self.end]
                layer.values[: self.rows, :, to : to + count] = values[: self.rows, :, begin : self.end]
        self.starts = [start - begin + to for start in self.starts]
        self.end = to + count
        self.shape += 1

    def advance(self) -> None:
        """The forward has written column `end` of every row."""
        self.end += 1

    def add(
        self, prompts: list[tuple[Tensor, Tensor]], source: Sequence[int], lengths: Sequence[int]
    ) -> None:
        """New rows: row i reads the first lengths[i] tokens of prompt source[i].

        `prompts` holds each layer's keys and values [prompts, heads, tokens, width], padded on the right, and is
        emptied meanwhile; it is empty where every length is 0. If no two rows share a prompt, each goes into its
        row's columns: two products a layer instead of four.
        """
        if not self.rows:
            self._drop_all()
        first, self.rows = self.rows, self.rows + len(lengths)
        for layer in self.row_layers:
            if layer.is_initialized:
                # rows that have left these places: theirs is masked, and a NaN of theirs would survive that
                layer.keys[first : self.rows] = 0
                layer.values[first : self.rows] = 0
        if prompts and len(set(source)) < len(source):
            self.groups += [self.group_count + prompt for prompt in source]
            self.lengths += lengths
            self.starts += [self.end] * len(lengths)
            self._add_prefixes(prompts)
        else:
            self._add_columns(first, prompts, source, lengths)
        self._table = None
        self.shape += 1

    def _add_prefixes(self, prompts: list[tuple[Tensor, Tensor]]) -> None:
        added, _, tokens, _ = prompts[0][0].shape
        longest = max(tokens, self.prefix_tokens)
        for layer in self.row_layers:
            keys, values = prompts.pop(0)
            pair = (_pad(keys, longest), _pad(values, longest))
            if layer.prefix is not None:
                old = (_pad(layer.prefix[0], longest), _pad(layer.prefix[1], longest))
                pair = (torch.cat([old[0], pair[0]]), torch.cat([old[1], pair[1]]))
            layer.prefix = pair
        self.group_count, self.prefix_tokens = self.group_count + added, longest

    def _add_columns(
        self,
        first: int,
        prompts: list[tuple[Tensor, Tensor]],
        source: Sequence[int],
        lengths: Sequence[int],
    ) -> None:
        """Rows from `first` on, their prompts in the columns before `end`."""
        if max(lengths) > self.end:
            # the others' columns move to the right
            self._move(0, max(lengths) - self.end)
        self.groups += [0] * len(lengths)
        self.lengths += [0] * len(lengths)
        self.starts += [self.end - length for length in lengths]
        for layer in self.row_layers if prompts else []:
            keys, values = prompts.pop(0)
            if not layer.is_initialized:
                layer.lazy_initialization(keys, values)
            for row, (prompt, length) in enumerate(zip(source, lengths, strict=True), first):
                columns = slice(self.end - length, self.end)
                layer.keys[row, :, columns] = keys[prompt, :, :length]
                layer.values[row, :, columns] = values[prompt, :, :length]

    def keep(self, kept: Sequence[int]) -> list[int]:
        """Drop all rows but these. The last ones fill the gaps; returns which old row each row now is."""
        order = sorted(kept)
        holes = sorted(set(range(len(order))) - set(order))
        moved = order[len(order) - len(holes) :]
        if holes:
            for layer in self.row_layers:
                layer.keys[holes] = layer.keys[moved]
                layer.values[holes] = layer.values[moved]
        sources = list(range(len(order)))
        for hole, row in zip(holes, moved, strict=True):
            sources[hole] = row
        self.starts = [self.starts[row] for row in sources]
        self.lengths = [self.lengths[row] for row in sources]
        self.groups = [self.groups[row] for row in sources]
        self.rows = len(sources)
        self._table = None
        self.shape += 1
        used = sorted({group for group, length in zip(self.groups, self.lengths, strict=True) if length})
        if self.group_count and 2 * len(used) <= self.group_count:
            self._keep_groups(used)
        return sources

    def _keep_groups(self, used: Sequence[int]) -> None:
        """Give up the prefixes that no row reads any more."""
        longest = max(self.lengths, default=0)
        index = self._ints(used)
        for layer in self.row_layers:
            if layer.prefix is not None:
                keys, values = (tensor[:, :, :longest].index_select(0, index) for tensor in layer.prefix)
                layer.prefix = (keys, values) if longest else None
        place = {group: i for i, group in enumerate(used)}
        self.groups = [place.get(group, 0) for group in self.groups]
        self.group_count, self.prefix_tokens = len(used) if longest else 0, longest

    def _drop_all(self) -> None:
        self.end = self.group_count = self.prefix_tokens = 0
        for layer in self.row_layers:
            layer.prefix = None

    def table(self) -> "RowTable":
        """How the rows lie in their groups; the same until rows come or go."""
        if self._table is None:
            self._table = RowTable(self.groups, self.group_count, self.device, self.lengths)
        return self._table

    def bias(self, window: int | None) -> Tensor:
        """0 where a row's next token may look, else -inf: fp32 [rows, 1, 1, prefix tokens + columns]."""
        if window not in self._bias:
            self._bias[window] = self._make_bias(window)
        return self._bias[window]

    def _make_bias(self, window: int | None) -> Tensor:
        length_B1, start_B1 = self._ints(self.lengths).unsqueeze(1), self._ints(self.starts).unsqueeze(1)
        token_P = torch.arange(self.prefix_tokens, device=self.device)
        column_C = torch.arange(self.capacity, device=self.device)
        seen_BP = token_P < length_B1
        seen_BC = (column_C >= start_B1) & (column_C <= self.end)
        if window is not None:
            oldest_B1 = length_B1 + self.end - start_B1 - window + 1
            seen_BP &= token_P >= oldest_B1
            seen_BC &= column_C - start_B1 + length_B1 >= oldest_B1
        seen = torch.cat([seen_BP, seen_BC], 1)[:, None, None]
        return torch.zeros(seen.shape, device=self.device).masked_fill_(~seen, -torch.inf)

    def _ints(self, numbers: Any) -> Tensor:
        return torch.tensor(list(numbers), dtype=torch.long, device=self.device)


def _pad(tensor: Tensor, tokens: int) -> Tensor:
    return F.pad(tensor, (0, 0, 0, tokens - tensor.shape[2])).contiguous()


class RowTable:
    """Rows [B, ...] as a rectangle of groups by members [T * N, ...] and back; short groups repeat a row.

    `bare`: bool [B, 1, 1, 1], the rows whose prefix is empty (`lengths`). They stand in some group and may not see its
    prefix, not even times 0, which a NaN survives. None where there are none.
    """

    def __init__(
        self, groups: Sequence[int], count: int, device: torch.device, lengths: Sequence[int] = ()
    ) -> None:
        self.bare = (
            None
            if all(lengths)
            else torch.tensor([n == 0 for n in lengths], device=device)[:, None, None, None]
        )
        members: list[list[int]] = [[] for _ in range(count)]
        for row, group in enumerate(groups):
            members[group].append(row)
        self.count, self.width = count, max(map(len, members), default=0)
        flat = [row for rows in members for row in (rows + [0] * self.width)[: self.width]]
        self.regular = flat == list(range(len(groups)))
        if not self.regular:
            place = {row: i * self.width + j for i, rows in enumerate(members) for j, row in enumerate(rows)}
            self.index = torch.tensor(flat, device=device)
            self.back = torch.tensor([place[row] for row in range(len(groups))], device=device)

    def group(self, tensor: Tensor) -> Tensor:
        """[B, ...] -> [T, N, ...]."""
        return (tensor if self.regular else tensor[self.index]).unflatten(0, (self.count, self.width))

    def ungroup(self, tensor: Tensor) -> Tensor:
        """[T, N, ...] -> [B, ...]."""
        return tensor.flatten(0, 1) if self.regular else tensor.flatten(0, 1)[self.back]


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one new token a row over its prefix and its own columns, as `transformers` calls it.

    query [B, heads, 1, width]; key and value are what `RowLayer.update` returned. Returns [B, 1, heads,
    width].
    """
    cache = _cache
    layer = cache.current if cache is not None else None
    odd = [name for name in ("s_aux", "position_bias") if kwargs.get(name) is not None]
    if cache is None or layer is None or key.data_ptr() != layer.keys.data_ptr() or odd:
        why = f"it uses {', '.join(odd)}" if odd else "it changes keys after it has stored them"
        raise MassError(f"generation does not know the attention of {type(module).__name__}: {why}")
    rows, heads, columns, width = key.shape
    share = query.shape[1] // heads
    scaling = width**-0.5 if scaling is None else scaling
    query_BHGD = query.reshape(rows, heads, share, width)
    score = torch.bmm(query_BHGD.flatten(0, 1), key.flatten(0, 1).mT).unflatten(0, (rows, heads))
    if layer.prefix is not None:
        table = cache.table()
        score = torch.cat([_over_prefix(table, query_BHGD, layer.prefix[0].mT), score], -1)
    score = score.float().mul_(scaling)
    if softcap is not None:
        score = torch.tanh(score / softcap) * softcap
    share_BHGX = torch.softmax(score.add_(cache.bias(sliding_window)), -1).to(value.dtype)
    own_BHGC = share_BHGX[..., -columns:]
    out = torch.bmm(own_BHGC.reshape(-1, share, columns), value.flatten(0, 1)).unflatten(0, (rows, heads))
    if layer.prefix is not None:
        out = out + _over_prefix(table, share_BHGX[..., :-columns], layer.prefix[1])
    return out.reshape(rows, 1, heads * share, -1), None


def _over_prefix(table: RowTable, left_BHGX: Tensor, right_THXY: Tensor) -> Tensor:
    """Every row's left matrix times its group's right one, as one product a group: [B, H, G, Y]."""
    grouped = table.group(left_BHGX).transpose(1, 2)
    tasks, heads, members, share, _ = grouped.shape
    out = torch.bmm(grouped.reshape(tasks * heads, members * share, -1), right_THXY.flatten(0, 1))
    out_BHGY = table.ungroup(out.view(tasks, heads, members, share, -1).transpose(1, 2))
    return out_BHGY if table.bare is None else out_BHGY.masked_fill(table.bare, 0)


AttentionInterface.register(ATTENTION, attend)
_cache: RowCache | None = None


@contextlib.contextmanager
def attention_over(hf: PreTrainedModel, cache: RowCache) -> Iterator[None]:
    """Within the context the model's attention is `attend` over this cache; it builds no masks then."""
    global _cache
    config = hf.config.get_text_config()
    before = (config._attn_implementation, _cache)
    try:
        config._attn_implementation, _cache = ATTENTION, cache
        yield
    finally:
        config._attn_implementation, _cache = before
