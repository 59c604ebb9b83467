"""The engine `hf`: `generate` of transformers instead of our own loop, kept as the oracle that ours is held against.

Rows of one adapter are run together, through the LoRA layers. Sampling is that of transformers, from a generator
that is seeded once a call: under sampling a row's text depends on the rows that share its call, unlike in our loop.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteriaList

from mass import batch, lora
from mass.blocks import attends_fully
from mass.forward import token_logprobs
from mass.sampling import Cuts

if TYPE_CHECKING:
    from mass.model import LanguageModel


def continue_prompts(
    lm: "LanguageModel",
    prompts: Sequence[Sequence[int]],
    adapter_index: Sequence[int],
    seeds: Sequence[int],
    *,
    max_new_tokens: int,
    cuts: Cuts,
    adapter: Mapping[str, Tensor] | None,
    ends: Callable[[Sequence[int]], bool],
    batch_rows: int,
) -> list[tuple[list[int], list[float]]]:
    """Tokens of every prompt's continuation, up to the first for which `ends(tokens so far)`, and their log-probs.

    The log-probs are those of our own forward (`mass.forward`), at temperature 1 without any cut. A call is seeded
    by its first row's seed.
    """
    order = sorted(range(len(prompts)), key=lambda i: (adapter_index[i], len(prompts[i])))
    out: list[list[int]] = [[] for _ in prompts]
    with plain_settings(lm.hf):
        for which, rows in groupby(order, key=lambda i: adapter_index[i]):
            own = list(rows)
            one = lora.select(adapter, [which]) if adapter else None
            for at in range(0, len(own), batch_rows):
                part = own[at : at + batch_rows]
                asked = [list(prompts[i]) for i in part]
                with lora.using(lm.lora, one):
                    drawn = _call(lm, asked, seeds[part[0]], max_new_tokens, cuts, ends)
                for i, tokens in zip(part, drawn, strict=True):
                    out[i] = tokens
    logprobs = row_logprobs(lm, prompts, out, adapter_index, adapter, batch_rows)
    return list(zip(out, logprobs, strict=True))


def _call(
    lm: "LanguageModel",
    prompts: Sequence[list[int]],
    seed: int,
    max_new_tokens: int,
    cuts: Cuts,
    ends: Callable[[Sequence[int]], bool],
) -> list[list[int]]:
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=lm.device)
    seen = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    done = [False] * len(prompts)

    def stop(input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        for i, tokens in enumerate(input_ids[:, width:].tolist()):
            done[i] = done[i] or ends(tokens)
        return torch.tensor(done, device=input_ids.device)

    sampling: dict[str, Any] = {"do_sample": False}
    if cuts.temperature > 0:
        sampling = {"do_sample": True, "temperature": cuts.temperature, "top_k": cuts.top_k}
        sampling |= {"top_p": cuts.top_p, "min_p": cuts.min_p or None}
    hf: Any = lm.hf
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = hf.generate(
            input_ids=ids,
            attention_mask=seen.to(lm.device),
            max_new_tokens=max_new_tokens,
            stopping_criteria=StoppingCriteriaList([stop]),
            **sampling,
        )
    out = []
    for tokens in made[:, width:].tolist():
        # a row that has ended is run on until all have
        first = next((n for n in range(1, len(tokens)) if ends(tokens[:n])), len(tokens))
        out.append(tokens[:first])
    return out


def row_logprobs(
    lm: "LanguageModel",
    prompts: Sequence[Sequence[int]],
    drawn: Sequence[Sequence[int]],
    adapter_index: Sequence[int],
    adapter: Mapping[str, Tensor] | None,
    batch_rows: int,
) -> list[list[float]]:
    """Log-probs of what was drawn after each prompt, at temperature 1 without any cut, by our own forward.

    Row i is of adapter adapter_index[i]; about `batch_rows` rows run at a time.
    """
    out: list[list[float]] = [[] for _ in prompts]
    own: dict[int, list[int]] = {}
    for i, which in enumerate(adapter_index):
        own.setdefault(which if adapter else 0, []).append(i)
    # as many tasks side by side as rows allow, each with as many rows as the others
    most = max(map(len, own.values()), default=1)
    tasks, rows = max(batch_rows // most, 1), min(most, batch_rows)
    parts = [(which, part[at : at + rows]) for which, part in own.items() for at in range(0, len(part), rows)]
    for at in range(0, len(parts), tasks):
        some = parts[at : at + tasks]
        packed = batch.pack(
            [[batch.Sequence([*prompts[i], *drawn[i]], len(prompts[i])) for i in part] for _, part in some],
            0,
            lm.device,
            share=attends_fully(lm.hf),
        )
        one = lora.select(adapter, [which for which, _ in some]) if adapter else None
        logprob_M = token_logprobs(lm.hf, lm.lora, packed, one).float()
        width = packed.count_TN.shape[1]
        for t, (_, part) in enumerate(some):
            for n, i in enumerate(part):
                out[i] = logprob_M[packed.owner_M == t * width + n].tolist()
    return out


@contextlib.contextmanager
def plain_settings(hf: Any) -> Iterator[None]:
    """Without the settings that came with the model (its end tokens, a temperature, a repetition penalty)."""
    before = hf.generation_config
    try:
        hf.generation_config = GenerationConfig(pad_token_id=0)
        yield
    finally:
        hf.generation_config = before
