"""The tables and the page of an evaluation, of names that are made to break them."""

from pathlib import Path
from typing import Any

from test_tally import row

from mass import results, tally


def test_names_and_sources_are_text_in_the_report(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>|$x_1$"
    found = tally.results({evil: [row(1.0, evil), row(0.0, "b")], "none": [row(0.0, evil), row(0.0, "b")]})
    found |= {"command": ["mass-eval", evil], "seed": 0, "versions": {}, "weights": {"none": evil}, "problems": 2, "left_out": 0, "repeated": 0}  # fmt: skip
    results.write(tmp_path, found)
    page = (tmp_path / "results.html").read_text()
    assert "<script" not in page and page.count("&lt;script&gt;") > 5 and "$x_1$" in page
    assert "<script>alert(1)</script>\\|$x_1$ | 0.500" in (tmp_path / "results.md").read_text()


def test_names_with_dollars_are_no_formulas(tmp_path: Path) -> None:
    odd = r"$\alg$ and $x_{$"
    found = tally.results({odd: [row(1.0, odd)], "none": [row(0.0, odd)]})
    found |= {"command": ["x"], "seed": 0, "versions": {}, "weights": {}, "problems": 1, "left_out": 0, "repeated": 0}  # fmt: skip
    results.write(tmp_path, found)
    assert any(odd in path.read_text() for path in (tmp_path / "figures").iterdir())


def test_the_other_count_has_a_column_where_it_differs() -> None:
    def heads(count: str, *rows: dict[str, Any]) -> list[str]:
        return results.tables(tally.results({"none": rows}, count=count) | {"problems": len(rows)})[0][1]

    alike, other = row(1.0, solution="Answer: 12"), row(0.0, solution="12")
    assert "by the last number" not in heads("stated", alike) + heads("last-number", other)
    assert "by the last number" in heads("stated", other)
    title, _, cells = results.tables(tally.results({"none": [other]}, count="last-number") | {"problems": 1})[
        0
    ]
    assert title.endswith("by the last number in its text") and cells[0][1].startswith("1.000")


def test_answers_that_cannot_be_read_have_a_column_where_there_are_some() -> None:
    def column(**arms: list[str | None]) -> list[str] | None:
        rows = {name: [row(0.0, answer=answer) for answer in answers] for name, answers in arms.items()}
        _, heads, cells = results.tables(tally.results(rows) | {"problems": 2})[0]
        return [own[heads.index("no answer")] for own in cells] if "no answer" in heads else None

    assert column(none=[None, "1"], quest=["1", "2"], vote=[None, None]) == ["1", "0", "2"]
    assert column(none=["1", "2"]) is None
