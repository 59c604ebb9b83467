"""Linear layers during generation: weights packed once for oneDNN, and an adapter for each group of rows.

Both replace `forward` on the layers within a context and leave no trace after it. Packing holds a second copy
of the weights and is done for bf16 on CPUs only; there it gives a step with few rows nearly half of its time
back, and a packed layer adds the adapters' update before it rounds, where others round twice.
"""

import contextlib
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mass import lora
from mass.kvcache import RowTable

_packed: "weakref.WeakKeyDictionary[nn.Linear, tuple[tuple[int, int], Tensor]]" = weakref.WeakKeyDictionary()
# Tokens of one adapter from which oneDNN's bf16 products are faster than MKL's fp32 ones.
ROWS_FOR_BASE_TYPE = 16
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


def _packed_forward(linear: nn.Linear) -> Callable[..., Tensor] | None:
    """The layer's forward with its weight packed; None, with a warning, where this torch cannot.

    It takes x [..., in], and may take what is to be added to the product, [..., out].
    """
    weight, bias = linear.weight, linear.bias
    try:
        if not can_pack():
            raise RuntimeError("this CPU has no bf16 instructions that it uses")
        stamp = (weight.data_ptr(), weight._version)
        if linear not in _packed or _packed[linear][0] != stamp:
            _packed[linear] = (stamp, torch.ops.mkldnn._reorder_linear_weight(weight.detach()))
        multiply = torch.ops.mkldnn._linear_pointwise.default
        multiply_add = torch.ops.mkldnn._linear_pointwise.binary
    except (AttributeError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        warnings.warn(
            f"generation goes on with weights as they are: oneDNN does not pack them ({reason})", stacklevel=3
        )
        return None
    packed = _packed[linear][1]

    def forward(x: Tensor, plus: Tensor | None = None) -> Tensor:
        if plus is None:
            return multiply(x, packed, bias, "none", [], "")
        return multiply_add(x, plus, packed, bias, "add")

    return forward


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
        self.base_type = layers[self.names[0]].weight.dtype
        # layers that share an input; empty until a forward has shown them
        self.groups: list[list[str]] = []
        self.used: list[int] = []
        self.tokens = 1
        self.dtype_a = self.dtype_b = torch.float32
        self.pairs: dict[str, _Pair] = {}
        self.forwards: dict[str, Callable[[Tensor], Tensor]] = {}
        self.table = RowTable([], 0, self.device)
        # counts the changes of what the layers' forward works on
        self.shape = 0
        # the last input, the stack of A that it met, and their product by layer
        self.shared: tuple[Tensor, Tensor, Sequence[Tensor]] | None = None

    def apart(self) -> "RowAdapters":
        """The same adapters for other rows; either learns from the other's forward which layers share an input."""
        other = RowAdapters(self.layers, self.adapter)
        other.groups = self.groups
        return other

    def set_rows(self, index: Sequence[int], tokens: int = 1) -> None:
        """From now on the model's input has one row of `tokens` tokens for each entry."""
        if not index:
            return
        # in the rows' order: rows that come sorted by adapter then need no other order
        used = list(dict.fromkeys(index))
        if not set(used) <= set(self.used) or 2 * len(used) <= len(self.used):
            many = len(index) * tokens >= ROWS_FOR_BASE_TYPE * len(used) or self.device.type != "cpu"
            self.dtype_a = self.dtype_b = self.base_type if many else torch.float32
            if len(index) * tokens == len(used) >= ADAPTERS_FOR_BASE_TYPE:
                # B is read once and no more, and the sum over it takes half the bytes as it comes
                self.dtype_b = self.base_type
            self.used, self.tokens, self.pairs = used, tokens, {}
        self.forwards = {}
        place = {adapter: i for i, adapter in enumerate(self.used)}
        self.table = RowTable([place[i] for i in index], len(self.used), self.device)
        self.shape += 1

    def _lay_out(self) -> None:
        every = self.used == list(range(len(next(iter(self.adapter.values())))))
        chosen = self.adapter if every else lora.select(self.adapter, self.used)
        for group in self.groups or [[name] for name in self.names]:
            one = chosen[f"{group[0]}.A"]
            stack_TKI = one if len(group) == 1 else torch.cat([chosen[f"{name}.A"] for name in group], 1)
            stack_TKI = stack_TKI.to(self.dtype_a)
            ranks = [chosen[f"{name}.A"].shape[1] for name in group]
            for at, name in enumerate(group):
                # scaled before it is rounded
                b_TRO = (chosen[f"{name}.B"] * self.layers[name].scale).to(self.dtype_b).mT
                if self.tokens == 1:
                    # as the product reads it: a third less time for wide layers, and it is read at every step
                    b_TRO = b_TRO.contiguous()
                bag = _Bag(b_TRO) if self.dtype_b != self.dtype_a else None
                self.pairs[name] = _Pair(stack_TKI, ranks, at, b_TRO, bag)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Within the context the LoRA layers take these rows, [rows, tokens, in]."""
        if not self.pairs:
            self._lay_out()
        calls: list[list[str]] | None = None if self.groups else []
        if calls is not None or not self.forwards:
            self.forwards = {name: self._forward(name, calls) for name in self.names}
        try:
            for name, forward in self.forwards.items():
                self.layers[name].forward = forward  # type: ignore[assignment,method-assign]
            yield
        finally:
            self.shared = None
            for name in self.names:
                self.layers[name].__dict__.pop("forward", None)
        if calls:
            called = {name for group in calls for name in group}
            self.groups += calls + [[name] for name in self.names if name not in called]
            self.pairs, self.forwards = {}, {}
            self.shape += 1

    def _forward(self, name: str, calls: list[list[str]] | None) -> Callable[[Tensor], Tensor]:
        layer, pair, table = self.layers[name], self.pairs[name], self.table
        # called without the module around it, which takes as long as a small product
        packed = layer.base.__dict__.get("forward")
        bag = pair.bag if table.width == 1 else None
        into_y = table.regular and pair.b_TRO.dtype == self.base_type and not bag

        def forward(x: Tensor) -> Tensor:
            if calls is not None:
                again = self.shared is not None and self.shared[0] is x
                calls[-1].append(name) if again else calls.append([name])
            low_TNR = self._low(x, pair)[pair.at]
            if into_y:
                y = layer.base(x)
                y_TNO = y.reshape(table.count, -1, y.shape[-1])
                return y_TNO.baddbmm_(low_TNR, pair.b_TRO).reshape(y.shape)
            update_TNO = bag(low_TNR) if bag else torch.bmm(low_TNR, pair.b_TRO)
            update = update_TNO.to(x.dtype)
            if table.regular:
                update = update.reshape(x.shape[0], x.shape[1], -1)
            else:
                update = table.ungroup(update.unflatten(1, (-1, x.shape[1])))
            return packed(x, update) if packed else layer.base(x) + update

        return forward

    def _low(self, x: Tensor, pair: "_Pair") -> Sequence[Tensor]:
        """The rows of every adapter times its A: [T, N, R] for each layer of the stack."""
        stack_TKI = pair.stack_TKI
        if self.shared is not None and self.shared[0] is x and self.shared[1] is stack_TKI:
            return self.shared[2]
        count = stack_TKI.shape[0]
        rows = (x if self.table.regular else x[self.table.index]).to(stack_TKI.dtype)
        x_TNI = rows.reshape(count, -1, rows.shape[-1])
        if x_TNI.shape[1] == 1:
            # one row each: the matrix by the row is twice as fast on a CPU as the row by the matrix, and
            # through a transposed view six times as fast as by a column that lies in memory as such
            low_TNK = torch.bmm(stack_TKI, x_TNI.mT).reshape(count, 1, -1)
        else:
            low_TNK = torch.bmm(x_TNI, stack_TKI.mT)
        low = low_TNK.to(pair.b_TRO.dtype).split_with_sizes(pair.ranks, -1)
        self.shared = (x, stack_TKI, low)
        return low


class _Pair(NamedTuple):
    """One layer's adapters: A, of rank ranks[at], is a part of a stack that other layers may share; B is scaled."""

    stack_TKI: Tensor
    ranks: list[int]
    at: int
    b_TRO: Tensor
    bag: "_Bag | None"


class _Bag:
    """[T, 1, R] times B [T, R, O] as a weighted sum of B's rows: on a CPU this reads bf16 at nearly the speed of
    memory, which its `bmm` does not.
    """

    def __init__(self, b_TRO: Tensor) -> None:
        count, rank, _ = b_TRO.shape
        self.table = b_TRO.flatten(0, 1)
        self.index = torch.arange(count * rank)
        self.begin = torch.arange(0, count * rank, rank)

    def __call__(self, low_T1R: Tensor) -> Tensor:
        sums = torch.embedding_bag(
            self.table, self.index, self.begin, mode=0, per_sample_weights=low_T1R.reshape(-1)
        )
        return sums[0].unsqueeze(1)
