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

from mass.figures import Plot, figures, groups
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
    "Votes: what the tries of a vote come to by other rules. Row by row: each row of the answer by its own majority; one for all "
    "rows: one vote on the method of a planted world, for all rows together; most generous: right by the whole answer or one "
    "of these, every tie going to the truth. They are in no comparison.",
    "No answer: problems whose text states no answer that can be read. Where they are many, accuracy says as much about the form of "
    "answers as about what they say.",
    "By the last number: accuracy where an answer is right when the last number in its text is the reference, in whatever form. Where "
    "it is far from the accuracy, an arm knows the answers and not the form, or the form and not the answers.",
    "Tokens: generated plus trained (a trained token counts once for each inner step). FLOPs: 2 x weights for each generated "
    "token, 6 x weights for each trained one; prompts that are only read, and the scorer's reading, are not in it.",
    "Seconds: wall time of a batch over its problems, without loading the model and without verifying; problems a minute is its "
    "inverse. Copies: self-made examples that repeat the target; they are invalid and never trained on.",
    "State the target's answer: valid examples with the target's reference among their words and numbers (short answers stand there "
    "by chance, too), and the accuracy on problems with such an example and without. Problems that are easy for the writer are "
    "easy for the update as well: a difference need not come from these examples.",
    "AUC: chance that an example that is right and of the target's family outweighs another of its task.",
)
CREDIT_NOTES = (
    "Leaving out: the inner loop is run again without the example, the softmax taken over the others; the truth is how much "
    "the loss of the reference solution rises. Correlations are Spearman's within a problem, a mean over problems, with its "
    "95 % bootstrap interval; AUC is the chance that an example that is right and of the target's family has the higher value.",
    "Under the weights of a sharp scorer most examples have a weight near 0: leaving them out changes next to nothing, and their "
    "credit is next to nothing, good or not. Whether a credit tells good examples is a question to uniform weights.",
    "Length: trained tokens of an example. Where the truth itself goes with length, so may the credit.",
    "Smoothness: metasmoothness of arXiv 2503.13751, along a random direction of the scores; agreement (definition 2, of the "
    "adapter) is 1 and curvature (definition 1, of the outer loss) is 0 where the way is straight. Slope: over problems, the rank "
    "correlation of the change along that direction that the meta-gradient predicts with the one that is found.",
)


def tables(results: Mapping[str, Any]) -> list[Cells]:
    """The tables of `mass.tally.results`, for terminal, Markdown and page alike."""
    found = [_main(results)] if results["arms"] else []
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
    return [*found, *(_credit(results["credit"]) if results.get("credit") else [])]


def notes(results: Mapping[str, Any]) -> list[str]:
    """How to read the tables that are there."""
    return [*(NOTES if results["arms"] else ()), *(CREDIT_NOTES if results.get("credit") else ())]


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
    """results.json, results.md, results.html and figures/NAME.svg; each is replaced as a whole."""
    write_atomic(folder / "results.json", json.dumps(results, indent=2, allow_nan=False) + "\n")
    plots = figures(results)
    (folder / "figures").mkdir(exist_ok=True)
    for plot in plots:
        write_atomic(folder / "figures" / f"{plot.name}.svg", plot.file)
    write_atomic(folder / "results.md", "\n".join(_markdown(results, plots)) + "\n")
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
        plots=plots,
        notes=notes(results),
    )
    write_atomic(folder / "results.html", page.lstrip())


def _main(results: Mapping[str, Any]) -> Cells:
    arms = results["arms"]
    against = {(x["arm"], x["against"]): x for x in results["comparisons"]}
    rivals = [rival for rival in RIVALS if any(x["against"] == rival for x in results["comparisons"])]
    tries = any(arm["tries"] for arm in arms)
    rules = any(arm.get("vote_rules") for arm in arms)
    heads = [
        "arm",
        "accuracy",
        *(f"vs {rival}" for rival in rivals),
        *(["pass@n"] if tries else []),
        *(["votes"] if rules else []),
        "tokens",
        "seconds",
        "FLOPs",
        "problems/min",
    ]
    # the other count, where it makes a difference
    form = results["count"] == "stated" and any(
        arm["by_last_number"] not in (None, arm["accuracy"]) for arm in arms
    )
    heads += ["by the last number"] if form else []
    silent = any(arm["no_answer"] for arm in arms)
    heads += ["no answer"] if silent else []
    failed = any(arm["errors"] or arm["unverified"] for arm in arms)
    heads += ["failed"] if failed else []
    rows = []
    for arm in arms:
        cells = [arm["arm"], f"{arm['accuracy']:.3f}{_between(arm['interval'])}"]
        cells += [_compared(against.get((arm["arm"], rival))) for rival in rivals]
        cells += [_passed(arm["tries"])] if tries else []
        cells += [_voted(arm.get("vote_rules"))] if rules else []
        minute = "-" if arm["per_minute"] is None else f"{arm['per_minute']:.1f}"
        cells += [f"{arm['tokens']:.0f}", f"{arm['seconds']:.3f}", f"{arm['flops']:.2e}", minute]
        cells += [_number(arm["by_last_number"])] if form else []
        cells += [str(arm["no_answer"])] if silent else []
        cells += [str(arm["errors"] + arm["unverified"])] if failed else []
        rows.append(cells)
    counted = "" if results["count"] == "stated" else ", an answer counted by the last number in its text"
    return f"{results['problems']} problems{counted}", heads, rows


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
        "state the target's answer",
        "right with such a one",
        "right without",
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
                + _states_answer(arm)
                + ["-" if x is None else f"{x:.3f}" for x in known]
            )
    # where nothing is known of any example there is nothing to head
    used = [i for i in range(len(heads)) if i < 4 or any(row[i] != "-" for row in rows)]
    return "Examples", [heads[i] for i in used], [[row[i] for i in used] for row in rows]


def _credit(found: Mapping[str, Any]) -> list[Cells]:
    ends = ("change", "change_uniform")
    heads = [
        f"{found['examples']} examples",
        "vs left out, scorer's weights",
        "vs left out, uniform weights",
        "vs length",
        "AUC",
    ]
    rows = [
        [x["measure"], *(_mean(x[f"with_{key}"]) for key in (*ends, "length")), _number(x["auc"])]
        for x in found["measures"]
    ]
    title = f"Is the credit right? {found['problems']} problems, {found['engine']}, K = {found['steps']}"
    measured = (title, heads, rows)
    heads = ["smoothness", "outer loss, before", "after", "exploded", "agreement", "curvature", "slope"]
    rows = [
        [
            x["weights"],
            _number(found["loss_before"]),
            _number(x["loss"]),
            str(x["exploded"]),
            _mean(x["agreement"]),
            "-" if x["curvature"] is None else f"{x['curvature']:.2g}",
            _number(x["slope"]),
        ]
        for x in found["smoothness"]
    ]
    return [measured, (f"Smoothness, h = {found['reach']:g}", heads, rows)]


def _mean(x: Mapping[str, Any] | None) -> str:
    return "-" if x is None else f"{x['mean']:.3f}{_between(x['interval'])}"


def _number(x: float | None) -> str:
    return "-" if x is None else f"{x:.3f}"


def _states_answer(arm: Mapping[str, Any]) -> list[str]:
    s = arm["states_answer"]
    if s is None:
        return ["-"] * 3
    others = arm["problems"] - s["problems"]
    return [str(s["examples"]), _of(s["right"], s["problems"]), _of(s["right_others"], others)]


def _of(right: int, problems: int) -> str:
    return f"{right / problems:.3f} of {problems}" if problems else "-"


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


RULE_NAMES = {"rows": "row by row", "one": "one for all rows", "generous": "most generous"}


def _voted(rules: Mapping[str, Any] | None) -> str:
    if rules is None:
        return "-"
    return "\n".join(f"{RULE_NAMES[rule]} {x['accuracy']:.3f}" for rule, x in rules.items())


def _about(results: Mapping[str, Any]) -> str:
    left = f"{results['left_out']} problems left out because a run has trained on them or shows them, {results['repeated']} repeated"
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    of_arms = []
    if results["arms"]:
        copies = sum(arm["copies"] for arm in results["arms"])
        of_arms = [
            f"{copies} self-made examples copied their target and were not used",
            f"{len(results['comparisons'])} comparisons",
            f"weights: {', '.join(dict.fromkeys(results['weights'].values()))}",
        ]
    return "; ".join(
        [f"{results['problems']} problems ({left})", *of_arms, f"run.seed {results['seed']}", versions]
    )


def _markdown(results: Mapping[str, Any], plots: Sequence[Plot]) -> Iterator[str]:
    yield f"# mass-eval\n\n    {shlex.join(results['command'])}\n\n{_about(results)}"
    for title, heads, rows in tables(results):
        yield f"\n## {title}\n"
        yield "| " + " | ".join(map(_cell, heads)) + " |"
        yield "| --- |" + " ---: |" * (len(heads) - 1)
        for row in rows:
            yield "| " + " | ".join(map(_cell, row)) + " |"
    for plot in plots:
        yield f"\n## {plot.title}\n\n![{plot.title}](figures/{plot.name}.svg)"
    yield ""
    for note in notes(results):
        yield f"{note}\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
