"""A file of problems, in batches of T that are alike in length, and the file of answers that a killed run goes on with.

The batches are made of the whole file, whatever is done already and however many processes share it, so a problem meets
the same others (and the same rounding) in every run. Each answer is one line that carries its problem's `position` in
the file and a `key` of what it depends on. Processes append whole batches of lines under a lock; a line that a kill has
torn is cut off by whoever comes next. Once no answer is missing, the lines are put in the problems' order.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import torch

from mass.choices import Kit
from mass.errors import MassError
from mass.methods import Record, solve
from mass.problems import BadLine, Problem

Item = Problem | BadLine


# ---- batches


def group(items: Sequence[Item], size: int) -> list[list[int]]:
    """The places of all items, in batches: those that hold no problem first, then problems, the longest first.

    Length is counted in characters: it is what is known before anything is tokenized, and only neighbours matter.
    The longest come first, so that memory that does not suffice is noticed at once.
    """
    bad = [i for i, item in enumerate(items) if isinstance(item, BadLine)]
    good = [i for i, item in enumerate(items) if isinstance(item, Problem)]
    good.sort(key=lambda i: -_length(items[i]))
    return [part[i : i + size] for part in (bad, good) for i in range(0, len(part), size)]


def _length(item: Item) -> int:
    shown = item.demonstrations if isinstance(item, Problem) else ()
    return len(item.text) + sum(len(before) + len(after) for before, after in shown)


def run_batches(
    kit: Kit, items: Sequence[Item], batches: Sequence[Sequence[int]], method: str, *, baselines: bool = True
) -> Iterator[list[tuple[int, Record]]]:
    """`solve` on one batch after another: (place, record) of each of its items. Only the batch at work is held.

    A line that held no problem is a record with its error.
    """
    for batch in batches:
        problems = [item for item in (items[i] for i in batch) if isinstance(item, Problem)]
        try:
            done = iter(solve(kit, problems, method, baselines=baselines) if problems else ())
        except torch.OutOfMemoryError as error:
            raise MassError(
                f"{len(problems)} problems together do not fit the memory ({str(error).partition('. ')[0]}): "
                "use a smaller --batch, generate.batch_rows or inner.checkpoint=true"
            ) from error
        yield [
            (i, _unread(item, method) if isinstance(item := items[i], BadLine) else next(done)) for i in batch
        ]


def adapt_problems(
    kit: Kit, problems: Sequence[Item], method: str, batch: int = 8, *, baselines: bool = True
) -> Iterator[Record]:
    """The records of all problems, in batches of `batch` that are alike in length; each batch as soon as it is done."""
    for done in run_batches(kit, problems, group(problems, batch), method, baselines=baselines):
        for _, record in done:
            yield record


def _unread(bad: BadLine, method: str) -> Record:
    return Record(f"line {bad.line}", bad.text, method, error=f"line {bad.line}: {bad.reason}")


# ---- answers as lines


def key_of(item: Item, settings: str) -> str:
    """Of a problem's content and of the settings it is answered with: 16 hexadecimal digits each, a dot between."""
    digest = hashlib.sha256(json.dumps(dataclasses.astuple(item)).encode()).hexdigest()
    return f"{digest[:16]}.{settings}"


def as_row(place: int, key: str, record: Record) -> dict[str, Any]:
    """Position (from 1) and key of the problem, and every field of its record."""
    return {"position": place + 1, "key": key} | as_fields(record)


def as_fields(record: Record) -> dict[str, Any]:
    """Every field of a record as JSON has it; numbers that are not finite are None."""

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: finite(part) for name, part in value.items()}
        if isinstance(value, (list, tuple)):
            return [finite(part) for part in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return {name: finite(value) for name, value in dataclasses.asdict(record).items()}


def as_line(row: dict[str, Any]) -> str:
    """One line of JSON."""
    return json.dumps(row, allow_nan=False)


# ---- the file of answers


def check_new(path: Path, option: str, way_out: str = "") -> None:
    """Raise MassError when a file cannot be made there, or is there already."""
    if path.exists():
        raise MassError(f"{option} {path} exists, and nothing is overwritten: name another file{way_out}")
    folder = path.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise MassError(
            f"{option} {path} cannot be written (no folder {folder} to write to): name another file"
        )


def read_done(path: Path, keys: Sequence[str]) -> set[int]:
    """The places that have an answer in the file. `keys`: what each place's key must be.

    Raises MassError for a file that holds anything else than answers to these problems with these settings.
    """
    if not path.exists():
        return set()
    with _locked(path) as file:
        return {place for place, _, _ in _lines(file, path, keys)}


def append(path: Path, lines: Sequence[str]) -> None:
    """Write a batch of lines, all at once, and see that they reach the disk."""
    with _locked(path) as file:
        file.seek(0, os.SEEK_END)
        file.write("".join(line + "\n" for line in lines).encode())
        file.flush()
        os.fsync(file.fileno())


def put_in_order(path: Path, keys: Sequence[str]) -> bool:
    """When every place has its answer: sort the lines by position, drop repeated ones, and return True.

    The file is replaced in one step, so a kill leaves the old or the new one.
    """
    with _locked(path) as file:
        where: dict[int, tuple[int, int]] = {}
        order = []
        for place, start, size in _lines(file, path, keys):
            where.setdefault(place, (start, size))
            order.append(place)
        if len(where) < len(keys):
            return False
        if order == sorted(where):
            return True
        sorted_path = path.with_name(f".{path.name}.sorted")
        with open(sorted_path, "wb") as out:
            for place in range(len(keys)):
                start, size = where[place]
                file.seek(start)
                out.write(file.read(size))
            out.flush()
            os.fsync(out.fileno())
        os.replace(sorted_path, path)
        return True


def rows(path: Path) -> Iterator[dict[str, Any]]:
    """The answers in the file, one at a time."""
    with open(path, encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[IO[bytes]]:
    """The file, open for this process alone, without the torn line that a killed one may have left at its end."""
    try:
        # made where it is not there yet, never emptied
        file = open(path, "a+b")
    except OSError as error:
        raise MassError(f"--out {path} cannot be opened ({error.strerror})") from None
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        end = file.seek(0, os.SEEK_END)
        keep = end
        while keep:
            step = min(keep, 1 << 16)
            file.seek(keep - step)
            newline = file.read(step).rfind(b"\n")
            keep -= step
            if newline >= 0:
                keep += newline + 1
                break
        if keep < end:
            _check_torn(file, path, keep)
            file.truncate(keep)
        yield file


def _check_torn(file: IO[bytes], path: Path, start: int) -> None:
    """Nothing is cut off that is not the beginning of an answer."""
    file.seek(start)
    begin = b'{"position": '
    found = file.read(len(begin))
    if not begin.startswith(found):
        raise MassError(f"{path} ends in a line that no mass-adapt --out has written: name another file")


def _lines(file: IO[bytes], path: Path, keys: Sequence[str]) -> Iterator[tuple[int, int, int]]:
    """(place, first byte, bytes) of each line, checked."""
    file.seek(0)
    start = 0
    for number, line in enumerate(file, 1):
        try:
            row = json.loads(line)
            place, key = int(row["position"]) - 1, str(row["key"])
        except (ValueError, KeyError, TypeError):
            raise MassError(
                f"{path}, line {number}: no answer of a mass-adapt --out. Delete the line, or name another file"
            ) from None
        if not 0 <= place < len(keys) or key.partition(".")[0] != keys[place].partition(".")[0]:
            raise MassError(
                f"{path}, line {number}: the answer to problem {place + 1} of another file: "
                "--resume wants the problems as they were, or name another --out"
            )
        if key != keys[place]:
            raise MassError(
                f"{path}, line {number}: answered with another method, other weights or other settings: "
                "--resume wants them as they were (name the step folder in --run), or name another --out"
            )
        yield place, start, len(line)
        start += len(line)
