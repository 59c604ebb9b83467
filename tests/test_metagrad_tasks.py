"""Meta-gradients of tasks at once, of tasks without examples, and of gradients that vanish."""

from dataclasses import replace

import pytest
import references
import torch
import worlds
from test_metagrad import BOUND, full
from torch import Tensor
from worlds import ENGINES, RULES, World, error, meta

from mass import forward, lora, metagrad
from mass.optimizers import Rule


@pytest.mark.parametrize(
    "engine,rule",
    [
        *((e, "momentum") for e in ENGINES),
        *((e, r) for e in ("reverse", "blockwise") for r in ("sgd", "adam")),
    ],
)
def test_tasks_at_once_equal_one_by_one(engine: str, rule: str) -> None:
    world = three_tasks()
    own, lr = RULES[rule]
    together = meta(world, engine, own, lr, 2, need_init=True, need_lr=True)
    alone = [meta(world.task(t), engine, own, lr, 2, need_init=True, need_lr=True) for t in range(3)]
    bound = {"central": 1e-7, "one-sided": 1e-6}.get(engine, 1e-11)
    assert error(together.weight_TN, torch.cat([one.weight_TN for one in alone])) < bound
    for key in world.start:
        init, lr_of = [one.init or {} for one in alone], [one.lr or {} for one in alone]
        assert together.init is not None and together.lr is not None
        assert error(together.init[key], torch.cat([x[key] for x in init])) < 100 * bound
        assert error(together.lr[key], torch.stack([x[key] for x in lr_of]).sum(0)) < 1e4 * bound


def three_tasks() -> World:
    """One task of long examples, one of short, one with a single example: packed, they share no row shape."""
    world = worlds.make(tasks=3)
    g = torch.Generator().manual_seed(11)
    examples = [
        worlds.sequences(g, 3, 12, 20, 5),
        worlds.sequences(g, 3, 5, 8, 2),
        [None, *worlds.sequences(g, 1, 8, 9, 3), None],
    ]
    return worlds.with_examples(world, examples, world.targets)


@pytest.mark.parametrize("K", [1, 2])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_task_without_any_example_has_zeros_and_disturbs_nobody(engine: str, K: int) -> None:
    world, (rule, lr) = worlds.shared(), RULES["momentum"]
    emptied = worlds.with_examples(world, [world.examples[0], [None, None, None]], world.targets)
    got = meta(emptied, engine, rule, lr, K, need_init=True, need_lr=True)
    whole = full(engine, "momentum", K)
    assert got.init is not None and got.lr is not None and whole.init is not None
    assert (got.weight_TN[1] == 0).all()
    assert error(got.weight_TN[0], whole.weight_TN[0]) < BOUND[engine]
    assert error(lora.select(got.init, [0]), lora.select(whole.init, [0])) < BOUND[engine]
    # its adapter does not move: dL/dphi_0 = dL/dphi_K
    trajectory = worlds.loop(emptied, rule, worlds.rates(emptied, lr), K)
    for key, x in worlds.outer_grad(emptied, trajectory.adapter).items():
        assert torch.equal(trajectory.adapter[key][1], world.start[key][1])
        assert torch.allclose(got.init[key][1], x[1], rtol=1e-12, atol=0)
    assert all(torch.isfinite(value) for value in got.lr.values())


@pytest.mark.parametrize("bad", [0, 1])
@pytest.mark.parametrize("second_order", [False, True])
def test_an_adapter_that_is_not_finite_stays_in_its_own_task(second_order: bool, bad: int) -> None:
    """Also where rows of all tasks stand in one tile of attention and its padding has to be taken from somewhere."""
    world = worlds.shared()
    good = 1 - bad

    def run(start: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        leaf = {key: x.clone().requires_grad_() for key, x in start.items()}
        logprob_M = forward.token_logprobs(
            world.hf, world.layers, world.packed, leaf, second_order=second_order
        )
        loss_TN = forward.example_loss(world.packed, logprob_M)
        grads = torch.autograd.grad(loss_TN.sum(), list(leaf.values()))
        return loss_TN[good].detach(), {key: g[good] for key, g in zip(leaf, grads, strict=True)}

    spoilt = {key: x.clone() for key, x in world.start.items()}
    for x in spoilt.values():
        x[bad] = torch.nan
    want, got = run(world.start), run(spoilt)
    assert torch.equal(got[0], want[0])
    for key, g in want[1].items():
        torch.testing.assert_close(got[1][key], g, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("rule", ["momentum", "adam"])
@pytest.mark.parametrize("engine", ENGINES)
def test_no_example_at_all_gives_zeros(engine: str, rule: str) -> None:
    world, (own, lr), K = worlds.shared(), RULES[rule], 2
    empty = worlds.with_examples(world, [[None] * 3, [None] * 3], world.targets)
    assert empty.packed.label_M.numel() == 0
    trajectory = worlds.loop(empty, own, worlds.rates(empty, lr), K)
    lam = worlds.outer_grad(empty, trajectory.adapter)
    got = metagrad.sweep(
        worlds.products(empty, engine, empty.weight_TN), trajectory, lam, need_init=True, need_lr=True
    )
    assert got.init is not None and got.lr is not None
    assert got.weight_TN.shape == (2, 3) and (got.weight_TN == 0).all()
    assert all((value == 0).all() for value in got.lr.values())
    assert error(got.init, lam) == 0
    assert error(trajectory.adapter, world.start) == 0


@pytest.mark.parametrize("engine", ENGINES)
def test_zero_outer_gradient_gives_zeros(engine: str) -> None:
    """An outer loss of zero (all G answers right, say) has no credit; finite differences have no direction then."""
    world, (rule, lr) = worlds.shared(), RULES["adam"]
    trajectory = worlds.loop(world, rule, worlds.rates(world, lr), 2)
    zero = {key: torch.zeros_like(x) for key, x in world.start.items()}
    got = metagrad.sweep(
        worlds.products(world, engine, world.weight_TN), trajectory, zero, need_init=True, need_lr=True
    )
    assert got.init is not None and got.lr is not None
    assert (got.weight_TN == 0).all()
    assert all((x == 0).all() for x in (*got.init.values(), *got.lr.values()))


@pytest.mark.parametrize("engine", ENGINES)
def test_fresh_adapter(engine: str) -> None:
    """B = 0: A has no first gradient, Adam divides zero by zero, and the meta-gradient must stay finite and right."""
    world = worlds.shared()
    start = {key: x if key.endswith(".A") else torch.zeros_like(x) for key, x in world.start.items()}
    world = replace(world, start=start)
    rule, lr = RULES["adam"]
    got, want = meta(world, engine, rule, lr, 2, need_init=True), references.unroll(world, rule, lr, 2)
    assert got.init is not None
    assert error(got.weight_TN, want.weight_TN) < 10 * BOUND[engine]
    assert error(got.init, want.init) < 10 * BOUND[engine]
    # no eps_root: sqrt at exactly zero
    got = meta(world, engine, Rule("adam"), 0.02, 2, need_init=True)
    assert got.init is not None and torch.isfinite(got.weight_TN).all()
    assert all(torch.isfinite(x).all() for x in got.init.values())


@pytest.mark.parametrize("engine", ENGINES)
def test_nothing_is_left_behind(engine: str) -> None:
    """No gradient on the frozen weights, nothing in the slots, the trajectory as it was, and twice the same result."""
    world, (rule, lr) = worlds.shared(), RULES["sgd"]
    trajectory = worlds.loop(world, rule, worlds.rates(world, lr), 2)
    before = {key: x.clone() for key, x in trajectory.steps[0].adapter.items()}
    lam = worlds.outer_grad(world, trajectory.adapter)
    first, second = (
        metagrad.sweep(worlds.products(world, engine, world.weight_TN), trajectory, lam, need_init=True)
        for _ in range(2)
    )
    assert torch.equal(first.weight_TN, second.weight_TN)
    assert not first.weight_TN.requires_grad
    assert first.init is not None and not any(x.requires_grad for x in first.init.values())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in world.hf.parameters())
    assert all(layer.slot is None for layer in world.layers.values())
    assert all(torch.equal(x, before[key]) for key, x in trajectory.steps[0].adapter.items())
    assert not any(x.requires_grad for step in trajectory.steps for x in step.adapter.values())
    assert "forward" not in vars(world.parts.blocks[0])
