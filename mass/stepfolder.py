"""A step folder: what is in it, how it is written to the disk, read, and found as it was written or not.

    step_000010/policy/            PEFT: adapter_config.json, adapter_model.safetensors
                scorer.safetensors  optimizer.safetensors  rng.safetensors
                meta.json          step, cursor, versions, ..., sha256 and size of every file

Reading trusts nothing: every file must have the hash that meta.json gives, meta.json its own. No pickle is written or
read. Where step folders lie and which of them counts is the business of mass/checkpoint.py.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import torch as safetensors
from torch import Tensor

from mass.log import fsync_folder
from mass.lora import Layers, LoraShape, load_peft, save_peft

FORMAT = 1
FILES = (
    "policy/adapter_config.json",
    "policy/adapter_model.safetensors",
    "scorer.safetensors",
    "optimizer.safetensors",
    "rng.safetensors",
)
# the name of a step folder
STEP = re.compile(r"step_(\d{6,})")


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


def write(folder: Path, step: int, contents: Contents) -> None:
    """Make `folder` with every file of a step, and sync them and their folders to the disk.

    Raises OSError or SafetensorError where the disk is full or fails; what was written until then is left.
    """
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


def read(step: Path, layers: Layers) -> Contents:
    """What a sound step folder holds; its `meta` without the list of files. `layers` are those of the base model."""
    meta = read_meta(step)
    rng = safetensors.load_file(step / "rng.safetensors")
    lora = meta["lora"]
    return Contents(
        policy=load_peft(step / "policy", layers),
        shape=LoraShape(lora["rank"], lora["alpha"], tuple(lora["targets"]), lora.get("last")),
        base_name=meta["base"],
        scorer=safetensors.load_file(step / "scorer.safetensors"),
        optimizer=safetensors.load_file(step / "optimizer.safetensors"),
        rng=[rng[key] for key in sorted(rng)],
        meta={key: value for key, value in meta.items() if key != "files"},
    )


def read_meta(step: Path) -> dict[str, Any]:
    """meta.json without its own hash. Raises ValueError or KeyError unless it is byte for byte as it was written."""
    text = (step / "meta.json").read_bytes().decode("utf-8")
    meta = json.loads(text)
    del meta["sha256"]
    if _seal(meta) != text:
        raise ValueError("the hash in it is not the hash of it")
    return meta


def fault(step: Path) -> str | None:
    """What is wrong with a step folder, naming the file; None when nothing is."""
    path = step / "meta.json"
    if not path.is_file():
        return f"{path} is missing: this is not a whole step folder"
    try:
        meta = read_meta(step)
        if meta["format"] != FORMAT:
            return f"{path} has format {meta['format']}; this version reads format {FORMAT}"
        named, files = meta["step"], {name: meta["files"][name] for name in FILES}
    except (ValueError, KeyError, TypeError) as error:
        return f"{path} is damaged or not of this project ({error})"
    if named != number(step):
        return f"{path} belongs to step {named}: the folder was renamed"
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


def number(step: Path) -> int:
    """The number in a step folder's name."""
    return int(step.name.removeprefix("step_"))


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
