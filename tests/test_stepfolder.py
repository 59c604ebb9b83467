"""A step folder: its files, and what of a state survives in them."""

import importlib.metadata
import json

import pytest
from saves import RECIPE, begin, contents, hidden, make_layers, names

from mass import stepfolder
from mass.checkpoint import load, save
from mass.errors import MassError
from mass.stepfolder import FILES


def test_layout_is_that_of_the_docs_and_holds_no_pickle(tmp_path):
    run = begin(tmp_path)
    step = save(run, 10, contents(), keep=3)
    found = {str(path.relative_to(step)) for path in step.rglob("*") if path.is_file()}
    assert found == {*FILES, "meta.json"}
    assert (run.folder / "latest").read_text() == "step_000010\n"
    assert (run.folder / "recipe.yaml").read_text() == RECIPE
    meta = json.loads((step / "meta.json").read_text())
    assert meta["step"] == 10 and meta["base"] == "tiny:llama" and meta["world_size"] == 2
    assert set(meta["files"]) == set(FILES)
    assert meta["versions"]["torch"] == importlib.metadata.version("torch")
    assert hidden(run.folder) == []
    modes = {path.stat().st_mode for path in step.rglob("*") if path.is_file()}
    assert len(modes) == 1


def test_policy_is_a_peft_folder(tmp_path):
    step = save(begin(tmp_path), 1, contents(), keep=0)
    config = json.loads((step / "policy" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["base_model_name_or_path"]) == ("LORA", 2, "tiny:llama")


def test_meta_survives_tuples_and_integer_keys_and_refuses_nan(tmp_path):
    run = begin(tmp_path)
    save(
        run,
        1,
        contents().__class__(**{**vars(contents()), "meta": {"a": (1, 2), "b": {10: 1, 9: 2}}}),
        keep=0,
    )
    assert load(run.folder, make_layers()).meta["b"] == {"10": 1, "9": 2}
    with pytest.raises(ValueError):
        save(run, 2, contents().__class__(**{**vars(contents()), "meta": {"a": float("nan")}}), keep=0)
    assert names(run) == ["step_000001"]


def test_a_later_format_is_refused(tmp_path, monkeypatch):
    run = begin(tmp_path)
    monkeypatch.setattr(stepfolder, "FORMAT", 2)
    save(run, 10, contents(), keep=0)
    monkeypatch.undo()
    with pytest.raises(MassError, match="has format 2; this version reads format 1"):
        load(run.folder, make_layers())
