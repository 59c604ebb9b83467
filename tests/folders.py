"""Run folders as training leaves them, of models that were never trained."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from mass import checkpoint
from mass.checkpoint import commit, open_run
from mass.lora import LoraShape, attach, fresh
from mass.model import load
from mass.scorer import Scorer
from mass.stepfolder import Contents

DATA = Path(__file__).parent / "data"
COUNT = 10
SHOTS = [{"id": f"s{i}", "problem": f"What is {i} + 2?", "solution": f"Answer: {i + 2}", "answer": str(i + 2), "source": "x"}
         for i in range(4)]  # fmt: skip


def make_run(root: Path, name: str, **problems: Any) -> Path:
    """A run folder as training leaves it, with the small base of the families world; its policy moves, its scorer is random."""
    recipe = {
        "run": {"name": name},
        "model": {"path": str(DATA / "families"), "dtype": "fp32"},
        "problems": {
            "train": ["world:families"],
            "heldout": ["world:families"],
            "size": 20,
            "heldout_size": COUNT,
        }
        | problems,
        "prompt": {
            "style": "plain",
            "solve_instruction": "",
            "generate_instruction": "",
            "generate_shots": 0,
            "pool": 0,
        },
        "lora": {"rank": 2, "alpha": 4.0},
        "scorer": {"hidden": 8},
        "generate": {"max_new_tokens": 28, "answer_tokens": 48, "examples": 4},
        "inner": {"lr": 5.0, "clip": 0.1, "checkpoint": False},
    }
    return save_run(root, recipe, "base", [(1, len(name), 0)], 0.02, {}, [])


def make_tiny_run(root: Path) -> Path:
    """The same of a tiny random model, with steps 1 and 2, a learned rate and problems to show."""
    recipe = {
        "run": {"name": "r"},
        "model": {"path": "tiny:llama", "dtype": "fp32"},
        "problems": {"train": ["gym:chain_sum"]},
        "prompt": {"style": "plain", "generate_shots": 1, "pool": 4},
        "lora": {"rank": 2, "alpha": 4.0},
        "scorer": {"hidden": 8},
        "generate": {"max_new_tokens": 6, "answer_tokens": 5, "examples": 2},
        "inner": {"lr": 0.25, "learned_lr": "one"},
    }
    return save_run(
        root, recipe, "tiny:llama", [(1, 1, 1), (2, 2, 2)], 0.1, {"inner_lr": {"all": 0.125}}, SHOTS
    )


def save_run(
    root: Path,
    recipe: dict[str, Any],
    base: str,
    seeds: Sequence[tuple[int, int, int]],
    far: float,
    extra: dict[str, Any],
    shots: Sequence[dict[str, str]],
) -> Path:
    """`seeds`: of each step its number, the seed of its policy, which is `far` from a fresh one, and of its scorer."""
    hf, _ = load(recipe["model"]["path"], dtype="fp32", device="cpu")
    fingerprint = checkpoint.fingerprint(hf.named_parameters())
    shape = LoraShape(2, 4.0, ("all-linear",))
    layers = attach(hf, shape)
    opened = commit(open_run(root, recipe["run"]["name"], yaml.safe_dump(recipe), "no"))
    for step, seed, scorer_seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        policy = {
            key: x + far * torch.randn(x.shape, generator=generator)
            for key, x in fresh(layers, 2, generator).items()
        }
        with torch.random.fork_rng():
            torch.manual_seed(scorer_seed)
            scorer = Scorer(hf.config.hidden_size, 2, 8).state_dict()
        meta = {"fingerprint": fingerprint, "extra": extra}
        contents = Contents(policy, shape, base, scorer, {}, [torch.get_rng_state()], meta)
        checkpoint.save(opened, step, contents, 0)
    (opened.folder / "shots.jsonl").write_text("".join(json.dumps(shot) + "\n" for shot in shots))
    return opened.folder
