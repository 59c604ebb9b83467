"""Meta-gradients: every engine against unrolling, numeric differences and closed forms."""

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import references
import torch
import worlds
from torch import Tensor
from worlds import ENGINES, EXACT, RULES, STEPS, World, dot, error, meta

from mass import blocks, inner, lora, metagrad, optimizers, scorer
from mass.inner import Step
from mass.lora import Adapter
from mass.optimizers import Rule

# what an engine may be off by in float64, as a share of the whole gradient
BOUND = {
    "reverse": 1e-11,
    "recorded": 1e-11,
    "blockwise": 1e-11,
    "blockwise keep": 1e-11,
    "central": 1e-6,
    "one-sided": 1e-5,
}


@cache
def full(engine: str, rule: str, K: int) -> metagrad.MetaGradient:
    """Everything that can be asked for, of the shared world."""
    return meta(worlds.shared(), engine, *RULES[rule], K, need_init=True, need_lr=True)


# ---- every engine x optimizer x number of steps


@pytest.mark.parametrize("K", STEPS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("engine", ENGINES)
def test_engine_equals_unrolling_and_numeric_differences(engine: str, rule: str, K: int) -> None:
    got = full(engine, rule, K)
    truth, numeric = references.truth(rule, K), references.numeric(rule, K)
    assert got.init is not None and got.lr is not None
    assert error(got.weight_TN, truth.weight_TN) < BOUND[engine]
    assert error(got.init, truth.init) < BOUND[engine]
    assert error(got.lr, truth.lr) < BOUND[engine]
    assert error(got.weight_TN, numeric.weight_TN) < 1e-5
    assert error(dot(got.init, numeric.init_along), numeric.init) < 1e-5
    assert error(dot(got.lr, numeric.lr_along), numeric.lr) < 1e-5


@pytest.mark.parametrize("engine", EXACT)
@pytest.mark.parametrize("limit", ["one task", "no task"])
def test_clip_that_cuts_some_tasks_only(engine: str, limit: str) -> None:
    world = worlds.shared()
    lr = worlds.rates(world, 0.3)
    free = worlds.loop(world, Rule("sgd"), lr, 2)
    norms = torch.stack([optimizers.norm(step.grad) for step in free.steps])
    clip = norms.max(0).values.sort().values
    rule = Rule("sgd", clip=((clip[0] + clip[1]) / 2 if limit == "one task" else clip[1] * 1.5).item())
    assert worlds.loop(world, rule, lr, 2).clipped_T.sum() == (1 if limit == "one task" else 0)
    got = meta(world, engine, rule, 0.3, 2, need_init=True)
    truth = references.unroll(world, rule, 0.3, 2)
    assert got.init is not None
    assert error(got.weight_TN, truth.weight_TN) < 1e-11
    assert error(got.init, truth.init) < 1e-11


def test_the_loss_that_is_differentiated_is_the_loss_of_the_loop() -> None:
    world = worlds.shared()
    for rule, (own, lr) in RULES.items():
        ours = worlds.outer_loss(world, worlds.loop(world, own, worlds.rates(world, lr), 5).adapter)
        assert error(ours, references.truth(rule, 5).loss_T) < 1e-12


def test_finite_difference_blockwise_passes_give_the_same_numbers() -> None:
    world = worlds.shared()
    plain = meta(world, "central", *RULES["sgd"], 2)
    trajectory = worlds.loop(world, RULES["sgd"][0], worlds.rates(world, 0.3), 2)
    engine = metagrad.finite_difference(
        world.hf, world.layers, world.packed, world.weight_TN, parts=world.parts
    )
    got = metagrad.sweep(engine, trajectory, worlds.outer_grad(world, trajectory.adapter))
    assert error(got.weight_TN, plain.weight_TN) < 1e-7


def test_finite_difference_error_falls_with_its_order() -> None:
    """Central differences are of second order in the radius, one-sided ones of first."""
    world = worlds.shared()
    trajectory = worlds.loop(world, RULES["sgd"][0], worlds.rates(world, 0.3), 2)
    lam = worlds.outer_grad(world, trajectory.adapter)

    def off(central: bool, radius: float) -> float:
        engine = metagrad.finite_difference(
            world.hf, world.layers, world.packed, world.weight_TN, central=central, radius=radius
        )
        return error(metagrad.sweep(engine, trajectory, lam).weight_TN, references.truth("sgd", 2).weight_TN)

    assert 50 < off(True, 1e-2) / off(True, 1e-3) < 200
    assert 5 < off(False, 1e-2) / off(False, 1e-3) < 20


# ---- closed forms


@pytest.mark.parametrize("engine", ENGINES)
def test_one_sgd_step_has_the_closed_form(engine: str) -> None:
    """dL/dw_i = -lr <grad l_i(phi_0), grad L(phi_1)> / N, each gradient taken alone."""
    world, lr = worlds.shared(), 0.3
    got = meta(world, engine, Rule("sgd"), lr, 1).weight_TN
    trajectory = worlds.loop(world, Rule("sgd"), worlds.rates(world, lr), 1)

    def grad(rows: list[list[Any]], adapter: Adapter) -> Adapter:
        leaf = {key: x.detach().requires_grad_() for key, x in adapter.items()}
        loss = references.plain_loss(world.hf, world.layers, rows, leaf).sum()
        return dict(zip(leaf, torch.autograd.grad(loss, list(leaf.values())), strict=True))

    want = torch.zeros_like(got)
    for t, task in enumerate(world.examples):
        last = grad([world.targets[t]], lora.select(trajectory.adapter, [t]))
        for n, example in enumerate(task):
            if example is not None:
                first = grad([[example]], lora.select(world.start, [t]))
                want[t, n] = -lr * dot(first, last) / len(task)
    assert error(got, want) < BOUND[engine]


@pytest.mark.parametrize("K", [1, 2, 3, 6])
def test_quadratic_losses_have_the_closed_form(K: int) -> None:
    """l_i = (phi - a_i)' Q_i (phi - a_i) / 2 under SGD: phi_K = A^K phi_0 + lr sum_j A^j b, A = 1 - lr H."""
    g = torch.Generator().manual_seed(3)
    T, N, D, lr = 2, 3, 5, 0.2

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, dtype=torch.float64)

    root = random(T, N, D, D) / D**0.5
    Q, a, c, phi0 = root @ root.mT, random(T, N, D), random(T, D), random(T, D)
    weight = torch.rand(T, N, generator=g, dtype=torch.float64)

    def example_grads(phi: Tensor) -> Tensor:
        return torch.einsum("tnij,tnj->tni", Q, phi.unsqueeze(1) - a)

    def gradient(adapter: Adapter) -> tuple[Tensor, Adapter]:
        phi = adapter["x.A"][:, 0]
        return torch.zeros(T, N), {
            "x.A": (weight.unsqueeze(-1) * example_grads(phi)).sum(1, keepdim=True) / N
        }

    def products(step: Step, mu: Adapter, need_hessian: bool) -> tuple[Tensor, Adapter | None]:
        phi, m = step.adapter["x.A"][:, 0], mu["x.A"][:, 0]
        H = (weight[..., None, None] * Q).sum(1) / N
        curve = {"x.A": torch.einsum("tij,tj->ti", H, m).unsqueeze(1)} if need_hessian else None
        return torch.einsum("tni,ti->tn", example_grads(phi), m), curve

    rate = torch.tensor(lr, dtype=torch.float64)
    run = inner.adapt(gradient, {"x.A": phi0.unsqueeze(1)}, Rule("sgd"), {"x.A": rate}, K)
    lam = {"x.A": run.adapter["x.A"] - c.unsqueeze(1)}  # L = |phi_K - c|^2 / 2
    got = metagrad.sweep(products, run, lam, need_init=True, need_lr=True)

    w, p, r = (x.clone().requires_grad_() for x in (weight, phi0, rate))
    H = (w[..., None, None] * Q).sum(1) / N
    b = torch.einsum("tn,tnij,tnj->ti", w, Q, a) / N
    A = torch.eye(D, dtype=torch.float64) - r * H
    end = (torch.matrix_power(A, K) @ p.unsqueeze(-1)).squeeze(-1)
    for j in range(K):
        end = end + r * (torch.matrix_power(A, j) @ b.unsqueeze(-1)).squeeze(-1)
    by_w, by_p, by_r = torch.autograd.grad((end - c).square().sum() / 2, (w, p, r))
    assert error(run.adapter["x.A"][:, 0], end.detach()) < 1e-12
    assert got.init is not None and got.lr is not None
    assert error(got.weight_TN, by_w) < 1e-12
    assert error(got.init["x.A"][:, 0], by_p) < 1e-12
    assert error(got.lr["x.A"], by_r) < 1e-12


def test_cold_adam_hides_the_weights_in_its_first_step() -> None:
    """g / (|g| + eps) has the derivative eps / (|g| + eps)^2: 1e-8 of SGD's where |g| = 1."""
    world, lr = worlds.shared(), 0.02
    # (the world's smallest inner gradients are 1e-5, hence a smaller eps than the default)
    adam = meta(world, "reverse", Rule("adam", eps=1e-12), lr, 1).weight_TN
    sgd = meta(world, "reverse", Rule("sgd"), lr, 1).weight_TN
    assert 0 < adam.norm() < 1e-4 * sgd.norm()
    assert meta(world, "reverse", Rule("adam", eps=1e-12), lr, 2).weight_TN.norm() > 100 * adam.norm()

    g = {"x.A": torch.tensor([[[1.0, -0.5, 2.0]]], dtype=torch.float64)}
    params = {"x.A": torch.zeros(1, 1, 3, dtype=torch.float64)}
    rate = {"x.A": torch.tensor(1.0, dtype=torch.float64)}
    for rule, want in (
        (Rule("sgd"), torch.ones(3, dtype=torch.float64)),
        (Rule("adam"), 1e-8 / (g["x.A"].flatten().abs() + 1e-8) ** 2),
    ):
        state = optimizers.init(rule, params)
        jacobian = torch.func.jacrev(
            lambda x, rule=rule, state=state: optimizers.update(rule, 0, x, state, params, rate)[0]["x.A"]
        )(g)["x.A"]
        assert torch.allclose(-jacobian.reshape(3, 3).diagonal(), want, rtol=1e-6, atol=0)


# ---- properties of the sweep


@pytest.mark.parametrize("K", [1, 2])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("engine", ENGINES)
def test_score_gradient_is_not_zero_and_sums_to_zero(engine: str, rule: str, K: int) -> None:
    world = worlds.shared()
    by_weight = full(engine, rule, K).weight_TN
    by_score = scorer.score_gradient(world.score_TN, world.valid_TN, 1.0, by_weight)
    assert by_score.sum(1).abs().max() < 1e-12
    assert (by_score[world.valid_TN].abs() > 1e-6).all()
    assert (by_score[~world.valid_TN] == 0).all()
    # and on to the parameters of a scorer
    head = scorer.Scorer(width=4, depth=2, hidden=8).double()
    g = torch.Generator().manual_seed(5)
    task, example = (torch.randn(*size, 8, generator=g, dtype=torch.float64) for size in ((2,), (2, 3)))
    (head(task, example) * by_score).sum().backward()
    last = dict(head.named_parameters())["net.4.weight"].grad
    assert last is not None and last.norm() > 1e-6


def test_score_gradient_equals_numeric_differences_through_the_scores() -> None:
    world, h = worlds.shared(), 1e-5
    rule, lr = RULES["momentum"]
    got = scorer.score_gradient(
        world.score_TN,
        world.valid_TN,
        0.5,
        references.unroll(at_temperature(world, 0.5), rule, lr, 2).weight_TN,
    )
    ours = scorer.score_gradient(
        world.score_TN,
        world.valid_TN,
        0.5,
        meta(at_temperature(world, 0.5), "blockwise", rule, lr, 2).weight_TN,
    )

    def loss_T(score: Tensor) -> Tensor:
        w = scorer.weights(score, world.valid_TN, 0.5)
        return worlds.outer_loss(world, worlds.loop(world, rule, worlds.rates(world, lr), 2, w).adapter)

    for n in range(3):
        shift = torch.zeros_like(world.score_TN)
        shift[:, n] = h
        want = (loss_T(world.score_TN + shift) - loss_T(world.score_TN - shift)) / (2 * h)
        assert (ours[:, n] - want).norm() < 1e-7 * ours.norm() + 1e-10
    assert error(ours, got) < 1e-11
    # softmax does not see a shift of all scores of a task
    assert error(loss_T(world.score_TN + 3.0), loss_T(world.score_TN)) < 1e-12


def at_temperature(world: World, temperature: float) -> World:
    """`weight_TN` of a world is taken at temperature 1."""
    return replace(world, score_TN=world.score_TN / temperature)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("engine", ENGINES)
def test_weights_do_not_depend_on_what_else_is_asked(engine: str, rule: str) -> None:
    """Without the initial adapter the first step's Hessian product is left out, and nothing else changes."""
    world, (own, lr) = worlds.shared(), RULES[rule]
    alone = meta(world, engine, own, lr, 2)
    assert alone.init is None and alone.lr is None
    # finite differences of the loss alone round otherwise than those that come with a gradient
    assert error(alone.weight_TN, full(engine, rule, 2).weight_TN) < (1e-12 if engine in EXACT else 1e-8)


@pytest.mark.parametrize(
    "options,want",
    [
        ({}, [True, True, False]),
        ({"need_init": True}, [True, True, True]),
        ({"need_lr": True}, [True, True, False]),
        ({"last_steps": 2}, [True, False]),
        ({"last_steps": 1}, [False]),
    ],
)
@pytest.mark.parametrize("engine", ENGINES)
def test_hessian_products_are_made_only_where_needed(
    engine: str, options: dict[str, Any], want: list[bool]
) -> None:
    world, (rule, lr) = worlds.shared(), RULES["sgd"]
    trajectory = worlds.loop(world, rule, worlds.rates(world, lr), 3)
    given = worlds.products(world, engine, world.weight_TN)
    asked, steps = [], []

    def counted(step: Step, mu: Adapter, need_hessian: bool) -> tuple[Tensor, Adapter | None]:
        c_TN, curve = given(step, mu, need_hessian)
        assert (curve is not None) == need_hessian
        asked.append(need_hessian)
        steps.append(next(k for k in range(3) if trajectory.steps[k] is step))
        return c_TN, curve

    metagrad.sweep(counted, trajectory, worlds.outer_grad(world, trajectory.adapter), **options)
    assert asked == want
    assert steps == [2, 1, 0][: len(want)]


@pytest.mark.parametrize("engine", ["blockwise", "blockwise keep"])
def test_no_hessian_means_no_backward_through_the_blocks(
    engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Count what is really run: each block once forward for c alone, and once more in the recomputing sweep for H mu."""
    world, (rule, lr) = worlds.shared(), RULES["sgd"]
    trajectory = worlds.loop(world, rule, worlds.rates(world, lr), 1)
    mu = worlds.outer_grad(world, trajectory.adapter)
    ran: list[int] = []
    real = metagrad.run_block

    def counted(parts: blocks.Split, call: blocks.Call, i: int, *rest: Any) -> Tensor:
        ran.append(i)
        return real(parts, call, i, *rest)

    monkeypatch.setattr(metagrad, "run_block", counted)
    worlds.products(world, engine, world.weight_TN)(trajectory.steps[0], mu, False)
    assert ran == [0, 1]
    ran.clear()
    worlds.products(world, engine, world.weight_TN)(trajectory.steps[0], mu, True)
    assert ran == ([0, 1, 1, 0] if engine == "blockwise" else [0, 1])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("engine", ["reverse", "blockwise"])
def test_truncation(engine: str, rule: str) -> None:
    world, (own, lr), K = worlds.shared(), RULES[rule], 2
    whole = full(engine, rule, K)
    for last in (K, K + 2):
        same = meta(world, engine, own, lr, K, last_steps=last, need_init=True)
        assert torch.equal(same.weight_TN, whole.weight_TN)
    got = meta(world, engine, own, lr, K, last_steps=1, need_lr=True)
    want = references.unroll(world, own, lr, K, last_steps=1)
    assert got.lr is not None and got.init is None
    assert error(got.weight_TN, want.weight_TN) < 1e-11
    assert error(got.lr, want.lr) < 1e-11
    assert error(got.weight_TN, whole.weight_TN) > 1e-3
    assert (got.weight_TN[world.valid_TN].abs() > 1e-6).all()
    with pytest.raises(ValueError, match="need_init with truncation"):
        meta(world, engine, own, lr, K, last_steps=1, need_init=True)


def test_one_rate_for_all_is_the_sum_over_keys() -> None:
    world, (rule, lr) = worlds.shared(), RULES["momentum"]
    got = meta(world, "blockwise", rule, lr, 2, need_lr=True).lr
    assert got is not None and got.keys() == world.start.keys()
    assert all(value.shape == () for value in got.values())

    def loss(rate: float) -> Tensor:
        return worlds.outer_loss(world, worlds.loop(world, rule, worlds.rates(world, rate), 2).adapter).sum()

    h = 1e-6
    assert error(torch.stack(list(got.values())).sum(), (loss(lr + h) - loss(lr - h)) / (2 * h)) < 1e-6


def test_each_key_may_have_its_own_rate() -> None:
    """The sweep must hand each key's own rate to the optimizer: rates that differ, against numeric differences."""
    world, (rule, _) = worlds.shared(), RULES["momentum"]
    lr = {key: torch.tensor(0.1 + 0.02 * i, dtype=torch.float64) for i, key in enumerate(world.start)}
    trajectory = worlds.loop(world, rule, lr, 2)
    given = worlds.products(world, "blockwise", world.weight_TN)
    got = metagrad.sweep(given, trajectory, worlds.outer_grad(world, trajectory.adapter), need_lr=True)
    assert got.lr is not None
    for key in list(lr)[::7]:
        up, down = ({**lr, key: lr[key] + sign * 1e-5} for sign in (1, -1))
        want = sum(
            sign * worlds.outer_loss(world, worlds.loop(world, rule, own, 2).adapter).sum()
            for sign, own in ((1, up), (-1, down))
        ) / torch.tensor(2e-5)
        assert abs(got.lr[key] - want) < 1e-8 + 1e-6 * abs(want)
