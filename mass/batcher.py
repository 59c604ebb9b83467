"""Problems that arrive one by one and adapt together: a queue, and the one thread that owns the model.

The oldest problem waits a moment (`window`) for others of its kind; then up to T of them go through `mass.methods.solve`
at once. A problem whose asker has left, or whose time is over, is taken out of the queue; a batch that nobody waits for
any more stops at its next forward pass.
"""

import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from mass.choices import Kit, shots_for
from mass.methods import Record, solve
from mass.problems import Problem

_log = logging.getLogger(__name__)


class Full(Exception):
    """The queue takes no more problems."""


class Closed(Exception):
    """The queue takes no problems any more."""


class _Left(BaseException):
    """Nobody waits for this batch. No Exception: what a method catches of its own must not swallow it."""


@dataclass(frozen=True)
class Done:
    """A record, the tokens of its solve prompt, seconds in the queue and at work, and the problems in its batch."""

    record: Record
    prompt_tokens: int
    waited: float
    worked: float
    together: int


@dataclass(eq=False)
class Job:
    """A problem in the queue. `max_tokens` bounds its answer; `until` is on the clock of time.monotonic."""

    problem: Problem
    method: str
    max_tokens: int
    until: float
    since: float = field(default_factory=time.monotonic)
    left: bool = False
    result: "Future[Done]" = field(default_factory=Future)

    @property
    def wanted(self) -> bool:
        return not self.left and time.monotonic() < self.until

    @property
    def kind(self) -> tuple[str, int]:
        """What must be alike in a batch."""
        return self.method, self.max_tokens


class Batcher:
    """See the top of this file. `submit`, `leave`, `waiting` and `close` may be called from any thread."""

    def __init__(self, kit: Kit, *, batch: int, window: float, queue: int, threads: int) -> None:
        """`batch`: T; `window`: seconds; `queue`: problems that may wait; `threads` of torch."""
        self.kit, self.batch, self.window, self.limit = kit, batch, window, queue
        self._waiting: list[Job] = []
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, args=(threads,), name="mass-model", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Problems in the queue."""
        return len(self._waiting)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._closed

    def submit(self, job: Job) -> None:
        """Put a problem into the queue. Raises Full or Closed."""
        with self._changed:
            if not self.alive:
                raise Closed
            if len(self._waiting) >= self.limit:
                raise Full
            self._waiting.append(job)
            self._changed.notify()

    def leave(self, job: Job) -> None:
        """Nobody waits for this job any more."""
        with self._changed:
            job.left = True
            if job in self._waiting:
                self._waiting.remove(job)
                job.result.cancel()

    def close(self) -> None:
        """Give back what waits (Closed), stop the batch at work, and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _work(self, threads: int) -> None:
        # OpenMP's count is each thread's own
        torch.set_num_threads(threads)
        while jobs := self._next():
            self._solve(jobs)
        with self._changed:
            rest, self._waiting = self._waiting, []
        for job in rest:
            if job.result.set_running_or_notify_cancel():
                job.result.set_exception(Closed())

    def _next(self) -> list[Job]:
        """The oldest job and others of its kind, after the window; nothing when closed."""
        with self._changed:
            while True:
                for job in [job for job in self._waiting if not job.wanted]:
                    self._waiting.remove(job)
                    job.result.cancel()
                if self._closed:
                    return []
                alike = [job for job in self._waiting if job.kind == self._waiting[0].kind][: self.batch]
                rest = alike[0].since + self.window - time.monotonic() if alike else None
                if rest is not None and (rest <= 0 or len(alike) == self.batch):
                    self._waiting = [job for job in self._waiting if job not in alike]
                    # from here on none can be cancelled
                    if taken := [job for job in alike if job.result.set_running_or_notify_cancel()]:
                        return taken
                    continue
                self._changed.wait(rest)

    def _solve(self, jobs: Sequence[Job]) -> None:
        begin = time.monotonic()
        method, max_tokens = jobs[0].kind
        kit = replace(self.kit, answering=replace(self.kit.answering, max_new_tokens=max_tokens))

        def check(*_: Any) -> None:
            if self._closed or not any(job.wanted for job in jobs):
                raise _Left

        # every forward pass, of whatever kind, begins with the tokens' embedding
        embedding: Any = kit.lm.hf.get_input_embeddings()
        handle = embedding.register_forward_pre_hook(check)
        try:
            records = solve(kit, [job.problem for job in jobs], method, baselines=False)
            sizes = [
                # one with an error may have no prompt
                len(kit.prompts.solve(j.problem.text, shots_for(kit, j.problem).solve))
                if r.error is None
                else 0
                for j, r in zip(jobs, records, strict=True)
            ]
        except _Left:
            for job in jobs:
                job.result.set_exception(Closed() if self._closed else TimeoutError())
            return
        except Exception as error:  # whatever it is, the thread has to go on
            handle.remove()
            if len(jobs) > 1:
                _log.warning("a batch of %d failed (%r): its problems one by one", len(jobs), error)
                for job in jobs:
                    self._solve([job])
                return
            _log.exception("a problem failed")
            for job in jobs:
                job.result.set_exception(error)
            return
        finally:
            handle.remove()
        worked = time.monotonic() - begin
        for job, record, size in zip(jobs, records, sizes, strict=True):
            job.result.set_result(Done(record, size, begin - job.since, worked, len(jobs)))
