"""Whole runs of the chain model: the recipe, what a run folder has to hold, and how a user's mistake is told."""

import json
from pathlib import Path
from typing import Any

import torch
from chain import save_problems
from ranks import Done
from safetensors.torch import load_file

RECIPE = """\
run: {name: run}
model: {path: CHAIN, dtype: fp32, device: cpu}
prompt: {style: plain, generate_shots: 1, solve_shots: 1, pool: 6}
problems: {train: PROBLEMS, heldout_size: 4}
lora: {rank: 2}
generate: {examples: 3, max_new_tokens: 16, answer_tokens: 8}
scorer: {hidden: 8}
# planning for memory takes ten seconds a run: tests/test_prepare.py and the recipe of test_train.py's smoke run do that
meta_gradient: {mode: reverse}
outer: {steps: 3, tasks: 2, rollouts: 6, warmup: 0, lr_scorer: 3e-4}
save: {every: 1, keep: 0}
"""
STEP_FILES = {
    "meta.json",
    "optimizer.safetensors",
    "rng.safetensors",
    "scorer.safetensors",
    "policy/adapter_config.json",
    "policy/adapter_model.safetensors",
}


def write_recipe(folder: Path, chain: Path) -> Path:
    """A recipe on the chain model and problems that it can solve by luck."""
    problems = save_problems(folder / "problems.jsonl")
    path = folder / "run.yaml"
    path.write_text(RECIPE.replace("CHAIN", str(chain)).replace("PROBLEMS", str(problems)))
    return path


def step_of(run: Path, step: int) -> Path:
    return run / f"step_{step:06d}"


def tensors(step: Path) -> dict[str, torch.Tensor]:
    """All tensors of a step folder but the random states, by file and name."""
    files = {
        "policy": "policy/adapter_model.safetensors",
        "scorer": "scorer.safetensors",
        "optimizer": "optimizer.safetensors",
    }
    return {f"{kind} {key}": x for kind, name in files.items() for key, x in load_file(step / name).items()}


def log_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def no_leftovers(folder: Path) -> None:
    """No half-written file or folder anywhere."""
    assert not [path for path in folder.rglob("*") if ".tmp" in path.name or path.name.endswith(".partial")]


def is_run_folder(run: Path, steps: list[int], tensorboard: bool = True) -> None:
    """Everything there, complete, and nothing beside."""
    assert (run / "recipe.yaml").is_file() and (run / "samples.jsonl").is_file()
    assert any((run / "tb").glob("events*")) == tensorboard
    assert (run / "latest").read_text() == f"step_{steps[-1]:06d}\n"
    assert sorted(path.name for path in run.glob("step_*")) == [f"step_{step:06d}" for step in steps]
    for step in steps:
        folder = step_of(run, step)
        files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        assert files == STEP_FILES
        assert json.loads((folder / "meta.json").read_text())["step"] == step
    no_leftovers(run)


def many(runs: list[list[str]]) -> None:
    """Runs one after another in the same ranks."""
    from mass import distributed
    from mass.recipe import load
    from mass.train import train

    for words in runs:
        train(load(words[0], words[1:]))
    distributed.stop()


def one_sentence(done: Done, *words: str, rank: int = 0) -> str:
    """The single clear message of a user's mistake."""
    assert all(code == 2 for code in done.codes), done
    text = done.err[rank].strip()
    assert text and "Traceback" not in text and "Error:" not in text, text
    assert all(word in text for word in words), text
    assert not any(other.strip() for r, other in enumerate(done.err) if r != rank), done.err
    return text
