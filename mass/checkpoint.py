"""The run folder: open it, save a step so that it is complete or absent, load it back verified.

    <folder>/<name>/recipe.yaml  log.jsonl  samples.jsonl  tb/  latest
                    step_000010/policy/            PEFT: adapter_config.json, adapter_model.safetensors
                                scorer.safetensors  optimizer.safetensors  rng.safetensors
                                meta.json          step, cursor, versions, ..., sha256 and size of every file

A step is written beside (`.step_000010.tmp-<pid>`), synced to the disk, and renamed; so a folder named step_* is
complete, and the newest of them is where a run continues. `latest` holds its name, for people and scripts. Reading
trusts nothing: every file must have the hash that meta.json gives, meta.json its own. No pickle is written or read.
"""

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor
from yaml import YAMLError

from mass.errors import MassError
from mass.log import fsync_folder, no_space, write_atomic
from mass.lora import Layers, LoraShape, load_peft, save_peft

FORMAT = 1
FILES = (
    "policy/adapter_config.json",
    "policy/adapter_model.safetensors",
    "scorer.safetensors",
    "optimizer.safetensors",
    "rng.safetensors",
)
# a change of these makes another network: its tensors would not fit
ARCHITECTURE = ("model.path", "lora.", "scorer.layers", "scorer.hidden", "scorer.pool", "inner.learned_lr")
STEP = re.compile(r"step_(\d{6,})")

# locks held by this process until it ends, by run folder
_locks: dict[Path, int] = {}


@dataclasses.dataclass(frozen=True)
class Run:
    """An open run folder, and the step folder to continue from (None: a new run).

    changed: "key: old -> new" for each recipe key that is not as the run was made with. aside: later steps, renamed.
    """

    folder: Path
    start: Path | None = None
    changed: tuple[str, ...] = ()
    aside: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Contents:
    """All of a training state that a step folder holds.

    policy: adapter without task axis, fp32. scorer, optimizer: name -> tensor, the optimizer's state whole, not
    sharded. rng: one uint8 tensor a rank. meta: JSON values only (cursor, counters, fingerprint of the base, extra).
    """

    policy: dict[str, Tensor]
    shape: LoraShape
    base_name: str
    scorer: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    rng: list[Tensor]
    meta: dict[str, Any]


def open_run(folder: Path, name: str, recipe_yaml: str, resume: str | Path) -> Run:
    """Make or reopen the run folder `folder/name`; on one rank only, before the model is loaded.

    resume: "no" makes a new run; "auto" continues the run from its newest step, or makes a new one; a step folder
    of this run continues there and sets its later steps aside (renamed to *.left-<time>); one of another run starts
    a new run from that state. Raises MassError where a run would be overwritten or is in use by another process,
    the step is damaged, or the recipe asks for another network than the one saved.
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
        aside = []
        if start is not None:
            verify(start)
            changed = _changes(start, recipe_yaml)
            if start.parent.resolve() == root.resolve():
                aside = [_set_aside(step) for step in steps(root) if _number(step) > _number(start)]
                write_atomic(root / "latest", start.name + "\n")
        write_atomic(root / "recipe.yaml", recipe_yaml)
    except OSError as error:
        raise MassError(
            f"run.folder: {root} cannot be written ({error}). Choose another run.folder"
        ) from error
    return Run(root, start, changed, tuple(aside))


def save(run: Run, step: int, contents: Contents, keep: int) -> Path:
    """Write a step folder, point `latest` at it, drop all but the newest `keep` (0: keep all); on one rank only.

    Complete or absent, whatever happens on the way. A step that is there already and sound is left as it is. Raises
    MassError when the disk is full or fails; what was saved before stays.
    """
    target = run.folder / f"step_{step:06d}"
    beside = run.folder / f".{target.name}.tmp-{os.getpid()}"
    try:
        if target.exists() and _fault(target) is not None:
            _set_aside(target)
        if not target.exists():
            _write(beside, step, contents)
            os.rename(beside, target)
            fsync_folder(run.folder)
        write_atomic(run.folder / "latest", target.name + "\n")
        for old in [other for other in steps(run.folder) if _number(other) <= step][:-keep] if keep else []:
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
    Raises MassError that names the bad file and the newest good step, or says that the base is another one.
    """
    step = _step_in(Path(folder))
    verify(step)
    meta = _read_meta(step / "meta.json")
    saved = meta.get("fingerprint")
    if fingerprint is not None and saved is not None and saved != fingerprint:
        raise MassError(
            f"{step} was made on another base model: {meta['base']}. Set model.path to that model"
        )
    rng = safetensors.load_file(step / "rng.safetensors")
    lora = meta["lora"]
    return Contents(
        policy=load_peft(step / "policy", layers),
        shape=LoraShape(lora["rank"], lora["alpha"], tuple(lora["targets"])),
        base_name=meta["base"],
        scorer=safetensors.load_file(step / "scorer.safetensors"),
        optimizer=safetensors.load_file(step / "optimizer.safetensors"),
        rng=[rng[key] for key in sorted(rng)],
        meta={key: value for key, value in meta.items() if key != "files"},
    )


def read_run(folder: Path) -> tuple[str, Path]:
    """(recipe.yaml's text, newest good step folder) of a run, for test time; a step folder stands for itself."""
    folder = Path(folder).resolve()
    if STEP.fullmatch(folder.name):
        verify(folder)
        step: Path | None = folder
        folder = folder.parent
    else:
        step = newest_good(folder)
    recipe = folder / "recipe.yaml"
    if not recipe.is_file():
        raise MassError(f"{folder} is not a run folder: it has no recipe.yaml")
    if step is None:
        raise MassError(f"{folder} has no complete and undamaged save: train further, or choose another run")
    return recipe.read_text(encoding="utf-8"), step


def steps(folder: Path) -> list[Path]:
    """The step folders of a run, oldest first."""
    found = [path for path in Path(folder).glob("step_*") if STEP.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=_number)


def latest(folder: Path) -> Path | None:
    """The newest step folder of a run, whatever `latest` says: the name alone makes a step complete."""
    found = steps(folder)
    return found[-1] if found else None


def newest_good(folder: Path) -> Path | None:
    """The newest step folder of a run in which every file is as it was written."""
    return next((step for step in reversed(steps(folder)) if _fault(step) is None), None)


def verify(step: Path) -> None:
    """Raise MassError, naming the file and the newest good step, unless all of a step folder is as it was written."""
    fault = _fault(step)
    if fault is not None:
        good = newest_good(step.parent)
        way_out = (
            f"The newest good save is {good.name}: run.resume={good} continues there"
            if good
            else f"{step.parent} has no good save: choose another run.name to start anew"
        )
        raise MassError(f"{fault}. {way_out}")


def read_meta(step: Path) -> dict[str, Any]:
    """The meta.json of a step folder that `open_run` or `verify` has found sound."""
    return _read_meta(step / "meta.json")


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


def _number(step: Path) -> int:
    return int(step.name.removeprefix("step_"))


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
        raise MassError(f"{path} cannot be read ({error}): mend it, or choose another run.name") from None
    new = _flat(OmegaConf.to_container(OmegaConf.create(recipe_yaml)))
    keys = [key for key in {**old, **new} if key not in ("run.name", "run.folder", "run.resume")]
    changed = {
        key: f"{key}: {old.get(key, 'absent')} -> {new.get(key, 'absent')}"
        for key in keys
        if old.get(key, "absent") != new.get(key, "absent")
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


def _write(folder: Path, step: int, contents: Contents) -> None:
    """Write every file of a step and sync them and their folders to the disk."""
    folder.mkdir()
    save_peft(folder / "policy", contents.policy, contents.shape, contents.base_name)
    rng = {f"rank_{rank:06d}": state for rank, state in enumerate(contents.rng)}
    for name, tensors in (("scorer", contents.scorer), ("optimizer", contents.optimizer), ("rng", rng)):
        (folder / f"{name}.safetensors").write_bytes(_bytes(tensors))
    meta = {
        **contents.meta,
        "format": FORMAT,
        "step": step,
        "base": contents.base_name,
        "lora": dataclasses.asdict(contents.shape),
        "world_size": len(contents.rng),
        "versions": _versions(),
        "files": {
            name: {"bytes": (folder / name).stat().st_size, "sha256": _sha256(folder / name)}
            for name in FILES
        },
    }
    (folder / "meta.json").write_text(_seal(meta), encoding="utf-8")
    # safetensors makes files that only their owner can read
    shutil.copymode(folder / "meta.json", folder / "policy" / "adapter_model.safetensors")
    for path in [*FILES, "meta.json"]:
        with open(folder / path, "rb") as file:
            os.fsync(file.fileno())
    fsync_folder(folder / "policy")
    fsync_folder(folder)


def _bytes(tensors: Mapping[str, Tensor]) -> bytes:
    # cloned, for safetensors refuses tensors that share memory
    return safetensors.save(
        {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
    )


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("mass", "torch", "transformers", "peft", "deepspeed", "safetensors"):
        # mass may run from a checkout that is not installed
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _dump(meta: Mapping[str, Any]) -> str:
    return json.dumps(meta, indent=1, sort_keys=True, allow_nan=False) + "\n"


def _seal(meta: Mapping[str, Any]) -> str:
    """meta.json's text: the hash of all the rest is a field of it."""
    # through JSON once, so that tuples and integer keys are already what a reader will see
    meta = json.loads(json.dumps(meta, allow_nan=False))
    return _dump({**meta, "sha256": hashlib.sha256(_dump(meta).encode()).hexdigest()})


def _read_meta(path: Path) -> dict[str, Any]:
    """meta.json without its own hash. Raises ValueError or KeyError unless it is byte for byte as it was written."""
    text = path.read_bytes().decode("utf-8")
    meta = json.loads(text)
    del meta["sha256"]
    if _seal(meta) != text:
        raise ValueError("the hash in it is not the hash of it")
    return meta


def _fault(step: Path) -> str | None:
    """What is wrong with a step folder, naming the file; None when nothing is."""
    path = step / "meta.json"
    if not path.is_file():
        return f"{path} is missing: this is not a whole step folder"
    try:
        meta = _read_meta(path)
        if meta["format"] != FORMAT:
            return f"{path} has format {meta['format']}; this version reads format {FORMAT}"
        number, files = meta["step"], {name: meta["files"][name] for name in FILES}
    except (ValueError, KeyError, TypeError) as error:
        return f"{path} is damaged or not of this project ({error})"
    if number != _number(step):
        return f"{path} belongs to step {number}: the folder was renamed"
    for name, wanted in files.items():
        path = step / name
        if not path.is_file():
            return f"{path} is missing"
        size = path.stat().st_size
        if size != wanted["bytes"]:
            return f"{path} is damaged: it has {size} bytes, {wanted['bytes']} were written"
        if _sha256(path) != wanted["sha256"]:
            return f"{path} is damaged: its sha256 is not the one in meta.json"
    return None
