"""Linear layers during generation: weights packed once for oneDNN, and an adapter for each group of rows.

Both replace `forward` on the layers within a context and leave no trace after it. Packing holds a second copy
of the weights and is done for bf16 on CPUs only; there it gives a step with few rows nearly half of its time
back.
"""

import contextlib
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from mass import lora
from mass.kvcache import RowTable

_packed: "weakref.WeakKeyDictionary[nn.Linear, tuple[tuple[int, int], Tensor]]" = weakref.WeakKeyDictionary()
# Tokens of one adapter from which oneDNN's bf16 products are faster than MKL's fp32 ones.
ROWS_FOR_BASE_TYPE = 8


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
    they have become half of all.
    """

    def __init__(self, layers: lora.Layers, adapter: Mapping[str, Tensor]) -> None:
        self.layers = layers
        self.adapter = {key: tensor.detach() for key, tensor in adapter.items()}
        self.names = sorted({key.rpartition(".")[0] for key in adapter})
        self.device = next(iter(self.adapter.values())).device
        self.used: list[int] = []
        self.pairs: dict[str, tuple[Tensor, Tensor]] = {}
        self.table = RowTable([], 0, self.device)

    def set_rows(self, index: Sequence[int], tokens: int = 1) -> None:
        """From now on the model's input has one row of `tokens` tokens for each entry."""
        if not index:
            return
        used = sorted(set(index))
        if not set(used) <= set(self.used) or 2 * len(used) <= len(self.used):
            weight = self.layers[self.names[0]].weight
            many = len(index) * tokens >= ROWS_FOR_BASE_TYPE * len(used) or weight.device.type != "cpu"
            dtype = weight.dtype if many else torch.float32
            chosen = lora.select(self.adapter, used)
            self.used = used
            self.pairs = {
                name: (chosen[f"{name}.A"].to(dtype).mT, chosen[f"{name}.B"].to(dtype).mT)
                for name in self.names
            }
        self.table = RowTable([self.used.index(i) for i in index], len(self.used), self.device)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Within the context the LoRA layers take these rows, [rows, tokens, in]."""
        try:
            for name in self.names:
                self.layers[name].forward = self._forward(name)  # type: ignore[assignment,method-assign]
            yield
        finally:
            for name in self.names:
                self.layers[name].__dict__.pop("forward", None)

    def _forward(self, name: str) -> Callable[[Tensor], Tensor]:
        layer = self.layers[name]

        def forward(x: Tensor) -> Tensor:
            y = layer.base(x)
            a_TIR, b_TRO = self.pairs[name]
            x_TNSI = self.table.group(x).to(a_TIR.dtype)
            update = torch.bmm(torch.bmm(x_TNSI.flatten(1, 2), a_TIR), b_TRO)
            update = self.table.ungroup(update.unflatten(1, x_TNSI.shape[1:3]))
            return torch.add(y, update.to(y.dtype), alpha=layer.scale)

        return forward
