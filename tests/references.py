"""Slow but plain references of the inner loop and its derivatives, for the worlds of tests/worlds.py.

They share nothing with `mass` but the LoRA layers: examples stand one to a row (no packing), losses come from
the model's own logits through F.cross_entropy, optimizers are written out again, and all K steps are unrolled in one graph.
`numeric` alone runs mass's loop, and differentiates it by nothing but differences.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel
from worlds import RULES, World, loop, outer_loss, rates, shared

from mass import forward, lora
from mass.batch import Sequence
from mass.lora import Adapter, Layers
from mass.optimizers import Rule


def plain_loss(
    hf: PreTrainedModel, layers: Layers, rows: list[list[Sequence | None]], adapter: Mapping[str, Tensor]
) -> Tensor:
    """Mean cross-entropy of every sequence, [T, N] (0 if absent): one sequence a row, padded on the right."""
    tasks, most = len(rows), max(len(task) for task in rows)
    flat = [s for task in rows for s in (*task, *[None] * (most - len(task)))]
    width = max(len(s.tokens) for s in flat if s is not None)
    tokens = torch.zeros(tasks * most, width, dtype=torch.long)
    label = torch.full((tasks * most, width), -100)
    for i, s in enumerate(flat):
        if s is not None:
            tokens[i, : len(s.tokens)] = torch.tensor(s.tokens)
            label[i, s.prompt : len(s.tokens)] = torch.tensor(s.tokens[s.prompt :])
    with lora.using(layers, adapter), sdpa_kernel(SDPBackend.MATH):
        out = hf(input_ids=tokens, use_cache=False).logits
    out = out if out.dtype == torch.float64 else out.float()
    loss = F.cross_entropy(out[:, :-1].transpose(1, 2), label[:, 1:], reduction="none").sum(1)
    return (loss / (label[:, 1:] >= 0).sum(1).clamp(min=1)).view(tasks, most)


def textbook(
    rule: Rule, k: int, grad: Adapter, memory: dict[str, Tensor], p: Adapter, lr: Mapping[str, Tensor]
) -> Adapter:
    """One optimizer step, written a second time; `memory` is changed in place."""
    if rule.clip is not None:
        norm = torch.cat([g.flatten(1) for g in grad.values()], 1).norm(dim=1)
        factor = torch.minimum(torch.ones_like(norm), rule.clip / (norm + 1e-6))
        grad = {key: g * factor[:, None, None] for key, g in grad.items()}
    after = {}
    for key, g in grad.items():
        if rule.kind == "sgd":
            memory["m" + key] = step = rule.momentum * memory.get("m" + key, 0) + g
        else:
            memory["m" + key] = m = rule.beta1 * memory.get("m" + key, 0) + (1 - rule.beta1) * g
            memory["v" + key] = v = rule.beta2 * memory.get("v" + key, 0) + (1 - rule.beta2) * g**2
            m, v = m / (1 - rule.beta1 ** (k + 1)), v / (1 - rule.beta2 ** (k + 1))
            step = m / (torch.sqrt(v + rule.eps_root) + rule.eps)
        after[key] = p[key] - lr[key] * step
    return after


@dataclass(frozen=True)
class Truth:
    loss_T: Tensor
    weight_TN: Tensor
    init: Adapter
    lr: dict[str, Tensor]


def unroll(
    world: World, rule: Rule, lr: float, K: int, last_steps: int | None = None, packed: bool = False
) -> Truth:
    """All K steps in one graph. `last_steps`: everything before them is a constant. `packed`: the losses come from
    mass's own packed forward pass, so that its rounding is the same in both and only the derivatives' differs.
    """

    def losses(inner: bool, adapter: Adapter) -> Tensor:
        if not packed:
            rows = world.examples if inner else world.targets
            return plain_loss(world.hf, world.layers, rows, adapter)
        batch = world.packed if inner else world.outer
        logprob_M = forward.token_logprobs(world.hf, world.layers, batch, adapter, second_order=True)
        return forward.example_loss(batch, logprob_M)

    weight = world.weight_TN.detach().requires_grad_()
    start = {key: x.detach().requires_grad_() for key, x in world.start.items()}
    rate = {key: x.requires_grad_() for key, x in rates(world, lr).items()}
    p = start
    memory: dict[str, Tensor] = {}
    for k in range(K):
        loss = (weight * losses(True, p)).sum() / weight.shape[1]
        got = torch.autograd.grad(loss, list(p.values()), create_graph=True)
        p = textbook(rule, k, dict(zip(p, got, strict=True)), memory, p, rate)
        if last_steps is not None and k < K - last_steps:
            p = {key: x.detach().requires_grad_() for key, x in p.items()}
            memory = {key: x.detach() for key, x in memory.items()}
    loss_T = losses(False, p).sum(1)
    wanted = [weight, *start.values(), *rate.values()]
    by = list(torch.autograd.grad(loss_T.sum(), wanted, allow_unused=True, materialize_grads=True))
    return Truth(
        loss_T.detach(),
        by.pop(0),
        dict(zip(start, by, strict=False)),
        dict(zip(rate, by[len(start) :], strict=True)),
    )


@cache
def truth(rule: str, K: int) -> Truth:
    """`unroll` of the shared world."""
    return unroll(shared(), *RULES[rule], K)


@dataclass(frozen=True)
class Numeric:
    """Central differences of the whole inner loop: dL_t/dw_tn, and along one direction of phi_0 and of the rates."""

    weight_TN: Tensor
    init: Tensor
    init_along: Adapter
    lr: Tensor
    lr_along: dict[str, Tensor]


@cache
def numeric(rule_name: str, K: int) -> Numeric:
    world = shared()
    rule, lr0 = RULES[rule_name]
    lr, w, h = rates(world, lr0), world.weight_TN, 1e-5
    g = torch.Generator().manual_seed(7)

    def loss_T(**changed: Any) -> Tensor:
        given: dict[str, Any] = {"weight_TN": w, "start": world.start, "lr": lr} | changed
        return outer_loss(
            world, loop(world, rule, given["lr"], K, given["weight_TN"], given["start"]).adapter
        )

    columns = []
    for n in range(w.shape[1]):
        # tasks never mix, so the n-th weight of every task moves at once (test_tasks_* look at the mixing)
        shift = torch.zeros_like(w)
        shift[:, n] = h
        columns.append((loss_T(weight_TN=w + shift) - loss_T(weight_TN=w - shift)) / (2 * h))
    init_along = {
        key: torch.randn(x.shape, generator=g, dtype=torch.float64) for key, x in world.start.items()
    }
    small = h / 10
    init = (
        loss_T(start={key: x + small * init_along[key] for key, x in world.start.items()})
        - loss_T(start={key: x - small * init_along[key] for key, x in world.start.items()})
    ).sum() / (2 * small)
    lr_along = {key: torch.randn((), generator=g, dtype=torch.float64) for key in lr}
    small = h * lr0
    by_lr = (
        loss_T(lr={key: x + small * lr_along[key] for key, x in lr.items()})
        - loss_T(lr={key: x - small * lr_along[key] for key, x in lr.items()})
    ).sum() / (2 * small)
    return Numeric(torch.stack(columns, 1), init, init_along, by_lr, lr_along)
