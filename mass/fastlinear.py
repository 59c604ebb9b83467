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

from mass import lora, rowkernel
from mass.kvcache import RowTable
from mass.rowkernel import RowUpdates

Forward = Callable[[Tensor], Tensor]
# A [T, R, I] and B [T, R, O] of a layer's adapters
Pair = tuple[Tensor, Tensor]

_packed: "weakref.WeakKeyDictionary[nn.Linear, tuple[tuple[int, int], Tensor]]" = weakref.WeakKeyDictionary()
# Tokens of one adapter from which oneDNN's bf16 products are faster than MKL's fp32 ones.
ROWS_FOR_BASE_TYPE = 16


@contextlib.contextmanager
def packed_linears(hf: nn.Module) -> Iterator[None]:
    """Within the context every bf16 linear layer on the CPU multiplies by its packed weight, where the CPU has such products."""
    patched: list[nn.Linear] = []
    able = has_bf16_products()
    try:
        for linear in hf.modules():
            # a forward of its own (a hook of accelerate) does more than the product: it stays
            if able and type(linear) is nn.Linear and _packable(linear) and "forward" not in linear.__dict__:
                forward = _packed_forward(linear)
                if forward is None:
                    break
                linear.forward = forward  # type: ignore[assignment,method-assign]
                patched.append(linear)
        yield
    finally:
        for linear in patched:
            del linear.__dict__["forward"]


def forget(hf: nn.Module) -> None:
    """Drop a model's packed weights. Its owner may write to its weights in a way that leaves no mark: PEFT merges through `.data`,
    which keeps address and version."""
    for module in hf.modules():
        _packed.pop(module, None)  # type: ignore[call-overload]


def has_bf16_products() -> bool:
    """Whether oneDNN has bf16 products on this machine's CPU; they want packed weights."""
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

    forward.takes_update = True  # type: ignore[attr-defined]
    return forward


def _taking_update(base: nn.Module) -> Callable[..., Tensor] | None:
    """The layer's forward where it is a packed one, that adds an update itself."""
    forward = base.__dict__.get("forward")
    return forward if getattr(forward, "takes_update", False) else None


class RowAdapters:
    """The adapters of a batch's rows: row i uses adapter index[i] of T.

    Rows of one adapter form one matrix product. Adapters that no row uses any more are left out of it when
    they have become half of all. Layers that are called with one and the same tensor (q, k and v; gate and up)
    share the product by A: the first forward shows which they are. Where every row is one token on a CPU, both
    products are compiled code (`rowkernel`), with adapters in the base's dtype; `traced` says that the forward will be
    traced, which wants operations of PyTorch.
    """

    def __init__(self, layers: lora.Layers, adapter: Mapping[str, Tensor], traced: bool = False) -> None:
        self.layers, self.traced = layers, traced
        self.adapter = {key: tensor.detach() for key, tensor in adapter.items()}
        self.names = sorted({key.rpartition(".")[0] for key in adapter})
        first = layers[self.names[0]]
        self.base_type = first.weight.dtype
        a_TRI = self.adapter[f"{self.names[0]}.A"]
        self.count, self.device = len(a_TRI), a_TRI.device
        # layers that share an input; empty until a forward has shown them
        self.groups: list[list[str]] = []
        self.used: list[int] = []
        self.place_B: list[int] = []
        self.compiled = False
        self.dtype = torch.float32
        # A [T, R, I] and scaled B [T, R, O] of each layer by dtype; made once for the prompts and the steps after them
        self.scaled: dict[torch.dtype, dict[str, Pair]] = {}
        self.packed: list[rowkernel.Packed] = []
        self.stacks: list[_Stack] = []
        self.forwards: dict[str, Forward] = {}
        self.table = RowTable([], 0, self.device)
        # counts the changes of what the layers' forward works on
        self.shape = 0
        # the last input, what was made of it, and that
        self.shared: tuple[Tensor, Callable[[Tensor], Sequence[Tensor]], Sequence[Tensor]] | None = None

    def apart(self) -> "RowAdapters":
        """The same adapters for other rows."""
        other = RowAdapters(self.layers, self.adapter, self.traced)
        other.groups, other.scaled, other.packed = self.groups, self.scaled, self.packed
        return other

    def close(self) -> None:
        """Give the memory of the products' adapters back. Neither this nor what is `apart` from it is used afterwards."""
        while self.packed:
            rowkernel.give_back(self.packed.pop())

    def set_rows(self, index: Sequence[int], tokens: int = 1) -> None:
        """From now on the model's input has one row of `tokens` tokens for each entry."""
        if not index:
            return
        compiled = tokens == 1 and not self.traced and rowkernel.works_for(self.base_type, self.device)
        # compiled code reads no adapter that no row has; the others are laid out in the rows' order: rows that come
        # sorted by adapter then need no other order
        used = list(range(self.count)) if compiled else list(dict.fromkeys(index))
        if compiled != self.compiled or not set(used) <= set(self.used) or 2 * len(used) <= len(self.used):
            many = len(index) * tokens >= ROWS_FOR_BASE_TYPE * len(used) or self.device.type != "cpu"
            self.dtype = (
                self.base_type if many or compiled else torch.promote_types(self.base_type, torch.float32)
            )
            self.compiled, self.used, self.stacks = compiled, used, []
        self.forwards = {}
        place = {adapter: i for i, adapter in enumerate(self.used)}
        self.place_B = [place[i] for i in index]
        self.table = RowTable(self.place_B, len(self.used), self.device)
        self.shape += 1

    def _lay_out(self) -> None:
        if self.dtype not in self.scaled:
            self.scaled[self.dtype] = self._scaled()
        scaled, used = self.scaled[self.dtype], self.used
        # neighbours are taken without a copy
        neighbours = used == list(range(used[0], used[0] + len(used)))
        at = slice(used[0], used[0] + len(used)) if neighbours else torch.tensor(used, device=self.device)
        for names in self.groups or [[name] for name in self.names]:
            pairs = [(scaled[name][0][at], scaled[name][1][at]) for name in names]
            a = [a_TRI for a_TRI, _ in pairs]
            # compiled code reads each layer's pair as it lies
            together = len(a) > 1 and not self.compiled
            self.stacks.append(_Stack(names, pairs, torch.cat(a, 1) if together else a[0]))

    def _scaled(self) -> dict[str, Pair]:
        """The adapters of every layer as products take them; B is scaled before it is rounded."""
        layers = [
            (self.adapter[f"{name}.A"], self.adapter[f"{name}.B"], self.layers[name].scale)
            for name in self.names
        ]
        if rowkernel.works_for(self.dtype, self.device):
            packed = rowkernel.pack([(a.float(), b.float(), scale) for a, b, scale in layers], self.dtype)
            self.packed.append(packed)
            pairs = packed.pairs
        else:
            pairs = [
                (a.to(self.dtype).contiguous(), (b * s).to(self.dtype).mT.contiguous()) for a, b, s in layers
            ]
        return dict(zip(self.names, pairs, strict=True))

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Within the context the LoRA layers take these rows, [rows, tokens, in]."""
        if not self.stacks:
            self._lay_out()
        calls: list[list[str]] | None = None if self.groups else []
        if calls is not None or not self.forwards:
            places: dict[tuple[int, int], Tensor] = {}
            for stack in self.stacks:
                make = self._updating(stack, places) if self.compiled else self._multiplying(stack)
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
        table, ranks = self.table, [a_TRI.shape[1] for a_TRI, _ in stack.pairs]

        def lows(x: Tensor) -> Sequence[Tensor]:
            return self._low(x, stack.a).split_with_sizes(ranks, -1)

        def forward_of(base: nn.Module, at: int, b_TRO: Tensor) -> Forward:
            packed = _taking_update(base)

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

        for at, (name, (_, b_TRO)) in enumerate(zip(stack.names, stack.pairs, strict=True)):
            yield forward_of(self.layers[name].base, at, b_TRO)

    def _updating(self, stack: "_Stack", places: dict[tuple[int, int], Tensor]) -> Iterator[Forward]:
        """The same for rows of one token on a CPU. `places`: where updates go, which stacks share: each is added before
        the next stack's are made."""
        shapes = [(at, b_TRO.shape[2]) for at, (_, b_TRO) in enumerate(stack.pairs)]
        for at, width in shapes:
            places.setdefault((at, width), stack.a.new_empty(len(self.place_B), 1, width))
        updates = RowUpdates(stack.pairs, [places[shape] for shape in shapes], self.place_B)

        def forward_of(base: nn.Module, at: int) -> Forward:
            # called without the module around it, which takes as long as a small product
            packed = _taking_update(base)

            def forward(x: Tensor) -> Tensor:
                update = self._once(updates, x)[at]
                return packed(x, update) if packed else base(x) + update

            return forward

        for at, name in enumerate(stack.names):
            yield forward_of(self.layers[name].base, at)

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


class _Stack(NamedTuple):
    """The adapters of layers that share an input."""

    names: list[str]
    pairs: list[Pair]
    """A and scaled B of each."""
    a: Tensor
    """[T, K, I]: their A one below the other, K the sum of the ranks; of the first alone where the code is compiled."""
