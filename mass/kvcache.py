"""The keys and values of rows of unlike length, in buffers that grow in chunks and lose the rows that have ended.

Rows stand side by side and end in the same column: a row of n tokens fills columns [end - n, end). What lies before is
masked. Distances between columns are distances between positions, so sliding windows hold as they are.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

CHUNK = 64


class RowLayer(CacheLayerMixin):
    """One layer's buffers [row slots, heads, columns, head width]; the `RowCache` keeps the row and column counts."""

    is_sliding = False

    def __init__(self, cache: "RowCache") -> None:
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        # zeros: masked columns are multiplied by 0, which memory as found (NaN) would survive
        slots, columns = self.cache.slots, self.cache.capacity
        self.keys = key_states.new_zeros(slots, key_states.shape[1], columns, key_states.shape[3])
        self.values = value_states.new_zeros(slots, value_states.shape[1], columns, value_states.shape[3])
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write the new column of every row; the buffers' live part, as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows, begin, end = self.cache.rows, self.cache.begin, self.cache.end
        self.keys[:rows, :, end : end + 1] = key_states
        self.values[:rows, :, end : end + 1] = value_states
        return self.keys[:rows, :, begin : end + 1], self.values[:rows, :, begin : end + 1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.end - self.cache.begin + query_length, 0

    def get_seq_length(self) -> int:
        return self.cache.end - self.cache.begin

    def get_max_length(self) -> int:
        return -1


class RowCache(Cache):
    """A `transformers` cache for one new token a row. Columns [begin, end) are in use, by rows [0, rows).

    `starts[row]` is the row's first column. A step is: `reserve()`, one forward, `advance()`.
    """

    def __init__(self, layers: int, slots: int) -> None:
        super().__init__(layers=[RowLayer(self) for _ in range(layers)])
        self.slots, self.capacity = slots, CHUNK
        self.rows = self.begin = self.end = 0
        self.starts: list[int] = []

    @property
    def columns(self) -> int:
        return self.end - self.begin

    def reserve(self) -> None:
        """Make sure that the next column exists; columns that no row uses any more are given up first."""
        self.begin = min(self.starts)
        if self.end == self.capacity:
            self._move(-self.begin)

    def advance(self) -> None:
        """The forward has written column `end` of every row."""
        self.end += 1

    def add(self, prefix: Cache | None, source: Sequence[int], lengths: Sequence[int]) -> None:
        """New rows: new row i continues the first lengths[i] columns of row source[i] of `prefix`.

        `prefix` is padded on the right; it may be None where every length is 0.
        """
        if not self.rows:
            self.begin = self.end = 0
        if max(lengths) > self.end:
            self._move(max(lengths) - self.end)
        for length in sorted(set(lengths) - {0}):
            assert prefix is not None
            new = [self.rows + i for i, n in enumerate(lengths) if n == length]
            old = [row for row, n in zip(source, lengths, strict=True) if n == length]
            # rows of one length are mostly neighbours, and a slice is not copied twice
            to: slice | list[int] = slice(new[0], new[-1] + 1) if new[-1] - new[0] == len(new) - 1 else new
            for layer, other in zip(self.layers, prefix.layers, strict=True):
                if not layer.is_initialized:
                    layer.lazy_initialization(other.keys, other.values)
                layer.keys[to, :, self.end - length : self.end] = other.keys[old, :, :length]
                layer.values[to, :, self.end - length : self.end] = other.values[old, :, :length]
        self.rows += len(lengths)
        self.starts += [self.end - length for length in lengths]

    def keep(self, kept: Sequence[int]) -> list[int]:
        """Drop all rows but these. The last ones move into the gaps; returns which old row each row now is."""
        order = sorted(kept)
        holes = sorted(set(range(len(order))) - set(order))
        moved = order[len(order) - len(holes) :]
        if holes:
            used = slice(min(self.starts[row] for row in moved), self.end)
            for layer in self.layers:
                if layer.is_initialized:
                    layer.keys[holes, :, used] = layer.keys[moved, :, used]
                    layer.values[holes, :, used] = layer.values[moved, :, used]
        sources = list(range(len(order)))
        for hole, row in zip(holes, moved, strict=True):
            sources[hole] = row
        self.starts = [self.starts[row] for row in sources]
        self.rows = len(sources)
        return sources

    def mask(self, device: torch.device) -> Tensor:
        """Which columns of [begin, end] each row may see in the next step, bool [rows, columns + 1]."""
        columns = torch.arange(self.begin, self.end + 1, device=device)
        return columns >= torch.tensor(self.starts, device=device).unsqueeze(1)

    def _move(self, gap: int) -> None:
        """Shift the columns in use by `gap`, into buffers with half a chunk or more to spare."""
        begin, end = self.begin + gap, self.end + gap
        if self.rows or end >= self.capacity:
            self.capacity = ((end + CHUNK // 2) // CHUNK + 1) * CHUNK
            for layer in self.layers:
                if layer.is_initialized:
                    keys, values = layer.keys, layer.values
                    layer.lazy_initialization(keys, values)
                    layer.keys[: self.rows, :, begin:end] = keys[: self.rows, :, self.begin : self.end]
                    layer.values[: self.rows, :, begin:end] = values[: self.rows, :, self.begin : self.end]
        self.begin, self.end = begin, end
        self.starts = [start + gap for start in self.starts]
