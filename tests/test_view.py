"""A record as it is shown: on the terminal, and as a line of JSON."""

import io
import json
import math
from dataclasses import replace

from rich.console import Console

from mass.filerun import as_line, as_row
from mass.records import Made, Record, Seconds, StepLoss, Tokens
from mass.view import view

RECORD = Record(
    "p1", "What is [bold]4[/] + 3?", "mass", "7", "5", "6", 12, "4 + 3 = 7\nAnswer: 7", "Answer: 5",
    (Made("What is 1 + 1?", "Answer: 2", 2.25, True, ""), Made("What\x1b[31m", "", 0.0, False, "no_answer")),
    (StepLoss(2.0, 1.5), StepLoss(1.5, math.nan)), Tokens(61, 80), Seconds(1.0, 0.5, 0.25, 2.0), "look here",
)  # fmt: skip


def test_json_of_numbers_that_are_not_finite() -> None:
    row = json.loads(as_line(as_row(2, "k", RECORD)))
    assert row["steps"][1] == {"before": 1.5, "after": None} and (row["position"], row["key"]) == (3, "k")


def test_view_shows_curriculum_losses_and_answers() -> None:
    def shown(record: Record, width: int = 120) -> str:
        console = Console(file=io.StringIO(), width=width)
        console.print(view(record, console.width))
        return console.file.getvalue()  # type: ignore[attr-defined]

    text = shown(RECORD)
    assert "p1: What is [bold]4[/] + 3?" in text and "\x1b" not in text
    assert "2.25 ##########" in text and "no_answer" in text and "Answer: 2" in text
    assert "inner loss 2.000 -> 1.500 -> nan" in text and "note: look here" in text
    assert "answer before 5, by vote of 12 samples 6, after 7\n" in text
    assert "61 tokens generated, 80 trained; seconds: generate 1.0, score 0.5, adapt 0.2, answer 2.0" in text
    assert "answer (none stated)\n" in shown(replace(RECORD, votes=0, answer=None))
    failed = shown(Record("line 2", "oops", "mass", error="line 2: not JSON"))
    assert "line 2: oops" in failed and "failed: line 2: not JSON" in failed and "answer" not in failed
    assert "4 + 3 = 7" in shown(RECORD, 40)
