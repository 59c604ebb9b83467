"""What an inner loop keeps: no gradient that the way back does without, and the same meta-gradient."""

import pytest
import torch
import worlds

from mass import inner, metagrad, optimizers
from mass.optimizers import Rule


def loop(rule: Rule, K: int, keep_grads: bool) -> inner.Trajectory:
    world = worlds.shared()
    step = worlds.gradient(world, world.weight_TN)
    return inner.adapt(step, world.start, rule, worlds.rates(world, 0.3), K, keep_grads=keep_grads)


def norms(K: int) -> torch.Tensor:
    """Gradient norm of each step and task without a clip, [K, T]."""
    return torch.stack([optimizers.norm(s.grad) for s in loop(Rule(), K, True).steps if s.grad is not None])


def test_only_steps_that_need_their_gradient_keep_it() -> None:
    largest = norms(3).max().item()
    kept = {
        "plain": loop(Rule(), 3, False),
        "clip far away": loop(Rule(clip=2 * largest), 3, False),
        "clip of one": loop(Rule(clip=0.999 * largest), 3, False),
        "momentum": loop(Rule(momentum=0.5), 3, False),
        "adam": loop(Rule("adam", eps_root=1e-6), 3, False),
    }
    have = {name: [step.grad is not None for step in found.steps] for name, found in kept.items()}
    assert have["plain"] == have["clip far away"] == [False] * 3
    assert any(have["clip of one"])
    assert have["momentum"] == have["adam"] == [True] * 3
    assert all(step.grad is not None for step in loop(Rule(), 3, True).steps)


@pytest.mark.parametrize("clip", [None, "far", "cuts"])
@pytest.mark.parametrize("engine", ["reverse", "blockwise"])
def test_meta_gradients_do_not_change(engine: str, clip: str | None) -> None:
    world = worlds.shared()
    largest = norms(3).max().item()
    rule = Rule(clip={None: None, "far": 2 * largest, "cuts": 0.9 * largest}[clip])
    found = []
    for keep in (True, False):
        trajectory = loop(rule, 3, keep)
        products = worlds.products(world, engine, world.weight_TN)
        lam = worlds.outer_grad(world, trajectory.adapter)
        found.append((metagrad.sweep(products, trajectory, lam, need_init=True), trajectory.clipped_T))
    (whole, cut), (spared, again) = found
    assert torch.equal(whole.weight_TN, spared.weight_TN) and torch.equal(cut, again)
    assert whole.init is not None and spared.init is not None
    assert all(torch.equal(x, spared.init[key]) for key, x in whole.init.items())
    assert cut.any() == (clip == "cuts")


def test_recorded_steps_are_known_by_their_gradient() -> None:
    """They are used, not made again."""
    world = worlds.shared()
    products = metagrad.Reverse(world.hf, world.layers, world.packed, world.weight_TN)
    step = worlds.gradient(world, world.weight_TN)
    trajectory = inner.adapt(
        step,
        world.start,
        Rule(),
        worlds.rates(world, 0.3),
        3,
        last=products.record,
        count=2,
        keep_grads=False,
    )
    assert [s.grad is not None for s in trajectory.steps] == [False, True, True]
    metagrad.sweep(products, trajectory, worlds.outer_grad(world, trajectory.adapter))
    assert not products._kept


def test_what_wants_gradients_says_so() -> None:
    world = worlds.shared()
    trajectory = loop(Rule(), 2, False)
    lam = worlds.outer_grad(world, trajectory.adapter)
    with pytest.raises(ValueError, match="need_lr wants the gradients"):
        metagrad.sweep(worlds.products(world, "blockwise", world.weight_TN), trajectory, lam, need_lr=True)
    with pytest.raises(ValueError, match="one-sided differences want the gradients"):
        metagrad.sweep(worlds.products(world, "one-sided", world.weight_TN), trajectory, lam)
