"""What all choices work with: the kit, the room that a budget leaves, and what the policy writes."""

import functools
import hashlib
import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mass import scorer
from mass.blocks import Split
from mass.choices.texts import Drawn, Texts
from mass.chooser import Chooser
from mass.demonstrations import stated
from mass.generate import Rollout
from mass.lora import Adapter, LoraShape, expand, fresh
from mass.model import LanguageModel, context_length
from mass.optimizers import Rule
from mass.practice import Practice, Sampling, answer, draw, seed_of
from mass.problems import Problem, Task
from mass.prompts import Prompts, Shots, pick_shots
from mass.rewards import find_answer
from mass.schema import Guard, Knobs
from mass.worlds import Truth

# (target texts, generate shots of each, seeds of each) -> for each target and seed what was written, or why nothing was
Written = Rollout | str
Teacher = Callable[[Seq[str], Seq[Seq[tuple[str, str, str]]], Seq[Seq[int]]], list[list[Written]]]


@dataclass(frozen=True)
class Kit:
    """Everything that methods work with, the same for all problems.

    policy         adapter without task axis that answers and is updated; None: the base model, updated from a fresh one
    author         adapter without task axis that writes the practice examples; None: the policy does
    head, eta      the scorer and its parameters (eta None: the head's own); head None: no method may weigh by it
    depths         of the scorer's features; pool_kind: "solution" or "all"; temperature: of its softmax
    lr             0-d tensor for each adapter tensor; rule, steps (K), max_growth: of the update
    examples       N: practice examples, or own answers, of a problem (without a budget)
    answering      how answers are drawn; greedy ones at temperature 0
    pool           training problems for shots and for `random`
    budget         tokens that a problem may cost, generated plus trained; None: no limit, N is `examples`
    teacher        who writes the examples of `tt-d`
    guard          of the update; fisher: [R, in] and [out, R], how much each weight of the policy matters (guards.fisher)
    knobs          settings of single methods; chooser: of `auto`
    truth          (target, example's problem, its solution) -> what a planted world knows of it, for `oracle` alone
    recompute      block by block in the update: less memory, more time (needs `parts`)
    texts          what kits of the same base model have drawn; None: each call draws
    """

    lm: LanguageModel
    prompts: Prompts
    rule: Rule
    lr: Mapping[str, Tensor]
    writing: Sampling
    answering: Sampling
    examples: int = 6
    steps: int = 2
    max_growth: float | None = 2.0
    policy: Adapter | None = None
    author: Adapter | None = None
    head: scorer.Scorer | None = None
    eta: Mapping[str, Tensor] | None = None
    depths: Seq[float] = (0.5, 1.0)
    pool_kind: str = "solution"
    temperature: float = 1.0
    pool: Seq[Task] = ()
    solve_shots: int = 0
    generate_shots: int = 0
    parts: Split | None = None
    recompute: bool = False
    seed: int = 0
    budget: int | None = None
    teacher: Teacher | None = None
    guard: Guard = Guard()
    fisher: Adapter | None = None
    knobs: Knobs = Knobs()
    chooser: Chooser | None = None
    truth: Callable[[Problem, str, str], Truth | None] | None = None
    texts: Texts | None = None

    @functools.cached_property
    def marks(self) -> tuple[str, str]:
        """Hashes of what stands on the base model when the policy answers, and when examples are written."""
        answers = _mark(self.lm.shape, self.policy)
        return answers, answers if self.author is None else _mark(self.lm.shape, self.author)

    def clock(self) -> float:
        """Seconds for differences. Texts that were there already count with what drawing them took, so that a method is
        charged as if it were alone."""
        return time.perf_counter() + (self.texts.spared if self.texts else 0.0)


@dataclass(frozen=True)
class Room:
    """What the examples of T problems may cost.

    tokens   generated plus trained, of each problem; None: no budget, then there are `kit.examples` of them
    passes   how often an example is trained on (K; 0 without update); single: only one example of a problem is
    have     own answers 0, 1, ... of each problem that were drawn before (by a gate, or by `auto`)
    """

    tokens: list[int] | None
    passes: int
    single: bool
    have: list[list[Rollout]]


@dataclass(frozen=True)
class Updated:
    """T adapters after an update, and for each problem: the loss before the first and after every step, whether the
    update can be trusted, and what is worth knowing. `steps`: how often every example was trained on."""

    adapter: Adapter
    losses: list[list[float]]
    ok: list[bool]
    notes: list[str]
    steps: int


@dataclass(frozen=True)
class Gated:
    """What a gate says of one problem, and the own answers 0, 1, ... that it drew to find out."""

    open: bool
    drawn: list[Rollout]
    note: str = ""


@dataclass(frozen=True)
class Work:
    """What a method has done for T problems when it comes to answer them. `moved`: the adapter of t is an updated one;
    `left`: tokens that an answer may cost (None: no budget)."""

    problems: Seq[Problem]
    practice: Practice | None
    weight_TN: Tensor | None
    updated: Updated | None
    moved: list[bool]
    left: list[int] | None


@dataclass(frozen=True)
class Answered:
    """An answer (None: the text states none), the text it comes from, the tokens generated for it alone, and whether the
    text ended by itself."""

    answer: str | None
    solution: str
    tokens: int
    finished: bool = True


def shots_for(kit: Kit, problem: Problem) -> Shots:
    """The few-shot material of a problem: its own demonstrations, else as in training, fixed by seed and problem id.

    With demonstrations the second of two is shown as a problem like the first.
    """
    if not problem.demonstrations:
        k, pairs = kit.solve_shots, kit.generate_shots
        return pick_shots(kit.pool, k, kit.seed, problem.id, pairs=pairs, text=problem.text)
    solved = tuple((given, stated(output)) for given, output in problem.demonstrations)
    similar = tuple((one, *other) for (one, _), other in zip(solved[::2], solved[1::2], strict=False))
    return Shots(solved, similar)


def beginning(kit: Kit) -> Adapter:
    """Where every update starts, without task axis: the policy, or a fresh adapter (B = 0)."""
    if kit.policy is not None:
        return kit.policy
    assert kit.lm.shape is not None
    return untrained(kit.lm, kit.lm.shape.rank, kit.seed)


def untrained(lm: LanguageModel, rank: int, seed: int) -> Adapter:
    """A fresh adapter without task axis (B = 0), the same for a seed."""
    return fresh(lm.lora, rank, torch.Generator().manual_seed(seed_of(seed, "fresh")))


def _mark(shape: LoraShape | None, adapter: Adapter | None) -> str:
    """A hash of an adapter's values, and of where and how they count."""
    digest = hashlib.sha256(repr(shape).encode())
    for key, tensor in sorted((adapter or {}).items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def written(
    kit: Kit, asked: Seq[list[int]], seeds: Seq[Seq[int]], sampling: Sampling, *, examples: bool = False
) -> Drawn:
    """What the policy writes behind each prompt (token ids), once for each of its seeds; of `examples` what their author writes."""
    by = kit.author if examples and kit.author is not None else kit.policy

    def anew() -> Drawn:
        return draw(kit.lm, kit.prompts, asked, seeds, sampling, None if by is None else expand(by, 1))

    if kit.texts is None:
        return anew()
    ends = kit.prompts.stop_ids, kit.prompts.stop_strings
    call = repr((kit.marks[examples], list(asked), list(map(list, seeds)), sampling, ends))
    return kit.texts.draw(hashlib.sha256(call.encode()).hexdigest(), anew)


def sample(kit: Kit, problems: Seq[Problem], which: Seq[Seq[int]]) -> Drawn:
    """The policy's own solutions of each problem, by number: number j of a problem is always the same."""
    asked = [kit.prompts.solve(p.text, shots_for(kit, p).solve) for p in problems]
    seeds = [
        [seed_of(kit.seed, "answer", p.text, j) for j in own] for p, own in zip(problems, which, strict=True)
    ]
    return written(kit, asked, seeds, kit.answering)


def overlong(kit: Kit, prompt: Seq[int], sampling: Sampling) -> str | None:
    longest = context_length(kit.lm.hf)
    if len(prompt) + sampling.max_new_tokens <= longest:
        return None
    return (
        f"too long: the prompt has {len(prompt)} tokens and up to {sampling.max_new_tokens} are written after it, "
        f"but the model's context is {longest} tokens"
    )


def greedily(
    kit: Kit,
    problems: Seq[Problem],
    updated: Adapter | None = None,
    shots: Seq[Seq[tuple[str, str]]] | None = None,
    adapter_of: Seq[int] | None = None,
) -> list[Answered]:
    """The likeliest text of each problem, token by token, by the policy; with `updated` adapters by those, problem i by
    number adapter_of[i], by default i."""
    if not problems:
        return []
    shots = [shots_for(kit, p).solve for p in problems] if shots is None else shots
    sampling, seeds = replace(kit.answering, temperature=0.0), [[0]] * len(problems)
    if updated is None:
        asked = [kit.prompts.solve(p.text, own) for p, own in zip(problems, shots, strict=True)]
        drawn = written(kit, asked, seeds, sampling)
    else:
        drawn = answer(
            kit.lm,
            kit.prompts,
            [p.text for p in problems],
            shots=shots,
            adapter=updated,
            sampling=sampling,
            seeds=seeds,
            adapter_of=adapter_of,
        )
    return [Answered(find_answer(r.text), r.text, len(r.tokens), r.finished) for (r,) in drawn]
