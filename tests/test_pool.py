"""mass-eval --pool: several evaluations put together, against counts by hand."""

import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from mass import arms, compare, evaluate, figures, pool, results, tally
from mass.errors import MassError

ARMS = ("none", "quest", "mass[inner.steps=1]")
# right answers of each arm, by folder
RIGHT = {
    "seed-0": ([0, 0, 1, 0], [1, 0, 1, 0], [1, 1, 1, 0]),
    "seed-1": ([1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 1]),
    "seed-2": ([0, 0], [1, 0], [1, 1]),
}


def row(i: int, score: int) -> dict[str, Any]:
    return {
        "position": i + 1,
        "id": f"p{i}",
        "score": float(score),
        "source": "ab"[i % 2],
        "error": None,
        "answer": "x",
        # the other count of the answers
        "solution": "13" if score else "12",
        "flops": 10 * (i + 1),
        "tokens": {"generated": 3 + i, "trained": 4},
        "seconds": {"generate": 0.5, "score": 0.25, "adapt": 0.0, "answer": 0.25},
        "examples": [],
        "truth": [],
        "tries": [],
        "reference": "12",
    }


def save(folder: Path, seed: int, names: tuple[str, ...], right: Any, trained: list[str]) -> Path:
    """An --out folder as mass-eval leaves it."""
    folder.mkdir(parents=True)
    rows = {name: [row(i, x) for i, x in enumerate(own)] for name, own in zip(names, right, strict=True)}
    for name, own in rows.items():
        (folder / arms.file_of(name)).write_text("".join(json.dumps(x) + "\n" for x in own))
    found = {
        "command": ["mass-eval", "--run", f"checkpoints/{folder.name}"],
        "seed": seed,
        "versions": {"mass": "1", "torch": f"2.{seed // 2}"},
        "weights": {name: f"checkpoints/{folder.name}/step_000001" for name in names},
        "problems": len(right[0]),
        "left_out": seed,
        "repeated": 1,
        **tally.results(rows, lambda row: row["source"] in trained),
    }
    # of the report a pool reads nothing else
    (folder / "results.json").write_text(json.dumps(found))
    return folder


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    return [
        save(
            tmp_path / name,
            i,
            ARMS if i else ARMS[::-1],
            right if i else right[::-1],
            ["a"] if i == 1 else [],
        )
        for i, (name, right) in enumerate(RIGHT.items())
    ]


def test_a_pool_counts_every_problem_of_every_seed(folders: list[Path]) -> None:
    found = pool.pooled(folders)
    flat = {name: [x for own in RIGHT.values() for x in own[i]] for i, name in enumerate(ARMS)}
    assert found["problems"] == 10 and (found["left_out"], found["repeated"]) == (3, 3)
    # in the order of the first folder
    assert [arm["arm"] for arm in found["arms"]] == list(ARMS[::-1])
    for arm in found["arms"]:
        own = flat[arm["arm"]]
        assert (arm["right"], arm["problems"]) == (sum(own), 10) and arm["interval"] == compare.interval(own)
        assert arm["tokens"] == pytest.approx((2 * sum(range(7, 11)) + 7 + 8) / 10)
    # the arms of a problem are paired within its own folder
    pair = next(x for x in found["comparisons"] if (x["arm"], x["against"]) == (ARMS[2], "none"))
    assert (pair["won"], pair["lost"]) == (2 + 2 + 2, 0) and pair["p"] == pytest.approx(2 / 2**6)
    assert next(x for x in found["comparisons"] if x["arm"] == "quest")["lost"] == 1
    # only the second run has trained on "a": another's problems of that name are held out all the same
    assert [(x["source"], x["trained"], x["problems"]) for x in found["sources"]] == [
        ("b", False, 5),
        ("a", False, 3),
        ("a", True, 2),
    ]
    mass = {x["trained"]: x["right"][ARMS[2]] for x in found["sources"] if x["source"] == "a"}
    assert mass == {True: 1, False: 1 + 1 + 1}
    assert [name for name, *_ in figures.groups(found)] == ["b", "a (not trained on)", "a (trained on)"]


def test_the_spread_over_seeds(folders: list[Path]) -> None:
    found = pool.pooled(folders)
    seeds = found["seeds"]
    assert [(x["folder"], x["seed"], x["problems"]) for x in seeds["folders"]] == [
        ("seed-0", 0, 4),
        ("seed-1", 1, 4),
        ("seed-2", 2, 2),
    ]
    mass = next(x for x in seeds["arms"] if x["arm"] == ARMS[2])
    shares = [0.75, 0.75, 1.0]
    assert [x["accuracy"][ARMS[2]] for x in seeds["folders"]] == shares
    # of the seeds, not of the problems: a seed of few problems counts as much
    assert mass["mean"] == pytest.approx(sum(shares) / 3)
    assert mass["deviation"] == pytest.approx(statistics.stdev(shares)) and 0.14 < mass["deviation"] < 0.15
    assert found["seed"] == "0, 1, 2" and found["versions"] == {"mass": "1", "torch": "2.0 or 2.1"}
    trained = " or ".join(f"checkpoints/seed-{i}/step_000001" for i in range(3))
    assert found["weights"] == dict.fromkeys(ARMS[::-1], trained)
    title, heads, cells = results.tables(found)[1]
    assert title == "Accuracy by training seed"
    assert heads == ["arm", "seed-0", "seed-1", "seed-2", "mean", "standard deviation"]
    assert cells[0] == [ARMS[2], "0.750", "0.750", "1.000", "0.833", "0.144"]


def test_a_pool_by_the_last_number(folders: list[Path]) -> None:
    found = pool.pooled(folders, "last-number")
    wrong = {name: [1 - x for own in RIGHT.values() for x in own[i]] for i, name in enumerate(ARMS)}
    assert {arm["arm"]: arm["right"] for arm in found["arms"]} == {name: sum(x) for name, x in wrong.items()}
    mass = next(x for x in found["seeds"]["arms"] if x["arm"] == ARMS[2])
    assert mass["mean"] == pytest.approx((0.25 + 0.25 + 0.0) / 3)


def test_a_pool_counts_an_arm_alike_in_every_folder(tmp_path: Path) -> None:
    """One folder's vote has a problem whose tries state nothing: there is no last number, so nowhere is it counted by one."""
    own = [save(tmp_path / f"seed-{i}", i, ("none", "vote"), ([1, 0], [1, 1]), []) for i in range(2)]
    for folder, silent in zip(own, (False, True), strict=True):
        path = folder / arms.file_of("vote")
        rows = [json.loads(line) | {"tries": [1.0, 0.0]} for line in path.read_text().splitlines()]
        if silent:
            rows[1] |= {"answer": None, "solution": "", "score": 0.0, "tries": [0.0, 0.0]}
        path.write_text("".join(json.dumps(x) + "\n" for x in rows))
    found = pool.pooled(own, "last-number")
    assert {arm["arm"]: arm["accuracy"] for arm in found["arms"]} == {"none": 0.5, "vote": 0.75}
    assert [x["accuracy"] for x in found["seeds"]["folders"]] == [
        {"none": 0.5, "vote": 1.0},
        {"none": 0.5, "vote": 0.5},
    ]
    assert next(x["mean"] for x in found["seeds"]["arms"] if x["arm"] == "vote") == 0.75


def test_the_command_writes_one_report(
    folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "all"
    words = ["--pool", *map(str, folders), "--out", str(out)]
    assert evaluate.main(words) == 0
    said = " ".join(capsys.readouterr().out.split())
    for part in (
        "10 problems",
        "Accuracy by training seed",
        "run.seed 0, 1, 2;",
        "checkpoints/seed-1/step_000001",
    ):
        assert part in said
    found = json.loads((out / "results.json").read_text())
    assert found["command"] == ["mass-eval", *words] and found["seeds"] == pool.pooled(folders)["seeds"]
    markdown = (out / "results.md").read_text()
    assert (
        "## Accuracy by training seed" in markdown
        and f"| {ARMS[2]} | 0.750 | 0.750 | 1.000 | 0.833 | 0.144 |" in markdown
    )
    assert "Accuracy by training seed" in (out / "results.html").read_text()
    assert evaluate.main(words) == 2 and "nothing is overwritten" in capsys.readouterr().err
    with pytest.raises(MassError, match="it is a pool itself"):
        pool.pooled([folders[0], out])


def test_folders_of_one_name_are_told_apart_by_their_paths(tmp_path: Path) -> None:
    own = [save(tmp_path / run / "evaluation", i, ("none",), ([1, 0],), []) for i, run in enumerate("ab")]
    labels = [x["folder"] for x in pool.pooled(own)["seeds"]["folders"]]
    assert labels == [str(x) for x in own]


def test_what_cannot_be_pooled_is_named(
    folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, third = folders
    with pytest.raises(MassError, match="give two folders or more"):
        pool.pooled([first])
    with pytest.raises(MassError, match=r"seed-0/\.\./seed-0 twice|seed-0 twice"):
        pool.pooled([first, second, second / ".." / "seed-0"])
    other = save(tmp_path / "other", 3, ("none", "mass"), ([1], [1]), [])
    with pytest.raises(
        MassError, match=r"other arms \(mass, mass\[inner.steps=1\], quest in one of them alone\)"
    ):
        pool.pooled([first, other])
    (tmp_path / "empty").mkdir()
    with pytest.raises(MassError, match="empty: there is no results.json of a finished mass-eval"):
        pool.pooled([first, tmp_path / "empty"])
    for name in ("bare-0", "bare-1"):
        (tmp_path / name).mkdir()
        found = json.loads((first / "results.json").read_text())
        (tmp_path / name / "results.json").write_text(json.dumps(found | {"arms": []}))
    with pytest.raises(MassError, match="no arms, only --credit"):
        pool.pooled([tmp_path / "bare-0", tmp_path / "bare-1"])
    lines = (third / "none.jsonl").read_text().splitlines(True)
    (third / "none.jsonl").write_text("".join(reversed(lines)))
    with pytest.raises(MassError, match="have answers to other problems"):
        pool.pooled([first, third])
    (third / "none.jsonl").unlink()
    with pytest.raises(MassError, match="none.jsonl is missing"):
        pool.pooled([first, third])
    for more, sentence in (
        (["--run", "r"], "leave --run out"),
        (["inner.steps=1"], "there is no results.json"),
        ([], "for the report: --out FOLDER"),
    ):
        out = ["--out", str(tmp_path / "new")] if more else []
        assert evaluate.main(["--pool", str(first), str(second), *more, *out]) == 2
        assert sentence in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
