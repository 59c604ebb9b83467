"""The planner against what is really there."""

from pathlib import Path

import pytest
import torch
from chain import save_problems
from tiny import tiny

from mass import plan
from mass.errors import MassError
from mass.recipe import Recipe, load


def recipe(folder: Path, *overrides: str) -> Recipe:
    file = folder / "r.yaml"
    problems = save_problems(folder / "problems.jsonl")
    file.write_text(f"model: {{path: 'tiny:llama', dtype: fp32}}\nproblems: {{train: {problems}}}\n")
    small = ["outer.tasks=2", "generate.examples=3", "generate.max_new_tokens=16", "generate.answer_tokens=8"]
    return load(file, [*small, *overrides])


@pytest.mark.slow
def test_the_base_is_what_is_loaded(tmp_path: Path) -> None:
    hf, _ = tiny("llama", torch.float32)
    whole = sum(p.nbytes for p in hf.parameters())
    made = plan.make(recipe(tmp_path), 2)
    assert made.parts["base"] == whole
    shard = plan.make(recipe(tmp_path, "zero.stage=3"), 2)
    assert shard.parts["base shard"] == whole // 2 and shard.parts["gathered blocks"] > 0


def test_a_bad_plan_is_refused() -> None:
    assert plan.machines("1") == (1, None) and plan.machines("8x79.5") == (8, 79.5)
    with pytest.raises(MassError, match="--plan=8x80"):
        plan.machines("eight")
