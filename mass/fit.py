"""mass-adapt fit: learn which method pays for which problem (`auto`), on problems with known answers."""

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Sequence

import numpy as np
import torch

from mass import chooser
from mass.choices import Kit
from mass.choices.signals import signals
from mass.chooser import CANDIDATES, Chooser
from mass.disjoint import held_out
from mass.errors import MassError
from mass.kit import build_kit
from mass.methods import solve_drawn, usable
from mass.problems import Task
from mass.rewards import Verifier
from mass.wanted import answering, plan

# own answers that the signals are read from
SAMPLES = 4


def fit(kit: Kit, tasks: Sequence[Task], batch: int = 8, samples: int = SAMPLES) -> Chooser:
    """Answer every task by every method that `auto` can choose, under kit.budget, and regress what came out right."""
    if kit.budget is None:
        raise MassError("auto is fitted under a budget: --budget TOKENS")
    # one that does not fit the model's context teaches nothing
    tasks = [task for task in tasks if usable(kit, "none", task.problem)]
    if len(tasks) < chooser.LEAST:
        raise MassError(
            f"auto is fitted on {chooser.LEAST} problems or more; {len(tasks)} of these fit the model's context"
        )
    rows: list[np.ndarray] = []
    right: dict[str, list[float]] = {name: [] for name in CANDIDATES}
    with Verifier() as verifier:
        for i in range(0, len(tasks), batch):
            some = tasks[i : i + batch]
            seen, drawn = signals(kit, [task.problem for task in some], samples)
            rows.append(seen)
            for name in CANDIDATES:
                can = [j for j, task in enumerate(some) if usable(kit, name, task.problem)]
                problems = [some[j].problem for j in can]
                records = solve_drawn(kit, problems, name, name, [drawn[j] for j in can], baselines=False)
                outcome = [math.nan] * len(some)
                for j, record in zip(can, records, strict=True):
                    text = record.solution if record.answer is not None else ""
                    score = verifier.verify(text, some[j]).score
                    # a part of the score is no solved problem; no verdict stays none
                    outcome[j] = score if math.isnan(score) else float(score == 1.0)
                right[name] += outcome
            _say(f"{min(i + batch, len(tasks))} of {len(tasks)} problems")
    seen = np.concatenate(rows) if rows else np.zeros((0, len(chooser.SIGNALS)))
    return chooser.fit(seen, right, kit.budget, samples)


def main(argv: Sequence[str]) -> int:
    """`mass-adapt fit ...`. Returns the exit code; a MassError is the caller's to show."""
    parser = argparse.ArgumentParser(
        "mass-adapt fit", description="Fit method auto on problems with known answers.", allow_abbrev=False
    )
    parser.add_argument("--run", metavar="FOLDER", required=True, help="the run; auto.json is written there")
    parser.add_argument("--file", metavar="DEV.jsonl", required=True, help="problems with answers")
    parser.add_argument("--budget", type=int, metavar="TOKENS", required=True, help="tokens of a problem")
    parser.add_argument("--batch", type=int, default=8, metavar="T", help="problems adapted together (8)")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="a recipe key, for this call")
    args = parser.parse_intermixed_args(argv)
    if args.batch < 1:
        raise MassError(f"--batch {args.batch}: it wants 1 or more")
    wanted = plan(args.run, None, args.settings)
    if wanted.step is None:
        raise MassError(f"--run {args.run}: auto is fitted for a run of mass-train, which this is not")
    r = wanted.recipe
    if args.budget < r.generate.answer_tokens:
        raise MassError(
            f"--budget {args.budget} is less than generate.answer_tokens={r.generate.answer_tokens}: raise it"
        )
    # as mass-eval takes problems: none that the run has trained on, which its policy knows
    own = [f"problems.heldout={json.dumps([args.file])}"]
    if r.problems.verifier == "gym" and not args.file.startswith("gym:"):
        own.append("problems.verifier=auto")
    problems = held_out(plan(args.run, None, [*args.settings, *own]), [], made=True)
    tasks = problems.tasks
    if problems.left_out or problems.repeated:
        _say(
            f"left out: {problems.left_out} problems that the run has trained on or shows, {problems.repeated} repeated"
        )
    if len(tasks) < chooser.LEAST:
        raise MassError(f"{args.file} has {len(tasks)} problems; auto is fitted on {chooser.LEAST} or more")
    torch.set_num_threads(r.run.threads)
    kit = build_kit(dataclasses.replace(wanted, budget=args.budget))
    found = fit(kit, tasks, args.batch)
    found = dataclasses.replace(found, step=wanted.step.name, settings=answering(r))
    path = chooser.save(found, wanted.step.parent)
    shares = ", ".join(f"{name} {share:.3f}" for name, share in found.right.items())
    _say(f"{path}: fitted on {found.problems} problems; answered right: {shares}")
    return 0


def _say(text: str) -> None:
    print(f"mass-adapt fit: {text}", file=sys.stderr, flush=True)
