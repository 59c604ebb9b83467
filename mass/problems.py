"""Problems and where they come from. No torch here.

Sources are a `.jsonl` file, a Hugging Face dataset (hub id `owner/name` or `owner/name:config`, or a local folder),
a reasoning-gym family (`gym:NAME`) and a planted world (`world:NAME`). Training data are read strictly: an item that cannot be used is an error that
names it, before any costly work. Problems of test time are read leniently: a bad line is a record, and the others run.
`Problem`, all that test time sees, has no answer field.
"""

from __future__ import annotations

import hashlib
import logging
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mass import demonstrations as shown
from mass import grids, rewards, worlds
from mass.errors import MassError
from mass.gym import check_gym, gym_items
from mass.rows import (
    COLUMNS,
    as_object,
    column_names,
    content_key,
    dataset_rows,
    json_lines,
    read_file,
    reference,
    text_of,
)

_log = logging.getLogger(__name__)

_SHOWN = 5  # bad lines named in one message


@dataclass(frozen=True)
class Problem:
    """What test time sees: a unique id, the question, and demonstrations (input, output) where it has some.

    `grids`: question, inputs and outputs are grids of digits (`mass.grids`), given as such.
    """

    id: str
    text: str
    demonstrations: tuple[tuple[str, str], ...] = ()
    grids: bool = False


@dataclass(frozen=True)
class Task:
    """A problem with its reference. `solution` ends in a line "Answer: X" unless it states X otherwise; `source` is the
    gym or world family, the row's `source` or the file's stem; `verifier` is one of `rewards.KINDS`; `entry` is the
    reasoning-gym row (with the family's `settings`, where some were given) that gym's own score needs, or the world
    and settings that `truth` needs."""

    problem: Problem
    answer: str
    solution: str
    source: str
    verifier: str
    entry: dict[str, Any] | None = None


@dataclass(frozen=True)
class BadLine:
    """A line of test-time input that holds no problem: its number from 1, why, and its first 200 characters."""

    line: int
    reason: str
    text: str


# Reading


def load_tasks(
    source: str | Sequence[str],
    *,
    split: str = "train",
    size: int = 1000,
    weights: Sequence[float] | None = None,
    gym: Mapping[str, Mapping[str, Any]] | None = None,
    world: Mapping[str, Mapping[str, Any]] | None = None,
    columns: Mapping[str, str] | None = None,
    verifier: str = "auto",
    seed: int = 0,
    demonstrations: int = 0,
) -> list[Task]:
    """All tasks of one source or of a mixture, in a fixed order, with unique ids.

    Without `weights` a file or dataset counts in full and the gym families and worlds make `size` problems in equal
    shares. With `weights` (one for each source) every source gives its share of `size`: the first of a gym, a seeded
    choice of a file. The problems of one differ in content, so a small family may give fewer; that is logged.
    `split` picks the split of a dataset, and makes the gym's stream of problems differ from that of any other split. A
    world's "train" are the problems that it has for training; any other split is what it holds out. A file is one split,
    whatever its name, and a slice of that (train[:1000]) is of its lines.
    `demonstrations`: so many solved problems of each subject of a file or dataset demonstrate its others.
    `verifier` "auto" is gym for a gym, numeric for an answer that is one number, math for one with LaTeX, else exact.
    Raises MassError that names the source, the lines (up to 5, and how many) or the setting, and the way out.
    """
    sources = [source] if isinstance(source, str) else list(source)
    if not sources:
        raise MassError(
            "No problem source is given. Set problems.train to a .jsonl file, a hub id, gym:NAME or world:NAME."
        )
    if verifier not in ("auto", *rewards.KINDS):
        raise MassError(f"problems.verifier={verifier!r} is not one of auto, {', '.join(rewards.KINDS)}.")
    names = column_names(columns)
    gyms = [name for name in sources if name.startswith("gym:")]
    if gyms:
        check_gym([name.removeprefix("gym:") for name in gyms], gym or {})
    shares: list[int | None]
    if weights is not None:
        if len(weights) != len(sources) or min(weights) < 0 or sum(weights) <= 0:
            raise MassError(
                f"problems.weights={list(weights)} needs one number >= 0 for each of the {len(sources)} sources "
                f"({', '.join(sources)}), not all zero."
            )
        shares = list(_shares(size, weights))
    else:
        made = [name.startswith(("gym:", "world:")) for name in sources]
        equal = iter(_shares(size, [1.0] * sum(made)))
        shares = [next(equal) if own else None for own in made]
    tasks: list[Task] = []
    for name, share in zip(sources, shares, strict=True):
        if name.startswith("gym:"):
            family = name.removeprefix("gym:")
            tasks += _gym_tasks(
                family, share or 0, dict((gym or {}).get(family) or {}), split, verifier, seed
            )
            continue
        if name.startswith("world:"):
            tasks += _world_tasks(worlds.find(name, world), share or 0, split, seed)
            continue
        found = _unique(_row_tasks(name, split, names, verifier, demonstrations, seed))
        if share is not None and share > len(found):
            raise MassError(
                f"problems.weights asks for {share} problems of {name}, which has {len(found)}. "
                f"Lower problems.size (now {size}) or its weight."
            )
        tasks += found if share is None else shuffled(found, f"{seed}:mixture")[:share]
    if not tasks:
        raise MassError(
            f"{size} problems of {', '.join(sources)} are asked for: raise problems.size, or problems.heldout_size of those to hold out"
        )
    return _unique(tasks)


def load_problems(
    path: str, *, columns: Mapping[str, str] | None = None, demonstrations: int = 0, seed: int = 0
) -> list[Problem | BadLine]:
    """Problems of test time from a JSONL file, or from standard input when `path` is "-".

    Keys of a line: `problem`, optional `id` and `demonstrations` (a list of pairs or of {"input", "output"}); or an ARC
    task (`train` and `test`). As in training `columns` gives other names, and a line without them has ours. An answer in the file is not read, except those of the problems that `demonstrations`, a
    number, sets aside of each subject to demonstrate its others (`mass.demonstrations`). Standard input whose first character is not `{` is one problem in plain text. Raises
    MassError for a file that is missing or has no line.
    """
    names = column_names(columns)
    data = sys.stdin.buffer.read() if path == "-" else read_file(path)
    where = "standard input" if path == "-" else path
    if not data.removeprefix(b"\xef\xbb\xbf").strip():
        raise MassError(f"{where} is empty. It needs one JSON object a line with a key {names['problem']!r}.")
    if path == "-" and not data.lstrip().startswith((b"{", b"\xef\xbb\xbf{")):
        try:
            return [text_problem(data.decode("utf-8"))]
        except UnicodeDecodeError as error:
            raise MassError(f"standard input is not UTF-8 ({error.reason} at byte {error.start}).") from error
    found: list[Problem | BadLine] = []
    taken: set[str] = set()
    lines = data.split(b"\n")
    rows = shown.spread(json_lines(data), names["problem"])
    for line, row in shown.set_aside(rows, demonstrations, seed, lambda row: _names(row, names), where):
        try:
            fields = as_object(row)
            problem = _problem(fields, _names(fields, names))
        except ValueError as error:
            found.append(BadLine(line, str(error), lines[line - 1].decode("utf-8", "replace").strip()[:200]))
        else:
            found.append(replace(problem, id=free_id(problem.id, taken)))
    return found


def as_problems(given: str | Problem | Mapping[str, Any] | Iterable[Any]) -> list[Problem | BadLine]:
    """Problems of test time from Python: one or several texts, `Problem`s, or mappings like a line of a JSONL file.

    As with `load_problems`, what cannot be used is a BadLine in its place (numbered from 1), and ids are made unique.
    """
    items = [given] if isinstance(given, (str, Problem, Mapping)) else list(given)
    found: list[Problem | BadLine] = []
    taken: set[str] = set()
    for number, item in enumerate(items, start=1):
        try:
            row = {"problem": item} if isinstance(item, str) else item
            problem = row if isinstance(row, Problem) else _problem(as_object(row), COLUMNS)
        except ValueError as error:
            found.append(BadLine(number, str(error), str(item)[:200]))
        else:
            found.append(replace(problem, id=free_id(problem.id, taken)))
    return found


def text_problem(text: str) -> Problem:
    """The one problem that a user typed. Raises MassError when it is empty."""
    try:
        return _problem({"problem": text}, COLUMNS)
    except ValueError as error:
        raise MassError(f"The problem text cannot be used: {error}.") from error


def _names(row: Mapping[str, Any], names: dict[str, str]) -> dict[str, str]:
    """The columns of a row. A recipe names those of its hub data set; a file of our own format put in its place has our names."""
    return column_names(None) if names["problem"] not in row and "problem" in row else names


def _row_tasks(
    name: str, split: str, names: dict[str, str], verifier: str, demonstrations: int, seed: int
) -> list[Task]:
    path = Path(name).expanduser()
    rows: Iterable[tuple[int, Any]]
    if name.endswith((".jsonl", ".json")) or path.is_file():
        unit, stem, rows = "line", path.stem, _sliced(name, split, json_lines(read_file(name)))
    else:
        unit, stem, rows = "row", name.rpartition("/")[2].partition(":")[0], dataset_rows(name, split, names)
    tasks, bad = [], []
    rows = shown.spread(rows, names["problem"])
    for position, row in shown.set_aside(rows, demonstrations, seed, lambda row: _names(row, names), name):
        try:
            fields = as_object(row)
            tasks.append(_task(fields, _names(fields, names), stem, verifier))
        except ValueError as error:
            bad.append(f"{name}:{position}: {error}")
    if bad:
        rest = f"\n  and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
        raise MassError(
            f"{len(bad)} {unit}{'s' if len(bad) > 1 else ''} of {name} cannot be used for training:\n  "
            + "\n  ".join(bad[:_SHOWN])
            + rest
            + "\nMend or delete them; other column names go into problems.columns."
        )
    if not tasks:
        raise MassError(f"{name} holds no problem. It needs one JSON object a line with problem and answer.")
    return tasks


def _sliced(name: str, split: str, rows: Iterable[tuple[int, Any]]) -> Iterable[tuple[int, Any]]:
    """The lines of a file that the slice of a split picks, as `datasets` reads it; all where it has none."""
    if "[" not in split:
        return rows
    import datasets

    listed = list(rows)
    try:
        parts = datasets.ReadInstruction.from_spec(split).to_absolute({split.partition("[")[0]: len(listed)})
    except (ValueError, AssertionError) as error:
        raise MassError(
            f"problems.split or problems.heldout_split is {split!r}, which cannot be taken of the file {name}: {error}. Write a "
            "slice like train[:1000], or train for all of it."
        ) from error
    picked = [row for part in parts for row in listed[part.from_ : part.to]]
    if listed and not picked:
        raise MassError(
            f"problems.split or problems.heldout_split is {split!r}, which picks none of the {len(listed)} lines of {name}."
        )
    return picked


def _problem(row: Mapping[str, Any], names: Mapping[str, str]) -> Problem:
    text = text_of(row, names["problem"])
    if not text:
        raise ValueError(f"no {names['problem']!r}")
    pairs, as_grids = shown.pairs(row)
    key = content_key(_whole(text, pairs))
    return Problem(text_of(row, names["id"]) or key, text, pairs, as_grids and grids.read(text) is not None)


def task_key(problem: Problem) -> str:
    """As `content_key`, demonstrations included: the same test grid may belong to two tasks."""
    return content_key(_whole(problem.text, problem.demonstrations))


def _whole(text: str, pairs: tuple[tuple[str, str], ...]) -> str:
    return f"{text}\n{pairs}" if pairs else text


def _task(row: Mapping[str, Any], names: Mapping[str, str], stem: str, verifier: str) -> Task:
    problem = _problem(row, names)
    answer, solution = reference(row, names)
    if verifier == "gym":
        raise ValueError("problems.verifier=gym judges only problems that a gym:NAME source made")
    kind = _kind(answer) if verifier == "auto" else verifier
    if kind == "numeric" and rewards.number(answer) is None:
        raise ValueError(f"problems.verifier=numeric, but the answer {answer[:80]!r} is not a number")
    return Task(problem, answer, _solution(solution, answer), text_of(row, "source") or stem, kind)


def _kind(answer: str) -> str:
    if rewards.number(answer) is not None:
        return "numeric"
    return "math" if re.search(r"[\\^$]", answer) else "exact"


def _solution(solution: str, answer: str) -> str:
    if solution and rewards.canonical(rewards.find_answer(solution) or "") == rewards.canonical(answer):
        return solution
    return f"{solution}\n{shown.stated(answer)}" if solution else shown.stated(answer)


# Problems that are made


def _gym_tasks(
    name: str, share: int, settings: dict[str, Any], split: str, verifier: str, seed: int
) -> list[Task]:
    kind = "gym" if verifier == "auto" else verifier
    tasks = [
        Task(Problem(x.id, x.problem), x.answer, shown.stated(x.answer), name, kind, x.entry)
        for x in gym_items(name, share, settings, split, seed, numeric=kind == "numeric")
    ]
    if len(tasks) < share:
        _log.warning("gym:%s gave %d different problems of the %d asked for", name, len(tasks), share)
    return tasks


def _world_tasks(world: worlds.World, share: int, split: str, seed: int) -> list[Task]:
    described = worlds.entry(world)
    tasks = [
        Task(Problem(f"{x.family}-{i}", x.problem), x.answer, x.solution, x.family, "exact", described)
        for i, x in enumerate(worlds.items(world, share, split.partition("[")[0] == "train", seed))
    ]
    if len(tasks) < share:
        _log.warning(
            "world:%s gave %d different problems of the %d asked for", described["world"], len(tasks), share
        )
    return tasks


def has_truth(task: Task) -> bool:
    """Whether it is known of examples for this task which are right: it is of a planted world."""
    return task.entry is not None and "world" in task.entry


def truth(task: Task, problem: str, solution: str) -> worlds.Truth | None:
    """What is known of an example that was made for a task; None where nothing is."""
    if task.entry is None or not has_truth(task):
        return None
    return worlds.truth(task.entry, task.problem.text, problem, solution)


def _shares(size: int, weights: Sequence[float]) -> list[int]:
    """`size` split by weight into whole numbers that add up to it (largest remainder)."""
    exact = [size * weight / sum(weights) for weight in weights]
    whole = [int(value) for value in exact]
    order = sorted(range(len(exact)), key=lambda i: whole[i] - exact[i])
    for i in order[: size - sum(whole)]:
        whole[i] += 1
    return whole


# Order, and ids that differ


def shuffled(tasks: Iterable[Task], salt: str) -> list[Task]:
    """In the order of a salted hash of their ids."""
    # Sorted by hash instead of random.shuffle: the order follows from seed and ids alone, not from the file's order,
    # the Python version or how many tasks there are.
    return sorted(tasks, key=lambda task: hashlib.sha256(f"{salt}:{task.problem.id}".encode()).digest())


def _unique(tasks: Sequence[Task]) -> list[Task]:
    """The same tasks with ids that differ: the second `7` becomes `7#2`."""
    taken: set[str] = set()
    return [
        replace(task, problem=replace(task.problem, id=free_id(task.problem.id, taken))) for task in tasks
    ]


def free_id(wanted: str, taken: set[str]) -> str:
    """The id, or with #2, #3, ... the first that is not taken; it is then."""
    found, n = wanted, 1
    while found in taken:
        n += 1
        found = f"{wanted}#{n}"
    taken.add(found)
    return found
