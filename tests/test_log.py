"""The run log: files that a resumed run continues without a seam, and text of a model that stays text."""

import dataclasses
import errno
import html
import io
import json
import os
import re
from pathlib import Path

import pytest
import torch
from rich.cells import cell_len
from rich.console import Console

from mass import log, tags
from mass.distributed import World
from mass.errors import MassError
from mass.log import (
    RunLog,
    SampleRow,
    SampleTable,
    escape_markdown,
    no_space,
    plain,
    write_atomic,
)
from mass.report import peak_gb
from mass.tags import CHARTS, TAGS

VALUES = {
    "meta/loss_before": 2.31,
    "meta/loss": 2.1,
    "meta/gain": 0.21,
    "generator/valid": 0.83,
    "scorer/effective_examples": 4.25,
    "time/step": 8.1,
    "time/generate": 5.0,
    "time/inner": 1.0,
    "time/meta": 1.5,
    "time/outer": 0.5,
}
NASTY = "[red]x[/red] :smile: \x1b[31m\x07\x9b2J\u202eabc \ud800 <script>alert(1)</script> | a*b_c `d` # $\\frac{1}{2}$"


def run_log(folder: Path, width: int = 120, tty: bool = False, **options) -> tuple[RunLog, io.StringIO]:
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=tty, highlight=False)
    settings = {"rank": 0, "total_steps": 10, "tensorboard": False, **options}
    return RunLog(folder, console=console, **settings), out


def entries(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def table(text: str = "What is 5 + 2?") -> SampleTable:
    rows = [
        SampleRow(text, f"{text}\nAnswer: 7", True, "", 1.5, 0.12),
        SampleRow("", "", False, "no_answer", 0.0, float("nan")),
    ]
    return SampleTable(text, rows, id="gym:1", reference="7", answer_before="8", answer_after=text)


def test_metrics_page_lists_exactly_the_tags_with_their_meaning():
    page = (Path(__file__).parents[1] / "docs" / "metrics.md").read_text()
    listed = re.findall(r"^\| `([a-z]+/[a-z_]+)` \| (.*?) \| .+ \|$", page, re.MULTILINE)
    assert dict(listed) == TAGS
    assert len(listed) == len(TAGS)


def test_charts_name_known_tags():
    assert {tag for charts in CHARTS.values() for tags in charts.values() for tag in tags} <= TAGS.keys()


def test_scalars_writes_one_flushed_line_and_null_for_what_is_not_finite(tmp_path):
    run, _ = run_log(tmp_path)
    run.scalars(
        0, {"meta/loss": float("nan"), "meta/gain": float("inf"), "tokens/generated": 12, "inner/lr": 0.1}
    )
    (line,) = (tmp_path / "log.jsonl").read_text().splitlines()
    entry = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    time = entry.pop("time")
    assert time > 1.7e9
    assert entry == {"step": 0, "meta/loss": None, "meta/gain": None, "tokens/generated": 12, "inner/lr": 0.1}


@pytest.mark.parametrize("rank", [0, 1])
def test_unknown_tag_and_repeated_step_are_refused_on_every_rank(tmp_path, rank):
    run, _ = run_log(tmp_path, rank=rank)
    with pytest.raises(ValueError, match=r"'meta/los'.*nearest: meta/loss"):
        run.scalars(0, {"meta/los": 1.0})
    run.scalars(3, {})
    with pytest.raises(ValueError, match="step 3 after step 3"):
        run.scalars(3, {})


def test_other_ranks_write_nothing(tmp_path):
    run, out = run_log(tmp_path / "run", rank=1, tensorboard=True)
    run.scalars(0, VALUES)
    run.line(0, VALUES)
    run.samples(0, [table()])
    run.text("recipe", "a: 1")
    run.say("x")
    run.warn("x")
    run.close()
    assert not (tmp_path / "run").exists()
    assert out.getvalue() == ""


def test_resume_cuts_later_lines_and_a_torn_one(tmp_path):
    run, _ = run_log(tmp_path)
    for step in range(5):
        run.scalars(step, {"meta/loss": float(step), "meta/skipped_steps": step // 2})
        run.samples(step, [table()])
    run.close()
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 5, "time": 1.0, "meta/l')

    run, out = run_log(tmp_path, start_step=3, skipped=1)
    assert "dropped 1 unreadable line" in out.getvalue()
    assert [entry["step"] for entry in entries(tmp_path / "log.jsonl")] == [0, 1, 2]
    assert [entry["step"] for entry in entries(tmp_path / "samples.jsonl")] == [0, 1, 2]
    run.scalars(3, {"meta/loss": 30.0})
    run.scalars(4, {"meta/loss": 40.0})
    assert [entry["meta/loss"] for entry in entries(tmp_path / "log.jsonl")] == [0, 1, 2, 30, 40]
    # the count of skipped steps goes on: 1 skipped before step 3 is no news, in the log of another run either
    other, said = run_log(tmp_path / "branch", start_step=3, skipped=1)
    for own, text in ((run, out), (other, said)):
        own.line(3, {"meta/skipped_steps": 1})
        assert "was skipped" not in text.getvalue() and "skipped 1" in text.getvalue()
        own.line(4, {"meta/skipped_steps": 2})
        assert "WARNING: step 5 was skipped" in text.getvalue()


def test_resume_at_zero_starts_the_log_anew(tmp_path):
    run, _ = run_log(tmp_path)
    run.scalars(0, VALUES)
    run, _ = run_log(tmp_path)
    assert (tmp_path / "log.jsonl").read_text() == ""
    run.scalars(0, VALUES)
    assert len(entries(tmp_path / "log.jsonl")) == 1


def test_tensorboard_holds_scalars_layout_and_text_and_purges_on_resume(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.custom_scalar import layout_pb2

    run, _ = run_log(tmp_path, tensorboard=True)
    run.text("recipe", "run:\n  name: a_b_c")
    for step in range(4):
        run.scalars(step, {"meta/loss": float(step), "meta/gain": float("nan")})
    run.samples(3, [table(NASTY)])
    run.close()
    run, _ = run_log(tmp_path, tensorboard=True, start_step=2)
    for step in range(2, 4):
        run.scalars(step, {"meta/loss": 10.0 + step})
    run.close()

    # 0: keep every event
    board = EventAccumulator(str(tmp_path / "tb"), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    assert [(e.step, e.value) for e in board.Scalars("meta/loss")] == [
        (0, 0.0),
        (1, 1.0),
        (2, 12.0),
        (3, 13.0),
    ]
    assert "meta/gain" not in board.Tags()["scalars"]
    (recipe,) = board.Tensors("recipe/text_summary")
    assert recipe.step == 0 and recipe.tensor_proto.string_val[0] == b"    run:\n      name: a_b_c"
    layout = layout_pb2.Layout.FromString(
        board.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    )
    assert [category.title for category in layout.category] == [
        "meta",
        "inner",
        "scorer",
        "generator",
        "time",
    ]
    for category in layout.category:
        for chart in category.chart:
            matched = [[tag for tag in TAGS if re.match(pattern, tag)] for pattern in chart.multiline.tag]
            assert matched == [[tag] for tag in CHARTS[category.title][chart.title]]


def test_missing_tensorboard_is_one_clear_message(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(MassError, match="log.tensorboard=false"):
        run_log(tmp_path, tensorboard=True)


def test_a_run_that_cannot_write_tensorboard_changes_nothing(tmp_path, write, monkeypatch):
    from mass import train
    from mass.recipe import load
    from mass.watchdog import Watchdog

    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    recipe = load(
        write("model: {path: tiny:llama}\nproblems: {train: [gym:chain_sum]}\n"),
        [f"run.folder={tmp_path}/runs"],
    )
    with pytest.raises(MassError, match="log.tensorboard=false"):
        train._train(recipe, World(0, 1, torch.device("cpu")), Watchdog(0, 1, 10))
    assert not (tmp_path / "runs").exists()


def test_peak_memory_is_that_of_the_device_of_the_run(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    # the kernel's own count of the same, in KiB
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    assert peak_gb(torch.device("cpu")) == pytest.approx(int(line.split()[1]) * 1024 / 1e9, rel=5e-3)


def test_line_in_a_file_is_one_plain_line_with_everything_on_it(tmp_path, monkeypatch):
    now = iter([100.0, 108.0, 114.0])
    monkeypatch.setattr(log.time, "monotonic", lambda: next(now))
    run, out = run_log(tmp_path, width=40)
    run.line(0, VALUES)
    run.line(1, VALUES | {"reward/solve_before": 0.25, "reward/solve_after": 0.5})
    first, second = out.getvalue().splitlines()
    assert first == (
        "step 1/10 | loss 2.310 -> 2.100 | gain +0.210 | valid 83% | effective 4.2 | "
        "8.1 s (generate 5.0, inner 1.0, meta 1.5, outer 0.5) | ETA 0:01:12"
    )
    # 7 s a step on average, 8 steps left
    assert "solved 25% -> 50%" in second and second.endswith("ETA 0:00:56")
    assert "\x1b" not in out.getvalue()


def test_line_shows_every_part_that_takes_a_twentieth_of_the_step(tmp_path):
    run, out = run_log(tmp_path)
    run.line(0, VALUES | {"time/policy": 3.0, "time/step": 12.0, "time/score": 0.5, "time/evaluate": 0.7, "time/gather": 9.0})  # fmt: skip
    (line,) = out.getvalue().splitlines()
    assert "12.0 s (generate 5.0, inner 1.0, meta 1.5, policy 3.0, evaluate 0.7) | ETA" in line
    # a tag that is timed has its place on the line, or is no part of its own
    timed = {tag.removeprefix("time/") for tag in tags.TAGS if tag.startswith("time/")}
    assert timed == {*log.PARTS, "step", "gather"}


def test_line_leaves_out_what_is_not_there_and_shows_nan(tmp_path):
    run, out = run_log(tmp_path)
    run.line(9, {"meta/loss": float("nan"), "meta/loss_before": 1.0})
    assert out.getvalue() == "step 10/10 | loss 1.000 -> nan | ETA 0:00:00\n"


def test_a_skipped_step_is_warned_of_once_and_stays_on_the_line(tmp_path):
    run, out = run_log(tmp_path)
    for step, skipped in enumerate([0, 1, 1, 3]):
        run.line(step, {"meta/skipped_steps": skipped})
    warnings = [line for line in out.getvalue().splitlines() if line.startswith("WARNING")]
    assert [re.findall(r"\d+", line) for line in warnings] == [["2", "1"], ["4", "3"]]
    assert ["skipped" in line for line in out.getvalue().splitlines() if line.startswith("step")] == [
        False,
        True,
        True,
        True,
    ]


def test_a_terminal_gets_colour_and_wraps_between_words(tmp_path):
    run, out = run_log(tmp_path, width=40, tty=True)
    run.line(0, VALUES)
    run.warn("look out")
    shown = re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue())
    assert shown != out.getvalue()
    assert max(map(len, shown.splitlines())) <= 40


@pytest.mark.parametrize("width", [30, 60, 80, 120])
@pytest.mark.parametrize("text", ["What is 5 + 2?", NASTY, "\u6570\u5b66" * 200, "x" * 500, ""])
def test_sample_table_is_plain_and_no_wider_than_the_terminal(tmp_path, width, text):
    run, out = run_log(tmp_path, width=width)
    run.samples(0, [table(text)])
    shown = out.getvalue()
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\ud800-\udfff]", shown)
    assert max(cell_len(line) for line in shown.splitlines()) <= width
    assert "before 8, after" in " ".join(shown.split())


def test_sample_table_shows_markup_as_text_weights_credit_and_answers(tmp_path):
    run, out = run_log(tmp_path)
    run.samples(0, [table(NASTY)])
    shown = out.getvalue()
    assert r"[red]x[/red] :smile: \x1b[31m\x07\x9b2J\u202eabc \ud800 <script>" in shown
    assert "1.50 ##########" in shown and "+0.12" in shown
    assert re.search(r"no_answer +0.00 +- *$", shown, re.MULTILINE)
    assert "reference 7" in shown


def test_sample_table_on_a_console_without_unicode(tmp_path):
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii")
    run = RunLog(tmp_path, rank=0, total_steps=1, tensorboard=False, console=Console(file=file, width=100))
    run.samples(0, [table("caf\u00e9 \u6570")])
    run.say("caf\u00e9")
    file.flush()
    assert rb"caf\xe9 \u6570" in raw.getvalue()


def test_samples_file_keeps_the_texts_whole(tmp_path):
    run, _ = run_log(tmp_path)
    run.samples(4, [table("long " * 500), table(NASTY)])
    first, second = entries(tmp_path / "samples.jsonl")
    assert first["step"] == 4 and first["rows"][0]["problem"] == "long " * 500
    assert second["problem"] == NASTY and second["answer_after"] == NASTY
    assert second["rows"][1]["credit"] is None
    assert set(first) - {"step", "time"} == {field.name for field in dataclasses.fields(SampleTable)}


@pytest.mark.parametrize(
    "text", [NASTY, "1. a\n- b", "| x | y |", "**bold** [l](http://a) ![i](b) &amp; ~~~", "a\\|b"]
)
def test_markdown_shows_the_text_itself(text):
    from tensorboard.plugin_util import markdown_to_safe_html

    shown = markdown_to_safe_html(f"| cell |\n| --- |\n| {escape_markdown(plain(text))} |")
    (cell,) = re.findall(r"<td>(.*)</td>", shown)
    assert "<" not in cell
    assert html.unescape(cell) == plain(text)


def test_write_atomic_keeps_the_old_text_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomic(path, "old")

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_full_disk_is_a_clear_message(tmp_path):
    run, _ = run_log(tmp_path)
    (tmp_path / "log.jsonl").unlink()
    os.symlink("/dev/full", tmp_path / "log.jsonl")
    with pytest.raises(MassError, match="no space left for the log"):
        run.scalars(0, VALUES)


def test_no_space_knows_wrapped_errors():
    assert no_space(OSError(errno.ENOSPC, "x")) and no_space(OSError(errno.EDQUOT, "x"))
    assert no_space(Exception("I/O error: No space left on device (os error 28)"))
    assert not no_space(OSError(errno.EIO, "x")) and not no_space(Exception("(os error 5)"))
