"""Linear layers during generation: weights packed once for oneDNN, and an adapter for each group of rows.

Both replace `forward` on the layers within a context and leave no trace after it. Packing holds a second copy
of the weights and is done for bf16 on CPUs only; there it gives a step with few rows nearly half of its time
back.
"""

import contextlib
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mass import lora
from mass.kvcache import RowTable

_packed: "weakref.WeakKeyDictionary[nn.Linear, tuple[tuple[int, int], Tensor]]" = weakref.WeakKeyDictionary()
# Tokens of one adapter from which oneDNN's bf16 products are faster than MKL's fp32 ones.
ROWS_FOR_BASE_TYPE = 8
# Adapters of one token each from which their B come from memory, not from a cache: half the bytes are then less time.
ADAPTERS_FOR_BASE_TYPE = 64


@contextlib.contextmanager
def packed_linears(hf: nn.Module) -> Iterator[None]:
    """Within the context every bf16 linear layer on the CPU multiplies by its packed weight."""
    patched: list[nn.Linear] = []
    try:
        for linear in hf.modules():
            if type(linear) is nn.Linear and _packable(linear):
                forward = _packed_forward(linear)
                if forward is None:
                    break
                linear.forward = forward  # type: ignore[assignment,method-assign]
                patched.append(linear)
        yield
    finally:
        for linear in patched:
            del linear.__dict__["forward"]


def can_pack() -> bool:
    """Whether this machine's CPU has bf16 products that want packed weights."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _packable(linear: nn.Linear) -> bool:
    weight = linear.weight
    # a sharded weight is an empty tensor until it is gathered
    return weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and weight.dim() == 2


def _packed_forward(linear: nn.Linear) -> Callable[[Tensor], Tensor] | None:
    """The layer's forward with its weight packed; None, with a warning, where this torch cannot."""
    weight, bias = linear.weight, linear.bias
    try:
        if not can_pack():
            raise RuntimeError("this CPU has no bf16 instructions that it uses")
        stamp = (weight.data_ptr(), weight._version)
        if linear not in _packed or _packed[linear][0] != stamp:
            _packed[linear] = (stamp, torch.ops.mkldnn._reorder_linear_weight(weight.detach()))
        multiply = torch.ops.mkldnn._linear_pointwise
    except (AttributeError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        warnings.warn(
            f"generation goes on with weights as they are: oneDNN does not pack them ({reason})", stacklevel=3
        )
        return None
    packed = _packed[linear][1]
    return lambda x: multiply(x, packed, bias, "none", [], "")


class RowAdapters:
    """The adapters of a batch's rows: row i uses adapter index[i] of T.

    Rows of one adapter form one matrix product. Adapters that no row uses any more are left out of it when
    they have become half of all. Layers that are called with one and the same tensor (q, k and v; gate and up)
    share the product by A: the first forward shows which they are.
    """

    def __init__(self, layers: lora.Layers, adapter: Mapping[str, Tensor]) -> None:
        self.layers = layers
        self.adapter = {key: tensor.detach() for key, tensor in adapter.items()}
        self.names = sorted({key.rpartition(".")[0] for key in adapter})
        self.device = next(iter(self.adapter.values())).device
        self.groups: list[list[str]] = []
        self.used: list[int] = []
        self.dtype_a = self.dtype_b = torch.float32
        self.pairs: dict[str, _Pair] = {}
        self.table = RowTable([], 0, self.device)
        # counts the changes of what the layers' forward works on
        self.shape = 0
        # the last input, the stack of A that it met, and their product
        self.shared: tuple[Tensor, Tensor, Tensor] | None = None

    def set_rows(self, index: Sequence[int], tokens: int = 1) -> None:
        """From now on the model's input has one row of `tokens` tokens for each entry."""
        if not index:
            return
        used = sorted(set(index))
        if not set(used) <= set(self.used) or 2 * len(used) <= len(self.used):
            weight = self.layers[self.names[0]].weight
            many = len(index) * tokens >= ROWS_FOR_BASE_TYPE * len(used) or weight.device.type != "cpu"
            self.dtype_a = self.dtype_b = weight.dtype if many else torch.float32
            if len(index) * tokens == len(used) >= ADAPTERS_FOR_BASE_TYPE:
                # B is read once and no more, and the sum over it takes half the bytes as it comes
                self.dtype_b = weight.dtype
            self.used = used
            self._pair_up(self.groups or [[name] for name in self.names])
        self.table = RowTable([self.used.index(i) for i in index], len(self.used), self.device)
        self.shape += 1

    def _pair_up(self, groups: Sequence[Sequence[str]]) -> None:
        every = self.used == list(range(len(next(iter(self.adapter.values())))))
        chosen = self.adapter if every else lora.select(self.adapter, self.used)
        self.shape += 1
        for group in groups:
            one = chosen[f"{group[0]}.A"]
            stack_TKI = one if len(group) == 1 else torch.cat([chosen[f"{name}.A"] for name in group], 1)
            stack_TKI = stack_TKI.to(self.dtype_a)
            at = 0
            for name in group:
                rank = chosen[f"{name}.A"].shape[1]
                # as the product reads it: a third less time for wide layers than through a transposed view
                b_TRO = chosen[f"{name}.B"].to(self.dtype_b).mT.contiguous()
                self.pairs[name] = _Pair(stack_TKI, at, rank, b_TRO)
                at += rank

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Within the context the LoRA layers take these rows, [rows, tokens, in]."""
        calls: list[list[str]] | None = None if self.groups else []
        try:
            for name in self.names:
                self.layers[name].forward = self._forward(name, calls)  # type: ignore[assignment,method-assign]
            yield
        finally:
            self.shared = None
            for name in self.names:
                self.layers[name].__dict__.pop("forward", None)
        if calls:
            called = {name for group in calls for name in group}
            self.groups = calls + [[name] for name in self.names if name not in called]
            self._pair_up(self.groups)

    def _forward(self, name: str, calls: list[list[str]] | None) -> Callable[[Tensor], Tensor]:
        layer = self.layers[name]

        def forward(x: Tensor) -> Tensor:
            y = layer.base(x)
            again = self.shared is not None and self.shared[0] is x
            if calls is not None:
                calls[-1].append(name) if again else calls.append([name])
            pair = self.pairs[name]
            low_TRN = self._low(x, pair.stack_TKI)[:, pair.at : pair.at + pair.rank]
            update = _times_b(low_TRN.mT.to(pair.b_TRO.dtype), pair.b_TRO)
            update = self.table.ungroup(update.unflatten(1, (-1, x.shape[1])))
            return torch.add(y, update.to(y.dtype), alpha=layer.scale)

        return forward

    def _low(self, x: Tensor, stack_TKI: Tensor) -> Tensor:
        """The rows of every adapter times its A: [T, K, rows]."""
        if self.shared is not None and self.shared[0] is x and self.shared[1] is stack_TKI:
            return self.shared[2]
        x_TNI = self.table.group(x).flatten(1, 2).to(stack_TKI.dtype)
        # one row each: the matrix by the row is twice as fast on a CPU as the row by the matrix
        one = x_TNI.shape[1] == 1
        low_TKN = torch.bmm(stack_TKI, x_TNI.mT) if one else torch.bmm(x_TNI, stack_TKI.mT).mT
        self.shared = (x, stack_TKI, low_TKN)
        return low_TKN


def _times_b(low_TNR: Tensor, b_TRO: Tensor) -> Tensor:
    """[T, N, R] times [T, R, O]."""
    if low_TNR.shape[1] > 1 or b_TRO.dtype != torch.bfloat16 or b_TRO.device.type != "cpu":
        return torch.bmm(low_TNR, b_TRO)
    # one row each: a weighted sum of B's rows, which this reads at the speed of memory and bf16's `bmm` does not
    index_TR = torch.arange(b_TRO.shape[0] * b_TRO.shape[1]).view(b_TRO.shape[:2])
    return F.embedding_bag(
        index_TR, b_TRO.flatten(0, 1), mode="sum", per_sample_weights=low_TNR.squeeze(1)
    ).unsqueeze(1)


class _Pair(NamedTuple):
    """One layer's adapters. Its A are rows [at, at + rank) of a stack that other layers may share."""

    stack_TKI: Tensor
    at: int
    rank: int
    b_TRO: Tensor
