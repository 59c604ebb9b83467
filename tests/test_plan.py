"""The planner against what is really there, and on paper for models that no test can load."""

import json
import re
from pathlib import Path

import pytest
import torch
from chain import save_problems
from tiny import tiny
from torch.utils.flop_counter import FlopCounterMode

from mass import plan
from mass.errors import MassError
from mass.recipe import Recipe, load
from mass.train import main

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}
# the numbers of their config.json
SIZES = {
    "8B": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "70B": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
}


def recipe(folder: Path, *overrides: str, path: str = "tiny:llama") -> Recipe:
    file = folder / "r.yaml"
    problems = save_problems(folder / "problems.jsonl")
    file.write_text(f"model: {{path: '{path}', dtype: fp32}}\nproblems: {{train: {problems}}}\n")
    small = ["outer.tasks=2", "generate.examples=3", "generate.max_new_tokens=16", "generate.answer_tokens=8"]
    return load(file, [*small, *overrides])


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt_neox"])
def test_the_base_is_what_is_loaded(tmp_path: Path, architecture: str) -> None:
    hf, _ = tiny(architecture, torch.float32)
    whole = sum(p.nbytes for p in hf.parameters())
    made = plan.make(recipe(tmp_path, path=f"tiny:{architecture}"), 2)
    assert made.parts["base"] == whole
    shard = plan.make(recipe(tmp_path, "zero.stage=3", path=f"tiny:{architecture}"), 2)
    assert shard.parts["base shard"] == whole // 2 and shard.parts["gathered blocks"] > 0


def test_work_is_what_is_counted(tmp_path: Path) -> None:
    r = recipe(tmp_path)
    hf, _ = tiny("llama", torch.float32)
    tokens = torch.zeros(1, 10, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        hf(tokens)
    attention = sum(n for name, n in counter.flop_counts["Global"].items() if "attention" in str(name))
    tokens_of_examples = 2 * 3 * (plan.PROMPT + 16)
    want = (counter.get_total_flops() - attention) / 10 * tokens_of_examples
    assert plan.make(r, 1).flops["generate"] == pytest.approx(want, rel=1e-6)


def test_parts_of_tasks_need_less_and_stages_shard_the_optimizer(tmp_path: Path) -> None:
    all_, some = (plan.make(recipe(tmp_path, f"outer.tasks_at_once={n}"), 1) for n in (2, 1))
    for name in plan.ENGINES:
        assert some.total(name) < all_.total(name), name
    assert some.flops == all_.flops
    sizes = [
        plan.make(recipe(tmp_path, f"zero.stage={s}"), 4).parts["adapter, its gradient and optimizer"]
        for s in range(4)
    ]
    assert sizes[1] > sizes[2] > sizes[3]


@pytest.mark.parametrize(("size", "ranks", "billions"), [("8B", 8, 8.03), ("70B", 64, 70.55)])
def test_large_models_on_paper(
    tmp_path: Path, size: str, ranks: int, billions: float, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | SIZES[size]))
    r = recipe(tmp_path, "zero.stage=0", "model.dtype=bf16", path=str(tmp_path))
    made = plan.make(r, ranks)
    assert made.parts["base"] == pytest.approx(2e9 * billions, rel=1e-3), (
        "as many parameters as the model's name says"
    )
    text = plan.report(r, ranks, 80)
    assert ("Nothing fits" in text and "zero.stage=3 shards the base" in text) == (size == "70B")
    main([str(tmp_path / "r.yaml"), "model.dtype=bf16", "zero.stage=3", f"--plan={ranks}x80"])
    assert re.search(r"blockwise, inner.checkpoint .* fits", capsys.readouterr().out)


def test_a_bad_plan_is_refused() -> None:
    assert plan.machines("--plan") == (1, None) and plan.machines("--plan=8x79.5") == (8, 79.5)
    with pytest.raises(MassError, match="--plan=8x80"):
        plan.machines("--plan=eight")
