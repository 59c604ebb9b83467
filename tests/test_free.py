"""Memory that can still be had, where control groups of either version limit it."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mass import free


def group(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True)
    for name, value in files.items():
        (folder / name.replace("_", ".", 1)).write_text(f"{value}\n")


def test_the_tightest_limit_above_a_process_counts(tmp_path: Path) -> None:
    """Version 2: a batch system limits the job, and its steps have no limit of their own."""
    root, own = tmp_path / "cgroup", tmp_path / "own"
    group(root)
    group(
        root / "job", memory_max=1000, memory_current=700, memory_stat="anon 400\ninactive_file 250\nslab 1"
    )
    group(root / "job/step", memory_max="max", memory_current=650)
    own.write_text("0::/job/step\n")
    # files that can go at once are no use of memory
    assert free.group_bytes(root, own) == 1000 - 700 + 250
    (root / "job/step/memory.max").write_text("800\n")
    assert free.group_bytes(root, own) == 800 - 650
    (root / "job/step/memory.max").write_text("600\n")
    assert free.group_bytes(root, own) == 0
    own.write_text("0::/elsewhere\n")
    assert free.group_bytes(root, own) == math.inf
    assert free.group_bytes(root, tmp_path / "none") == math.inf


def test_a_container_s_own_group_is_at_the_top(tmp_path: Path) -> None:
    """Version 1, and a path that names what lies outside of the container."""
    root, own = tmp_path / "cgroup", tmp_path / "own"
    stat = "cache 9\ninactive_file 1\ntotal_inactive_file 30\n"
    group(root / "memory")
    for name, text in (("limit_in", 500), ("usage_in", 200)):
        (root / f"memory/memory.{name}_bytes").write_text(f"{text}\n")
    (root / "memory/memory.stat").write_text(stat)
    for path in ("/../../docker/abc", "/docker/abc", "/"):
        own.write_text(f"9:cpu,cpuacct:/x\n4:memory:{path}\n0::/\n")
        assert free.group_bytes(root, own) == 500 - 200 + 30


def test_the_less_of_machine_and_group_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(free.psutil, "virtual_memory", lambda: SimpleNamespace(available=100))
    cpu = torch.device("cpu")
    monkeypatch.setattr(free, "group_bytes", lambda: math.inf)
    assert free.free_bytes(cpu) == (100.0, "free")
    monkeypatch.setattr(free, "group_bytes", lambda: 40.0)
    assert free.free_bytes(cpu) == (40.0, "free in this process's control group")
