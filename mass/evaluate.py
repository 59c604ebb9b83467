"""mass-eval: every method (arm) on the same held-out problems, verified, with the statistics that a sceptic asks for.

Each arm has a file of answers in the --out folder, that a killed call goes on with and several processes share; when all are
there, the table is printed and written as results.json, results.md and results.html. docs/evaluation.md says how each number is
made.
"""

import argparse
import contextlib
import dataclasses
import fcntl
import json
import os
import platform
import shlex
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from mass import arms, attribution, compare, curves, filerun, pool, results, tally
from mass.answers import answer_all
from mass.arms import Arm
from mass.disjoint import Problems, held_out
from mass.errors import MassError
from mass.log import no_space, write_atomic
from mass.methods import METHODS
from mass.problems import Task
from mass.rewards import require
from mass.share import Share, join
from mass.wanted import Plan, plan

VERSIONS = ("torch", "transformers", "numpy", "scipy", "statsmodels", "reasoning-gym", "math-verify")


def main(argv: Sequence[str] | None = None) -> int:
    """The console script. Returns the exit code: 0, or 2 for what the user has to mend."""
    words = list(sys.argv[1:] if argv is None else argv)
    args = _parser().parse_intermixed_args(words)
    out = sys.stdout
    try:
        # libraries may print: standard output is for the table
        with contextlib.redirect_stdout(sys.stderr):
            found = _pool(args, words) if args.pool else _run(args, words)
        if found is None:
            # the process that answers last has all of it
            return 0
        results.show(found, Console(file=out, highlight=False, width=None if out.isatty() else 180))
        return 0
    except MassError as error:
        print(f"mass-eval: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if not no_space(error):
            raise
        print("mass-eval: no space left for the answers: free some, and go on with --resume", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "mass-eval",
        description="Answer the same held-out problems by several methods and compare them.",
        epilog="An arm is METHOD, METHOD[KEY=VALUE,...] (a recipe key, or budget=TOKENS), base:METHOD (without what the run "
        f"trained) or RUN:METHOD. The methods are {', '.join([*METHODS, arms.AUTO])}. KEY=VALUE changes the run's recipe for "
        "all arms. docs/evaluation.md says more.",
        allow_abbrev=False,
    )
    parser.add_argument("--run", metavar="FOLDER", help="a run, one of its steps, or a PEFT adapter")
    parser.add_argument("--model", help="a bare model, or the base of the PEFT adapter")
    parser.add_argument(
        "--methods", metavar="ARM,ARM,...", help="what to compare; default: every method usable here"
    )
    parser.add_argument(
        "--problems",
        metavar="SOURCE",
        action="append",
        help="FILE.jsonl, a hub id, gym:NAME or world:NAME, once or more; default: the run's held-out problems",
    )
    parser.add_argument(
        "--limit", type=int, metavar="N", help="the first N of them, of several sources in turn"
    )
    parser.add_argument("--out", metavar="FOLDER", help="answers and report; default: evaluation/ in the run")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with the --out of a call that stopped, or add arms to it: all that its report is to have are named",
    )
    parser.add_argument("--batch", type=int, default=16, metavar="T", help="problems adapted together (16)")
    parser.add_argument(
        "--budget", type=int, metavar="TOKENS", help="what each problem may cost in every arm"
    )
    parser.add_argument("--teacher", metavar="MODEL", help="of tt-d: a model, or http://HOST:PORT/v1#MODEL")
    parser.add_argument(
        "--pool",
        nargs="+",
        metavar="FOLDER",
        help="put together what calls with these --out folders found, one a training seed; nothing is answered",
    )
    parser.add_argument(
        "--count",
        choices=tally.COUNTS,
        default=tally.COUNTS[0],
        help="when an answer is right: what its text states is (%(default)s), or the last number in the text is, in whatever form",
    )
    parser.add_argument(
        "--credit",
        type=int,
        metavar="N",
        help="leave each self-made example of N problems out in turn: is its credit right? (without --methods: nothing else)",
    )
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="a recipe key, for all arms")
    return parser


def _run(args: argparse.Namespace, words: Sequence[str]) -> dict[str, Any] | None:
    """Everything that a user can get wrong is looked at before a model is loaded. None: other processes still answer."""
    compare.require()
    for name in ("batch", "limit", "credit"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise MassError(f"--{name} {value}: it wants 1 or more")
    share, device = join()
    overrides = [*device, *args.settings]
    if args.problems:
        overrides.append(f"problems.heldout={json.dumps(args.problems)}")
    wanted = dataclasses.replace(
        plan(args.run, args.model, overrides), budget=args.budget, teacher=args.teacher
    )
    least = wanted.recipe.generate.answer_tokens
    if args.budget is not None and args.budget < least:
        raise MassError(f"--budget {args.budget} is less than generate.answer_tokens={least}: raise it")
    if not wanted.step and not args.problems:
        raise MassError("name the problems: --problems SOURCE (without a run there are none of its own)")
    folder = _folder(args, wanted, share)
    chosen = (
        None if args.methods is None else arms.parse(args.methods, wanted, overrides, (args.run, args.model))
    )
    problems = held_out(wanted, chosen or [], made=bool(args.problems), limit=args.limit)
    some = attribution.choose(wanted, problems.tasks, args.credit) if args.credit else []
    if chosen is None and some:
        chosen, problems = [], problems._replace(tasks=some)
    if chosen is None:
        chosen, reasons = arms.every_usable(wanted, problems.tasks)
        for reason in reasons if share.rank == 0 else ():
            _say(reason)
    arms.check_truth(chosen, problems.tasks)
    if chosen:
        require({task.verifier for task in problems.tasks})
    _check_kept(folder, chosen, args.credit)
    names = f", {len(chosen)} arms: {', '.join(arm.name for arm in chosen)}" if chosen else ""
    if share.rank == 0:
        _say(f"{len(problems.tasks)} problems{names}")
    if share.rank == 0 and (problems.left_out or problems.repeated):
        _say(
            f"left out: {problems.left_out} problems that a run has trained on or shows, {problems.repeated} repeated"
        )
    torch.set_num_threads(wanted.recipe.run.threads)
    folder.mkdir(parents=True, exist_ok=True)
    # the folder was looked at by the first process, before any has written into it
    share.wait()
    whole = answer_all(chosen, problems.tasks, folder, args.batch, _say, share)
    share.leave()
    if not whole:
        return None
    # the process that is left does the rest: one, where several find all answers there at the same time; another call's
    # report (its --credit may take long) is waited for
    with _claimed(folder, wait=share.size == 1) as ours:
        return _measured(args, words, wanted, chosen, problems, some, folder) if ours else None


def _measured(
    args: argparse.Namespace,
    words: Sequence[str],
    wanted: Plan,
    chosen: Sequence[Arm],
    problems: Problems,
    some: Sequence[Task],
    folder: Path,
) -> dict[str, Any]:
    """What all answers together say, and the credit of the examples of `some` problems; written into `folder`."""
    # another call may have written its report meanwhile
    _check_kept(folder, chosen, args.credit)
    credit = attribution.measure(wanted, some, args.batch, _say) if some else None
    if credit:
        write_atomic(folder / "credit.json", json.dumps(credit, indent=1, allow_nan=False) + "\n")
    rows = {arm.name: filerun.rows(folder / arm.file) for arm in chosen}
    found = {
        "command": ["mass-eval", *words],
        "seed": wanted.recipe.run.seed,
        "versions": _versions(),
        "weights": {arm.name: arm.weights for arm in chosen},
        "problems": len(problems.tasks),
        "left_out": problems.left_out,
        "repeated": problems.repeated,
        **tally.results(rows, lambda row: row["source"] in problems.trained, args.count),
        "credit": attribution.summary(credit) if credit else None,
        "learning": curves.read(wanted.step) if wanted.step else {},
    }
    return _written(folder, found)


def _pool(args: argparse.Namespace, words: Sequence[str]) -> dict[str, Any]:
    """The answers of other calls put together; nothing is answered, and no model is loaded."""
    compare.require()
    alone = ("run", "model", "methods", "problems", "limit", "budget", "teacher", "credit", "settings")
    given = next((name for name in alone if getattr(args, name)), None)
    if given is not None:
        raise MassError(
            f"--pool takes answers that are there: leave {'KEY=VALUE' if given == 'settings' else '--' + given} out"
        )
    if args.out is None:
        raise MassError("--pool wants a folder of its own for the report: --out FOLDER")
    folder = _usable_folder(Path(args.out), args.resume)
    found = {"command": ["mass-eval", *words], **pool.pooled([Path(name) for name in args.pool], args.count)}
    folder.mkdir(parents=True, exist_ok=True)
    return _written(folder, found)


def _written(folder: Path, found: dict[str, Any]) -> dict[str, Any]:
    results.write(folder, found)
    _say(
        f"written: {folder}/results.json, results.md, results.html, figures/{', credit.json' if found.get('credit') else ''}"
    )
    return found


def _folder(args: argparse.Namespace, wanted: Plan, share: Share) -> Path:
    if args.out is None and wanted.step is None:
        raise MassError("--out FOLDER is wanted where there is no run to keep the answers in")
    folder = Path(args.out) if args.out is not None else wanted.step.parent / "evaluation"  # type: ignore[union-attr]
    return folder if share.rank else _usable_folder(folder, args.resume)


def _usable_folder(folder: Path, resume: bool) -> Path:
    if folder.exists() and not folder.is_dir():
        raise MassError(f"--out {folder} is a file: name a folder")
    if folder.is_dir() and any(folder.iterdir()) and not resume:
        raise MassError(
            f"--out {folder} exists, and nothing is overwritten: name another folder, or go on with it by --resume"
        )
    return folder


def _check_kept(folder: Path, chosen: Sequence[Arm], credit: int | None) -> None:
    """Raise MassError where the folder's report has what that of this call would not have. An arm without its file is none."""
    path = folder / "results.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    names = [arm.name for arm in chosen]
    there = [x["arm"] for x in found["arms"] if (folder / arms.file_of(x["arm"])).is_file()]
    lost = [name for name in there if name not in names]
    if lost:
        whole = ",".join([*there, *(name for name in names if name not in there)])
        raise MassError(
            f"{path} has the arm{'s' * (len(lost) > 1)} {', '.join(lost)}, which this call does not name, and would be replaced. "
            f"Name all of them, with the settings that they had: --methods {shlex.quote(whole)} (what is answered stays); or "
            "name another --out"
        )
    if found.get("credit") and credit is None:
        raise MassError(
            f"{path} has the credit of {found['credit']['problems']} problems, and would be replaced. Give --credit as well, "
            "which measures it again; or name another --out"
        )


@contextlib.contextmanager
def _claimed(folder: Path, wait: bool) -> Iterator[bool]:
    """Whether no other process holds this folder; as long as the context lasts it is ours. `wait`: until it is."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                yield False
                return
            _say(f"another call is at its report in {folder}: waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield True
    finally:
        os.close(handle)


def _versions() -> dict[str, str]:
    from mass import __version__

    found = {"mass": __version__, "python": platform.python_version()}
    for name in VERSIONS:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _say(text: str) -> None:
    print(f"mass-eval: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
