"""What mass-eval shows of its numbers: tables on the terminal and in Markdown, and one page that loads and runs nothing."""

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mass.figures import figures, groups
from mass.log import plain, write_atomic
from mass.tally import RIVALS

# a table: title, heads, rows of cells
Cells = tuple[str, list[str], list[list[str]]]

NOTES = (
    "Accuracy: share of the problems whose answer has the verifier's full score; an answer without a verdict, and a problem "
    "that failed, count as not right. Intervals: 95 % percentile bootstrap over problems (9999 resamples).",
    "vs: difference in accuracy on the same problems, its paired bootstrap interval, and p of McNemar's exact two-sided test "
    "after Holm's correction over all comparisons of the table.",
    "pass@n: share of the problems of which at least one of the arm's own n tries is right: as far as a perfect choice among "
    "them would reach. It is no method, and in no comparison.",
    "Tokens: generated plus trained (a trained token counts once for each inner step). FLOPs: 2 x weights for each generated "
    "token, 6 x weights for each trained one; prompts that are only read, and the scorer's reading, are not in it.",
    "Seconds: wall time of a batch over its problems, without loading the model and without verifying; problems a minute is its "
    "inverse. Copies: self-made examples that repeat the target; they are invalid and never trained on.",
    "AUC: chance that an example that is right and of the target's family outweighs another of its task.",
)


def tables(results: Mapping[str, Any]) -> list[Cells]:
    """The tables of `mass.tally.results`, for terminal, Markdown and page alike."""
    found = [_main(results)]
    if "seeds" in results:
        found.append(_seeds(results["seeds"]))
    if any(arm["examples"] for arm in results["arms"]):
        found.append(_examples(results))
    rows = groups(results)
    if len(rows) > 1:
        names = [arm["arm"] for arm in results["arms"]]
        cells = [
            [name, str(count), *(f"{right[x] / count:.3f}" for x in names)] for name, count, right in rows
        ]
        found.append(("Accuracy by source", ["source", "problems", *names], cells))
    return found


def show(results: Mapping[str, Any], console: Console) -> None:
    """The tables on a terminal."""
    for title, heads, rows in tables(results):
        table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
        for i, head in enumerate(heads):
            table.add_column(
                Text(plain(head, console.encoding)), justify="right" if i else "left", overflow="fold"
            )
        for row in rows:
            # an interval has a line of its own
            parts = [[plain(part, console.encoding) for part in cell.split("\n")] for cell in row]
            table.add_row(*(Text("\n".join(part)) for part in parts))
        console.print(table)
    console.print(Text(_about(results)))


def write(folder: Path, results: Mapping[str, Any]) -> None:
    """results.json, results.md and results.html; each is replaced as a whole."""
    write_atomic(folder / "results.json", json.dumps(results, indent=2, allow_nan=False) + "\n")
    write_atomic(folder / "results.md", "\n".join(_markdown(results)) + "\n")
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("results.html").render(
        command=shlex.join(results["command"]),
        about=_about(results),
        tables=tables(results),
        plots=figures(results),
        notes=NOTES,
    )
    write_atomic(folder / "results.html", page.lstrip())


def _main(results: Mapping[str, Any]) -> Cells:
    arms = results["arms"]
    against = {(x["arm"], x["against"]): x for x in results["comparisons"]}
    rivals = [rival for rival in RIVALS if any(x["against"] == rival for x in results["comparisons"])]
    tries = any(arm["tries"] for arm in arms)
    heads = [
        "arm",
        "accuracy",
        *(f"vs {rival}" for rival in rivals),
        *(["pass@n"] if tries else []),
        "tokens",
        "seconds",
        "FLOPs",
        "problems/min",
    ]
    failed = any(arm["errors"] or arm["unverified"] for arm in arms)
    heads += ["failed"] if failed else []
    rows = []
    for arm in arms:
        cells = [arm["arm"], f"{arm['accuracy']:.3f}{_between(arm['interval'])}"]
        cells += [_compared(against.get((arm["arm"], rival))) for rival in rivals]
        cells += [_passed(arm["tries"])] if tries else []
        minute = "-" if arm["per_minute"] is None else f"{arm['per_minute']:.1f}"
        cells += [f"{arm['tokens']:.0f}", f"{arm['seconds']:.3f}", f"{arm['flops']:.2e}", minute]
        cells += [str(arm["errors"] + arm["unverified"])] if failed else []
        rows.append(cells)
    return f"{results['problems']} problems", heads, rows


def _seeds(seeds: Mapping[str, Any]) -> Cells:
    heads = ["arm", *(x["folder"] for x in seeds["folders"]), "mean", "standard deviation"]
    rows = [
        [
            arm["arm"],
            *(f"{x['accuracy'][arm['arm']]:.3f}" for x in seeds["folders"]),
            f"{arm['mean']:.3f}",
            f"{arm['deviation']:.3f}",
        ]
        for arm in seeds["arms"]
    ]
    return "Accuracy by training seed", heads, rows


def _examples(results: Mapping[str, Any]) -> Cells:
    heads = [
        "arm",
        "examples",
        "valid",
        "copies",
        "right, of the family",
        "AUC of the weights",
        "honest checks",
    ]
    rows = []
    for arm in results["arms"]:
        if arm["examples"]:
            t = arm["truth"] or {}
            known = [t.get("good"), t.get("auc"), t.get("honest")]
            rows.append(
                [arm["arm"], str(arm["examples"]), str(arm["valid"]), str(arm["copies"])]
                + ["-" if x is None else f"{x:.3f}" for x in known]
            )
    # where nothing is known of any example there is nothing to head
    used = [i for i in range(len(heads)) if i < 4 or any(row[i] != "-" for row in rows)]
    return "Examples", [heads[i] for i in used], [[row[i] for i in used] for row in rows]


def _between(interval: Sequence[float] | None, sign: str = "") -> str:
    return "" if interval is None else f"\n[{interval[0]:{sign}.3f}, {interval[1]:{sign}.3f}]"


def _compared(x: Mapping[str, Any] | None) -> str:
    if x is None:
        return "-"
    p = "p < 0.0001" if x["p_holm"] < 1e-4 else f"p = {x['p_holm']:.4f}"
    return f"{x['difference']:+.3f} {p}{_between(x['interval'], '+')}"


def _passed(tries: Mapping[str, Any] | None) -> str:
    if tries is None:
        return "-"
    least, most = tries["least"], tries["most"]
    return f"{tries['any']:.3f}\nn = {least}" + (f" to {most}" if most > least else "")


def _about(results: Mapping[str, Any]) -> str:
    left = f"{results['left_out']} problems left out because a run has trained on them or shows them, {results['repeated']} repeated"
    copies = sum(arm["copies"] for arm in results["arms"])
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return (
        f"{results['problems']} problems ({left}); {copies} self-made examples copied their target and were not used; "
        f"{len(results['comparisons'])} comparisons; run.seed {results['seed']}; {versions}"
    )


def _markdown(results: Mapping[str, Any]) -> Iterator[str]:
    yield f"# mass-eval\n\n    {shlex.join(results['command'])}\n\n{_about(results)}"
    for title, heads, rows in tables(results):
        yield f"\n## {title}\n"
        yield "| " + " | ".join(map(_cell, heads)) + " |"
        yield "| --- |" + " ---: |" * (len(heads) - 1)
        for row in rows:
            yield "| " + " | ".join(map(_cell, row)) + " |"
    yield ""
    for note in NOTES:
        yield f"{note}\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
