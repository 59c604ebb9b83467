"""A world for one outer step: a tiny float64 model with hand-made examples; and its reference pipeline.

The pipeline shares nothing with mass/ but the model's forward and the scorer's head: one sequence at a time, no packing,
no adjoint sweep, no torch.func.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from ranks import ROOT
from tiny import tiny_lm
from torch import Tensor

from mass import blocks, episode, lora, outer, practice
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
            text = f" {e.problem}\nSolution: {e.solution}"
            tokens = lm.tokenizer.encode(f"{text}\n\n", add_special_tokens=False)
            logprob = naive_logprobs(lm, asked[t] + tokens, len(asked[t]), policy).detach()
            noise = old_noise * torch.randn(len(tokens), generator=generator).double()
            row.append(Rollout(tokens, (logprob + noise).tolist(), True, text))
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


def naive_rows(
    lm: LanguageModel, tokens: list[int], prompt: int, adapter: Mapping[str, Tensor] | None
) -> Tensor:
    """log p of every token of the vocabulary at each token after the prompt, by the whole model on one sequence; `adapter`
    without task axis."""
    own = None if adapter is None else {key: x.unsqueeze(0) for key, x in adapter.items()}
    with using(lm.lora, own), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        logits = lm.hf(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
    return logits.log_softmax(-1)[prompt - 1 : -1]


def naive_logprobs(
    lm: LanguageModel, tokens: list[int], prompt: int, adapter: Mapping[str, Tensor] | None
) -> Tensor:
    """log p of each token after the prompt."""
    rows = naive_rows(lm, tokens, prompt, adapter)
    return rows[torch.arange(len(tokens) - prompt), torch.tensor(tokens[prompt:])]


def naive_kl(
    lm: LanguageModel, tokens: list[int], prompt: int, adapter: Mapping[str, Tensor] | None
) -> Tensor:
    """KL(policy || base) of the whole distribution at each token after the prompt."""
    ours = naive_rows(lm, tokens, prompt, adapter)
    with torch.no_grad():
        base = naive_rows(lm, tokens, prompt, None)
    return torch.stack([(p.exp() * (p - q)).sum() for p, q in zip(ours, base, strict=True)])


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
    score_TN: Tensor | None = None,
) -> float:
    """Gold loss after adaptation, mean over tasks: scores -> weights -> K steps -> loss, task by task; a task that does
    not count adds 0. `score_TN`: in place of the head's."""
    eta, policy = eta or world.eta, policy or world.policy
    s, r = world.setting, world.setting.recipe
    if score_TN is None:
        texts = [t.problem.text for t in tasks()]
        inputs = episode.features(
            s.lm, s.parts, s.prompts, world.practice, texts, r.scorer.layers, r.scorer.pool
        )
        score_TN = torch.func.functional_call(s.head, dict(eta), inputs).detach()
    total = 0.0
    for t, task in enumerate(tasks()):
        if not counts[t]:
            continue
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
            total += naive_loss(world, task.problem.text, task.solution, adapter).item()
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
ONLY_META = ("outer.generator=0", "outer.gamma=0", "outer.beta=0", "scorer.l2=0")


def naive_generator_gradient(world: World, advantage_TN: Tensor) -> dict[str, Tensor]:
    """Clipped policy gradient + beta KL to the base over all T N rollouts, one at a time."""
    r, lm = world.setting.recipe.outer, world.setting.lm
    leaf = {key: x.detach().requires_grad_() for key, x in world.policy.items()}
    total = torch.zeros((), dtype=torch.float64)
    outside = 0
    for t in range(T):
        for n, rollout in enumerate(world.practice.rollouts[t]):
            asked = world.practice.prompts[t]
            new = naive_logprobs(lm, asked + rollout.tokens, len(asked), leaf)
            ratio = (new - torch.tensor(rollout.logprobs)).exp()
            a = advantage_TN[t, n]
            inside = torch.where(ratio > 1 + r.ratio_clip, 1 + r.ratio_clip, ratio)
            inside = torch.where(ratio < 1 - r.ratio_clip, 1 - r.ratio_clip, inside)
            outside += int(((ratio - 1).abs() > r.ratio_clip).sum())
            gain = torch.where(ratio * a < inside * a, ratio * a, inside * a)
            kl = naive_kl(lm, asked + rollout.tokens, len(asked), leaf)
            total = total + (-gain + r.beta * kl).mean() / (T * N)
    assert outside > 10, "the clip is to act in this test"
    return dict(zip(leaf, torch.autograd.grad(r.generator * total, list(leaf.values())), strict=True))
