"""The recipes that are to learn something do: cut-down runs of the real loop, with the bases of tests/data.

What is asked for is far from chance, and far enough below what was measured (docs/results.md) that rounding on another
machine does not matter.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ranks import ROOT, clean_environment

DATA = Path(__file__).parent / "data"


def run(name: str, folder: Path, *overrides: str) -> list[dict[str, Any]]:
    """The lines of log.jsonl of a short run of recipes/NAME.yaml."""
    command = [
        str(Path(sys.executable).parent / "mass-train"),
        f"recipes/{name}.yaml",
        f"run.folder={folder}",
    ]
    command += [f"model.path={DATA / name}", "log.tensorboard=false", "log.samples_every=0", *overrides]
    environment = clean_environment() | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in (folder / name / "log.jsonl").read_text().splitlines()]


def mean(lines: list[dict[str, Any]], tag: str) -> float:
    found = [line[tag] for line in lines if line.get(tag) is not None]
    return sum(found) / len(found)


@pytest.mark.slow
def test_families_the_weighted_update_answers_what_no_weights_could(tmp_path: Path) -> None:
    """Held-out problems are of families in no training of any kind."""
    log = run(
        "families", tmp_path, "outer.steps=12", "evaluate.every=12", "evaluate.problems=32", "save.every=12"
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
    tmp_path: Path,
) -> None:
    log = run(
        "planted", tmp_path, "outer.steps=24", "evaluate.every=24", "evaluate.problems=64", "save.every=24"
    )
    first, last, steps = log[0], log[-1], log[:-1]
    assert first["credit/auc"] > 0.9
    assert mean(steps[19:], "scorer/auc") > 0.85
    assert last["seen/auc"] > 0.85 and last["unseen/auc"] < last["seen/auc"] - 0.05
    assert last["seen/mass"] > last["seen/none"] + 0.2
    assert last["unseen/gain"] < last["seen/gain"]


def test_the_bases_are_those_of_the_worlds() -> None:
    from mass import pretrain, worlds

    for name in worlds.WORLDS:
        fresh = pretrain.word_tokenizer(worlds.find(f"world:{name}").words)
        stored = json.loads((DATA / name / "tokenizer.json").read_text())
        assert stored["model"]["vocab"] == json.loads(fresh.backend_tokenizer.to_str())["model"]["vocab"]
        assert sum(file.stat().st_size for file in (DATA / name).iterdir()) < 1_000_000
