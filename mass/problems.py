"""Problems and where they come from. No torch here.

Sources are a `.jsonl` file, a Hugging Face dataset (hub id `owner/name` or `owner/name:config`, or a local folder),
a reasoning-gym family (`gym:NAME`) and a planted world (`world:NAME`). Training data are read strictly: an item that cannot be used is an error that
names it, before any costly work. Problems of test time are read leniently: a bad line is a record, and the others run.
`Problem`, all that test time sees, has no answer field.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import re
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from mass import demonstrations as shown
from mass import grids, rewards, worlds
from mass.errors import MassError

_log = logging.getLogger(__name__)

COLUMNS = {"problem": "problem", "answer": "answer", "solution": "solution", "id": "id"}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(?::[\w.-]+)?")
_CALCULATOR = re.compile(r"<<[^<>]*>>")  # GSM8K's marks
_SURROGATE = re.compile("[\ud800-\udfff]")
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
    world's "train" are the problems that it has for training; any other split is what it holds out.
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
    names = _column_names(columns)
    gyms = [name for name in sources if name.startswith("gym:")]
    if gyms:
        _check_gym([name.removeprefix("gym:") for name in gyms], gym or {})
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
        raise MassError(f"problems.size={size} leaves no problem of {', '.join(sources)}. Raise it.")
    return _unique(tasks)


def load_problems(
    path: str, *, columns: Mapping[str, str] | None = None, demonstrations: int = 0, seed: int = 0
) -> list[Problem | BadLine]:
    """Problems of test time from a JSONL file, or from standard input when `path` is "-".

    Keys of a line: `problem`, optional `id` and `demonstrations` (a list of pairs or of {"input", "output"}); or an ARC
    task (`train` and `test`). An answer in the file is not read, except those of the problems that `demonstrations`, a
    number, sets aside of each subject to demonstrate its others (`mass.demonstrations`). Standard input whose first character is not `{` is one problem in plain text. Raises
    MassError for a file that is missing or has no line.
    """
    names = _column_names(columns)
    data = sys.stdin.buffer.read() if path == "-" else _read(path)
    where = "standard input" if path == "-" else path
    if not data.strip():
        raise MassError(f"{where} is empty. It needs one JSON object a line with a key {names['problem']!r}.")
    if path == "-" and not data.lstrip().startswith((b"{", b"\xef\xbb\xbf{")):
        try:
            return [text_problem(data.decode("utf-8"))]
        except UnicodeDecodeError as error:
            raise MassError(f"standard input is not UTF-8 ({error.reason} at byte {error.start}).") from error
    found: list[Problem | BadLine] = []
    taken: set[str] = set()
    lines = data.split(b"\n")
    rows = shown.spread(_json_lines(data), names["problem"])
    for line, row in shown.set_aside(rows, demonstrations, seed, names["problem"], names["answer"], where):
        try:
            problem = _problem(_object(row), names)
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
            problem = row if isinstance(row, Problem) else _problem(_object(row), COLUMNS)
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


def _column_names(columns: Mapping[str, str] | None) -> dict[str, str]:
    unknown = sorted(set(columns or {}) - set(COLUMNS))
    if unknown:
        raise MassError(f"problems.columns has no key {unknown[0]!r}; it has {', '.join(COLUMNS)}.")
    return {**COLUMNS, **(columns or {})}


def _read(path: str) -> bytes:
    try:
        return Path(path).expanduser().read_bytes()
    except FileNotFoundError:
        raise MassError(f"There is no problem file {path}.") from None
    except OSError as error:
        raise MassError(f"The problem file {path} cannot be read: {error.strerror}.") from error


def _json_lines(data: bytes) -> Iterator[tuple[int, Any]]:
    """(line number from 1, parsed line or the ValueError that says why not); empty lines are passed over."""
    for line, raw in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not raw.strip():
            continue
        try:
            yield line, json.loads(raw.decode("utf-8"))
        except UnicodeDecodeError as error:
            yield line, ValueError(f"not UTF-8 ({error.reason} at byte {error.start} of the line)")
        except (ValueError, RecursionError) as error:
            yield line, ValueError(f"not JSON ({error})")


def _row_tasks(
    name: str, split: str, names: dict[str, str], verifier: str, demonstrations: int, seed: int
) -> list[Task]:
    path = Path(name).expanduser()
    rows: Iterable[tuple[int, Any]]
    if name.endswith((".jsonl", ".json")) or path.is_file():
        unit, stem, rows = "line", path.stem, _json_lines(_read(name))
    else:
        unit, stem, rows = "row", name.rpartition("/")[2].partition(":")[0], _dataset_rows(name, split, names)
    tasks, bad = [], []
    rows = shown.spread(rows, names["problem"])
    for position, row in shown.set_aside(rows, demonstrations, seed, names["problem"], names["answer"], name):
        try:
            fields = _object(row)
            # A recipe names the columns of its hub data set; a file of our own format put in its place has our names.
            own = names["problem"] not in fields and "problem" in fields
            tasks.append(_task(fields, _column_names(None) if own else names, stem, verifier))
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


def _dataset_rows(name: str, split: str, names: dict[str, str]) -> list[tuple[int, Any]]:
    folder, _, config = (name, "", "") if Path(name).expanduser().exists() else name.partition(":")
    local = Path(folder).expanduser()
    if not local.is_dir() and not _HUB_ID.fullmatch(name):
        raise MassError(
            f"Problem source {name!r} is neither a file or folder that exists, nor a hub id owner/name, nor gym:NAME, nor world:NAME."
        )
    import datasets

    try:
        rows = datasets.load_dataset(str(local) if local.is_dir() else folder, config or None, split=split)
    except Exception as error:  # the hub client raises requests', fsspec's and its own errors
        first = str(error).strip().partition("\n")[0]
        raise MassError(
            f"The dataset {name} (split {split!r}) cannot be loaded: {type(error).__name__}: {first}. Check "
            "problems.train or problems.heldout, problems.split or problems.heldout_split, and the network."
        ) from error
    if names["problem"] not in rows.column_names:
        raise MassError(
            f"The dataset {name} has no column {names['problem']!r}; it has {', '.join(rows.column_names)}. "
            "Set problems.columns.problem (and answer, solution)."
        )
    return list(enumerate(rows))


def _object(row: Any) -> dict[str, Any]:
    if isinstance(row, ValueError):
        raise row
    if not isinstance(row, dict):
        raise ValueError(f"not a JSON object but {type(row).__name__}")
    return row


def _text(row: Mapping[str, Any], key: str) -> str:
    """The value of `key` as text without outer space, "" where it is absent or null."""
    value = row.get(key)
    if value is None:
        return ""
    if isinstance(value, (list, dict)):
        raise ValueError(f"{key!r} is a {type(value).__name__}, not text")
    return _encodable(str(value).strip(), key)


def _encodable(text: str, key: str) -> str:
    if _SURROGATE.search(text):  # JSON can write one alone; no tokenizer, hash or file takes it
        raise ValueError(f"{key!r} holds half of a surrogate pair, which is no Unicode text")
    return text


def _problem(row: Mapping[str, Any], names: Mapping[str, str]) -> Problem:
    text = _text(row, names["problem"])
    if not text:
        raise ValueError(f"no {names['problem']!r}")
    pairs, as_grids = shown.pairs(row)
    # the same test grid may belong to two tasks
    key = content_key(f"{text}\n{pairs}") if pairs else content_key(text)
    return Problem(_text(row, names["id"]) or key, text, pairs, as_grids and grids.read(text) is not None)


def _task(row: Mapping[str, Any], names: Mapping[str, str], stem: str, verifier: str) -> Task:
    problem = _problem(row, names)
    answer, solution = _text(row, names["answer"]), _text(row, names["solution"])
    if "####" in answer and not solution:  # GSM8K as on the hub
        solution, _, answer = (part.strip() for part in answer.rpartition("####"))
        solution = _CALCULATOR.sub("", solution)
    if not answer:  # MATH as on the hub
        answer = rewards.find_answer(solution) or ""
    if not answer:
        raise ValueError(f"no {names['answer']!r}, and none is stated in {names['solution']!r}")
    if verifier == "gym":
        raise ValueError("problems.verifier=gym judges only problems that a gym:NAME source made")
    kind = _kind(answer) if verifier == "auto" else verifier
    if kind == "numeric" and rewards.number(answer) is None:
        raise ValueError(f"problems.verifier=numeric, but the answer {answer[:80]!r} is not a number")
    return Task(problem, answer, _solution(solution, answer), _text(row, "source") or stem, kind)


def _kind(answer: str) -> str:
    if rewards.number(answer) is not None:
        return "numeric"
    return "math" if re.search(r"[\\^$]", answer) else "exact"


def _solution(solution: str, answer: str) -> str:
    if solution and rewards.canonical(rewards.find_answer(solution) or "") == rewards.canonical(answer):
        return solution
    return f"{solution}\n{shown.stated(answer)}" if solution else shown.stated(answer)


# Problems from reasoning-gym


def _check_gym(families: Sequence[str], settings: Mapping[str, Any]) -> None:
    rewards.require(["gym"])
    from reasoning_gym.factory import DATASETS

    for name in [*families, *settings]:
        if name not in DATASETS or name == "composite":
            near = difflib.get_close_matches(name, DATASETS, n=1)
            raise MassError(
                f"reasoning-gym has no family {name!r}" + (f"; the nearest is {near[0]!r}." if near else ".")
            )
        known = [entry.name for entry in fields(DATASETS[name][1]) if entry.name not in ("seed", "size")]
        for key in settings.get(name) or {}:
            if key in ("seed", "size"):
                raise MassError(
                    f"problems.gym.{name}.{key} is set by run.seed and problems.size; take it out."
                )
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                raise MassError(
                    f"problems.gym.{name} has no setting {key!r}"
                    + (f"; the nearest is {near[0]!r}" if near else "")
                    + f". It has {', '.join(known)}."
                )


def _gym_tasks(
    name: str, share: int, settings: dict[str, Any], split: str, verifier: str, seed: int
) -> list[Task]:
    import reasoning_gym

    # Row i of a family is made from Random(seed + i), so neighbouring seeds give the same problems shifted by one.
    stream = int.from_bytes(hashlib.sha256(f"{seed}:{split}:{name}".encode()).digest()[:4], "big") >> 1
    tasks: list[Task] = []
    seen: set[str] = set()
    index = 0
    try:
        rows = reasoning_gym.create_dataset(name, seed=stream, size=max(4 * share, 1), **settings)
        for index in range(4 * share if share else 0):
            row = rows[index]
            if row["answer"] is None:
                raise ValueError("this family has no reference answers")
            text, answer = str(row["question"]).strip(), str(row["answer"]).strip()
            key = content_key(text)
            if key in seen:
                continue
            seen.add(key)
            kind = {"auto": "gym"}.get(verifier, verifier)
            if kind == "numeric" and rewards.number(answer) is None:
                raise ValueError(f"problems.verifier=numeric, but an answer is {answer[:80]!r}, not a number")
            entry = {**row, "settings": settings} if settings else dict(row)
            problem = Problem(f"{name}-{stream}-{index}", text)
            tasks.append(Task(problem, answer, _solution("", answer), name, kind, entry))
            if len(tasks) == share:
                break
    except Exception as error:  # a family asserts and raises what it likes on settings it cannot use
        reason = str(error) or type(error).__name__
        raise MassError(
            f"gym:{name} cannot make problem {index} with {settings or 'its defaults'}: {reason}. "
            f"Change problems.gym.{name}, or take another family."
        ) from error
    if len(tasks) < share:
        _log.warning("gym:%s gave %d different problems of the %d asked for", name, len(tasks), share)
    return tasks


# Problems from planted worlds


def _world_tasks(world: worlds.World, share: int, split: str, seed: int) -> list[Task]:
    described = worlds.entry(world)
    tasks = [
        Task(Problem(f"{x.family}-{i}", x.problem), x.answer, x.solution, x.family, "exact", described)
        for i, x in enumerate(worlds.items(world, share, split == "train", seed))
    ]
    if len(tasks) < share:
        _log.warning(
            "world:%s gave %d different problems of the %d asked for", described["world"], len(tasks), share
        )
    return tasks


def truth(task: Task, problem: str, solution: str) -> worlds.Truth | None:
    """What is known of an example that was made for a task; None where nothing is."""
    if task.entry is None or "world" not in task.entry:
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


# Equal problems, and order


def content_key(text: str) -> str:
    """16 hex digits of the text without regard to case, spacing and Unicode form: equal problems, equal keys."""
    normal = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return hashlib.sha256(normal.encode()).hexdigest()[:16]


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
