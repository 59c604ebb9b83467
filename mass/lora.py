"""Linear layers whose LoRA adapter has a leading task axis, and PEFT's files in and out.

An adapter is a plain dict of tensors, `{"<layer>.A": [T, R, in], "<layer>.B": [T, out, R]}`: T tasks adapt, are
differentiated and generate side by side with one `bmm`. Nothing is patched or vmapped: a layer reads the pair that
`using` put in its slot, so the same layers serve generation, torch.func transforms and block-wise recomputation.

LoRA: Hu et al., arXiv 2106.09685. File format: PEFT (`adapter_config.json`, `adapter_model.safetensors`).
"""

import contextlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from mass.errors import MassError

Adapter = dict[str, Tensor]
PEFT_PREFIX = "base_model.model."
# keys of adapter_config.json of what is more, or other, than one low-rank update of each layer
_NOT_PLAIN = (
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "fan_in_fan_out",
    "lora_bias",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
)
# beginnings of PEFT's init_lora_weights that subtract the first update from the base
_MOVES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


class LoraLinear(nn.Module):
    """A frozen linear layer plus the low-rank update of whatever adapter is in its slot.

    Input [B, ..., in] with B a multiple of T: row b uses adapter b // (B / T). The update is computed in the
    adapter's dtype (fp32 in training) and added in the base's.
    """

    def __init__(self, base: nn.Linear, scale: float) -> None:
        super().__init__()
        self.base = base
        self.scale = scale
        self.slot: tuple[Tensor, Tensor] | None = None

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if self.slot is None:
            return y
        a_TRI, b_TOR = self.slot
        if x.shape[0] % a_TRI.shape[0]:
            raise ValueError(f"{x.shape[0]} rows cannot be shared out among {a_TRI.shape[0]} adapters")
        x_TBI = x.reshape(a_TRI.shape[0], -1, x.shape[-1]).to(a_TRI.dtype)
        low_TBR = torch.bmm(x_TBI, a_TRI.mT)
        if y.dtype == low_TBR.dtype:
            # one operation instead of three, each of which would run over [tokens, out] in every derivative too
            y_TBO = y.reshape(*low_TBR.shape[:2], -1)
            return torch.baddbmm(y_TBO, low_TBR, b_TOR.mT, alpha=self.scale).reshape(y.shape)
        return y + torch.bmm(low_TBR * self.scale, b_TOR.mT).reshape(y.shape).to(y.dtype)


Layers = dict[str, LoraLinear]


@dataclass(frozen=True)
class LoraShape:
    """What PEFT's `adapter_config.json` says of an adapter's shape. `last`: only the last so many decoder blocks have one."""

    rank: int
    alpha: float
    targets: tuple[str, ...]
    last: int | None = None

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def attach(hf: PreTrainedModel, shape: LoraShape) -> Layers:
    """Put LoRA slots on the linear layers whose name ends in one of the targets; the head is never one of them.

    `all-linear` names every linear layer but the output head. Returns name -> layer in the model's order. Raises
    MassError when a target matches nothing, for more blocks than there are, and where those have no target. A model takes one set of slots only.
    """
    head = hf.get_output_embeddings()
    linears = {name: m for name, m in hf.named_modules() if isinstance(m, nn.Linear) and m is not head}
    if any(isinstance(m, LoraLinear) for m in hf.modules()):
        raise MassError("this model already has LoRA slots: detach() them first")

    def hit(name: str, target: str) -> bool:
        return target == "all-linear" or name == target or name.endswith("." + target)

    for target in shape.targets:
        if not any(hit(name, target) for name in linears):
            kinds = sorted({name.rsplit(".", 1)[-1] for name in linears})
            raise MassError(
                f"lora.targets: no linear layer is named {target!r}. This model has: {', '.join(kinds)}"
            )
    among = "" if shape.last is None else _last_blocks(hf, shape.last)
    layers: Layers = {}
    for name, linear in linears.items():
        if name.startswith(among) and any(hit(name, target) for target in shape.targets):
            parent = hf.get_submodule(name.rpartition(".")[0])
            layers[name] = LoraLinear(linear, shape.scale)
            setattr(parent, name.rpartition(".")[2], layers[name])
    if not layers:
        if shape.last is None:
            raise MassError(f"lora.targets={list(shape.targets)} names no layer: all-linear, or e.g. q_proj")
        raise MassError(
            f"lora.last={shape.last}: no layer of lora.targets is in the last {shape.last} decoder blocks; "
            "raise it, or name other layers"
        )
    return layers


def _last_blocks(hf: PreTrainedModel, last: int) -> tuple[str, ...]:
    """What the names of everything in the last `last` decoder blocks begin with."""
    count = getattr(hf.config.get_text_config(), "num_hidden_layers", 0)
    lists = [name for name, m in hf.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not lists:
        raise MassError(
            f"lora.last: {type(hf).__name__} has no list of decoder blocks; name layers in lora.targets"
        )
    if last > count:
        raise MassError(
            f"lora.last={last}: this model has {count} decoder blocks; take fewer than that, or null for all"
        )
    return tuple(f"{lists[0]}.{i}." for i in range(count - last, count))


def detach(hf: PreTrainedModel, layers: Layers) -> None:
    """Undo `attach`: every linear layer is again the object that it was."""
    for name, layer in layers.items():
        setattr(hf.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], layer.base)


@contextlib.contextmanager
def without(hf: PreTrainedModel, layers: Layers) -> Iterator[None]:
    """Within the context the model is as it was before `attach`, with the names of its parameters; the slots come back."""
    detach(hf, layers)
    try:
        yield
    finally:
        for name, layer in layers.items():
            setattr(hf.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], layer)


@contextlib.contextmanager
def using(layers: Layers, adapter: Mapping[str, Tensor] | None) -> Iterator[None]:
    """Within the context every forward uses `adapter` (None: the base model alone). Restores what was there before.

    An adapter may name a part of the layers only (one block's): the others keep what they have.
    """
    names = layers.keys() if adapter is None else {key.rpartition(".")[0] for key in adapter}
    before = {name: layers[name].slot for name in names}
    try:
        for name in names:
            layers[name].slot = None if adapter is None else (adapter[f"{name}.A"], adapter[f"{name}.B"])
        yield
    finally:
        for name, slot in before.items():
            layers[name].slot = slot


def fresh(
    layers: Layers, rank: int, generator: torch.Generator, dtype: torch.dtype = torch.float32
) -> Adapter:
    """A new adapter without task axis, as PEFT starts one: A uniform(+-1/sqrt(in)), B zero."""
    adapter: Adapter = {}
    for name, layer in layers.items():
        out, width = layer.weight.shape
        a_RI = torch.empty(rank, width, dtype=dtype)
        # PEFT's kaiming_uniform_(a=sqrt(5)) is this bound
        bound = 1 / math.sqrt(width)
        adapter[f"{name}.A"] = a_RI.uniform_(-bound, bound, generator=generator)
        adapter[f"{name}.B"] = torch.zeros(out, rank, dtype=dtype)
    return {key: tensor.to(layers[key.rpartition(".")[0]].weight.device) for key, tensor in adapter.items()}


def expand(policy: Mapping[str, Tensor], tasks: int) -> Adapter:
    """One adapter without task axis -> the same for T tasks, [T, ...], each its own memory."""
    return {key: tensor.detach().unsqueeze(0).repeat(tasks, 1, 1) for key, tensor in policy.items()}


def select(adapter: Mapping[str, Tensor], index: Iterable[int]) -> Adapter:
    """The adapters of the named tasks, in that order: [T, ...] -> [len(index), ...]."""
    rows = torch.as_tensor(list(index), dtype=torch.long)
    return {key: tensor.index_select(0, rows.to(tensor.device)) for key, tensor in adapter.items()}


def save_peft(folder: Path, policy: Mapping[str, Tensor], shape: LoraShape, base_name: str) -> None:
    """Write an adapter without task axis as a PEFT folder that `PeftModel.from_pretrained` loads."""
    from peft import LoraConfig

    names = sorted({key.rpartition(".")[0] for key in policy})
    config = LoraConfig(
        r=shape.rank,
        # PEFT types it int and keeps a float as it is
        lora_alpha=shape.alpha if shape.alpha % 1 else int(shape.alpha),  # type: ignore[arg-type]
        target_modules=names,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_name,
        inference_mode=True,
    )
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    tensors = {}
    for name in names:
        tensors[f"{PEFT_PREFIX}{name}.lora_A.weight"] = policy[f"{name}.A"].detach().cpu().contiguous()
        tensors[f"{PEFT_PREFIX}{name}.lora_B.weight"] = policy[f"{name}.B"].detach().cpu().contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def read_peft_shape(folder: Path) -> LoraShape:
    """Rank, alpha and layer names of a PEFT LoRA folder. Raises MassError for what these layers cannot hold."""
    path = folder / "adapter_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MassError(f"{folder} is not a PEFT folder: it has no adapter_config.json") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise MassError(f"{path}: not JSON ({error})") from None
    if config.get("peft_type") != "LORA":
        raise MassError(
            f"{path}: peft_type is {config.get('peft_type')!r}; only LORA adapters can be adapted further"
        )
    for key in _NOT_PLAIN:
        if config.get(key):
            raise MassError(
                f"{path}: {key}={config[key]!r} is not supported; export the adapter as plain LoRA"
            )
    how = str(config.get("init_lora_weights", True)).lower()
    if how.startswith(_MOVES_BASE):
        raise MassError(
            f"{path}: init_lora_weights={how!r} belongs to a base model whose weights PEFT changes on loading; export the "
            "adapter as plain LoRA (save_pretrained with path_initial_model_for_weight_conversion)"
        )
    if config.get("bias", "none") != "none":
        raise MassError(
            f"{path}: bias={config['bias']!r} is not supported; export the adapter with bias='none'"
        )
    rank, alpha = int(config["r"]), float(config["lora_alpha"])
    if config.get("use_rslora"):
        alpha *= math.sqrt(rank)
    targets = config["target_modules"]
    if (
        config.get("layers_to_transform") is not None
        or config.get("exclude_modules")
        or isinstance(targets, str)
    ):
        # which layers those are is written in the names of the tensors (a text is a regular expression)
        with _opened(folder, "cpu") as (_, names):
            targets = sorted({key.rpartition(".")[0] for key in names})
        if not targets:
            raise MassError(
                f"{folder}: adapter_model.safetensors holds no LoRA matrices: save the adapter again"
            )
    return LoraShape(rank, alpha, (targets,) if isinstance(targets, str) else tuple(sorted(targets)))


def load_peft(folder: Path, layers: Layers, device: torch.device | str = "cpu") -> Adapter:
    """Read the adapter (without task axis, fp32) of a PEFT folder and hold it against the layers it must fit."""
    path = folder / "adapter_model.safetensors"
    adapter = _tensors(folder, device)
    wanted: dict[str, tuple[int, int]] = {}
    for name, layer in layers.items():
        out, width = layer.weight.shape
        wanted |= {f"{name}.A": (-1, width), f"{name}.B": (out, -1)}
    extra, missing = sorted(adapter.keys() - wanted.keys()), sorted(wanted.keys() - adapter.keys())
    if extra or missing:
        what = f"it has {extra[0]}, which this base lacks" if extra else f"it lacks {missing[0]}"
        raise MassError(f"{folder}: this adapter was made for another base model: {what}")
    for key, size in wanted.items():
        if any(want not in (-1, have) for want, have in zip(size, adapter[key].shape, strict=True)):
            raise MassError(
                f"{folder}: this adapter was made for another base model: {key} has shape "
                f"{tuple(adapter[key].shape)}, the base wants {tuple('R' if n < 0 else n for n in size)}"
            )
    for name in layers:
        ranks = adapter[f"{name}.A"].shape[0], adapter[f"{name}.B"].shape[1]
        if ranks[0] != ranks[1]:
            raise MassError(f"{path}: {name} has rank {ranks[0]} in lora_A and {ranks[1]} in lora_B")
    return {key: adapter[key] for key in wanted}


def _tensors(folder: Path, device: torch.device | str) -> Adapter:
    """What an adapter's file holds, fp32, under our names."""
    with _opened(folder, device) as (file, names):
        return {ours: file.get_tensor(theirs).float() for ours, theirs in names.items()}


@contextlib.contextmanager
def _opened(folder: Path, device: torch.device | str) -> Iterator[tuple[Any, dict[str, str]]]:
    """An adapter's file, and its names of tensors by ours."""
    path = folder / "adapter_model.safetensors"
    if not path.exists():
        raise MassError(
            f"{folder}: no adapter_model.safetensors (pickled adapter_model.bin files are not read)"
        )
    names = {}
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            for key in file.keys():  # noqa: SIM118 (safe_open is no dict)
                name, _, kind = key.removeprefix(PEFT_PREFIX).removesuffix(".weight").rpartition(".lora_")
                names[f"{name}.{kind}"] = key
            yield file, names
    except SafetensorError as error:
        raise MassError(f"{path} is damaged ({error}): save or download the adapter again") from None
