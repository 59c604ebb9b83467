"""What a run is made of, put together before its first step: tasks, setting, and the outer parameters in their engine."""

import math
from collections.abc import Sequence as Seq
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mass import blocks, checkpoint, engine, lora, memory, plan, scorer, vllm_engine
from mass.batch import Packed, Sequence, pack
from mass.blocks import attends_fully
from mass.distributed import World
from mass.engine import Outer
from mass.errors import MassError
from mass.forward import check_model
from mass.model import LanguageModel, context_length, load
from mass.optimizers import Rule
from mass.practice import solve_sequence
from mass.problems import Task
from mass.prompts import Prompts, Shots, make_prompts, pick_shots
from mass.recipe import Recipe
from mass.rewards import Verifier, require
from mass.setting import Setting, draw_shots, lora_shape, rate_name
from mass.shards import Shards
from mass.sources import Tasks, load_all

# what a run without an inner loop has in the place of a meta-gradient engine
NO_ENGINE = "none"


def tasks_of(recipe: Recipe) -> Tasks:
    """Training tasks, held-out tasks, and the few-shot pool, whose verifiers are installed."""
    if recipe.generate.engine == "vllm":
        vllm_engine.check_installed()
    found = load_all(recipe)
    require({task.verifier for task in found.train + found.heldout})
    p = recipe.prompt
    # what a pool cannot give is said before the model is loaded
    pick_shots(found.pool, p.solve_shots, recipe.run.seed, "", pairs=p.generate_shots)
    return found


def check_context(setting: Setting, tasks: Seq[Task]) -> None:
    """Raise MassError for training problems that, with their prompts and what may be written after them, are longer than the
    model's context: it has not learned such positions, and engines of vLLM end on them in the middle of a run."""
    r, prompts, longest = setting.recipe, setting.prompts, context_length(setting.lm.hf)
    p, g = r.prompt, r.generate
    # a text has no more tokens than bytes: most problems need not be read
    count = p.solve_shots + 2 * p.generate_shots
    shown = sorted((_bytes(task) for task in setting.pool), reverse=True)[:count]
    around = count * (64 + len(prompts.solve_instruction.encode())) + g.max_new_tokens + g.answer_tokens
    least = len(prompts.solve("")) + len(prompts.generate("")) + sum(shown) + around
    asked = [task for task in tasks if least + _bytes(task) > longest]
    shots = draw_shots(setting, asked)
    too_long = [
        task.problem.id
        for task, own in zip(asked, shots, strict=True)
        if _tokens(setting, task, own) > longest
    ]
    if too_long:
        raise MassError(
            f"problems.train: {len(too_long)} problems, with their prompts and what is written after them, are longer than the "
            f"model's context of {longest} tokens: {', '.join(too_long[:5])}{', ...' * (len(too_long) > 5)}. Take them out, or "
            "lower prompt.solve_shots, prompt.generate_shots, generate.max_new_tokens or generate.answer_tokens"
        )


def _bytes(task: Task) -> int:
    return len(f"{task.problem.text}{task.solution}".encode())


def _tokens(setting: Setting, task: Task, shots: Shots) -> int:
    """Of the longest sequence that a step makes of a task."""
    r, prompts, text = setting.recipe, setting.prompts, task.problem.text
    if r.outer.loss == "gold":
        answered = len(solve_sequence(prompts, text, task.solution, shots.solve).tokens)
    else:
        answered = len(prompts.solve(text, shots.solve)) + r.generate.answer_tokens
    written = len(prompts.generate(text, shots.generate)) + r.generate.max_new_tokens
    return max(answered, written if r.inner.steps else 0)


def make_setting(
    recipe: Recipe, world: World, pool: list[Task], began: dict[str, Any] | None
) -> tuple[Setting, str]:
    """Load the model and put together what stays the same over all steps; and the base model's fingerprint.

    `began`: what the checkpoint that the run goes on from has of its engine (`engine` and `asked`), None where there is none.
    """
    m, i, z = recipe.model, recipe.inner, recipe.zero
    shards = None
    if plan.base_is_sharded(recipe, world.size):
        shards = Shards(
            world.device,
            hold=z.hold_base,
            prefetch=z.prefetch,
            in_main_memory=z.offload == "all",
            patience=recipe.run.patience,
        )
    hf, tokenizer = load(
        m.path,
        dtype=m.dtype,
        device=world.device,
        cache=m.cache,
        attention=m.attention,
        world=recipe.problems.world,
        shards=shards,
    )
    fingerprint = checkpoint.fingerprint(shards.named_parameters(hf) if shards else hf.named_parameters())
    check_model(hf)
    shape = lora_shape(recipe)
    lm = LanguageModel(hf, tokenizer, lora.attach(hf, shape), shape, m.path, shards)
    parts, mode = _engine(recipe, lm)
    lm.settle()
    head = scorer.Scorer(
        hf.config.get_text_config().hidden_size, len(recipe.scorer.layers), recipe.scorer.hidden
    )
    prompts = make_prompts(
        tokenizer, recipe.prompt.style, recipe.prompt.solve_instruction, recipe.prompt.generate_instruction
    )
    rule = Rule(i.optimizer, i.momentum, i.beta1, i.beta2, i.eps, i.eps_root, i.clip)
    engine, recompute, again, why = _choose(recipe, lm, parts, mode, prompts, pool, rule, world, began)
    verifier, head = Verifier(), head.to(world.device)
    return Setting(
        recipe, lm, parts, engine, recompute, again, why, prompts, pool, verifier, rule, head
    ), fingerprint


def _engine(recipe: Recipe, lm: LanguageModel) -> tuple[blocks.Split | None, str]:
    mode = recipe.meta_gradient.mode
    try:
        parts = blocks.split(lm.hf, lm.lora)
    except MassError as error:
        if recipe.inner.checkpoint:
            raise MassError(f"{error} inner.checkpoint=true needs the blocks too: set it to false.") from None
        if mode == "blockwise":
            raise
        return None, mode
    return parts, mode


def _choose(
    recipe: Recipe,
    lm: LanguageModel,
    parts: blocks.Split | None,
    mode: str,
    prompts: Prompts,
    pool: list[Task],
    rule: Rule,
    world: World,
    began: dict[str, Any] | None,
) -> tuple[str, bool, bool, str]:
    """(engine, recompute, first-order passes block by block, why). `auto` plans for the longest texts that may come; a
    resumed run keeps its choice, unless something else is asked for now."""
    if recipe.inner.steps == 0:
        return NO_ENGINE, True, recipe.inner.checkpoint, "nothing is second-order without an inner loop"
    if mode != "auto":
        return mode, True, recipe.inner.checkpoint, "as the recipe says"
    if began is not None and began["engine"][0] != NO_ENGINE:
        # older checkpoints have no `asked`
        if began.get("asked", asked_for(recipe)) == asked_for(recipe):
            engine, recompute, again = began["engine"]
            return engine, recompute, again, "as the run began"
    r = recipe
    examples, answers, policy = _longest(recipe, lm, prompts, pool)
    chosen: list[Any] = [None]
    if world.main:
        print("planning memory for meta_gradient.mode=auto (ten seconds or so)", flush=True)
        chosen[0] = memory.choose(
            lm.hf,
            parts,
            lora_shape(r),
            examples,
            answers,
            steps=r.inner.steps,
            memory_gb=r.meta_gradient.memory_gb,
            ranks=world.size if world.device.type == "cpu" else 1,
            taken=_not_held_yet(recipe, lm, world),
            checkpoint=r.inner.checkpoint,
            rule=rule,
            truncate=r.meta_gradient.truncate,
            need_init=r.outer.through_init,
            keep_grads=r.inner.learned_lr != "no",
            policy=policy if r.outer.writes else None,
            with_kl=r.outer.holds,
            loops=plan.loops_held(r),
        )
    if world.size > 1:
        dist.broadcast_object_list(chosen)
    choice = chosen[0]
    return choice.engine, choice.recompute, choice.checkpoint, choice.reason


def _not_held_yet(recipe: Recipe, lm: LanguageModel, world: World) -> int:
    """Bytes that a step holds beside its gradients, and that are not there while `auto` plans: the gathered parts of a sharded
    base; the policy with its gradient, its optimizer's state and the copy that the step works with."""
    r = recipe
    size = sum(sum(layer.weight.shape) for layer in lm.lora.values()) * r.lora.rank
    on_cpu = world.device.type == "cpu"
    value, state = plan.outer_bytes(size, r.zero.stage, world.size)
    state = 0 if r.zero.offload != "no" and not on_cpu else state
    return (lm.shards.working_bytes if lm.shards else 0) + value + state + 4 * size


def asked_for(recipe: Recipe) -> list[Any]:
    """What the recipe says of the engine: a checkpoint has it beside the engine that was taken."""
    return [recipe.meta_gradient.mode, recipe.meta_gradient.memory_gb, recipe.inner.checkpoint]


def _longest(
    recipe: Recipe, lm: LanguageModel, prompts: Prompts, pool: list[Task]
) -> tuple[Packed, Packed, Packed]:
    """The largest batches of examples, of answers and of the policy gradient that a step may have, packed as it packs them:
    the longest shots and the longest problem of the pool, and every text as long as it may get."""
    r, pad, share = recipe, lm.tokenizer.pad_token_id, attends_fully(lm.hf)
    tasks = sorted(pool, key=lambda task: len(prompts.solve(task.problem.text, [_solved(task)])))
    shots = [_solved(task) for task in tasks[len(tasks) - r.prompt.solve_shots :]]
    asked = max((len(prompts.solve(task.problem.text, shots)) for task in tasks), default=64)
    # what the prompts of a task's examples have in common; problem and solution together are what was generated
    alike = len(prompts.solve("", shots))
    N, new = r.generate.examples, r.generate.max_new_tokens
    examples: list[Sequence | None] = [Sequence([pad] * alike + [n] * new, alike) for n in range(N)]
    answer = Sequence([pad] * (asked + r.generate.answer_tokens), asked)
    T = r.outer.together
    rollouts = r.outer.rollouts if r.outer.loss == "verifier" else 1
    pairs = [(task.problem.text, *_solved(task)) for task in tasks[len(tasks) - r.prompt.generate_shots :]]
    before = max((len(prompts.generate(task.problem.text, pairs)) for task in tasks), default=64)
    written = Sequence([pad] * (before + new), before)
    at_once = min(T, max(1, r.outer.micro_rows // N))
    return (
        pack([examples] * T, pad, share=share),
        pack([[answer] * rollouts] * T, pad, share=share),
        pack([[written] * N] * at_once, pad, share=share),
    )


def _solved(task: Task) -> tuple[str, str]:
    return task.problem.text, task.solution


def make_outer(recipe: Recipe, setting: Setting, world: World) -> Outer:
    """The DeepSpeed engine over a fresh policy adapter, the scorer head and the learned inner rates."""
    generator = torch.Generator().manual_seed(recipe.run.seed)
    policy = lora.fresh(setting.lm.lora, recipe.lora.rank, generator)
    names = {rate_name(setting, key) for key in policy} if recipe.inner.learned_lr != "no" else set()
    groups: dict[str, dict[str, Tensor]] = {
        "policy": policy,
        "scorer": {key: p.detach() for key, p in setting.head.named_parameters()},
        "inner_lr": {name: torch.tensor([math.log(recipe.inner.lr)]) for name in sorted(names)},
    }
    o = recipe.outer
    lr = {"policy": o.lr_policy, "scorer": o.lr_scorer, "inner_lr": o.lr_inner}
    config = deepspeed_config(recipe, world)
    return Outer(groups, lr, config, warmup=o.warmup, device=world.device)


def deepspeed_config(recipe: Recipe, world: World) -> dict[str, Any]:
    """What DeepSpeed is told: the recipe's settings, and around them the user's own file (zero.config)."""
    z = recipe.zero
    ours = engine.settings(z.stage, recipe.outer.clip_grad, z.offload != "no")
    return engine.merge(z.config, ours, world.size) if z.config else ours
