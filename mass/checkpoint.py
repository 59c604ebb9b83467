"""The run folder: open it, save a step so that it is complete or absent, load it back verified.

    <folder>/<name>/recipe.yaml  log.jsonl  samples.jsonl  tb/  latest
                    step_000010/   (mass/stepfolder.py)

A step is written beside (`.step_000010.tmp-<pid>`), synced to the disk, and renamed; so a folder named step_* is
complete, and the newest of them is where a run continues. `latest` holds its name, for people and scripts. Nothing is
read before all of its step folder was verified.
"""

import dataclasses
import errno
import fcntl
import hashlib
import os
import platform
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError
from torch import Tensor
from yaml import YAMLError

from mass import stepfolder
from mass.errors import MassError
from mass.log import fsync_folder, no_space, write_atomic
from mass.lora import Layers
from mass.schema import KEYS
from mass.stepfolder import STEP, Contents, number, read_meta

# a change of these makes another network: its tensors would not fit
ARCHITECTURE = ("model.path", "lora.", "scorer.layers", "scorer.hidden", "scorer.pool", "inner.learned_lr")

# locks held by this process until it ends, by run folder
_locks: dict[Path, int] = {}


@dataclasses.dataclass(frozen=True)
class Run:
    """An open run folder, and the step folder to continue from (None: a new run).

    changed: "key: old -> new" for each recipe key that is not as the run was made with. recipe: the text of the new one.
    aside: later steps, renamed by `commit`. branches: `start` is a step of another run, which `auto` would not find.
    """

    folder: Path
    start: Path | None = None
    changed: tuple[str, ...] = ()
    recipe: str = ""
    aside: tuple[str, ...] = ()
    branches: bool = False


def open_run(folder: Path, name: str, recipe_yaml: str, resume: str | Path) -> Run:
    """Make or reopen the run folder `folder/name`; on one rank only, before the model is loaded.

    resume: "no" makes a new run; "auto" continues the run from its newest step, or makes a new one; a step folder
    of this run continues there; one of another run starts a new run from that state. What is in the folder stays as it
    is until `commit`, so that a call that is refused changes no run. Raises MassError where a run would be overwritten
    or is in use by another process, the step is damaged, or the recipe asks for another network than the one saved.
    """
    if Path(name).name != name or name in ("", "..") or STEP.fullmatch(name):
        raise MassError(
            f"run.name={name!r}: give a plain folder name, not step_...; run.folder says where it lies"
        )
    root = Path(folder) / name
    try:
        root.mkdir(parents=True, exist_ok=True)
        _lock(root)
        for rest in root.glob(".*.tmp-*"):
            shutil.rmtree(rest) if rest.is_dir() else rest.unlink()
        start = _start(root, str(resume))
        changed: tuple[str, ...] = ()
        if start is not None:
            verify(start)
            changed = _changes(start, recipe_yaml)
    except OSError as error:
        raise _not_writable(root, error) from error
    branches = start is not None and start.parent.resolve() != root.resolve()
    return Run(root, start, changed, recipe_yaml, branches=branches)


def commit(run: Run) -> Run:
    """Begin to train in an open run folder: write its recipe, and set the steps behind `start` aside (renamed to
    *.left-<time>); on one rank only, when the model is loaded, the problems are the same and the state is restored.
    """
    aside: list[str] = []
    try:
        # first what a full disk can refuse
        write_atomic(run.folder / "recipe.yaml", run.recipe)
        if run.start is not None and not run.branches:
            write_atomic(run.folder / "latest", run.start.name + "\n")
            aside = [_set_aside(step) for step in steps(run.folder) if number(step) > number(run.start)]
    except OSError as error:
        raise _not_writable(run.folder, error) from error
    return dataclasses.replace(run, aside=tuple(aside))


def _not_writable(root: Path, error: OSError) -> MassError:
    return MassError(f"run.folder: {root} cannot be written ({error}). Choose another run.folder")


def save(run: Run, step: int, contents: Contents, keep: int) -> Path:
    """Write a step folder, point `latest` at it, drop all but the newest `keep` (0: keep all); on one rank only.

    Complete or absent, whatever happens on the way. A step that is there already and sound is left as it is. Raises
    MassError when the disk is full or fails; what was saved before stays.
    """
    target = run.folder / f"step_{step:06d}"
    beside = run.folder / f".{target.name}.tmp-{os.getpid()}"
    try:
        if target.exists() and stepfolder.fault(target) is not None:
            _set_aside(target)
        if not target.exists():
            stepfolder.write(beside, step, contents)
            os.rename(beside, target)
            fsync_folder(run.folder)
        write_atomic(run.folder / "latest", target.name + "\n")
        for old in [other for other in steps(run.folder) if number(other) <= step][:-keep] if keep else []:
            # out of sight in one stroke: a kill while its files go leaves no half step
            gone = run.folder / f".{old.name}.tmp-{os.getpid()}"
            os.rename(old, gone)
            shutil.rmtree(gone)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(beside, ignore_errors=True)
        what = "no space left" if no_space(error) else "the disk failed"
        newest = latest(run.folder)
        safe = f"{newest.name} and earlier saves are safe" if newest else "nothing had been saved before"
        raise MassError(
            f"{what} while saving {target.name} in {run.folder} ({error}): {safe}. "
            "Free some space or lower save.keep, then run.resume=auto"
        ) from error
    return target


def load(folder: Path, layers: Layers, fingerprint: str | None = None) -> Contents:
    """Read a step folder, or the newest of a run, after verifying every file of it.

    `layers` are those of the base model, without which an adapter means nothing; `fingerprint` is the base's.
    Raises MassError that names the bad file and the newest good step, says that the base is another one, or that a run
    which goes on has dropped the step meanwhile.
    """
    step = _step_in(Path(folder))
    try:
        verify(step)
        meta = read_meta(step)
        saved = meta.get("fingerprint")
        if fingerprint is not None and saved is not None and saved != fingerprint:
            raise MassError(
                f"{step} was made on another base model: {meta['base']}. Set model.path to that model"
            )
        return stepfolder.read(step, layers)
    except (MassError, OSError, SafetensorError):
        if step.exists():
            raise
        raise MassError(
            f"{step} has gone since it was chosen: its run has saved newer steps and keeps the newest save.keep of them. "
            "Make the same call again, or raise save.keep"
        ) from None


def step_of(folder: Path) -> Path:
    """The newest good step folder of a run, for test time; a step folder stands for itself. The run has a recipe."""
    folder = Path(folder).resolve()
    if STEP.fullmatch(folder.name):
        verify(folder)
        step: Path | None = folder
        folder = folder.parent
    else:
        step = newest_good(folder)
    if not (folder / "recipe.yaml").is_file():
        raise MassError(f"{folder} is not a run folder: it has no recipe.yaml")
    if step is None:
        raise MassError(f"{folder} has no complete and undamaged save: train further, or choose another run")
    return step


def steps(folder: Path) -> list[Path]:
    """The step folders of a run, oldest first."""
    found = [path for path in Path(folder).glob("step_*") if STEP.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=number)


def latest(folder: Path) -> Path | None:
    """The newest step folder of a run, whatever `latest` says: the name alone makes a step complete."""
    found = steps(folder)
    return found[-1] if found else None


def newest_good(folder: Path) -> Path | None:
    """The newest step folder of a run in which every file is as it was written."""
    return next((step for step in reversed(steps(folder)) if stepfolder.fault(step) is None), None)


def verify(step: Path) -> None:
    """Raise MassError, naming the file and the newest good step, unless all of a step folder is as it was written."""
    wrong = stepfolder.fault(step)
    if wrong is not None:
        good = newest_good(step.parent)
        way_out = (
            f"The newest good save is {good.name}: run.resume={good} continues there"
            if good
            else f"{step.parent} has no good save: choose another run.name to start anew"
        )
        raise MassError(f"{wrong}. {way_out}")


def fingerprint(parameters: Iterable[tuple[str, Tensor]]) -> str:
    """A hash of a base model's parameter names, shapes and some values; before LoRA slots change the names.

    The values are rounded to bf16, so that the same model loaded in bf16 and in fp32 has one fingerprint. A parameter is
    not looked at any more when the next is taken.
    """
    seen = {}
    for name, tensor in parameters:
        some = tensor.detach().flatten()[:: max(1, tensor.numel() // 64)].to(torch.bfloat16).float().cpu()
        seen[name] = f"{name} {tuple(tensor.shape)}".encode() + some.numpy().tobytes()
    return hashlib.sha256(b"".join(seen[name] for name in sorted(seen))).hexdigest()


def _set_aside(step: Path) -> str:
    left = step.with_name(f"{step.name}.left-{time.time_ns()}")
    os.rename(step, left)
    return left.name


def _lock(root: Path) -> None:
    """Keep every other process off this run. The lock goes with the process, also when it is killed."""
    root = root.resolve()
    if root in _locks:
        return
    handle = os.open(root / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        # a record lock: unlike flock, forked workers that outlive this process do not inherit it
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        owner = os.read(handle, 200).decode(errors="replace") or "another process"
        os.close(handle)
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            raise
        raise MassError(f"run {root} is in use by {owner}: wait for it, or choose another run.name") from None
    os.ftruncate(handle, 0)
    os.pwrite(handle, f"process {os.getpid()} on {platform.node()}".encode(), 0)
    _locks[root] = handle


def _step_in(folder: Path) -> Path:
    """The folder itself where it is named like a step, else the newest step in it."""
    folder = folder.resolve()
    if STEP.fullmatch(folder.name):
        return folder
    step = latest(folder)
    if step is None:
        raise MassError(f"{folder} is neither a step folder nor a run with saved steps")
    return step


def _start(root: Path, resume: str) -> Path | None:
    log = root / "log.jsonl"
    taken = bool(steps(root)) or (log.exists() and log.stat().st_size > 0)
    exists = MassError(f"run {root} exists: run.resume=auto continues it, or choose another run.name")
    if resume == "no":
        if taken:
            raise exists
        return None
    if resume == "auto":
        return latest(root)
    if not Path(resume).is_dir():
        raise MassError(f"run.resume={resume}: there is no such folder. Give no, auto, or a step folder")
    step = _step_in(Path(resume))
    if taken and step.parent != root.resolve():
        raise exists
    return step


def _changes(start: Path, recipe_yaml: str) -> tuple[str, ...]:
    path = start.parent / "recipe.yaml"
    if not path.exists():
        return (f"{path} is missing: what has changed since is not known",)
    try:
        old = _flat(OmegaConf.to_container(OmegaConf.create(path.read_text(encoding="utf-8"))))
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError) as error:
        why = " ".join(str(error).split())
        raise MassError(f"{path} cannot be read ({why}): mend it, or choose another run.name") from None
    new = _flat(OmegaConf.to_container(OmegaConf.create(recipe_yaml)))
    keys = [key for key in {**old, **new} if key not in ("run.name", "run.folder", "run.resume")]
    # a network saved before one of its keys existed is what that key's default makes
    was = {key: KEYS[key].default for key in keys if key in KEYS and key.startswith(ARCHITECTURE)} | old
    changed = {
        key: f"{key}: {old.get(key, 'absent')} -> {new.get(key, 'absent')}"
        for key in keys
        if was.get(key, "absent") != new.get(key, "absent")
    }
    other = [line for key, line in changed.items() if key.startswith(ARCHITECTURE)]
    if other:
        raise MassError(
            f"{start} holds another network than the recipe asks for ({'; '.join(other)}). "
            "Set that back, or start a new run with another run.name"
        )
    return tuple(changed.values())


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dict -> {"a.b": value}; an empty dict is a value."""
    if not isinstance(tree, dict) or not tree:
        return {prefix.removesuffix("."): tree} if prefix else {}
    return {
        key: value for name, part in tree.items() for key, value in _flat(part, f"{prefix}{name}.").items()
    }
