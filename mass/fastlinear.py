"""Linear layers during generation: weights packed once for oneDNN, and an adapter for each group of rows.

Both replace `forward` on the layers within a context and leave no trace after it. Packing holds a second copy
of the weights and is done for bf16 on CPUs only; there it gives a step with few rows nearly half of its time
back, and a packed layer adds the adapters' update before it rounds, where others round twice.
"""

import contextlib
import functools
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mass import lora
from mass.kvcache import RowTable

Forward = Callable[[Tensor], Tensor]

_packed: "weakref.WeakKeyDictionary[nn.Linear, tuple[tuple[int, int], Tensor]]" = weakref.WeakKeyDictionary()
# Tokens of one adapter from which oneDNN's bf16 products are faster than MKL's fp32 ones.
ROWS_FOR_BASE_TYPE = 16


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
    share the product by A: the first forward shows which they are. Where every row is one token on a CPU, the products
    by B are weighted sums of B's rows, in the base's dtype.
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
        self.place_B: list[int] = []
        # whether every row is one token on a CPU, and whether each is the only one of its adapter, too
        self.summed = self.alone = False
        self.dtype = torch.float32
        self.stacks: list[_Stack] = []
        self.forwards: dict[str, Forward] = {}
        self.table = RowTable([], 0, self.device)
        # counts the changes of what the layers' forward works on
        self.shape = 0
        # the last input, what was made of it, and that
        self.shared: tuple[Tensor, Callable[[Tensor], Sequence[Tensor]], Sequence[Tensor]] | None = None

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
            self.summed = tokens == 1 and self.device.type == "cpu"
            # in fp32 MKL's product by A is the faster one
            self.alone = self.summed and len(index) == len(used) and self.base_type.itemsize < 4
            self.dtype = self.base_type if many or self.alone else torch.float32
            self.used, self.stacks = used, []
        self.forwards = {}
        place = {adapter: i for i, adapter in enumerate(self.used)}
        self.place_B = [place[i] for i in index]
        self.table = RowTable(self.place_B, len(self.used), self.device)
        self.shape += 1

    def _lay_out(self) -> None:
        every = self.used == list(range(len(next(iter(self.adapter.values())))))
        chosen = self.adapter if every else lora.select(self.adapter, self.used)
        for names in self.groups or [[name] for name in self.names]:
            a = [chosen[f"{name}.A"].to(self.dtype) for name in names]
            a_TKI = a[0] if len(a) == 1 else torch.cat(a, 1)
            # scaled before it is rounded
            dtype = self.base_type if self.summed else self.dtype
            b = [(chosen[f"{name}.B"] * self.layers[name].scale).to(dtype).mT for name in names]
            self.stacks.append(_Stack(names, [len(a_TRI[0]) for a_TRI in a], a_TKI, b))
            if self.summed:
                self.stacks[-1] = self.stacks[-1].with_tables(of_a=self.alone)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Within the context the LoRA layers take these rows, [rows, tokens, in]."""
        if not self.stacks:
            self._lay_out()
        calls: list[list[str]] | None = None if self.groups else []
        if calls is not None or not self.forwards:
            # layers alike in shape share the index
            indices = functools.cache(self._index_a), functools.cache(self._index_b)
            for stack in self.stacks:
                make = self._summing(stack, *indices) if self.summed else self._multiplying(stack)
                self.forwards |= zip(stack.names, make, strict=True)
        try:
            for name, forward in self.forwards.items():
                own = forward if calls is None else self._noting(name, forward, calls)
                # past the module's own way to set it, which would take a hundredth of a small model's step
                self.layers[name].__dict__["forward"] = own
            yield
        finally:
            self.shared = None
            for name in self.names:
                self.layers[name].__dict__.pop("forward", None)
        if calls:
            called = {name for group in calls for name in group}
            self.groups += calls + [[name] for name in self.names if name not in called]
            self.stacks, self.forwards = [], {}
            self.shape += 1

    def _noting(self, name: str, forward: Forward, calls: list[list[str]]) -> Forward:
        """The forward, which also notes in `calls` the names of layers that take the same input one after another."""

        def noting(x: Tensor) -> Tensor:
            again = self.shared is not None and self.shared[0] is x
            calls[-1].append(name) if again else calls.append([name])
            return forward(x)

        return noting

    def _multiplying(self, stack: "_Stack") -> Iterator[Forward]:
        """The forward of each layer of the stack: one product by B for all adapters."""
        table = self.table

        def lows(x: Tensor) -> Sequence[Tensor]:
            return self._low(x, stack.a).split_with_sizes(stack.ranks, -1)

        def forward_of(base: nn.Module, at: int, b_TRO: Tensor) -> Forward:
            packed = base.__dict__.get("forward")

            def forward(x: Tensor) -> Tensor:
                low_TNR = self._once(lows, x)[at]
                if table.regular and b_TRO.dtype == self.base_type:
                    y = base(x)
                    y_TNO = y.reshape(table.count, -1, y.shape[-1])
                    return y_TNO.baddbmm_(low_TNR, b_TRO).reshape(y.shape)
                update_TNO = torch.bmm(low_TNR, b_TRO).to(x.dtype)
                if table.regular:
                    update = update_TNO.reshape(*x.shape[:-1], -1)
                else:
                    update = table.ungroup(update_TNO.unflatten(1, (-1, x.shape[1])))
                return packed(x, update) if packed else base(x) + update

            return forward

        for at, (name, b_TRO) in enumerate(zip(stack.names, stack.b, strict=True)):
            yield forward_of(self.layers[name].base, at, b_TRO)

    def _summing(
        self, stack: "_Stack", index_a: Callable[..., "_Index"], index_b: Callable[..., "_Index"]
    ) -> Iterator[Forward]:
        """The same for rows of one token: each row's update is a weighted sum of rows of a table.

        On a CPU these are fewer operations, and they read bf16 at nearly the speed of memory, which its `bmm` does not.
        """
        by_a = index_a(len(stack.a) // len(self.used)) if self.alone else None
        by_b = [index_b(tuple(layers), tuple(stack.ranks)) for layers in stack.alike]
        order = [layer for layers in stack.alike for layer in layers]

        def updates(x: Tensor) -> Sequence[Tensor]:
            if by_a:
                low = _sums(stack.a, by_a, x.flatten()).flatten()
            else:
                low = self._low(x, stack.a).to(self.base_type).flatten()
            update: list[Tensor] = []
            for table, layers, own in zip(stack.b, stack.alike, by_b, strict=True):
                update += _sums(table, own, low).view(len(layers), x.shape[0], 1, -1).unbind()
            return update

        def forward_of(base: nn.Module, at: int) -> Forward:
            # called without the module around it, which takes as long as a small product
            packed = base.__dict__.get("forward")

            def forward(x: Tensor) -> Tensor:
                update = self._once(updates, x)[at]
                return packed(x, update) if packed else base(x) + update

            return forward

        for layer, name in enumerate(stack.names):
            yield forward_of(self.layers[name].base, order.index(layer))

    def _once(self, make: Callable[[Tensor], Sequence[Tensor]], x: Tensor) -> Sequence[Tensor]:
        """What `make` makes of x, which the layers of one stack share."""
        if self.shared is None or self.shared[0] is not x or self.shared[1] is not make:
            self.shared = x, make, make(x)
        return self.shared[2]

    def _low(self, x: Tensor, a_TKI: Tensor) -> Tensor:
        """The rows of every adapter times its A, [T, N, K]."""
        rows = (x if self.table.regular else x[self.table.index]).to(a_TKI.dtype)
        x_TNI = rows.reshape(len(a_TKI), -1, rows.shape[-1])
        if x_TNI.shape[1] == 1:
            # one row each: the matrix by the row is twice as fast on a CPU as the row by the matrix, and
            # through a transposed view six times as fast as by a column that lies in memory as such
            return torch.bmm(a_TKI, x_TNI.mT).mT
        return torch.bmm(x_TNI, a_TKI.mT)

    def _index_a(self, width: int) -> "_Index":
        """For the rows' products by A, whose table has `width` rows an adapter."""
        row_BI = torch.tensor(self.place_B)[:, None] * width + torch.arange(width)
        return _Index(row_BI.flatten().int(), torch.arange(0, row_BI.numel(), width).int(), None)

    def _index_b(self, layers: tuple[int, ...], ranks: tuple[int, ...]) -> "_Index":
        """For the rows' products by the B of these layers of a stack, from its product by A."""
        rank, r_R = ranks[layers[0]], torch.arange(ranks[layers[0]])
        in_order = self.alone or self.table.regular
        at_B = torch.arange(len(self.place_B)) if in_order else self.table.back
        layer_M, start_M = torch.arange(len(layers)), torch.tensor([sum(ranks[:layer]) for layer in layers])
        adapter_MB = layer_M[:, None] * len(self.used) + torch.tensor(self.place_B)
        row_MBR = adapter_MB[:, :, None] * rank + r_R
        place_MBR = (start_M[:, None] + at_B * sum(ranks))[:, :, None] + r_R
        place = None if in_order and len(ranks) == 1 else place_MBR.flatten().int()
        return _Index(row_MBR.flatten().int(), torch.arange(0, row_MBR.numel(), rank).int(), place)


class _Index(NamedTuple):
    """Sums over a table: whose rows, where each sum of them begins, and the place of each row's weight among those given."""

    row: Tensor
    begin: Tensor
    place: Tensor | None


def _sums(table: Tensor, index: _Index, weight: Tensor) -> Tensor:
    if index.place is not None:
        weight = weight.index_select(0, index.place)
    return torch.embedding_bag(table, index.row, index.begin, mode=0, per_sample_weights=weight)[0]


class _Stack(NamedTuple):
    """The adapters of layers that share an input: their A, of these ranks, stand in one stack; each B is scaled."""

    names: list[str]
    ranks: list[int]
    a: Tensor
    """[T, K, I], K the sum of the ranks; as a table [T * I, K]."""
    b: list[Tensor]
    """[T, R, O] of each layer; as tables [M * T * R, O], one for each entry of `alike`, which are the layers of one shape."""
    alike: Sequence[Sequence[int]] = ()

    def with_tables(self, of_a: bool) -> "_Stack":
        shapes: dict[torch.Size, list[int]] = {}
        for layer, b_TRO in enumerate(self.b):
            shapes.setdefault(b_TRO.shape, []).append(layer)
        tables = [torch.stack([self.b[i] for i in layers]).flatten(0, 2) for layers in shapes.values()]
        a = self.a.mT.contiguous().flatten(0, 1) if of_a else self.a
        return self._replace(a=a, b=tables, alike=list(shapes.values()))
