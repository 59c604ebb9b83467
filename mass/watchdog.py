"""No rank waits for ever: a thread of each rank tells the others where it is, and ends the run when one stalls.

Nothing in the code has to report its progress. The thread looks at the main thread's stack every beat: it has moved, or
the process has used the processor, or the rank stands still. A rank whose main thread is inside
torch.distributed, or waits for a part of a sharded base, waits for the others. All this goes through a key-value store of its own (TCPStore on rank 0), so that it
works while the ranks hang in a collective. Four things end the run, each named with rank and place:

- a rank from which nothing comes: killed, stopped, or its machine is gone (after `GONE` seconds)
- a rank that stands still outside any collective while its peers live (after `STILL` seconds; where it waits for another
  process or for the disk, `WAITS`, after the recipe's `run.patience`)
- all ranks inside collectives and none moving: they are not the same collectives (after `STILL` seconds)
- a rank that computes on while another waits for it (after the recipe's `run.patience` seconds)
"""

import contextlib
import json
import math
import os
import platform
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed as dist

from mass.errors import MassError

# Seconds. A reason is told within a minute: a beat, the longer of these, and the launcher's own second.
BEAT, GONE, STILL, GRACE = 0.5, 20.0, 40.0, 4.0
# of one processor, over a beat: less is standing still
BUSY = 0.2
# what may take longer without this process running: the verifier's worker (which has time limits of its own), vLLM's engine, a
# compiler, the disk
WAITS = {
    ("rewards.py", "_ask"),
    ("vllm_engine.py", "engine_of"),
    ("decode.py", "_compiled"),
    ("rowkernel.py", "library"),
    ("stepfolder.py", "write"),
    ("log.py", "write_atomic"),
    ("checkpoint.py", "save"),
    ("log.py", "scalars"),
    ("log.py", "samples"),
    ("log.py", "close"),
}
_HERE = str(Path(__file__).parent)


@dataclass
class Peer:
    """What a rank has said of itself, and when (this process's clock)."""

    where: str = "starting"
    waits: bool = False
    still: float = 0.0
    # how long it may stand still
    may: float = STILL
    waited: float = 0.0
    host: str = "of unknown place"
    left: str = ""
    beat: int = -1
    heard: float = field(default_factory=time.monotonic)


class Watchdog:
    """The thread of this rank. `armed` is set once the loop runs: before, files and downloads may take their time."""

    def __init__(self, rank: int, size: int, patience: float) -> None:
        """Collective: every rank makes its own at the same place. In a run of one process nothing is watched."""
        self.rank, self.size, self.patience = rank, size, patience
        self.armed = False
        self.peers = [Peer() for _ in range(size)]
        self._main = threading.main_thread().ident
        self._answered = time.monotonic()
        self._over = threading.Event()
        if size == 1:
            return
        address = os.environ["MASTER_ADDR"]
        wait = timedelta(seconds=GONE)
        port: list[Any] = [None]
        if rank == 0:
            self._store = dist.TCPStore(
                address, 0, is_master=True, wait_for_workers=False, timeout=wait, multi_tenant=True
            )
            port[0] = self._store.port
        dist.broadcast_object_list(port)
        if rank != 0:
            self._store = dist.TCPStore(address, port[0], is_master=False, timeout=wait)
        for work in (self._talk, self._judge):
            threading.Thread(target=work, name=f"watchdog{work.__name__}", daemon=True).start()

    def close(self, last_words: str = "") -> None:
        """Stop watching; without last words at the same place on every rank. With them: why this rank leaves the others,
        which end with that reason."""
        if self.size == 1:
            return
        if not last_words:
            dist.barrier()
        self._over.set()
        if last_words:
            with contextlib.suppress(RuntimeError):  # rank 0 went first, and its store with it
                self._store.set(f"left {self.rank}", json.dumps(last_words))
            if self.rank == 0:
                # the store goes with this process: let the others read it
                time.sleep(4 * BEAT)
            else:
                self._let_rank_0_tell()

    def _let_rank_0_tell(self) -> None:
        """A launcher ends all ranks as soon as one leaves, and rank 0 alone speaks: it has the time to say why this one goes, or
        to leave by the same mistake."""
        # it hears of this, waits, says it, and lets the others say so
        end = time.monotonic() + GRACE + 10 * BEAT
        with contextlib.suppress(RuntimeError):  # it has gone
            while time.monotonic() < end and not self._store.check(["left 0"]):
                time.sleep(BEAT)

    def explain(self) -> str | None:
        """After a collective failed: why a peer is not there any more, or None when all are. Takes up to `GONE` seconds."""
        end = time.monotonic() + GONE + 4 * BEAT
        while self.size > 1 and time.monotonic() < end:
            found = self._gone()
            if found:
                return found
            time.sleep(BEAT)
        return None

    def _frame(self) -> FrameType | None:
        return sys._current_frames().get(self._main or 0)

    def _talk(self) -> None:
        """Say where this rank is, hear where the others are. Apart from `_judge`: a store whose rank is stopped blocks."""
        beat, before, used, had = 0, _stack(self._frame()), time.process_time(), 0.0
        still = waited = time.monotonic()
        while not self._over.is_set():
            now, stack, busy = time.monotonic(), _stack(self._frame()), time.process_time()
            where, waits, got, elsewhere = _place(self._frame(), had)
            moved = stack != before or got != had
            if moved or (busy - used > BUSY * BEAT and not waits) or not self.armed:
                still = now
            if not waits or got != had or not self.armed:
                waited = now
            before, used, had, beat = stack, busy, got, beat + 1
            mine = {
                "where": where,
                "waits": waits,
                "still": now - still,
                "may": max(STILL, self.patience) if elsewhere else STILL,
                "waited": now - waited,
                "beat": beat,
            }
            host = f"process {os.getpid()} on {platform.node()}"
            try:
                self._store.set(f"at {self.rank}", json.dumps(mine | {"host": host}))
                for rank, peer in enumerate(self.peers):
                    self._hear(rank, peer)
                self._answered = time.monotonic()
            except RuntimeError:
                # the store went with rank 0's process; where that is only stopped, the call above does not return
                self._answered = -math.inf
            self._over.wait(BEAT)

    def _hear(self, rank: int, peer: Peer) -> None:
        if self._store.check([f"at {rank}"]):
            said = json.loads(self._store.get(f"at {rank}"))
            if said["beat"] != peer.beat:
                vars(peer).update(said, heard=time.monotonic())
        if not peer.left and self._store.check([f"left {rank}"]):
            peer.left, peer.heard = json.loads(self._store.get(f"left {rank}")), time.monotonic()

    def _judge(self) -> None:
        while not self._over.wait(BEAT):
            reason = self._gone() or (self._stalled() if self.armed else None)
            if reason and not self._over.is_set():
                say(self.rank, reason)
                if self.rank == 0:
                    # the store goes with this process: the others have the time to find the same
                    time.sleep(4 * BEAT)
                # no orderly end: the main thread hangs
                os._exit(3)

    def _gone(self) -> str | None:
        now = time.monotonic()
        others = [(rank, peer) for rank, peer in enumerate(self.peers) if rank != self.rank]
        for rank, peer in others:
            # an error of all ranks ends each by itself
            if peer.left and now - peer.heard > GRACE:
                return f"rank {rank} ({peer.host}) left: {peer.left}"
        if now - self._answered > GONE:
            # at rank 0 itself it is this machine that was away
            others = [(0, self.peers[0])] if self.rank != 0 else []
        for rank, peer in others:
            if now - peer.heard > GONE and not peer.left or rank == 0 and now - self._answered > GONE:
                if peer.left:
                    # rank 0 said why, and took the store with it
                    return f"rank {rank} ({peer.host}) left: {peer.left}"
                return f"rank {rank} ({peer.host}) is gone or stopped, last seen in {peer.where}"
        return None

    def _stalled(self) -> str | None:
        here = [(rank, peer) for rank, peer in enumerate(self.peers) if not peer.left]
        for rank, peer in here:
            if not peer.waits and peer.still > peer.may:
                return f"rank {rank} ({peer.host}) has stood still for {peer.still:.0f} s in {peer.where}"
        if all(peer.waits and peer.still > STILL for _, peer in here):
            places = "; ".join(f"rank {rank}: {peer.where}" for rank, peer in here)
            return f"all ranks wait for each other and none moves ({places})"
        longest = max((peer.waited for _, peer in here), default=0.0)
        late = [(rank, peer) for rank, peer in here if not peer.waits]
        if late and longest > self.patience:
            rank, peer = late[0]
            return (
                f"rank {rank} ({peer.host}) computes in {peer.where} while others have waited {longest:.0f} s for it "
                f"(run.patience={self.patience:g})"
            )
        return None


@contextlib.contextmanager
def watching(rank: int, size: int, patience: float) -> Iterator[Watchdog]:
    """A watchdog for as long as the block runs. What ends the block on one rank is told to the others."""
    watch = Watchdog(rank, size, patience)
    try:
        yield watch
    except MassError as error:
        watch.close(str(error))
        raise
    except BaseException as error:
        if size == 1:
            raise
        if isinstance(error, KeyboardInterrupt):
            watch.close("interrupted")
            os._exit(130)
        # a collective fails at once where a peer has died; which and why is what a reader wants to know
        reason = watch.explain() if isinstance(error, RuntimeError) else None
        if reason is None:
            traceback.print_exc()
            watch.close(f"{type(error).__name__}: {' '.join(str(error).split())[:500]}")
        else:
            say(rank, reason)
        # peers may wait in a collective that this rank will never join: no orderly farewell
        os._exit(1 if reason is None else 3)
    watch.close()


def say(rank: int, reason: str) -> None:
    """One line on standard error, whole even when all ranks speak at once."""
    line = f"mass-train: rank {rank} ends the run: {reason}. What was saved is safe: run.resume=auto continues.\n"
    os.write(2, line.encode())


def _stack(frame: FrameType | None) -> list[tuple[int, int]]:
    """Changes as soon as the thread runs Python."""
    out = []
    while frame is not None:
        out.append((id(frame), frame.f_lasti))
        frame = frame.f_back
    return out


def _place(frame: FrameType | None, had: float) -> tuple[str, bool, float, bool]:
    """(innermost function of this package with file and line, whether it waits for other ranks, `Shards.waited` where it does
    so for a part of the base, else `had`, whether it is one of `WAITS`).

    A wait for a part is a C++ call right under `Shards._turn`. One looks like the next, whose frames may lie where those of
    the last lay: `Shards.waited`, which grows with each part that came, tells them apart.
    """
    waits, got, elsewhere = False, had, False
    names: list[str] = []
    while frame is not None:
        code = frame.f_code
        waits |= code.co_filename.endswith("distributed_c10d.py")
        if code.co_filename.startswith(_HERE):
            names.append(f"{code.co_name} ({Path(code.co_filename).name}:{frame.f_lineno})")
            elsewhere |= (Path(code.co_filename).name, code.co_name) in WAITS
            if code.co_name in ("_turn", "settle") and code.co_filename.endswith("shards.py"):
                waits, got = True, frame.f_locals["self"].waited
        frame = frame.f_back
    return (" < ".join(names[:3]) or "the interpreter"), waits, got, elsewhere
