"""mass-eval --credit and the learning curves, on a run that was trained in a few steps: rows, numbers, files, page."""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from folders import make_tiny_run
from ranks import Ranks
from scipy import stats

from mass import attribution, compare, curves, evaluate, figures, results, tally
from mass.errors import MassError
from mass.wanted import plan

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="module")
def run(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The families world with its small base: 4 steps of 4 tasks."""
    folder = tmp_path_factory.mktemp("runs")
    words = [
        "recipes/families.yaml",
        f"run.folder={folder}",
        f"model.path={DATA / 'families'}",
        "outer.steps=4",
        "outer.tasks=4",
        "evaluate.every=2",
        "save.every=2",
        "problems.heldout_size=12",
        "evaluate.problems=4",
        "log.tensorboard=false",
        "log.samples_every=0",
        "meta_gradient.mode=reverse",
    ]
    ranks("mass.console:train", words, limit=300).good()
    return folder / "families"


@pytest.fixture(scope="module")
def done(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """--credit beside an arm."""
    out = tmp_path_factory.mktemp("credit") / "out"
    assert (
        evaluate.main(
            ["--run", str(run), "--methods", "mass", "--credit", "9", "--batch", "4", "--out", str(out)]
        )
        == 0
    )
    return out


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def by_problem(found: Mapping[str, Any]) -> list[list[dict[str, Any]]]:
    return [[row for row in found["examples"] if row["place"] == p] for p in range(len(found["problems"]))]


def test_there_is_a_row_for_each_example_that_the_method_mass_trains_on(done: Path) -> None:
    found = read(done / "credit.json")
    arm = [json.loads(line) for line in (done / "mass.jsonl").read_text().splitlines()]
    assert len(found["problems"]) == 9 and len(arm) == 12
    assert (found["engine"], found["steps"], found["asked"]) == ("reverse", 2, 8)
    for problem, rows, answered in zip(found["problems"], by_problem(found), arm, strict=False):
        assert problem["id"] == answered["id"] and problem["valid"] == len(rows) > 5
        trained = [i for i, e in enumerate(answered["examples"]) if e["valid"]]
        assert [row["example"] for row in rows] == trained
        for row in rows:
            made = answered["examples"][row["example"]]
            assert (row["problem"], row["solution"]) == (made["problem"], made["solution"])
            assert row["weight"] == pytest.approx(made["weight"], rel=1e-3)
            truth = answered["truth"][row["example"]]
            assert row["good"] == (truth[0] and truth[1])
            assert row["tokens"] > 3 and row["weight_uniform"] == pytest.approx(8 / len(rows))
        for key in ("credit", "credit_uniform"):
            credits = [row[key] for row in rows]
            assert None in credits or sum(credits) == pytest.approx(0, abs=1e-5)


def test_the_credit_of_a_sound_world_is_right_and_better_than_one_step(done: Path) -> None:
    found = read(done / "results.json")["credit"]
    own = {x["measure"]: x for x in found["measures"]}
    exact, dot = own["meta-gradient, uniform weights"], own["one-step dot product"]
    assert exact["with_change_uniform"]["mean"] > 0.9 and exact["auc"] > 0.95
    assert exact["with_change_uniform"]["mean"] > dot["with_change_uniform"]["mean"] > 0.4
    assert own["meta-gradient, scorer's weights"]["with_change"]["mean"] > 0.7
    assert own["left out, uniform weights"]["auc"] > 0.95
    for x in found["smoothness"]:
        assert (
            0.9 < x["agreement"]["mean"] <= 1 and x["slope"] > 0.9 and x["loss"] < found["loss_before"] + 0.1
        )


def test_the_summary_is_that_of_the_rows(done: Path) -> None:
    found, shown = read(done / "credit.json"), read(done / "results.json")["credit"]
    assert json.loads(json.dumps(attribution.summary(found))) == shown
    groups = by_problem(found)
    for (key, name), x in zip(attribution.MEASURES.items(), shown["measures"], strict=True):
        assert x["measure"] == name
        for other in ("change", "change_uniform"):
            values = []
            for rows in groups:
                pairs = np.array(
                    [(row[key], row[other]) for row in rows if None not in (row[key], row[other])]
                )
                if len(pairs) > 2:
                    ranks = stats.rankdata(pairs, axis=0)
                    values.append(np.corrcoef(ranks.T)[0, 1])
            if key == other:
                assert x[f"with_{other}"] is None
            else:
                got = x[f"with_{other}"]
                assert got["mean"] == pytest.approx(np.mean(values)) and got["problems"] == len(values) > 5
                assert got["interval"] == pytest.approx(list(compare.interval(values) or ()))
        won = pairs_of = 0.0
        for rows in groups:
            good, bad = (
                [row[key] for row in rows if row["good"] is g and row[key] is not None] for g in (True, False)
            )
            if good and bad:
                won += stats.mannwhitneyu(good, bad).statistic
                pairs_of += len(good) * len(bad)
        assert x["auc"] == pytest.approx(won / pairs_of)


def example(
    place: int, value: float | None, change: float | None, tokens: int, good: bool | None
) -> dict[str, Any]:
    keys = ("credit", "credit_uniform", "one_step", "score")
    return {"place": place, "example": 0, "tokens": tokens, "good": good, **dict.fromkeys(keys, value),
            "change": change, "change_uniform": change, "weight": 1.0, "weight_uniform": 1.0}  # fmt: skip


def test_numbers_that_are_not_there_take_no_part() -> None:
    """Three problems by hand: one in order, one that exploded, one of two examples; lengths fall with the credit."""
    empty = {"loss_before": 1.0, "loss": 0.5, "loss_uniform": 0.75, "exploded": False, "exploded_uniform": False,
             **{f"{key}{end}": 0.5 for key in ("agreement", "curvature", "moved", "slope") for end in ("", "_uniform")}}  # fmt: skip
    lost = empty | {"exploded": True, "agreement": None, "curvature": None, "moved": None, "slope": None}
    found = {
        "engine": "reverse", "steps": 2, "reach": 0.1, "asked": 4, "too_long": 0,
        "problems": [empty, lost, empty | {"curvature": 0.1, "slope": -1.0}],
        "examples": [example(0, 0.1, 1.0, 9, False), example(0, 0.2, 3.0, 8, True), example(0, 0.3, 4.0, 7, True),
                     example(0, 0.4, 2.0, 6, None), *[example(1, None, None, 5, True)] * 4,
                     example(2, 0.1, 0.3, 5, False), example(2, 0.2, 0.1, 5, True)],
    }  # fmt: skip
    x = attribution.summary(found)
    first = x["measures"][0]
    assert first["with_change"] == {"mean": pytest.approx(0.4), "interval": None, "problems": 1}
    assert first["with_length"]["mean"] == pytest.approx(-1) and first["auc"] == 1.0
    # of the truth: 3 and 4 above 1 in one problem, 0.1 under 0.3 in another
    assert x["measures"][4]["auc"] == pytest.approx(2 / 3)
    assert (x["known"], x["good"], x["loss_before"]) == (9, pytest.approx(7 / 9), 1.0)
    scorer, uniform = x["smoothness"]
    assert (scorer["exploded"], scorer["agreement"]["problems"], scorer["curvature"]) == (
        1,
        2,
        pytest.approx(0.3),
    )
    assert (uniform["exploded"], uniform["agreement"]["problems"], uniform["curvature"]) == (0, 3, 0.5)
    assert scorer["slope"] is None and len(x["points"]) == 3 and x["points"][1]["change"] == [None] * 4
    drawn = figures.figures({"arms": [], "sources": [], "credit": x})
    assert [plot.name for plot in drawn] == ["credit-against-the-true-change"] and "not known" in drawn[
        0
    ].element


def test_the_batch_size_changes_nothing_but_rounding(run: Path, done: Path) -> None:
    """Nor do the outer loss and the truncation of training, nor a learned inner rate that is the recipe's."""
    wanted = plan(str(run), None, ["outer.loss=verifier", "meta_gradient.truncate=1"])
    inner = replace(wanted.recipe.inner, learned_lr="layer")
    wanted = replace(wanted, recipe=replace(wanted.recipe, inner=inner))
    tasks = attribution.choose(wanted, evaluate.held_out(wanted, [], made=False).tasks, 3)
    alone = attribution.measure(wanted, tasks, 1)
    together = read(done / "credit.json")
    for rows, others in zip(by_problem(alone), by_problem(together), strict=False):
        for key in ("credit_uniform", "change_uniform", "one_step", "score"):
            a, b = (np.array([row[key] for row in some], float) for some in (rows, others))
            np.testing.assert_allclose(a, b, rtol=0.02, atol=0.01 * np.nanmax(np.abs(b)))


def test_without_an_inner_loop_there_is_no_credit(run: Path) -> None:
    wanted = plan(str(run), None, ["inner.steps=0"])
    with pytest.raises(MassError, match="inner.steps=0 takes none"):
        attribution.choose(wanted, evaluate.held_out(wanted, [], made=False).tasks, 3)


def test_the_engine_of_a_run_without_an_inner_loop_is_not_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = plan(str(make_tiny_run(tmp_path)), None, ["inner.steps=1"])
    for saved in (["none", True, False], None):
        monkeypatch.setattr(
            attribution.checkpoint, "read_meta", lambda step, x=saved: {"extra": {"engine": x}}
        )
        with pytest.raises(
            MassError, match="does not say which .* the run chose: add meta_gradient.mode=reverse"
        ):
            attribution.choose(wanted, [], 1)


def test_problems_without_a_valid_example_have_no_numbers(run: Path) -> None:
    wanted = plan(str(run), None, ["generate.max_new_tokens=1"])
    tasks = attribution.choose(wanted, evaluate.held_out(wanted, [], made=False).tasks, 2)
    found = attribution.measure(wanted, tasks, 4)
    assert found["examples"] == [] and [x["valid"] for x in found["problems"]] == [0, 0]
    shown = attribution.summary(found)
    assert shown["loss_before"] is None and all(x["with_length"] is None for x in shown["measures"])
    cells = results.tables({"arms": [], "sources": [], "credit": shown})
    assert all(set(row[1:]) == {"-"} for row in cells[0][2])


def test_where_the_inner_loop_exploded_there_is_no_credit_and_no_truth(run: Path) -> None:
    wanted = plan(str(run), None, ["inner.lr=500", "inner.clip=1"])
    tasks = attribution.choose(wanted, evaluate.held_out(wanted, [], made=False).tasks, 3)
    found = attribution.measure(wanted, tasks, 4)
    exploded = [problem["exploded_uniform"] for problem in found["problems"]]
    assert any(exploded)
    for problem, lost, rows in zip(found["problems"], exploded, by_problem(found), strict=True):
        for key in ("agreement", "curvature", "moved", "slope"):
            assert (problem[f"{key}_uniform"] is None) == lost
        for key in ("credit", "change"):
            assert {row[f"{key}_uniform"] is None for row in rows} == {lost}
        assert None not in [row["score"] for row in rows]


def test_a_problem_that_does_not_fit_is_left_out_and_counted(run: Path) -> None:
    wanted = plan(str(run), None)
    tasks = attribution.choose(wanted, evaluate.held_out(wanted, [], made=False).tasks, 2)
    long = replace(tasks[0], problem=replace(tasks[0].problem, text=" ".join([tasks[0].problem.text] * 80)))
    found = attribution.measure(wanted, [long, tasks[1]], 4)
    assert found["too_long"] == 1 and [x["id"] for x in found["problems"]] == [tasks[1].problem.id]


# ---- files and page


def test_alone_it_answers_nothing_and_writes_every_file(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert evaluate.main(["--run", str(run), "--credit", "3", "--out", str(out)]) == 0
    said = capsys.readouterr()
    assert "Is the credit right? 3 problems" in said.out and "3 problems (" in said.out
    assert "Accuracy" not in said.out and "copied" not in said.out and "arms" not in said.err
    names = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    plots = ["figures/credit-against-the-true-change.svg", "figures/learning-curves.svg"]
    assert names == ["credit.json", *plots, "results.html", "results.json", "results.md"]
    assert read(out / "results.json")["arms"] == []


def test_the_report_shows_it_and_every_plot_is_a_file_too(done: Path) -> None:
    found = read(done / "results.json")
    titles = [title for title, _, _ in results.tables(found)]
    assert titles[0] == "12 problems" and titles[-2] == "Is the credit right? 9 problems, reverse, K = 2"
    markdown, page = (done / "results.md").read_text(), (done / "results.html").read_text()
    own = found["credit"]["measures"][1]
    mean, (low, high) = own["with_change_uniform"]["mean"], own["with_change_uniform"]["interval"]
    assert (
        f"{mean:.3f} [{low:.3f}, {high:.3f}]" in markdown
        and f"<td>{mean:.3f}\n[{low:.3f}, {high:.3f}]</td>" in page
    )
    assert "arXiv 2503.13751" in page and "McNemar" in page
    plots = figures.figures(found)
    assert [plot.title for plot in plots][-2:] == ["Credit against the true change", "Learning curves"]
    assert page.count("<svg") == len(plots) == len(list((done / "figures").iterdir())) > 3
    for plot in plots:
        path = done / "figures" / f"{plot.name}.svg"
        assert f"![{plot.title}](figures/{plot.name}.svg)" in markdown and plot.element in page
        tree = ElementTree.fromstring(path.read_text())
        first = tree[0]
        assert tree.tag == "{http://www.w3.org/2000/svg}svg"
        # black on white whatever shows it
        assert first.tag.endswith("rect") and first.attrib == {
            "width": "100%",
            "height": "100%",
            "fill": "#ffffff",
        }
        text = path.read_text()
        assert figures.INK not in text and "currentColor" not in text and figures.PAPER_INK in text
    assert not re.search(r"<script|url\((?!#)|@import|https?://", page)
    ids = re.findall(r'\bid="([^"]+)"', page)
    used = set(re.findall(r"url\(#([^)]+)\)|href=\"#([^\"]+)\"", page))
    assert len(ids) == len(set(ids)) and {a or b for a, b in used} <= set(ids)


def test_curves_are_those_of_the_log_up_to_the_step(run: Path, done: Path, tmp_path: Path) -> None:
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    found = curves.read(run / "step_000004")
    assert found == read(done / "results.json")["learning"]
    assert found["meta/loss"] == {"step": [0, 1, 2, 3], "value": [line["meta/loss"] for line in log[:4]]}
    assert found["heldout/mass"]["step"] == [0, 2, 4] and "unseen/mass" not in found
    assert curves.read(run / "step_000002")["heldout/mass"]["step"] == [0, 2]
    # many steps are means of neighbours; a torn line and a null are no point
    lines = [json.dumps({"step": k, "meta/loss": k / 2, "scorer/auc": None}) for k in range(1001)]
    (tmp_path / "log.jsonl").write_text("\n".join([*lines[:500], '{"step": 3, "me', *lines[500:]]) + "\n")
    long = curves.read(tmp_path / "step_001000")
    assert list(long) == ["meta/loss"] and len(long["meta/loss"]["step"]) == 167
    assert long["meta/loss"]["step"][:2] == [2.5, 8.5] and long["meta/loss"]["value"][:2] == [1.25, 4.25]
    assert curves.read(tmp_path / "nowhere" / "step_000001") == {}


def test_without_a_run_or_with_no_problem_it_is_a_sentence(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(attribution, "build_kit", lambda *_: pytest.fail("a model is loaded"))
    out = ["--out", str(tmp_path / "new")]
    cases = [
        (["--run", str(run), *out, "--credit", "0"], "--credit 0: it wants 1 or more"),
        (["--model", "tiny:llama", "--problems", "world:families", *out, "--credit", "2"], "it wants a run, --run FOLDER"),
    ]  # fmt: skip
    meta = read(run / "step_000004" / "meta.json")
    assert meta["extra"]["engine"][0] == "reverse"
    monkeypatch.setattr(attribution.checkpoint, "read_meta", lambda step: {"extra": {}})
    cases.append(
        (
            ["--run", str(run), *out, "--credit", "2", "meta_gradient.mode=auto"],
            "add meta_gradient.mode=reverse",
        )
    )
    for argv, sentence in cases:
        assert evaluate.main(argv) == 2
        assert sentence in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_rows_without_arms_make_no_table_of_arms() -> None:
    found = tally.results({}) | {"problems": 0, "credit": None, "learning": {}}
    assert found["arms"] == [] and results.tables(found) == [] and figures.figures(found) == []
