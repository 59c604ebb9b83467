"""Demonstrations of a problem, and the forms in which files bring them. No torch here.

`demonstrations`      a list of [input, output] or {"input", "output"}, each text or a grid (a list of rows of digits)
ARC tasks             {"train": [{"input", "output"}], "test": [...]} in one line: a problem for each test grid
solved problems       the first `problems.demonstrations` of each subject, by a seeded order, demonstrate its others

ARC: Chollet, arXiv 1911.01547. Ten solved problems of each BIG-Bench Hard task: as in arXiv 2411.07279, section 5.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from mass import grids
from mass.errors import MassError
from mass.rows import content, reference

Row = Any  # a parsed line, or the ValueError that says why it is none
# not 30, as in the data set: a bound on what is read, and no rule of it
LARGEST = 100


def stated(answer: str) -> str:
    """The shortest solution that states an answer."""
    return f"Answer:\n{answer}" if "\n" in answer else f"Answer: {answer}"


def pairs(row: Mapping[str, Any]) -> tuple[tuple[tuple[str, str], ...], bool]:
    """The demonstrations of a row, and whether all of them are grids. Raises ValueError for what is none."""
    try:
        items = row.get("demonstrations") or ()
        # text is a sequence of letters, and a dict one of its keys
        if not isinstance(items, list | tuple) or any(
            not isinstance(item, list | tuple | dict) for item in items
        ):
            raise TypeError("no list of pairs")
        both = [(item["input"], item["output"]) if isinstance(item, dict) else item for item in items]
        shown = [(before, after) for before, after in both]
        given_as_grids = [isinstance(side, list) for pair in shown for side in pair]
        texts = tuple((_text(before, "input"), _text(after, "output")) for before, after in shown)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            "'demonstrations' is not a list of [input, output] or {input, output} with text or grids in them "
            f"({error})"
        ) from error
    return texts, bool(texts) and all(given_as_grids)


def _text(value: Any, key: str) -> str:
    if isinstance(value, list):
        return _grid(value, key)
    if not isinstance(value, str):
        raise ValueError(f"{key!r} is a {type(value).__name__}, not text")
    value.encode()
    return value


def _grid(value: Any, key: str) -> str:
    good = (
        isinstance(value, list)
        and 0 < len(value) <= LARGEST
        and all(isinstance(row, list) and 0 < len(row) <= LARGEST for row in value)
        and len({len(row) for row in value}) == 1
        and all(type(cell) is int and 0 <= cell <= 9 for row in value for cell in row)
    )
    if not good:
        raise ValueError(f"{key!r} is not a grid: rows of one length, of digits 0 to 9, at most {LARGEST}")
    return grids.write(value)


def spread(rows: Iterable[tuple[int, Row]], problem: str) -> Iterator[tuple[int, Row]]:
    """The same rows with a row for each test grid in place of an ARC task, or the ValueError that says what is wrong.

    `problem` is the column that tells another row from an ARC task.
    """
    for line, row in rows:
        if (
            not isinstance(row, dict)
            or problem in row
            or "problem" in row
            or not row.keys() >= {"train", "test"}
        ):
            yield line, row
            continue
        try:
            yield from ((line, part) for part in _arc(row))
        except ValueError as error:
            yield line, error


def _arc(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    for key in ("train", "test"):
        if not isinstance(row[key], list) or not row[key] or not all(isinstance(x, dict) for x in row[key]):
            raise ValueError(f"{key!r} is not a list of input and output grids")
    name = str(row.get("id") or "")
    out = []
    for i, test in enumerate(row["test"], start=1):
        part = {
            "problem": _grid(test.get("input"), "input"),
            "demonstrations": row["train"],
            "source": row.get("source") or "arc",
        }
        if name:
            part["id"] = name if len(row["test"]) == 1 else f"{name}:{i}"
        if test.get("output") is not None:
            part["answer"] = _grid(test["output"], "output")
        out.append(part)
    return out


def set_aside(
    rows: Iterable[tuple[int, Row]],
    count: int,
    seed: int,
    names: Callable[[Row], Mapping[str, str]],
    where: str,
) -> list[tuple[int, Row]]:
    """The rows without the `count` of each `subject` that are set aside as demonstrations of its others.

    Rows with demonstrations of their own stay as they are; rows without a subject are all of one. Rows of one content are
    one problem: set aside together, and shown once. `names`: the columns of a row. Raises MassError where a subject has too
    few problems with an answer.
    """
    listed = list(rows)
    if not count:
        return listed
    groups: dict[str, list[int]] = {}
    for i, (_, row) in enumerate(listed):
        if isinstance(row, dict) and row.get(names(row)["problem"]) and not row.get("demonstrations"):
            groups.setdefault(str(row.get("subject") or ""), []).append(i)

    def problem(i: int) -> str:
        row = listed[i][1]
        return str(row[names(row)["problem"]])

    def answer(i: int) -> str | None:
        row = listed[i][1]
        try:
            return reference(row, names(row))[0]
        except ValueError:
            # whoever reads the row as a problem says what is wrong with it
            return None

    given: dict[int, list[tuple[str, str]]] = {}
    gone: set[int] = set()
    for subject, members in groups.items():
        solved = {content(problem(i)): i for i in reversed(members) if answer(i) is not None}
        distinct = {content(problem(i)) for i in members}
        if len(solved) < count or len(distinct) <= count:
            name = f"subject {subject!r}" if subject else "this file"
            raise MassError(
                f"{where}: problems.demonstrations={count} sets aside so many solved problems, and {name} has "
                f"{len(solved)} with an answer among {len(distinct)}. Lower it."
            )
        drawn = sorted(solved.values(), key=lambda i: _order(seed, problem(i)))[:count]
        taken = {content(problem(i)) for i in drawn}
        gone.update(i for i in members if content(problem(i)) in taken)
        shown = [(problem(i).strip(), str(answer(i))) for i in drawn]
        given |= {i: shown for i in members}
    return [
        (line, {**row, "demonstrations": given[i]} if i in given else row)
        for i, (line, row) in enumerate(listed)
        if i not in gone
    ]


def _order(seed: int, text: str) -> bytes:
    return hashlib.sha256(f"{seed}:demonstrations:{text}".encode("utf-8", "surrogatepass")).digest()
