"""The planner against what is really there."""

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from chain import save_problems
from steps import make_world
from tiny import tiny
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mass import blocks, lora, memory, metagrad, plan
from mass.batch import Sequence, pack
from mass.errors import MassError
from mass.forward import example_loss, loss_and_grad
from mass.inner import adapt
from mass.lora import Adapter, LoraShape
from mass.model import language_model
from mass.optimizers import Rule
from mass.recipe import Recipe, load
from mass.shards import unit_of

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "launch"))

import meta_bench_plan as bench  # noqa: E402
from meta_bench_gradients import Flops  # noqa: E402


def recipe(folder: Path, *overrides: str) -> Recipe:
    file = folder / "r.yaml"
    problems = save_problems(folder / "problems.jsonl")
    file.write_text(f"model: {{path: 'tiny:llama', dtype: fp32}}\nproblems: {{train: {problems}}}\n")
    small = ["outer.tasks=2", "generate.examples=3", "generate.max_new_tokens=16", "generate.answer_tokens=8"]
    return load(file, [*small, *overrides])


def test_the_base_is_what_is_loaded(tmp_path: Path) -> None:
    hf, _ = tiny("llama", torch.float32)
    whole = sum(p.nbytes for p in hf.parameters())
    made = plan.make(recipe(tmp_path), 2, [])
    assert made.parts["base"] == whole
    shard = plan.make(recipe(tmp_path, "zero.stage=3"), 2, [])
    kept = shard.parts["base, kept whole"]
    assert 2 * shard.parts["base shard"] + kept == whole and 0 < kept < 0.1 * whole
    held = plan.make(recipe(tmp_path, "zero.stage=3", "zero.hold_base=true"), 2, [])
    gathered = held.parts["gathered units"] + held.generating["base held whole"]
    assert gathered == whole - kept


def test_what_lies_in_main_memory_is_counted_there(tmp_path: Path) -> None:
    def parts(*overrides: str) -> tuple[dict[str, int], dict[str, int]]:
        made = plan.make(recipe(tmp_path, "zero.stage=3", *overrides), 2, [])
        return made.parts, made.main

    here, nothing = parts("model.device=cuda")
    moved, main = parts("model.device=cuda", "zero.offload=all")
    assert nothing == {} and moved["base shard"] == moved["optimizer"] == 0
    assert main["optimizer"] == here["optimizer"] > 0
    assert here["base shard"] <= main["base shard"] < 2 * here["base shard"]
    largest = moved["gathered units"] - here["gathered units"]
    single, _ = parts("model.device=cuda", "zero.prefetch=false")
    assert single["gathered units"] == 2 * largest, "a copy of the largest part, where it is gathered"
    state, main = parts("model.device=cuda", "zero.offload=optimizer")
    assert state == here | {"optimizer": 0} and main == {"optimizer": here["optimizer"]}
    # one memory
    assert parts("model.device=cpu", "zero.offload=all") == (here, {})
    # one rank has a part only where it lies elsewhere
    alone = plan.make(recipe(tmp_path, "zero.stage=3", "zero.offload=all", "model.device=cuda"), 1, [])
    assert alone.main["base shard"] > 0 and alone.parts["base shard"] == 0 < alone.parts["gathered units"]
    assert plan.make(recipe(tmp_path, "zero.stage=3"), 1, []).parts["gathered units"] == 0


def test_rows_that_wait_for_others_gather_the_base_again(tmp_path: Path) -> None:
    """Stage 3: 2 tasks with 3 examples of 16 tokens, and 4 answers of 8, before and after the update."""
    own = ["zero.stage=3", "outer.loss=verifier", "outer.rollouts=4", "inner.steps=1"]

    def passes(*overrides: str) -> float:
        made = plan.make(recipe(tmp_path, *own, *overrides), 2, [])
        return made.sent["base, gathered"] / (plan.make(recipe(tmp_path), 2, []).parts["base"] / 2)

    # 6 and 8 rows at once, or in two and three rounds
    roomy = passes("generate.batch_rows=8")
    assert roomy == 16 + 2 * 8 + 5 + 8
    assert passes("generate.batch_rows=3") - roomy == 16 + 2 * 2 * 8
    held = passes("generate.batch_rows=8", "zero.hold_base=true")
    assert held == passes("generate.batch_rows=3", "zero.hold_base=true") == 1 + 2 + 5 + 8
    # the answers, the outer loss and the loop (its step, one pass back, what tells whether it exploded) at uniform weights
    assert passes("generate.batch_rows=8", "outer.credit=uniform") - roomy == 8 + 2 + 2 + 1 + 1
    # without each example: answers and an outer loss that only looks; the examples' gradients once
    assert passes("generate.batch_rows=8", "outer.credit=left_out") - roomy == 3 * 8 + 3 + 2
    assert passes("generate.batch_rows=8", "outer.credit=left_out", "zero.hold_base=true") - held == 3 + 3 + 2


class Reads(TorchDispatchMode):
    """How often some of a base's matrices are multiplied by; and how often a unit is asked for that is not the one at hand."""

    def __init__(self, hf: torch.nn.Module, *names: str) -> None:
        super().__init__()
        self.products: Counter[str] = Counter()
        self.gathers: Counter[str] = Counter()
        self._names, self._now = names, ""
        self._of = {x.weight.data_ptr(): name for name, x in hf.named_modules() if hasattr(x, "weight")}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        op = func._overloadpacket
        if op in (*memory._PRODUCTS, torch.ops.aten.embedding):
            for tensor in args:
                name = self._of.get(tensor.data_ptr() if isinstance(tensor, Tensor) else 0)
                if name is not None:
                    self.products[name] += name in self._names
                    self.gathers[unit_of(name)] += unit_of(name) != self._now
                    self._now = unit_of(name)
        return func(*args, **(kwargs or {}))


LOOPS: list[tuple[str, ...]] = [
    ("inner.steps=1", "outer.through_init=true"),
    ("inner.steps=3",),
    ("inner.steps=3", "meta_gradient.truncate=1"),
]
ONE_SIDED = ("inner.steps=3", "meta_gradient.truncate=2", "meta_gradient.one_sided=true")


@pytest.mark.parametrize("name", plan.ENGINES)
def test_the_passes_of_an_inner_loop_are_those_that_are_taken(name: str, tmp_path: Path) -> None:
    """By the products with a matrix below the adapters, one among them, and the head, which is not recomputed."""
    hf, _ = tiny("llama", torch.float32, num_hidden_layers=3)
    below, among, head = "model.layers.0.mlp.down_proj", "model.layers.2.mlp.down_proj.base", "lm_head"
    layers = lora.attach(hf, LoraShape(1, 1.0, ("all-linear",), 2))
    parts = blocks.split(hf, layers)
    packed = pack([[Sequence(list(range(1, 13)), 4)] * 2], 0)
    start = lora.expand(lora.fresh(layers, 1, torch.Generator()), 1)
    weight_TN = torch.ones(1, 2)
    engine, recompute, own_checkpoint = plan.ENGINES[name]
    for more in [*LOOPS, *([ONE_SIDED] if engine == "finite_difference" else [])]:
        for checkpoint in ("false", "true"):
            r = recipe(tmp_path, *more, f"inner.checkpoint={checkpoint}", f"meta_gradient.mode={engine}")
            own = parts if own_checkpoint or r.inner.checkpoint else None
            products: metagrad.Products
            if engine == "reverse":
                products = metagrad.Reverse(hf, layers, packed, weight_TN)
            elif engine == "blockwise":
                products = metagrad.blockwise(hf, parts, packed, weight_TN, recompute=recompute)
            else:
                central = not r.meta_gradient.one_sided
                products = metagrad.finite_difference(
                    hf, layers, packed, weight_TN, parts=own, central=central
                )

            def gradient(adapter: Adapter, own: Any = own) -> tuple[Tensor, Adapter]:
                def loss(logprob_M: Tensor) -> Tensor:
                    return example_loss(packed, logprob_M).sum()

                _, logprob_M, grad = loss_and_grad(hf, layers, packed, adapter, loss, parts=own)
                return example_loss(packed, logprob_M), grad

            last = products.record if isinstance(products, metagrad.Reverse) else None
            with Reads(hf, below, among, head) as seen:
                taken = adapt(
                    gradient, start, Rule(), {key: torch.tensor(0.1) for key in start}, r.inner.steps,
                    last=last, count=metagrad.recorded(r.inner.steps, r.meta_gradient.truncate),
                )  # fmt: skip
                metagrad.sweep(
                    products,
                    taken,
                    start,
                    need_init=r.outer.through_init,
                    last_steps=r.meta_gradient.truncate,
                )
            whole, again, read_below = plan._loop_passes(r, name)
            found = [seen.products[x] for x in (head, among, below)]
            assert found == [whole, whole + again, read_below], (more, checkpoint)
            flops = plan._flops(r, 100, 10, 30)[f"inner loop and meta, {name}"]
            check = 2.0 * 110 * (r.inner.max_growth is not None)
            train = 2 * 3 * (plan.PROMPT + 16)
            assert flops / train - check == 2.0 * (whole * 80 + again * 70 + read_below * 30)


@pytest.mark.parametrize(
    "more",
    [
        ("inner.steps=1", "outer.credit=uniform", "inner.checkpoint=false"),
        ("inner.steps=1", "outer.credit=left_out", "outer.gamma=0"),
        ("inner.steps=2", "outer.credit=left_out", "outer.beta=0", "outer.micro_rows=4"),
        ("inner.steps=2", "inner.max_growth=null", "outer.through_init=true"),
        ("inner.steps=2", "outer.lr_policy=0"),
        ("inner.steps=2", "meta_gradient.truncate=1"),
    ],
)
def test_a_step_gathers_a_sharded_base_as_often_as_the_plan_says(
    more: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the blocks that a whole step asks for, less those that are at hand already; nothing is written in it."""
    world = make_world(monkeypatch, "meta_gradient.mode=blockwise", "inner.lr=0.01", *more)
    with Reads(world.setting.lm.hf) as seen:
        world.run()
    planned = plan._gathers(world.setting.recipe)
    assert [seen.gathers[f"model.layers.{i}"] for i in (0, 1)] == [planned] * 2


def test_blocks_below_the_lowest_adapter_are_read_alone(tmp_path: Path) -> None:
    """One of two blocks: what a backward pass does not reach, by PyTorch's own count of a first-order pass."""
    work = {}
    for last in (1, 2):
        own = [f"lora.last={last}", "outer.beta=0", "inner.checkpoint=false"]
        made = plan.make(recipe(tmp_path, *own), 1, ["reverse"])
        lm = language_model(
            "tiny:llama", LoraShape(1, 1.0, ("all-linear",), last), dtype="fp32", device="cpu"
        )
        packed = pack([[Sequence(list(range(1, 65)), 1)]], 0)
        adapter = lora.expand(lora.fresh(lm.lora, 1, torch.Generator()), 1)
        with Flops() as counted:
            loss_and_grad(lm.hf, lm.lora, packed, adapter, lambda logprob_M: logprob_M.sum())
        work[last] = made.flops["policy gradient"], counted.total
    planned, found = (work[1][i] / work[2][i] for i in (0, 1))
    assert planned == pytest.approx(found, rel=0.05) and found < 0.95


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_plan_is_within_15_percent_of_what_two_ranks_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """The base in parts, the optimizer and the peak of one engine; `launch/meta_bench.py plan` measures the others."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    cases = {bench.name(case): case for case in bench.cases(argparse.Namespace(set=[]))}
    row = bench.measure(cases["tiny/ranks2/stage3/blockwise_kept"] | {"threads": 1, "check": True})
    assert row["total_planned"] == pytest.approx(row["total_measured"], rel=0.15), row
    assert row["gradient_planned"] == pytest.approx(row["gradient_measured"], rel=0.15), row


def test_a_bad_plan_is_refused() -> None:
    assert plan.machines("1") == (1, None) and plan.machines("8x79.5") == (8, 79.5)
    with pytest.raises(MassError, match="--plan=8x80"):
        plan.machines("eight")


def test_a_step_without_a_gradient_at_the_start_counts_none(tmp_path: Path) -> None:
    """And the passes that only look: the scorer's features, and the loss that tells whether a loop exploded."""

    def flops(*overrides: str) -> dict[str, float]:
        return plan._flops(recipe(tmp_path, *overrides), 100, 10)

    kept, name = "inner.checkpoint=false", "outer loss, before and after"
    both, after = (flops(kept, f"outer.gamma={g}")[name] for g in (1, 0))
    # two forward and two backward passes, or one backward
    assert after / both == pytest.approx(3 / 4)
    # a gradient whose pass keeps nothing reads the blocks once more, not the head
    answers = 2 * (plan.PROMPT + 8)
    again, again_after = (flops(f"outer.gamma={g}")[name] for g in (1, 0))
    assert (again - both, again_after - after) == (2 * 2.0 * 100 * answers, 2.0 * 100 * answers)
    loop = "inner loop and meta, reverse"
    train = 2 * 3 * (plan.PROMPT + 16)
    assert flops("inner.max_growth=3")[loop] - flops("inner.max_growth=null")[loop] == 2.0 * 110 * train
    assert flops()["score"] == 2.0 * 100 * train
    for more, part in (
        ((), "policy gradient"),
        (("outer.credit=left_out", "inner.steps=1"), "without each example"),
    ):
        assert flops(*more)[part] - flops(*more, kept)[part] == 2.0 * 100 * train


def test_the_report_says_what_fits_and_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines of 8, 6 and 3 GB over 2 GB of weights."""
    gb = 10**9
    peaks = {
        "reverse": memory.Peak(8 * gb, 0, 0),
        "blockwise": memory.Peak(6 * gb, 0, 0),
        "finite_difference": memory.Peak(3 * gb, 0, 0),
    }
    made = plan.Plan({"base": 2 * gb}, {}, {"KV cache": gb}, peaks, {"generate": 1e12}, {})
    assert [made.total(name) for name in peaks] == [10 * gb, 8 * gb, 5 * gb]
    monkeypatch.setattr(plan, "make", lambda *_: made)
    r = recipe(tmp_path)

    def report(limit: float) -> list[str]:
        return plan.report(r, 1, limit).splitlines()

    def fits(limit: float) -> list[bool]:
        rows = [line for line in report(limit) if line.split()[:1] and line.split()[0] in peaks]
        assert len(rows) == 3 and all(line.endswith((" fits", "does not fit")) for line in rows)
        return [line.endswith(" fits") for line in rows]

    assert [fits(limit) for limit in (10.0, 9.9, 5.0, 4.9)] == [
        [True, True, True], [False, True, True], [False, False, True], [False, False, False]
    ]  # fmt: skip
    assert report(10.0)[-1] == "The fastest exact engine that fits: reverse."
    assert report(9.9)[-1] == "The fastest exact engine that fits: blockwise."
    assert report(5.0)[-1].startswith("No exact engine fits") and "finite_difference" in report(5.0)[-1]
    nothing = "\n".join(report(4.9))
    assert "Nothing fits." in nothing and "The gradients are too large" in nothing
    assert "Generation is too large" not in nothing and "The base alone" not in nothing
    tiny_limit = "\n".join(report(1.0))
    assert "The base alone is too large" in tiny_limit and "Generation is too large" in tiny_limit
    assert not any("fit" in line for line in plan.report(r, 1, None).splitlines())
