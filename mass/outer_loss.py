"""The outer loss of T tasks, each at its own adapter: of the reference solutions (gold), or of verified answers."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor

from mass import outer
from mass.batch import Sequence, pack
from mass.blocks import attends_fully
from mass.forward import loss_and_grad, reference_states, token_logprobs
from mass.lora import Adapter
from mass.practice import answer, seed_of, solve_sequence
from mass.problems import Task
from mass.setting import Setting, answer_sampling


@dataclass(frozen=True)
class OuterLoss:
    """An outer loss at one adapter: per task [T], its gradient [T, ...] (empty if not asked for), solve rate [T] (NaN: gold);
    `kl_T`: divergence from the base model on the sampled answers, None where its coefficient is 0."""

    loss_T: Tensor
    grad: Adapter
    solved_T: Tensor | None
    failures: int
    tokens: int
    kl_T: Tensor | None = None


def outer_loss(
    setting: Setting,
    tasks: Seq[Task],
    shots: Seq[Seq[tuple[str, str]]],
    adapter: Adapter,
    step: int,
    when: str,
    need_grad: bool = True,
    beta: float = 0.0,
) -> OuterLoss:
    """The recipe's outer loss of T tasks, each at its own adapter. `step` and `when` seed sampled answers.

    `beta`: coefficient of the KL divergence from the base model on those answers, in the gradient; gold has none.
    """
    if setting.recipe.outer.loss == "gold":
        return _gold(setting, tasks, shots, adapter, need_grad)
    return _verified(setting, tasks, shots, adapter, step, when, need_grad, beta)


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
    return OuterLoss(outer.gold_loss(packed, logprob_M), grad, None, 0, packed.size)


def _verified(
    setting: Setting,
    tasks: Seq[Task],
    shots: Seq[Seq[tuple[str, str]]],
    adapter: Adapter,
    step: int,
    when: str,
    need_grad: bool,
    beta: float,
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
    kl_T = None
    if need_grad:
        base_MD = reference_states(lm.hf, lm.lora, packed, None) if beta > 0 else None
        seen: list[Tensor] = []

        def loss(logprob_M: Tensor, kl_M: Tensor | None = None) -> Tensor:
            loss_T = outer.verifier_loss(packed, logprob_M, advantage_TG)
            if kl_M is not None:
                mean_T = packed.mean_by_example(kl_M).mean(1)
                seen.append(mean_T.detach())
                loss_T = loss_T + beta * mean_T
            return loss_T.sum()

        parts = setting.parts if setting.checkpoint else None
        _, _, grad = loss_and_grad(lm.hf, lm.lora, packed, adapter, loss, reference_MD=base_MD, parts=parts)
        kl_T = seen[0] if seen else None
    # What is reported as the loss is 1 - mean reward: the surrogate's own value is zero in expectation.
    # Of a task without any verdict nothing is known: NaN.
    solved_T = reward_TG.nanmean(1)
    failures = sum(v.status in ("failed", "timeout") for v in verdicts)
    tokens = sum(len(r.tokens) for own in drawn for r in own)
    return OuterLoss(1 - solved_T, grad, solved_T, failures, tokens, kl_T)
