"""The recipes that are to learn something do: cut-down runs of the real loop, with the bases of tests/data.

What is asked for is far from chance, and far enough below what was measured (docs/results.md) that rounding on another
machine does not matter.
"""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks
from transformers import LlamaForCausalLM

from mass import pretrain, worlds
from mass.prompts import make_prompts

DATA = Path(__file__).parent / "data"


def run(ranks: Ranks, name: str, folder: Path, *overrides: str) -> list[dict[str, Any]]:
    """The lines of log.jsonl of a short run of recipes/NAME.yaml."""
    words = [f"recipes/{name}.yaml", f"run.folder={folder}", f"model.path={DATA / name}"]
    words += ["log.tensorboard=false", "log.samples_every=0", *overrides]
    ranks("mass.console:train", words, limit=300).good()
    return [json.loads(line) for line in (folder / name / "log.jsonl").read_text().splitlines()]


def mean(lines: list[dict[str, Any]], tag: str) -> float:
    found = [line[tag] for line in lines if line.get(tag) is not None]
    return sum(found) / len(found)


@pytest.mark.slow
def test_families_the_weighted_update_answers_what_no_weights_could(ranks: Ranks, tmp_path: Path) -> None:
    """Held-out problems are of families in no training of any kind."""
    log = run(
        ranks,
        "families",
        tmp_path,
        "outer.steps=12",
        "evaluate.every=12",
        "evaluate.problems=32",
        "save.every=12",
    )
    first, last, steps = log[0], log[-1], log[:-1]
    assert len(steps) == 12 and last["step"] == 12
    # uniform weights: the credit ranks right above wrong before anything is trained
    assert first["credit/auc"] > 0.97 and first["scorer/auc"] == 0.5
    assert 0.15 < mean(steps, "generator/right") < 0.35
    assert mean(steps[9:], "scorer/auc") > 0.9
    assert last["heldout/auc"] > 0.9 and last["heldout/honest"] > 0.95
    assert last["heldout/none"] < 0.15 and first["heldout/mass"] < 0.5
    assert last["heldout/mass"] > last["heldout/none"] + 0.4
    assert last["heldout/mass"] > first["heldout/mass"] + 0.2
    # all held-out families are unseen: nothing to set apart
    assert not any("seen/" in tag for tag in last)


@pytest.mark.slow
def test_planted_the_scorer_finds_the_right_rule_of_the_families_that_it_was_trained_on(
    ranks: Ranks, tmp_path: Path
) -> None:
    log = run(
        ranks,
        "planted",
        tmp_path,
        "outer.steps=24",
        "evaluate.every=24",
        "evaluate.problems=64",
        "save.every=24",
    )
    first, last, steps = log[0], log[-1], log[:-1]
    assert first["credit/auc"] > 0.9
    assert mean(steps[19:], "scorer/auc") > 0.85
    assert last["seen/auc"] > 0.85 and last["unseen/auc"] < last["seen/auc"] - 0.05
    assert last["seen/mass"] > last["seen/none"] + 0.2
    assert last["unseen/gain"] < last["seen/gain"]


def test_the_bases_are_those_of_the_worlds() -> None:
    """Their words, and what the lessons teach: a random model's loss is 4, that of these 0.3 and 0.5."""
    for name in worlds.WORLDS:
        world = worlds.find(f"world:{name}")
        fresh = pretrain.word_tokenizer(world.words)
        stored = json.loads((DATA / name / "tokenizer.json").read_text())
        assert stored["model"]["vocab"] == json.loads(fresh.backend_tokenizer.to_str())["model"]["vocab"]
        prompts, rng = make_prompts(fresh, "plain", "", ""), random.Random(0)
        lessons = [pretrain._encode(prompts, world.lesson(rng)) for _ in range(32)]
        hf = LlamaForCausalLM.from_pretrained(DATA / name, dtype=torch.float32)
        assert pretrain._backward(hf, lessons, fresh.pad_token_id) < 0.8
        assert sum(file.stat().st_size for file in (DATA / name).iterdir()) < 1_000_000
