"""Inner optimizers as pure functions on dicts of tensors with a leading task axis.

`init(rule, params) -> state` and `update(rule, k, grad, state, params, lr) -> (params, state)`, after optax's pair.
They know nothing of models or of how they are differentiated: `torch.func.vjp` of `update` is the optimizer's whole part
in a meta-gradient. Step by step they equal `torch.optim.SGD` and `torch.optim.Adam` (weight decay 0).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Rule:
    """One inner optimizer. Everything but the learning rate, which may itself be learned."""

    kind: Literal["sgd", "adam"] = "sgd"
    momentum: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    # A constant under Adam's root: without it the derivative of sqrt(v) at v = 0 is infinite, and a cold first step
    # g / |g| does not depend on the example weights (optax `eps_root`; arXiv 2503.13751 section 4).
    eps_root: float = 0.0
    # Largest gradient norm of one task over all its adapter tensors; None: no clip.
    clip: float | None = None


def init(rule: Rule, params: Mapping[str, Tensor]) -> Tensors:
    """The state before the first step: zeros under `"m:<key>"` (and `"v:<key>"` for Adam), shapes of `params`."""
    kinds = {"sgd": ["m"] if rule.momentum else [], "adam": ["m", "v"]}[rule.kind]
    return {f"{kind}:{key}": torch.zeros_like(value) for key, value in params.items() for kind in kinds}


def update(
    rule: Rule, k: int, grad: Tensors, state: Tensors, params: Tensors, lr: Mapping[str, Tensor]
) -> tuple[Tensors, Tensors]:
    """Step k (from 0). `lr` holds one 0-d tensor a key. Differentiable in every tensor, twice, also at zero gradients."""
    grad = clip(grad, rule.clip)
    fresh: Tensors = {}
    after: Tensors = {}
    for key, p in params.items():
        g = grad[key]
        if rule.kind == "sgd":
            if rule.momentum:
                g = fresh[f"m:{key}"] = rule.momentum * state[f"m:{key}"] + g
            after[key] = p - lr[key] * g
        else:
            m = fresh[f"m:{key}"] = rule.beta1 * state[f"m:{key}"] + (1 - rule.beta1) * g
            v = fresh[f"v:{key}"] = rule.beta2 * state[f"v:{key}"] + (1 - rule.beta2) * g * g
            m_hat = m / (1 - rule.beta1 ** (k + 1))
            v_hat = v / (1 - rule.beta2 ** (k + 1))
            after[key] = p - lr[key] * m_hat / (_root(v_hat + rule.eps_root) + rule.eps)
    return after, fresh


def clip(grad: Tensors, limit: float | None) -> Tensors:
    """Scale each task's gradient to norm `limit` at most, as `torch.nn.utils.clip_grad_norm_` does for one task."""
    if limit is None:
        return grad
    scale_T = _scale(grad, limit).clamp(max=1.0)
    return {key: g * scale_T.view(-1, *[1] * (g.dim() - 1)) for key, g in grad.items()}


def cut(rule: Rule, grad: Tensors) -> Tensor:
    """True [T] where the rule clips that task's gradient (or stands where it begins to)."""
    if rule.clip is None:
        some = next(iter(grad.values()))
        return torch.zeros(len(some), dtype=torch.bool, device=some.device)
    return _scale(grad, rule.clip) <= 1


def _scale(grad: Mapping[str, Tensor], limit: float) -> Tensor:
    return limit / (norm(grad) + 1e-6)


def is_plain(rule: Rule) -> bool:
    """True for SGD without momentum: where nothing is clipped, a step's derivative is the same at any gradient."""
    return rule.kind == "sgd" and not rule.momentum


def norm(tensors: Mapping[str, Tensor]) -> Tensor:
    """The 2-norm of each task over all its tensors, [T]. Its derivative at zero is zero, not NaN."""
    return _root(torch.stack([x.square().flatten(1).sum(1) for x in tensors.values()]).sum(0))


def _root(x: Tensor) -> Tensor:
    """sqrt with derivative 0 at 0: a parameter whose gradient is exactly zero must not turn a meta-gradient to NaN."""
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1.0).sqrt(), 0.0)
