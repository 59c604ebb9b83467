"""mass-eval: every method (arm) on the same held-out problems, verified, with the statistics that a sceptic asks for.

Each arm has a file of answers in the --out folder, that a killed call goes on with and several processes share; when all are
there, the table is printed and written as results.json, results.md and results.html. docs/evaluation.md says how each number is
made.
"""

import argparse
import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import json
import math
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console

from mass import arms, attribution, compare, curves, filerun, pool, results, tally, votes
from mass.arms import Arm
from mass.blocks import weights_below
from mass.choices import Texts, best, majority, self_made, teacher_made, uniform
from mass.demonstrations import stated
from mass.disjoint import Problems, held_out
from mass.errors import MassError
from mass.filerun import as_line, as_row, group, key_of, run_batches
from mass.kit import Plan, build_kit, lent, plan
from mass.log import no_space, write_atomic
from mass.methods import METHODS, Record
from mass.model import load
from mass.problems import Task, truth
from mass.rewards import Verifier, find_answer, require
from mass.share import Share, join

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
    parser.add_argument("--limit", type=int, metavar="N", help="the first N of them")
    parser.add_argument("--out", metavar="FOLDER", help="answers and report; default: evaluation/ in the run")
    parser.add_argument("--resume", action="store_true", help="go on with the --out of a call that stopped")
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
    whole = answer_all(chosen, problems.tasks, folder, args.batch, share)
    share.leave()
    if not whole:
        return None
    # the process that is left does the rest: one, where several have found all answers there
    with _claimed(folder) as ours:
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
        **tally.results(rows, problems.trained, args.count),
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


# ---- the answers


class Work(NamedTuple):
    """What is left of an arm: its batches that are not all in the file, and the places that are."""

    arm: Arm
    path: Path
    keys: list[str]
    batches: list[list[int]]
    done: set[int]


@contextlib.contextmanager
def _claimed(folder: Path) -> Iterator[bool]:
    """Whether no other process holds this folder; as long as the context lasts it is ours."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(handle)


def answer_all(
    chosen: Sequence[Arm], tasks: Sequence[Task], folder: Path, batch: int, share: Share | None = None
) -> bool:
    """Answer what the files of the arms do not hold yet. A model is loaded once for all arms that use it.

    `share`: of several processes each takes its part of every arm's batches. True when all answers are there; False when
    another process has some still to give, or the table.
    """
    share = share or Share()
    items = [task.problem for task in tasks]
    batches = group(items, batch)
    works = []
    for arm in chosen:
        # hashes the run's files: once an arm
        settings = arm.key
        path, keys = folder / arm.file, [_key(settings, task) for task in tasks]
        done = filerun.read_done(path, keys)
        if done and share.rank == 0:
            _say(f"{arm.name}: {len(done)} of {len(items)} problems have their answer")
        # a batch of which a kill has left a part is done again whole: rounding depends on who shares it
        left = [some for some in batches[share.rank :: share.size] if not done.issuperset(some)]
        works.append(Work(arm, path, keys, left, done))
    if share.rank and all(len(work.done) == len(items) for work in works):
        # nothing is left to wait for: the first process has the word
        return False
    todo = [work for work in works if work.batches]
    # arms of one model, and of one kit, together; otherwise in the order they were asked for
    models, kits = [_model(work) for work in todo], [_loaded(work) for work in todo]
    todo.sort(key=lambda work: (models.index(_model(work)), kits.index(_loaded(work))))
    with Verifier() as verifier:
        for _, same_model in itertools.groupby(todo, key=_model):
            _with_model(list(same_model), tasks, verifier)
    # also where a kill came between the last answer and this: arms are paired by the order of their rows
    short = [work.path for work in works if not filerun.put_in_order(work.path, work.keys)]
    if short and share.size == 1:
        raise MassError(f"{short[0]} has lost lines meanwhile: go on with --resume")
    return not short


def _with_model(works: Sequence[Work], tasks: Sequence[Task], verifier: Verifier) -> None:
    """Arms of one base model. What they draw by the same call is drawn once."""
    r = works[0].arm.plan.recipe
    m = r.model
    hf, tokenizer = load(
        m.path, dtype=m.dtype, device=m.device, cache=m.cache, attention=m.attention, world=r.problems.world
    )
    weights = sum(parameter.numel() for parameter in hf.parameters())
    items = [task.problem for task in tasks]
    by_text = {task.problem.text: task for task in tasks}
    texts = Texts()
    for _, same_kit in itertools.groupby(works, key=_loaded):
        with lent(hf, tokenizer):
            some = list(same_kit)
            kit = build_kit(some[0].arm.plan, (hf, tokenizer))
            # for the arm whose weights are the truth; no other looks at it
            kit = dataclasses.replace(
                kit, texts=texts, truth=lambda p, *example: truth(by_text[p.text], *example)
            )
            below = weights_below(kit.parts) if kit.parts else 0
            for arm, path, keys, batches, done in some:
                begin = time.perf_counter()
                for found in run_batches(arm.kit(kit), items, batches, arm.method, baselines=False):
                    rows = [
                        as_row(place, keys[place], record)
                        | _verified(arm, tasks[place], record, verifier, weights, below)
                        for place, record in found
                        if place not in done
                    ]
                    filerun.append(path, [as_line(row) for row in rows])
                _say(f"{arm.name}: done in {time.perf_counter() - begin:.1f} s")


def _verified(
    arm: Arm, task: Task, record: Record, verifier: Verifier, weights: int, below: int
) -> dict[str, Any]:
    """What a row has beside its record. `weights`: how many the base model has; `below`: of these below the lowest adapter."""
    verdict = verifier.verify(record.solution, task)
    tries = _tries(arm, task, record, verifier)
    return {
        "source": task.source,
        "reference": task.answer,
        "score": verdict.score if math.isfinite(verdict.score) else None,
        "verdict": verdict.status,
        # a forward pass takes two operations a weight and token, a backward pass four where there is one
        "flops": weights * (2 * record.tokens.generated + 6 * record.tokens.trained)
        - 4 * below * record.tokens.trained,
        "truth": _truth(arm, task, record),
        "tries": tries,
        "vote_rules": _vote_rules(arm, task, record, tries, verifier),
    }


def _truth(arm: Arm, task: Task, record: Record) -> list[Any]:
    """[right, kin, honest] of each valid example where a world knows, else None. Own answers and training problems are no
    practice that a world could judge."""
    row = METHODS.get(arm.method)
    judged = row is not None and row.examples in (self_made, teacher_made)
    return [truth(task, e.problem, e.solution) if judged and e.valid else None for e in record.examples]


def _tries(arm: Arm, task: Task, record: Record, verifier: Verifier) -> list[float | None]:
    """The score of each own answer where the arm's answer is one of them (else none), None without a verdict."""
    row = METHODS.get(arm.method)
    if row is None or row.answer not in (majority, best):
        return []
    texts = [e.solution for e in record.examples]
    # tries are often alike, and some verifiers are slow
    score = {text: verifier.verify(text, task).score for text in dict.fromkeys(texts)}
    return [score[text] if math.isfinite(score[text]) else None for text in texts]


def _vote_rules(
    arm: Arm, task: Task, record: Record, tries: Sequence[float | None], verifier: Verifier
) -> dict[str, bool | None] | None:
    """What a vote by other rules makes of the tries, where the arm is a vote in which each try has one."""
    row = METHODS.get(arm.method)
    if row is None or row.answer is not majority or row.weights is not uniform:
        return None
    said = [find_answer(e.solution) for e in record.examples]
    return votes.by_rule(
        task,
        said,
        [score == 1.0 for score in tries],
        lambda answer: verifier.verify(stated(answer), task).score == 1.0,
    )


def _key(settings: str, task: Task) -> str:
    text = json.dumps([settings, task.answer, task.verifier, task.source])
    return key_of(task.problem, hashlib.sha256(text.encode()).hexdigest()[:16])


def _model(work: Work) -> str:
    r = work.arm.plan.recipe
    return json.dumps([dataclasses.asdict(r.model), r.problems.world], sort_keys=True)


def _loaded(work: Work) -> str:
    """Equal for arms whose plans load the same kit."""
    plan = work.arm.plan
    return json.dumps(
        [str(plan.step), str(plan.peft), plan.budget, plan.teacher, dataclasses.asdict(plan.recipe)],
        default=str,
        sort_keys=True,
    )


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
