"""mass-adapt: adapt to each problem and answer it, with a run folder, a PEFT folder or a bare model.

Standard output carries the answers alone (with --json one object a line); warnings and progress go to standard error.
`mass-adapt serve` (mass/serve.py) and `mass-adapt fit` (mass/fit.py) are commands of their own. `mass.adapt` does the same from Python.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from rich.console import Console
from rich.progress import Progress

from mass import filerun, page
from mass.errors import MassError
from mass.filerun import Item, as_line, as_row, group, key_of, run_batches
from mass.kit import build_kit
from mass.log import no_space
from mass.methods import AUTO, METHODS, Record
from mass.problems import BadLine, load_problems, text_problem
from mass.recipe import Recipe
from mass.share import Share, join, launched
from mass.view import view
from mass.wanted import Plan, plan, settings_key


def main(argv: Sequence[str] | None = None) -> int:
    """The console script. Returns the exit code: 0, or 2 for what the user has to mend."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["serve"]:
        from mass.serve import main as serve

        return serve(words[1:])
    if words[:1] == ["fit"]:
        from mass import fit

        try:
            return fit.main(words[1:])
        except MassError as error:
            print(f"mass-adapt fit: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            return 130
    args = _parser().parse_intermixed_args(words)
    # libraries may print: standard output is for the answers alone
    out = sys.stdout
    try:
        with contextlib.redirect_stdout(sys.stderr):
            _run(args, out)
        return 0
    except MassError as error:
        print(f"mass-adapt: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # the reader has gone (head, less)
        _silence(out)
        return 0
    except OSError as error:
        if not no_space(error):
            raise
        _silence(out)
        print(
            "mass-adapt: no space left for the answers: free some, and go on with --resume", file=sys.stderr
        )
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "mass-adapt",
        description="Adapt to each problem and answer it.",
        epilog=f"METHOD is one of {', '.join([*METHODS, AUTO])}. KEY=VALUE changes the run's recipe for this call, e.g. "
        "inner.steps=1 generate.examples=12; mass-train --help has all keys. `mass-adapt serve --help`: the same over HTTP; "
        "`mass-adapt fit --help`: learn which method pays (auto). "
        "docs/test-time.md says more.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--run", metavar="FOLDER", help="a run (its newest good step), one of its steps, or a PEFT adapter"
    )
    parser.add_argument(
        "--model", help="a bare model, or the base of the PEFT adapter: folder, hub id, package:..."
    )
    parser.add_argument("--problem", metavar="TEXT", help="one problem")
    parser.add_argument(
        "--file", metavar="F.jsonl", help='problems, one JSON object a line: {"problem": "..."}'
    )
    parser.add_argument("--method", help="default: mass where there is a scorer, else quest")
    parser.add_argument(
        "--budget", type=int, metavar="TOKENS", help="generated plus trained tokens that a problem may cost"
    )
    parser.add_argument(
        "--teacher", metavar="MODEL", help="of tt-d: a model, or an address http://HOST:PORT/v1#MODEL"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a problem, a line each")
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="also write the JSON lines to this file; in the problems' order in the end",
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on with the --out FILE of a call that was stopped"
    )
    parser.add_argument("--html", metavar="FILE", help="also write what is shown as one page for a browser")
    parser.add_argument("--batch", type=int, default=8, metavar="T", help="problems adapted together (8)")
    parser.add_argument(
        "--no-baselines",
        action="store_true",
        help="leave out the answers without update and by vote: less time",
    )
    parser.add_argument(
        "settings",
        nargs="*",
        metavar="- | KEY=VALUE",
        help="-: problems from standard input; or a recipe key",
    )
    return parser


def _run(args: argparse.Namespace, out: IO[str]) -> None:
    """Everything that a user can get wrong is looked at before the model is loaded."""
    overrides = [text for text in args.settings if text != "-"]
    if args.batch < 1:
        raise MassError(f"--batch {args.batch}: it wants 1 or more")
    share, device = _processes(args)
    wanted = plan(args.run, args.model, [*device, *overrides])
    wanted = dataclasses.replace(wanted, budget=args.budget, teacher=args.teacher)
    method = args.method or wanted.default_method
    wanted = wanted.of_method(method)
    least = wanted.recipe.generate.answer_tokens
    if args.budget is not None and args.budget < least:
        raise MassError(
            f"--budget {args.budget} is less than generate.answer_tokens={least}, which one answer may take: raise it, or "
            "lower that."
        )
    items = _problems(args, wanted.recipe)
    if args.method is None and method == "quest" and share.rank == 0:
        _say("there is no trained scorer here, so the method is quest: all examples count alike")
    torch.set_num_threads(wanted.recipe.run.threads)
    settings = f"{settings_key(wanted, method)} {method} {not args.no_baselines}"
    settings = hashlib.sha256(settings.encode()).hexdigest()[:16]
    keys = [key_of(item, settings) for item in items]
    path = None if args.out is None else Path(args.out)
    html = None if args.html is None else Path(args.html)
    done: set[int] = set()
    if html is not None:
        filerun.check_new(html, "--html")
    if path is not None:
        if share.rank == 0 and not (args.resume and path.exists()):
            filerun.check_new(path, "--out", "" if args.resume else ", or go on with it by --resume")
        # before any process has written, or another would take its first lines for an old file
        share.wait()
        done = filerun.read_done(path, keys)
        if done and share.rank == 0:
            _say(f"{len(done)} of {len(items)} problems have their answer in {path}")
    shared = group(items, args.batch)[share.rank :: share.size]
    # a batch of which a kill has left a part is done again whole: rounding depends on who shares it
    batches = [batch for batch in shared if not done.issuperset(batch)]
    shown: list[dict[str, Any]] = []
    read = share.size == 1
    for row, record in _work(wanted, items, batches, done, keys, method, path, not args.no_baselines):
        try:
            if read:
                _show(out, args.json, row, record)
        except BrokenPipeError:
            # the reader has gone (head, less); the file wants the rest all the same
            if path is None:
                raise
            _silence(out)
            read = False
        if html is not None and path is None:
            shown.append(row)
    # also where nothing was left to answer: a kill may have come before the lines were sorted
    if path is not None and path.exists():
        filerun.put_in_order(path, keys)
    if html is not None:
        shown.sort(key=lambda row: row["position"])
        page.write(html, filerun.rows(path) if path else shown)
    share.leave()


def _work(
    wanted: Plan,
    items: Sequence[Item],
    batches: Sequence[Sequence[int]],
    done: set[int],
    keys: Sequence[str],
    method: str,
    path: Path | None,
    baselines: bool,
) -> Iterator[tuple[dict[str, Any], Record]]:
    """The answers to some batches, less those done before; each batch is written to the file before it is given out."""
    if not batches:
        return
    kit = build_kit(wanted)
    live = Progress(
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
        redirect_stdout=False,
        redirect_stderr=False,
    )
    count = sum(place not in done for batch in batches for place in batch)
    bar = live.add_task(method, total=count)
    begin = time.perf_counter()
    with live:
        for found in run_batches(kit, items, batches, method, baselines=baselines):
            rows = [
                (as_row(place, keys[place], record), record) for place, record in found if place not in done
            ]
            if path is not None:
                filerun.append(path, [as_line(row) for row, _ in rows])
            # both may be the same terminal
            live.stop()
            yield from rows
            live.advance(bar, len(rows))
            live.start()
    if count > 1:
        seconds = time.perf_counter() - begin
        _say(f"{count} problems in {seconds:.1f} s, {60 * count / seconds:.1f} a minute")


def _show(out: IO[str], as_json: bool, row: dict[str, Any], record: Record) -> None:
    if as_json:
        print(as_line(row), file=out, flush=True)
        return
    console = Console(file=out, highlight=False, width=None if out.isatty() else 120)
    # rich would end the process where the reader has gone
    with console.capture() as text:
        console.print(view(record, console.width, console.encoding))
    print(text.get(), end="", file=out, flush=True)


def _processes(args: argparse.Namespace) -> tuple[Share, list[str]]:
    """Our share, and which device is ours, as a recipe override."""
    if launched() and args.out is None:
        raise MassError("several processes share the problems: their answers need --out FILE")
    if launched() and args.html is not None:
        raise MassError(
            "--html is for one process: call mass-adapt once more with --resume and --html afterwards"
        )
    return join()


def _problems(args: argparse.Namespace, r: Recipe) -> list[Item]:
    sources = {"--problem": args.problem, "--file": args.file, "-": "-" if "-" in args.settings else None}
    given = [name for name, value in sources.items() if value is not None]
    if len(given) != 1:
        found = "none of them is given" if not given else f"{' and '.join(given)} are given"
        raise MassError(f"one of --problem TEXT, --file F.jsonl and - (standard input) is wanted; {found}")
    if args.resume and (args.out is None or args.file is None):
        raise MassError(
            "--resume goes on with the answers to a file: give --file F.jsonl and --out FILE as before"
        )
    if args.problem is not None:
        return [text_problem(args.problem)]
    where = "-" if args.file is None else args.file
    p = r.problems
    items = load_problems(where, columns=vars(p.columns), demonstrations=p.demonstrations, seed=r.run.seed)
    bad = [item for item in items if isinstance(item, BadLine)]
    if bad and len(bad) == len(items):
        raise MassError(
            f"{'standard input' if where == '-' else where}: none of its {len(bad)} lines holds a problem. Line "
            f"{bad[0].line}: {bad[0].reason}. Mend them; another column name goes into problems.columns.problem."
        )
    return items


def _silence(out: IO[str]) -> None:
    """What is still in the stream's buffer goes nowhere, or Python would fail on it once more at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())


def _say(text: str) -> None:
    print(f"mass-adapt: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
