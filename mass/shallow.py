"""Copies of a model with fewer blocks: what a pass takes is a line in how many there are.

Two depths are measured (`mass.memory`, on fake tensors) and the line through them is read at the model's own.
"""

import copy
from dataclasses import dataclass, replace

from transformers import AutoModelForCausalLM, PreTrainedModel

from mass.blocks import Split, lowest
from mass.lora import Layers, LoraShape, attach

# The two depths that are tried. One block would hide what a block's neighbour keeps alive.
DEPTHS = (2, 3)


@dataclass(frozen=True)
class Copy:
    """A shallow copy of the model, of fake tensors."""

    hf: PreTrainedModel
    layers: Layers
    parts: Split | None


def shallow(hf: PreTrainedModel, parts: Split | None, shape: LoraShape, depth: int, device: str) -> Copy:
    """The model's architecture with `depth` blocks, all with adapters. Call it under a FakeTensorMode.

    The copy lies on the CPU and takes its passes as one on `device` (a type) would."""
    config = copy.deepcopy(hf.config)
    text = config.get_text_config()
    text.num_hidden_layers = depth
    if getattr(text, "layer_types", None):
        kinds = text.layer_types
        text.layer_types = [kinds[i % len(kinds)] for i in range(depth)]
    dtype = next(hf.parameters()).dtype
    fake = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
    fake.stands_for = device
    targets = tuple(_in_block(target, parts) for target in shape.targets)
    layers = attach(fake, replace(shape, targets=targets, last=None))
    if parts is None:
        return Copy(fake, layers, None)
    names = {id(module): name for name, module in parts.body.named_modules()}
    where = names[id(parts.blocks[0])].rpartition(".")[0]
    blocks = list(fake.base_model.get_submodule(where).children())
    norm = fake.base_model.get_submodule(names[id(parts.norm)])
    stem = parts.prefix[0].removesuffix("0.")
    prefix = [f"{stem}{i}." for i in range(depth)]
    return Copy(fake, layers, Split(fake.base_model, blocks, prefix, norm, layers))


def _in_block(target: str, parts: Split | None) -> str:
    """A layer's name within its block: the copy has not the very block that a full name is of."""
    for prefix in parts.prefix if parts else ():
        words = prefix.removesuffix(".").split(".")
        for i in range(len(words)):
            if target.startswith(head := ".".join(words[i:]) + "."):
                return target.removeprefix(head)
    return target


def depth_of(hf: PreTrainedModel, parts: Split | None, shape: LoraShape) -> int:
    """How many blocks hold something in a pass: those below the lowest adapter do not."""
    if parts is not None:
        return len(parts.blocks) - lowest(parts)
    return shape.last or int(hf.config.get_text_config().num_hidden_layers)


def line(values: list[int], depth: int) -> int:
    """The value at `depth`, from those at DEPTHS."""
    slope = (values[1] - values[0]) / (DEPTHS[1] - DEPTHS[0])
    return round(values[1] + slope * (depth - DEPTHS[1]))
