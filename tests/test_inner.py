"""The inner loop against torch.optim on each task alone, and what a trajectory keeps."""

from dataclasses import replace

import pytest
import references
import torch
import worlds
from torch import nn
from worlds import RULES, error

from mass import inner, lora, optimizers
from mass.optimizers import Rule


@pytest.mark.parametrize("parts", [False, True])
@pytest.mark.parametrize("rule", [*(rule for rule, _ in RULES.values()), Rule("adam", clip=0.3)])
def test_steps_equal_torch_optim_on_each_task_alone(rule: Rule, parts: bool) -> None:
    world, K, rate = worlds.shared(), 4, 0.05
    # torch.optim has no eps_root
    rule = replace(rule, eps_root=0.0)
    trajectory = inner.adapt(
        worlds.gradient(world, world.weight_TN, world.parts if parts else None),
        world.start,
        rule,
        worlds.rates(world, rate),
        K,
    )
    for t in range(2):
        alone = world.task(t)
        own = {key: nn.Parameter(x.clone()) for key, x in alone.start.items()}
        optimizer = (
            torch.optim.SGD(own.values(), lr=rate, momentum=rule.momentum)
            if rule.kind == "sgd"
            else torch.optim.Adam(own.values(), lr=rate, betas=(rule.beta1, rule.beta2), eps=rule.eps)
        )
        for k in range(K):
            loss_TN = references.plain_loss(world.hf, world.layers, alone.examples, own)
            assert error(trajectory.steps[k].loss_TN[t : t + 1], loss_TN.detach()) < 1e-9
            assert error(lora.select(trajectory.steps[k].adapter, [t]), detached(own)) < 1e-9
            optimizer.zero_grad()
            ((alone.weight_TN * loss_TN).sum() / 3).backward()
            if rule.clip is not None:
                nn.utils.clip_grad_norm_(own.values(), rule.clip)
            optimizer.step()
        assert error(lora.select(trajectory.adapter, [t]), detached(own)) < 1e-9


def detached(adapter: dict[str, nn.Parameter]) -> lora.Adapter:
    return {key: x.detach() for key, x in adapter.items()}


@pytest.mark.parametrize("rule", RULES)
def test_the_trajectory_holds_what_each_step_started_from(rule: str) -> None:
    world, (own, lr) = worlds.shared(), RULES[rule]
    kept = {key: x.clone() for key, x in world.start.items()}
    trajectory = worlds.loop(world, own, worlds.rates(world, lr), 3)
    assert len(trajectory.steps) == 3 and trajectory.rule is own
    assert all(torch.equal(x, kept[key]) for key, x in trajectory.steps[0].adapter.items())
    assert all((x == 0).all() for x in trajectory.steps[0].state.values())
    for k, step in enumerate(trajectory.steps):
        loss_TN, grad = worlds.gradient(world, world.weight_TN)(step.adapter)
        assert torch.equal(loss_TN, step.loss_TN) and error(step.grad, grad) == 0
        after, state = optimizers.update(own, k, step.grad, step.state, step.adapter, trajectory.lr)
        last = k == 2
        assert error(after, trajectory.adapter if last else trajectory.steps[k + 1].adapter) == 0
        if not last and state:
            assert error(state, trajectory.steps[k + 1].state) == 0
    # the caller's tensors are not written to, and nothing holds a graph
    assert all(torch.equal(x, kept[key]) for key, x in world.start.items())
    tensors = [*trajectory.adapter.values(), *(x for s in trajectory.steps for x in s.state.values())]
    assert not any(x.requires_grad for x in tensors)


def test_inputs_that_want_gradients_get_none() -> None:
    world = worlds.shared()
    start = {key: x.clone().requires_grad_() for key, x in world.start.items()}
    lr = {key: x.requires_grad_() for key, x in worlds.rates(world, 0.1).items()}
    trajectory = inner.adapt(worlds.gradient(world, world.weight_TN), start, Rule("sgd"), lr, 2)
    assert not any(x.requires_grad for x in (*trajectory.adapter.values(), *trajectory.lr.values()))


def test_the_loss_falls_and_the_gradient_is_asked_for_once_a_step() -> None:
    world = worlds.shared()
    given = worlds.gradient(world, world.weight_TN)
    calls = []

    def counted(adapter: lora.Adapter) -> tuple[torch.Tensor, lora.Adapter]:
        calls.append(adapter)
        return given(adapter)

    trajectory = inner.adapt(counted, world.start, Rule("sgd"), worlds.rates(world, 0.03), 4)
    assert len(calls) == 4
    total = [(world.weight_TN * step.loss_TN).sum(1) for step in trajectory.steps]
    assert all((after < before).all() for before, after in zip(total, total[1:], strict=False))


def test_weights_decide_what_is_learned() -> None:
    """An example of weight zero does not count, a task of weights zero does not move."""
    world = worlds.shared()
    lr = worlds.rates(world, 0.3)
    some = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    got = worlds.loop(world, Rule("sgd"), lr, 2, some).adapter
    without = worlds.with_examples(world, [[*world.examples[0][:2], None], world.examples[1]], world.targets)
    want = worlds.loop(
        without, Rule("sgd"), lr, 2, torch.tensor([[2.0, 1.0, 7.0], [0, 0, 0]]).double()
    ).adapter
    assert error(got, want) < 1e-12
    assert all(torch.equal(got[key][1], x[1]) for key, x in world.start.items())


def test_clipped_says_which_task_was_cut_in_any_step() -> None:
    world, lr = worlds.shared(), worlds.rates(worlds.shared(), 0.1)
    norms_KT = torch.stack(
        [optimizers.norm(step.grad) for step in worlds.loop(world, Rule("sgd"), lr, 2).steps]
    )
    high, low = norms_KT.max(0).values.max().item(), norms_KT.min().item()
    middle = norms_KT.max(0).values.mean().item()
    seen = {
        limit: worlds.loop(world, Rule("sgd", clip=limit), lr, 2).clipped_T.tolist()
        for limit in (2 * high, middle, low / 2)
    }
    assert seen[2 * high] == [False, False] and seen[low / 2] == [True, True]
    assert sum(seen[middle]) == 1 and seen[middle][int(norms_KT.max(0).values.argmax())]
    assert worlds.loop(world, Rule("sgd"), lr, 2).clipped_T.tolist() == [False, False]


def test_exploded() -> None:
    nan, inf = float("nan"), float("inf")
    before = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 2.0])
    after = torch.tensor([1.9, 2.1, nan, inf, 0.0, 0.5, -inf])
    # a loss that began at zero (no example, or one already known) has not exploded by staying there
    assert inner.exploded(before, after, 2.0).tolist() == [False, True, True, True, False, True, True]
