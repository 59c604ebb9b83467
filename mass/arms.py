"""The arms of an evaluation: a method, and with what weights and settings it runs.

mass                      the run, as it is
mass[inner.steps=1]       with other settings; `budget=TOKENS` is one of them
base:quest                without what was trained: base model, no scorer; shots and settings of the run
checkpoints/other:mass    another run, on the same problems
"""

import dataclasses
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

from mass.choices import Kit, by_truth
from mass.choices.guards import fisher_information
from mass.errors import MassError
from mass.methods import AUTO, METHODS
from mass.problems import Task, has_truth
from mass.wanted import Plan, plan, settings_key

BASE = "base"
_ARM = re.compile(r"(?:(?P<run>[^\[\]]+):)?(?P<method>[^\[\]:]+)(?:\[(?P<settings>.*)\])?", re.DOTALL)


@dataclass(frozen=True)
class Arm:
    """`name` is as given; `bare`: the trained adapter and scorer of the plan's run are left out."""

    name: str
    plan: Plan
    method: str
    bare: bool = False

    @property
    def key(self) -> str:
        """16 hexadecimal digits of all that its answers depend on."""
        text = f"{settings_key(self.plan, self.method)} {self.method} {self.bare}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def file(self) -> str:
        """The name of its file of answers."""
        return file_of(self.name)

    @property
    def weights(self) -> str:
        """What answers, for a report: the step of a run, a PEFT folder, or a bare model."""
        trained = None if self.bare else self.plan.step or self.plan.peft
        return str(trained or self.plan.recipe.model.path)

    def kit(self, whole: Kit) -> Kit:
        """What it works with, out of all that its plan loads."""
        if not self.bare:
            return whole
        bare = dataclasses.replace(whole, policy=None, author=None, head=None, chooser=None)
        return dataclasses.replace(bare, fisher=fisher_information(bare)) if bare.fisher else bare


def file_of(name: str) -> str:
    """The name of an arm's file of answers; two names that differ give two files."""
    plain = re.sub(r"[^\w.=,-]+", "_", name).strip("_.")[:80]
    digest = hashlib.sha256(name.encode()).hexdigest()[:6]
    return f"{plain}.jsonl" if plain == name else f"{plain}-{digest}.jsonl"


def parse(text: str, wanted: Plan, overrides: Sequence[str], own: tuple[str | None, str | None]) -> list[Arm]:
    """The arms that `--methods` lists. `own`: --run and --model of the call, whose plan with `overrides` is `wanted`.

    Raises MassError that names the arm, for a method that is none (with the nearest) or lacks what it needs, and for
    settings that cannot be.
    """
    names = _parts(text)
    if not names:
        raise MassError(f"--methods names no arm. The methods are {', '.join([*METHODS, AUTO])}.")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise MassError(f"--methods has the arm {twice} twice: leave one out")
    arms = []
    for name in names:
        try:
            arms.append(_arm(name, wanted, overrides, own))
        except MassError as error:
            raise MassError(f"arm {name}: {error}") from None
    return arms


def every_usable(wanted: Plan, tasks: Sequence[Task]) -> tuple[list[Arm], list[str]]:
    """An arm for each method that can be used, and why each of the others cannot."""
    arms, reasons = [], []
    for name in [*METHODS, AUTO]:
        try:
            if name == "ttt" and not any(len(task.problem.demonstrations) > 1 for task in tasks):
                raise MassError("no problem has two demonstrations")
            wanted.method(name, has_truth=all(has_truth(task) for task in tasks))
        except MassError as error:
            reasons.append(f"{name} is left out: {error}")
        else:
            arms.append(Arm(name, wanted, name))
    return arms, reasons


def check_truth(chosen: Sequence[Arm], tasks: Sequence[Task]) -> None:
    """Raise MassError where an arm weighs by the truth of its examples and a problem is of no world."""
    for arm in chosen:
        row = METHODS.get(arm.method)
        other = next((task for task in tasks if not has_truth(task)), None)
        if row is not None and row.weights is by_truth and other is not None:
            raise MassError(
                f"arm {arm.name}: its weights are the truth of the examples, and none is known for problems of "
                f"{other.source}. Leave the arm out, or take problems of a world alone (--problems world:NAME)."
            )


def _arm(name: str, wanted: Plan, overrides: Sequence[str], own: tuple[str | None, str | None]) -> Arm:
    match = _ARM.fullmatch(name)
    if match is None:
        raise MassError("an arm is METHOD, METHOD[KEY=VALUE,...], base:METHOD or RUN:METHOD")
    settings = _parts(match["settings"] or "")
    for setting in settings:
        if setting.startswith("problems."):
            raise MassError(
                f"{setting}: all arms answer the same problems. Give it to the call, not to an arm."
            )
    budget = wanted.budget
    for setting in [x for x in settings if x.startswith("budget=")]:
        settings.remove(setting)
        budget = _number(setting)
    other = match["run"] is not None and match["run"] != BASE
    bare = match["run"] == BASE
    found = wanted
    if other or settings:
        run, model = (match["run"], None) if other else own
        # which problems there are is for the call's own run to say
        shared = [x for x in overrides if not x.startswith("problems.")] if other else overrides
        found = plan(run, model, [*shared, *settings])
    found = dataclasses.replace(found, budget=budget, teacher=wanted.teacher)
    least = found.recipe.generate.answer_tokens
    if budget is not None and budget < least:
        raise MassError(f"a budget of {budget} is less than generate.answer_tokens={least}: raise it")
    # of which source the problems are is looked at where they are there
    found = found.of_method(match["method"], has_truth=True, bare=bare)
    return Arm(name, found, match["method"], bare)


def _number(setting: str) -> int:
    value = setting.partition("=")[2]
    if not value.isdecimal():
        raise MassError(f"{setting}: a number of tokens is wanted")
    return int(value)


def _parts(text: str) -> list[str]:
    """What stands between commas that no bracket encloses."""
    parts, depth = [""], 0
    for c in text:
        depth += (c in "[{(") - (c in "]})")
        if c == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += c
    return [part.strip() for part in parts if part.strip()]
