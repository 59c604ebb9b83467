"""What mass-adapt shows to people: the self-made curriculum of a problem, the inner loss, the answers."""

import dataclasses

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from mass.log import plain
from mass.methods import Record
from mass.problems import content_key


def view(record: Record, width: int = 120, encoding: str = "utf-8") -> Group:
    """The curriculum of a problem with its weights as bars, the inner loss, and the answers. For a rich Console."""

    def shorten(text: str, limit: int) -> str:
        text = plain(text, encoding)
        return text if len(text) <= limit else text[: limit - 3] + "..."

    def answered(text: str | None) -> str:
        return "(none stated)" if text is None else shorten(text, 60)

    # an id made from the text says nothing to people
    name = "" if record.id == content_key(record.problem) else f"{shorten(record.id, 40)}: "
    # Text, never str: rich reads markup and emoji codes in strings
    parts: list[Text | Table] = [Text(f"{name}{shorten(record.problem, 400)}", style="bold")]
    if record.error is not None:
        return Group(*parts, Text(f"  failed: {shorten(record.error, 400)}", style="red"), Text())
    top = max((made.weight for made in record.examples), default=0.0)
    if record.examples:
        limit = max(40, min(160, 2 * width - 80))
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("#", justify="right")
        table.add_column("example / solution", ratio=1, overflow="fold")
        table.add_column("valid", overflow="fold")
        table.add_column("weight", overflow="fold")
        for n, made in enumerate(record.examples, 1):
            text = Text(shorten(made.problem, limit)).append(
                f"\n{shorten(made.solution, limit)}", style="dim"
            )
            valid = Text(
                "yes" if made.valid else shorten(made.reason, 20), style="green" if made.valid else "red"
            )
            weight = f"{made.weight:.2f} {'#' * round(10 * made.weight / top) if top > 0 else ''}"
            table.add_row(Text(str(n)), text, valid, Text(weight.rstrip()))
        parts.append(table)
    if record.steps:
        losses = [record.steps[0].before, *(step.after for step in record.steps)]
        parts.append(Text(f"  inner loss {' -> '.join(f'{loss:.3f}' for loss in losses)}"))
    if record.note:
        parts.append(Text(f"  note: {shorten(record.note, 400)}", style="yellow"))
    answer = Text("  answer ")
    if record.votes:
        samples = f"{record.votes} sample{'s' if record.votes > 1 else ''}"
        answer.append(f"before {answered(record.base_answer)}, ")
        answer.append(f"by vote of {samples} {answered(record.vote_answer)}, after ")
    parts.append(answer.append(answered(record.answer), style="bold"))
    parts.append(Text(f"  {shorten(record.solution, 400)}", style="dim"))
    spent = ", ".join(f"{part} {value:.1f}" for part, value in dataclasses.asdict(record.seconds).items())
    tokens = f"{record.tokens.generated} tokens generated, {record.tokens.trained} trained"
    return Group(*parts, Text(f"  {tokens}; seconds: {spent}", style="dim"), Text())
