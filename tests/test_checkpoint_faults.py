"""A save that is disturbed on its way (a crash, a kill, a disk that is full or fails) is complete or absent."""

import errno
import os
import re
import shutil
import signal

import pytest
from saves import RECIPE, assert_same, begin, contents, hidden, make_layers, names

from mass.checkpoint import Run, latest, load, open_run, save, steps
from mass.errors import MassError
from mass.stepfolder import FILES


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


def killed(place: str) -> None:
    """In a process of its own: for n = 0, 1, ... a save that is killed at its n-th call that changes the disk, and the steps
    that are there then."""
    for n in range(1000):
        run = open_run(place, f"run{n}", RECIPE, "no")
        save(run, 10, contents(1), keep=1)
        pid = os.fork()
        if pid == 0:
            save_until(run, n)
        _, status = os.waitpid(pid, 0)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        print(*(step.name for step in steps(run.folder)))


def save_until(run: Run, n: int) -> None:
    count = 0

    def deadly(real):
        def call(*args, **kwargs):
            nonlocal count
            if count == n:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
            return real(*args, **kwargs)

        return call

    for name in ("fsync", "rename", "replace", "unlink", "rmdir"):
        setattr(os, name, deadly(getattr(os, name)))
    save(run, 20, contents(2), keep=1)
    os._exit(0)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_kill_9_at_every_point_of_a_save_leaves_whole_steps_only(ranks, tmp_path):
    out = ranks("test_checkpoint_faults:killed", str(tmp_path)).good().out[0].splitlines()
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
