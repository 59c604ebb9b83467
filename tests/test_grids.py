"""mass.grids and mass.demonstrations: views that can be undone, and the forms in which demonstrations come."""

import json
from pathlib import Path

import numpy as np
import pytest

from mass import demonstrations, grids
from mass.errors import MassError
from mass.grids import SYMMETRIES, View
from mass.problems import BadLine, Problem, content_key, load_problems, load_tasks

GRID = "0 1 2\n3 4 5"


def test_views_are_undone_exactly() -> None:
    draw = np.random.default_rng(0)
    seen = set()
    for name in SYMMETRIES:
        view = View(name, (0, *(int(c) for c in draw.permutation(np.arange(1, 10)))))
        assert view.undo(view.apply(GRID)) == GRID
        seen.add(View(name).apply(GRID))
    # the eight symmetries of a rectangle without any of its own are eight pictures
    assert len(seen) == 8
    assert View("rotate 90").apply(GRID) == "2 5\n1 4\n0 3"
    assert View("anti-transpose").apply(GRID) == "5 2\n4 1\n3 0"
    assert View("identity", (0, 2, 1, *range(3, 10))).apply(GRID) == "0 2 1\n3 4 5"
    for text in ("word", "0 1\n2", ""):
        assert grids.read(text) is None
        with pytest.raises(ValueError, match="not a grid"):
            View("transpose").undo(text)


def test_majority_by_row_and_by_column() -> None:
    said = ["1 1\n2 2", "1 1\n3 3", "4 4\n2 2", "9 9 9"]
    assert grids.by_majority(said) == ["1 1\n2 2", "1 1\n2 2"]
    # columns (1 2), (3 2), (3 2) at the left; (1 1), (1 1), (5 5) at the right
    assert grids.by_majority(["1 1\n2 1", "3 1\n2 1", "3 5\n2 5"]) == ["1 1\n2 1", "3 1\n2 1"]
    assert grids.by_majority(["no"]) == []


def arc(tests: int = 1) -> dict[str, object]:
    pair = {"input": [[0, 1], [2, 0]], "output": [[1, 0], [0, 2]]}
    return {
        "id": "a1",
        "source": "arc_agi_1",
        "split": "training",
        "train": [pair, pair],
        "test": [pair] * tests,
    }


def test_arc_file_runs_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "training.jsonl"
    bad = {**arc(), "id": "b", "test": [{"input": [[0, 10]], "output": [[1]]}]}
    file.write_text("".join(json.dumps(row) + "\n" for row in (arc(), bad, arc(2))))
    first, broken, *two = load_problems(str(file))
    shown = (("0 1\n2 0", "1 0\n0 2"),) * 2
    assert first == Problem("a1", "0 1\n2 0", shown, True)
    assert isinstance(broken, BadLine) and broken.line == 2 and "'input' is not a grid" in broken.reason
    assert [p.id for p in two if isinstance(p, Problem)] == ["a1:1", "a1:2"]
    file.write_text(json.dumps(arc()) + "\n")
    (task,) = load_tasks(str(file))
    assert task.answer == "1 0\n0 2" and task.solution == "Answer:\n1 0\n0 2" and task.verifier == "exact"
    assert task.problem == first


def test_solved_problems_demonstrate_the_others_of_their_subject(tmp_path: Path) -> None:
    file = tmp_path / "test.jsonl"
    rows = [
        {"id": f"{s}{i}", "problem": f"{s} {i}?", "answer": f"({s})", "source": "bbh", "subject": s}
        for s in "AB"
        for i in range(4)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert all(isinstance(p, Problem) and not p.demonstrations for p in load_problems(str(file)))
    found = load_problems(str(file), demonstrations=2, seed=1)
    assert len(found) == 4
    for p in found:
        assert isinstance(p, Problem) and len(p.demonstrations) == 2 and not p.grids
        assert {output for _, output in p.demonstrations} == {f"({p.id[0]})"}
        assert p.text not in [given for given, _ in p.demonstrations]
    assert found == load_problems(str(file), demonstrations=2, seed=1)
    tasks = load_tasks(str(file), demonstrations=2, seed=1)
    assert [t.problem for t in tasks] == found and all(t.answer == f"({t.problem.id[0]})" for t in tasks)
    with pytest.raises(
        MassError, match=r"problems.demonstrations=4 .* subject 'A' has 4 with an answer among 4"
    ):
        load_problems(str(file), demonstrations=4)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_repeated_problem_is_not_asked_beside_its_own_answer(tmp_path: Path, count: int) -> None:
    """Each problem is there three times, once in other letters: what is shown is asked nowhere, and shown once."""
    file = tmp_path / "twice.jsonl"
    rows = [
        {"problem": f"{word} {i}?", "answer": f"{i}"} for i in range(5) for word in ("How", "how ", "How")
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for seed in range(5):
        found = load_problems(str(file), demonstrations=count, seed=seed)
        assert len(found) == 3 * (5 - count)
        for p in found:
            assert isinstance(p, Problem)
            shown = {content_key(given) for given, _ in p.demonstrations}
            assert len(shown) == count == len(p.demonstrations) and content_key(p.text) not in shown
    with pytest.raises(MassError, match="this file has 5 with an answer among 5. Lower it"):
        load_problems(str(file), demonstrations=5)


@pytest.mark.parametrize("data", [b"", b" \n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n\n"])
def test_a_file_without_a_line_is_empty(tmp_path: Path, data: bytes) -> None:
    file = tmp_path / "none.jsonl"
    file.write_bytes(data)
    with pytest.raises(MassError, match="none.jsonl is empty"):
        load_problems(str(file))


def test_demonstrations_are_read_as_problems_are(tmp_path: Path) -> None:
    """By the columns of each row, and a text that states an answer gives the answer."""
    file = tmp_path / "own.jsonl"
    rows = [{"problem": f"{i}?", "answer": f"work <<1+1=2>>2\n#### {i}"} for i in range(6)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for columns in (None, {"problem": "question"}):
        tasks = load_tasks(str(file), demonstrations=2, columns=columns)
        assert len(tasks) == 4 and all(len(t.problem.demonstrations) == 2 for t in tasks)
        assert {(p, f"{a}?") for t in tasks for p, a in t.problem.demonstrations} == {
            (f"{i}?", f"{i}?") for i in range(6) if f"{i}?" not in {t.problem.text for t in tasks}
        }


def test_a_problem_that_is_no_text_is_one_bad_line_beside_demonstrations_too(tmp_path: Path) -> None:
    file = tmp_path / "odd.jsonl"
    rows = [{"problem": f"{i}?\ud800" if i == 3 else f"{i}?", "answer": str(i)} for i in range(7)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for seed in range(4):
        found = load_problems(str(file), demonstrations=2, seed=seed)
        assert len(found) == 5
        # whether the line is shown or asked, what holds it cannot be used
        bad = [x for x in found if isinstance(x, BadLine)]
        assert len(bad) in (1, 5)


def test_demonstrations_are_grids_only_where_all_are() -> None:
    grid = [[1, 2], [3, 4]]
    assert demonstrations.pairs({"demonstrations": [[grid, grid]]}) == ((("1 2\n3 4", "1 2\n3 4"),), True)
    assert demonstrations.pairs({"demonstrations": [[grid, "x"]]})[1] is False
    assert demonstrations.pairs({"demonstrations": [["1 2\n3 4", "1"]]})[1] is False
    for odd in (["hi", "no"], {"ab": 1}, "text", [{"input": "1"}]):
        with pytest.raises(ValueError, match="is not a list of"):
            demonstrations.pairs({"demonstrations": odd})
    for wrong in ([[1, 2], [3]], [[True]], [[0.5]], [], [[]], [[10]]):
        with pytest.raises(ValueError, match="is not a grid"):
            demonstrations.pairs({"demonstrations": [[wrong, "x"]]})
