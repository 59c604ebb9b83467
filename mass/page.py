"""The page that `mass-adapt --html` writes: each problem with its curriculum, weights, inner loss and answers.

One file that loads nothing and runs nothing; its template is mass/page.html. What the model wrote is escaped, and control
characters are shown as such.
"""

import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from mass.errors import MassError
from mass.problems import content_key


def write(path: Path, rows: Iterable[Mapping[str, Any]], title: str = "mass-adapt") -> None:
    """Make the page of some rows of `mass.filerun.as_row`, which are taken one at a time. Never overwrites a file."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    part: Any = environment.get_template("page.html").module
    try:
        file = open(path, "x", encoding="utf-8")  # noqa: SIM115 (closed below)
    except FileExistsError:
        raise MassError(f"--html {path} exists, and nothing is overwritten: name another file") from None
    try:
        with file:
            file.write(part.head(title))
            for row in rows:
                file.write(_record(part, _printable(row)))
            file.write(part.tail())
    except BaseException:
        # a part of a page would stand in the way of the next try
        path.unlink(missing_ok=True)
        raise


def _record(part: Any, row: Mapping[str, Any]) -> str:
    steps = row["steps"]
    losses = [steps[0]["before"], *(step["after"] for step in steps)] if steps else []
    return part.record(
        row,
        # an id made from the text says nothing to people
        "" if row["id"] == content_key(row["problem"]) else row["id"],
        max((made["weight"] or 0.0 for made in row["examples"]), default=0.0),
        losses,
        max((loss for loss in losses if loss is not None), default=0.0),
    )


def _printable(value: Any) -> Any:
    """The same with control and invisible characters (which can turn the direction of text) escaped, lines kept."""
    if isinstance(value, str):
        # category C: control, format, surrogates, unassigned
        hidden = (c for c in set(value) - {"\n", "\t"} if unicodedata.category(c)[0] == "C")
        return value.translate({ord(c): c.encode("unicode_escape").decode() for c in hidden})
    if isinstance(value, Mapping):
        return {name: _printable(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_printable(part) for part in value]
    return value
