"""What a test-time method can choose: where examples come from, their weights, the update, and how it answers.

Each choice is a function on T problems at once; `mass.methods.METHODS` puts them together. A `Kit` is what all of them
work with. Randomness is seeded by the problem's text and a number, so it depends on nothing that shares the batch.
"""

import math
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.stats import weibull_min
from torch import Tensor

from mass import scorer
from mass.blocks import Split
from mass.errors import MassError
from mass.generate import Rollout
from mass.lora import Adapter, expand, fresh, select
from mass.model import LanguageModel, context_length
from mass.optimizers import Rule
from mass.practice import (
    Practice,
    Sampling,
    Tuned,
    answer,
    features,
    fine_tune,
    pack_examples,
    seed_of,
    write_examples,
)
from mass.problems import Problem, Task, content_key
from mass.prompts import Example, Prompts, Shots, pick_shots
from mass.rewards import canonical, find_answer

# how many of the best-scored examples `in_context` puts into the prompt
CONTEXT_EXAMPLES = 2


@dataclass(frozen=True)
class Kit:
    """Everything that methods work with, the same for all problems.

    policy         adapter without task axis that writes and answers; None: the base model, updated from a fresh adapter
    head, eta      the scorer and its parameters (eta None: the head's own); head None: no method may weigh by it
    depths         of the scorer's features; pool_kind: "solution" or "all"; temperature: of its softmax
    lr             0-d tensor for each adapter tensor; rule, steps (K), max_growth: of the update
    examples       N: practice examples, or own answers, of a problem
    answering      how answers are drawn; greedy ones at temperature 0
    pool           training problems for shots and for `random`
    recompute      block by block in the update: less memory, more time (needs `parts`)
    """

    lm: LanguageModel
    prompts: Prompts
    rule: Rule
    lr: Mapping[str, Tensor]
    writing: Sampling
    answering: Sampling
    examples: int = 6
    steps: int = 2
    max_growth: float = 2.0
    policy: Adapter | None = None
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

    @property
    def one(self) -> Adapter | None:
        """The policy as an adapter of one task."""
        return None if self.policy is None else expand(self.policy, 1)


@dataclass(frozen=True)
class Work:
    """What a method has done for T problems when it comes to answer them. `moved`: the adapter of t is an updated one."""

    problems: Seq[Problem]
    practice: Practice | None
    weight_TN: Tensor | None
    tuned: Tuned | None
    moved: list[bool]


@dataclass(frozen=True)
class Answered:
    """An answer (None: the text states none), the text it comes from, and the tokens generated for it alone."""

    answer: str | None
    solution: str
    tokens: int


def shots_for(kit: Kit, problem: Problem) -> Shots:
    """The few-shot material of a problem, as in training: fixed by seed and problem id."""
    return pick_shots(kit.pool, kit.solve_shots, kit.seed, problem.id, pairs=kit.generate_shots)


def sample(kit: Kit, problems: Seq[Problem], which: Seq[Seq[int]]) -> list[list[Rollout]]:
    """The policy's own solutions of each problem, by number: number j of a problem is always the same."""
    return answer(
        kit.lm,
        kit.prompts,
        [p.text for p in problems],
        shots=[shots_for(kit, p).solve for p in problems],
        adapter=kit.one,
        sampling=kit.answering,
        seeds=[
            [seed_of(kit.seed, "answer", p.text, j) for j in own]
            for p, own in zip(problems, which, strict=True)
        ],
    )


def overlong(kit: Kit, prompt: Seq[int], sampling: Sampling) -> str | None:
    longest = context_length(kit.lm.hf)
    if len(prompt) + sampling.max_new_tokens <= longest:
        return None
    return (
        f"too long: the prompt has {len(prompt)} tokens and up to {sampling.max_new_tokens} are written after it, "
        f"but the model's context is {longest} tokens"
    )


# ---- examples


def self_made(kit: Kit, problems: Seq[Problem]) -> Practice:
    """N problems like each target with solutions, written by the policy."""
    shots = [shots_for(kit, p) for p in problems]
    return write_examples(
        kit.lm,
        kit.prompts,
        [p.text for p in problems],
        generate_shots=[s.generate for s in shots],
        solve_shots=[s.solve for s in shots],
        adapter=kit.one,
        seeds=[[seed_of(kit.seed, "example", p.text, i) for i in range(kit.examples)] for p in problems],
        sampling=kit.writing,
    )


def own_answers(kit: Kit, problems: Seq[Problem]) -> Practice:
    """N sampled solutions of each target itself, as examples of it; valid are those that state an answer."""
    drawn = sample(kit, problems, [range(kit.examples)] * len(problems))
    examples = [[_own(p.text, r) for r in own] for p, own in zip(problems, drawn, strict=True)]
    return _practice(kit, problems, examples, drawn)


def training_problems(kit: Kit, problems: Seq[Problem]) -> Practice:
    """N solved training problems for each target, drawn at random from the pool; never the target itself."""
    examples = []
    for p in problems:
        others = [t for t in kit.pool if content_key(t.problem.text) != content_key(p.text)]
        if len(others) < kit.examples:
            raise MassError(
                f"method random draws generate.examples={kit.examples} training problems, and {len(others)} are set "
                f"aside (prompt.pool). Use generate.examples={len(others)} or fewer."
            )
        order = sorted(others, key=lambda t: seed_of(kit.seed, "random", p.text, t.problem.id))
        examples.append([Example(t.problem.text, t.solution, True, "") for t in order[: kit.examples]])
    return _practice(kit, problems, examples, [[] for _ in problems])


def _own(text: str, rollout: Rollout) -> Example:
    stated = find_answer(rollout.text) is not None
    return Example(
        text, rollout.text, stated, "" if stated else "no_answer" if rollout.finished else "truncated"
    )


def _practice(
    kit: Kit, problems: Seq[Problem], examples: list[list[Example]], rollouts: list[list[Rollout]]
) -> Practice:
    shots = [shots_for(kit, p).solve for p in problems]
    packed, valid_TN = pack_examples(kit.lm, kit.prompts, examples, shots)
    return Practice([], rollouts, examples, packed, valid_TN)


# ---- weights: [T, N], N in sum over a problem's valid examples, 0 for malformed ones


def uniform(kit: Kit, problems: Seq[Problem], practice: Practice) -> Tensor:
    """All valid examples alike."""
    return scorer.weights(torch.zeros_like(practice.valid_TN, dtype=torch.float32), practice.valid_TN, 1.0)


def scored(kit: Kit, problems: Seq[Problem], practice: Practice) -> Tensor:
    """By the trained scorer, as in training."""
    assert kit.head is not None
    if not practice.valid_TN.any():
        return uniform(kit, problems, practice)
    texts = [p.text for p in problems]
    with torch.no_grad():
        task_TF, example_TNF = features(
            kit.lm, kit.parts, kit.prompts, practice, texts, kit.depths, kit.pool_kind
        )
        score_TN = torch.func.functional_call(kit.head, dict(kit.eta or {}), (task_TF, example_TNF))
        return scorer.weights(score_TN, practice.valid_TN, kit.temperature)


def shortest(kit: Kit, problems: Seq[Problem], practice: Practice) -> Tensor:
    """All weight on the own answer that ended first (where none ended, on the first that states an answer)."""
    weight_TN = torch.zeros(practice.valid_TN.shape, device=practice.valid_TN.device)
    for t, own in enumerate(practice.rollouts):
        stated = [i for i, example in enumerate(practice.examples[t]) if example.valid]
        if stated:
            weight_TN[t, min(stated, key=lambda i: (not own[i].finished, len(own[i].tokens)))] = len(own)
    return weight_TN


def probable(kit: Kit, problems: Seq[Problem], practice: Practice) -> Tensor:
    """By the model's own probability of each own answer, a text counted once, improbable ones pruned.

    RPC: Zhou et al., arXiv 2502.00511. As in their code, a text's probability is exp of its tokens' mean log-prob.
    """
    weight_TN = torch.zeros(practice.valid_TN.shape, device=practice.valid_TN.device)
    for t, (own, examples) in enumerate(zip(practice.rollouts, practice.examples, strict=True)):
        stated = [i for i, example in enumerate(examples) if example.valid]
        if not stated:
            continue
        p = np.exp([np.mean(own[i].logprobs) for i in stated])
        kept = {own[i].text: (i, x) for i, x, low in zip(stated, p, improbable(p), strict=True) if not low}
        total = sum(x for _, x in kept.values())
        for i, x in kept.values():
            weight_TN[t, i] = len(own) * x / total
    return weight_TN


def improbable(p: np.ndarray) -> np.ndarray:
    """Which of some probabilities to prune: those below the mean that a mixture of two Weibull distributions, fitted
    to them by maximum likelihood, gives to its component of lower mean (start and bounds of the fit as in RPC's code).
    """

    def log_parts(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        w, k1, scale1, k2, scale2 = x
        first = math.log(w) + weibull_min.logpdf(p, k1, scale=scale1)
        return first, math.log(1 - w) + weibull_min.logpdf(p, k2, scale=scale2)

    with np.errstate(all="ignore"):
        fit = minimize(
            lambda x: -np.logaddexp(*log_parts(x)).sum(),
            [0.5, 1.0, 1.0, 1.5, 2.0],
            bounds=[(0.2, 0.8)] + [(0.01, None)] * 4,
        ).x
        first, second = log_parts(fit)
        if weibull_min.mean(fit[1], scale=fit[2]) < weibull_min.mean(fit[3], scale=fit[4]):
            first, second = second, first
        return (first < second) & (p < p.mean())


# ---- update


def fine_tuned(kit: Kit, practice: Practice, weight_TN: Tensor) -> Tuned:
    """K weighted fine-tuning steps of T adapters, from the policy or from a fresh adapter (B = 0)."""
    policy = kit.policy
    if policy is None:
        assert kit.lm.shape is not None
        generator = torch.Generator().manual_seed(seed_of(kit.seed, "fresh"))
        policy = fresh(kit.lm.lora, kit.lm.shape.rank, generator)
    return fine_tune(
        kit.lm,
        practice.packed,
        weight_TN,
        expand(policy, len(weight_TN)),
        rule=kit.rule,
        lr=kit.lr,
        steps=kit.steps,
        max_growth=kit.max_growth,
        parts=kit.parts if kit.recompute else None,
    )


# ---- answer


def greedy(kit: Kit, work: Work) -> list[Answered]:
    """The likeliest text, token by token, with the problem's own adapter where it has moved, else with the policy."""
    still = [t for t, moved in enumerate(work.moved) if not moved]
    moved = [t for t, moved in enumerate(work.moved) if moved]
    adapter = select(work.tuned.trajectory.adapter, moved) if work.tuned and moved else None
    found: dict[int, Answered] = dict(
        zip(still, greedily(kit, [work.problems[t] for t in still], kit.one), strict=True)
    )
    found |= zip(moved, greedily(kit, [work.problems[t] for t in moved], adapter), strict=True)
    return [found[t] for t in range(len(work.problems))]


def in_context(kit: Kit, work: Work) -> list[Answered]:
    """Greedy by the policy, with the best-weighted examples in the prompt (best last) as far as the context reaches."""
    assert work.practice is not None and work.weight_TN is not None
    shots: list[list[tuple[str, str]]] = []
    for t, p in enumerate(work.problems):
        own = list(shots_for(kit, p).solve)
        weight = work.weight_TN[t].tolist()
        best = sorted(range(kit.examples), key=lambda i: -weight[i])[:CONTEXT_EXAMPLES]
        put: list[tuple[str, str]] = []
        for e in (work.practice.examples[t][i] for i in best):
            longer = [(e.problem, e.solution), *put]
            if e.valid and overlong(kit, kit.prompts.solve(p.text, [*own, *longer]), kit.answering) is None:
                put = longer
        shots.append([*own, *put])
    return greedily(kit, work.problems, kit.one, shots)


def majority(kit: Kit, work: Work) -> list[Answered]:
    """The answer that most weight among the own answers stands behind; its text is the weightiest that states it."""
    assert work.practice is not None and work.weight_TN is not None
    return [
        _weighted_vote(own, weight)
        for own, weight in zip(work.practice.examples, work.weight_TN.tolist(), strict=True)
    ]


def best(kit: Kit, work: Work) -> list[Answered]:
    """The own answer of most weight."""
    assert work.practice is not None and work.weight_TN is not None
    found = []
    for own, weight in zip(work.practice.examples, work.weight_TN.tolist(), strict=True):
        text = own[max(range(len(own)), key=lambda i: weight[i])].solution if any(weight) else ""
        found.append(Answered(find_answer(text), text, 0))
    return found


def _weighted_vote(examples: Seq[Example], weight: Seq[float]) -> Answered:
    behind: dict[str, list[tuple[float, int]]] = {}
    for i, e in enumerate(examples):
        stated = find_answer(e.solution) if weight[i] > 0 else None
        if stated is not None:
            behind.setdefault(canonical(stated).casefold(), []).append((weight[i], i))
    if not behind:
        return Answered(None, "", 0)
    # math.fsum: equal weights in equal number tie exactly, and ties go to the answer seen first, as in rewards.vote
    most = max(behind.values(), key=lambda votes: math.fsum(w for w, _ in votes))
    first, top = examples[most[0][1]], examples[max(most, key=lambda vote: vote[0])[1]]
    return Answered(canonical(find_answer(first.solution) or ""), top.solution, 0)


def greedily(
    kit: Kit, problems: Seq[Problem], adapter: Adapter | None, shots: Seq[Seq[tuple[str, str]]] | None = None
) -> list[Answered]:
    if not problems:
        return []
    drawn = answer(
        kit.lm,
        kit.prompts,
        [p.text for p in problems],
        shots=[shots_for(kit, p).solve for p in problems] if shots is None else shots,
        adapter=adapter,
        sampling=replace(kit.answering, temperature=0.0),
        seeds=[[0]] * len(problems),
    )
    return [Answered(find_answer(r.text), r.text, len(r.tokens)) for (r,) in drawn]
