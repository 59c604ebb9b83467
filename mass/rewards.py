"""Answers: find one in a text, compare it with the reference, vote among several. No torch here.

`exact` and `numeric` comparisons run in the caller. `math` (Math-Verify) and `gym` (reasoning-gym's own score)
run in a worker process (`mass.judge`): they call sympy on what a model wrote, so they can hang, eat memory or crash, and
Math-Verify's own time limit is `signal.alarm`, which only a main thread may use. The worker is a fresh interpreter
(never a fork: the caller may hold torch threads or a gloo group). A comparison that broke is a `Verdict` with
status "failed" or "timeout" and score nan: something to count, never a zero reward.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import time
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mass.errors import MassError

if TYPE_CHECKING:
    from mass.problems import Task

KINDS = ("exact", "numeric", "math", "gym")
_PACKAGE = {"math": "math_verify", "gym": "reasoning_gym"}
_START_SECONDS = 120.0  # to start the interpreter and import sympy or reasoning-gym on a busy machine

_BOXED = re.compile(r"\\{1,4}boxed\s*\{|\\{1,4}boxed +(?P<bare>[^\s${}\\]+)|\\.|[{}]", re.DOTALL)
_MARKER = re.compile(r"\banswer\b[*_ \t]{0,8}(?:(?P<colon>:)|is\b[ \t]*(?P<says>:?))", re.IGNORECASE)
_HASHES = re.compile(r"^####(?!#)", re.MULTILINE)
_DECIMAL = re.compile(r"(?P<sign>[+-]?)(?P<whole>\d{1,3}(?:,\d{3})+|\d*)(?:\.(?P<part>\d*))?")
_RATIO = re.compile(
    r"(?P<sign>[+-]?)(?:(?P<a>\d+) ?/ ?(?P<b>\d+)|\\[dt]?frac\{(?P<c>-?\d+)\}\{(?P<d>-?\d+)\})"
)
_SCIENTIFIC = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)[eE][+-]?\d{1,3}")
_DELIMITED = re.compile(r"\$\$?([^$]+)\$\$?|\\\((.+)\\\)|\\\[(.+)\\\]", re.DOTALL)
_LAST_NUMBER = re.compile(
    r"(?<![\w.)])[-\u2212]?(?:\\[dt]?frac\{-?\d+\}\{-?\d+\}|(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d{1,3}|/\d+)?)"
)
_MARKERS = (
    100  # how many "Answer:" are tried from the end; without an end, text made of empty ones takes minutes
)
_SCALES = frozenset("dozen hundred thousand million billion trillion and or to".split())


# Finding and writing answers


def find_answer(text: str) -> str | None:
    r"""The final answer that `text` states, as written there, or None.

    In this order, and always the last one that is not empty:
    1. `\boxed{X}` (balanced braces; the inner one of two nested; an unclosed one does not count), or `\boxed X`.
    2. "Answer: X" or "The answer is X", anywhere in a line, any case, with or without Markdown bold. X is the rest of
       the line; after "answer is" it ends with the sentence. Where nothing follows "Answer:" on its line, X is the
       paragraph below it (reasoning-gym has answers of several lines).
    3. a line "#### X" (GSM8K).
    Time is linear in the length of the text.
    """
    for found in (_last_boxed(text), _last_marked(text), _last_hashes(text)):
        if found:
            return found
    return None


def ends_with_number(text: str, gold: str) -> bool | None:
    """Whether the last number in `text` is `gold`, in whatever form it stands there (lm-evaluation-harness' flexible-extract);
    None where `gold` is no number. Time is linear in the length of the text."""
    if number(gold) is None:
        return None
    # LaTeX's thousands: 10{,}000 and 10\\!000
    numbers = _LAST_NUMBER.findall(text.replace("{,}", ",").replace("\\!", ""))
    return bool(numbers) and same_number(numbers[-1].rstrip(","), gold)


def _last_boxed(text: str) -> str:
    # One pass with a stack instead of a scan per \boxed: a megabyte of unclosed ones must not take quadratic time.
    # math-verify has such a function too, but it belongs to an optional extra and joins neighbouring boxes.
    best_start, best, open_braces = -1, "", []
    for token in _BOXED.finditer(text):
        piece = token.group()
        if token["bare"]:
            best_start, best = token.start(), token["bare"]
        elif piece.endswith("{") and piece != "\\{":
            open_braces.append((token.start() if len(piece) > 1 else -1, token.end()))
        elif piece == "}" and open_braces:
            start, inside = open_braces.pop()
            if start > best_start and text[inside : token.start()].strip():
                best_start, best = start, text[inside : token.start()].strip()
    return best


def _last_marked(text: str) -> str:
    for marker in list(_MARKER.finditer(text))[: -_MARKERS - 1 : -1]:
        line = _clean(_line(text, marker.end()))
        if marker["colon"] is None:
            line = _clean(re.split(r"\.(?=\s|$)", line, maxsplit=1)[0])
        elif not line:
            end = text.find("\n", marker.end())
            below = text[end:].lstrip("\n") if end >= 0 else ""
            line = _clean(below.split("\n\n", 1)[0])
        if line:
            return line
    return ""


def _last_hashes(text: str) -> str:
    for marker in list(_HASHES.finditer(text))[: -_MARKERS - 1 : -1]:
        line = _clean(_line(text, marker.end()))
        if line:
            return line
    return ""


def _line(text: str, start: int) -> str:
    end = text.find("\n", start)
    return text[start:] if end < 0 else text[start:end]


def _clean(text: str) -> str:
    """Without the Markdown bold or code marks around an answer."""
    text = text.strip().removeprefix("**").removesuffix("**").strip()
    return text[1:-1].strip() if len(text) > 2 and text[0] == text[-1] == "`" else text


def canonical(answer: str) -> str:
    """One spelling for equal answers: no outer space, no final period, and for a plain decimal number no thousands
    commas, plus sign, or zeros after the last decimal ("1,050.0." gives "1050"). Case, `$` and units stay."""
    answer = unicodedata.normalize("NFC", answer.strip()).removesuffix(".").rstrip()
    match = _DECIMAL.fullmatch(answer.replace("\u2212", "-")) if len(answer) < 400 else None
    if match is None or not (match["whole"] or match["part"]):
        return answer
    whole, part = match["whole"].replace(",", "") or "0", (match["part"] or "").rstrip("0")
    number = f"{whole}.{part}" if part else whole
    return f"-{number}" if match["sign"] == "-" and number.strip("0.") else number


def bare(answer: str) -> str:
    r"""Without the delimiters of a formula that is the whole answer: `$X$`, `$$X$$`, `\(X\)`, `\[X\]`."""
    match = _DELIMITED.fullmatch(answer.strip().removesuffix(".")) if len(answer) < 10_000 else None
    return next(filter(None, match.groups())).strip() if match else answer


def vote(answers: Sequence[str | None]) -> str | None:
    """The commonest answer in canonical form; case is ignored, ties go to the one seen first, None does not vote."""
    counts: dict[str, int] = {}
    spelling: dict[str, str] = {}
    for answer in answers:
        form = canonical(answer) if answer is not None else ""
        if form:
            spelling.setdefault(form.casefold(), form)
            counts[form.casefold()] = counts.get(form.casefold(), 0) + 1
    return spelling[max(counts, key=lambda form: counts[form])] if counts else None


def number(text: str) -> Fraction | None:
    r"""The exact value of a text that is one number: `7`, `-1,250.50`, `.5`, `3/4`, `\frac{3}{4}`, `2e-5`, `$18`,
    `10\%` (read as 10). None for everything else, also for a number with a unit."""
    if len(text) > 400:
        return None
    text = (
        canonical(bare(text))
        .replace("\u2212", "-")
        .replace("{,}", ",")
        .replace("\\!", "")
        .replace("\\$", "$")
    )
    if text.startswith("-$"):
        text = "-" + text[2:]
    text = text.strip("$").removesuffix("%").removesuffix("\\").strip()
    ratio = _RATIO.fullmatch(text)
    if ratio:
        sign = -1 if ratio["sign"] == "-" else 1
        over, under = int(ratio["a"] or ratio["c"]), int(ratio["b"] or ratio["d"])
        return Fraction(sign * over, under) if under else None
    decimal = _DECIMAL.fullmatch(text)
    if decimal and (decimal["whole"] or decimal["part"]):
        return Fraction(canonical(text))
    return Fraction(text) if _SCIENTIFIC.fullmatch(text) else None


def same_number(answer: str, gold: str) -> bool:
    """Whether `answer` states the number `gold`: exactly, or within 1e-6 (absolute for a whole number, else relative).

    A model's wording is given some room: "x = 5" and "3 + 2 = 5" count by what follows the last `=`, and "5 dollars"
    without its unit, unless the unit scales the number or joins another ("5 million", "5 or 6"). Raises ValueError if
    `gold` is no number.
    """
    wanted = number(gold)
    if wanted is None:
        raise ValueError(f"the reference answer {gold[:80]!r} is not a number")
    if len(answer) > 400:
        return False
    before, _, after = bare(answer).rpartition("=")
    if before.endswith(("<", ">", "!", "~")):
        # a bound, or what it is not
        return False
    answer = canonical(after)
    stated = number(answer)
    words = answer.split()
    if stated is None and len(words) > 1 and not _SCALES.intersection(word.casefold() for word in words):
        unit = "".join(words[1:])
        stated = number(words[0]) if unit.isalpha() else None
    tolerance = Fraction(1, 10**6) * (1 if wanted.denominator == 1 else abs(wanted))
    return stated is not None and abs(stated - wanted) <= tolerance


# Verifying


@dataclass(frozen=True)
class Verdict:
    """`score` in [0, 1], or nan where there is none ("failed", "timeout"); `reason` says what failed."""

    score: float
    status: str  # right, wrong, partial, no_answer, failed, timeout
    reason: str = ""


def require(kinds: Iterable[str]) -> None:
    """Raise MassError for a verifier whose optional package is not installed; call it before costly work."""
    for kind in sorted(set(kinds) & set(_PACKAGE)):
        if importlib.util.find_spec(_PACKAGE[kind]) is None:
            raise MassError(
                f"verifier {kind!r} needs the package {_PACKAGE[kind]!r}, which is not installed. "
                f"Install it: pip install 'mass[{kind}]'"
            )


class Verifier:
    """Judges answers against tasks; a context manager that owns one worker process.

    The worker starts with the first answer that needs it, and again after an answer that killed it. `time_limit` is in
    seconds for one answer; imports do not count. The model's text never reaches more than that process. It may use 4 GiB
    and read files; the plain ways to write one, open a connection or start a program are barred while it judges (a gym family
    may evaluate text as code). That is no sandbox against text that means to get out. One caller, one thread.
    """

    def __init__(self, time_limit: float = 10.0):
        self.time_limit = time_limit
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None
        self._loaded: set[str] = set()

    def __enter__(self) -> Verifier:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the worker, if there is one; the next answer would start another."""
        if self._process is not None and self._pipe is not None:
            self._pipe.close()  # the worker reads the end of its input and leaves
            self._process.kill()
            self._process.wait()
        self._process, self._pipe, self._loaded = None, None, set()

    def verify(self, text: str, task: Task) -> Verdict:
        """Judge the answer that `find_answer` sees in `text`. Raises MassError if the package of `task.verifier` is
        missing; everything else that goes wrong is a verdict."""
        if task.verifier not in KINDS:
            raise ValueError(
                f"task {task.problem.id} has verifier {task.verifier!r}; known: {', '.join(KINDS)}"
            )
        require([task.verifier])
        answer = find_answer(text)
        if answer is None:
            return Verdict(0.0, "no_answer")
        if task.verifier == "numeric":
            try:
                return verdict_of(float(same_number(answer, task.answer)))
            except ValueError as error:
                return Verdict(math.nan, "failed", str(error))
        same = canonical(answer).casefold() == canonical(task.answer).casefold()
        if task.verifier == "exact" or (task.verifier == "math" and same):
            return verdict_of(float(same))
        if len(answer) > 2000 + 4 * len(task.answer):
            return Verdict(
                0.0, "wrong"
            )  # a page of text is no answer; reading it would only run into the time limit
        if task.verifier == "math":
            return self._judge("math", (task.answer, answer))
        assert task.verifier == "gym", f"{task.verifier} is one of KINDS"
        return self._judge("gym", (task.source, task.entry, [answer, canonical(answer)]))

    def verify_all(self, items: Sequence[tuple[str, Task]]) -> list[Verdict]:
        """One verdict for each (text, task), in order."""
        return [self.verify(text, task) for text, task in items]

    def _judge(self, kind: str, question: tuple[Any, ...]) -> Verdict:
        self._start()
        if kind not in self._loaded:
            loaded = self._ask((kind, None), _START_SECONDS)
            if loaded.status == "missing":
                raise MassError(
                    f"verifier {kind!r} cannot start: {loaded.reason}. Install it: pip install 'mass[{kind}]'"
                )
            if loaded.status != "loaded":
                return loaded
            self._loaded.add(kind)
        return self._ask((kind, question), self.time_limit)

    def _start(self) -> None:
        if self._process is not None and self._process.poll() is None:
            return
        self.close()
        self._pipe, theirs = Pipe()
        root = str(Path(__file__).resolve().parents[1])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", "from mass.judge import serve; serve()"]
            + [str(theirs.fileno()), str(self.time_limit)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(paths),
                "PYTHONSAFEPATH": "1",
                "OMP_NUM_THREADS": "1",
            },
            pass_fds=[theirs.fileno()],
            start_new_session=True,  # a Ctrl-C is for the run, which finishes its step and still needs verdicts
        )
        theirs.close()

    def _ask(self, message: tuple[str, Any], seconds: float) -> Verdict:
        assert self._process is not None and self._pipe is not None
        began = time.monotonic()
        try:
            self._pipe.send(message)
            if self._pipe.poll(seconds + 3.0):  # the worker's own two limits come first
                # JSON, not an object: what judged a model's text is not trusted to send one.
                score, status, reason = json.loads(self._pipe.recv_bytes())
                return Verdict(score, status, reason)
            reason = "the verifier's worker does not answer"
        except (EOFError, OSError):
            self._process.wait(timeout=10)
            reason = f"the verifier's worker died with exit code {self._process.returncode}"
        elapsed = time.monotonic() - began
        self.close()
        return Verdict(math.nan, "timeout" if elapsed >= seconds else "failed", reason)


def verdict_of(score: float) -> Verdict:
    """The verdict that a score of a verifier means; the score is cut to [0, 1]."""
    if math.isnan(score):
        return Verdict(math.nan, "failed", "the verifier's score is nan")
    score = min(max(score, 0.0), 1.0)
    return Verdict(score, "right" if score == 1.0 else "wrong" if score == 0.0 else "partial")
