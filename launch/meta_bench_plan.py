"""What `mass-train RECIPE --plan` foretells against what rank processes really hold.

Every rank loads its part of the base, makes the outer optimizer, takes one step of it, writes the longest examples that the
recipe allows, and runs K inner steps, the outer gradient and the way back on them. Prompts have the planner's length.
"""

import argparse
import gc
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from meta_bench_gradients import peak_since, reset_peak
from meta_bench_methods import METHODS, Row, Setup, warm

from mass import distributed, engine, lora, plan
from mass.batch import Sequence, pack
from mass.blocks import split
from mass.distributed import World
from mass.generate import generate
from mass.model import LanguageModel, load
from mass.optimizers import Rule
from mass.recipe import Recipe
from mass.recipe import load as load_recipe
from mass.setting import lora_shape
from mass.shards import Shards

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
# memory is all there is to measure
TIMED = False
# our names of the engines -> the planner's
ENGINES = {
    "reverse": "reverse",
    "blockwise": "blockwise, inner.checkpoint",
    "blockwise_kept": "blockwise, kept",
    "finite_difference": "finite_difference",
}
# so many tokens that activations outweigh what libraries need for themselves
MODELS: dict[str, dict[str, Any]] = {
    "tiny": {
        "recipe": "smoke",
        "set": ["outer.tasks=4", "generate.examples=6", "generate.max_new_tokens=32", "inner.checkpoint=false"],
        "runs": [(1, 0), (2, 3), (4, 0), (4, 3)],
    },
    "SmolLM2": {
        "recipe": "demo",
        "set": ["outer.tasks=1", "generate.examples=3", "generate.max_new_tokens=16"],
        "runs": [(1, 0), (2, 0), (2, 3), (4, 0), (4, 3)],
    },
}  # fmt: skip
PARTS = {"base": "base", "generating": "text", "gradient": "gradient", "total": "in all"}
COLUMNS = {
    "model": ("model", ""),
    "ranks": ("ranks", "d"),
    "stage": ("stage", "d"),
    "engine": ("engine", ""),
    **{
        f"{part}_{kind}": (f"{words}, {kind}", ".3f")
        for part, words in PARTS.items()
        for kind in ("measured", "planned")
    },
    "ratio": ("planned / measured", ".2f"),
}
NOTES = [
    "GB of the rank that held most: what is resident over what was before the base was loaded, when freed blocks go back to the "
    "system (MALLOC_MMAP_THRESHOLD_=65536) and libraries have been used once.",
    "base: after loading, at stage 3 with what was gathered last; text: peak while examples are written for the first time, over what is held without them; gradient: peak of the K inner "
    "steps, the outer gradient and the way back, over what is held without them; in all: the largest of the peaks.",
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="overrides for the recipes")


def cases(args: argparse.Namespace) -> list[Row]:
    return [
        {"model": name, "ranks": ranks, "stage": stage, "engine": one, "recipe": how["recipe"]}
        | {"set": [*how["set"], f"zero.stage={stage}", *args.set]}
        for name, how in MODELS.items()
        for ranks, stage in how["runs"]
        for one in ENGINES
    ]


def name(case: Row) -> str:
    """What --cases picks by: tiny/ranks2/stage3/blockwise."""
    return f"{case['model']}/ranks{case['ranks']}/stage{case['stage']}/{case['engine']}"


def finish(rows: list[Row]) -> list[Row]:
    for row in rows:
        if "total_planned" in row:
            row["ratio"] = row["total_planned"] / row["total_measured"]
    return rows


def plot(rows: list[Row], axes: Any) -> None:
    """Planned against measured, one point a case."""
    for part, words in PARTS.items():
        good = [r for r in rows if f"{part}_planned" in r]
        axes.loglog(
            *([r[f"{part}_{kind}"] for r in good] for kind in ("measured", "planned")), "o", label=words
        )
    axes.set(xlabel="measured, GB", ylabel="planned, GB")
    axes.axline((0.1, 0.1), slope=1, color="grey", linewidth=0.7)


def measure(case: Row) -> Row:
    """The case on so many processes: what they held, and what was planned."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(case["ranks"]),
    }
    words = [sys.executable, str(Path(__file__).resolve()), json.dumps(case)]
    ranks = [
        subprocess.Popen(words, env=env | {"RANK": str(i), "LOCAL_RANK": str(i)}, stdout=subprocess.PIPE, text=True)
        for i in range(case["ranks"])
    ]  # fmt: skip
    said = [process.communicate()[0] for process in ranks]
    if any(process.returncode for process in ranks):
        raise RuntimeError(f"a rank ended with {[process.returncode for process in ranks]}")
    held = [json.loads(text.splitlines()[-1]) for text in said]
    recipe = load_recipe(RECIPES / f"{case['recipe']}.yaml", case["set"])
    which = ENGINES[case["engine"]]
    made = plan.make(recipe, case["ranks"], [which])
    planned = {
        "base": sum(size for part, size in made.parts.items() if part.startswith(("base", "gathered"))),
        "generating": sum(made.generating.values()) + made.parts["weights packed for text"],
        "gradient": made.engines[which].total,
        "total": made.total(which),
    }
    return {f"{part}_measured": max(rank[part] for rank in held) / 1e9 for part in planned} | {
        f"{part}_planned": size / 1e9 for part, size in planned.items()
    }


# ---- one rank


def on_rank(case: Row) -> Row:
    """Bytes of this rank."""
    torch.set_num_threads(case["threads"])
    recipe = load_recipe(RECIPES / f"{case['recipe']}.yaml", case["set"])
    world = distributed.start("cpu")
    few = load_recipe(
        RECIPES / "smoke.yaml", [f"zero.stage={case['stage']}", f"model.dtype={recipe.model.dtype}"]
    )
    # libraries load and set themselves up
    work(few, world, case["engine"], tokens=4)
    return work(recipe, world, case["engine"], tokens=plan.PROMPT)


def work(recipe: Recipe, world: World, how: str, tokens: int) -> Row:
    """Everything that the planner counts, with prompts of so many tokens."""
    r, i = recipe, recipe.inner
    start = reset_peak("cpu")
    shards = Shards(world.device, prefetch=r.zero.prefetch) if plan.base_is_sharded(r, world.size) else None
    hf, tokenizer = load(r.model.path, dtype=r.model.dtype, device="cpu", cache=r.model.cache, shards=shards)
    shape = lora_shape(r)
    lm = LanguageModel(hf, tokenizer, lora.attach(hf, shape), shape, r.model.path, shards)
    parts = split(hf, lm.lora)
    lm.settle()
    loaded = reset_peak("cpu")

    groups = {"policy": lora.fresh(lm.lora, shape.rank, torch.Generator().manual_seed(0))}
    config = engine.settings(r.zero.stage, r.outer.clip_grad)
    outer = engine.Outer(groups, {"policy": 1e-4}, config, warmup=0, device=world.device)
    outer.step({f"policy/{key}": torch.full_like(x, 1e-3) for key, x in groups.pop("policy").items()})
    policy = outer.values("policy")

    T, N, new = r.outer.tasks, r.generate.examples, r.generate.max_new_tokens
    prompts = [[3 + (t + s) % 200 for s in range(tokens)] for t in range(T) for _ in range(N)]

    def text() -> None:
        generate(
            lm, prompts, seeds=range(T * N), max_new_tokens=new, top_p=r.generate.top_p,
            adapter=lora.expand(policy, 1), adapter_index=[0] * (T * N), batch_rows=r.generate.batch_rows,
        )  # fmt: skip

    example = [[Sequence(prompt + [5] * new, tokens) for prompt in prompts[:N]]] * T
    answer = [[Sequence(prompts[0] + [5] * r.generate.answer_tokens, tokens)]] * T
    setup = Setup(
        hf=hf, layers=lm.lora, parts=parts, inner=pack(example, 0), outer=pack(answer, 0), each=[],
        weight_TN=torch.ones(T, N), start=lora.expand(policy, T),
        rule=Rule(i.optimizer, i.momentum, i.beta1, i.beta2, i.eps, i.eps_root, i.clip),
        lr={key: torch.tensor(i.lr) for key in policy}, K=i.steps, init=r.outer.through_init,
    )  # fmt: skip
    METHODS[how](warm(setup))
    lm.settle()
    before, writing = peak_of(lm, text)
    resident, gradient = peak_of(lm, lambda: METHODS[how](setup))
    return {
        "base": loaded - start,
        "generating": writing,
        "gradient": gradient,
        "total": max(before + writing, resident + gradient) - start,
    }


def peak_of(lm: LanguageModel, run: Callable[[], Any]) -> tuple[float, float]:
    """Bytes held before, and the most over that meanwhile."""
    gc.collect()
    before = reset_peak("cpu")
    run()
    lm.settle()
    return before, peak_since("cpu", before)


if __name__ == "__main__":
    print(json.dumps(on_rank(json.loads(sys.argv[1]))), flush=True)
    distributed.stop()
