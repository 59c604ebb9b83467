"""The decode step: one token of every row through the model, as it is, or recorded once and replayed.

A small model's step is hundreds of small operations, and asking for them one by one takes longer than they do. A recording
asks once. It holds for one shape (the rows, their groups and adapters, the buffers' columns): whatever differs from step to
step is in tensors that stay where they are, and when the shape changes the next step runs as it is and the one after that is
recorded anew.
"""

import contextlib
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from mass.fastlinear import RowAdapters
from mass.kvcache import RowCache, attention_over

if TYPE_CHECKING:
    from mass.model import LanguageModel

How = Literal["eager", "cuda_graph", "compile"]


class DecodeStep:
    """Calls of the model that append a token to every row of `cache`. `how` becomes "eager", with a warning that says why,
    where it cannot be recorded.
    """

    def __init__(
        self, lm: "LanguageModel", cache: RowCache, adapters: RowAdapters | None, how: How = "eager"
    ) -> None:
        self.lm, self.cache, self.adapters, self.how = lm, cache, adapters, how
        self.shape: tuple[int, int] | None = None
        self.replay: Callable[[], Tensor] | None = None
        self.ids_B1 = self.position_B1 = torch.empty(0)
        if how != "eager" and (lm.shards or (how == "cuda_graph" and lm.device.type != "cuda")):
            self._give_up("the base is sharded" if lm.shards else f"the model is on {lm.device.type}")

    def __call__(self, tokens: Sequence[int]) -> Tensor:
        """The next token of every row; logits [B, V] for the one after it, which the next call may overwrite."""
        cache = self.cache
        cache.reserve()
        ids_B1 = torch.tensor(tokens, device=cache.device).unsqueeze(1)
        shape = (cache.shape, self.adapters.shape if self.adapters else 0)
        if self.how == "eager" or shape != self.shape:
            # what a shape needs once (masks, tables, products' workspaces) is made by its first step
            self.shape, self.replay = shape, None
            self.ids_B1, self.position_B1 = ids_B1, cache.positions().unsqueeze(1)
            logits_BV = self._forward(self.ids_B1, self.position_B1)
        else:
            self.ids_B1.copy_(ids_B1)
            self.position_B1.copy_(cache.positions().unsqueeze(1))
            if self.replay is None:
                self.replay = self._record()
            logits_BV = self.replay()
        cache.advance()
        return logits_BV

    def _forward(self, ids_B1: Tensor, position_B1: Tensor) -> Tensor:
        applied = self.adapters.applied() if self.adapters else contextlib.nullcontext()
        with attention_over(self.lm.hf, self.cache), applied:
            out = self.lm.hf(input_ids=ids_B1, position_ids=position_B1, cache=self.cache, use_cache=True)
        return out.logits[:, -1]

    def _record(self) -> Callable[[], Tensor]:
        try:
            return self._graph() if self.how == "cuda_graph" else self._compiled()
        except Exception as error:
            # whatever the compiler or the model's own code throws: the step itself still works
            self._give_up(str(error).strip().splitlines()[0] if str(error) else type(error).__name__)
            return lambda: self._forward(self.ids_B1, self.position_B1)

    def _give_up(self, reason: str) -> None:
        warnings.warn(f"generation goes on without {self.how}: {reason}", stacklevel=4)
        self.how = "eager"

    def _graph(self) -> Callable[[], Tensor]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits_BV = self._forward(self.ids_B1, self.position_B1)

        def replay() -> Tensor:
            graph.replay()
            return logits_BV

        return replay

    def _compiled(self) -> Callable[[], Tensor]:
        # traced first: the compiler then sees operations on tensors, not the cache and the adapters that arrange them
        inputs = self.ids_B1, self.position_B1
        traced = make_fx(lambda ids_B1, position_B1: self._forward(ids_B1, position_B1))(*inputs)
        compiled = torch.compile(traced, options={"freezing": True})
        compiled(*inputs)
        return lambda: compiled(*inputs)
