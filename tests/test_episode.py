"""One outer step on a tiny float64 model with hand-made examples: every gradient against differences or a plain loop.

The reference pipeline below shares nothing with mass/ but the model's forward and the scorer's head: one sequence at a
time, no packing, no adjoint sweep, no torch.func.
"""

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ranks import ROOT
from tiny import tiny_lm
from torch import Tensor

from mass import blocks, episode, lora, metrics, outer, practice
from mass.episode import Result
from mass.generate import Rollout
from mass.lora import using
from mass.model import LanguageModel
from mass.optimizers import Rule
from mass.practice import Practice, pack_examples
from mass.problems import Problem, Task
from mass.prompts import Example, make_prompts
from mass.recipe import Recipe, load
from mass.rewards import Verdict
from mass.scorer import Scorer
from mass.setting import Setting
from mass.worlds import Truth

T, N = 2, 4

GOOD = [
    [
        ("1 + 2 =", "3\nAnswer: 3"),
        ("4 + 4 = ?", "Answer: 8"),
        ("2 + 5", "2 + 5 = 7. Answer: 7"),
        ("9 + 1", "Answer: 11"),
    ],
    [
        ("6 - 2", "Answer: 4"),
        ("7 - 7 = ?", "7 - 7 is 0.\nAnswer: 0"),
        ("8 - 5", "Answer: 1"),
        ("5 - 1", "It is Answer: 4"),
    ],
]


def tasks() -> list[Task]:
    rows = [("p0", "3 + 4 =", "7", "3 + 4 = 7\nAnswer: 7"), ("p1", "9 - 4 =", "5", "Answer: 5")]
    return [
        Task(Problem(id, text), answer, solution, "t", "numeric", None) for id, text, answer, solution in rows
    ]


class FixedVerifier:
    """A verdict that follows from the text alone: some answers are right, so that rewards have a spread."""

    def verify_all(self, items: Any) -> list[Verdict]:
        return [Verdict(float(sum(text.encode()) % 3 == 0), "right") for text, _ in items]


@dataclasses.dataclass
class World:
    """All that `episode.run` takes, in float64."""

    setting: Setting
    policy: dict[str, Tensor]
    eta: dict[str, Tensor]
    log_lr: dict[str, Tensor]
    practice: Practice

    def run(self, **changes: Any) -> Result:
        arguments = {"policy": self.policy, "eta": self.eta, "log_lr": self.log_lr} | changes
        return episode.run(self.setting, tasks(), 0, **arguments)


def make_world(
    monkeypatch: pytest.MonkeyPatch, *overrides: str, examples: Any = GOOD, old_noise: float = 0.4
) -> World:
    """A tiny Llama, a policy that is not zero, a scorer whose scores differ, and hand-made examples.

    The rollouts hold the text that a model would have written, with old log-probabilities off by `old_noise`.
    """
    recipe: Recipe = load(
        ROOT / "recipes/smoke.yaml",
        [f"generate.examples={N}", "generate.answer_tokens=6", "prompt.generate_shots=0", "outer.rollouts=6"]
        + ["scorer.hidden=8", "inner.clip=null", "inner.max_growth=100", "outer.malformed_penalty=0.5"]
        + list(overrides),
    )
    lm = tiny_lm("llama", torch.float64, targets=("q_proj", "v_proj", "down_proj"))
    parts = blocks.split(lm.hf, lm.lora)
    prompts = make_prompts(lm.tokenizer, "plain", None, None)
    generator = torch.Generator().manual_seed(7)
    policy = {
        key: 0.2 * torch.randn(x.shape, dtype=torch.float64, generator=generator)
        for key, x in lora.fresh(lm.lora, 2, generator, torch.float64).items()
    }
    head = Scorer(64, 2, 8).double()
    eta = {
        key: 0.3 * torch.randn(p.shape, dtype=torch.float64, generator=generator)
        for key, p in head.named_parameters()
    }
    i = recipe.inner
    rule = Rule(i.optimizer, i.momentum, i.beta1, i.beta2, i.eps, i.eps_root, i.clip)
    mode = recipe.meta_gradient.mode
    engine = "blockwise" if mode == "auto" else mode
    again = recipe.inner.checkpoint
    setting = Setting(recipe, lm, parts, engine, True, again, "", prompts, [], FixedVerifier(), rule, head)  # type: ignore[arg-type]
    names = {episode.rate_name(setting, key) for key in policy}
    log_lr = {name: torch.tensor([-1.0 + 0.1 * j]).double() for j, name in enumerate(sorted(names))}

    parsed = [
        [Example(*e, True, "") if e else Example("", "x", False, "no_answer") for e in own]
        for own in examples
    ]
    packed, valid_TN = pack_examples(lm, prompts, parsed, [[] for _ in parsed])
    asked = [prompts.generate(t.problem.text) for t in tasks()]
    rollouts = []
    for t, own in enumerate(parsed):
        row = []
        for e in own:
            tokens = lm.tokenizer.encode(
                f" {e.problem}\nSolution: {e.solution}\n\n", add_special_tokens=False
            )
            logprob = naive_logprobs(lm, asked[t] + tokens, len(asked[t]), policy).detach()
            noise = old_noise * torch.randn(len(tokens), generator=generator).double()
            row.append(Rollout(tokens, (logprob + noise).tolist(), True, ""))
        rollouts.append(row)
    made = Practice(asked, rollouts, parsed, packed, valid_TN)
    monkeypatch.setattr(episode, "write_examples", lambda *a, **k: made)
    whole = practice.features

    def features(*arguments: Any) -> tuple[Tensor, Tensor]:
        # differences need float64; the features of the run are fp32
        task_TF, example_TNF = whole(*arguments)
        return task_TF.double(), example_TNF.double()

    monkeypatch.setattr(episode, "features", features)
    # the scorer's gradient without its normalisation is the derivative of the outer loss
    monkeypatch.setattr(outer, "normalised", lambda by_score_TN, min_spread: by_score_TN)
    return World(setting, policy, eta, log_lr, made)


# ---- the reference pipeline


def naive_logprobs(
    lm: LanguageModel, tokens: list[int], prompt: int, adapter: Mapping[str, Tensor] | None
) -> Tensor:
    """log p of each token after the prompt, by the whole model on one sequence; `adapter` without task axis."""
    own = None if adapter is None else {key: x.unsqueeze(0) for key, x in adapter.items()}
    with using(lm.lora, own), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        logits = lm.hf(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
    picked = logits.log_softmax(-1)[torch.arange(len(tokens) - 1), torch.tensor(tokens[1:])]
    return picked[prompt - 1 :]


def naive_loss(world: World, problem: str, solution: str, adapter: Mapping[str, Tensor]) -> Tensor:
    prompts = world.setting.prompts
    asked = prompts.solve(problem)
    return -naive_logprobs(world.setting.lm, asked + prompts.solution(solution), len(asked), adapter).mean()


def naive_outer(
    world: World,
    *,
    eta: Mapping[str, Tensor] | None = None,
    policy: Mapping[str, Tensor] | None = None,
    log_lr: Mapping[str, Tensor] | None = None,
    counts: tuple[bool, ...] = (True,) * T,
) -> float:
    """Gold loss after adaptation, mean over tasks: scores -> weights -> K steps -> loss, task by task."""
    eta, policy = eta or world.eta, policy or world.policy
    s, r = world.setting, world.setting.recipe
    task_TF, example_TNF = episode.features(
        s.lm,
        s.parts,
        s.prompts,
        world.practice,
        [t.problem.text for t in tasks()],
        r.scorer.layers,
        r.scorer.pool,
    )
    score_TN = torch.func.functional_call(s.head, dict(eta), (task_TF, example_TNF)).detach()
    total = 0.0
    for t, task in enumerate(tasks()):
        examples = [e for e in world.practice.examples[t]]
        top = [torch.exp(score_TN[t, n] / r.scorer.temperature) * e.valid for n, e in enumerate(examples)]
        adapter = dict(policy)
        memory: dict[str, Tensor] = {}
        for k in range(r.inner.steps if any(e.valid for e in examples) else 0):
            leaf = {key: x.detach().requires_grad_() for key, x in adapter.items()}
            losses = [
                N * top[n] / sum(top) * naive_loss(world, e.problem, e.solution, leaf)
                for n, e in enumerate(examples)
                if e.valid
            ]
            grads = dict(zip(leaf, torch.autograd.grad(sum(losses) / N, list(leaf.values())), strict=True))
            if r.inner.clip is not None:
                norm = torch.stack([(g**2).sum() for g in grads.values()]).sum().sqrt()
                assert norm > r.inner.clip, "the clip is to act in this test"
                grads = {key: g * r.inner.clip / (norm + 1e-6) for key, g in grads.items()}
            for key, g in grads.items():
                rate = r.inner.lr if log_lr is None else log_lr[episode.rate_name(s, key)].exp().item()
                if r.inner.optimizer == "sgd":
                    memory[key] = r.inner.momentum * memory.get(key, torch.zeros_like(g)) + g
                    adapter[key] = adapter[key] - rate * memory[key]
                else:
                    b1, b2 = r.inner.beta1, r.inner.beta2
                    m = memory[f"m{key}"] = b1 * memory.get(f"m{key}", torch.zeros_like(g)) + (1 - b1) * g
                    v = memory[f"v{key}"] = b2 * memory.get(f"v{key}", torch.zeros_like(g)) + (1 - b2) * g * g
                    root = (v / (1 - b2 ** (k + 1)) + r.inner.eps_root).sqrt()
                    adapter[key] = adapter[key] - rate * m / (1 - b1 ** (k + 1)) / (root + r.inner.eps)
        with torch.no_grad():
            total += naive_loss(world, task.problem.text, task.solution, adapter).item() * counts[t]
    return total / T


def slope(
    value: Callable[[dict[str, Tensor]], float], at: Mapping[str, Tensor], direction: Mapping[str, Tensor]
) -> float:
    """Central difference of `value` at `at` along `direction`."""
    h = 1e-4
    up, down = (value({key: p + sign * h * direction[key] for key, p in at.items()}) for sign in (1, -1))
    return (up - down) / (2 * h)


def random_direction(at: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    out = {key: torch.randn(x.shape, dtype=torch.float64, generator=generator) for key, x in at.items()}
    norm = torch.stack([(x**2).sum() for x in out.values()]).sum().sqrt()
    return {key: x / norm for key, x in out.items()}


def size(result: Result, group: str) -> float:
    return sum(g.square().sum().item() for key, g in result.gradients.items() if key.startswith(group)) ** 0.5


def along(result: Result, group: str, direction: Mapping[str, Tensor]) -> float:
    return sum((result.gradients[f"{group}/{key}"] * d).sum().item() for key, d in direction.items())


SGD = ("inner.lr=0.2", "inner.momentum=0.5")
ADAM = ("inner.optimizer=adam", "inner.lr=0.01", "inner.eps_root=1e-4")
CLIPPED = ("inner.lr=0.2", "inner.clip=0.5")
ONLY_META = ("outer.generator=0", "outer.gamma=0", "outer.beta=0", "scorer.l2=0")


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
        assert {0.0, 1.0} != {results["reverse"].metrics["reward/solve_after"]}
        assert results["reverse"].metrics["meta/loss"] == pytest.approx(
            1 - results["reverse"].metrics["reward/solve_after"]
        )


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


def naive_generator_gradient(world: World, advantage_TN: Tensor) -> dict[str, Tensor]:
    """Clipped policy gradient + beta k3 to the base over all T N rollouts, one at a time."""
    r, lm = world.setting.recipe.outer, world.setting.lm
    leaf = {key: x.detach().requires_grad_() for key, x in world.policy.items()}
    total = torch.zeros((), dtype=torch.float64)
    outside = 0
    for t in range(T):
        for n, rollout in enumerate(world.practice.rollouts[t]):
            asked = world.practice.prompts[t]
            new = naive_logprobs(lm, asked + rollout.tokens, len(asked), leaf)
            with torch.no_grad():
                base = naive_logprobs(lm, asked + rollout.tokens, len(asked), None)
            ratio = (new - torch.tensor(rollout.logprobs)).exp()
            a = advantage_TN[t, n]
            inside = torch.where(ratio > 1 + r.ratio_clip, 1 + r.ratio_clip, ratio)
            inside = torch.where(ratio < 1 - r.ratio_clip, 1 - r.ratio_clip, inside)
            outside += int(((ratio - 1).abs() > r.ratio_clip).sum())
            gain = torch.where(ratio * a < inside * a, ratio * a, inside * a)
            kl = (base - new).exp() - (base - new) - 1
            total = total + (-gain + r.beta * kl).mean() / (T * N)
    assert outside > 10, "the clip is to act in this test"
    return dict(zip(leaf, torch.autograd.grad(r.generator * total, list(leaf.values())), strict=True))


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
    tags = ("scorer/auc", "credit/auc", "generator/right")
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
