"""A Hugging Face decoder as embed / blocks / head, driven by hand.

Block-wise work (recomputation, dual numbers, gathered weights) needs each decoder block as a function of its hidden
state and of its own adapter. The blocks' other arguments (masks, rotary embeddings) are the model's own: its forward is
run once with the blocks stubbed out and what each would have been called with is kept.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from mass import batch, frozen
from mass.attention import Tiled
from mass.batch import Packed
from mass.errors import MassError
from mass.lora import Adapter, Layers, using

_NORMS = ("norm", "final_layer_norm", "ln_f", "final_layernorm")


_WAY_OUT = "meta_gradient.mode=reverse and meta_gradient.mode=finite_difference work without them."


@dataclass(frozen=True)
class Split:
    """Where a decoder's parts are. `prefix[i]` is the module path of block i, with a dot at its end."""

    body: PreTrainedModel
    blocks: list[nn.Module]
    prefix: list[str]
    norm: nn.Module
    layers: Layers


@dataclass(frozen=True)
class Call:
    """What one batch gives to the blocks: the embedded tokens [B, S, D], and each block's other arguments."""

    hidden_BSD: Tensor
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]]


def split(hf: PreTrainedModel, layers: Layers) -> Split:
    """Find the blocks of a decoder. Raises MassError, naming the engines that need no split, when they are not found
    or when driving them by hand does not give the model's own hidden states.
    """
    found = find(hf, layers)
    if not _agrees(found):
        raise MassError(
            f"{type(hf).__name__}: its blocks driven one by one do not give its own hidden states. {_WAY_OUT}"
        )
    return found


def find(hf: PreTrainedModel, layers: Layers) -> Split:
    """`split` without driving the blocks: also for a model without numbers."""
    kind = type(hf).__name__
    count = getattr(hf.config.get_text_config(), "num_hidden_layers", None)
    body: PreTrainedModel = hf.base_model  # type: ignore[assignment]
    for name, module in body.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            owner = body.get_submodule(name.rpartition(".")[0])
            norms = [getattr(owner, n) for n in _NORMS if isinstance(getattr(owner, n, None), nn.Module)]
            if len(norms) == 1:
                path = f"{hf.base_model_prefix}.{name}" if hf.base_model_prefix and body is not hf else name
                return Split(
                    body, list(module), [f"{path}.{i}." for i in range(len(module))], norms[0], layers
                )
    raise MassError(f"{kind}: no list of {count} decoder blocks followed by a norm was found. {_WAY_OUT}")


def attends_fully(hf: PreTrainedModel) -> bool:
    """True when every layer attends to the whole context: no sliding windows, chunks or recurrent layers."""
    config = hf.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ["full_attention"]
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    return set(kinds) == {"full_attention"} and (
        window is None or getattr(config, "layer_types", None) is not None
    )


def model_inputs(hf: PreTrainedModel, packed: Packed) -> dict[str, Tensor]:
    """The model's keyword arguments for a packed batch. Raises MassError for a model in train mode: its dropout would
    differ between the passes of which one gradient is made.
    """
    if hf.training:
        raise MassError(f"{type(hf).__name__} is in train mode: call model.eval() first")
    inputs = {"input_ids": packed.tokens_BS, "position_ids": packed.positions_BS}
    if packed.mask_B1SS is not None:
        # Additive, in the model's dtype: the one form that every attention implementation takes as it is.
        zero = torch.zeros((), dtype=next(hf.parameters()).dtype, device=packed.mask_B1SS.device)
        inputs["attention_mask"] = zero.masked_fill(~packed.mask_B1SS, torch.finfo(zero.dtype).min)
    return inputs


def enter(parts: Split, packed: Packed) -> Call:
    """Embed a batch and record what every block is called with."""
    seen: list[tuple[Tensor, tuple[Any, ...], dict[str, Any]]] = []

    def stub(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append((hidden, args, kwargs))
        return hidden

    # a user's own (accelerate hooks a module so) comes back
    own = [block.__dict__.get("forward") for block in parts.blocks]
    for block in parts.blocks:
        block.forward = stub  # type: ignore[method-assign]
    try:
        with torch.no_grad():
            parts.body(**model_inputs(parts.body, packed), use_cache=False)
    finally:
        for block, forward in zip(parts.blocks, own, strict=True):
            if forward is None:
                del block.forward
            else:
                block.forward = forward
    return Call(seen[0][0], [(args, kwargs) for _, args, kwargs in seen])


def run_block(parts: Split, call: Call, i: int, hidden_BSD: Tensor, adapter: Mapping[str, Tensor]) -> Tensor:
    """Block i as a function of its input and of its own adapter (a dict with that block's keys only, or empty)."""
    args, kwargs = call.arguments[i]
    with using(parts.layers, adapter):
        out = parts.blocks[i](hidden_BSD, *args, **kwargs)
    return out[0] if isinstance(out, tuple) else out


def of_block(parts: Split, i: int, adapter: Mapping[str, Tensor]) -> Adapter:
    """The part of an adapter that belongs to block i."""
    return {key: tensor for key, tensor in adapter.items() if key.startswith(parts.prefix[i])}


def lowest(parts: Split) -> int:
    """The first block with a layer that can have an adapter: what lies below it has no gradient."""
    return next(
        (i for i, p in enumerate(parts.prefix) if any(name.startswith(p) for name in parts.layers)), 0
    )


def weights_below(parts: Split) -> int:
    """How many weights of linear layers lie below the lowest adapter: no backward pass multiplies by them."""
    modules = [m for block in parts.blocks[: lowest(parts)] for m in block.modules()]
    return sum(m.weight.numel() for m in modules if isinstance(m, nn.Linear))


def tiled(packed: Packed) -> Tiled:
    """A context in which attention over this batch leaves out what no sequence sees, by the usual kernels."""
    return Tiled(packed.tiles, written_out=False)


@contextlib.contextmanager
def second_order(packed: Packed | None = None) -> Iterator[None]:
    """Only operations whose second derivative and forward mode exist and are right; attention over `packed` in tiles.

    Flash and memory-efficient attention, and the CPU's kernel, have neither. LayerNorm has both, but in torch 2.13 the
    gradient of its tangent takes the saved mean and deviation for constants; written out, it is right. A linear layer's
    tangent would multiply by its weight's, which is zero (`mass.frozen`). Needed around inner losses only; generation
    and outer losses keep the fast kernels.
    """
    tiles = packed.tiles if packed is not None else None
    # torch's own written-out kernel is for calls of attention that `Tiled` does not know
    with sdpa_kernel(SDPBackend.MATH), _WrittenOut(), Tiled(tiles, written_out=True):
        yield


class _WrittenOut(TorchFunctionMode):
    """Calls of layer_norm, whoever makes them, as the sum of their parts; linear layers as frozen ones."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.layer_norm, F.layer_norm):
            return _layer_norm(*args, **kwargs)
        if func is F.linear:
            return _linear(*args, **kwargs)
        return func(*args, **kwargs)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if isinstance(weight, nn.Parameter) and not weight.requires_grad:
        return frozen.linear(input, lambda: weight, bias)
    return F.linear(input, weight, bias)


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    dims = tuple(range(-len(normalized_shape), 0))
    # As torch's kernel: statistics in fp32 at least, the result in the input's dtype.
    wide = input if input.dtype == torch.float64 else input.float()
    centred = wide - wide.mean(dims, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(dims, keepdim=True) + eps)
    y = y if weight is None else y * weight
    return (y if bias is None else y + bias).to(input.dtype)


def _agrees(parts: Split) -> bool:
    device = next(parts.body.parameters()).device
    vocabulary = int(parts.body.get_input_embeddings().weight.shape[0])  # type: ignore[union-attr,index,arg-type]
    tokens = [1 + i % (vocabulary - 1) for i in range(8)]
    probe = batch.pack([[batch.Sequence(tokens, 1)]], 0, device)
    with torch.no_grad(), using(parts.layers, None):
        try:
            call = enter(parts, probe)
            hidden = call.hidden_BSD
            for i in range(len(parts.blocks)):
                hidden = run_block(parts, call, i, hidden, {})
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
            # Blocks that are called or answer otherwise than a decoder's do.
            return False
        whole = parts.body(**model_inputs(parts.body, probe), use_cache=False).last_hidden_state
    return torch.allclose(parts.norm(hidden), whole, rtol=1e-3, atol=1e-3)
