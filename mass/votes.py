"""Votes over a problem's tries by other rules than the whole answer's majority. No torch here.

Whoever says that an update beats a vote has to have tried the vote that is kindest to the tries: an answer of many rows is
seldom the same twice as a whole.
"""

from collections import Counter
from collections.abc import Callable, Sequence

from mass import worlds
from mass.problems import Task, has_truth
from mass.rewards import canonical, vote


def by_rule(
    task: Task, said: Sequence[str | None], right: Sequence[bool], verify: Callable[[str], bool]
) -> dict[str, bool | None]:
    """Whether each rule's answer is right. `said`: what each try states; `right`: whether it is; `verify`: of an answer.

    rows      each row is voted on alone, by the tries with as many rows as the reference; ties go to what was seen first
    one       of a world whose rows share a method: one vote over all rows of these tries, the winner put into every row
    generous  right by the whole answer, by rows or by one, every tie going to the reference

    A row is a line, or what the world says. `rows` and `one` are None where the reference has a single row, `one` also where
    no world says how an answer follows from its rows.
    """
    count = _count(said)
    generous = any(_leads(count, x) for x, is_right in zip(said, right, strict=True) if is_right)
    wanted = _rows(task, task.answer)
    if len(wanted) < 2:
        return {"rows": None, "one": None, "generous": generous}
    ballots = [own for x in said if x is not None and len(own := _rows(task, x)) == len(wanted)]
    columns = list(zip(*ballots, strict=True)) or [()] * len(wanted)
    every = [x for own in ballots for x in own]
    rows, one = [vote(column) for column in columns], vote(every)
    by_rows = None not in rows and verify(_joined(task, rows))
    by_one = one is not None and verify(_joined(task, [one] * len(wanted))) if has_truth(task) else None
    generous = generous or by_rows or bool(by_one)
    generous = generous or all(_leads(_count(x), row) for x, row in zip(columns, wanted, strict=True))
    if has_truth(task):
        generous = generous or (len(set(wanted)) == 1 and _leads(_count(every), wanted[0]))
    return {"rows": by_rows, "one": by_one, "generous": generous}


def _rows(task: Task, answer: str) -> list[str]:
    if has_truth(task):
        assert task.entry is not None
        return worlds.read_rows(task.entry, answer)
    return [line.strip() for line in answer.splitlines() if line.strip()]


def _joined(task: Task, rows: Sequence[str | None]) -> str:
    said = [row or "" for row in rows]
    if has_truth(task):
        assert task.entry is not None
        return worlds.write_rows(task.entry, task.problem.text, said)
    return "\n".join(said)


def _count(said: Sequence[str | None]) -> Counter[str]:
    """As `rewards.vote` counts."""
    return Counter(form for x in said if x is not None and (form := canonical(x).casefold()))


def _leads(count: Counter[str], answer: str | None) -> bool:
    """Whether no other has more votes."""
    own = count[canonical(answer).casefold()] if answer is not None else 0
    return own > 0 and own == max(count.values())
