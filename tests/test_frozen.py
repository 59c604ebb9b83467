"""The frozen product against torch's own linear layer, in every mode of differentiation."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from mass import frozen


@pytest.fixture
def case():
    gen = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=gen, dtype=torch.float64)  # noqa: E731
    return draw(3, 4, 5), draw(3, 4, 5), draw(7, 5), draw(7)


def test_value_and_both_derivatives(case):
    x, _, weight, bias = case
    function = lambda x: frozen.linear(x, lambda: weight, bias)  # noqa: E731
    assert torch.equal(function(x), F.linear(x, weight, bias))
    assert torch.autograd.gradcheck(function, x.requires_grad_(), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, x, check_fwd_over_rev=True, check_rev_over_rev=True)


@pytest.mark.parametrize("with_bias", [True, False])
def test_reverse_over_forward_equals_torch(case, with_bias):
    x, dx, weight, bias = case
    bias = bias if with_bias else None

    def through(product):
        a, da = x.clone().requires_grad_(), dx.clone().requires_grad_()
        y, dy = torch.func.jvp(lambda a: product(a).tanh(), (a,), (da,))
        return dy, *torch.autograd.grad(dy.square().sum(), (a, da))

    ours = through(lambda a: frozen.linear(a, lambda: weight, bias))
    theirs = through(lambda a: F.linear(a, weight, bias))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_vmap_and_grad_of_grad_equal_torch(case):
    x, _, weight, bias = case

    def curvature(product):
        value = lambda a: product(a).sin().sum()  # noqa: E731
        return torch.func.vmap(torch.func.jacrev(torch.func.grad(value)))(x)

    ours = curvature(lambda a: frozen.linear(a, lambda: weight, bias))
    torch.testing.assert_close(ours, curvature(lambda a: F.linear(a, weight, bias)), rtol=1e-12, atol=1e-12)


def test_a_dual_pass_makes_two_products_and_its_backward_two(case):
    x, dx, weight, _ = case
    one = 2 * x.numel() * len(weight)
    x, dx = x.requires_grad_(), dx.requires_grad_()
    with FlopCounterMode(display=False) as forward:
        _, dy = torch.func.jvp(lambda a: frozen.linear(a, lambda: weight).sin(), (x,), (dx,))
    with FlopCounterMode(display=False) as backward:
        torch.autograd.grad(dy.sum(), (x, dx))
    assert (forward.get_total_flops(), backward.get_total_flops()) == (2 * one, 2 * one)


def test_the_matrix_is_asked_for_and_not_kept(case):
    x, _, weight, _ = case
    asked, saved = [], []

    def matrix():
        asked.append(1)
        return weight

    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = frozen.linear(x.requires_grad_(), matrix)
    assert (len(asked), saved) == (1, [])
    torch.autograd.grad(y.sum(), x)
    assert len(asked) == 2
