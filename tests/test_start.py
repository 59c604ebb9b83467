"""inner.start=base: the policy only writes; updates and answers start from the base model, in training and at test time."""

from dataclasses import replace

import pytest
import torch
from handmade import PROBLEMS
from steps import ONLY_META, SGD, along, make_world, naive_outer, random_direction, slope, tasks
from tiny import tiny_kit

from mass import choices, credit
from mass.choices import Texts
from mass.methods import solve
from mass.setting import beginning, kit, task_batch

BASE = ("inner.start=base", "outer.gamma=0")


def test_an_outer_step_updates_a_fresh_adapter_and_trains_the_policy_to_write(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = make_world(monkeypatch, *SGD, *ONLY_META, *BASE)
    start = beginning(world.setting, world.policy)
    assert all((x == 0).all() == key.endswith(".B") for key, x in start.items())
    assert all(x.shape == world.policy[key].shape for key, x in start.items())
    result = world.run()
    assert result.metrics["meta/loss"] == pytest.approx(naive_outer(world, policy=start), rel=1e-8)
    direction = random_direction(world.eta, 11)
    numeric = slope(lambda x: naive_outer(world, eta=x, policy=start), world.eta, direction)
    assert along(result, "scorer", direction) == pytest.approx(numeric, rel=1e-5) and abs(numeric) > 1e-6
    # whatever the policy has become, the credit of given examples is the same
    other = {key: x + 0.1 for key, x in world.policy.items()}
    moved = world.run(policy=other, practice=world.practice)
    assert torch.equal(moved.credit_TN, result.credit_TN)
    assert moved.metrics["meta/loss_before"] == result.metrics["meta/loss_before"]
    writes = make_world(monkeypatch, *SGD, *BASE, "outer.beta=0").run()
    assert any((g != 0).any() for key, g in writes.gradients.items() if key.startswith("policy/"))


def test_what_leaving_out_does_is_measured_where_the_loop_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    world = make_world(monkeypatch, *SGD, *BASE)
    zero_TN = torch.zeros_like(world.run().weight_TN)
    other = {key: x + 0.1 for key, x in world.policy.items()}
    batches = [
        task_batch(world.setting, tasks(), world.practice, p, {}, credit.STEP) for p in (world.policy, other)
    ]
    (one, _), (two, _) = (credit.left_out(batch, zero_TN) for batch in batches)
    assert torch.equal(one, two) and one.abs().max() > 0
    dots = [credit.one_step(batch)[0] for batch in batches]
    assert torch.equal(*dots)


def test_training_and_test_time_start_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    for start in ("base", "policy"):
        world = make_world(monkeypatch, *SGD, f"inner.start={start}", "outer.gamma=0")
        made = kit(world.setting, world.policy, world.eta, {})
        ours, theirs = beginning(world.setting, world.policy), choices.kit.beginning(made)
        assert all(torch.equal(x, theirs[key].to(x)) for key, x in ours.items())
        assert (made.policy is None) == (made.author is not None) == (start == "base")


def test_the_base_answers_and_is_updated_where_an_author_writes(handmade: None) -> None:
    whole = tiny_kit()
    apart, bare = replace(whole, policy=None, author=whole.policy), replace(whole, policy=None)
    ours, theirs, policys = (solve(x, PROBLEMS, "none") for x in (apart, bare, whole))
    assert [r.solution for r in ours] == [r.solution for r in theirs] != [r.solution for r in policys]
    ours, theirs, policys = (solve(x, PROBLEMS, "quest") for x in (apart, bare, whole))
    assert [r.base_solution for r in ours] == [r.base_solution for r in theirs]
    # the examples are hand-made, so only where an update begins can differ
    assert [r.steps for r in ours] == [r.steps for r in theirs] != [r.steps for r in policys]
    assert any(r.steps for r in ours)


def test_the_author_writes_and_texts_are_shared_by_who_writes_them() -> None:
    whole = tiny_kit(texts=Texts())
    apart = replace(whole, policy=None, author=whole.policy)
    bare = replace(whole, policy=None)
    assert apart.marks == (bare.marks[0], whole.marks[1]) and whole.marks[0] != bare.marks[0]
    drawn = []
    for one in (whole, apart, bare):
        solve(one, PROBLEMS, "quest", baselines=False)
        assert one.texts is not None
        drawn.append(len(one.texts.found))
    # examples and, as none of them is well formed, answers; then the base's answers alone; then the base's examples alone
    assert drawn == [2, 3, 4]
