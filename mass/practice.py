"""Write practice examples for T problems, weigh them, and fine-tune on them: what training and test time share."""

import hashlib
from bisect import bisect_left
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mass import inner, scorer
from mass.batch import Packed, Sequence, pack
from mass.blocks import Split, attends_fully
from mass.decode import How
from mass.forward import example_loss, loss_and_grad, token_logprobs
from mass.generate import Engine, Rollout, generate
from mass.inner import Gradient, Trajectory
from mass.lora import Adapter
from mass.model import LanguageModel, context_length
from mass.optimizers import Rule
from mass.prompts import Example, Prompts, answer_end, filter_examples, parse_example, solution_start


@dataclass(frozen=True)
class Sampling:
    """How text is drawn. `temperature` 0 is greedy; `batch_rows` bounds the rows decoded at once."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    batch_rows: int = 128
    engine: Engine = "ours"
    step: How = "eager"


@dataclass(frozen=True)
class Practice:
    """N self-made examples for each of T targets, and their training sequences.

    `packed` holds solve(problem) + solution of the valid ones; malformed ones are absent there and False in `valid_TN`.
    """

    prompts: list[list[int]]
    rollouts: list[list[Rollout]]
    examples: list[list[Example]]
    packed: Packed
    valid_TN: Tensor


def seed_of(*parts: object) -> int:
    """A 63-bit seed from anything with a stable text: equal on every rank, machine and Python."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def write_examples(
    lm: LanguageModel,
    prompts: Prompts,
    targets: Seq[str],
    *,
    generate_shots: Seq[Seq[tuple[str, str, str]]],
    solve_shots: Seq[Seq[tuple[str, str]]],
    adapter: Adapter | None,
    seeds: Seq[Seq[int]],
    sampling: Sampling,
) -> Practice:
    """Ask the model for len(seeds[t]) problems like target t, all in one batch, and parse what comes.

    Shots are given a target. `adapter` has one task axis entry (the policy), or is None for the base model. Examples
    too long for the model's context are malformed ("truncated").
    """
    rollouts = draw_examples(
        lm, prompts, targets, generate_shots=generate_shots, adapter=adapter, seeds=seeds, sampling=sampling
    )
    practice = read_examples(lm, prompts, targets, rollouts, solve_shots)
    asked = [prompts.generate(text, shots) for text, shots in zip(targets, generate_shots, strict=True)]
    return replace(practice, prompts=asked)


def draw_examples(
    lm: LanguageModel,
    prompts: Prompts,
    targets: Seq[str],
    *,
    generate_shots: Seq[Seq[tuple[str, str, str]]],
    adapter: Adapter | None,
    seeds: Seq[Seq[int]],
    sampling: Sampling,
) -> list[list[Rollout]]:
    """The first half of `write_examples`: what the model writes."""
    asked = [prompts.generate(text, shots) for text, shots in zip(targets, generate_shots, strict=True)]
    return draw(lm, prompts, asked, seeds, sampling, adapter)


def read_examples(
    lm: LanguageModel,
    prompts: Prompts,
    targets: Seq[str],
    rollouts: list[list[Rollout]],
    solve_shots: Seq[Seq[tuple[str, str]]],
) -> Practice:
    """The second half: what its texts mean (`prompts` of the Practice is empty)."""
    examples = [
        filter_examples([parse_example(r.text, finished=r.finished) for r in own], target)
        for own, target in zip(rollouts, targets, strict=True)
    ]
    packed, valid_TN = pack_examples(lm, prompts, examples, solve_shots)
    examples = [
        [
            replace(e, valid=False, reason="truncated") if e.valid and not ok else e
            for e, ok in zip(own, fits, strict=False)
        ]
        for own, fits in zip(examples, valid_TN.tolist(), strict=True)
    ]
    return Practice([], rollouts, examples, packed, valid_TN)


def pack_examples(
    lm: LanguageModel, prompts: Prompts, examples: Seq[Seq[Example]], solve_shots: Seq[Seq[tuple[str, str]]]
) -> tuple[Packed, Tensor]:
    """The training sequences of T x N examples, and which are valid, [T, N] bool."""
    most = context_length(lm.hf)
    sequences: list[list[Sequence | None]] = []
    for own, shots in zip(examples, solve_shots, strict=True):
        row = [solve_sequence(prompts, e.problem, e.solution, shots) if e.valid else None for e in own]
        sequences.append([s if s is not None and len(s.tokens) <= most else None for s in row])
    packed = pack(sequences, lm.tokenizer.pad_token_id, lm.device, share=attends_fully(lm.hf))
    return packed, packed.count_TN > 0


def unrewarded(lm: LanguageModel, rollout: Rollout, example: Example, reward: str) -> list[bool]:
    """Of each token of a self-made example, whether it has no share in the credit: what stands behind the line with the
    answer (a check of it, say), and with `reward` "solution" what stands before the solution too. A malformed example has
    no such tokens, nor has any under "example"."""
    count, end = len(rollout.tokens), answer_end(rollout.text)
    start = solution_start(rollout.text) if reward == "solution" else 0
    if not example.valid or reward == "example" or (not start and end == len(rollout.text)):
        return [False] * count

    def length(first: int) -> int:
        return len(lm.tokenizer.decode(rollout.tokens[:first], skip_special_tokens=True))

    begins = bisect_left(range(count), start, key=length)
    ends = count if end == len(rollout.text) else bisect_left(range(count), end, key=length)
    return [not begins <= i < ends for i in range(count)]


def solve_sequence(
    prompts: Prompts, problem: str, solution: str, shots: Seq[tuple[str, str]] = ()
) -> Sequence:
    """Solve prompt + solution with its end token; only the solution is learned."""
    asked = prompts.solve(problem, shots)
    return Sequence([*asked, *prompts.solution(solution)], len(asked))


def features(
    lm: LanguageModel,
    parts: Split | None,
    prompts: Prompts,
    practice: Practice,
    targets: Seq[str],
    depths: Seq[float],
    pool: str,
) -> tuple[Tensor, Tensor]:
    """The scorer's inputs: task features [T, F] over the target's prompt, example features [T, N, F].

    `pool`: "solution" averages over an example's solution tokens, "all" over its whole sequence.
    """
    asked = [[Sequence(prompts.solve(text), 1)] for text in targets]
    task_TF = scorer.features(
        lm.hf, lm.lora, parts, pack(asked, lm.tokenizer.pad_token_id, lm.device), depths
    )[:, 0]
    packed = practice.packed
    if pool == "all":
        whole = [
            [
                Sequence(solve_sequence(prompts, e.problem, e.solution).tokens, 1) if e.valid else None
                for e in own
            ]
            for own in practice.examples
        ]
        packed = pack(whole, lm.tokenizer.pad_token_id, lm.device)
    return task_TF, scorer.features(lm.hf, lm.lora, parts, packed, depths)


@dataclass(frozen=True)
class Tuned:
    """T adapters after K steps, the weighted inner loss of each task before and after, [T], and each example's, [T, N]; what
    comes after is None where it was not asked for."""

    trajectory: Trajectory
    before_T: Tensor
    after_T: Tensor | None
    exploded_T: Tensor
    last_TN: Tensor | None


def fine_tune(
    lm: LanguageModel,
    packed: Packed,
    weight_TN: Tensor,
    start: Adapter,
    *,
    rule: Rule,
    lr: Mapping[str, Tensor],
    steps: int,
    max_growth: float | None,
    parts: Split | None = None,
    last: Gradient | None = None,
    count: int = 0,
    pull: Callable[[Adapter], Adapter] | None = None,
    settle: inner.Settle | None = None,
    keep_grads: bool = True,
) -> Tuned:
    """K weighted fine-tuning steps of T adapters on their examples. `parts`: recompute activations block by block.

    max_growth: see `inner.exploded`; None spares the forward pass that tells, and a task has exploded where its adapter is
    not finite. `last`, `count`, `keep_grads`: as in `inner.adapt`. Test time alone: `pull` is added to the gradient at an adapter, `settle` follows
    each step (`inner.adapt`).
    """
    n = weight_TN.shape[1]

    def total(loss_TN: Tensor) -> Tensor:
        return (weight_TN * loss_TN).sum() / n

    def gradient(adapter: Adapter) -> tuple[Tensor, Adapter]:
        _, logprob_M, grad = loss_and_grad(
            lm.hf,
            lm.lora,
            packed,
            adapter,
            lambda logprob_M: total(example_loss(packed, logprob_M)),
            parts=parts,
        )
        if pull is not None:
            more = pull(adapter)
            grad = {key: g + more[key] for key, g in grad.items()}
        return example_loss(packed, logprob_M), grad

    trajectory = inner.adapt(
        gradient, start, rule, lr, steps, last=last, count=count, settle=settle, keep_grads=keep_grads
    )
    before_T = (weight_TN * trajectory.steps[0].loss_TN).sum(1) / n
    if max_growth is None:
        finite = [x.flatten(1).isfinite().all(1) for x in trajectory.adapter.values()]
        return Tuned(trajectory, before_T, None, ~torch.stack(finite).all(0), None)
    with torch.no_grad():
        last_TN = example_loss(packed, token_logprobs(lm.hf, lm.lora, packed, trajectory.adapter))
    after_T = (weight_TN * last_TN).sum(1) / n
    exploded_T = inner.exploded(before_T, after_T, max_growth)
    return Tuned(trajectory, before_T, after_T, exploded_T, last_TN)


def answer(
    lm: LanguageModel,
    prompts: Prompts,
    targets: Seq[str],
    *,
    shots: Seq[Seq[tuple[str, str]]],
    adapter: Adapter | None,
    sampling: Sampling,
    seeds: Seq[Seq[int]],
    adapter_of: Seq[int] | None = None,
) -> list[list[Rollout]]:
    """len(seeds[t]) solutions of each target t. An `adapter` of T tasks gives each target its own; of one, the same.

    `adapter_of[t]`, where given, is the adapter of target t.
    """
    asked = [prompts.solve(text, own) for text, own in zip(targets, shots, strict=True)]
    many = adapter is not None and next(iter(adapter.values())).shape[0] > 1
    if adapter_of is None and many:
        adapter_of = range(len(targets))
    return draw(lm, prompts, asked, seeds, sampling, adapter, adapter_of if many else None)


def draw(
    lm: LanguageModel,
    prompts: Prompts,
    asked: Seq[list[int]],
    seeds: Seq[Seq[int]],
    sampling: Sampling,
    adapter: Adapter | None,
    adapter_of: Seq[int] | None = None,
) -> list[list[Rollout]]:
    """len(seeds[t]) continuations of prompt t, all in one batch; `adapter_of[t]` is the adapter of its rows."""
    rows = [(t, seed) for t, own in enumerate(seeds) for seed in own]
    flat = generate(
        lm,
        [asked[t] for t, _ in rows],
        seeds=[seed for _, seed in rows],
        max_new_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        adapter=adapter,
        adapter_index=[adapter_of[t] for t, _ in rows] if adapter_of is not None else None,
        stop_ids=prompts.stop_ids,
        stop_strings=prompts.stop_strings,
        batch_rows=sampling.batch_rows,
        engine=sampling.engine,
        step=sampling.step,
    )
    out: list[list[Rollout]] = [[] for _ in asked]
    for (t, _), rollout in zip(rows, flat, strict=True):
        out[t].append(rollout)
    return out
