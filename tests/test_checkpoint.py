"""Run folders: what is read is what was written, and what is damaged, foreign or renamed is refused by name."""

import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from saves import assert_same, begin, contents, hidden, make_layers, names
from torch import nn

from mass import checkpoint
from mass.checkpoint import fingerprint, load, newest_good, save, step_of
from mass.errors import MassError
from mass.stepfolder import FILES

# writing and reading


def test_round_trip_is_bitwise(tmp_path):
    run = begin(tmp_path)
    # over ten ranks, so that the order of the names is put to the test
    want = contents(7, ranks=12)
    step = save(run, 10, want, keep=3)
    assert step == run.folder / "step_000010"
    assert_same(load(run.folder, make_layers()), want)
    assert_same(load(step, make_layers(), fingerprint="f00"), want)


def test_what_was_loaded_can_be_saved_again(tmp_path):
    run = begin(tmp_path)
    save(run, 1, contents(), keep=0)
    again = load(run.folder, make_layers())
    save(run, 2, again, keep=0)
    assert load(run.folder, make_layers()).meta["step"] == 2


def test_retention_keeps_the_newest(tmp_path):
    run = begin(tmp_path)
    for step in (10, 20, 30, 40):
        save(run, step, contents(step), keep=2)
    assert names(run) == ["step_000030", "step_000040"]
    assert hidden(run.folder) == []
    run = begin(tmp_path, name="b")
    for step in (10, 20, 30):
        save(run, step, contents(step), keep=0)
    assert len(names(run)) == 3
    # never the step that was just saved
    save(run, 15, contents(15), keep=1)
    assert "step_000015" in names(run)


def test_a_sound_step_is_not_written_twice_and_a_damaged_one_is_replaced(tmp_path):
    run = begin(tmp_path)
    step = save(run, 10, contents(1), keep=3)
    before = (step / "meta.json").stat().st_mtime_ns
    save(run, 10, contents(1), keep=3)
    assert (step / "meta.json").stat().st_mtime_ns == before
    (step / "rng.safetensors").unlink()
    save(run, 10, contents(1), keep=3)
    assert_same(load(step, make_layers()), contents(1))
    assert names(run) == ["step_000010"]


# damage


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "emptied": lambda path: os.truncate(path, 0),
    "first byte": lambda path: flip(path, 0),
    "middle byte": lambda path: flip(path, path.stat().st_size // 2),
    "last byte": lambda path: flip(path, -1),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b" "),
    "removed": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", [*FILES, "meta.json"])
def test_damage_is_refused_by_name_and_the_newest_good_step_offered(tmp_path, name, damage):
    run = begin(tmp_path)
    good = save(run, 10, contents(1), keep=0)
    bad = save(run, 20, contents(2), keep=0)
    DAMAGE[damage](bad / name)
    told = (
        f"{re.escape(str(bad / name))} .*newest good save is step_000010: run.resume={re.escape(str(good))}"
    )
    with pytest.raises(MassError, match=told):
        load(run.folder, make_layers())
    with pytest.raises(MassError, match=told):
        begin(tmp_path, "auto")
    with pytest.raises(MassError, match=told):
        step_of(bad)
    assert newest_good(run.folder) == good
    assert step_of(run.folder) == good
    # and the way out that the message offers is one
    run = begin(tmp_path, good)
    assert_same(load(run.start, make_layers()), contents(1))


def test_no_byte_of_meta_can_change_unnoticed(tmp_path):
    step = save(begin(tmp_path), 10, contents(), keep=0)
    path = step / "meta.json"
    whole = path.read_bytes()
    for at in range(0, len(whole), 5):
        flip(path, at)
        assert newest_good(step.parent) is None, whole[at - 10 : at + 10]
        path.write_bytes(whole)
    assert newest_good(step.parent) == step


def test_foreign_folders_are_refused(tmp_path):
    run = begin(tmp_path)
    step = save(run, 10, contents(), keep=0)
    foreign = run.folder / "step_000099"
    foreign.mkdir()
    (foreign / "pytorch_model.bin").touch()
    with pytest.raises(MassError, match="step_000099/meta.json is missing.*newest good save is step_000010"):
        load(run.folder, make_layers())
    (foreign / "meta.json").write_text('{"step": 99}')
    with pytest.raises(MassError, match="step_000099/meta.json is damaged or not of this project"):
        load(run.folder, make_layers())
    shutil.rmtree(foreign)
    shutil.copytree(step, run.folder / "step_000030")
    with pytest.raises(MassError, match="meta.json belongs to step 10: the folder was renamed"):
        load(run.folder, make_layers())
    shutil.rmtree(step)
    with pytest.raises(MassError, match="has no good save: choose another run.name"):
        load(run.folder, make_layers())


def test_a_step_that_its_run_has_dropped_meanwhile_is_named(tmp_path, monkeypatch):
    """A run goes on while another process loads a model for one of its steps: before it looks at the files, or just then."""
    run = begin(tmp_path)
    step = save(run, 10, contents(), keep=1)

    def drop(*args):
        save(run, 20, contents(), keep=1)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "verify", drop)
        with pytest.raises(MassError, match="step_000010 has gone since it was chosen.*same call again"):
            load(step, make_layers())
    with pytest.raises(MassError, match="step_000010 has gone since it was chosen"):
        load(step, make_layers())
    assert load(run.folder, make_layers()).meta["step"] == 20


def test_another_base_is_refused(tmp_path):
    step = save(begin(tmp_path), 10, contents(), keep=0)
    with pytest.raises(MassError, match="another base model"):
        load(step, make_layers(width=7))
    with pytest.raises(MassError, match="another base model: tiny:llama. Set model.path"):
        load(step, make_layers(), fingerprint="other")


def test_step_of_wants_a_run_with_a_save(tmp_path):
    with pytest.raises(MassError, match="is not a run folder"):
        step_of(tmp_path)
    run = begin(tmp_path)
    with pytest.raises(MassError, match="no complete and undamaged save"):
        step_of(run.folder)
    step = save(run, 10, contents(), keep=0)
    assert step_of(step) == step


def test_fingerprint_knows_the_model_and_not_its_dtype():
    model = nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 3)).to(torch.bfloat16)
    one = fingerprint(model.named_parameters())
    assert fingerprint(model.float().named_parameters()) == one
    assert fingerprint(reversed(list(model.named_parameters()))) == one
    with torch.no_grad():
        model[1].weight[0, 0] += 1
    assert fingerprint(model.named_parameters()) != one
