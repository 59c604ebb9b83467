"""The gradients of one outer step against differences or a plain loop (tests/steps.py)."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from steps import (
    GOOD,
    ONLY_META,
    SGD,
    N,
    T,
    along,
    make_world,
    naive_generator_gradient,
    naive_loss,
    naive_outer,
    random_direction,
    size,
    slope,
    tasks,
)
from torch import Tensor

from mass import episode, metagrad

ADAM = ("inner.optimizer=adam", "inner.lr=0.01", "inner.eps_root=1e-4")
CLIPPED = ("inner.lr=0.2", "inner.clip=0.5")


@pytest.mark.parametrize("inner", [SGD, ADAM, CLIPPED], ids=["sgd", "adam", "clipped"])
def test_scorer_and_start_gradients_are_the_derivatives_of_the_whole_pipeline(
    monkeypatch: pytest.MonkeyPatch, inner: tuple[str, ...]
) -> None:
    """Score -> weight -> inner loop -> outer loss, and the policy as the inner loop's start (through_init)."""
    world = make_world(monkeypatch, *inner, *ONLY_META, "outer.through_init=true")
    result = world.run()
    assert result.metrics["meta/loss"] == pytest.approx(naive_outer(world), rel=1e-8)
    for name, at in (("scorer", world.eta), ("policy", world.policy)):
        direction = random_direction(at, 11)

        def whole(x: dict[str, Tensor], name: str = name) -> float:
            return naive_outer(world, eta=x) if name == "scorer" else naive_outer(world, policy=x)

        numeric = slope(whole, at, direction)
        assert abs(numeric) > 1e-5
        assert along(result, name, direction) == pytest.approx(numeric, rel=1e-5), name


@pytest.mark.parametrize("kind", ["one", "layer"])
def test_learned_rate_gradient_is_the_derivative_by_its_logarithm(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    world = make_world(monkeypatch, *ONLY_META, f"inner.learned_lr={kind}")
    assert len(world.log_lr) == {"one": 1, "layer": 2}[kind]
    result = world.run()
    for name in world.log_lr:
        direction = {key: torch.ones(1).double() * (key == name) for key in world.log_lr}
        numeric = slope(lambda x: naive_outer(world, log_lr=x), world.log_lr, direction)
        got = result.gradients[f"inner_lr/{name}"]
        assert got.shape == world.log_lr[name].shape and abs(numeric) > 1e-3
        assert got.item() == pytest.approx(numeric, rel=1e-6)


def test_truncation_drops_the_early_steps_only(monkeypatch: pytest.MonkeyPatch) -> None:
    full = make_world(monkeypatch, *SGD, *ONLY_META).run()
    last = make_world(monkeypatch, *SGD, *ONLY_META, "meta_gradient.truncate=1").run()
    key = "scorer/net.4.weight"
    assert last.gradients[key].abs().max() > 0
    assert not torch.allclose(last.gradients[key], full.gradients[key], rtol=1e-2)
    same = make_world(monkeypatch, *SGD, *ONLY_META, "meta_gradient.truncate=2").run()
    torch.testing.assert_close(same.gradients[key], full.gradients[key])


MODES = ["blockwise", "reverse", "finite_difference"]


@pytest.mark.parametrize("loss", ["gold", "verifier"])
def test_the_scorer_gets_one_and_the_same_gradient_in_every_mode(
    monkeypatch: pytest.MonkeyPatch, loss: str
) -> None:
    results = {}
    for mode in MODES:
        world = make_world(
            monkeypatch, *SGD, "scorer.l2=0", f"meta_gradient.mode={mode}", f"outer.loss={loss}"
        )
        results[mode] = world.run()
    for mode, result in results.items():
        assert size(result, "scorer") > 1e-4, mode
        assert result.credit_TN.sum(1).abs().max() < 1e-6, "the softmax ignores shifts"
        for key, got in result.gradients.items():
            want = results["reverse"].gradients[key]
            loose = mode == "finite_difference"
            torch.testing.assert_close(
                got,
                want,
                rtol=1e-3 if loose else 1e-7,
                atol=1e-10 + (1e-4 if loose else 1e-7) * want.abs().max().item(),
            )
    if loss == "verifier":
        assert 0 < results["reverse"].metrics["reward/solve_after"] < 1, "equal rewards say nothing"
        assert results["reverse"].metrics["meta/loss"] == pytest.approx(
            1 - results["reverse"].metrics["reward/solve_after"]
        )


def test_generator_gradient_is_the_clipped_policy_gradient_and_kl(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one malformed example, in micro-batches that do not divide the rows, and a coefficient."""
    examples = [[GOOD[0][0], None, *GOOD[0][2:]], GOOD[1]]
    world = make_world(
        monkeypatch,
        *SGD,
        "outer.gamma=0",
        "outer.beta=0.3",
        "outer.generator=0.7",
        "outer.micro_rows=3",
        examples=examples,
    )
    result = world.run()
    credit_TN = result.credit_TN
    advantage_TN = torch.zeros(T, N, dtype=torch.float64)
    for t, valid in enumerate(world.practice.valid_TN):
        own = credit_TN[t][valid]
        advantage_TN[t][valid] = (own - own.mean()) / own.std()
    advantage_TN[0, 1] = -0.5
    assert credit_TN[0, 1] == 0 and advantage_TN.abs().max() > 1
    for key, want in naive_generator_gradient(world, advantage_TN).items():
        # old log-probabilities are kept in fp32
        torch.testing.assert_close(result.gradients[f"policy/{key}"], want, rtol=1e-5, atol=1e-8)
    assert result.metrics["policy/kl"] > 1e-3
    assert result.metrics["generator/valid"] == pytest.approx(7 / 8)


def test_gamma_adds_the_gradient_of_the_solver_loss_at_the_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    without = make_world(monkeypatch, *SGD, "outer.gamma=0").run()
    world = make_world(monkeypatch, *SGD, "outer.gamma=0.4")
    result = world.run()
    leaf = {key: x.detach().requires_grad_() for key, x in world.policy.items()}
    loss = torch.stack([naive_loss(world, task.problem.text, task.solution, leaf) for task in tasks()]).mean()
    assert result.metrics["meta/loss_before"] == pytest.approx(loss.item())
    for key, g in zip(leaf, torch.autograd.grad(0.4 * loss, list(leaf.values())), strict=True):
        torch.testing.assert_close(result.gradients[f"policy/{key}"] - without.gradients[f"policy/{key}"], g)


def test_scorer_l2_pulls_the_scores_together(monkeypatch: pytest.MonkeyPatch) -> None:
    without = make_world(monkeypatch, *SGD, "scorer.l2=0").run()
    world = make_world(monkeypatch, *SGD, "scorer.l2=0.5")
    result = world.run()
    s, r = world.setting, world.setting.recipe
    inputs = episode.features(
        s.lm,
        s.parts,
        s.prompts,
        world.practice,
        [t.problem.text for t in tasks()],
        r.scorer.layers,
        r.scorer.pool,
    )

    def penalty(eta: Mapping[str, Tensor]) -> float:
        score_TN = torch.func.functional_call(s.head, dict(eta), inputs)
        return 0.5 * (score_TN - score_TN.mean(1, keepdim=True)).square().mean(1).sum().item() / T

    direction = random_direction(world.eta, 3)
    numeric = slope(penalty, world.eta, direction)
    got = along(result, "scorer", direction) - along(without, "scorer", direction)
    assert got == pytest.approx(numeric, rel=1e-6) and abs(got) > 1e-3


@pytest.mark.parametrize("words", [["inner.steps=2", "meta_gradient.truncate=1"], ["inner.steps=2"]])
def test_reverse_keeps_no_graph_that_the_way_back_does_not_take(
    monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    kept: list[int] = []
    sweep = metagrad.sweep

    def swept(products: metagrad.Reverse, *arguments: Any, **more: Any) -> Any:
        kept.append(len(products._kept))
        out = sweep(products, *arguments, **more)
        kept.append(len(products._kept))
        return out

    monkeypatch.setattr(metagrad, "sweep", swept)
    make_world(monkeypatch, *SGD, *ONLY_META, "meta_gradient.mode=reverse", *words).run()
    assert kept == [1 if len(words) == 2 else 2, 0]


def test_a_policy_that_is_kept_has_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of the solver loss either, which would be a backward pass for nothing and a share in the clipped norm."""
    kept = make_world(monkeypatch, *SGD, "outer.lr_policy=0", "outer.gamma=0.5").run()
    moves = make_world(monkeypatch, *SGD, "outer.gamma=0.5").run()
    for key, g in kept.gradients.items():
        assert (g == 0).all() == key.startswith("policy/"), key
        assert (moves.gradients[key] != 0).any(), key
    assert kept.metrics["meta/loss_before"] == pytest.approx(moves.metrics["meta/loss_before"])
