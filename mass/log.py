"""What a run tells: scalars (TensorBoard, log.jsonl), one console line a step, tables of sampled examples.

Only rank 0 writes. Every scalar tag is in `mass.tags.TAGS` and explained in `docs/metrics.md`; others are refused.
What a model wrote is data: control characters, terminal markup and Markdown are escaped before it is shown.
"""

import contextlib
import dataclasses
import difflib
import errno
import json
import math
import os
import re
import time
import unicodedata
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mass.errors import MassError
from mass.tags import CHARTS, TAGS

# of a step's time, in the order in which they are done (`time/gather` is within the others)
PARTS = ("generate", "score", "inner", "meta", "outer", "left_out", "policy", "evaluate", "save")


@dataclasses.dataclass(frozen=True)
class SampleRow:
    """One self-made example. `reason` is empty when it is valid; `credit` is None or NaN when unknown."""

    problem: str
    solution: str
    valid: bool
    reason: str
    weight: float
    credit: float | None = None


@dataclasses.dataclass(frozen=True)
class SampleTable:
    """One task: its problem, the examples made for it, the reference answer and the model's own, if known."""

    problem: str
    rows: Sequence[SampleRow]
    id: str = ""
    reference: str | None = None
    answer_before: str | None = None
    answer_after: str | None = None


class RunLog:
    """The log of one process of a run; on every rank but 0 each call checks its tags and writes nothing.

    `start_step` is where a resumed run continues: lines of that step and later are cut from log.jsonl and
    samples.jsonl, and TensorBoard hides its own, so that no step appears twice. `skipped` of the steps before were skipped,
    by another run perhaps. A full disk raises MassError.
    """

    def __init__(
        self,
        folder: Path,
        *,
        rank: int,
        total_steps: int,
        tensorboard: bool,
        start_step: int = 0,
        skipped: int = 0,
        console: Console | None = None,
    ) -> None:
        self.total_steps, self.start_step = total_steps, start_step
        self.folder, self.writes = Path(folder), rank == 0
        self.last_step = start_step - 1
        self.skipped = skipped
        self.writer: Any = None
        if not self.writes:
            return
        self.console = console or _console()
        self.times = deque([time.monotonic()], maxlen=21)
        with _full_disk(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._cut("log.jsonl")
            self._cut("samples.jsonl")
            if tensorboard:
                self.writer = _writer(self.folder / "tb", start_step)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One line of log.jsonl, {"step", "time", tags}, flushed, and the same into TensorBoard.

        One call a step, in order. A value that is not finite is null in the file and a gap in TensorBoard.
        Raises ValueError, on every rank, for a tag that is not in TAGS or a step that has its line already.
        """
        for tag in values:
            if tag not in TAGS:
                near = ", ".join(difflib.get_close_matches(tag, TAGS, 1)) or "none"
                raise ValueError(f"unknown tag {tag!r} (nearest: {near}): add it to TAGS and docs/metrics.md")
        if step <= self.last_step:
            raise ValueError(f"step {step} after step {self.last_step}: log all tags of a step in one call")
        self.last_step = step
        if not self.writes:
            return
        finite = {tag: _number(value) for tag, value in values.items()}
        with _full_disk(self.folder):
            self._append("log.jsonl", {"step": step, "time": round(time.time(), 3), **finite})
            if self.writer is not None:
                for tag, value in finite.items():
                    if value is not None:
                        self.writer.add_scalar(tag, value, step)
                self.writer.flush()

    def line(self, step: int, values: Mapping[str, float]) -> None:
        """One console line: losses, gain, valid share, effective examples, seconds by part, time left.

        A tag that is missing is left out. A rise of meta/skipped_steps is a warning of its own.
        """
        if not self.writes:
            return
        self.times.append(time.monotonic())
        skipped = int(values.get("meta/skipped_steps", self.skipped))
        if skipped > self.skipped:
            self.warn(f"step {step + 1} was skipped: its gradient was not finite ({skipped} skipped so far)")
        self.skipped = skipped

        text = Text(f"step {step + 1}/{self.total_steps}", style="bold")
        for part in _line_parts(values):
            text.append(f" | {part}", style="not bold")
        if skipped:
            text.append(f" | skipped {skipped}", style="bold red")
        left = self.total_steps - step - 1
        pace = (self.times[-1] - self.times[0]) / (len(self.times) - 1)
        text.append(f" | ETA {timedelta(seconds=round(pace * left))}", style="not bold cyan")
        self._print(text)

    def say(self, message: str) -> None:
        """A plain sentence on the console."""
        if self.writes:
            self._print(Text(self._encodable(message)))

    def warn(self, message: str) -> None:
        """A sentence on the console that is not to be missed."""
        if self.writes:
            self._print(Text(self._encodable(f"WARNING: {message}"), style="bold yellow"))

    def samples(self, step: int, tables: Sequence[SampleTable]) -> None:
        """The examples of one or two tasks: a console table, TensorBoard text, and whole in samples.jsonl."""
        if not self.writes:
            return
        for table in tables:
            for part in _sample_table(table, self.console.encoding, self.console.width):
                self.console.print(part)
        with _full_disk(self.folder):
            for table in tables:
                entry = dataclasses.asdict(table)
                for row in entry["rows"]:
                    row["weight"], row["credit"] = _number(row["weight"]), _number(row["credit"])
                self._append("samples.jsonl", {"step": step, "time": round(time.time(), 3), **entry})
            if self.writer is not None:
                self.writer.add_text("samples", "\n\n---\n\n".join(map(_sample_markdown, tables)), step)

    def text(self, tag: str, text: str) -> None:
        """Literal text into TensorBoard at the step where this process began (the recipe at step 0)."""
        if self.writer is not None:
            with _full_disk(self.folder):
                literal = text.encode("utf-8", "backslashreplace").decode()
                # four spaces make a Markdown code block: nothing inside is markup
                block = "\n".join(f"    {line}" for line in literal.splitlines())
                self.writer.add_text(tag, block, self.start_step)
                self.writer.flush()

    def close(self) -> None:
        """Write out what TensorBoard still holds."""
        if self.writer is not None:
            with _full_disk(self.folder):
                self.writer.close()

    def _print(self, text: Text) -> None:
        # in a file a step is one line however wide; a terminal gets it wrapped between words
        self.console.print(text, soft_wrap=not self.console.is_terminal)

    def _encodable(self, text: str) -> str:
        return text.encode(self.console.encoding, "backslashreplace").decode(self.console.encoding)

    def _append(self, name: str, entry: dict[str, Any]) -> None:
        with open(self.folder / name, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry, allow_nan=False) + "\n")

    def _cut(self, name: str) -> None:
        """Keep the lines before the start step; a line torn by a kill is dropped."""
        path = self.folder / name
        if not path.exists():
            path.touch()
        kept, torn = [], 0
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entry = json.loads(line)
                if entry["step"] < self.start_step:
                    kept.append(entry)
            except (json.JSONDecodeError, TypeError, KeyError):
                torn += 1
        if torn:
            self.warn(f"{path}: dropped {torn} unreadable line(s), left by a process that died while writing")
        write_atomic(path, "".join(json.dumps(entry) + "\n" for entry in kept))


def write_atomic(path: Path, text: str) -> None:
    """Write a file so that a reader, or a crash, finds the old text or the new, never a part."""
    beside = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with open(beside, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def fsync_folder(folder: Path) -> None:
    """Make the names in a folder durable: after a power cut a rename is either there or not."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def no_space(error: BaseException) -> bool:
    """True where an error, also one that a library made into text, says that the disk or quota is full."""
    codes = (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "errno", None) in codes or any(f"(os error {code})" in str(error) for code in codes)


def plain(text: str, encoding: str = "utf-8") -> str:
    """One line that any terminal takes: white space collapsed, control and invisible characters escaped."""
    text = " ".join(text.split())
    # category C: control, format (text direction!), surrogates, unassigned
    escaped = (c.encode("unicode_escape").decode() if unicodedata.category(c)[0] == "C" else c for c in text)
    return "".join(escaped).encode(encoding, "backslashreplace").decode(encoding)


def escape_markdown(text: str) -> str:
    """Text that TensorBoard's Markdown shows as it is."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]()#+\-.!|])", r"\\\1", text)


def _console() -> Console:
    console = Console(highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        # a file has no width; rich would take 80, where tables are cramped
        return Console(highlight=False, width=120)
    return console


def summary_writer() -> Any:
    """TensorBoard's class. Raises MassError where its package is missing, to be told before anything is written."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        how = "pip install tensorboard, or set log.tensorboard=false"
        raise MassError(f"log.tensorboard=true needs the tensorboard package ({error}): {how}") from None
    return SummaryWriter


def _writer(folder: Path, start_step: int) -> Any:
    writer = summary_writer()(str(folder), purge_step=start_step)
    # the page takes regular expressions and matches them at the start: anchor the end
    layout = {
        group: {chart: ["Multiline", [f"{tag}$" for tag in tags]] for chart, tags in charts.items()}
        for group, charts in CHARTS.items()
    }
    writer.add_custom_scalars(layout)
    rows = (f"| {escape_markdown(tag)} | {escape_markdown(meaning)} |" for tag, meaning in TAGS.items())
    writer.add_text("tags", "\n".join(["| tag | meaning |", "| --- | --- |", *rows]), start_step)
    writer.flush()
    return writer


@contextlib.contextmanager
def _full_disk(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if no_space(error):
            raise MassError(
                f"no space left for the log in {folder}: free some, then run.resume=auto"
            ) from error
        raise


def _number(value: float | None) -> float | None:
    """A plain int or finite float, else None: JSON has no NaN."""
    if value is None or not math.isfinite(value):
        return None
    return int(value) if isinstance(value, int) else float(value)


def _line_parts(values: Mapping[str, float]) -> Iterator[str]:
    if "meta/loss_before" in values and "meta/loss" in values:
        yield f"loss {values['meta/loss_before']:.3f} -> {values['meta/loss']:.3f}"
    elif "meta/loss_before" in values:
        yield f"loss {values['meta/loss_before']:.3f}"
    if "meta/gain" in values:
        yield f"gain {values['meta/gain']:+.3f}"
    if "reward/solve_before" in values and "reward/solve_after" in values:
        yield f"solved {values['reward/solve_before']:.0%} -> {values['reward/solve_after']:.0%}"
    elif "reward/solve_before" in values:
        yield f"solved {values['reward/solve_before']:.0%}"
    if "generator/valid" in values:
        yield f"valid {values['generator/valid']:.0%}"
    if "scorer/effective_examples" in values:
        yield f"effective {values['scorer/effective_examples']:.1f}"
    if "time/step" in values:
        whole = values["time/step"]
        parts = {part: values.get(f"time/{part}", 0.0) for part in PARTS}
        # what is left out is too little to be looked at
        shown = ", ".join(f"{part} {value:.1f}" for part, value in parts.items() if value >= 0.05 * whole > 0)
        yield f"{whole:.1f} s" + (f" ({shown})" if shown else "")


def _shorten(text: str, limit: int, encoding: str = "utf-8") -> str:
    text = plain(text, encoding)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _cells(row: SampleRow, top: float, limit: int, encoding: str = "utf-8") -> tuple[str, str, str, str, str]:
    """Problem, solution, valid or why not, weight as number and bar (full length: `top`), credit."""
    bar = "#" * round(10 * row.weight / top) if top > 0 and math.isfinite(row.weight) else ""
    valid = "yes" if row.valid else plain(row.reason, encoding) or "no"
    credit = "-" if row.credit is None or math.isnan(row.credit) else f"{row.credit:+.2g}"
    texts = _shorten(row.problem, limit, encoding), _shorten(row.solution, limit, encoding)
    return *texts, valid, f"{row.weight:.2f} {bar}".rstrip(), credit


def _top(table: SampleTable) -> float:
    return max((row.weight for row in table.rows if math.isfinite(row.weight)), default=0.0)


def _answers(table: SampleTable, limit: int, encoding: str = "utf-8") -> str:
    named = {"before": table.answer_before, "after": table.answer_after, "reference": table.reference}
    return ", ".join(
        f"{name} {_shorten(text, limit, encoding)}" for name, text in named.items() if text is not None
    )


def _sample_table(table: SampleTable, encoding: str, width: int) -> Iterator[Table | Text]:
    # Text, never str: rich reads markup and emoji codes in strings
    head = f"target {plain(table.id, encoding)}".rstrip()
    yield Text(f"{head}: {_shorten(table.problem, 400, encoding)}", style="bold")
    # about two lines each
    limit = max(40, min(160, 2 * width - 80))
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    grid.add_column("#", justify="right")
    grid.add_column("self-made problem / solution", ratio=1, overflow="fold")
    for name in ("valid", "weight", "credit"):
        grid.add_column(name, overflow="fold")
    for number, row in enumerate(table.rows, 1):
        problem, solution, *rest = _cells(row, _top(table), limit, encoding)
        example = Text(problem).append(f"\n{solution}", style="dim")
        valid = Text(rest[0], style="green" if row.valid else "red")
        # a narrow terminal has no room for the bar
        weight = Text(rest[1] if width >= 70 else rest[1].split()[0])
        grid.add_row(Text(str(number)), example, valid, weight, Text(rest[2]))
    if table.rows:
        yield grid
    if answers := _answers(table, 80, encoding):
        yield Text(f"answer: {answers}")


def _sample_markdown(table: SampleTable) -> str:
    head = escape_markdown(f"target {plain(table.id)}".rstrip())
    lines = [f"**{head}**: {escape_markdown(_shorten(table.problem, 2000))}", ""]
    if table.rows:
        lines += [
            "| # | problem | solution | valid | weight | credit |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
    for number, row in enumerate(table.rows, 1):
        cells = map(escape_markdown, _cells(row, _top(table), 800))
        lines.append(f"| {number} | " + " | ".join(cells) + " |")
    if answers := _answers(table, 400):
        lines += ["", f"answer: {escape_markdown(answers)}"]
    return "\n".join(lines)
