"""The engine `vllm`: vLLM draws the tokens, in processes of its own; their log-probs are those of our own forward.

A base model is handed over once, as safetensors in memory, and its engine is kept for as long as the model lives. Adapters go the
same way, as PEFT folders with a fresh number for each call, since their content is never the same again. Token ids go in and come
out: no text is tokenised, and where a row ends is decided here, as for the other engines. vLLM rounds in its own way and keeps
adapters in the base's dtype; that the two models are the same is checked in every call, by vLLM's own log-probs.

vLLM: Kwon et al., arXiv 2309.06180.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mass import lora, vllm_engine
from mass.cache import first_line
from mass.errors import MassError
from mass.generate_hf import row_logprobs
from mass.model import context_length
from mass.sampling import Cuts

if TYPE_CHECKING:
    from mass.model import LanguageModel

# Ranks that vLLM has room for.
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
# vLLM raises lower temperatures to this one.
COLDEST = 0.01
# By how much a token's log-prob may differ from ours on average, in units of 1 + its size.
CLOSE = {torch.bfloat16: 0.1, torch.float32: 0.01}

_fresh = itertools.count(1)


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
    wanted = vllm_engine.Size(
        min(batch_rows, len(prompts)), tokens, min(len(used), batch_rows), _rank(adapter)
    )
    how = [{**sampling(cuts, max_new_tokens, stop_ids), "seed": seed} for seed in seeds]
    try:
        engine = vllm_engine.engine_of(lm, wanted)
        with _adapters(lm, engine, adapter, used) as requests:
            drawn, theirs = _draw(
                engine, prompts, [requests[i] if adapter else None for i in adapter_index], how, ends
            )
    except BaseException:
        # an engine with rows under way, or a dead one, is of no more use; Ctrl-C reaches its processes too
        vllm_engine.drop(lm.hf)
        raise
    ours = row_logprobs(lm, prompts, drawn, adapter_index, adapter, batch_rows)
    _hold_against(lm, [sum(row) for row in ours], theirs, sum(map(len, drawn)))
    return list(zip(drawn, ours, strict=True))


def check(lm: "LanguageModel", cuts: Cuts = Cuts()) -> None:  # noqa: B008 (frozen)
    """Raise MassError where vLLM is not there, is another one than was tested, or cannot draw what is asked of it."""
    vllm_engine.check_installed()
    if lm.shards:
        raise MassError(
            "generate.engine=vllm needs the whole base, and zero.stage=3 keeps a part of it on each rank. "
            "Use generate.engine=ours, or zero.stage=2."
        )
    if lm.hf.dtype not in vllm_engine.DTYPES:
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

    with vllm_engine.folder(sum(x.nbytes for x in adapter.values())) as folder:
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
