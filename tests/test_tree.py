"""CONTRIBUTING.md's tree: a line for every module, and imports that only go down."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]


def imported(path: Path) -> Iterator[str]:
    """The modules of mass that a file imports when it runs (not those that only its types name)."""
    tree = ast.parse(path.read_text())
    types = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and id(node) not in types and node.module:
            words = node.module.split(".")
            if words[0] == "mass":
                yield from words[1:2] if len(words) > 1 else (alias.name for alias in node.names)


def test_every_module_has_a_line_and_imports_from_lines_above_its_own() -> None:
    lines = [
        x for x in (ROOT / "CONTRIBUTING.md").read_text().splitlines() if re.match(r"\|[ \d]+\| `mass/", x)
    ]
    place = {name: i for i, x in enumerate(lines) for name in re.findall(r"`mass/(\w+)(?:\.py|/)", x)}
    rows = [x.split("|")[1].strip() for x in lines]
    files = {path: path.stem for path in (ROOT / "mass").glob("*.py") if path.stem != "__init__"}
    files |= {path: "choices" for path in (ROOT / "mass/choices").glob("*.py")}
    assert len(files) > 80 and set(files.values()) <= place.keys()
    edges = [(name, other) for path, name in files.items() for other in imported(path) if other in place]
    assert len(edges) > 200
    assert not [(name, other) for name, other in edges if place[other] > place[name]]
    assert not [(name, other) for name, other in edges if rows[place[name]] < rows[place[other]]]
