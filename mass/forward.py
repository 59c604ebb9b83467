"""Log-probabilities of target tokens, and first-order gradients of losses made of them.

Two routes to the same numbers: `plain` lets autograd keep every activation; with a `Split` the blocks are recomputed one
by one in the backward pass, so that a gradient holds one block's activations. Logits exist for one chunk of target
tokens at a time: a token's log-probability depends on its own hidden state alone, so its derivative J_MD (the size of
the hidden states) is taken at once and the vocabulary is never kept.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mass.batch import Packed
from mass.blocks import Split, enter, model_inputs, of_block, run_block, tiled
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
    # Two sequences in one row; the second would see the first where only the causal mask holds.
    tokens = torch.tensor([[1, 2, 3, 4, 5, 3, 2, 1]], device=device)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]], device=device)
    with torch.no_grad():
        try:
            out = hf.base_model(input_ids=tokens, position_ids=positions, use_cache=False)
            ours = logits(hf, out.last_hidden_state[0])
            alone = [hf(input_ids=tokens[:, i : i + 4], use_cache=False).logits[0] for i in (0, 4)]
            whole = torch.cat(alone).to(ours.dtype)
        except Exception as error:  # whatever an unknown architecture may do with arguments it has not
            raise MassError(f"model.path: {type(hf).__name__} cannot be driven ({error}). {sorry}") from error
    scale = whole.abs().max().item()
    if not torch.allclose(whole[:4], ours[:4], rtol=0, atol=2e-2 * scale):
        raise MassError(
            f"model.path: {type(hf).__name__} makes its logits in a way that mass does not know. {sorry}"
        )
    if not torch.allclose(whole[4:], ours[4:], rtol=0, atol=2e-2 * scale):
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
    return _HeadLogprob.apply(hidden_MD, packed.label_M, hf)


def logprobs_and_entropies(
    hf: PreTrainedModel, layers: Layers, packed: Packed, adapter: Adapter | None
) -> tuple[Tensor, Tensor]:
    """log p(target token) and the entropy in nats of the distribution it comes from, [M] each, once differentiable."""
    with using(layers, adapter), tiled(packed):
        hidden_MD = _body(hf, packed).flatten(0, 1)[packed.place_M]
    return _HeadLogprob.apply(hidden_MD, packed.label_M, hf), _HeadEntropy.apply(hidden_MD, hf)


def example_loss(packed: Packed, logprob_M: Tensor) -> Tensor:
    """Mean cross-entropy of each example's target tokens, [T, N]; 0 where an example has none."""
    return -packed.mean_by_example(logprob_M)


Loss = Callable[[Tensor], Tensor]


def loss_and_grad(
    hf: PreTrainedModel,
    layers: Layers,
    packed: Packed,
    adapter: Adapter,
    loss: Loss,
    *,
    parts: Split | None = None,
) -> tuple[Tensor, Tensor, Adapter]:
    """`loss(logprob_M)` (a scalar), the log-probabilities, and the loss's gradient by the adapter.

    `parts`: recompute block by block (the memory of one block's activations, half as much time again).
    """
    if packed.label_M.numel() == 0:
        nothing = torch.zeros(0, device=packed.label_M.device)
        return loss(nothing).detach(), nothing, {key: torch.zeros_like(x) for key, x in adapter.items()}
    if parts is not None:
        return _blockwise(hf, parts, packed, adapter, loss)
    leaf = {key: tensor.detach().requires_grad_() for key, tensor in adapter.items()}
    logprob_M = token_logprobs(hf, layers, packed, leaf)
    value = loss(logprob_M)
    grads = torch.autograd.grad(value, list(leaf.values()), allow_unused=True, materialize_grads=True)
    return value.detach(), logprob_M.detach(), dict(zip(leaf, grads, strict=True))


def chunk_rows(hf: PreTrainedModel) -> int:
    """How many target tokens have logits at one time."""
    return CHUNK_ROWS.get(hf.device.type, CHUNK_ROWS["cuda"])


def head_rows(hf: PreTrainedModel, hidden_MD: Tensor, label_M: Tensor) -> tuple[Tensor, Tensor]:
    """log p(label) of each row [M] and its derivative by that row's hidden state J_MD, a chunk of logits at a time."""
    logprobs, jacobians = [], []
    size = chunk_rows(hf)
    for h, label in zip(hidden_MD.detach().split(size), label_M.split(size), strict=True):
        with torch.enable_grad():
            h = h.requires_grad_()
            logprob = pick(logits(hf, h), label)
            (j,) = torch.autograd.grad(logprob.sum(), h)
        logprobs.append(logprob.detach())
        jacobians.append(j)
    return torch.cat(logprobs), torch.cat(jacobians)


class _HeadLogprob(torch.autograd.Function):
    """Head and log-softmax as one function that keeps J_MD instead of logits. Once differentiable."""

    @staticmethod
    def forward(ctx, hidden_MD: Tensor, label_M: Tensor, hf: PreTrainedModel) -> Tensor:  # type: ignore[no-untyped-def]
        if not hidden_MD.requires_grad:
            size = chunk_rows(hf)
            parts = zip(hidden_MD.split(size), label_M.split(size), strict=True)
            return torch.cat([pick(logits(hf, h), label) for h, label in parts])
        logprob_M, jacobian_MD = head_rows(hf, hidden_MD, label_M)
        ctx.save_for_backward(jacobian_MD)
        return logprob_M

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_M: Tensor):  # type: ignore[no-untyped-def]
        (jacobian_MD,) = ctx.saved_tensors
        return (grad_M.unsqueeze(1) * jacobian_MD.to(grad_M.dtype)).to(jacobian_MD.dtype), None, None


class _HeadEntropy(torch.autograd.Function):
    """The same for the entropy of each row's distribution."""

    @staticmethod
    def forward(ctx, hidden_MD: Tensor, hf: PreTrainedModel) -> Tensor:  # type: ignore[no-untyped-def]
        entropies, jacobians = [], []
        for h in hidden_MD.detach().split(chunk_rows(hf)):
            with torch.enable_grad():
                h = h.requires_grad_()
                logprob_MV = logits(hf, h).log_softmax(1)
                entropy = -(logprob_MV.exp() * logprob_MV).sum(1)
                (j,) = torch.autograd.grad(entropy.sum(), h)
            entropies.append(entropy.detach())
            jacobians.append(j)
        ctx.save_for_backward(torch.cat(jacobians))
        return torch.cat(entropies)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_M: Tensor):  # type: ignore[no-untyped-def]
        (jacobian_MD,) = ctx.saved_tensors
        return (grad_M.unsqueeze(1) * jacobian_MD.to(grad_M.dtype)).to(jacobian_MD.dtype), None


def pick(logits_MV: Tensor, label_M: Tensor) -> Tensor:
    return logits_MV.gather(1, label_M.unsqueeze(1)).squeeze(1) - logits_MV.logsumexp(1)


def _body(hf: PreTrainedModel, packed: Packed) -> Tensor:
    out = hf.base_model(**model_inputs(hf, packed), use_cache=False)
    return out.last_hidden_state


def _blockwise(
    hf: PreTrainedModel, parts: Split, packed: Packed, adapter: Adapter, loss: Loss
) -> tuple[Tensor, Tensor, Adapter]:
    call = enter(parts, packed)
    adapter = {key: tensor.detach() for key, tensor in adapter.items()}
    kept = []
    hidden = call.hidden_BSD
    tile = tiled(packed)
    with torch.no_grad():
        for i in range(len(parts.blocks)):
            kept.append(hidden)
            with tile:
                hidden = run_block(parts, call, i, hidden, of_block(parts, i, adapter))
    with torch.enable_grad():
        last = hidden.requires_grad_()
        rows_MD = parts.norm(last).flatten(0, 1)[packed.place_M]
        logprob_M, jacobian_MD = head_rows(hf, rows_MD, packed.label_M)
        logprob_M.requires_grad_()
        value = loss(logprob_M)
        (share_M,) = torch.autograd.grad(value, logprob_M, materialize_grads=True)
        back_MD = (share_M.unsqueeze(1) * jacobian_MD.to(share_M.dtype)).to(rows_MD.dtype)
        (back,) = torch.autograd.grad(rows_MD, last, back_MD)
    del last, rows_MD, jacobian_MD, hidden
    grads: Adapter = {}
    for i in reversed(range(len(parts.blocks))):
        inputs = {key: tensor.requires_grad_() for key, tensor in of_block(parts, i, adapter).items()}
        with torch.enable_grad():
            hidden = kept.pop().detach().requires_grad_(i > 0)
            with tile:
                out = run_block(parts, call, i, hidden, inputs)
            wanted = [*inputs.values(), *([hidden] if i > 0 else [])]
            got = (
                torch.autograd.grad(out, wanted, back, allow_unused=True, materialize_grads=True)
                if wanted
                else ()
            )
        grads |= dict(zip(inputs, got, strict=False))
        back = got[-1] if i > 0 else back
        del out, hidden
    return value.detach(), logprob_M.detach(), {key: grads[key].detach() for key in adapter}
