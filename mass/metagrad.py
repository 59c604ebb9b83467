"""Exact meta-gradients of an inner loop by an adjoint sweep. The only module that knows second order.

Given lam = dL/dphi_K, for k = K-1 .. 0 the cotangent is pulled through the optimizer's pure update (`torch.func.vjp`, no
model inside) to mu, the cotangent of the inner gradient; then the model supplies two products,

    c_i = <grad l_i(phi_k), mu>  for every example i,      H mu  with H the Hessian of sum_i w_i l_i / N,

and dL/dw_i += c_i / N, lam <- (direct part) + H mu. Each step is recomputed from the stored (phi_k, state_k, grad_k), so
memory does not grow with K. The engines differ only in how they make the two products:

reverse            create_graph on the step (reverse over reverse), recomputed or recorded; any model with a double backward
blockwise          reverse over forward, one decoder block at a time; exact, in less memory than a first-order gradient
finite_difference  two first-order gradients at phi_k +- eps mu; any model at all, relative error about 1e-3 in fp32

Sources: the sweep is the discrete adjoint (REPLAY, arXiv 2503.13751, without its tree, since K is small); mixed mode after
MixFlow-MG, arXiv 2505.00793; finite differences after DARTS, arXiv 1806.09055, and SAMA, arXiv 2310.05674.
Losses, weights and cotangents of the T tasks never mix, so T tasks cost one sweep.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mass import optimizers
from mass.batch import Packed
from mass.blocks import Split, enter, lowest, of_block, run_block, second_order
from mass.forward import chunk_rows, example_loss, logits, loss_and_grad, pick, token_logprobs
from mass.inner import Step, Trajectory
from mass.lora import Adapter, Layers
from mass.optimizers import Tensors

# (step, mu, need_hessian) -> c_TN and, when asked for, H mu
Products = Callable[[Step, Adapter, bool], tuple[Tensor, Adapter | None]]


@dataclass(frozen=True)
class MetaGradient:
    """dL/dw [T, N]; dL/dphi_0 [T, ...] when asked for; dL/d(inner lr), a 0-d tensor an adapter key, when asked for."""

    weight_TN: Tensor
    init: Adapter | None
    lr: dict[str, Tensor] | None


def sweep(
    products: Products,
    trajectory: Trajectory,
    outer_grad: Adapter,
    *,
    need_init: bool = False,
    need_lr: bool = False,
    last_steps: int | None = None,
    drop_T: Tensor | None = None,
) -> MetaGradient:
    """Pull `outer_grad` = dL/dphi_K back through the inner loop.

    `drop_T`: tasks without a gradient, whatever of their way is not finite; `outer_grad` is zero there.

    `last_steps` = J differentiates the last J steps only (truncation; then the initial adapter has no gradient and
    `need_init` is refused). The Hessian product of the first step differentiated is made only when `need_init`.
    """
    steps = trajectory.steps
    dropped = drop_T is not None and bool(drop_T.any())

    def kept(tensors: Tensors) -> Tensors:
        """With zeros for the tasks that are dropped: rates are added up over tasks, and NaN times zero is NaN."""
        if drop_T is None or not dropped:
            return tensors
        return {key: x.masked_fill(drop_T.view(-1, *[1] * (x.dim() - 1)), 0.0) for key, x in tensors.items()}

    first = 0 if last_steps is None else max(0, len(steps) - last_steps)
    if need_init and first > 0:
        raise ValueError(
            "need_init with truncation: the initial adapter lies before the steps that are differentiated"
        )
    if need_lr and any(step.grad is None for step in steps[first:]):
        raise ValueError("need_lr wants the gradients of the inner steps: inner.adapt(keep_grads=True)")
    lam: Tensors = dict(outer_grad)
    nu = {key: torch.zeros_like(x) for key, x in optimizers.init(trajectory.rule, lam).items()}
    weight_TN: Tensor | None = None
    lr = {key: torch.zeros_like(x) for key, x in trajectory.lr.items()}
    for k in reversed(range(first, len(steps))):
        step = steps[k]
        rule, taken = trajectory.rule, step.grad
        if taken is None:
            # not kept, so it was not clipped and any other does
            rule, taken = (
                replace(rule, clip=None),
                {key: x.new_zeros(()).expand_as(x) for key, x in lam.items()},
            )

        def one(
            grad: Tensors,
            state: Tensors,
            adapter: Tensors,
            lr: Tensors,
            k: int = k,
            rule: optimizers.Rule = rule,
        ) -> tuple[Tensors, Tensors]:
            return optimizers.update(rule, k, grad, state, adapter, lr)

        _, pull, *_ = torch.func.vjp(one, kept(taken), kept(step.state), kept(step.adapter), trajectory.lr)
        mu, nu, lam, lr_k = pull((lam, nu))
        lr = {key: lr[key] + lr_k[key] for key in lr}
        c_TN, curve = products(step, mu, need_init or k > first)
        weight_TN = c_TN if weight_TN is None else weight_TN + c_TN
        if curve is not None:
            curve = kept(curve)
            lam = {key: lam[key] + curve[key] for key in lam}
    assert weight_TN is not None
    weight_TN = kept({"": weight_TN})[""]
    n = weight_TN.shape[1]
    return MetaGradient(weight_TN / n, lam if need_init else None, lr if need_lr else None)


# Steps whose graph `reverse` keeps from the inner loop on: with K = 1 and 2, the usual ones, nothing is done twice.
RECORDED = 2


def recorded(steps: int, truncate: int | None = None) -> int:
    """How many of K steps `reverse` records: of those that the way back takes, the last."""
    return min(steps, truncate or steps, RECORDED)


class Reverse:
    """Reverse over reverse. The last steps can be taken by `record`, which keeps their second-order graph for the sweep;
    the graph of any other step is made again, one at a time."""

    def __init__(self, hf: PreTrainedModel, layers: Layers, packed: Packed, weight_TN: Tensor) -> None:
        self._model = hf, layers, packed
        self._weight_TN = weight_TN
        self._kept: list[_Graph] = []

    def record(self, adapter: Adapter) -> tuple[Tensor, Adapter]:
        """The inner step's losses [T, N] and gradient, as `inner.Gradient`; its graph is kept until it is used."""
        self._kept.append(self._graph(adapter))
        graph = self._kept[-1]
        return graph.loss_TN.detach(), graph.taken

    def __call__(self, step: Step, mu: Adapter, need_hessian: bool) -> tuple[Tensor, Adapter | None]:
        """The two products of a step (`Products`). The sweep asks for recorded steps in the order last to first."""
        recorded = bool(self._kept) and self._kept[-1].taken is step.grad
        graph = self._kept.pop() if recorded else self._graph(step.adapter)
        inner = torch.stack([(g * mu[key]).sum() for key, g in graph.grad.items()]).sum()
        wanted = [graph.weight_TN, *(graph.adapter.values() if need_hessian else ())]
        c_TN, *curve = torch.autograd.grad(inner, wanted, materialize_grads=True)
        c_TN = c_TN * c_TN.shape[1]
        return c_TN, dict(zip(graph.adapter, curve, strict=True)) if need_hessian else None

    def _graph(self, adapter: Adapter) -> "_Graph":
        hf, layers, packed = self._model
        leaf = {key: tensor.detach().requires_grad_() for key, tensor in adapter.items()}
        weight = self._weight_TN.detach().requires_grad_()
        with torch.enable_grad():
            loss_TN = example_loss(packed, token_logprobs(hf, layers, packed, leaf, second_order=True))
            total = (weight * loss_TN).sum() / weight.shape[1]
            grads = torch.autograd.grad(total, list(leaf.values()), create_graph=True, materialize_grads=True)
        grad = dict(zip(leaf, grads, strict=True))
        return _Graph(leaf, weight, loss_TN, grad, {key: g.detach() for key, g in grad.items()})


@dataclass(frozen=True)
class _Graph:
    """One inner step with its second-order graph: from the leaves `adapter` and `weight_TN` to `grad`. `taken`: the
    gradient's numbers, by which the step is known again."""

    adapter: Adapter
    weight_TN: Tensor
    loss_TN: Tensor
    grad: Adapter
    taken: Adapter


def blockwise(
    hf: PreTrainedModel, parts: Split, packed: Packed, weight_TN: Tensor, *, recompute: bool = True
) -> Products:
    """Reverse over forward: each block as a function of dual numbers (h, phi_l) + (dh, mu_l).

    The tangent of the loss along mu is c; the ordinary gradient of the weighted tangent is H mu. With `recompute` a
    block's dual activations live only while its own backward runs; without, all are kept and nothing is done twice.
    """

    def dual(call, i, pair, adapter, mu):  # type: ignore[no-untyped-def]
        own, own_mu = of_block(parts, i, adapter), of_block(parts, i, mu)
        return torch.func.jvp(lambda h, a: run_block(parts, call, i, h, a), (pair[0], own), (pair[1], own_mu))

    def products(step: Step, mu: Adapter, need_hessian: bool) -> tuple[Tensor, Adapter | None]:
        keep = need_hessian and not recompute
        adapter = {key: tensor.detach().requires_grad_(keep) for key, tensor in step.adapter.items()}
        call = enter(parts, packed)
        first = lowest(parts)
        kept: list[tuple[Tensor, Tensor]] = []
        with second_order(packed):
            hidden = call.hidden_BSD
            with torch.no_grad():
                # no adapter, no tangent
                for i in range(first):
                    hidden = run_block(parts, call, i, hidden, {})
            pair = (hidden, torch.zeros_like(hidden))
            with torch.set_grad_enabled(keep):
                for i in range(first, len(parts.blocks)):
                    if need_hessian and recompute:
                        kept.append(pair)
                    pair = dual(call, i, pair, adapter, mu)
            tops = tuple(x.detach().requires_grad_() for x in pair)
            with torch.enable_grad():
                rows = torch.func.jvp(
                    lambda h: parts.norm(h).flatten(0, 1)[packed.place_M], tops[:1], tops[1:]
                )
            tangent_M, first_MD, second_MD = _head_rows_dual(
                hf, rows[0], rows[1], packed.label_M, need_hessian
            )
            c_TN = -packed.mean_by_example(tangent_M)
            if not need_hessian:
                return c_TN, None
            share_M = -packed.spread(weight_TN.to(tangent_M.dtype)) / weight_TN.shape[1]
            back_rows = [
                (share_M.unsqueeze(1) * x.to(share_M.dtype)).to(x.dtype) for x in (second_MD, first_MD)
            ]
            back = torch.autograd.grad(rows, tops, back_rows)
            del rows, tops, first_MD, second_MD
            if keep:
                got = torch.autograd.grad(pair, list(adapter.values()), back, materialize_grads=True)
                return c_TN, dict(zip(adapter, got, strict=True))
            curve: Adapter = {}
            for i in reversed(range(first, len(parts.blocks))):
                own = {key: tensor.requires_grad_() for key, tensor in of_block(parts, i, adapter).items()}
                with torch.enable_grad():
                    h, dh = kept.pop()
                    pair = (h.detach().requires_grad_(i > first), dh.detach().requires_grad_(i > first))
                    out = dual(call, i, pair, own, mu)
                    wanted = [*own.values(), *(pair if i > first else ())]
                    got = torch.autograd.grad(out, wanted, back, materialize_grads=True) if wanted else ()
                curve |= dict(zip(own, got, strict=False))
                back = got[len(own) :] if i > first else back
                del out
            return c_TN, {key: curve[key] for key in adapter}

    return products


def finite_difference(
    hf: PreTrainedModel,
    layers: Layers,
    packed: Packed,
    weight_TN: Tensor,
    *,
    parts: Split | None = None,
    central: bool = True,
    radius: float | None = None,
) -> Products:
    """Differences of first-order passes at phi_k +- eps mu, eps of each task from norms: eps = radius (1 + |phi|) / |mu|.

    Central: error O(eps^2), two passes. One-sided (`central=False`): error O(eps), one pass, against the stored
    gradient. `radius` defaults to the cube root (central) or square root of the base's machine epsilon. Relative
    error seen: 7e-3 in fp32; with a bf16 base 7 to 20 % (central), and one-sided is of no use there.
    """

    def total(loss: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda logprob_M: (weight_TN * loss(logprob_M)).sum() / weight_TN.shape[1]

    def products(step: Step, mu: Adapter, need_hessian: bool) -> tuple[Tensor, Adapter | None]:
        some = next(iter(step.adapter.values()))
        # What a difference of two losses must rise above is the rounding of the base, not of the adapter.
        dtype = next(hf.parameters()).dtype
        reach = radius
        if reach is None and dtype == torch.bfloat16:
            # Measured: the rule below steps out of the range in which a network is smooth.
            reach = 0.03 if central else 0.01
        elif reach is None:
            reach = torch.finfo(dtype).eps ** (1 / 3 if central else 1 / 2)
        size_T = optimizers.norm(mu)
        eps_T = torch.where(
            size_T > 0, reach * (1 + optimizers.norm(step.adapter)) / size_T.clamp(min=1e-300), 0.0
        )
        eps_T = eps_T.to(some.dtype)

        def shifted(sign: int) -> tuple[Tensor, Adapter]:
            place = {key: x + sign * eps_T.view(-1, 1, 1) * mu[key] for key, x in step.adapter.items()}
            if not need_hessian:
                with torch.no_grad():
                    return example_loss(packed, token_logprobs(hf, layers, packed, place)), {}
            loss = total(lambda logprob_M: example_loss(packed, logprob_M))
            _, logprob_M, grad = loss_and_grad(hf, layers, packed, place, loss, parts=parts)
            return example_loss(packed, logprob_M), grad

        if not central and need_hessian and step.grad is None:
            raise ValueError(
                "one-sided differences want the gradients of the inner steps: inner.adapt(keep_grads=True)"
            )
        loss_up, grad_up = shifted(+1)
        loss_down, grad_down = shifted(-1) if central else (step.loss_TN, step.grad or {})
        width_T = torch.where(eps_T > 0, (2 if central else 1) * eps_T, 1.0)
        c_TN = (loss_up - loss_down) / width_T.unsqueeze(1)
        if not need_hessian:
            return c_TN, None
        return c_TN, {key: (grad_up[key] - grad_down[key]) / width_T.view(-1, 1, 1) for key in mu}

    return products


def _head_rows_dual(
    hf: PreTrainedModel, hidden_MD: Tensor, tangent_MD: Tensor, label_M: Tensor, need_hessian: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Tangent of log p(label) [M]; its derivatives by the tangent (J_MD) and by the hidden state (J' dh, [M, D])."""
    tangents, first, second = [], [], []
    chunks = (x.detach().split(chunk_rows(hf)) for x in (hidden_MD, tangent_MD, label_M))
    for h, dh, label in zip(*chunks, strict=True):
        with torch.set_grad_enabled(need_hessian):
            h, dh = h.requires_grad_(need_hessian), dh.requires_grad_(need_hessian)
            _, tangent_M, *_ = torch.func.jvp(lambda x, label=label: pick(logits(hf, x), label), (h,), (dh,))
            if need_hessian:
                by_h, by_dh = torch.autograd.grad(tangent_M.sum(), (h, dh), materialize_grads=True)
                first.append(by_dh)
                second.append(by_h)
        tangents.append(tangent_M.detach())
    if not need_hessian:
        return torch.cat(tangents), hidden_MD, hidden_MD
    return torch.cat(tangents), torch.cat(first), torch.cat(second)
