"""Votes by other rules than the whole answer's majority, on answers made by hand."""

from collections.abc import Sequence

import pytest

from mass import worlds
from mass.problems import Problem, Task
from mass.rewards import Verifier
from mass.votes import by_rule
from mass.worlds import METHODS, Families, Planted

LINES = Task(Problem("a", "Sort."), "one\ntwo\nthree", "", "mine", "exact")
SINGLE = Task(Problem("b", "2 + 2"), "4", "", "mine", "exact")
WORLD = Families(rows=3)
RIGHT = METHODS[WORLD._right("a b c")]
OTHERS = [m for m in METHODS if m != RIGHT]


def target(methods: Sequence[str]) -> str:
    return WORLD.write_rows("a b c 7 3 times 3", methods)


FAMILY = Task(
    Problem("c", "a b c 7 3 times 3"), target([RIGHT] * 3), "", "families:abc", "exact", worlds.entry(WORLD)
)


def asked(task: Task, said: Sequence[str | None]) -> tuple[bool | None, bool | None, bool | None]:
    with Verifier() as verifier:
        right = [x is not None and verifier.verify(f"Answer:\n{x}", task).score == 1 for x in said]
        found = by_rule(task, said, right, lambda x: verifier.verify(f"Answer:\n{x}", task).score == 1)
    return found["rows"], found["one"], found["generous"]


@pytest.mark.parametrize(
    ("said", "rows", "generous"),
    [
        # no try is right, each row has its majority
        (["one\ntwo\nx", "one\nx\nthree", "x\ntwo\nthree"], True, True),
        # the right answer is the commonest, yet loses a row
        (["one\ntwo\nthree", "one\ntwo\nthree", "one\ntwo\nx", "one\ny\nx", "one\nz\nx"], False, True),
        # two ties: the first seen, or the truth
        (["x\ntwo\nthree", "one\ntwo\nthree"], False, True),
        # the same, and no try is right
        (["x\ntwo\nthree", "one\ny\nthree"], False, True),
        (["one\nx\nthree", "x\ntwo\nthree", "y\ntwo\nthree", "y\nx\nthree", "y\ntwo\nthree"], False, False),
        (["ONE.\n\n two \nthree", "1\n2\n3"], True, True),
        # of other length: they do not vote on rows
        (["one\ntwo", "one\ntwo", "one\ntwo\nthree", "one\ntwo\nthree\nfour", None], True, True),
        (["x", None, "one\ntwo"], False, False),
        ([None, None], False, False),
        ([], False, False),
    ],
)
def test_rows_are_lines(said: list[str | None], rows: bool, generous: bool) -> None:
    assert asked(LINES, said) == (rows, None, generous)


def test_what_the_verifier_takes_is_right() -> None:
    said = ["uno\ntwo\nx", "uno\ny\nthree", "z\ntwo\nthree"]
    found = by_rule(LINES, said, [False] * 3, lambda x: x == "uno\ntwo\nthree")
    assert found == {"rows": True, "one": None, "generous": True}


def test_an_answer_of_one_row_has_no_rows() -> None:
    assert asked(SINGLE, ["5", "4", "4.0"]) == (None, None, True)
    assert asked(SINGLE, ["5", "4"]) == (None, None, True), "a tie goes to the truth"
    assert asked(SINGLE, ["5", "5", "4"]) == (None, None, False)
    assert asked(SINGLE, ["5", "5", "4.0", "4"]) == (None, None, True), "the same answer in another spelling"
    planted = Planted()
    item = next(iter(worlds.items(planted, 1, False, 0)))
    task = Task(Problem("p", item.problem), item.answer, "", item.family, "exact", worlds.entry(planted))
    assert asked(task, [item.answer]) == (None, None, True)
    assert planted.write_rows(item.problem, planted.read_rows(item.answer)) == item.answer


def test_rows_of_a_world_are_the_methods_that_they_name() -> None:
    a, b, c = OTHERS
    assert WORLD.read_rows(FAMILY.answer) == [RIGHT] * 3 and WORLD.read_rows("3 : q 1 2") == []
    assert WORLD.read_rows(FAMILY.answer + " 1") == [] == WORLD.read_rows("")
    # the digits of a row hang on the rows before: by their text no row would have a majority
    mixed = [target(x) for x in ([RIGHT, RIGHT, a], [RIGHT, a, RIGHT], [b, RIGHT, RIGHT])]
    assert asked(FAMILY, mixed) == (True, True, True)
    # each row has another majority, all together the right one
    some = [target(x) for x in ([a, RIGHT, b], [a, b, RIGHT], [RIGHT, b, RIGHT])]
    assert asked(FAMILY, some) == (False, True, True)
    # the other way round
    split = [
        target(x) for x in ([RIGHT, RIGHT, a], [RIGHT, a, RIGHT], [a, RIGHT, RIGHT], [a, a, b], [b, b, a])
    ]
    assert asked(FAMILY, split)[1:] == (True, True)
    most = [
        target(x)
        for x in ([RIGHT, RIGHT, a], [RIGHT, a, RIGHT], [a, RIGHT, RIGHT], [a, a, b], [b, b, a], [c, a, a])
    ]
    assert asked(FAMILY, most)[1] is False
    tied = [target(x) for x in ([a, a, a], [RIGHT, RIGHT, RIGHT])]
    assert asked(FAMILY, tied) == (False, False, True)
    assert asked(FAMILY, [target([a, RIGHT, a]), target([RIGHT, a, RIGHT])]) == (False, False, True)
    # a tie over all rows, where a row has no right one
    assert asked(FAMILY, [target([a, RIGHT, RIGHT]), target([a, RIGHT, a])]) == (False, False, True)
    assert asked(FAMILY, [target([a] * 3), target([a, RIGHT, RIGHT])]) == (False, False, False)
    # digits that do not follow from the method: the method has its vote
    assert asked(FAMILY, [f"3 : {RIGHT} 0 0 2 : {RIGHT} 0 0 1 : {RIGHT} 0 0", None]) == (True, True, True)
    assert asked(FAMILY, ["3 : x", None]) == (False, False, False)
