"""What rewards the generator: the credit at the scorer's weights, at uniform ones, or what leaving out does (outer.credit)."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from ranks import ROOT
from steps import GOOD, SGD, N, T, World, make_world, naive_generator_gradient, naive_outer, tasks
from torch import Tensor

from mass import accumulate, episode, inner, metrics, plan, practice
from mass.credit import rises
from mass.episode import Result
from mass.recipe import load
from mass.rewards import Verdict
from mass.worlds import Truth

UNIFORM = "outer.credit=uniform"
LEFT_OUT = "outer.credit=left_out"
# one is malformed: weights are uniform over the valid examples of a task
EXAMPLES = [[GOOD[0][0], None, *GOOD[0][2:]], GOOD[1]]
RULES = {
    "sgd": SGD,
    "adam": ("inner.optimizer=adam", "inner.lr=0.01", "inner.eps_root=1e-4"),
    "clipped": ("inner.lr=0.2", "inner.clip=0.5"),
}


def part(result: Result, group: str) -> dict[str, Tensor]:
    return {key: g for key, g in result.gradients.items() if key.startswith(group)}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[key], b[key]) for key in a)


def scores(world: World) -> Tensor:
    """What the world's scorer says of its examples."""
    s, r = world.setting, world.setting.recipe.scorer
    texts = [task.problem.text for task in tasks()]
    inputs = episode.features(s.lm, s.parts, s.prompts, world.practice, texts, r.layers, r.pool)
    return torch.func.functional_call(s.head, dict(world.eta), inputs).detach()


def alone(t: int) -> tuple[bool, ...]:
    """The one task in which a score of it changes anything."""
    return tuple(other == t for other in range(T))


@pytest.mark.parametrize("rule", RULES)
def test_uniform_credit_is_the_derivative_at_equal_scores(monkeypatch: pytest.MonkeyPatch, rule: str) -> None:
    """By differences of the whole pipeline in each score, for both engines; the scorer keeps the credit at its own weights."""
    more = (*RULES[rule], "outer.gamma=0", "outer.beta=0.3")
    world = make_world(monkeypatch, *more, UNIFORM, examples=EXAMPLES)
    valid_TN, h = world.practice.valid_TN, 1e-4
    credit_TN = torch.zeros(T, N).double()
    for t in range(T):
        for n in range(N):
            shift_TN = torch.zeros(T, N).double()
            shift_TN[t, n] = h
            up, down = (naive_outer(world, score_TN=sign * shift_TN, counts=alone(t)) for sign in (1, -1))
            credit_TN[t, n] = -T * (up - down) / (2 * h)
    assert credit_TN[0, 1] == 0 and credit_TN[valid_TN].abs().min() > 1e-6
    advantage_TN = torch.full((T, N), -0.5).double()
    for t in range(T):
        own = credit_TN[t][valid_TN[t]]
        advantage_TN[t][valid_TN[t]] = (own - own.mean()) / own.std()
    wanted = naive_generator_gradient(world, advantage_TN)
    for engine in ("reverse", "blockwise"):
        mode = f"meta_gradient.mode={engine}"
        result = make_world(monkeypatch, *more, mode, UNIFORM, examples=EXAMPLES).run()
        for key, want in wanted.items():
            # old log-probabilities are kept in fp32
            torch.testing.assert_close(result.gradients[f"policy/{key}"], want, rtol=1e-4, atol=1e-7)
        plain = make_world(monkeypatch, *more, mode, examples=EXAMPLES).run()
        assert same(part(result, "scorer"), part(plain, "scorer"))
        assert torch.equal(result.credit_TN, plain.credit_TN)
        assert not same(part(result, "policy"), part(plain, "policy")), "the scores of this world differ"


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("rule", RULES)
def test_left_out_credit_is_the_rise_without_the_example(
    monkeypatch: pytest.MonkeyPatch, rule: str, steps: int
) -> None:
    """By the whole pipeline task by task without each example, under the scorer's weights of the others."""
    more = (*RULES[rule], f"inner.steps={steps}", "outer.gamma=0", "outer.beta=0.3")
    world = make_world(monkeypatch, *more, LEFT_OUT, examples=EXAMPLES)
    score_TN, valid_TN = scores(world), world.practice.valid_TN
    credit_TN = torch.zeros(T, N).double()
    whole = [naive_outer(world, score_TN=score_TN, counts=alone(t)) for t in range(T)]
    for t, n in valid_TN.nonzero().tolist():
        without_TN = score_TN.clone()
        without_TN[t, n] = -math.inf
        credit_TN[t, n] = T * (naive_outer(world, score_TN=without_TN, counts=alone(t)) - whole[t])
    assert credit_TN[valid_TN].abs().min() > 1e-6
    result = world.run()
    advantage_TN = torch.where(valid_TN, credit_TN, -0.5)
    for key, want in naive_generator_gradient(world, advantage_TN).items():
        # old log-probabilities are kept in fp32
        torch.testing.assert_close(result.gradients[f"policy/{key}"], want, rtol=1e-4, atol=1e-7)
    plain = make_world(monkeypatch, *more, examples=EXAMPLES).run()
    assert same(part(result, "scorer"), part(plain, "scorer"))
    assert torch.equal(result.credit_TN, plain.credit_TN)
    assert result.metrics["tokens/trained"] == (2 if steps == 1 else 1 + N) * plain.metrics["tokens/trained"]
    assert result.metrics["tokens/outer"] == (2 + N) / 2 * plain.metrics["tokens/outer"]


def test_left_out_credit_has_no_part_in_a_task_that_exploded(monkeypatch: pytest.MonkeyPatch) -> None:
    more = (*SGD, "outer.gamma=0", "outer.beta=0", "outer.malformed_penalty=0")
    monkeypatch.setattr(inner, "exploded", lambda before_T, *_: torch.ones_like(before_T).bool())
    result = make_world(monkeypatch, *more, LEFT_OUT, examples=EXAMPLES).run()
    assert result.metrics["meta/exploded"] == 1
    assert all((g == 0).all() for g in part(result, "policy").values())


def test_a_loop_that_explodes_without_an_example_gives_it_no_reward(monkeypatch: pytest.MonkeyPatch) -> None:
    world = make_world(monkeypatch, *SGD, "outer.gamma=0", LEFT_OUT)
    rise_TN = torch.linspace(-1, 1, T * N).double().view(T, N)

    def gradients(value: float) -> dict[str, Tensor]:
        rise_TN[0, 1], rise_TN[1, 2] = value, value
        monkeypatch.setattr(episode, "rises", lambda *_: (rise_TN, 0, 0))
        return part(world.run(), "policy")

    zero = gradients(0.0)
    assert same(gradients(math.nan), zero) and same(gradients(math.inf), zero)
    assert any((g != 0).any() for g in zero.values())


@pytest.mark.parametrize("steps", [1, 2])
def test_left_out_credit_of_a_verified_loss_shares_its_seeds(
    monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    """An update that changes nothing: the answers and their verdicts are the same."""
    more = (*SGD, "outer.loss=verifier", "inner.lr=0", f"inner.steps={steps}", "outer.gamma=0")
    world = make_world(monkeypatch, *more, LEFT_OUT)
    seen: list[Tensor] = []
    monkeypatch.setattr(episode, "rises", lambda *given: seen.append(rises(*given)[0]) or rises(*given))
    world.run()
    assert len(seen) == 1 and (seen[0] == 0).all()


def test_where_scores_are_equal_both_credits_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the uniform one does not depend on the scorer."""
    runs = []
    for credit in ("score", "uniform"):
        world = make_world(monkeypatch, *SGD, f"outer.credit={credit}", examples=EXAMPLES)
        level = {key: torch.zeros_like(x) for key, x in world.eta.items()}
        runs += [world.run(eta=level), world.run()]
    flat, sharp, uniform_flat, uniform_sharp = (part(x, "policy") for x in runs)
    assert same(flat, uniform_flat) and same(uniform_flat, uniform_sharp)
    assert not same(flat, sharp)


def test_through_init_and_the_inner_rate_keep_the_loop_at_the_scorers_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without a generator gradient in sight, what is left of the policy's is the start of the weighted loop."""
    more = (*SGD, "outer.gamma=0.3", "outer.through_init=true", "inner.learned_lr=one", "outer.beta=0")
    off = "outer.min_spread=1e9", "outer.malformed_penalty=0"
    plain, uniform = (
        make_world(monkeypatch, *more, *off, f"outer.credit={credit}").run()
        for credit in ("score", "uniform")
    )
    assert same(plain.gradients, uniform.gradients)
    assert any((g != 0).any() for g in part(plain, "policy").values())


def test_the_second_loop_is_run_and_counted_where_a_generator_learns_from_it_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole, seen = practice.fine_tune, []

    def fine_tune(*arguments: Any, **more: Any) -> practice.Tuned:
        seen.append(arguments[2])
        return whole(*arguments, **more)

    monkeypatch.setattr(episode, "fine_tune", fine_tune)
    plain = make_world(monkeypatch, *SGD, "outer.loss=verifier").run()
    assert len(seen) == 1
    world = make_world(monkeypatch, *SGD, "outer.loss=verifier", UNIFORM)
    result = world.run()
    assert len(seen) == 3 and (seen[2] == 1).all() and (seen[1] != 1).all()
    assert result.metrics["tokens/trained"] == 2 * plain.metrics["tokens/trained"]
    extra = result.metrics["tokens/outer"] - plain.metrics["tokens/outer"]
    assert 0 < extra < plain.metrics["tokens/outer"]
    assert same(part(result, "scorer"), part(plain, "scorer"))
    world.run(practice=world.practice)
    for off in ("outer.lr_policy=0", "outer.generator=0"):
        make_world(monkeypatch, *SGD, UNIFORM, off).run()
    assert len(seen) == 6


@pytest.mark.parametrize("how", [UNIFORM, LEFT_OUT])
def test_tasks_in_parts_are_the_tasks_at_once(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    world = make_world(monkeypatch, *SGD, how, examples=EXAMPLES)
    asked = world.practice

    def some(lm: Any, prompts: Any, targets: list[str], **more: Any) -> practice.Practice:
        at = [t for t, task in enumerate(tasks()) if task.problem.text in targets]
        examples = [asked.examples[t] for t in at]
        packed, valid_TN = practice.pack_examples(lm, prompts, examples, more["solve_shots"])
        return practice.Practice(
            [asked.prompts[t] for t in at], [asked.rollouts[t] for t in at], examples, packed, valid_TN
        )

    monkeypatch.setattr(episode, "write_examples", some)
    arguments = (world.setting, tasks(), 0, world.policy, world.eta, world.log_lr)
    whole, parts = (accumulate.run(*arguments, at_once=n) for n in (None, 1))
    for key, want in whole.gradients.items():
        torch.testing.assert_close(parts.gradients[key], want)
    assert any((g != 0).any() for g in part(whole, "policy").values())


def test_generator_auc_is_of_the_credit_that_rewards(monkeypatch: pytest.MonkeyPatch) -> None:
    """One example of each task is right: that whose rank the weights of the credit change most."""
    # sharp weights: with the ones of this world both credits give the same order
    world = make_world(monkeypatch, *SGD, "scorer.temperature=0.02")
    level = {key: torch.zeros_like(x) for key, x in world.eta.items()}
    share = []
    for credit_TN in (world.run().credit_TN, world.run(eta=level).credit_TN):
        share.append((credit_TN.unsqueeze(2) > credit_TN.unsqueeze(1)).double().sum(2) / (N - 1))
    chosen = (share[1] - share[0]).abs().argmax(1, keepdim=True)
    texts = [world.practice.examples[t][n].problem for t, n in enumerate(chosen.flatten().tolist())]
    monkeypatch.setattr(metrics, "truth", lambda task, problem, _: Truth(problem in texts, True, None))
    plain, even = (own.gather(1, chosen).mean().item() for own in share)
    assert plain != even
    for credit, want in (("score", plain), ("uniform", even)):
        found = make_world(monkeypatch, *SGD, "scorer.temperature=0.02", f"outer.credit={credit}").run()
        assert found.metrics["generator/auc"] == pytest.approx(want)
        assert found.metrics["credit/auc"] == pytest.approx(plain)
    flat = make_world(monkeypatch, *SGD, UNIFORM, "outer.min_spread=1e9").run().metrics
    assert flat["generator/auc"] == 0.5, "without advantage all are alike"


def test_a_plan_counts_the_second_loop() -> None:
    def loop(*overrides: str) -> float:
        made = load(ROOT / "recipes/smoke.yaml", list(overrides))
        return plan._flops(made, 100, 10)["inner loop and meta, reverse"]

    assert loop(UNIFORM) == 2 * loop()
    assert loop(UNIFORM, "outer.lr_policy=0") == loop() == loop(LEFT_OUT)


def test_a_plan_counts_the_loops_without_each_example() -> None:
    def loops(*overrides: str) -> dict[str, float]:
        return plan._flops(load(ROOT / "recipes/smoke.yaml", list(overrides)), 100, 10)

    name, policy = "without each example", "policy gradient"
    one, two = (loops(LEFT_OUT, f"inner.steps={steps}")[name] for steps in (1, 2))
    assert two > one > 0
    assert name not in loops() and name not in loops(LEFT_OUT, "outer.generator=0")
    # a generator that is not trained has no pass of its own, and nothing is held where no divergence is taken
    assert loops("outer.generator=0")[policy] == 0 == loops("outer.lr_policy=0")[policy]
    free = loops("outer.beta=0")[policy]
    assert 0 < free == loops("outer.beta=0", "outer.reward=answer")[policy]
    held = loops("outer.beta=0", "outer.reward=answer", "outer.beta_check=1")[policy]
    assert held == loops("outer.beta=1")[policy] > free


class Broken:
    """Verdicts of a verifier that crashes on the problems in `on`."""

    def __init__(self, on: set[str]) -> None:
        self.on = on

    def verify_all(self, items: Any) -> list[Verdict]:
        scores = [math.nan if t.problem.id in self.on else float(len(text) % 2) for text, t in items]
        return [Verdict(x, "timeout" if math.isnan(x) else "right") for x in scores]


@pytest.mark.parametrize("how", ["outer.credit=score", LEFT_OUT])
def test_a_task_without_any_verdict_is_left_out_and_not_wrong(
    monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    world = make_world(monkeypatch, *SGD, how, "outer.loss=verifier")

    def run(*on: str) -> episode.Result:
        setting = replace(world.setting, verifier=Broken(set(on)))  # type: ignore[arg-type]
        return replace(world, setting=setting).run()

    sound, half, none = run(), run("p0"), run("p0", "p1")
    tags = ("meta/loss", "meta/loss_before", "meta/gain", "reward/solve_before", "reward/solve_after")
    assert 0 < sound.metrics["verifier/failures"] + 1 <= half.metrics["verifier/failures"]
    for tag in tags:
        assert math.isfinite(half.metrics[tag]) and (half.counts[tag], sound.counts[tag]) == (1, T)
        assert math.isnan(none.metrics[tag]) and none.counts[tag] == 0
    assert half.metrics["meta/loss"] == pytest.approx(1 - half.metrics["reward/solve_after"])
    assert half.credit_TN[0].abs().max() == 0 and none.credit_TN.abs().max() == 0
    # parts and ranks put together what is known
    both, _ = accumulate._mean([half, none])
    assert both["meta/loss"] == half.metrics["meta/loss"]
    assert all(g.isfinite().all() for one in (half, none) for g in one.gradients.values())


def test_shares_of_known_truth_are_pooled_over_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many pairs and examples as there are, however the tasks are cut into parts."""
    world = make_world(
        monkeypatch, *SGD, examples=[EXAMPLES[0], [EXAMPLES[1][0], EXAMPLES[1][1], None, None]]
    )
    texts = [e.problem for own in world.practice.examples for e in own if e.valid]
    right = {texts[0], texts[-1]}
    monkeypatch.setattr(metrics, "truth", lambda task, problem, _: Truth(problem in right, True, None))
    whole = world.run()
    found, counts = metrics.truth_metrics(
        world.practice, tasks(), whole.weight_TN, -whole.credit_TN, whole.credit_TN, torch.ones(T).bool()
    )
    assert counts["generator/right"] == len(texts) and found["generator/right"] == 2 / len(texts)
    assert counts["scorer/auc"] == whole.counts["scorer/auc"] == 3
    parts = [
        replace(whole, metrics={"scorer/auc": x}, counts={"scorer/auc": n}) for x, n in ((1.0, 1), (0.5, 3))
    ]
    assert accumulate._mean(parts)[0]["scorer/auc"] == pytest.approx(2.5 / 4)
