"""Inner optimizers against torch.optim, one task at a time, and their derivatives where they are delicate."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from mass import optimizers
from mass.optimizers import Rule, Tensors

SHAPES = {"x.A": (3, 2, 5), "x.B": (3, 4, 2), "y.A": (3, 2, 3)}


def random(seed: int, scale: float = 1.0) -> Tensors:
    g = torch.Generator().manual_seed(seed)
    return {key: scale * torch.randn(size, generator=g, dtype=torch.float64) for key, size in SHAPES.items()}


def rates(lr: float) -> Tensors:
    return {key: torch.tensor(lr, dtype=torch.float64) for key in SHAPES}


@pytest.mark.parametrize("clip", [None, 2.0])
@pytest.mark.parametrize(
    "rule",
    [
        Rule("sgd"),
        Rule("sgd", momentum=0.9),
        Rule("adam"),
        Rule("adam", beta1=0.5, beta2=0.9, eps=1e-3),
    ],
)
def test_ten_steps_equal_torch_optim_task_by_task(rule: Rule, clip: float | None) -> None:
    rule = replace(rule, clip=clip)
    # the second task's gradients are small enough never to be clipped, the others' are cut
    scale = torch.tensor([1.0, 0.1, 30.0], dtype=torch.float64).view(3, 1, 1)
    grads = [{key: g * scale for key, g in random(100 + k).items()} for k in range(10)]
    params, state, lr = random(1), optimizers.init(rule, random(1)), rates(0.05)
    ours = []
    for k, grad in enumerate(grads):
        params, state = optimizers.update(rule, k, grad, state, params, lr)
        ours.append(params)
    for t in range(3):
        own = {key: nn.Parameter(x[t].clone()) for key, x in random(1).items()}
        optimizer = (
            torch.optim.SGD(own.values(), lr=0.05, momentum=rule.momentum)
            if rule.kind == "sgd"
            else torch.optim.Adam(own.values(), lr=0.05, betas=(rule.beta1, rule.beta2), eps=rule.eps)
        )
        for k, grad in enumerate(grads):
            for key, p in own.items():
                p.grad = grad[key][t].clone()
            if clip is not None:
                norm = nn.utils.clip_grad_norm_(own.values(), clip)
                assert (norm > clip) == (t != 1)
            optimizer.step()
            for key, p in own.items():
                assert torch.allclose(ours[k][key][t], p, rtol=1e-12, atol=1e-14), (k, key)


def test_eps_root_stands_under_the_root() -> None:
    rule = Rule("adam", eps=0.1, eps_root=0.3)
    grad, params = random(2), random(1)
    after, _ = optimizers.update(rule, 0, grad, optimizers.init(rule, params), params, rates(0.05))
    for key, g in grad.items():
        want = params[key] - 0.05 * g / ((g.square() + 0.3).sqrt() + 0.1)
        assert torch.allclose(after[key], want, rtol=1e-12, atol=0)


def test_each_key_has_its_own_rate_and_inputs_are_not_changed() -> None:
    for rule in (Rule("sgd", momentum=0.9, clip=1.0), Rule("adam")):
        params, grad, state = random(1), random(2), optimizers.init(rule, random(1))
        before = [{key: x.clone() for key, x in d.items()} for d in (params, grad, state)]
        lr = rates(0.1) | {"x.B": torch.tensor(0.0, dtype=torch.float64)}
        after, _ = optimizers.update(rule, 0, grad, state, params, lr)
        assert torch.equal(after["x.B"], params["x.B"])
        assert not torch.equal(after["x.A"], params["x.A"])
        for kept, now in zip(before, (params, grad, state), strict=True):
            assert all(torch.equal(kept[key], now[key]) for key in kept)


def test_state_keys_and_shapes() -> None:
    params = random(1)
    assert optimizers.init(Rule("sgd"), params) == {}
    for rule, kinds in ((Rule("sgd", momentum=0.5), "m"), (Rule("adam"), "mv")):
        state = optimizers.init(rule, params)
        assert state.keys() == {f"{kind}:{key}" for kind in kinds for key in params}
        assert all(x.shape == params[key[2:]].shape and (x == 0).all() for key, x in state.items())
        _, after = optimizers.update(rule, 0, random(2), state, params, rates(0.1))
        assert after.keys() == state.keys()


def test_clip_is_per_task_over_all_tensors() -> None:
    grad = random(3)
    scale = torch.tensor([0.01, 1.0, 100.0], dtype=torch.float64).view(3, 1, 1)
    grad = {key: g * scale for key, g in grad.items()}
    clipped = optimizers.clip(grad, 1.0)
    norm = optimizers.norm(clipped)
    want = torch.stack([torch.cat([g[t].flatten() for g in grad.values()]).norm() for t in range(3)])
    assert torch.allclose(optimizers.norm(grad), want, rtol=1e-12, atol=0)
    assert torch.allclose(norm[1:], torch.ones(2, dtype=torch.float64), atol=1e-5)
    assert all(torch.equal(clipped[key][0], grad[key][0]) for key in grad)
    assert optimizers.clip(grad, None) is grad


# ---- derivatives


@pytest.mark.parametrize(
    "rule",
    [Rule("sgd", momentum=0.9, clip=0.5), Rule("adam", eps_root=1e-3, clip=0.5), Rule("adam", eps=1e-2)],
)
def test_update_is_twice_differentiable(rule: Rule) -> None:
    """gradcheck and gradgradcheck of two chained steps in gradient, parameters and rate."""
    small = {"x.A": (2, 1, 2)}
    g = torch.Generator().manual_seed(0)

    def two(grad: Tensor, params: Tensor, lr: Tensor) -> Tensor:
        p, state, rate = {"x.A": params}, optimizers.init(rule, {"x.A": params}), {"x.A": lr}
        p, state = optimizers.update(rule, 0, {"x.A": grad}, state, p, rate)
        p, _ = optimizers.update(rule, 1, {"x.A": grad * p["x.A"]}, state, p, rate)
        return p["x.A"]

    inputs = [
        torch.randn(small["x.A"], generator=g, dtype=torch.float64).requires_grad_(),
        torch.randn(small["x.A"], generator=g, dtype=torch.float64).requires_grad_(),
        torch.tensor(0.3, dtype=torch.float64).requires_grad_(),
    ]
    assert torch.autograd.gradcheck(two, inputs)
    assert torch.autograd.gradgradcheck(two, inputs)


@pytest.mark.parametrize("rule", [Rule("sgd", momentum=0.9, clip=1.0), Rule("adam"), Rule("adam", clip=1.0)])
@pytest.mark.parametrize("where", ["every entry", "one task", "one tensor"])
def test_an_exactly_zero_gradient_has_a_finite_second_order(rule: Rule, where: str) -> None:
    """A fresh LoRA has B = 0, so that A's gradient is exactly zero; a task without examples has none at all."""
    grad = random(4)
    for key in grad:
        if where == "every entry" or (where == "one tensor" and key == "x.A"):
            grad[key] = torch.zeros_like(grad[key])
        elif where == "one task":
            grad[key][1] = 0
    leaf = {key: g.clone().requires_grad_() for key, g in grad.items()}
    params, lr = random(1), rates(0.1)
    after, state = optimizers.update(rule, 0, leaf, optimizers.init(rule, params), params, lr)
    after, state = optimizers.update(rule, 1, leaf, state, after, lr)
    total = torch.stack([(x * random(9)[key]).sum() for key, x in after.items()]).sum()
    first = torch.autograd.grad(total, list(leaf.values()), create_graph=True)
    square = torch.stack([x.square().sum() for x in first]).sum()
    second = torch.autograd.grad(square, list(leaf.values()), allow_unused=True)
    assert all(torch.isfinite(x).all() for x in first)
    assert all(x is None or torch.isfinite(x).all() for x in second)
    _, pull, *_ = torch.func.vjp(
        lambda g: optimizers.update(rule, 0, g, optimizers.init(rule, params), params, lr)[0], grad
    )
    assert all(torch.isfinite(x).all() for x in pull(random(9))[0].values())
    if rule.kind == "adam":
        # the moments stay where they are at an exact zero
        for key in grad:
            still = grad[key] == 0
            assert torch.equal(after[key][still], params[key][still])


def test_norm_has_derivative_zero_at_zero() -> None:
    zero = {key: torch.zeros(size, dtype=torch.float64, requires_grad=True) for key, size in SHAPES.items()}
    by = torch.autograd.grad(optimizers.norm(zero).sum(), list(zero.values()), create_graph=True)
    assert all((x == 0).all() for x in by)
    # and elsewhere x / |x|
    some = {key: x.requires_grad_() for key, x in random(5).items()}
    size = optimizers.norm(some)
    by = torch.autograd.grad(size.sum(), list(some.values()))
    for got, x in zip(by, some.values(), strict=True):
        assert torch.allclose(got, x / size.view(3, 1, 1), rtol=1e-12, atol=0)


def test_float32_adapters_stay_float32() -> None:
    for rule in (Rule("sgd", momentum=0.9, clip=1.0), Rule("adam", eps_root=1e-8, clip=1.0)):
        params = {key: x.float() for key, x in random(1).items()}
        grad = {key: x.float() for key, x in random(2).items()}
        # a 0-d rate in float64 must not widen what it multiplies
        after, state = optimizers.update(rule, 3, grad, optimizers.init(rule, params), params, rates(0.1))
        assert all(x.dtype == torch.float32 for x in (*after.values(), *state.values()))
