"""The verifier's worker process (started by `mass.rewards.Verifier`): judges answers with Math-Verify and reasoning-gym.

A process of its own, since they call sympy on what a model wrote: that can hang, eat memory or crash. While it judges, the
plain ways to write a file, start a program or open a connection are barred; it reads what its user can read, and it is no
sandbox against text that means to get out. Where models are not trusted, run mass in a container. No torch here.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import math
import os
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from mass.rewards import Verdict, bare, verdict_of

_WORKER_BYTES = 4 * 2**30  # address space of the worker: 10**10**10 must not take the machine's memory


class _TimeUp(BaseException):
    """Not an Exception: sympy and reasoning-gym catch those."""


def serve() -> None:
    """The worker's loop: pairs (kind, question or None to load) come in, [score, status, reason] goes out."""
    import _posixsubprocess
    import resource
    import subprocess

    pipe, limit = Connection(int(sys.argv[1])), float(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_AS, (_WORKER_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))
    # no file grows by a byte; a limit of processes would take the watchdog's thread, too
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    sys.dont_write_bytecode = True
    logging.disable(logging.CRITICAL)
    signal.signal(signal.SIGALRM, _time_up)
    judging = False
    sys.addaudithook(lambda event, args: _forbid(event, args) if judging else None)
    fork_exec = _posixsubprocess.fork_exec

    def start(*args: Any) -> int:
        # what subprocess and multiprocessing start programs by raises no audit event of its own
        if judging:
            _forbid("subprocess.fork_exec", args)
        return fork_exec(*args)

    _posixsubprocess.fork_exec = subprocess._fork_exec = start  # type: ignore
    sink = open(os.devnull, "w")
    judges: dict[str, Callable[..., float]] = {}
    while True:
        try:
            kind, question = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            if question is None:
                judges[kind] = {"math": _load_math, "gym": _load_gym}[kind]()
                verdict = Verdict(math.nan, "loaded")
            else:
                # The alarm stops Python code. The watchdog is a C thread that ends the process, for code that never
                # returns to Python (a power of two large integers): it also works when the caller is long gone.
                faulthandler.dump_traceback_later(limit + 1.0, exit=True, file=sink)
                signal.setitimer(signal.ITIMER_REAL, limit)
                judging = True
                verdict = verdict_of(judges[kind](*question))
        except ImportError as error:
            verdict = Verdict(
                math.nan, "failed" if question else "missing", f"{type(error).__name__}: {error}"
            )
        except _TimeUp:
            verdict = Verdict(math.nan, "timeout", f"no verdict within {limit:g} s")
        except Exception as error:
            verdict = Verdict(math.nan, "failed", f"{type(error).__name__}: {str(error)[:200]}")
        finally:
            judging = False
            signal.setitimer(signal.ITIMER_REAL, 0)
            faulthandler.cancel_dump_traceback_later()
        pipe.send_bytes(json.dumps([verdict.score, verdict.status, verdict.reason]).encode())


def _time_up(*_: object) -> None:
    raise _TimeUp


def _forbid(event: str, args: tuple[Any, ...]) -> None:
    # Some reasoning-gym families (countdown, puzzle24, the integrals) give the answer to sympy.parse_expr, which is
    # eval with the builtins in reach. The plain ways to disk, network and shell are barred, which is what a model's text may
    # stumble on. It is no sandbox: who means to get out does (the true fork_exec is in reach, some C code asks no hook).
    if event == "open":
        if not (isinstance(args[2], int) and args[2] & _WRITING):
            return
    elif not event.startswith(_FORBIDDEN) or event in ("os.listdir", "os.scandir", "os.walk"):
        return
    raise PermissionError(f"{event} is not allowed while an answer is judged")


# a file that is opened to be read can be emptied by it
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_FORBIDDEN = (
    "os.",
    "subprocess.",
    "socket.",
    "shutil.",
    "ctypes.",
    "pty.",
    "urllib.",
    "signal.",
    "webbrowser.",
    "sqlite3.",
    "resource.",
)


def _load_math() -> Callable[..., float]:
    from math_verify import parse, verify

    def parsed(answer: str) -> list[Any]:
        # Math-Verify looks for LaTeX between delimiters; a bare \frac{1}{2} would be read as the number 1.
        return parse(f"\\boxed{{{bare(answer)}}}", parsing_timeout=None, raise_on_error=True)

    def judge(gold: str, answer: str) -> float:
        wanted = parsed(gold)
        if not wanted:
            raise ValueError(f"Math-Verify cannot read the reference answer {gold[:80]!r}")
        return float(verify(wanted, parsed(answer), timeout_seconds=None, raise_on_error=True))

    judge(
        "\\frac{1}{2}", "0.5"
    )  # builds the LaTeX parser and finds a missing antlr now, outside the time limit
    return judge


def _load_gym() -> Callable[..., float]:
    import reasoning_gym

    datasets: dict[str, Any] = {}

    def judge(name: str, entry: dict[str, Any] | None, answers: list[str]) -> float:
        if entry is None:
            raise ValueError(f"a task of {name!r} carries no reasoning-gym entry")
        settings = entry.get("settings", {})
        key = json.dumps([name, settings], sort_keys=True, default=str)
        if key not in datasets:
            datasets[key] = reasoning_gym.create_dataset(name, **settings)
        return max(float(datasets[key].score_answer(answer, entry)) for answer in answers)

    return judge
