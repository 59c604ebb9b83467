"""A model folder's weights, read by name and by part, into a model whose matrices are sharded as they are read.

No process ever holds the whole base: the model is made without memory for its parameters, the files are mapped, and of
a matrix only the rows that hold this rank's elements are copied.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from mass.errors import MassError
from mass.shards import Shards


class Weights:
    """The tensors of the safetensors files of a model, by the names that the model gives them."""

    def __init__(self, source: str, path: str, **download: Any) -> None:
        """`source`: a folder or a hub id, `path`: what the user called it. Raises OSError where there are no such files."""
        self.path = path
        whole = cached_file(
            source, SAFE_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False, **download
        )
        if whole is not None:
            files = [whole]
        else:
            index = str(cached_file(source, SAFE_WEIGHTS_INDEX_NAME, **download))
            names = sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
            files = [str(cached_file(source, name, **download)) for name in names]
        self.file: dict[str, Any] = {}
        for name in files:
            opened = safe_open(name, framework="pt")
            self.file |= dict.fromkeys(opened.keys(), opened)

    def match(self, hf: PreTrainedModel) -> None:
        """Give the tensors the model's names. Raises MassError for one that is missing or has another shape."""
        wanted = hf.state_dict(keep_vars=True)
        steps = get_model_conversion_mapping(hf)
        converters = [step for step in steps if isinstance(step, WeightConverter)]
        renamings = [step for step in steps if isinstance(step, WeightRenaming)]
        self.stored: dict[str, str] = {}
        for key in self.file:
            name, merged = rename_source_key(key, renamings, converters, hf.base_model_prefix, wanted)
            if name not in wanted and key in wanted:
                name, merged = key, None
            if merged is None:
                self.stored[name] = key
        for names, parameter in _by_identity(hf):
            # a tied weight is in the files under one of its names
            found = [self.stored[name] for name in names if name in self.stored]
            if not found:
                raise MassError(
                    f"model.path={self.path}: the files lack weights of the model, among them {names[0]}, or have them in a form "
                    "that cannot be read in parts. Load it with transformers and save it anew, or use zero.stage=2."
                )
            shape = self.file[found[0]].get_slice(found[0]).get_shape()
            if list(parameter.shape) != shape:
                raise MassError(
                    f"model.path={self.path}: {found[0]} has shape {tuple(shape)} in the files, but the model of config.json "
                    f"wants {tuple(parameter.shape)}. They are not of one model."
                )
            self.stored |= dict.fromkeys(names, found[0])

    def whole(self, name: str) -> Tensor:
        stored = self.stored[name]
        return self.file[stored].get_tensor(stored)

    def part(self, name: str, low: int, high: int) -> Tensor:
        """Elements [low, high) of a flattened matrix; only the rows that they lie in are read."""
        rows = self.file[self.stored[name]].get_slice(self.stored[name])
        width = rows.get_shape()[-1]
        first = low // width
        return rows[first : -(-high // width)].flatten()[low - first * width : high - first * width]


def read_sharded(
    weights: Weights, config: Any, dtype: torch.dtype, attention: str, shards: Shards
) -> PreTrainedModel:
    """The model of a config with its matrices sharded and all else whole, on the shards' device."""
    with init_empty_weights(include_buffers=False):
        hf = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention, trust_remote_code=False
        )
    # the context took each name's parameter for one of its own
    hf.tie_weights()
    weights.match(hf)
    shards.take(hf, weights.part, dtype)
    for path, module in hf.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            stored = f"{path}.{name}" in weights.stored
            setattr(module, name, (weights.whole(f"{path}.{name}") if stored else buffer).to(shards.device))
    for names, parameter in _by_identity(hf):
        if parameter.device.type == "meta":
            value = nn.Parameter(weights.whole(names[0]).to(shards.device, dtype, copy=True))
            for name in names:
                owner, _, last = name.rpartition(".")
                setattr(hf.get_submodule(owner), last, value)
    return hf


def _by_identity(hf: PreTrainedModel) -> Iterator[tuple[list[str], nn.Parameter]]:
    """Each parameter once, with all its names."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in hf.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    yield from [(own, parameter) for parameter, own in names.items()]
