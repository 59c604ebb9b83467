"""Runs a function in W fresh processes joined as ranks, without paying the import of torch and DeepSpeed each time.

`with Ranks() as ranks: done = ranks("mass.console:train", [argv], world=2)`. One helper process imports `mass.train` and what a
run imports later, loads the code that `mass.rowkernel` compiles, and forks the ranks, which find RANK, WORLD_SIZE and the like in their
environment as under any launcher. Nothing of torch runs in the helper before it forks, and no compiled loop.
"""

import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def clean_environment() -> dict[str, str]:
    """This process's environment without what a launcher (or a test before) put into it; on CPU, one thread."""
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT", "CROSS_RANK")
    env = {key: value for key, value in os.environ.items() if key not in launcher}
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), *filter(None, [env.get("PYTHONPATH")])])
    return env | {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": path,
        "COLUMNS": "200",
        "HF_HUB_OFFLINE": "1",
    }


@dataclass(frozen=True)
class Done:
    """What each rank left: exit code (negative: the signal that ended it), standard output, standard error."""

    codes: list[int]
    out: list[str]
    err: list[str]

    def good(self) -> "Done":
        assert not any(self.codes), "\n".join([str(self.codes), *(x[-3000:] for x in [*self.out, *self.err])])
        return self


class Ranks:
    """The helper process, seen from the test."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=clean_environment(),
            cwd=ROOT,
            text=True,
        )

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(30)
        self.process.stdout.close()

    def __call__(
        self, target: str, *arguments: Any, world: int = 1, limit: float = 250, grace: float = 250
    ) -> Done:
        """Call `target` ("module:function") on every rank. What has not ended after `limit` seconds is killed, and so is what
        has not `grace` seconds after a rank has failed, as under a launcher."""
        assert self.process.stdin is not None and self.process.stdout is not None
        with tempfile.TemporaryDirectory() as folder:
            print(
                json.dumps([target, arguments, world, limit, grace, folder]),
                file=self.process.stdin,
                flush=True,
            )
            line = self.process.stdout.readline()
            assert line, "the helper process died"
            out, err = (
                [Path(folder, f"{kind}{rank}").read_text(errors="replace") for rank in range(world)]
                for kind in ("out", "err")
            )
        return Done(json.loads(line), out, err)


def _serve() -> None:
    import deepspeed  # noqa: F401
    import peft  # noqa: F401
    import pytest  # noqa: F401
    import setuptools  # noqa: F401
    import torch.utils.tensorboard  # noqa: F401
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    import mass.command
    import mass.console
    import mass.evaluate
    import mass.train  # noqa: F401
    from mass import rowkernel

    # Both are kept from then on, in every rank: a compiled library, and a thousand patterns of names of weights.
    rowkernel.library()
    get_checkpoint_conversion_mapping("llama")
    # A collector that looks at all that was imported copies its memory, in each rank and above all at its end: that is 2 of
    # the 5 seconds of CPU time of a short run.
    gc.collect()
    gc.freeze()

    for line in sys.stdin:
        target, arguments, world, limit, grace, folder = json.loads(line)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        pids = []
        for rank in range(world):
            pid = os.fork()
            if pid == 0:
                _become(rank, world, port, Path(folder))
                module, _, name = target.partition(":")
                getattr(importlib.import_module(module), name)(*arguments)
                return
            pids.append(pid)
        print(json.dumps(_wait(pids, limit, grace)), flush=True)


def _become(rank: int, world: int, port: int, folder: Path) -> None:
    """Turn a fork into a rank: its own input and outputs, a process group, and the launcher's variables."""
    os.setpgid(0, 0)
    for number, name, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, folder / f"out{rank}", 0),
        (2, folder / f"err{rank}", 0),
    ):
        handle = os.open(name, flags or os.O_WRONLY | os.O_CREAT)
        os.dup2(handle, number)
    if world > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def _wait(pids: list[int], limit: float, grace: float) -> list[int]:
    """Exit codes. A forked child is waited for by a descriptor, so that the limit needs no alarm."""
    end = time.monotonic() + limit
    handles = {os.pidfd_open(pid): pid for pid in pids}
    codes = {}
    while handles:
        ready, _, _ = select.select(list(handles), [], [], max(0.0, end - time.monotonic()))
        if not ready:
            for pid in handles.values():
                os.kill(pid, signal.SIGKILL)
            end += 60
        for handle in ready:
            pid = handles.pop(handle)
            os.close(handle)
            codes[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            if codes[pid]:
                end = min(end, time.monotonic() + grace)
    return [codes[pid] for pid in pids]


if __name__ == "__main__":
    _serve()
