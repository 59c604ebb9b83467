"""One outer step on one rank: T tasks in, gradients of the outer parameters and what to log out.

generate -> score -> inner loop -> outer loss -> adjoint sweep -> credit -> policy gradient. The order of the calls below
is the order of docs/mathematics.md. Every loss is a mean over this rank's T tasks, a task without valid examples
included (its part is zero), so that the mean over ranks is the mean over all tasks.
"""

import time
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mass import metagrad, outer, scorer
from mass.batch import Packed, Sequence, pack
from mass.blocks import attends_fully
from mass.credit import rises
from mass.forward import loss_and_grad, reference_states
from mass.lora import Adapter, expand, select
from mass.metagrad import MetaGradient
from mass.metrics import step_metrics, truth_metrics
from mass.outer_loss import OuterLoss, outer_loss
from mass.practice import Practice, Tuned, answer, features, fine_tune, seed_of, unrewarded, write_examples
from mass.problems import Task
from mass.setting import (
    Setting,
    TaskBatch,
    answer_sampling,
    beginning,
    draw_shots,
    example_sampling,
    inner_rates,
    make_products,
    rate_name,
)


@dataclass
class Result:
    """Gradients named as the engine names its parameters, scalar metrics, and the text.

    A metric is a mean over `counts` of this rank's tasks (those that have a value), or a sum where it is a number of tokens
    or failures (its count is 1). Without an inner loop N is 0.
    """

    gradients: dict[str, Tensor]
    metrics: dict[str, float]
    counts: dict[str, int]
    practice: Practice
    weight_TN: Tensor
    credit_TN: Tensor
    answers: tuple[list[str], list[str]]
    seconds: dict[str, float] = field(default_factory=dict)


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
    start = expand(beginning(setting, policy), T)
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

    lr = inner_rates(setting, log_lr, policy)
    batch = TaskBatch(setting, tasks, practice, solve_shots, start, lr, step)
    loop = _inner_loop(batch, clock, score_TN.detach(), "after")
    by_score_TN = loop.by_score_TN
    with clock("outer"):
        solving = recipe.outer.solves
        before = outer_loss(setting, tasks, solve_shots, start, step, "before", need_grad=solving)
    writes = recipe.outer.writes and not given
    reward = _reward(batch, clock, score_TN.detach(), loop, writes)

    with clock("policy"):
        gradients = {f"policy/{key}": torch.zeros_like(x) for key, x in policy.items()}
        kl = 0.0
        if writes:
            kl = _generator_gradient(setting, practice, reward.advantage_TN, one, gradients)
        for key in policy:
            if solving:
                gradients[f"policy/{key}"] += recipe.outer.gamma * before.grad[key].sum(0) / T
            if loop.meta.init is not None:
                gradients[f"policy/{key}"] += loop.meta.init[key].sum(0) / T

    wanted_TN = outer.normalised(by_score_TN, recipe.outer.min_spread)
    scorer_loss = (score_TN * wanted_TN).sum() + recipe.scorer.l2 * scorer.saturation(
        score_TN, valid_TN
    ).sum()
    by_eta = torch.autograd.grad(scorer_loss / T, list(live.values()), materialize_grads=True)
    gradients |= {f"scorer/{key}": g for key, g in zip(live, by_eta, strict=True)}
    if loop.meta.lr is not None:
        gradients |= _rate_gradient(setting, loop.meta, lr, log_lr, T)

    answers: tuple[list[str], list[str]] = ([], [])
    if show:
        with clock("generate"):
            answers = _show(setting, targets[:show], solve_shots[:show], select(start, [0]), loop.tuned, show)
    lm.settle()
    if lm.shards:
        clock.seconds["gather"] = lm.shards.waited - waited
    metrics, counts = step_metrics(
        practice, score_TN, loop.weight_TN, by_score_TN, loop.tuned, before, loop.after, loop.counts_T
    )
    told, told_counts = truth_metrics(
        practice, tasks, score_TN.detach(), by_score_TN, reward.advantage_TN, loop.counts_T
    )
    metrics |= told
    metrics["policy/kl"] = kl
    if N > 1:
        metrics["generator/advantage_spread"] = reward.advantage_TN.std(1).mean().item()
    metrics["tokens/trained"] *= 1 + reward.loops
    metrics["tokens/outer"] += reward.tokens
    metrics["verifier/failures"] += reward.failures
    counts = dict.fromkeys(metrics, T) | counts | told_counts
    return Result(gradients, metrics, counts, practice, loop.weight_TN, -by_score_TN, answers, clock.seconds)


@dataclass(frozen=True)
class _Loop:
    """An inner loop of T tasks, the outer loss where it ends, and what the sweep back says of the way there. `counts_T`: the
    tasks that have a credit."""

    weight_TN: Tensor
    tuned: Tuned
    after: OuterLoss
    counts_T: Tensor
    meta: MetaGradient
    by_score_TN: Tensor


def _inner_loop(batch: TaskBatch, clock: "Clock", score_TN: Tensor, when: str) -> _Loop:
    """Fine-tune under the weights that the scores give, and differentiate the outer loss. `when` seeds sampled answers."""
    setting, practice = batch.setting, batch.practice
    recipe, lm, valid_TN = setting.recipe, setting.lm, practice.valid_TN
    learns_lr = recipe.inner.learned_lr != "no"
    with clock("inner"):
        weight_TN = scorer.weights(score_TN, valid_TN, recipe.scorer.temperature)
        products = make_products(setting, practice.packed, weight_TN)
        tuned = fine_tune(
            lm,
            practice.packed,
            weight_TN,
            batch.start,
            rule=setting.rule,
            lr=batch.lr,
            steps=recipe.inner.steps,
            max_growth=recipe.inner.max_growth,
            parts=setting.parts if setting.checkpoint else None,
            last=products.record if isinstance(products, metagrad.Reverse) else None,
            count=metagrad.recorded(recipe.inner.steps, recipe.meta_gradient.truncate),
            keep_grads=learns_lr or recipe.meta_gradient.one_sided,
        )
    with clock("outer"):
        after = outer_loss(
            setting, batch.tasks, batch.solve_shots, tuned.trajectory.adapter, batch.step, when
        )
        # A task without examples has not moved and one that exploded gives noise: neither has a credit.
        counts_T = valid_TN.any(1) & ~tuned.exploded_T
        # NaN times zero would be NaN
        outer_grad = {key: g.masked_fill(~counts_T.view(-1, 1, 1), 0.0) for key, g in after.grad.items()}
    with clock("meta"):
        meta = metagrad.sweep(
            products,
            tuned.trajectory,
            outer_grad,
            need_init=recipe.outer.through_init,
            need_lr=learns_lr,
            last_steps=recipe.meta_gradient.truncate,
            drop_T=tuned.exploded_T,
        )
        by_score_TN = scorer.score_gradient(score_TN, valid_TN, recipe.scorer.temperature, meta.weight_TN)
    return _Loop(weight_TN, tuned, after, counts_T, meta, by_score_TN)


@dataclass(frozen=True)
class _Reward:
    """The advantage of each generated example; inner loops that were taken for it alone, tokens and failed verdicts of the outer
    losses after them."""

    advantage_TN: Tensor
    loops: int = 0
    tokens: int = 0
    failures: int = 0


def _reward(batch: TaskBatch, clock: "Clock", score_TN: Tensor, loop: _Loop, writes: bool) -> _Reward:
    """What rewards the generator (`outer.credit`). Without `writes` it is not trained: the credit of `loop`, for the metrics."""
    setting, practice = batch.setting, batch.practice
    o, valid_TN = setting.recipe.outer, practice.valid_TN
    if writes and o.credit == "left_out":
        with clock("left_out"):
            rise_TN, tokens, failures = rises(batch, score_TN, loop.after.loss_T)
        # A difference to the loss without the example has its baseline and its size already. Not finite: there is no such
        # example, or the loop without it exploded.
        rise_TN = torch.where(rise_TN.isfinite() & loop.counts_T.unsqueeze(1), rise_TN, 0.0)
        advantage_TN = rise_TN.masked_fill(~valid_TN, -o.malformed_penalty)
        # with one inner step `rises` reads the examples once for all
        loops = 1 if setting.recipe.inner.steps == 1 else valid_TN.shape[1]
        return _Reward(advantage_TN, loops, tokens, failures)
    credit_TN, loops, tokens, failures = -loop.by_score_TN, 0, 0, 0
    if writes and o.credit == "uniform":
        even = _inner_loop(batch, clock, torch.zeros_like(score_TN), "uniform")
        credit_TN, loops, tokens, failures = -even.by_score_TN, 1, even.after.tokens, even.after.failures
    advantage_TN = outer.credit_advantage(credit_TN, valid_TN, o.min_spread, o.malformed_penalty)
    return _Reward(advantage_TN, loops, tokens, failures)


def _generator_gradient(
    setting: Setting, practice: Practice, advantage_TN: Tensor, one: Adapter, gradients: dict[str, Tensor]
) -> float:
    """Add the generator loss's gradient (a micro-batch of sequences at a time); returns the mean KL to the base."""
    recipe, lm = setting.recipe, setting.lm
    asked_rows = list(zip(practice.prompts, practice.rollouts, practice.examples, strict=True))
    T, N = advantage_TN.shape
    apart = recipe.outer.reward != "example"
    scale = recipe.outer.generator / (T * N)
    height = max(1, recipe.outer.micro_rows // N)
    kl_sum = 0.0
    for first in range(0, T, height):
        some = asked_rows[first : first + height]
        chunk = [[Sequence([*asked, *r.tokens], len(asked)) for r in own] for asked, own, _ in some]
        # One adapter for all: the task axis of this batch only says whose samples share a prompt.
        packed = pack(chunk, lm.tokenizer.pad_token_id, lm.device, share=attends_fully(lm.hf))
        old_M = torch.tensor([x for _, own, _ in some for r in own for x in r.logprobs], device=lm.device)
        unrewarded_M = None
        if apart:
            pairs = [pair for _, own, read in some for pair in zip(own, read, strict=True)]
            flags = [x for pair in pairs for x in unrewarded(lm, *pair, recipe.outer.reward)]
            unrewarded_M = torch.tensor(flags, device=lm.device)
        share = advantage_TN[first : first + height]
        base_MD = reference_states(lm.hf, lm.lora, packed, None) if recipe.outer.holds else None
        seen: list[Tensor] = []

        def loss(
            logprob_M: Tensor,
            kl_M: Tensor | None = None,
            packed: Packed = packed,
            old_M: Tensor = old_M,
            share: Tensor = share,
            unrewarded_M: Tensor | None = unrewarded_M,
            seen: list[Tensor] = seen,
        ) -> Tensor:
            loss_TN, kl_TN = outer.policy_loss(
                packed,
                logprob_M,
                old_M,
                kl_M,
                share,
                ratio_clip=recipe.outer.ratio_clip,
                beta=recipe.outer.beta,
                unrewarded_M=unrewarded_M,
                beta_unrewarded=recipe.outer.beta_check,
            )
            seen.append(kl_TN.detach().sum())
            return scale * loss_TN.sum()

        parts = setting.parts if setting.checkpoint else None
        _, _, grad = loss_and_grad(lm.hf, lm.lora, packed, one, loss, reference_MD=base_MD, parts=parts)
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
