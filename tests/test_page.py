"""mass.page: the page of --html, one file that loads and runs nothing."""

import json
import math
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from mass import page
from mass.errors import MassError
from mass.filerun import as_line, as_row
from mass.records import Made, Record, Seconds, StepLoss, Tokens

EVIL = '<script>alert("x")</script><img src=http://evil.example/a onerror=alert(1)>&amp;'
RECORDS = [
    Record("p1", f"What is 4 + 3?\n  {EVIL}", "mass", "7", "5", None, 12, f"4 + 3 = 7\nAnswer: 7 {EVIL}", "Answer: 5",
           (Made(f"1 + 1? {EVIL}", "Answer: 2", 2.25, True, ""), Made("2?", "\u202egnp.exe\x1b[31m", 0.75, True, ""),
            Made("", "", 0.0, False, EVIL)),
           (StepLoss(2.0, 1.5), StepLoss(1.5, math.nan)), Tokens(61, 80), Seconds(1.0, 0.5, 0.25, 2.0), EVIL),
    Record("line 2", "oops", EVIL, error=f"line 2: not JSON {EVIL}"),
    Record(EVIL, "none of it", "none", None),
]  # fmt: skip


class Reader(HTMLParser):
    """Tags must be closed in order; keeps tags, attributes and text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read(path: Path) -> Reader:
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    reader.close()
    assert reader.open == []
    return reader


@pytest.fixture
def shown(tmp_path: Path) -> Reader:
    rows = (json.loads(as_line(as_row(i, "k", record))) for i, record in enumerate(RECORDS))
    page.write(tmp_path / "page.html", rows)
    return read(tmp_path / "page.html")


def test_everything_of_a_record_is_there(shown: Reader) -> None:
    text = " ".join(shown.text.split())
    assert shown.tags.count("article") == 3 and shown.tags.count("tr") == 1 + 3 + 3
    for part in ("1. p1 method mass", "1 + 1?", "Answer: 2", "2.25", "before 2.000", "after step 1 1.500", "after step 2 not finite",
                 "before5", "by vote of 12 samples(none stated)", "after7", "61 tokens generated, 80 trained",
                 "generate 1.0, score 0.5, adapt 0.2, answer 2.0", "2. line 2", "failed: line 2: not JSON"):  # fmt: skip
        assert part in text, part
    widths = [value for name, value in shown.attributes if name == "style"]
    assert widths == [f"width: {x}%" for x in ("100.0", "33.3", "0.0", "100.0", "75.0", "0.0")]


def test_what_the_model_wrote_is_text_and_nothing_else(shown: Reader) -> None:
    assert shown.text.count(EVIL) == 8
    assert not {"script", "img", "link", "iframe", "a", "object", "svg"} & set(shown.tags)
    names = {name for name, _ in shown.attributes}
    assert not {name for name in names if name.startswith("on") or name in ("src", "href", "action", "data")}
    # control characters, and those that turn the direction of text, are spelt out
    assert "\\u202egnp.exe\\x1b[31m" in shown.text and "\u202e" not in shown.text
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in shown.attributes
    assert (
        "url(" not in shown.text
        and "@import" not in shown.text
        and "prefers-color-scheme: dark" in shown.text
    )


def full_disk(record: Record) -> Iterator[dict[str, Any]]:
    yield as_row(0, "k", record)
    raise OSError("no space left")


def test_records_are_taken_one_at_a_time_and_no_file_is_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "p.html"
    sizes = []

    def rows():  # type: ignore[no-untyped-def]
        for i in range(300):
            sizes.append(path.stat().st_size)
            yield as_row(i, "k", RECORDS[0])

    page.write(path, rows())
    assert sizes[-1] > 200_000 and read(path).tags.count("article") == 300
    with pytest.raises(MassError, match=r"p\.html exists, and nothing is overwritten"):
        page.write(path, [])
    broken = tmp_path / "broken.html"
    with pytest.raises(OSError, match="no space"):
        page.write(broken, full_disk(RECORDS[0]))
    assert not broken.exists()
    page.write(tmp_path / "empty.html", [])
    assert read(tmp_path / "empty.html").tags.count("article") == 0
