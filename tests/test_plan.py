"""The planner against what is really there."""

import argparse
import sys
from pathlib import Path

import pytest
import torch
from chain import save_problems
from tiny import tiny

from mass import lora, memory, plan
from mass.batch import Sequence, pack
from mass.errors import MassError
from mass.forward import loss_and_grad
from mass.lora import LoraShape
from mass.model import language_model
from mass.recipe import Recipe, load

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


def test_blocks_below_the_lowest_adapter_are_read_alone(tmp_path: Path) -> None:
    """One of two blocks: what a backward pass does not reach, by PyTorch's own count of a first-order pass."""
    work = {}
    for last in (1, 2):
        made = plan.make(recipe(tmp_path, f"lora.last={last}", "outer.beta=0"), 1, ["reverse"])
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

    both, after = (flops(f"outer.gamma={g}")["outer loss, before and after"] for g in (1, 0))
    # two forward and two backward passes, or one backward
    assert after / both == pytest.approx(3 / 4)
    loop = "inner loop and meta, reverse"
    train = 2 * 3 * (plan.PROMPT + 16)
    assert flops("inner.max_growth=3")[loop] - flops("inner.max_growth=null")[loop] == 2.0 * 110 * train
    assert flops()["score"] == 2.0 * 100 * train


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
