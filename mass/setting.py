"""What stays the same over all outer steps of a run, and over all inner loops of one; and what follows from it: rates, the engine's
products, sampling, the kit."""

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor

from mass import metagrad
from mass.batch import Packed
from mass.blocks import Split
from mass.choices import Kit
from mass.choices.kit import untrained
from mass.lora import Adapter, LoraShape, expand
from mass.metagrad import Products
from mass.model import LanguageModel
from mass.optimizers import Rule
from mass.practice import Practice, Sampling
from mass.problems import Task
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


@dataclass(frozen=True)
class TaskBatch:
    """What every inner loop of an outer step works on: T tasks with their examples, the solved problems that each is shown with,
    T adapters to start from [T, ...], a rate for each tensor of them. `step` seeds sampled answers."""

    setting: Setting
    tasks: Seq[Task]
    practice: Practice
    solve_shots: Seq[Seq[tuple[str, str]]]
    start: Adapter
    lr: Mapping[str, Tensor]
    step: int


def task_batch(
    setting: Setting,
    tasks: Seq[Task],
    practice: Practice,
    policy: Adapter,
    log_lr: Mapping[str, Tensor],
    step: int,
) -> TaskBatch:
    """The batch of examples that are there already, at a policy without task axis and learned rates (or none)."""
    shots = [own.solve for own in draw_shots(setting, tasks)]
    start = expand(beginning(setting, policy), len(tasks))
    return TaskBatch(setting, tasks, practice, shots, start, inner_rates(setting, log_lr, policy), step)


def beginning(setting: Setting, policy: Adapter) -> Adapter:
    """Where the inner loop starts, and what answers without one, without task axis: the policy, or a fresh adapter."""
    if setting.recipe.inner.start == "policy":
        return policy
    rank = next(x.shape[0] for key, x in policy.items() if key.endswith(".A"))
    start = untrained(setting.lm, rank, setting.recipe.run.seed)
    return {key: x.to(policy[key]) for key, x in start.items()}


def inner_rates(setting: Setting, log_lr: Mapping[str, Tensor], policy: Adapter) -> dict[str, Tensor]:
    """The inner learning rate of each adapter tensor, 0-d: the recipe's, or exp of the learned logarithm."""
    lr = setting.recipe.inner.lr
    if setting.recipe.inner.learned_lr == "no":
        return {key: torch.tensor(lr, device=x.device, dtype=x.dtype) for key, x in policy.items()}
    return {key: log_lr[rate_name(setting, key)].exp().squeeze() for key in policy}


def rate_name(setting: Setting, key: str) -> str:
    """`rate_of` an adapter tensor in this setting."""
    return rate_of(setting.recipe.inner.learned_lr, setting.parts, key)


def rate_of(learned: str, parts: Split | None, key: str) -> str:
    """The learned rate that an adapter tensor belongs to: one for all (`learned` is "one", or the blocks are not known), or one a
    decoder block."""
    if learned == "one" or parts is None:
        return "all"
    return next((f"block{i}" for i, p in enumerate(parts.prefix) if key.startswith(p)), "rest")


def make_products(setting: Setting, packed: Packed, weight_TN: Tensor) -> Products:
    """The engine that the recipe (or `auto`) chose, on this batch."""
    lm = setting.lm
    if setting.engine == "reverse":
        return metagrad.Reverse(lm.hf, lm.lora, packed, weight_TN)
    if setting.engine == "blockwise":
        assert setting.parts is not None
        return metagrad.blockwise(lm.hf, setting.parts, packed, weight_TN, recompute=setting.recompute)
    if setting.engine == "finite_difference":
        parts = setting.parts if setting.checkpoint else None
        central = not setting.recipe.meta_gradient.one_sided
        return metagrad.finite_difference(lm.hf, lm.lora, packed, weight_TN, parts=parts, central=central)
    raise ValueError(f"engine {setting.engine!r}")


def draw_shots(setting: Setting, tasks: Seq[Task]) -> list[Shots]:
    """The few-shot material of each task."""
    r = setting.recipe
    solve, pairs = r.prompt.solve_shots, r.prompt.generate_shots
    return [pick_shots(setting.pool, solve, r.run.seed, t.problem.id, pairs=pairs) for t in tasks]


def lora_shape(recipe: Recipe) -> LoraShape:
    """The adapter that `lora` asks for."""
    own = recipe.lora
    return LoraShape(own.rank, own.alpha, tuple(own.targets), own.last)


def example_sampling(recipe: Recipe) -> Sampling:
    """How practice examples are drawn."""
    g = recipe.generate
    return Sampling(
        g.max_new_tokens, g.temperature, g.top_p, g.top_k, g.min_p, g.batch_rows, g.engine, g.step
    )


def answer_sampling(recipe: Recipe, temperature: float = 0.0) -> Sampling:
    """How answers are drawn: greedily, or at a temperature."""
    g = recipe.generate
    return Sampling(g.answer_tokens, temperature, batch_rows=g.batch_rows, engine=g.engine, step=g.step)


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
        policy=policy if r.inner.start == "policy" else None,
        author=policy if r.inner.start == "base" else None,
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
