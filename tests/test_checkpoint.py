"""Run folders: a save is complete or absent, what is read is what was written, no run overwrites another."""

import errno
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import mass
from mass import checkpoint
from mass.checkpoint import (
    FILES,
    Contents,
    Run,
    fingerprint,
    latest,
    load,
    newest_good,
    open_run,
    read_run,
    save,
    steps,
)
from mass.errors import MassError
from mass.lora import Layers, LoraLinear, LoraShape, fresh

RECIPE = "run: {name: a, folder: f, resume: 'no', seed: 0}\nmodel: {path: m}\nlora: {rank: 2, targets: [all-linear]}\nouter: {steps: 10}\n"
SHAPE = LoraShape(2, 4.0, ("all-linear",))


def make_layers(width: int = 6) -> Layers:
    names = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj")
    return {name: LoraLinear(nn.Linear(width, 8), SHAPE.scale) for name in names}


def contents(seed: int = 0, ranks: int = 2, size: int = 5) -> Contents:
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    moment = noise(size, 3)
    policy = {key: noise(*x.shape) for key, x in fresh(make_layers(), 2, generator).items()}
    return Contents(
        policy=policy,
        shape=SHAPE,
        base_name="tiny:llama",
        scorer={"net.0.weight": noise(4, 3), "net.0.bias": torch.tensor([float("nan"), -0.0, 1e-45])},
        # two names for one memory, a transposed view, a scalar, an empty one
        optimizer={
            "m:a": moment,
            "v:a": moment,
            "t": moment.T,
            "step": torch.tensor(seed, dtype=torch.int64),
            "empty": torch.zeros(0, 2),
        },
        rng=[
            torch.randint(256, (40 + rank,), generator=generator, dtype=torch.uint8) for rank in range(ranks)
        ],
        meta={
            "cursor": {"epoch": seed, "order": [3, 1, 2]},
            "counters": {"skipped": 0},
            "fingerprint": "f00",
        },
    )


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, NaN and the sign of zero included."""
    return (
        a.dtype == b.dtype and a.shape == b.shape and a.contiguous().numpy().tobytes() == b.numpy().tobytes()
    )


def assert_same(got: Contents, want: Contents) -> None:
    for name in ("policy", "scorer", "optimizer"):
        mine, theirs = getattr(got, name), getattr(want, name)
        assert mine.keys() == theirs.keys()
        assert all(same(theirs[key], mine[key]) for key in mine), name
    assert len(got.rng) == len(want.rng)
    assert all(same(a, b) for a, b in zip(want.rng, got.rng, strict=True))
    assert (got.shape, got.base_name) == (want.shape, want.base_name)
    assert got.meta | want.meta == got.meta


def begin(tmp_path: Path, resume: str | Path = "no", recipe: str = RECIPE, name: str = "a") -> Run:
    return open_run(tmp_path, name, recipe, resume)


def names(run: Run) -> list[str]:
    return [step.name for step in steps(run.folder)]


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.glob(".*") if path.name != ".lock"]


# writing and reading


def test_round_trip_is_bitwise(tmp_path):
    run = begin(tmp_path)
    # over ten ranks, so that the order of the names is put to the test
    want = contents(7, ranks=12)
    step = save(run, 10, want, keep=3)
    assert step == run.folder / "step_000010"
    assert_same(load(run.folder, make_layers()), want)
    assert_same(load(step, make_layers(), fingerprint="f00"), want)


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


# opening


def test_an_existing_run_is_never_overwritten(tmp_path):
    run = begin(tmp_path)
    assert (run.start, run.changed) == (None, ())
    begin(tmp_path)  # nothing in it yet
    (run.folder / "log.jsonl").touch()
    begin(tmp_path)  # a run that died before its first line
    (run.folder / "log.jsonl").write_text("{}\n")
    with pytest.raises(
        MassError, match=r"run .*/a exists: run.resume=auto continues it, or choose another run.name"
    ):
        begin(tmp_path)
    (run.folder / "log.jsonl").unlink()
    save(run, 10, contents(), keep=3)
    with pytest.raises(MassError, match="exists"):
        begin(tmp_path)
    assert_same(load(run.folder, make_layers()), contents())


def test_auto_starts_or_continues(tmp_path):
    run = begin(tmp_path, "auto")
    assert run.start is None
    save(run, 10, contents(), keep=3)
    save(run, 20, contents(), keep=3)
    # a kill between the rename and the pointer
    (run.folder / "latest").write_text("step_000010\n")
    run = begin(tmp_path, "auto")
    assert run.start == run.folder / "step_000020" and run.changed == ()
    assert (run.folder / "latest").read_text() == "step_000020\n"


def test_changed_keys_are_listed_and_the_recipe_is_renewed(tmp_path):
    run = begin(tmp_path)
    save(run, 10, contents(), keep=3)
    recipe = RECIPE.replace("steps: 10", "steps: 20, gamma: 0.5").replace("'no'", "auto")
    run = begin(tmp_path, "auto", recipe)
    assert run.changed == ("outer.steps: 10 -> 20", "outer.gamma: absent -> 0.5")
    assert (run.folder / "recipe.yaml").read_text() == recipe


@pytest.mark.parametrize(
    "old, new", [("rank: 2", "rank: 4"), ("path: m", "path: n"), ("[all-linear]", "[q_proj]")]
)
def test_another_network_is_refused(tmp_path, old, new):
    run = begin(tmp_path)
    save(run, 10, contents(), keep=3)
    with pytest.raises(MassError, match=r"another network.*(lora|model)\.\w+: .* -> "):
        begin(tmp_path, "auto", RECIPE.replace(old, new))
    assert (run.folder / "recipe.yaml").read_text() == RECIPE


def test_going_back_sets_later_steps_aside_and_retention_ignores_them(tmp_path):
    run = begin(tmp_path)
    for step in (10, 20, 30):
        save(run, step, contents(step), keep=0)
    run = begin(tmp_path, run.folder / "step_000010")
    assert run.start == run.folder / "step_000010"
    assert [name.partition(".")[0] for name in run.aside] == ["step_000020", "step_000030"]
    assert names(run) == ["step_000010"] and all((run.folder / name).is_dir() for name in run.aside)
    save(run, 20, contents(99), keep=1)
    assert names(run) == ["step_000020"]
    assert_same(load(run.folder, make_layers()), contents(99))


def test_a_step_of_another_run_starts_a_new_one(tmp_path):
    first = begin(tmp_path)
    step = save(first, 10, contents(), keep=3)
    second = begin(tmp_path, step, RECIPE.replace("seed: 0", "seed: 1"), name="b")
    assert second.start == step and second.changed == ("run.seed: 0 -> 1",)
    assert names(first) == ["step_000010"] and names(second) == []
    save(second, 20, contents(), keep=3)
    with pytest.raises(MassError, match="run .*/b exists"):
        begin(tmp_path, step, name="b")


@pytest.mark.parametrize("name", ["", "a/b", "..", ".", "/etc", "step_000010"])
def test_a_name_that_leaves_the_folder_is_refused(tmp_path, name):
    with pytest.raises(MassError, match="run.name"):
        begin(tmp_path, name=name)


def test_bad_places_are_one_sentence(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(MassError, match="run.folder: .*file/a cannot be written"):
        begin(tmp_path / "file")
    with pytest.raises(MassError, match="run.resume=nowhere: there is no such folder"):
        begin(tmp_path, "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(MassError, match="neither a step folder nor a run"):
        begin(tmp_path, tmp_path / "empty")


def test_leftovers_of_a_kill_are_removed(tmp_path):
    run = begin(tmp_path)
    (run.folder / ".step_000010.tmp-123").mkdir()
    (run.folder / ".step_000010.tmp-123" / "x").touch()
    (run.folder / ".latest.tmp-123").touch()
    begin(tmp_path)
    assert hidden(run.folder) == []


def test_a_run_in_use_by_another_process_is_refused(tmp_path):
    run = begin(tmp_path)
    begin(tmp_path, "auto")  # the same process may reopen it
    (run.folder / ".step_000010.tmp-123").mkdir()
    code = (
        "import sys; from mass.checkpoint import open_run; from mass.errors import MassError\n"
        "try: open_run(sys.argv[1], 'a', '', 'auto')\n"
        "except MassError as error: print(error)"
    )
    out = python(code, str(tmp_path)).stdout
    assert f"is in use by process {os.getpid()}" in out
    # what a living process is writing was not taken for a leftover
    assert hidden(run.folder) == [".step_000010.tmp-123"]


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
        read_run(bad)
    assert newest_good(run.folder) == good
    assert read_run(run.folder) == (RECIPE, good)
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


def test_a_later_format_is_refused(tmp_path, monkeypatch):
    run = begin(tmp_path)
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    save(run, 10, contents(), keep=0)
    monkeypatch.undo()
    with pytest.raises(MassError, match="has format 2; this version reads format 1"):
        load(run.folder, make_layers())


def test_another_base_is_refused(tmp_path):
    step = save(begin(tmp_path), 10, contents(), keep=0)
    with pytest.raises(MassError, match="another base model"):
        load(step, make_layers(width=7))
    with pytest.raises(MassError, match="another base model: tiny:llama. Set model.path"):
        load(step, make_layers(), fingerprint="other")


def test_read_run_wants_a_run_with_a_save(tmp_path):
    with pytest.raises(MassError, match="is not a run folder"):
        read_run(tmp_path)
    run = begin(tmp_path)
    with pytest.raises(MassError, match="no complete and undamaged save"):
        read_run(run.folder)
    step = save(run, 10, contents(), keep=0)
    assert read_run(step) == (RECIPE, step)


def test_fingerprint_knows_the_model_and_not_its_dtype():
    model = nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 3)).to(torch.bfloat16)
    one = fingerprint(model.named_parameters())
    assert fingerprint(model.float().named_parameters()) == one
    assert fingerprint(reversed(list(model.named_parameters()))) == one
    with torch.no_grad():
        model[1].weight[0, 0] += 1
    assert fingerprint(model.named_parameters()) != one


# faults while saving


def test_everything_is_on_the_disk_before_the_name_and_the_name_before_the_pointer(tmp_path, monkeypatch):
    run = begin(tmp_path)
    done: list[str] = []
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def short(path: object) -> str:
        return re.sub(r"\.tmp-\d+", "", str(path).removeprefix(f"{run.folder}").lstrip("/"))

    def record(what: str, real, path) -> object:
        return lambda *args: (done.append(f"{what} {short(path(*args))}"), real(*args))

    monkeypatch.setattr(
        os, "fsync", record("sync", fsync, lambda handle: os.readlink(f"/proc/self/fd/{handle}"))
    )
    monkeypatch.setattr(os, "rename", record("name", rename, lambda old, new: new))
    monkeypatch.setattr(os, "replace", record("name", replace, lambda old, new: new))
    save(run, 10, contents(), keep=3)
    beside = [f"sync .step_000010/{name}" for name in (*FILES, "meta.json", "policy")] + ["sync .step_000010"]
    named = done.index("name step_000010")
    assert set(done[:named]) == set(beside)
    assert done[named:] == ["name step_000010", "sync ", "sync .latest", "name latest", "sync "]


def test_a_crash_at_the_rename_leaves_no_step(tmp_path, monkeypatch):
    run = begin(tmp_path)
    save(run, 10, contents(1), keep=3)

    def crash(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", crash)
    with pytest.raises(KeyboardInterrupt):
        save(run, 20, contents(2), keep=3)
    monkeypatch.undo()
    assert names(run) == ["step_000010"]
    run = begin(tmp_path, "auto")
    assert hidden(run.folder) == []
    assert_same(load(run.start, make_layers()), contents(1))


@pytest.mark.parametrize("code, what", [(errno.ENOSPC, "no space left"), (errno.EIO, "the disk failed")])
@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_failing_disk_keeps_earlier_saves(tmp_path, monkeypatch, call, code, what):
    run = begin(tmp_path)
    save(run, 10, contents(1), keep=1)

    def fail(*args):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, call, fail)
    told = f"{what} while saving step_000020 in .*: step_000010 and earlier saves are safe.*run.resume=auto"
    with pytest.raises(MassError, match=told):
        save(run, 20, contents(2), keep=1)
    monkeypatch.undo()
    assert names(run) == ["step_000010"] and hidden(run.folder) == []
    save(run, 20, contents(2), keep=1)
    assert_same(load(run.folder, make_layers()), contents(2))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 512 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", place], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a file system needs root")
    yield place
    # lazily, since this process holds the lock in it
    subprocess.run(["umount", "-l", place], check=True)


# too full for the policy, for the optimizer, for the last small file
@pytest.mark.parametrize("free", [1, 60, 320])
def test_a_full_disk_keeps_earlier_saves(small_disk, free):
    run = begin(small_disk)
    save(run, 10, contents(1), keep=3)
    room = shutil.disk_usage(small_disk).free
    (small_disk / "filler").write_bytes(bytes(room - free * 1024))
    with pytest.raises(
        MassError, match="no space left while saving step_000020 in .*step_000010 and earlier"
    ):
        save(run, 20, contents(2, size=30_000), keep=3)
    assert names(run) == ["step_000010"] and hidden(run.folder) == []
    assert (run.folder / "latest").read_text() == "step_000010\n"
    (small_disk / "filler").unlink()
    run = begin(small_disk, "auto")
    assert_same(load(run.start, make_layers()), contents(1))
    save(run, 20, contents(2), keep=3)


KILLED = """
import os, shutil, signal, sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from test_checkpoint import RECIPE, contents, make_layers
from mass.checkpoint import load, open_run, save, steps

place = Path(sys.argv[1])

def child(run, n):
    count = 0
    def deadly(real):
        def call(*args, **kwargs):
            nonlocal count
            if count == n:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
            return real(*args, **kwargs)
        return call
    for module, name in ((os, "fsync"), (os, "rename"), (os, "replace"), (os, "unlink"), (os, "rmdir")):
        setattr(module, name, deadly(getattr(module, name)))
    save(run, 20, contents(2), keep=1)
    os._exit(0)

for n in range(1000):
    run = open_run(place, f"run{n}", RECIPE, "no")
    save(run, 10, contents(1), keep=1)
    pid = os.fork()
    if pid == 0:
        child(run, n)
    _, status = os.waitpid(pid, 0)
    if os.WIFEXITED(status):
        assert os.WEXITSTATUS(status) == 0
        break
    print(*(step.name for step in steps(run.folder)))
"""


@pytest.mark.slow
@pytest.mark.multiprocess
def test_kill_9_at_every_point_of_a_save_leaves_whole_steps_only(tmp_path):
    out = python(KILLED, str(tmp_path), str(Path(__file__).parent)).stdout.splitlines()
    assert len(out) > 15
    # before the rename, after it, and after the old step went: all three were seen
    assert {tuple(line.split()) for line in out} == {
        ("step_000010",),
        ("step_000010", "step_000020"),
        ("step_000020",),
    }
    for n in range(len(out)):
        run = open_run(tmp_path, f"run{n}", RECIPE, "auto")
        assert hidden(run.folder) == []
        for step in steps(run.folder):
            assert_same(load(step, make_layers()), contents(int(step.name[-2])))
        save(run, 30, contents(3), keep=1)
        assert latest(run.folder) == run.folder / "step_000030" and len(names(run)) == 1


def python(code: str, *arguments: str) -> subprocess.CompletedProcess:
    paths = os.pathsep.join([str(Path(mass.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done
