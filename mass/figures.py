"""The plots of an evaluation, as SVG for a page: by matplotlib, in colours that are legible on white and on black."""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mass.curves import CURVES

# text, axes and grid take the colour of the page's text: drawn in this one, replaced afterwards
INK = "#010203"
# a file of its own is for paper
PAPER_INK, PAPER = "#1b1f24", "#ffffff"
COLOURS = ("#2f7fd8", "#d9722e", "#2e9e62", "#c2529b", "#8f7ad6", "#a8862a", "#4aa3a8", "#d0524f")
PARTS = ("generate", "score", "adapt", "answer")
WIDTH = 8.0
# sources that have a line of their own
SOURCES = 12
# the next one where the colours begin again
MARKERS = "osD^vP"


class Plot(NamedTuple):
    """`element`: for a page, in the colour of its text; `file`: the same as an image of its own, called `name`, on white."""

    title: str
    name: str
    element: str
    file: str


def figures(results: Mapping[str, Any]) -> list[Plot]:
    """What there is to show of `mass.tally.results`, of the learning curves (`learning`) and of `--credit` (`credit`)."""
    import matplotlib

    # names are text, with whatever dollars are in them
    with matplotlib.rc_context({"text.parse_math": False}):
        return _figures(results)


def _figures(results: Mapping[str, Any]) -> list[Plot]:
    arms = results["arms"]
    drawn = {
        "Accuracy against tokens": _tokens(arms) if arms else None,
        "Gain over none, by source": _gains(results),
        "Weights of right and other examples": _weights(arms),
        "Where the time goes": _cost(arms) if arms else None,
        "Credit against the true change": _credit(results["credit"]) if results.get("credit") else None,
        "Learning curves": _learning(results["learning"]) if results.get("learning") else None,
    }
    return [
        Plot(title, re.sub(r"\W+", "-", title.lower()), *_svg(figure, f"mass-{i}"))
        for i, (title, figure) in enumerate(drawn.items())
        if figure is not None
    ]


def groups(results: Mapping[str, Any]) -> list[tuple[str, int, dict[str, int]]]:
    """(name, problems, right answers by arm) of each source, or of those with and without training problems where there
    are more than a plot can hold."""
    sources = results["sources"]
    if len(sources) <= SOURCES:
        # in a pool a source may have training problems in one run and none in another
        both = {x["source"] for x in sources if x["trained"]} & {
            x["source"] for x in sources if not x["trained"]
        }
        told = {True: " (trained on)", False: " (not trained on)"}
        return [
            (x["source"] + (told[x["trained"]] if x["source"] in both else ""), x["problems"], x["right"])
            for x in sources
        ]
    found = []
    for trained, name in ((True, "sources trained on"), (False, "sources not trained on")):
        some = [x for x in sources if x["trained"] is trained]
        if some:
            right = {arm: sum(x["right"][arm] for x in some) for arm in some[0]["right"]}
            found.append((f"{name} ({len(some)})", sum(x["problems"] for x in some), right))
    return found


def _tokens(arms: Sequence[Mapping[str, Any]]) -> Any:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure, axes = _axes(4.6)
    for i, arm in enumerate(arms):
        x, y = max(arm["tokens"], 1.0), arm["accuracy"]
        low, high = arm["interval"] or (y, y)
        axes.errorbar(
            x,
            y,
            [[y - low], [high - y]],
            fmt=MARKERS[i // len(COLOURS) % len(MARKERS)],
            color=COLOURS[i % len(COLOURS)],
            capsize=3,
            label=arm["arm"],
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("generated plus trained tokens a problem")
    axes.set_ylabel("accuracy, 95 % interval")
    axes.legend(frameon=False, labelcolor=INK, bbox_to_anchor=(1.0, 1.0), loc="upper left", fontsize=9)
    return figure


def _gains(results: Mapping[str, Any]) -> Any:
    names = [arm["arm"] for arm in results["arms"] if arm["arm"] != "none"]
    if len(names) == len(results["arms"]) or not names:
        return None
    rows = groups(results)
    figure, axes = _axes(1.0 + 0.22 * len(rows) * (len(names) + 1))
    thick = 1 / (len(names) + 1)
    # the colours of the plot above
    colour = {arm["arm"]: COLOURS[i % len(COLOURS)] for i, arm in enumerate(results["arms"])}
    for i, name in enumerate(names):
        places = [row + i * thick for row in range(len(rows))]
        gain = [(right[name] - right["none"]) / count for _, count, right in rows]
        bars = axes.barh(places, gain, height=0.9 * thick, color=colour[name])
        # by name: there may be more arms than colours
        axes.bar_label(bars, [name] * len(rows), padding=3, fontsize=8, color=INK)
    axes.axvline(0.0, color=INK, linewidth=0.8)
    axes.set_yticks(
        [row + 0.5 - thick for row in range(len(rows))], [f"{name}\n{n} problems" for name, n, _ in rows]
    )
    axes.invert_yaxis()
    axes.set_xlabel("accuracy less that of none")
    # room for the names
    axes.margins(x=0.25)
    return figure


def _weights(arms: Sequence[Mapping[str, Any]]) -> Any:
    known = [arm for arm in arms if arm["truth"]]
    if not known:
        return None
    columns = min(3, len(known))
    lines = -(-len(known) // columns)
    figure, grid = _grid(lines, columns, 2.3 * lines)
    for axes, arm in zip(grid, known, strict=False):
        edges = arm["truth"]["edges"]
        for kind, label, colour in (
            ("good", "right, of the family", COLOURS[2]),
            ("other", "other", COLOURS[1]),
        ):
            count = arm["truth"][f"weights_{kind}"]
            share = [x / max(1, sum(count)) for x in count]
            axes.stairs(share, edges, color=colour, fill=True, alpha=0.55, label=label)
        axes.set_title(arm["arm"], fontsize=10, color=INK)
        axes.set_xlabel("weight (1 = uniform)")
    for axes in grid[len(known) :]:
        axes.set_axis_off()
    grid[0].set_ylabel("share of the examples")
    grid[0].legend(frameon=False, labelcolor=INK, fontsize=8)
    return figure


def _cost(arms: Sequence[Mapping[str, Any]]) -> Any:
    figure, axes = _axes(1.0 + 0.32 * len(arms))
    left = [0.0] * len(arms)
    for part, colour in zip(PARTS, COLOURS, strict=False):
        seconds = [arm["parts"][part] for arm in arms]
        axes.barh(range(len(arms)), seconds, left=left, color=colour, label=part, height=0.7)
        left = [x + y for x, y in zip(left, seconds, strict=True)]
    axes.set_yticks(range(len(arms)), [arm["arm"] for arm in arms])
    axes.invert_yaxis()
    axes.set_xlabel("seconds a problem")
    axes.legend(frameon=False, labelcolor=INK, bbox_to_anchor=(1.0, 1.0), loc="upper left", fontsize=9)
    return figure


def _credit(found: Mapping[str, Any]) -> Any:
    """Guesses over what leaving an example out does, each over its root mean square in the problem: only examples of one
    problem compare."""
    figure, grid = _grid(1, 3, 3.1)
    for axes, (guess, truth, title) in zip(
        grid,
        (
            ("credit_uniform", "change_uniform", "meta-gradient,\nuniform weights"),
            ("one_step", "change_uniform", "one-step dot product,\nuniform weights"),
            ("credit", "change", "meta-gradient,\nscorer's weights"),
        ),
        strict=True,
    ):
        points = [
            (x, y, good)
            for own in found["points"]
            for x, y, good in zip(_scaled(own[truth]), _scaled(own[guess]), own["good"], strict=True)
            if x is not None and y is not None
        ]
        for kind, label, colour in (
            (False, "other", COLOURS[1]),
            (True, "right, of the family", COLOURS[2]),
            (None, "not known", COLOURS[0]),
        ):
            some = [(x, y) for x, y, good in points if good is kind]
            if some:
                axes.scatter(
                    *zip(*some, strict=True), s=10, color=colour, alpha=0.6, linewidth=0, label=label
                )
        axes.axhline(0.0, color=INK, linewidth=0.8)
        axes.axvline(0.0, color=INK, linewidth=0.8)
        axes.set_title(title, fontsize=9, color=INK)
        axes.set_xlabel("rise of the outer loss, left out")
    grid[0].set_ylabel("guess of it")
    handles, labels = grid[0].get_legend_handles_labels()
    if handles:
        place = {"loc": "outside lower center", "ncols": len(labels)}
        figure.legend(handles, labels, frameon=False, labelcolor=INK, fontsize=8, **place)
    return figure


def _scaled(values: Sequence[float | None]) -> list[float | None]:
    known = [x for x in values if x is not None]
    size = (sum(x * x for x in known) / max(1, len(known))) ** 0.5
    return [None if x is None else x / size if size else 0.0 for x in values]


def _learning(learning: Mapping[str, Any]) -> Any:
    """A chart for each group of tags that the run has logged."""
    charts = {
        title: own
        for title, tags in CURVES.items()
        if (own := {t: x for t, x in tags.items() if t in learning})
    }
    figure, grid = _grid(1, len(charts), 3.4)
    for axes, (title, tags) in zip(grid, charts.items(), strict=True):
        for i, (tag, label) in enumerate(tags.items()):
            curve = learning[tag]
            # few points are a line that shows where they are
            marker = "o" if len(curve["step"]) <= 12 else ""
            axes.plot(
                curve["step"],
                curve["value"],
                color=COLOURS[i],
                marker=marker,
                markersize=4,
                linewidth=1.4,
                label=label,
            )
        axes.set_title(title, fontsize=9, color=INK)
        axes.set_xlabel("outer step")
        axes.locator_params(axis="y", nbins=5)
        # below, where no curve runs
        axes.legend(frameon=False, labelcolor=INK, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.2))
    return figure


def _axes(height: float) -> tuple[Any, Any]:
    figure, grid = _grid(1, 1, height)
    return figure, grid[0]


def _grid(lines: int, columns: int, height: float) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    grid = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes in grid:
        axes.set_facecolor("none")
        axes.tick_params(which="both", colors=INK, labelsize=9)
        axes.xaxis.label.set_color(INK)
        axes.yaxis.label.set_color(INK)
        axes.grid(color=INK, alpha=0.15, linewidth=0.6)
        axes.set_axisbelow(True)
        for side, spine in axes.spines.items():
            spine.set_color(INK)
            spine.set_visible(side in ("left", "bottom"))
    return figure, grid


def _svg(figure: Any, salt: str) -> tuple[str, str]:
    """The figure as an element of a page (no header, no metadata, ids of its own, the page's ink), and as a file's text."""
    import matplotlib

    figure.patch.set_alpha(0.0)
    text = io.StringIO()
    # twice: a layout makes room for the tick labels of the one before
    figure.draw_without_rendering()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt, "font.family": "sans-serif"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    start = svg.index(">") + 1
    file = f'{svg[:start]}\n <rect width="100%" height="100%" fill="{PAPER}"/>{svg[start:]}'.replace(
        INK, PAPER_INK
    )
    # a page's parser knows the two name spaces
    svg = re.sub(r'\sxmlns(:xlink)?="[^"]*"', "", svg)
    # matplotlib numbers these from 1 in each figure
    svg = re.sub(
        r'id="((?:figure|axes|patch|line2d|text|xtick|ytick|legend|matplotlib|[A-Z])[\w.]*)"',
        rf'id="{salt}-\1"',
        svg,
    )
    return svg.replace(INK, "currentColor"), file
