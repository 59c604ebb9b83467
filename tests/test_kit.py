"""What test time works with: the kit of a run folder."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from folders import make_tiny_run

from mass import checkpoint, state
from mass import kit as kit_module
from mass.errors import MassError
from mass.kit import build_kit, plan
from mass.problems import Problem, Task


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_run(tmp_path_factory.mktemp("runs"))


def test_kit_of_a_run_is_what_was_trained(run: Path) -> None:
    kit = build_kit(plan(str(run), None, ["inner.steps=1", "generate.examples=5", "inner.max_growth=3"]))
    contents = checkpoint.load(run / "step_000002", kit.lm.lora)
    assert kit.policy is not None and kit.policy.keys() == contents.policy.keys()
    assert all(torch.equal(x, contents.policy[key]) for key, x in kit.policy.items())
    assert kit.head is not None
    assert all(torch.equal(x, contents.scorer[key]) for key, x in kit.head.state_dict().items())
    assert {float(x) for x in kit.lr.values()} == {0.125} and kit.lr.keys() == kit.policy.keys()
    assert (kit.steps, kit.examples, kit.max_growth) == (1, 5, 3)
    assert [t.problem.id for t in kit.pool] == ["s0", "s1", "s2", "s3"] and kit.generate_shots == 1
    assert kit.lm.shape is not None and kit.lm.shape.scale == 2.0
    own = build_kit(plan(str(run), None, ["inner.learned_lr=no", "inner.lr=0.5"]))
    assert {float(x) for x in own.lr.values()} == {0.5}


def test_learned_rate_of_each_layer(run: Path) -> None:
    r = plan(str(run), None).recipe
    r = replace(r, inner=replace(r.inner, learned_lr="layer"))
    parts = SimpleNamespace(prefix=["model.layers.0.", "model.layers.1."])
    keys = ["model.layers.0.q.A", "model.layers.1.q.B", "elsewhere.A"]
    rates = kit_module._rates(
        r, {"block0": 0.5, "block1": 0.25, "rest": 2.0}, keys, parts, torch.device("cpu")
    )  # type: ignore[arg-type]
    assert [float(rates[key]) for key in keys] == [0.5, 0.25, 2.0]


def test_shots_hold_any_character(run: Path, tmp_path: Path) -> None:
    """Some are ends of lines to Python and none to JSON: U+0085, U+2028 and U+2029."""
    copy = shutil.copytree(run, tmp_path / "r")
    odd = Task(Problem("a", "one\u2028two\u0085three"), "4", "\u2029Answer: 4", "file", "exact")
    (copy / "shots.jsonl").write_text(state._shot(odd) * 4, encoding="utf-8")
    assert build_kit(plan(str(copy), None)).pool == [odd] * 4


def test_a_file_of_shots_is_part_of_the_settings(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    asked = plan(None, "tiny:llama", [f"problems.train=[{file}]"])
    keys = []
    for text in ("one", "two", "one"):
        file.write_text(json.dumps({"problem": text, "answer": "1"}) + "\n")
        keys.append(kit_module.settings_key(asked))
    assert keys[0] == keys[2] != keys[1]


def test_damaged_or_missing_shots(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "r")
    (copy / "shots.jsonl").write_text('{"id": 1')
    with pytest.raises(MassError, match=r"shots.jsonl is damaged \(.*not JSON"):
        build_kit(plan(str(copy), None))
    (copy / "shots.jsonl").unlink()
    with pytest.raises(MassError, match="prompt.generate_shots=0 prompt.solve_shots=0"):
        build_kit(plan(str(copy), None))
    assert build_kit(plan(str(copy), None, ["prompt.generate_shots=0"])).pool == []
