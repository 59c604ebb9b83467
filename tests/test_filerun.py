"""mass.filerun: a file of problems in batches, and the file of answers that outlives kills and is shared by processes."""

import argparse
import json
import os
import re
import signal
import threading
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from chain import save_chain, save_problems
from ranks import Ranks

from mass import command, filerun
from mass import share as share_module
from mass.errors import MassError
from mass.filerun import (
    adapt_problems,
    append,
    as_line,
    as_row,
    group,
    key_of,
    put_in_order,
    read_done,
    run_batches,
)
from mass.methods import Record
from mass.problems import BadLine, Problem
from mass.wanted import plan

ITEMS = (
    [Problem(str(i), "x" * i) for i in (3, 1, 2)]
    + [BadLine(4, "no", "")]
    + [Problem("5", "", (("aa", "bb"),))]
)
KEYS = [key_of(item, "s") for item in ITEMS]


def line(place: int, keys: Sequence[str] = KEYS, text: str = "") -> str:
    return as_line(as_row(place, keys[place], Record(str(place), text, "none")))


def test_batches_hold_bad_lines_first_then_the_longest() -> None:
    assert group(ITEMS, 2) == [[3], [4, 0], [2, 1]]
    assert group(ITEMS, 100) == [[3], [4, 0, 2, 1]] and group([], 3) == []


def test_records_come_as_batches_finish(monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[list[str]] = []

    def solve(kit: Any, problems: Sequence[Problem], method: str, *, baselines: bool) -> list[Record]:
        batches.append([p.id for p in problems])
        return [Record(p.id, p.text, method) for p in problems]

    monkeypatch.setattr(filerun, "solve", solve)
    items = [
        Problem("a", "1"),
        BadLine(2, "bad", "x"),
        Problem("b", "1 + 1 + 1"),
        BadLine(4, "bad", ""),
        Problem("c", "1 + 1"),
    ]
    found = adapt_problems(None, items, "none", 2)  # type: ignore[arg-type]
    # what needs no model first, then the longest
    assert [next(found).id, next(found).id] == ["line 2", "line 4"] and batches == []
    assert next(found).id == "b" and batches == [["b", "c"]]
    assert [r.id for r in found] == ["c", "a"] and batches == [["b", "c"], ["a"]]


def test_key_depends_on_all_of_the_problem_and_on_the_settings() -> None:
    one = Problem("i", "t", (("a", "b"),))
    others = [
        Problem("j", "t", (("a", "b"),)),
        Problem("i", "u", (("a", "b"),)),
        Problem("i", "t", (("a", "c"),)),
    ]
    keys = {key_of(item, "s") for item in [one, *others, BadLine(1, "r", "t")]}
    assert len(keys) == 5 and key_of(one, "s") == key_of(Problem("i", "t", (("a", "b"),)), "s")
    assert key_of(one, "s").partition(".")[0] == key_of(one, "z").partition(".")[0] != key_of(one, "z")


def test_a_line_torn_anywhere_is_done_again_and_nothing_else(tmp_path: Path) -> None:
    whole = "".join(line(place) + "\n" for place in (2, 0, 1)).encode()
    last = len((line(1) + "\n").encode())
    for cut in range(1, last + 1, 7):
        path = tmp_path / f"{cut}"
        path.write_bytes(whole[: len(whole) - cut])
        assert read_done(path, KEYS) == {2, 0}
        append(path, [line(1)])
        assert path.read_bytes() == whole and read_done(path, KEYS) == {0, 1, 2}
    # also by a process that appends without having read it
    (tmp_path / "torn").write_bytes(whole[:-20])
    append(tmp_path / "torn", [line(3)])
    assert read_done(tmp_path / "torn", KEYS) == {0, 2, 3}


def test_a_torn_first_line_longer_than_a_block(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text(line(0, text="y" * 200_000)[:-5])
    assert read_done(path, KEYS) == set() and path.read_bytes() == b""


def test_other_files_are_refused_and_stay_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "out"
    other = [key_of(Problem("z", "z"), "s")] * 5
    cases = [
        (line(0) + "\nmy notes\n", "line 2: no answer of a mass-adapt --out"),
        ('{"a": 1}\n', "line 1: no answer of"),
        ("my notes", "ends in a line that no mass-adapt --out has written"),
        (line(0) + "\n" + line(1, other) + "\n", "line 2: the answer to problem 2 of another file"),
        (as_line(as_row(9, KEYS[0], Record("", "", ""))) + "\n", "line 1: the answer to problem 10 of another"),
        (line(2, [key_of(item, "t") for item in ITEMS]) + "\n", "answered with another method, other weights"),
    ]  # fmt: skip
    for text, sentence in cases:
        path.write_text(text)
        for act in (lambda: read_done(path, KEYS), lambda: put_in_order(path, KEYS)):
            with pytest.raises(MassError, match=sentence):
                act()
        assert path.read_text() == text


def test_order_comes_when_nothing_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "out"
    assert read_done(path, KEYS) == set() and not path.exists()
    append(path, [line(4), line(1)])
    append(path, [line(0), line(2)])
    assert not put_in_order(path, KEYS) and read_done(path, KEYS) == {0, 1, 2, 4}
    # one line twice: two calls at work on the same file
    append(path, [line(3), line(1, text="again")])
    assert put_in_order(path, KEYS)
    assert path.read_text().splitlines() == [line(place) for place in range(5)]
    assert os.listdir(tmp_path) == ["out"] and put_in_order(path, KEYS)


def test_lines_of_many_writers_do_not_mix(tmp_path: Path) -> None:
    path, keys = tmp_path / "out", [key_of(Problem(str(i), "p"), "s") for i in range(400)]

    def write(start: int) -> None:
        for place in range(start, 400, 8):
            append(path, [line(place, keys, "z" * 3000)])
            put_in_order(path, keys)

    threads = [threading.Thread(target=write, args=(start,)) for start in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [json.loads(text)["position"] for text in path.read_text().splitlines()] == [*range(1, 401)]


def test_ten_thousand_problems_are_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def solve(kit: Any, problems: Sequence[Problem], method: str, *, baselines: bool) -> list[Record]:
        seen.append(len(problems))
        return [Record(p.id, p.text, method, solution="s" * 5_000) for p in problems]

    monkeypatch.setattr(filerun, "solve", solve)
    items = [Problem(str(i), f"problem {i}") for i in range(10_000)]
    keys = [key_of(item, "s") for item in items]
    path = tmp_path / "out"
    tracemalloc.start()
    for found in run_batches(None, items, group(items, 100), "none"):  # type: ignore[arg-type]
        append(path, [as_line(as_row(place, keys[place], record)) for place, record in found])
    assert put_in_order(path, keys)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # all answers together are 50 MB
    assert seen == [100] * 100 and peak < 12e6 and path.stat().st_size > 50e6
    assert [row["id"] for row in filerun.rows(path)][::1000] == [str(i) for i in range(0, 10_000, 1000)]


def test_too_little_memory_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def solve(*_: Any, **__: Any) -> list[Record]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(filerun, "solve", solve)
    with pytest.raises(
        MassError, match=r"3 problems together .*\(CUDA out of memory\): use a smaller --batch"
    ):
        list(run_batches(None, ITEMS[:3], [[0, 1, 2]], "none"))  # type: ignore[arg-type]


# ---- whole runs, killed and shared


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A call on 22 problems (and a line that is none) that really adapts."""
    folder = tmp_path_factory.mktemp("filerun")
    problems = save_problems(folder / "p.jsonl", 22)
    with problems.open("a") as file:
        file.write("no json\n")
    return ["--model", str(save_chain(folder / "chain")), "--file", str(problems), "--batch", "4", "--no-baselines", "model.dtype=fp32",
            "prompt.style=plain", "generate.examples=3", "generate.max_new_tokens=16", "generate.answer_tokens=8"]  # fmt: skip


def killed(argv: list[str], calls: int, bytes_more: int) -> None:
    """`mass-adapt` that is killed in its write number `calls`, of which `bytes_more` bytes arrive."""
    real = filerun.append
    counted = []

    def append(path: Path, lines: Sequence[str]) -> None:
        counted.append(path)
        if len(counted) < calls:
            real(path, lines)
            return
        with open(path, "ab") as file:
            file.write("".join(line + "\n" for line in lines).encode()[:bytes_more])
        os.kill(os.getpid(), signal.SIGKILL)

    filerun.append = append
    command.main(argv)


def killed_second(argv: list[str], calls: int, bytes_more: int) -> None:
    """The same, where rank 1 alone is killed."""
    if os.environ["RANK"] == "1":
        killed(argv, calls, bytes_more)
    command.main(argv)


def answers(path: Path) -> list[dict[str, Any]]:
    return [{**json.loads(text), "seconds": None} for text in path.read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.multiprocess
def test_killed_and_shared_runs_end_as_one_that_was_left_alone(
    ranks: Ranks, words: list[str], tmp_path: Path
) -> None:
    paths = {name: tmp_path / f"{name}.jsonl" for name in ("alone", "two", "killed", "one_of_two")}
    own = {name: [*words, "--out", str(path)] for name, path in paths.items()}
    alone = ranks("mass.command:main", own["alone"]).good()
    wanted = answers(paths["alone"])
    assert [row["position"] for row in wanted] == [*range(1, 24)] and wanted[22]["error"]
    assert sum(bool(row["steps"]) for row in wanted) > 10 and "23 problems in" in alone.err[0]

    shared = ranks("mass.command:main", own["two"], world=2).good()
    # each had its share, and standard output is nobody's
    assert [line.count("problems in") for line in shared.err] == [1, 1] and shared.out == ["", ""]
    assert answers(paths["two"]) == wanted

    # kill -9 again and again, inside of lines and between them; the third resumed run ends
    for calls, more in ((3, 700), (1, 0), (3, 2000)):
        assert ranks("test_filerun:killed", [*own["killed"], "--resume"], calls, more).codes == [
            -signal.SIGKILL
        ]
    assert 8 <= paths["killed"].read_bytes().count(b"\n") < 23
    last = ranks("mass.command:main", [*own["killed"], "--resume"]).good()
    assert "of 23 problems have their answer" in last.err[0]
    assert answers(paths["killed"]) == wanted
    # nothing is left to do, and no model is loaded for it
    before = paths["killed"].read_bytes()
    again = ranks(
        "mass.command:main", [*own["killed"], "--resume", "--html", str(tmp_path / "p.html")]
    ).good()
    assert "23 of 23" in again.err[0] and again.out == [""] and paths["killed"].read_bytes() == before
    assert (tmp_path / "p.html").read_text().count("<article>") == 23

    # one of two dies, the other does its part; one process ends it
    half = ranks("test_filerun:killed_second", own["one_of_two"], 2, 500, world=2)
    assert half.codes == [0, -signal.SIGKILL]
    ranks("mass.command:main", [*own["one_of_two"], "--resume"]).good()
    assert answers(paths["one_of_two"]) == wanted


def test_resume_wants_the_same_call(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out.jsonl"

    def stop(*_: Any, **__: Any) -> Iterator[Any]:
        raise MassError("stopped")

    assert command.main([*words, "--out", str(path), "--resume", "--method", "none"]) == 0
    # killed when all was answered, but before the lines were put in order
    answers = path.read_text().splitlines(True)
    path.write_text("".join(reversed(answers)))
    assert command.main([*words, "--out", str(path), "--resume", "--method", "none"]) == 0
    assert path.read_text().splitlines(True) == answers and len(answers) > 1
    monkeypatch.setattr(command, "run_batches", stop)
    cases = [
        (["--out", str(path), "--method", "none"], "go on with it by --resume"),
        (["--out", str(path), "--resume", "--method", "vote"], "answered with another method"),
        (["--out", str(path), "--resume", "--method", "none", "inner.lr=0.5"], "other settings"),
        (["--resume"], "--resume goes on with the answers to a file"),
        (["--html", str(path)], "--html .* exists"),
    ]  # fmt: skip
    for more, sentence in cases:
        assert command.main([*words, *more]) == 2
        assert re.search(sentence, capsys.readouterr().err)
    baselines = [word for word in words if word != "--no-baselines"]
    assert command.main([*baselines, "--out", str(path), "--resume", "--method", "none"]) == 2
    assert "answered with another method" in capsys.readouterr().err
    # what changes no answer may change
    speed = ["--batch", "7", "run.threads=2", "generate.batch_rows=3", "inner.checkpoint=false"]
    assert command.main([*words, "--out", str(path), "--resume", "--method", "none", *speed]) == 0


def test_a_process_with_a_gpu_of_its_own_gives_the_recipe_a_device_that_it_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    state = SimpleNamespace(device=torch.device("cuda", 1), process_index=1, num_processes=2)
    monkeypatch.setattr(share_module, "PartialState", lambda **_: state)
    monkeypatch.setenv("WORLD_SIZE", "2")
    share, overrides = command._processes(argparse.Namespace(out=Path("answers.jsonl"), html=None))
    assert share == command.Share(1, 2)
    wanted = plan(None, "tiny:llama", [*overrides, "prompt.style=plain"])
    assert wanted.recipe.model.device == "cuda"
