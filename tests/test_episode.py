"""One outer step on a tiny model with hand-made examples: what it reports, and which tasks and examples give no gradient."""

import dataclasses
import math
import warnings
from types import SimpleNamespace
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
    naive_outer,
    random_direction,
    size,
    slope,
    tasks,
)
from torch import Tensor

from mass import episode, metrics, practice
from mass.practice import Practice
from mass.problems import Task
from mass.worlds import Truth


def test_weights_credit_and_effective_examples_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    result = make_world(monkeypatch, *SGD).run()
    assert result.weight_TN.sum(1).tolist() == pytest.approx([N, N])
    share = result.weight_TN / N
    assert result.metrics["scorer/effective_examples"] == pytest.approx(
        (1 / share.square().sum(1)).mean().item()
    )
    assert 1 < result.metrics["scorer/effective_examples"] < N
    assert result.metrics["generator/valid"] == 1 and result.metrics["meta/exploded"] == 0
    assert result.metrics["meta/gain"] == pytest.approx(
        result.metrics["meta/loss_before"] - result.metrics["meta/loss"]
    )


NOTHING = [[None] * N, [None] * N]


@pytest.mark.parametrize("loss", ["gold", "verifier"])
def test_a_batch_without_a_valid_example_has_no_gradient_but_penalty_and_kl(
    monkeypatch: pytest.MonkeyPatch, loss: str
) -> None:
    off = (
        "outer.gamma=0",
        "outer.malformed_penalty=0",
        "outer.beta=0",
        f"outer.loss={loss}",
        "inner.learned_lr=one",
    )
    result = make_world(monkeypatch, *SGD, *off, examples=NOTHING).run()
    assert all((g == 0).all() for g in result.gradients.values())
    assert result.metrics["generator/empty_tasks"] == 1 and result.metrics["generator/valid"] == 0
    assert result.metrics["meta/exploded"] == 0
    if loss == "gold":
        assert result.metrics["meta/gain"] == 0

    world = make_world(
        monkeypatch, *SGD, "outer.gamma=0", "outer.beta=0.2", f"outer.loss={loss}", examples=NOTHING
    )
    punished = world.run()
    want = naive_generator_gradient(world, torch.full((T, N), -0.5).double())
    for key, g in want.items():
        torch.testing.assert_close(punished.gradients[f"policy/{key}"], g, rtol=1e-5, atol=1e-8)
    assert max(g.abs().max() for g in want.values()) > 1e-4
    assert all((g == 0).all() for key, g in punished.gradients.items() if key.startswith("scorer/"))


def test_a_batch_without_a_valid_example_warns_of_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    world = make_world(monkeypatch, *SGD, examples=NOTHING)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        world.run()


def test_a_task_without_a_valid_example_leaves_the_others_their_gradient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = make_world(
        monkeypatch, *SGD, *ONLY_META, "outer.through_init=true", examples=[GOOD[0], [None] * N]
    )
    result = world.run()
    direction = random_direction(world.eta, 12)
    numeric = slope(lambda x: naive_outer(world, eta=x), world.eta, direction)
    assert along(result, "scorer", direction) == pytest.approx(numeric, rel=1e-5)
    assert (result.credit_TN[1] == 0).all() and (result.weight_TN[1] == 0).all()
    assert result.credit_TN[0].abs().max() > 0


def test_an_exploded_task_is_dropped_from_every_gradient_through_the_inner_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = practice.fine_tune

    def fine_tune(*arguments: Any, **more: Any) -> practice.Tuned:
        return dataclasses.replace(whole(*arguments, **more), exploded_T=torch.tensor([True, False]))

    monkeypatch.setattr(episode, "fine_tune", fine_tune)
    world = make_world(monkeypatch, *SGD, *ONLY_META, "outer.through_init=true", "inner.learned_lr=one")
    result = world.run()
    for name, at in (("scorer", world.eta), ("policy", world.policy)):
        argument = {"scorer": "eta", "policy": "policy"}[name]

        def second_alone(x: dict[str, Tensor], argument: str = argument) -> float:
            return naive_outer(world, log_lr=world.log_lr, counts=(False, True), **{argument: x})

        direction = random_direction(at, 13)
        assert along(result, name, direction) == pytest.approx(
            slope(second_alone, at, direction), rel=1e-5
        ), name
    assert (result.credit_TN[0] == 0).all() and result.credit_TN[1].abs().max() > 0
    assert result.metrics["meta/exploded"] == 0.5


@pytest.mark.parametrize("mode", ["reverse", "blockwise", "finite_difference"])
def test_a_task_that_is_not_finite_is_dropped_like_any_that_exploded(
    monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    whole = practice.fine_tune
    made = []
    for value in (1.0, torch.nan):

        def fine_tune(*arguments: Any, value: float = value, **more: Any) -> practice.Tuned:
            tuned = whole(*arguments, **more)

            def spoilt(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
                found = {key: x.clone() for key, x in tensors.items()}
                for x in found.values():
                    x[0] *= value
                return found

            way = tuned.trajectory
            steps = [
                dataclasses.replace(
                    step,
                    adapter=spoilt(step.adapter),
                    state=spoilt(step.state),
                    grad=step.grad and spoilt(step.grad),
                )
                for step in way.steps[1:]
            ]
            way = dataclasses.replace(way, steps=[way.steps[0], *steps], adapter=spoilt(way.adapter))
            return dataclasses.replace(tuned, trajectory=way, exploded_T=torch.tensor([True, False]))

        monkeypatch.setattr(episode, "fine_tune", fine_tune)
        made.append(
            make_world(
                monkeypatch,
                *SGD,
                *ONLY_META,
                "outer.through_init=true",
                "inner.learned_lr=one",
                "inner.steps=2",
                f"meta_gradient.mode={mode}",
            ).run()
        )
    finite, broken = made
    for key, want in finite.gradients.items():
        torch.testing.assert_close(broken.gradients[key], want, rtol=1e-12, atol=0)
    assert torch.equal(broken.credit_TN, finite.credit_TN) and (broken.credit_TN[0] == 0).all()
    assert finite.gradients["inner_lr/all"].abs() > 0 and size(finite, "policy") > 0
    assert math.isfinite(broken.metrics["meta/loss"])


def test_an_inner_loss_that_grows_too_much_explodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """At a rate far too large. Which tasks explode is the model's business; that they give no credit is ours."""
    result = make_world(monkeypatch, "inner.lr=1000", "inner.max_growth=1.001", *ONLY_META).run()
    dropped = (result.credit_TN == 0).all(1)
    assert result.metrics["meta/exploded"] == dropped.double().mean() > 0
    calm = make_world(monkeypatch, "inner.lr=1000", "inner.max_growth=100", *ONLY_META).run()
    assert calm.metrics["meta/exploded"] == 0 and calm.credit_TN.abs().max(1).values.min() > 0


def test_a_policy_that_is_kept_costs_no_generator_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    result = make_world(monkeypatch, *SGD, "outer.lr_policy=0", "outer.gamma=0").run()
    assert all((g == 0).all() for key, g in result.gradients.items() if key.startswith("policy/"))
    assert size(result, "scorer") > 0


def test_a_step_answers_before_and_after_for_the_table_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    world = make_world(monkeypatch, *SGD)
    assert world.run().answers == ([], [])
    seen: list[SimpleNamespace] = []
    whole = episode.answer

    def answer(lm: Any, prompts: Any, targets: Any, **more: Any) -> Any:
        seen.append(SimpleNamespace(targets=list(targets), **more))
        return whole(lm, prompts, targets, **more)

    monkeypatch.setattr(episode, "answer", answer)
    before, after = world.run(show=1).answers
    assert len(before) == len(after) == 1
    assert [s.targets for s in seen] == [[tasks()[0].problem.text]] * 2
    assert all(s.sampling.temperature == 0 for s in seen)
    key = next(iter(world.policy))
    assert torch.equal(seen[0].adapter[key][0], world.policy[key])
    assert not torch.equal(seen[1].adapter[key][0], world.policy[key])


def test_the_same_step_twice_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    world = make_world(monkeypatch, *SGD, "outer.loss=verifier")
    a, b = world.run(), world.run()
    assert all(torch.equal(a.gradients[key], b.gradients[key]) for key in a.gradients)
    assert {k: v for k, v in a.metrics.items() if v == v} == {k: v for k, v in b.metrics.items() if v == v}


# ---- what the truth of the examples tells


def test_metrics_that_need_the_truth_are_there_where_it_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    unknown = make_world(monkeypatch, *SGD).run()
    tags = ("scorer/auc", "credit/auc", "generator/auc", "generator/right")
    assert all(unknown.metrics[tag] != unknown.metrics[tag] for tag in tags)

    def truth(task: Task, problem: str, solution: str) -> Truth | None:
        """Of the second task only: the first valid example is right and of the family, another is one of the two."""
        number = (
            [e.problem for e in unknown.practice.examples[1]].index(problem)
            if task.problem.id == "p1"
            else -1
        )
        return None if number < 0 else Truth(number < 2, number != 1, None)

    monkeypatch.setattr(metrics, "truth", truth)
    world = make_world(monkeypatch, *SGD)
    result = world.run()
    valid = [n for n, e in enumerate(world.practice.examples[1]) if e.valid]
    assert valid[0] == 0 and len(valid) > 1
    first, others = result.credit_TN[1, 0], result.credit_TN[1, valid[1:]]
    assert result.metrics["generator/right"] == pytest.approx(1 / len(valid))
    assert result.metrics["credit/auc"] == (first > others).double().mean()
    # weights rise with scores
    heavy = (result.weight_TN[1, 0] > result.weight_TN[1, valid[1:]]).double().mean()
    assert result.metrics["scorer/auc"] == heavy
    known = set(tags)
    assert {k: v for k, v in result.metrics.items() if k not in known and v == v} == {
        k: v for k, v in unknown.metrics.items() if k not in known and v == v
    }


def test_given_examples_are_used_and_teach_the_generator_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    world = make_world(monkeypatch, *SGD, "outer.gamma=0")
    written = world.run()

    def write(*_: Any, **__: Any) -> Practice:
        raise AssertionError("examples were given")

    monkeypatch.setattr(episode, "write_examples", write)
    given = world.run(practice=world.practice)
    assert torch.equal(given.credit_TN, written.credit_TN)
    assert size(written, "policy") > 0 and size(given, "policy") == 0
