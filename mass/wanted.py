"""What is to adapt: what `--run`, `--model` and `key=value` name, found out before anything is loaded (`mass.kit` loads it)."""

import hashlib
import json
import logging
import operator
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedModel

from mass import checkpoint, chooser, recipe
from mass.choices import teacher_made, training_problems
from mass.errors import MassError
from mass.keys import said
from mass.lora import read_peft_shape
from mass.methods import AUTO, METHODS, Method, check, find
from mass.model import read_config
from mass.problems import Problem, Task
from mass.prompts import pick_shots
from mass.recipe import Recipe
from mass.rows import as_object, json_lines
from mass.schema import keys_of
from mass.sources import load_named
from mass.splits import draw_pool
from mass.teacher import endpoint

# what a saved adapter and scorer were made with
FIXED = ("lora.", "scorer.layers", "scorer.hidden", "scorer.pool")
# what changes time, memory and rounding, but no answer otherwise
SPEED = ("run.threads", "model.device", "model.cache", "generate.batch_rows", "inner.checkpoint")
# groups of keys that say how `auto` and what it chooses answer a problem
ANSWERING = ("prompt", "generate", "scorer", "inner", "guard")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """What to load: the recipe with its overrides, and a run's step folder or a PEFT folder (neither: a bare model)."""

    recipe: Recipe
    step: Path | None = None
    peft: Path | None = None
    # tokens that a problem may cost; who writes the examples of `tt-d`: a model, or http://HOST:PORT/v1#MODEL
    budget: int | None = None
    teacher: str | None = None

    @property
    def pool_size(self) -> int | None:
        """How many training problems there are at most, for shots and for `random`; None where their file is missing."""
        if self.step is None:
            return self.recipe.prompt.pool if _sources(self.recipe) else 0
        shots = self.step.parent / "shots.jsonl"
        return sum(bool(x.strip()) for x in shots.read_bytes().split(b"\n")) if shots.is_file() else None

    @property
    def fitted(self) -> chooser.Chooser | None:
        """What `mass-adapt fit` has made for the run. Raises MassError for a file that cannot be used."""
        return chooser.load(self.step.parent) if self.step else None

    def unlike(self, fitted: chooser.Chooser) -> str:
        """Where a chooser was fitted with another step or other settings: which, and the way out; else ""."""
        return fitted.unlike(self.step.name, answering(self.recipe)) if self.step else ""

    @property
    def default_method(self) -> str:
        """`mass` where there is a trained scorer, else `quest`; `none` where no step would be taken."""
        if self.recipe.inner.steps == 0:
            return "none"
        return "mass" if self.step else "quest"

    def method(self, name: str, *, has_truth: bool = False, bare: bool = False) -> Method:
        """The row of the table. Raises MassError that says what it lacks here, or which setting it cannot work under.

        `has_truth`: the problems are of a world; `bare`: without what the run trained."""
        r, trained = self.recipe, None if bare else self.step
        pool = self.pool_size
        if pool and self.step is None and name in METHODS and METHODS[name].examples is training_problems:
            # prompt.pool is the most, and the sources may have fewer
            pool = len(pool_of(self))
        fitted = self.fitted if trained else None
        row = find(
            name,
            has_scorer=trained is not None,
            # a missing file is for `build_kit` to complain of
            has_pool=pool != 0,
            has_teacher=self.teacher is not None,
            has_chooser=fitted is not None,
            has_truth=has_truth,
            steps=r.inner.steps,
        )
        check(
            name,
            guard=r.guard,
            examples=r.generate.examples,
            pool=pool,
            budget=self.budget,
            answer_tokens=r.generate.answer_tokens,
            fitted=fitted,
        )
        if name == AUTO and fitted:
            self._check_fitted(fitted)
        if row.examples is teacher_made and self.teacher and not endpoint(self.teacher):
            try:
                read_config(self.teacher, r.model.dtype, r.model.cache)
            except MassError as error:
                text = str(error).replace("model.path=", "--teacher ", 1)
                raise MassError(text.replace("model.path", "--teacher")) from None
        return row

    def _check_fitted(self, fitted: chooser.Chooser) -> None:
        """Raise MassError where what answers is not what `auto` has learned about; warn where that is not known."""
        if reason := self.unlike(fitted):
            raise MassError(f"method auto was fitted {reason}")
        if fitted.step is None:
            _log.warning(
                "%s does not say with which step and settings auto was fitted: fit again, or see that they are these",
                chooser.FILE,
            )

    def of_method(self, name: str, *, has_truth: bool = False, bare: bool = False) -> "Plan":
        """This plan for one method alone: without a teacher where the method asks none. Raises what `method` raises."""
        row = self.method(name, has_truth=has_truth, bare=bare)
        return self if row.examples is teacher_made else replace(self, teacher=None)


def plan(
    run: str | None,
    model: str | None,
    overrides: Sequence[str] = (),
    *,
    loaded: PreTrainedModel | None = None,
) -> Plan:
    """Find out what `--run` and `--model` name; nothing is loaded. Raises MassError for whatever is wrong with them.

    `overrides` are key=value. A run brings its recipe; all else starts from the recipe's defaults. `loaded`: a model in
    memory, that stands where the base model would be loaded.
    """
    if run is None and model is None and loaded is None:
        raise MassError("name what is to adapt: --run FOLDER (of a run, or a PEFT adapter) or --model MODEL")
    folder = Path(run).expanduser() if run is not None else None
    if folder is not None and not folder.is_dir():
        raise MassError(f"--run {run}: there is no such folder. It wants a run folder, e.g. checkpoints/demo")
    if folder is not None and not (folder / "adapter_config.json").is_file():
        if model is not None:
            raise MassError("--model goes with a PEFT folder or stands alone: a run names its own model")
        step = checkpoint.step_of(folder)
        found = recipe.load(step.parent / "recipe.yaml", overrides, training=False)
        own = recipe.load(step.parent / "recipe.yaml", training=False)
        _check_fixed(found, own, overrides, str(run))
        of_run = Plan(found, step=step)
        check_shots(of_run, pool_of(of_run))
        _check_shown(found, own, step)
        return of_run
    base = model
    if loaded is not None:
        base = loaded.name_or_path or "a model in memory"
    elif base is None and folder is not None:
        base = _base_of(folder)
    wanted = Plan(_defaults(str(base), overrides), peft=folder)
    if folder is not None:
        _check_peft(folder, str(base), overrides)
    if wanted.recipe.inner.learned_lr != "no":
        raise MassError(
            f"inner.learned_lr={wanted.recipe.inner.learned_lr}: only a run that learned its inner rate has one, and this is no "
            "run. Leave it out, and set inner.lr."
        )
    if not _sources(wanted.recipe):
        check_shots(wanted, [])
    return wanted


def settings_key(plan: Plan, method: str) -> str:
    """16 hexadecimal digits of everything that a method's answers depend on: recipe (less `SPEED`), weights, shots, budget."""
    digest = hashlib.sha256()
    tree = yaml.safe_load(recipe.dump(plan.recipe))
    for name in SPEED:
        group, _, key = name.partition(".")
        del tree[group][key]
    # of a model in a folder the name does not say what is in it; its weights would take long to read
    folders = [Path(name).expanduser() for name in (plan.recipe.model.path, plan.teacher) if name]
    weights = sorted(
        x for folder in folders for kind in ("safetensors", "bin") for x in folder.glob(f"*.{kind}")
    )
    seen = [(x.name, x.stat().st_size, x.stat().st_mtime_ns) for x in weights if x.is_file()]
    digest.update(json.dumps([tree, plan.budget, plan.teacher, seen], sort_keys=True).encode())
    files = [folder / "config.json" for folder in folders]
    files += [plan.step / "meta.json", plan.step.parent / "shots.jsonl"] if plan.step else []
    files += [plan.step.parent / chooser.FILE] if plan.step and method == AUTO else []
    files += (
        [plan.peft / name for name in ("adapter_config.json", "adapter_model.safetensors")]
        if plan.peft
        else []
    )
    # without a run shots are drawn from these; a hub set and a folder of one are known by name alone
    files += [] if plan.step else [Path(source).expanduser() for source in plan.recipe.problems.train]
    for path in files:
        # the hash of each file of a step is in its meta.json
        digest.update(path.read_bytes() if path.is_file() else b"")
    return digest.hexdigest()[:16]


def answering(r: Recipe) -> dict[str, Any]:
    """The keys that say how `auto` answers, with their values; not who draws, how fast and in which precision."""
    names = [name for group in ANSWERING for name in keys_of(group)]
    idle = (*SPEED, "generate.engine", "generate.step", "scorer.l2")
    return {name: operator.attrgetter(name)(r) for name in names if name not in idle}


def _defaults(model: str, overrides: Sequence[str], lora: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe's defaults for a model without a run: no shots unless problems.train names where they come from."""
    shots = {} if any(text.startswith("problems.train=") for text in overrides) else {"generate_shots": 0}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "defaults.yaml"
        # test time needs no training problems, which a recipe has to name
        path.write_text(
            yaml.safe_dump(
                {"model": {"path": model}, "problems": {"train": [""]}, "prompt": shots, "lora": lora or {}}
            )
        )
        try:
            return recipe.load(path, overrides, training=False)
        except MassError as error:
            raise MassError(str(error).replace(f"{path}: ", "", 1)) from None


def _check_fixed(found: Recipe, own: Recipe, overrides: Sequence[str], run: str) -> None:
    """Raise MassError where overrides change what a run's weights were made with. `own`: the run's recipe without them."""

    def fixed(r: Recipe) -> tuple[Any, ...]:
        return r.lora, r.scorer.layers, r.scorer.hidden, r.scorer.pool

    named = [text for text in overrides if text.startswith(FIXED)]
    if fixed(found) != fixed(own):
        # also by a whole group: scorer={layers: [1.0]}
        named += [text for text in overrides if text.startswith(("lora", "scorer"))]
    if named:
        raise MassError(f"{named[0]}: the saved adapter and scorer of {run} were not made so. Leave it out.")
    learned, asked = own.inner.learned_lr, found.inner.learned_lr
    if asked == "no":
        return
    if asked != learned:
        raise MassError(
            f"inner.learned_lr={asked}: {run} was trained with inner.learned_lr={learned}. Leave it out; inner.learned_lr=no "
            "takes inner.lr."
        )
    if found.inner.lr != own.inner.lr or any(text.startswith("inner.lr=") for text in overrides):
        raise MassError(
            f"inner.lr={found.inner.lr:g}: this run learned its inner rate. Add inner.learned_lr=no to set it by hand."
        )


def _check_shown(found: Recipe, own: Recipe, step: Path) -> None:
    """Raise MassError where overrides ask for other problems to show and to draw than those that the run set aside."""
    for key, asked, given in (
        ("problems.train", found.problems.train, own.problems.train),
        ("prompt.pool", found.prompt.pool, own.prompt.pool),
    ):
        if asked != given:
            raise MassError(
                f"{said(key, asked)}: the training problems that are shown and drawn here are those that the run set aside, in "
                f"{step.parent / 'shots.jsonl'}. Leave it out (mass-eval names the problems to answer by --problems)."
            )


def _check_peft(folder: Path, base: str, overrides: Sequence[str]) -> None:
    """Raise MassError where overrides want another adapter than that of a PEFT folder."""
    named = [text for text in overrides if text.startswith("lora")]
    if not named:
        return
    shape = read_peft_shape(folder)
    own = {"rank": shape.rank, "alpha": shape.alpha, "targets": list(shape.targets), "last": shape.last}
    for text in named:
        if vars(_defaults(base, [text], own).lora) != own:
            raise MassError(f"{text}: the adapter in {folder} was not made so. Leave it out.")


def check_shots(plan: Plan, pool: Sequence[Task]) -> None:
    """Raise MassError where prompts are to show more solved problems than there are. With guard.fisher the pool's problems
    are shown to each other."""
    r = plan.recipe
    p = r.prompt
    if r.guard.fisher and not pool:
        where = f"in {plan.step.parent / 'shots.jsonl'}" if plan.step else "here"
        raise MassError(
            f"guard.fisher={r.guard.fisher:g} takes the Fisher information of training problems, and there are none {where}: "
            f"{'' if plan.step else 'set problems.train=FILE.jsonl, or '}leave it out"
        )
    try:
        for target in [x.problem.id for x in pool] if r.guard.fisher else [""]:
            pick_shots(pool, p.solve_shots, r.run.seed, target, pairs=p.generate_shots)
    except MassError as error:
        asked = f"prompt.solve_shots={p.solve_shots} prompt.generate_shots={p.generate_shots}"
        if plan.step:
            way = f"{plan.step.parent / 'shots.jsonl'} holds {len(pool)} of the run's: lower them, or leave them out"
        elif _sources(r):
            way = f"problems.train gives {len(pool)} ({error})"
        else:
            way = "there are none here: name some by problems.train=FILE.jsonl, or set both to 0"
        raise MassError(f"{asked} show solved problems, and {way}") from None


def _sources(r: Recipe) -> list[str]:
    return [source for source in r.problems.train if source]


def _base_of(folder: Path) -> str:
    read_peft_shape(folder)
    base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get(
        "base_model_name_or_path"
    )
    if not base:
        raise MassError(f"{folder}/adapter_config.json names no base model: give it with --model MODEL")
    return str(base)


def pool_of(plan: Plan) -> list[Task]:
    """Training problems to show: those that the run set aside, or from problems.train."""
    r = plan.recipe
    p = r.problems
    if plan.step:
        path = plan.step.parent / "shots.jsonl"
        if not path.is_file():
            if r.prompt.generate_shots or r.prompt.solve_shots:
                raise MassError(
                    f"{path} is missing, and prompts show problems from it: "
                    "restore it, or set prompt.generate_shots=0 prompt.solve_shots=0"
                )
            return []
        try:
            return [
                Task(Problem(x["id"], x["problem"]), x["answer"], x["solution"], x["source"], "exact")
                for _, row in json_lines(path.read_bytes())
                for x in [as_object(row)]
            ]
        except (ValueError, KeyError, TypeError) as error:
            raise MassError(
                f"{path} is damaged ({error!r}): restore it from where the run was made"
            ) from None
    if not _sources(r):
        return []
    tasks = load_named(r, _sources(r), p.split, p.size, p.weights)
    return draw_pool(tasks, r.prompt.pool, r.run.seed)[0]
