"""Time and memory beside the peers, in one run: `python launch/meta_bench.py [gradients | generation | adapt | plan] [--json F] ...`.

Every case runs in a process of its own, so that one case's memory is not another's. Rounds are interleaved (all cases,
then all cases again) and the median is kept, so that a slow minute of the machine hits every row alike.
"""

import argparse
import fnmatch
import importlib.util
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import meta_bench_adapt as adapt
import meta_bench_generation as generation
import meta_bench_gradients as gradients
import meta_bench_plan as plan
from rich.console import Console
from rich.progress import track
from rich.table import Table

Row = dict[str, Any]

# A subcommand is a module: add_arguments(parser), cases(args) -> list[Row], name(case), measure(case) -> Row (in its own
# process), finish(rows) -> rows (ratios), COLUMNS {key: (heading, format)}, NOTES, plot(rows, axes), CHECK = False if
# nothing is to be measured once, outside the timed rounds, and TIMED = False if nothing is to be timed.
COMMANDS: dict[str, ModuleType] = {
    "gradients": gradients,
    "generation": generation,
    "adapt": adapt,
    "plan": plan,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the cases of one subcommand (`gradients` when none is named) and write what was measured."""
    given = list(sys.argv[1:] if argv is None else argv)
    if not given or (given[0] not in COMMANDS and given[0] not in ("-h", "--help")):
        given = ["gradients", *given]
    parser = argparse.ArgumentParser(prog="meta_bench.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for word, module in COMMANDS.items():
        own = commands.add_parser(
            word, help=(module.__doc__ or "").partition("\n")[0], description=module.__doc__
        )
        own.add_argument("--json", type=Path, metavar="F", help="write the rows as a JSON list")
        own.add_argument(
            "--markdown", type=Path, metavar="F", help="write the table and the machine as Markdown"
        )
        own.add_argument("--plot", type=Path, metavar="F", help="draw it (.png, .svg)")
        if getattr(module, "TIMED", True):
            own.add_argument(
                "--rounds", type=int, default=3, help="times each case is timed; the median is kept [3]"
            )
        else:
            own.set_defaults(rounds=0)
        own.add_argument(
            "--cases", nargs="+", default=["*"], metavar="PATTERN", help="only these, e.g. 'blockwise/*'"
        )
        own.add_argument("--list", action="store_true", help="print the names of the cases and stop")
        own.add_argument("--threads", type=int, default=1, help="threads a case [1]")
        own.add_argument("--measure", metavar="CASE", help=argparse.SUPPRESS)
        module.add_arguments(own)
    args = parser.parse_args(given)
    module = COMMANDS[args.command]
    if args.measure:
        # the last line of standard output that is an object is the answer: libraries print too
        print(json.dumps(module.measure(json.loads(args.measure))), flush=True)
        return
    cases = [c for c in module.cases(args) if any(fnmatch.fnmatchcase(module.name(c), p) for p in args.cases)]
    if not cases:
        parser.error(f"--cases {' '.join(args.cases)}: no case has such a name (--list prints them)")
    if args.list:
        print("\n".join(module.name(case) for case in cases))
        return
    for option in ("json", "markdown", "plot"):
        wrong = _unwritable(getattr(args, option), picture=option == "plot")
        if wrong:
            parser.error(f"--{option} {getattr(args, option)}: {wrong}")
    rows = module.finish(run(args.command, module, cases, args.rounds, args.threads))
    # a file has no width, and a table of sixteen columns wants one
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(table(module, rows))
    console.print(machine(args.threads), *module.NOTES, sep="\n", highlight=False)
    for row in rows:
        if row.get("error"):
            console.print(f"{module.name(row)} failed: {row['error']}", style="red", markup=False)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    if args.markdown:
        args.markdown.write_text(markdown(module, rows, machine(args.threads), given), encoding="utf-8")
    if args.plot:
        plot(module, rows, args.plot)


def _unwritable(file: Path | None, picture: bool) -> str:
    """Why a file of results could not be written, or nothing: measuring takes hours."""
    if file is None:
        return ""
    if not file.parent.is_dir():
        return f"there is no folder {file.parent}; make it first"
    if file.is_dir():
        return "this is a folder; name a file in it"
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        return "it may not be written; name another"
    if picture:
        if importlib.util.find_spec("matplotlib") is None:
            return (
                "a plot needs matplotlib, which is not installed: pip install 'mass[eval]', or leave it out"
            )
        from matplotlib.backend_bases import FigureCanvasBase

        kinds = FigureCanvasBase.get_supported_filetypes()
        if file.suffix.removeprefix(".").lower() not in kinds:
            return f"no picture has this ending; the endings are {', '.join(sorted(kinds))}"
    return ""


def plot(module: ModuleType, rows: list[Row], file: Path) -> None:
    """What the module draws of its rows, as a file of the kind that its name says."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 5))
    module.plot(rows, axes)
    axes.grid(alpha=0.3, which="both")
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file)


def run(command: str, module: ModuleType, cases: list[Row], rounds: int, threads: int) -> list[Row]:
    """Measure every case once with `check` (what does not vary; unless CHECK is off), then time it `rounds` times, interleaved.

    A number is the median of its rounds; a case that failed has `error` and is not tried again. Ctrl-C or SIGTERM ends the
    measuring: what was measured until then is kept.
    """
    samples: dict[str, list[Row]] = {module.name(case): [] for case in cases}
    todo = [
        (case, i) for i in range(0 if getattr(module, "CHECK", True) else 1, rounds + 1) for case in cases
    ]
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for case, i in track(todo, "measuring", console=Console(stderr=True)):
            seen = samples[module.name(case)]
            if not any("error" in sample for sample in seen):
                seen.append(isolated(command, {**case, "threads": threads, "check": i == 0}))
    except KeyboardInterrupt:
        print("meta_bench: stopped; what was measured until now follows", file=sys.stderr)
    finally:
        signal.signal(signal.SIGTERM, before)
    return [
        {**case, "threads": threads, "rounds": rounds, **_median(samples[module.name(case)])}
        for case in cases
    ]


def isolated(command: str, case: Row) -> Row:
    """`measure(case)` in a process of its own."""
    env = os.environ | {"OMP_NUM_THREADS": str(case["threads"]), "MKL_NUM_THREADS": str(case["threads"])}
    if case["check"]:
        # glibc: blocks over 64 KiB go back to the system when they are freed, so that resident memory is what is in use.
        # That costs page faults, hence not in the runs that are timed.
        env["MALLOC_MMAP_THRESHOLD_"] = "65536"
    words = [sys.executable, str(Path(__file__).resolve()), command, "--measure", json.dumps(case)]
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=False)
    if done.returncode < 0:
        # what it had said by then, a warning say, is not why
        return {"error": f"ended by signal {-done.returncode} (out of memory?)"}
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return {"error": lines[-1] if lines else f"ended with status {done.returncode} and said nothing"}
    # processes that it started may say something when it ends
    return json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])


def _median(samples: list[Row]) -> Row:
    out: Row = {}
    for sample in samples:
        for key in sample:
            values = [s[key] for s in samples if key in s]
            out[key] = values[0] if isinstance(values[0], str) else statistics.median(values)
    return out


def table(module: ModuleType, rows: list[Row]) -> Table:
    out = Table(title=(module.__doc__ or "").partition("\n")[0])
    for key, (heading, form) in module.COLUMNS.items():
        out.add_column(heading, justify="right" if form else "left", no_wrap=key == "engine")
    for row in rows:
        out.add_row(*_cells(module, row))
    return out


def _cells(module: ModuleType, row: Row) -> list[str]:
    def cell(key: str, form: str) -> str:
        value = row.get(key)
        return "-" if value is None else format(value, form)

    return [cell(key, form) for key, (_, form) in module.COLUMNS.items()]


def markdown(module: ModuleType, rows: list[Row], where: str, words: Sequence[str]) -> str:
    heads = [heading for heading, _ in module.COLUMNS.values()]
    lines = [f"`python launch/meta_bench.py {' '.join(words)}`", "", where, ""]
    lines += ["| " + " | ".join(heads) + " |"]
    lines += ["| " + " | ".join("---:" if form else "---" for _, form in module.COLUMNS.values()) + " |"]
    lines += ["| " + " | ".join(_cells(module, row)) + " |" for row in rows]
    return "\n".join([*lines, "", *(f"- {note}" for note in module.NOTES), ""])


def machine(threads: int) -> str:
    """The machine and the versions that the numbers hold for."""
    import torch

    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line
        ]
        name = found[0] if found else name
    if torch.cuda.is_available():
        name = f"{torch.cuda.get_device_name()}, {name}"
    return f"{name}, {os.cpu_count()} cores, {threads} thread(s) a case; PyTorch {torch.__version__}, Python {platform.python_version()}"


if __name__ == "__main__":
    main()
