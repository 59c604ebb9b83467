"""The answers of an evaluation: each arm's in a file of its own, that a killed call goes on with and several processes share.

Only whole calls: an arm answers as its method does alone, batch by batch, and what comes of a problem is verified at once.
"""

import dataclasses
import hashlib
import itertools
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mass import filerun, votes
from mass.arms import Arm
from mass.blocks import weights_below
from mass.choices import Texts, best, majority, self_made, teacher_made, uniform
from mass.demonstrations import stated
from mass.errors import MassError
from mass.filerun import as_line, as_row, group, key_of, run_batches
from mass.kit import build_kit, lent
from mass.methods import METHODS, Record
from mass.model import load
from mass.problems import Task, truth
from mass.rewards import Verifier, find_answer
from mass.share import Share


class Work(NamedTuple):
    """What is left of an arm: its batches that are not all in the file, and the places that are."""

    arm: Arm
    path: Path
    keys: list[str]
    batches: list[list[int]]
    done: set[int]


def answer_all(
    chosen: Sequence[Arm],
    tasks: Sequence[Task],
    folder: Path,
    batch: int,
    say: Callable[[str], None],
    share: Share | None = None,
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
            say(f"{arm.name}: {len(done)} of {len(items)} problems have their answer")
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
            _with_model(list(same_model), tasks, verifier, say)
    # also where a kill came between the last answer and this: arms are paired by the order of their rows
    short = [work.path for work in works if not filerun.put_in_order(work.path, work.keys)]
    if short and share.size == 1:
        raise MassError(f"{short[0]} has lost lines meanwhile: go on with --resume")
    return not short


def _with_model(
    works: Sequence[Work], tasks: Sequence[Task], verifier: Verifier, say: Callable[[str], None]
) -> None:
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
                say(f"{arm.name}: done in {time.perf_counter() - begin:.1f} s")


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
