"""Log-probabilities of target tokens, the KL divergence of their distributions from a reference's, and first-order
gradients of losses made of them.

Two routes to the same numbers: `plain` lets autograd keep every activation; with a `Split` the blocks are recomputed one
by one in the backward pass, so that a gradient holds one block's activations. Logits exist for one chunk of target
tokens at a time: what is read off a token's logits depends on its own hidden state alone, so its derivative J_MD (the
size of the hidden states) is taken at once and the vocabulary is never kept. Of a reference, too, only hidden states are.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import reduce

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mass.batch import Packed
from mass.blocks import Split, enter, lowest, model_inputs, of_block, run_block, tiled
from mass.blocks import second_order as second_order_ops
from mass.errors import MassError
from mass.lora import Adapter, Layers, using

# Target tokens that have logits at one time: enough for fast matrix products, small beside a block's activations. A GPU
# wants more of them, and has larger batches.
CHUNK_ROWS = {"cpu": 64, "cuda": 512}


def logits(hf: PreTrainedModel, hidden_MD: Tensor) -> Tensor:
    """The model's logits [M, V] of normalised hidden states, in fp32 (fp64 stays), with Gemma's soft cap."""
    out = hf.get_output_embeddings()(hidden_MD)
    out = out if out.dtype == torch.float64 else out.float()
    cap = getattr(hf.config.get_text_config(), "final_logit_softcapping", None)
    return torch.tanh(out / cap) * cap if cap else out


def check_model(hf: PreTrainedModel) -> None:
    """Raise MassError for an architecture whose logits are not made as `logits` makes them (a scale that we do not know,
    say), or whose attention does not take restarting position ids for the borders of packed sequences.
    """
    sorry = "Models of the Llama, Qwen, Gemma, Mistral and GPT-NeoX families work."
    device = next(hf.parameters()).device
    # Two sequences in one row; the second would see the first where only the causal mask holds. Tokens from all over the
    # vocabulary: the special ones at its front were hardly trained, and in bf16 what a model makes of them can be all rounding.
    vocabulary = hf.config.get_text_config().vocab_size
    tokens = torch.tensor([[vocabulary * i // 9 for i in range(1, 9)]], device=device)
    other = torch.cat([tokens[:, :4].flip(1), tokens[:, 4:]], 1)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]], device=device)
    packed = {"position_ids": positions, "use_cache": False}
    with torch.no_grad():
        try:
            ours, moved = (
                logits(hf, hf.base_model(x, **packed).last_hidden_state[0]) for x in (tokens, other)
            )
            theirs = hf(tokens, **packed).logits[0].to(ours.dtype)
            alone = [hf(tokens[:, i : i + 4], use_cache=False).logits[0] for i in (0, 4)]
            whole = torch.cat(alone).to(ours.dtype)
        except Exception as error:  # whatever an unknown architecture may do with arguments it has not
            raise MassError(f"model.path: {type(hf).__name__} cannot be driven ({error}). {sorry}") from error
    scale = whole.abs().max().item()
    if not torch.allclose(theirs, ours, rtol=0, atol=2e-2 * scale):
        raise MassError(
            f"model.path: {type(hf).__name__} makes its logits in a way that mass does not know. {sorry}"
        )
    # What is said of the second sequence does not depend on the first at all; beside the same sequence alone it may be rounded
    # otherwise, since the products have other sizes: by 4 % of the scale in bf16.
    if not torch.allclose(moved[4:], ours[4:], rtol=0, atol=1e-3 * scale) or not torch.allclose(
        whole, ours, rtol=0, atol=(0.1 if hf.dtype == torch.bfloat16 else 2e-2) * scale
    ):
        raise MassError(
            f"model.path: {type(hf).__name__} mixes sequences that are packed into one row. {sorry}"
        )


def token_logprobs(
    hf: PreTrainedModel,
    layers: Layers,
    packed: Packed,
    adapter: Adapter | None,
    *,
    second_order: bool = False,
) -> Tensor:
    """log p(target token), [M], differentiable in the adapter. `second_order`: twice, with every activation kept."""
    with using(layers, adapter), second_order_ops(packed) if second_order else tiled(packed):
        hidden_BSD = _body(hf, packed)
    hidden_MD = hidden_BSD.flatten(0, 1)[packed.place_M]
    if second_order:
        return pick(logits(hf, hidden_MD), packed.label_M)
    return _Head.apply(hidden_MD, packed.label_M, hf, None, False)[0]


def reference_states(hf: PreTrainedModel, layers: Layers, packed: Packed, adapter: Adapter | None) -> Tensor:
    """What the head reads at each target token, [M, D], without a graph: a reference policy, kept small (the head has no
    adapter, so the logits follow from it). `adapter` None: the base model."""
    with torch.no_grad(), using(layers, adapter), tiled(packed):
        return _body(hf, packed).flatten(0, 1)[packed.place_M]


def token_values(
    hf: PreTrainedModel,
    layers: Layers,
    packed: Packed,
    adapter: Adapter | None,
    *,
    reference_MD: Tensor | None = None,
    entropy: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """log p(target token), and of the whole distribution that the token comes from KL(p || reference) and the entropy, in nats,
    [M] each, once differentiable. None what is not asked for. `reference_MD`: `reference_states` on the same batch."""
    with using(layers, adapter), tiled(packed):
        hidden_MD = _body(hf, packed).flatten(0, 1)[packed.place_M]
    found = list(_Head.apply(hidden_MD, packed.label_M, hf, reference_MD, entropy))
    entropy_M = found.pop() if entropy else None
    kl_M = found.pop() if reference_MD is not None else None
    return found.pop(), kl_M, entropy_M


def example_loss(packed: Packed, logprob_M: Tensor) -> Tensor:
    """Mean cross-entropy of each example's target tokens, [T, N]; 0 where an example has none."""
    return -packed.mean_by_example(logprob_M)


# of log-probabilities [M]; where there is a reference, of them and of the divergences from it [M]
Loss = Callable[..., Tensor]


def loss_and_grad(
    hf: PreTrainedModel,
    layers: Layers,
    packed: Packed,
    adapter: Adapter,
    loss: Loss,
    *,
    reference_MD: Tensor | None = None,
    parts: Split | None = None,
) -> tuple[Tensor, Tensor, Adapter]:
    """`loss(logprob_M)` (a scalar), the log-probabilities, and the loss's gradient by the adapter.

    `reference_MD`: `reference_states` on the same batch; then it is `loss(logprob_M, kl_M)`, with the KL divergence in nats of
    the whole next-token distribution from the reference's at each target token.
    `parts`: recompute block by block (the memory of one block's activations, half as much time again).
    """
    if packed.label_M.numel() == 0:
        nothing = torch.zeros(0, device=packed.label_M.device)
        value = loss(nothing) if reference_MD is None else loss(nothing, nothing)
        return value.detach(), nothing, {key: torch.zeros_like(x) for key, x in adapter.items()}
    if parts is not None:
        return _blockwise(hf, parts, packed, adapter, loss, reference_MD)
    leaf = {key: tensor.detach().requires_grad_() for key, tensor in adapter.items()}
    logprob_M, kl_M, _ = token_values(hf, layers, packed, leaf, reference_MD=reference_MD)
    value = loss(logprob_M) if kl_M is None else loss(logprob_M, kl_M)
    grads = torch.autograd.grad(value, list(leaf.values()), allow_unused=True, materialize_grads=True)
    return value.detach(), logprob_M.detach(), dict(zip(leaf, grads, strict=True))


def chunk_rows(hf: PreTrainedModel) -> int:
    """How many target tokens have logits at one time: by the device of the model, or of the one that it is a copy of."""
    return CHUNK_ROWS.get(getattr(hf, "stands_for", hf.device.type), CHUNK_ROWS["cuda"])


def head_rows(
    hf: PreTrainedModel,
    hidden_MD: Tensor,
    label_M: Tensor,
    reference_MD: Tensor | None = None,
    *,
    entropy: bool = False,
    derive: bool = True,
) -> tuple[list[Tensor], list[Tensor]]:
    """What each row's logits say, [M] each, and the derivatives by that row's hidden state J_MD (none without `derive`).

    In this order: log p(label), KL(p || reference) where there is one, the entropy if asked for. A chunk of logits at a time.
    """
    size = chunk_rows(hf)
    labels = label_M.split(size)
    references = [None] * len(labels) if reference_MD is None else reference_MD.split(size)
    chunks = [
        _head_chunk(hf, *chunk, entropy, derive)
        for chunk in zip(hidden_MD.detach().split(size), labels, references, strict=True)
    ]
    values, jacobians = (
        [torch.cat(own) for own in zip(*side, strict=True)] for side in zip(*chunks, strict=True)
    )
    return values, jacobians


def _head_chunk(
    hf: PreTrainedModel,
    hidden_MD: Tensor,
    label_M: Tensor,
    reference_MD: Tensor | None,
    entropy: bool,
    derive: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    values: list[Tensor] = []
    jacobians: list[Tensor] = []
    with torch.set_grad_enabled(derive):
        hidden_MD.requires_grad_(derive)
        for value_M in _read(hf, logits(hf, hidden_MD), label_M, reference_MD, entropy):
            if derive:
                # one derivative before the next value is made: fewer tensors as large as the logits at one time
                jacobians += torch.autograd.grad(value_M.sum(), hidden_MD, retain_graph=True)
            values.append(value_M.detach())
    return values, jacobians


def _read(
    hf: PreTrainedModel, logits_MV: Tensor, label_M: Tensor, reference_MD: Tensor | None, entropy: bool
) -> Iterator[Tensor]:
    yield pick(logits_MV, label_M)
    if reference_MD is not None:
        yield divergence(logits_MV, logits(hf, reference_MD))
    if entropy:
        logprob_MV = logits_MV.log_softmax(1)
        yield -(logprob_MV.exp() * logprob_MV).sum(1)


class _Head(torch.autograd.Function):
    """Head and log-softmax as one function that keeps a J_MD of each value instead of logits. Once differentiable."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx,
        hidden_MD: Tensor,
        label_M: Tensor,
        hf: PreTrainedModel,
        reference_MD: Tensor | None,
        entropy: bool,
    ) -> tuple[Tensor, ...]:
        derive = hidden_MD.requires_grad
        values, jacobians = head_rows(hf, hidden_MD, label_M, reference_MD, entropy=entropy, derive=derive)
        ctx.save_for_backward(*jacobians)
        return tuple(values)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *shares: Tensor):  # type: ignore[no-untyped-def]
        return _pull(shares, ctx.saved_tensors), None, None, None, None


def _pull(shares: Sequence[Tensor], jacobians: Sequence[Tensor]) -> Tensor:
    """A loss's derivative by the rows' hidden states [M, D], from those by the values that `head_rows` gives."""
    parts = [x.unsqueeze(1) * j.to(x.dtype) for x, j in zip(shares, jacobians, strict=True)]
    return reduce(torch.add, parts).to(jacobians[0].dtype)


def pick(logits_MV: Tensor, label_M: Tensor) -> Tensor:
    return logits_MV.gather(1, label_M.unsqueeze(1)).squeeze(1) - logits_MV.logsumexp(1)


def divergence(logits_MV: Tensor, reference_MV: Tensor) -> Tensor:
    """KL(p || q) = sum_v p(v) (log p(v) - log q(v)) in nats of two rows of logits, [M]; once differentiable, by p's."""
    with torch.no_grad():
        # its derivative adds nothing, sum_v p d(log p) = d(sum_v p) = 0, so it is a constant that takes no graph
        gap_MV = logits_MV.log_softmax(1) - reference_MV.log_softmax(1)
    return (logits_MV.softmax(1) * gap_MV).sum(1)


def _body(hf: PreTrainedModel, packed: Packed) -> Tensor:
    out = hf.base_model(**model_inputs(hf, packed), use_cache=False)
    return out.last_hidden_state


def _blockwise(
    hf: PreTrainedModel,
    parts: Split,
    packed: Packed,
    adapter: Adapter,
    loss: Loss,
    reference_MD: Tensor | None,
) -> tuple[Tensor, Tensor, Adapter]:
    call = enter(parts, packed)
    adapter = {key: tensor.detach() for key, tensor in adapter.items()}
    first = lowest(parts)
    kept = []
    hidden = call.hidden_BSD
    tile = tiled(packed)
    with torch.no_grad():
        for i in range(len(parts.blocks)):
            if i >= first:
                kept.append(hidden)
            with tile:
                hidden = run_block(parts, call, i, hidden, of_block(parts, i, adapter))
    with torch.enable_grad():
        last = hidden.requires_grad_()
        rows_MD = parts.norm(last).flatten(0, 1)[packed.place_M]
        values, jacobians = head_rows(hf, rows_MD, packed.label_M, reference_MD)
        value = loss(*(x.requires_grad_() for x in values))
        shares = torch.autograd.grad(value, values, allow_unused=True, materialize_grads=True)
        back_MD = _pull(shares, jacobians).to(rows_MD.dtype)
        (back,) = torch.autograd.grad(rows_MD, last, back_MD)
    del last, rows_MD, back_MD, jacobians, hidden
    grads: Adapter = {}
    for i in reversed(range(first, len(parts.blocks))):
        inputs = {key: tensor.requires_grad_() for key, tensor in of_block(parts, i, adapter).items()}
        with torch.enable_grad():
            hidden = kept.pop().detach().requires_grad_(i > first)
            with tile:
                out = run_block(parts, call, i, hidden, inputs)
            wanted = [*inputs.values(), *([hidden] if i > first else [])]
            got = (
                torch.autograd.grad(out, wanted, back, allow_unused=True, materialize_grads=True)
                if wanted
                else ()
            )
        grads |= dict(zip(inputs, got, strict=False))
        back = got[-1] if i > first else back
        del out, hidden
    return value.detach(), values[0].detach(), {key: grads[key].detach() for key in adapter}
