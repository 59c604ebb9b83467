"""One outer step on one rank: T tasks in, gradients of the outer parameters and what to log out.

generate -> score -> inner loop -> outer loss -> adjoint sweep -> credit -> policy gradient. The order of the calls below
is the order of docs/mathematics.md. Every loss is a mean over this rank's T tasks, a task without valid examples
included (its part is zero), so that the mean over ranks is the mean over all tasks.
"""

import math
import time
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mass import metagrad, outer, scorer
from mass.batch import Packed, Sequence, pack
from mass.blocks import Split, attends_fully
from mass.choices import Kit
from mass.forward import loss_and_grad, token_logprobs
from mass.lora import Adapter, expand
from mass.metagrad import MetaGradient, Products
from mass.model import LanguageModel
from mass.optimizers import Rule
from mass.practice import (
    Practice,
    Sampling,
    Tuned,
    answer,
    features,
    fine_tune,
    seed_of,
    solve_sequence,
    write_examples,
)
from mass.problems import Task, truth
from mass.prompts import Prompts, Shots, pick_shots
from mass.recipe import Recipe
from mass.rewards import Verifier
from mass.scorer import Scorer


@dataclass(frozen=True)
class Setting:
    """What stays the same over all outer steps of a run."""

    recipe: Recipe
    lm: LanguageModel
    parts: Split | None
    engine: str
    recompute: bool
    # first-order passes block by block
    checkpoint: bool
    why: str
    prompts: Prompts
    pool: list[Task]
    verifier: Verifier
    rule: Rule
    head: Scorer


@dataclass
class Result:
    """Gradients named as the engine names its parameters, scalar metrics, and the text.

    A metric is a mean over `counts` of this rank's tasks (those that have a value), or a sum where it is a number of tokens
    or failures (its count is 1).
    """

    gradients: dict[str, Tensor]
    metrics: dict[str, float]
    counts: dict[str, int]
    practice: Practice
    weight_TN: Tensor
    credit_TN: Tensor
    answers: tuple[list[str], list[str]]
    seconds: dict[str, float] = field(default_factory=dict)


def inner_rates(setting: Setting, log_lr: Mapping[str, Tensor], policy: Adapter) -> dict[str, Tensor]:
    """The inner learning rate of each adapter tensor, 0-d: the recipe's, or exp of the learned logarithm."""
    lr = setting.recipe.inner.lr
    if setting.recipe.inner.learned_lr == "no":
        return {key: torch.tensor(lr, device=x.device, dtype=x.dtype) for key, x in policy.items()}
    return {key: log_lr[rate_name(setting, key)].exp().squeeze() for key in policy}


def rate_name(setting: Setting, key: str) -> str:
    """The learned rate that an adapter tensor belongs to: one for all, or one a decoder block."""
    if setting.recipe.inner.learned_lr == "one" or setting.parts is None:
        return "all"
    return next((f"block{i}" for i, p in enumerate(setting.parts.prefix) if key.startswith(p)), "rest")


def make_products(setting: Setting, packed: Packed, weight_TN: Tensor) -> Products:
    """The engine that the recipe (or `auto`) chose, on this batch."""
    lm = setting.lm
    if setting.engine == "reverse":
        return metagrad.Reverse(lm.hf, lm.lora, packed, weight_TN)
    if setting.engine == "blockwise":
        assert setting.parts is not None
        return metagrad.blockwise(lm.hf, setting.parts, packed, weight_TN, recompute=setting.recompute)
    parts = setting.parts if setting.checkpoint else None
    central = not setting.recipe.meta_gradient.one_sided
    return metagrad.finite_difference(lm.hf, lm.lora, packed, weight_TN, parts=parts, central=central)


def run(
    setting: Setting,
    tasks: Seq[Task],
    step: int,
    policy: Adapter,
    eta: Mapping[str, Tensor],
    log_lr: Mapping[str, Tensor],
    *,
    show: int = 0,
    practice: Practice | None = None,
) -> Result:
    """One outer step's gradients. `show`: for so many tasks also answer greedily before and after (for the table).

    `practice`: examples to take in place of new ones, without a gradient for their generator.
    """
    recipe, lm, prompts = setting.recipe, setting.lm, setting.prompts
    clock = Clock()
    waited = lm.shards.waited if lm.shards else 0.0
    targets = [task.problem.text for task in tasks]
    T, N = len(tasks), recipe.generate.examples
    start = expand(policy, T)
    one = expand(policy, 1)
    shots = draw_shots(setting, tasks)
    solve_shots = [own.solve for own in shots]

    given = practice is not None
    with clock("generate"):
        practice = practice or write_examples(
            lm,
            prompts,
            targets,
            generate_shots=[own.generate for own in shots],
            solve_shots=solve_shots,
            adapter=one,
            seeds=[[seed_of(recipe.run.seed, step, t.problem.id, i) for i in range(N)] for t in tasks],
            sampling=example_sampling(recipe),
        )
        # texts end at different steps: from here on the ranks go side by side again
        lm.settle()
    valid_TN = practice.valid_TN

    with clock("score"):
        task_TF, example_TNF = features(
            lm, setting.parts, prompts, practice, targets, recipe.scorer.layers, recipe.scorer.pool
        )
        live = {key: tensor.detach().requires_grad_() for key, tensor in eta.items()}
        score_TN = torch.func.functional_call(setting.head, live, (task_TF, example_TNF))
        weight_TN = scorer.weights(score_TN.detach(), valid_TN, recipe.scorer.temperature)

    with clock("inner"):
        lr = inner_rates(setting, log_lr, policy)
        products = make_products(setting, practice.packed, weight_TN)
        tuned = fine_tune(
            lm,
            practice.packed,
            weight_TN,
            start,
            rule=setting.rule,
            lr=lr,
            steps=recipe.inner.steps,
            max_growth=recipe.inner.max_growth,
            parts=setting.parts if setting.checkpoint else None,
            last=products.record if isinstance(products, metagrad.Reverse) else None,
            count=metagrad.RECORDED,
        )

    with clock("outer"):
        after = outer_loss(setting, tasks, solve_shots, tuned.trajectory.adapter, step, "after")
        solving = recipe.outer.gamma > 0
        before = outer_loss(setting, tasks, solve_shots, start, step, "before", need_grad=solving)
        # A task without examples has not moved and one that exploded gives noise: neither has a credit.
        counts_T = valid_TN.any(1) & ~tuned.exploded_T
        outer_grad = {key: g * counts_T.view(-1, 1, 1) for key, g in after.grad.items()}

    with clock("meta"):
        need_init = recipe.outer.through_init
        meta = metagrad.sweep(
            products,
            tuned.trajectory,
            outer_grad,
            need_init=need_init,
            need_lr=recipe.inner.learned_lr != "no",
            last_steps=recipe.meta_gradient.truncate,
        )
        by_score_TN = scorer.score_gradient(score_TN, valid_TN, recipe.scorer.temperature, meta.weight_TN)

    with clock("policy"):
        advantage_TN = outer.credit_advantage(
            by_score_TN,
            valid_TN,
            torch.ones_like(valid_TN),
            recipe.outer.min_spread,
            recipe.outer.malformed_penalty,
        )
        gradients = {f"policy/{key}": torch.zeros_like(x) for key, x in policy.items()}
        kl = 0.0
        if recipe.outer.generator > 0 and recipe.outer.lr_policy > 0 and not given:
            kl = _generator_gradient(setting, practice, advantage_TN, one, gradients)
        for key in policy:
            if recipe.outer.gamma > 0:
                gradients[f"policy/{key}"] += recipe.outer.gamma * before.grad[key].sum(0) / T
            if meta.init is not None:
                gradients[f"policy/{key}"] += meta.init[key].sum(0) / T

    wanted_TN = outer.normalised(by_score_TN, recipe.outer.min_spread)
    scorer_loss = (score_TN * wanted_TN).sum() + recipe.scorer.l2 * scorer.saturation(
        score_TN, valid_TN
    ).sum()
    by_eta = torch.autograd.grad(scorer_loss / T, list(live.values()), materialize_grads=True)
    gradients |= {f"scorer/{key}": g for key, g in zip(live, by_eta, strict=True)}
    if meta.lr is not None:
        gradients |= _rate_gradient(setting, meta, lr, log_lr, T)

    answers: tuple[list[str], list[str]] = ([], [])
    if show:
        with clock("generate"):
            answers = _show(setting, targets[:show], solve_shots[:show], one, tuned, show)
    lm.settle()
    if lm.shards:
        clock.seconds["gather"] = lm.shards.waited - waited
    metrics, counts = _metrics(
        setting, practice, score_TN, weight_TN, by_score_TN, tuned, before, after, counts_T
    )
    metrics |= _known(practice, tasks, score_TN.detach(), by_score_TN, counts_T)
    metrics["policy/kl"] = kl
    if N > 1:
        metrics["generator/advantage_spread"] = advantage_TN.std(1).mean().item()
    counts = dict.fromkeys(metrics, T) | counts
    return Result(gradients, metrics, counts, practice, weight_TN, -by_score_TN, answers, clock.seconds)


def draw_shots(setting: Setting, tasks: Seq[Task]) -> list[Shots]:
    """The few-shot material of each task."""
    r = setting.recipe
    solve, pairs = r.prompt.solve_shots, r.prompt.generate_shots
    return [pick_shots(setting.pool, solve, r.run.seed, t.problem.id, pairs=pairs) for t in tasks]


def example_sampling(recipe: Recipe) -> Sampling:
    """How practice examples are drawn."""
    g = recipe.generate
    return Sampling(g.max_new_tokens, g.temperature, g.top_p, g.top_k, g.min_p, g.batch_rows, g.engine)


def answer_sampling(recipe: Recipe, temperature: float = 0.0) -> Sampling:
    """How answers are drawn: greedily, or at a temperature."""
    g = recipe.generate
    return Sampling(g.answer_tokens, temperature, batch_rows=g.batch_rows, engine=g.engine)


def kit(setting: Setting, policy: Adapter, eta: Mapping[str, Tensor], log_lr: Mapping[str, Tensor]) -> Kit:
    """What test-time methods work with, at this moment of training."""
    r = setting.recipe
    return Kit(
        setting.lm,
        setting.prompts,
        setting.rule,
        inner_rates(setting, log_lr, policy),
        example_sampling(r),
        answer_sampling(r, r.generate.temperature),
        examples=r.generate.examples,
        steps=r.inner.steps,
        max_growth=r.inner.max_growth,
        policy=policy,
        head=setting.head,
        eta=eta,
        depths=r.scorer.layers,
        pool_kind=r.scorer.pool,
        temperature=r.scorer.temperature,
        pool=setting.pool,
        solve_shots=r.prompt.solve_shots,
        generate_shots=r.prompt.generate_shots,
        parts=setting.parts,
        recompute=setting.checkpoint,
        seed=r.run.seed,
    )


@dataclass(frozen=True)
class OuterLoss:
    """An outer loss at one adapter: per task [T], its gradient [T, ...] (empty if not asked for), solve rate [T]."""

    loss_T: Tensor
    grad: Adapter
    solved_T: Tensor
    failures: int
    tokens: int


def outer_loss(
    setting: Setting,
    tasks: Seq[Task],
    shots: Seq[Seq[tuple[str, str]]],
    adapter: Adapter,
    step: int,
    when: str,
    need_grad: bool = True,
) -> OuterLoss:
    """The recipe's outer loss of T tasks, each at its own adapter. `step` and `when` seed sampled answers."""
    if setting.recipe.outer.loss == "gold":
        return _gold(setting, tasks, shots, adapter, need_grad)
    return _verified(setting, tasks, shots, adapter, step, when, need_grad)


def _gold(
    setting: Setting,
    tasks: Seq[Task],
    shots: Seq[Seq[tuple[str, str]]],
    adapter: Adapter,
    need_grad: bool = True,
) -> OuterLoss:
    lm, prompts = setting.lm, setting.prompts
    rows = [
        [solve_sequence(prompts, t.problem.text, t.solution, s)] for t, s in zip(tasks, shots, strict=True)
    ]
    packed = pack(rows, lm.tokenizer.pad_token_id, lm.device)
    parts = setting.parts if setting.checkpoint else None
    grad: Adapter = {}
    if need_grad:
        _, logprob_M, grad = loss_and_grad(
            lm.hf, lm.lora, packed, adapter, lambda x: outer.gold_loss(packed, x).sum(), parts=parts
        )
    else:
        with torch.no_grad():
            logprob_M = token_logprobs(lm.hf, lm.lora, packed, adapter)
    unknown_T = torch.full((len(tasks),), math.nan)
    return OuterLoss(outer.gold_loss(packed, logprob_M), grad, unknown_T, 0, packed.size)


def _verified(
    setting: Setting,
    tasks: Seq[Task],
    shots: Seq[Seq[tuple[str, str]]],
    adapter: Adapter,
    step: int,
    when: str,
    need_grad: bool = True,
) -> OuterLoss:
    recipe, lm, prompts = setting.recipe, setting.lm, setting.prompts
    G = recipe.outer.rollouts
    drawn = answer(
        lm,
        prompts,
        [t.problem.text for t in tasks],
        shots=shots,
        adapter=adapter,
        sampling=answer_sampling(recipe, temperature=1.0),
        seeds=[[seed_of(recipe.run.seed, step, t.problem.id, when, j) for j in range(G)] for t in tasks],
    )
    lm.settle()
    pairs = [(r.text, t) for own, t in zip(drawn, tasks, strict=True) for r in own]
    verdicts = setting.verifier.verify_all(pairs)
    reward_TG = torch.tensor([v.score for v in verdicts], device=lm.device).view(len(tasks), G)
    advantage_TG = outer.group_advantage(reward_TG, recipe.outer.min_spread)
    rows = [
        [
            Sequence([*prompts.solve(t.problem.text, s), *r.tokens], len(prompts.solve(t.problem.text, s)))
            for r in own
        ]
        for t, s, own in zip(tasks, shots, drawn, strict=True)
    ]
    packed = pack(rows, lm.tokenizer.pad_token_id, lm.device, share=attends_fully(lm.hf))
    grad: Adapter = {}
    if need_grad:
        parts = setting.parts if setting.checkpoint else None
        loss, logprob_M, grad = loss_and_grad(
            lm.hf,
            lm.lora,
            packed,
            adapter,
            lambda x: outer.verifier_loss(packed, x, advantage_TG).sum(),
            parts=parts,
        )
    # What is reported as the loss is 1 - mean reward: the surrogate's own value is zero in expectation.
    known = torch.isfinite(reward_TG)
    solved_T = (reward_TG.nan_to_num() * known).sum(1) / known.sum(1).clamp(min=1)
    failures = sum(v.status in ("failed", "timeout") for v in verdicts)
    return OuterLoss(1 - solved_T, grad, solved_T, failures, sum(len(r.tokens) for own in drawn for r in own))


def _generator_gradient(
    setting: Setting, practice: Practice, advantage_TN: Tensor, one: Adapter, gradients: dict[str, Tensor]
) -> float:
    """Add the generator loss's gradient (a micro-batch of sequences at a time); returns the mean KL to the base."""
    recipe, lm = setting.recipe, setting.lm
    asked_rows = list(zip(practice.prompts, practice.rollouts, strict=True))
    T, N = advantage_TN.shape
    scale = recipe.outer.generator / (T * N)
    height = max(1, recipe.outer.micro_rows // N)
    kl_sum = 0.0
    for first in range(0, T, height):
        some = asked_rows[first : first + height]
        chunk = [[Sequence([*asked, *r.tokens], len(asked)) for r in own] for asked, own in some]
        # One adapter for all: the task axis of this batch only says whose samples share a prompt.
        packed = pack(chunk, lm.tokenizer.pad_token_id, lm.device, share=attends_fully(lm.hf))
        old_M = torch.tensor([x for _, own in some for r in own for x in r.logprobs], device=lm.device)
        share = advantage_TN[first : first + height]
        base_M = None
        if recipe.outer.beta > 0:
            with torch.no_grad():
                base_M = token_logprobs(lm.hf, lm.lora, packed, None)
        seen: list[Tensor] = []

        def loss(
            logprob_M: Tensor,
            packed: Packed = packed,
            old_M: Tensor = old_M,
            base_M: Tensor | None = base_M,
            share: Tensor = share,
            seen: list[Tensor] = seen,
        ) -> Tensor:
            loss_TN, kl_TN = outer.policy_loss(
                packed,
                logprob_M,
                old_M,
                base_M,
                share,
                ratio_clip=recipe.outer.ratio_clip,
                beta=recipe.outer.beta,
            )
            seen.append(kl_TN.detach().sum())
            return scale * loss_TN.sum()

        parts = setting.parts if setting.checkpoint else None
        _, _, grad = loss_and_grad(lm.hf, lm.lora, packed, one, loss, parts=parts)
        kl_sum += seen[0].item()
        for key, g in grad.items():
            gradients[f"policy/{key}"] += g.squeeze(0)
    return kl_sum / (T * N)


def _rate_gradient(
    setting: Setting, meta: MetaGradient, lr: Mapping[str, Tensor], log_lr: Mapping[str, Tensor], tasks: int
) -> dict[str, Tensor]:
    """dL/d(log lr) = lr dL/dlr, added up over the adapter tensors that share a rate."""
    assert meta.lr is not None
    out = {f"inner_lr/{name}": torch.zeros_like(x) for name, x in log_lr.items()}
    for key, g in meta.lr.items():
        out[f"inner_lr/{rate_name(setting, key)}"] += g * lr[key] / tasks
    return out


def _show(
    setting: Setting,
    targets: Seq[str],
    shots: Seq[Seq[tuple[str, str]]],
    one: Adapter,
    tuned: Tuned,
    show: int,
) -> tuple[list[str], list[str]]:
    seeds = [[0]] * len(targets)
    greedy = answer_sampling(setting.recipe)
    after = {key: x[:show] for key, x in tuned.trajectory.adapter.items()}
    texts = []
    for adapter in (one, after):
        drawn = answer(
            setting.lm, setting.prompts, targets, shots=shots, adapter=adapter, sampling=greedy, seeds=seeds
        )
        texts.append([own[0].text for own in drawn])
    return texts[0], texts[1]


def _metrics(
    setting: Setting,
    practice: Practice,
    score_TN: Tensor,
    weight_TN: Tensor,
    by_score_TN: Tensor,
    tuned: Tuned,
    before: OuterLoss,
    after: OuterLoss,
    counts_T: Tensor,
) -> tuple[dict[str, float], dict[str, int]]:
    """Metrics, and what those are means of that are not means over all T tasks."""
    valid_TN = practice.valid_TN
    examples = [e for own in practice.examples for e in own]
    rollouts = [r for own in practice.rollouts for r in own]
    has_T = valid_TN.any(1)
    length_TN = torch.tensor([[float(len(r.tokens)) for r in own] for own in practice.rollouts])
    related = [
        outer.correlation(-credit_N[valid_N].cpu(), length_N[valid_N.cpu()])
        for credit_N, length_N, valid_N in zip(by_score_TN, length_TN, valid_TN, strict=True)
    ]
    related = [x for x in related if math.isfinite(x)]
    out = {
        "meta/loss": after.loss_T.mean().item(),
        "meta/loss_before": before.loss_T.mean().item(),
        "meta/gain": (before.loss_T - after.loss_T).mean().item(),
        "meta/exploded": (tuned.exploded_T & has_T).float().mean().item(),
        "inner/loss_first": _mean(tuned.before_T[has_T]),
        "inner/loss_last": _mean(tuned.after_T[has_T]),
        "inner/clipped": tuned.trajectory.clipped_T.float().mean().item(),
        "inner/padding": practice.packed.padding,
        "scorer/effective_examples": _mean(scorer.effective_examples(weight_TN)[has_T]),
        "scorer/score_std": _mean(scorer.saturation(score_TN.detach(), valid_TN)[has_T].sqrt()),
        "generator/valid": valid_TN.float().mean().item(),
        "generator/length": sum(len(r.tokens) for r in rollouts) / len(rollouts),
        "generator/empty_tasks": 1 - has_T.float().mean().item(),
        "generator/credit_length_correlation": sum(related) / len(related) if related else math.nan,
        # Credits of a task sum to zero: their root mean square is their standard deviation.
        "credit/spread": _mean(by_score_TN[counts_T].square().mean(1).sqrt()),
        "verifier/failures": float(before.failures + after.failures),
        "tokens/generated": float(sum(len(r.tokens) for r in rollouts)),
        "tokens/trained": float(practice.packed.size * len(tuned.trajectory.steps)),
        "tokens/outer": float(before.tokens + after.tokens),
    }
    for reason in ("no_solution", "no_answer", "truncated", "copy", "duplicate"):
        out[f"generator/{reason}"] = sum(e.reason == reason for e in examples) / len(examples)
    out["generator/no_solution"] += sum(e.reason == "empty" for e in examples) / len(examples)
    if setting.recipe.outer.loss == "verifier":
        out["reward/solve_before"] = before.solved_T.mean().item()
        out["reward/solve_after"] = after.solved_T.mean().item()
    has = int(has_T.sum())
    counts = dict.fromkeys(
        ("inner/loss_first", "inner/loss_last", "scorer/effective_examples", "scorer/score_std"), has
    )
    counts |= {
        "credit/spread": int(counts_T.sum()),
        "generator/credit_length_correlation": len(related),
        "inner/padding": practice.packed.tokens_TPS.numel(),
    }
    return out, counts | {key: 1 for key in out if key.startswith(("tokens/", "verifier/"))}


def known_truth(practice: Practice, tasks: Seq[Task]) -> tuple[Tensor, Tensor]:
    """Which examples are right and of their target's family, and of which valid ones that is known; both [T, N] bool."""
    truths = [
        [truth(task, e.problem, e.solution) if e.valid else None for e in own]
        for task, own in zip(tasks, practice.examples, strict=True)
    ]
    good = [[x is not None and x.right and x.kin for x in own] for own in truths]
    known = [[x is not None for x in own] for own in truths]
    device = practice.valid_TN.device
    return torch.tensor(good, device=device), torch.tensor(known, device=device)


def _known(
    practice: Practice, tasks: Seq[Task], score_TN: Tensor, by_score_TN: Tensor, counts_T: Tensor
) -> dict[str, float]:
    """What only the truth of the examples can tell; NaN where it is not known."""
    good_TN, known_TN = known_truth(practice, tasks)
    return {
        "scorer/auc": outer.auc(score_TN, good_TN, known_TN),
        "credit/auc": outer.auc(-by_score_TN, good_TN, known_TN & counts_T.unsqueeze(1)),
        "generator/right": _mean(good_TN[known_TN].float()),
    }


def _mean(x: Tensor) -> float:
    return x.mean().item() if x.numel() else math.nan


class Clock:
    """Seconds spent in named parts."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - begin
