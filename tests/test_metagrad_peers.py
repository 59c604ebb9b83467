"""Meta-gradients against the two peers: a plain module of LoRA parameters, one task at a time."""

from collections.abc import Callable

import higher
import pytest
import references
import torch
import torchopt
import worlds
from torch import Tensor, nn
from worlds import STEPS, World, error, meta

from mass.lora import Adapter
from mass.optimizers import Rule


class Fast(nn.Module):
    """One task's adapter as ordinary parameters; called, it gives that task's weighted inner loss."""

    def __init__(self, world: World) -> None:
        super().__init__()
        # within it the model is no submodule: its weights are no parameters of the inner loop
        self.world = world
        self.named = {key.replace(".", "_"): key for key in world.start}
        for name, key in self.named.items():
            self.register_parameter(name, nn.Parameter(world.start[key].clone()))

    def adapter(self) -> Adapter:
        return {key: getattr(self, name) for name, key in self.named.items()}

    def forward(self, weight_TN: Tensor, outer: bool = False) -> Tensor:
        world = self.world
        if outer:
            return references.plain_loss(world.hf, world.layers, world.targets, self.adapter()).sum()
        loss_TN = references.plain_loss(world.hf, world.layers, world.examples, self.adapter())
        return (weight_TN * loss_TN).sum() / weight_TN.shape[1]


# eps_root as both libraries have it is 0; eps is too small to matter, since higher adds it in another place
PEER_RULES = {
    "sgd": (Rule("sgd"), 0.3),
    "momentum": (Rule("sgd", momentum=0.9), 0.3),
    "momentum clip": (Rule("sgd", momentum=0.9, clip=0.3), 0.3),
    "adam": (Rule("adam", eps=1e-14), 0.005),
    "adam eps_root": (Rule("adam", eps_root=1e-6), 0.02),
}


def per_task(world: World, one: Callable[[World], tuple[Tensor, Adapter]]) -> tuple[Tensor, Adapter]:
    """Weight and initial gradients of each task alone, put together again."""
    got = [one(world.task(t)) for t in range(len(world.examples))]
    return torch.cat([w for w, _ in got]), {key: torch.cat([a[key] for _, a in got]) for key in world.start}


# cold Adam with one step has no gradient by the weights: it has a test of its own
@pytest.mark.parametrize(
    "rule_name,K",
    [(r, k) for r in ("sgd", "momentum", "momentum clip", "adam") for k in STEPS if (r, k) != ("adam", 1)],
)
def test_engines_equal_higher(rule_name: str, K: int) -> None:
    rule, lr = PEER_RULES[rule_name]

    def clip(grads: list[Tensor]) -> list[Tensor]:
        if rule.clip is None:
            return grads
        norm = torch.cat([g.flatten() for g in grads]).norm()
        return [g * torch.clamp(rule.clip / (norm + 1e-6), max=1.0) for g in grads]

    def one(world: World) -> tuple[Tensor, Adapter]:
        fast, weight = Fast(world), world.weight_TN.requires_grad_()
        own = (
            torch.optim.SGD(fast.parameters(), lr=lr, momentum=rule.momentum)
            if rule.kind == "sgd"
            else torch.optim.Adam(fast.parameters(), lr=lr, eps=rule.eps)
        )
        with higher.innerloop_ctx(fast, own, copy_initial_weights=False) as (patched, optimizer):
            for _ in range(K):
                optimizer.step(patched(weight), grad_callback=clip)
            by = torch.autograd.grad(patched(weight, outer=True), [weight, *fast.parameters()])
        return by[0], dict(zip(fast.named.values(), by[1:], strict=True))

    # without eps_root both take the difference of two nearly equal numbers
    check_peer(per_task(worlds.shared(), one), rule, lr, K, 1e-6 if rule.kind == "adam" else 1e-10)


@pytest.mark.parametrize("K", STEPS)
@pytest.mark.parametrize("rule_name", ["sgd", "momentum", "adam eps_root"])
def test_engines_equal_torchopt(rule_name: str, K: int) -> None:
    rule, lr = PEER_RULES[rule_name]

    def one(world: World) -> tuple[Tensor, Adapter]:
        fast, weight = Fast(world), world.weight_TN.requires_grad_()
        start = list(fast.parameters())
        # (its bias corrections are computed in the default dtype: `double` below)
        optimizer = (
            torchopt.MetaSGD(fast, lr=lr, momentum=rule.momentum)
            if rule.kind == "sgd"
            else torchopt.MetaAdam(fast, lr=lr, eps=rule.eps, eps_root=rule.eps_root)
        )
        for _ in range(K):
            optimizer.step(fast(weight))
        by = torch.autograd.grad(fast(weight, outer=True), [weight, *start])
        return by[0], dict(zip(fast.named.values(), by[1:], strict=True))

    world = worlds.shared()
    torch.set_default_dtype(torch.float64)
    try:
        peer = per_task(world, one)
    finally:
        torch.set_default_dtype(torch.float32)
    check_peer(peer, rule, lr, K, 1e-10)


def check_peer(peer: tuple[Tensor, Adapter], rule: Rule, lr: float, K: int, bound: float) -> None:
    for engine in ("reverse", "blockwise") if K == 2 else ("reverse",):
        got = meta(worlds.shared(), engine, rule, lr, K, need_init=True)
        assert got.init is not None
        assert error(got.weight_TN, peer[0]) < bound
        assert error(got.init, peer[1]) < bound
