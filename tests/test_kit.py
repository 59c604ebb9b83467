"""What test time works with: the kit of a run folder."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from folders import make_tiny_run

from mass import checkpoint, chooser, state
from mass import kit as kit_module
from mass.chooser import Chooser
from mass.errors import MassError
from mass.kit import build_kit
from mass.problems import Problem, Task
from mass.wanted import answering, plan, settings_key


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
        keys.append(settings_key(asked, "quest"))
    assert keys[0] == keys[2] != keys[1]


@pytest.mark.parametrize("which", ["model", "teacher"])
def test_what_is_in_a_model_s_folder_is_part_of_the_settings(tmp_path: Path, which: str) -> None:
    def key() -> str:
        if which == "model":
            return settings_key(plan(None, str(tmp_path)), "quest")
        return settings_key(replace(plan(None, "tiny:llama"), teacher=str(tmp_path)), "quest")

    keys = [key()]
    for name, data in [
        ("config.json", b"{}"),
        ("model.safetensors", b"1234"),
        ("model.safetensors", b"123"),
        ("pytorch_model.bin", b""),
    ]:
        (tmp_path / name).write_bytes(data)
        keys.append(key())
    os.utime(tmp_path / "model.safetensors", ns=(0, 1))
    keys.append(key())
    (tmp_path / "README.md").touch()
    assert len(set(keys)) == 6 and key() == keys[-1]


def fitted_run(run: Path, folder: Path, budget: int) -> Path:
    """A copy of a run in which auto is fitted."""
    copy = shutil.copytree(run, folder / "r")
    flat = {"none": (0.0,) * 5}
    chooser.save(Chooser(budget, 4, 10, (0.0,) * 4, (1.0,) * 4, flat, {"none": 0.5}), copy)
    return copy


def test_fitting_auto_again_concerns_auto_alone(run: Path, tmp_path: Path) -> None:
    asked = plan(str(fitted_run(run, tmp_path, 30)), None)
    before = [settings_key(asked, name) for name in ("mass", "auto")]
    fitted_run(run, tmp_path / "other", 40).joinpath("auto.json").replace(tmp_path / "r" / "auto.json")
    after = [settings_key(asked, name) for name in ("mass", "auto")]
    assert before[0] == after[0] and before[1] != after[1]


def test_auto_is_for_the_step_and_the_settings_that_it_was_fitted_with(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy = fitted_run(run, tmp_path, 30)
    old = chooser.load(copy)
    assert old is not None and old.step is None
    # a file of an earlier version knows of neither
    assert plan(str(copy), None, ["inner.steps=1"]).method("auto")
    assert "auto.json does not say with which step and settings" in caplog.text
    caplog.clear()
    own = plan(str(copy), None)
    settings = {key: x for key, x in answering(own.recipe).items() if key != "generate.top_k"}
    chooser.save(replace(old, step="step_000002", settings=settings), copy)
    for other, more, sentence in [
        (
            copy,
            ["inner.steps=1", "model.device=cpu"],
            r"fitted with inner.steps=2, not 1: give the same, or fit again",
        ),
        (copy, ["scorer.temperature=3"], r"fitted with scorer.temperature=1.0, not 3.0"),
        (
            copy / "step_000001",
            [],
            r"fitted at step_000002, not step_000001: name that step in --run, or fit again",
        ),
    ]:
        asked = plan(str(other), None, more)
        with pytest.raises(MassError, match=sentence):
            asked.method("auto")
        assert asked.method("mass")
    # a service asks its kit alone
    assert build_kit(asked).chooser is None and build_kit(own).chooser is not None
    # what takes other time and memory, and a key that is newer than the file
    assert plan(str(copy), None, ["generate.batch_rows=3", "model.dtype=bf16", "generate.top_k=5"]).method(
        "auto"
    )
    assert not caplog.text


def test_what_a_method_cannot_work_under_is_said_by_the_plan(run: Path, tmp_path: Path) -> None:
    copy = str(fitted_run(run, tmp_path, 30))
    file = tmp_path / "train.jsonl"
    rows = [json.dumps({"problem": f"{i}?", "answer": str(i)}) + "\n" for i in range(40)]
    file.write_text("".join(rows))
    few, one = tmp_path / "few.jsonl", tmp_path / "one.jsonl"
    few.write_text("".join(rows[:8]))
    one.write_text(rows[0])
    cases = [
        (plan(copy, None), "random", {}, "generate.examples=5", "generate.examples=5 .* and 4 are set aside"),
        (plan(copy, None), "ttrl", {}, "guard.restore=0.1", "leave guard.* out"),
        (plan(copy, None), "auto", {"budget": 40}, "", "fitted under --budget 30, not 40"),
        (plan(copy, None), "auto", {}, "generate.answer_tokens=31", "less than generate.answer_tokens=31"),
        (plan(None, "tiny:llama"), "random", {}, f"problems.train={file} generate.examples=17", "and 16 are set aside"),
        # a file may give fewer than prompt.pool, under a budget none at all
        (plan(None, "tiny:llama"), "random", {}, f"problems.train={few} prompt.generate_shots=0", "and 4 are set aside"),
        (plan(None, "tiny:llama"), "random", {"budget": 300}, f"problems.train={one} prompt.generate_shots=0", "there are none here"),
        (plan(copy, None), "tt-d", {"teacher": str(tmp_path / "no")}, "", "--teacher .*/no: there is no such folder"),
        (plan(copy, None), "tt-d", {"teacher": str(tmp_path)}, "", "--teacher .*: this folder has no config.json"),
    ]  # fmt: skip
    for good, name, changes, more, sentence in cases:
        source = (copy, None) if good.step else (None, "tiny:llama")
        asked = replace(plan(*source, more.split()), **changes)
        with pytest.raises(MassError, match=sentence):
            asked.method(name)
    # a budget takes what there is; guards are for what fine-tunes
    assert replace(plan(copy, None, ["generate.examples=5"]), budget=30).method("random").examples
    assert plan(copy, None, ["guard.restore=0.1"]).method("quest").update
    assert replace(plan(copy, None), budget=30).method("auto")
    with pytest.raises(MassError, match="method auto is not fitted here"):
        plan(copy, None).method("auto", bare=True)


def test_rates_that_a_run_did_not_learn_are_refused(run: Path, tmp_path: Path) -> None:
    for learned, text, sentence in [
        ("one", "inner.learned_lr=layer", "r was trained with inner.learned_lr=one"),
        ("layer", "inner.learned_lr=one", "trained with inner.learned_lr=layer"),
        ("one", 'inner={"lr": 0.5}', "inner.lr=0.5: this run learned its inner rate"),
        ("one", "inner.lr=0.25", "inner.lr=0.25: this run learned its inner rate"),
        ("one", 'lora={"rank": 4}', "were not made so"),
        ("one", 'scorer={"layers": [1.0]}', "were not made so"),
    ]:
        copy = shutil.copytree(run, tmp_path / f"{learned} {text[:9]}" / "r", dirs_exist_ok=True)
        recipe = copy / "recipe.yaml"
        recipe.write_text(recipe.read_text().replace("learned_lr: one", f"learned_lr: '{learned}'"))
        with pytest.raises(MassError, match=sentence):
            plan(str(copy), None, [text])
    assert plan(str(run), None, ['scorer={"temperature": 2.0}']).recipe.scorer.temperature == 2.0
    copy = shutil.copytree(run, tmp_path / "none" / "r")
    recipe = copy / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("learned_lr: one", "learned_lr: 'no'"))
    with pytest.raises(
        MassError, match="inner.learned_lr=layer: .*/r was trained with inner.learned_lr=no. Leave it"
    ):
        plan(str(copy), None, ["inner.learned_lr=layer", "inner.lr=0.5"])
    assert plan(str(copy), None, ["inner.learned_lr=no", "inner.lr=0.5"]).recipe.inner.lr == 0.5
    by_hand = plan(str(run), None, ['inner={"lr": 0.5, "learned_lr": "no"}']).recipe.inner
    assert (by_hand.lr, by_hand.learned_lr) == (0.5, "no")


def test_keys_that_would_do_nothing_are_refused_where_they_are_typed(run: Path, tmp_path: Path) -> None:
    peft = str(shutil.copytree(run / "step_000002" / "policy", tmp_path / "peft"))
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps({"problem": f"{i}?", "answer": str(i)}) + "\n" for i in range(8)))
    bare = (None, "tiny:llama")
    for source, text, sentence in [
        ((peft, None), "lora.rank=4", r"lora.rank=4: the adapter in .*peft was not made so. Leave it out"),
        # the default, but not the folder's
        ((peft, None), "lora.rank=8", r"lora.rank=8: the adapter in .*peft was not made so"),
        ((peft, None), 'lora={"last": 1}', r"lora=.*: the adapter in .*peft was not made so"),
        ((peft, None), "inner.learned_lr=one", "inner.learned_lr=one: only a run that learned .* and set inner.lr"),
        (bare, "inner.learned_lr=layer", "inner.learned_lr=layer: only a run that learned"),
        ((str(run), None), f"problems.train={file}", r"problems.train=\['.*: the training problems .*shots.jsonl. Leave it out"),
        ((str(run), None), "prompt.pool=5", "prompt.pool=5: the training problems .*shots.jsonl. Leave it out"),
    ]:  # fmt: skip
        with pytest.raises(MassError, match=sentence):
            plan(*source, [text])
    # what is so already, and what does something
    assert plan(peft, None, ["lora.rank=2", "lora.alpha=4.0"]).recipe.lora.rank == 2
    assert plan(*bare, ["lora.rank=4", f"problems.train={file}", "prompt.pool=4"]).recipe.lora.rank == 4
    assert plan(
        str(run), None, ["problems.train=gym:chain_sum", "prompt.pool=4", "inner.learned_lr=one"]
    ).step


def test_shots_that_are_not_there_are_missed_before_anything_is_loaded(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kit_module, "load", lambda *_, **__: pytest.fail("a model is loaded"))
    file = tmp_path / "train.jsonl"
    rows = [json.dumps({"problem": f"{i} + 1?", "answer": str(i + 1)}) + "\n" for i in range(4)]
    file.write_text("".join(rows))
    with pytest.raises(
        MassError, match=r"generate_shots=2 show .* none here: name some by problems.train=FILE"
    ):
        plan(None, "tiny:llama", ["prompt.generate_shots=2"])
    with pytest.raises(MassError, match=r"solve_shots=5 .*shots.jsonl holds 4 of the run's: lower them"):
        plan(str(run), None, ["prompt.solve_shots=5", "prompt.pool=20"])
    with pytest.raises(MassError, match=r"solve_shots=3 .* problems.train gives 2 \(3 shots wanted"):
        build_kit(plan(None, "tiny:llama", [f"problems.train={file}", "prompt.solve_shots=3"]))
    with pytest.raises(
        MassError, match="guard.fisher=1 takes .* none here: set problems.train=FILE.jsonl, or leave it"
    ):
        plan(None, "tiny:llama", ["guard.fisher=1"])
    bare = shutil.copytree(run, tmp_path / "bare")
    (bare / "shots.jsonl").write_text("")
    with pytest.raises(MassError, match="guard.fisher=1 .* none in .*shots.jsonl: leave it out"):
        plan(str(bare), None, ["guard.fisher=1", "prompt.generate_shots=0"])
    # the Fisher information shows problems of the pool to each other
    with pytest.raises(MassError, match=r"holds 4 of the run's"):
        plan(str(run), None, ["prompt.solve_shots=4", "guard.fisher=1"])


def test_an_adapter_without_a_base_model_asks_for_one(run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(run / "step_000002" / "policy", tmp_path / "peft")
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": None}))
    with pytest.raises(MassError, match="names no base model: give it with --model MODEL"):
        plan(str(folder), None)
    assert plan(str(folder), "tiny:llama").recipe.model.path == "tiny:llama"


def test_damaged_or_missing_shots(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "r")
    (copy / "shots.jsonl").write_text('{"id": 1')
    with pytest.raises(MassError, match=r"shots.jsonl is damaged \(.*not JSON"):
        build_kit(plan(str(copy), None))
    (copy / "shots.jsonl").unlink()
    with pytest.raises(MassError, match="prompt.generate_shots=0 prompt.solve_shots=0"):
        build_kit(plan(str(copy), None))
    assert build_kit(plan(str(copy), None, ["prompt.generate_shots=0"])).pool == []
