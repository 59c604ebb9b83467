"""Sampling text: one loop over the model's forward, an adapter and a random stream for each row.

The prompt less its last token is run once for all rows that share it (`_prefill`); from then on every row
takes one token a step, the last prompt token first. Rows that have ended leave the batch and waiting rows
take their place. A row's text depends on its prompt, adapter and seed, not on the rows beside it (up to
rounding: matrix products of other sizes round otherwise, which fp32 hardly ever and bf16 now and then shows).
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from mass import generate_hf, generate_vllm, lora
from mass.decode import DecodeStep, How
from mass.errors import MassError
from mass.fastlinear import RowAdapters, packed_linears
from mass.kvcache import RowCache
from mass.sampling import Cuts, pick, row_uniforms

if TYPE_CHECKING:
    from mass.model import LanguageModel

Engine = Literal["ours", "hf", "vllm"]
# Prompt tokens in one prefill forward.
PREFILL_TOKENS = 2048


@dataclass(frozen=True)
class Rollout:
    """What one row sampled."""

    tokens: list[int]
    """Sampled tokens, with the stop token if there is one."""
    logprobs: list[float]
    """Of these tokens at temperature 1 without any cut, whatever they were drawn with."""
    finished: bool
    """Ended by a stop token or string, not by the limit."""
    text: str
    """Decoded without special tokens, cut before the stop string."""


@dataclass
class _Row:
    """A row in the making."""

    index: int
    prompt: tuple[int, ...]
    adapter: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finished: bool = False
    over: bool = False
    """Ended, or at the limit."""


def generate(
    lm: "LanguageModel",
    prompts: Sequence[Sequence[int]],
    *,
    seeds: Sequence[int],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    adapter: Mapping[str, Tensor] | None = None,
    adapter_index: Sequence[int] | None = None,
    stop_ids: Sequence[int] = (),
    stop_strings: Sequence[str] = (),
    batch_rows: int = 128,
    engine: Engine = "ours",
    step: How = "eager",
) -> list[Rollout]:
    """Continue every prompt (token ids) by at most `max_new_tokens`: one Rollout a prompt, in their order.

    temperature 0 is greedy; top_p, top_k and min_p cut as in `transformers` (see `mass.sampling`). Row i
    draws from `seeds[i]` alone. `adapter` holds T adapters; row i uses adapter_index[i], by default i //
    (rows / T). A row ends at a stop id, at a stop string in its decoded text, or at the limit. At most
    `batch_rows` rows run at a time. `engine`: this loop, `mass.generate_hf`, whose rows share random numbers, or
    `mass.generate_vllm`.
    `step`: how this loop calls the model (see `mass.decode`); a recorded step keeps rows that have ended until they are half.

    The model is left as it was found, after an exception and Ctrl-C too. Raises MassError for wrong
    arguments.
    """
    cuts = Cuts(temperature, top_p, top_k, min_p)
    rows = _rows(prompts, seeds, max_new_tokens, adapter, adapter_index, batch_rows)
    stop = _Stop(lm.tokenizer, stop_ids, stop_strings)
    holding = lm.shards.held() if lm.shards and lm.shards.hold else contextlib.nullcontext()
    # neither a recording nor a sharded base takes tensors that inference mode made
    bare = engine == "ours" and step == "eager" and not lm.shards
    grad_free = _inference(lm.hf) if bare else torch.no_grad()
    with grad_free, holding, _evaluating(lm.hf), lora.using(lm.lora, None):
        if engine != "ours":
            asked = [row.prompt for row in rows], [row.adapter for row in rows], seeds
            how: dict[str, Any] = {"max_new_tokens": max_new_tokens, "cuts": cuts, "adapter": adapter}
            how |= {"ends": stop.ends, "batch_rows": batch_rows}
            if engine == "hf":
                drawn = generate_hf.continue_prompts(lm, *asked, **how)
            else:
                drawn = generate_vllm.continue_prompts(lm, *asked, stop_ids=stop_ids, **how)
            for row, (tokens, logprobs) in zip(rows, drawn, strict=True):
                row.tokens, row.logprobs = tokens, logprobs
                row.finished = stop.ends(row.tokens)
        else:
            # packed weights are nothing that the compiler knows; it packs its own
            with packed_linears(lm.hf) if step != "compile" else contextlib.nullcontext():
                adapters = RowAdapters(lm.lora, adapter, traced=step != "eager") if adapter else None
                with contextlib.closing(adapters) if adapters else contextlib.nullcontext():
                    _decode(lm, rows, seeds, max_new_tokens, cuts, adapters, stop, batch_rows, step)
    return [Rollout(row.tokens, row.logprobs, row.finished, stop.text(row.tokens)) for row in rows]


def _rows(
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    max_new_tokens: int,
    adapter: Mapping[str, Tensor] | None,
    adapter_index: Sequence[int] | None,
    batch_rows: int,
) -> list[_Row]:
    """Check the arguments; the rows in the prompts' order."""
    if len(seeds) != len(prompts):
        raise MassError(f"{len(prompts)} prompts but {len(seeds)} seeds: give one seed for each prompt")
    if max_new_tokens < 1 or batch_rows < 1:
        raise MassError(f"max_new_tokens ({max_new_tokens}) and batch_rows ({batch_rows}) must be 1 or more")
    tasks = 1 if not adapter else next(iter(adapter.values())).shape[0]
    if adapter_index is None:
        if len(prompts) % tasks:
            raise MassError(
                f"{len(prompts)} prompts do not divide among {tasks} adapters: give adapter_index"
            )
        adapter_index = [i // max(len(prompts) // tasks, 1) for i in range(len(prompts))]
    if len(adapter_index) != len(prompts):
        raise MassError(f"{len(prompts)} prompts but {len(adapter_index)} entries in adapter_index")
    for i, (prompt, index) in enumerate(zip(prompts, adapter_index, strict=True)):
        if not len(prompt):
            raise MassError(
                f"prompt {i} is empty: a prompt needs one token at least (the begin-of-text token, say)"
            )
        if not 0 <= index < tasks:
            raise MassError(f"adapter_index[{i}] is {index}, but there are {tasks} adapters")
    return [
        _Row(i, tuple(map(int, prompt)), index)
        for i, (prompt, index) in enumerate(zip(prompts, adapter_index, strict=True))
    ]


def _decode(
    lm: "LanguageModel",
    rows: Sequence[_Row],
    seeds: Sequence[int],
    max_new_tokens: int,
    cuts: Cuts,
    adapters: RowAdapters | None,
    stop: "_Stop",
    batch_rows: int,
    how: How,
) -> None:
    """Fill the rows' tokens, log-probs and ends."""
    # taken from the end, so the longest first, and those of one length by adapter; neighbours share a prompt and an
    # adapter, or nearly a length
    waiting = sorted(rows, key=lambda row: (len(row.prompt), -row.adapter, row.prompt))
    slots = min(batch_rows, len(rows))
    cache = RowCache(_layer_count(lm.hf), slots, lm.device, fixed=how != "eager")
    step = DecodeStep(lm, cache, adapters, how)
    live: list[_Row] = []
    uniform_BSU = row_uniforms([], max_new_tokens, cuts)
    while live or waiting:
        free = slots - len(live)
        # a prefill for a few rows costs more than the empty places
        if waiting and free >= min(len(waiting), max(slots // 4, 1)):
            new = [waiting.pop() for _ in range(min(free, len(waiting)))]
            _admit(lm, cache, new, adapters)
            live += new
            drawn = row_uniforms([seeds[row.index] for row in new], max_new_tokens, cuts)
            uniform_BSU = torch.cat([uniform_BSU, drawn])
            if adapters:
                adapters.set_rows([row.adapter for row in live])
        logits_BV = step([row.tokens[-1] if row.tokens else row.prompt[-1] for row in live])
        step_B = torch.tensor([min(len(row.tokens), max_new_tokens - 1) for row in live])
        uniform_BU = uniform_BSU[torch.arange(len(live)), step_B].to(logits_BV.device)
        tokens, logprobs = (tensor.tolist() for tensor in pick(logits_BV, uniform_BU, cuts))
        for row, token, logprob in zip(live, tokens, logprobs, strict=True):
            if not row.over:
                row.tokens.append(token)
                row.logprobs.append(logprob)
                row.finished = stop.ends(row.tokens)
                row.over = row.finished or len(row.tokens) == max_new_tokens
        kept = [i for i, row in enumerate(live) if not row.over]
        # a recorded step is made anew when rows leave: they wait for others
        most = len(live) - 1 if step.how == "eager" else len(live) // 2
        if len(kept) <= most:
            sources = cache.keep(kept)
            live = [live[i] for i in sources]
            uniform_BSU = uniform_BSU[sources]
            if adapters:
                adapters.set_rows([row.adapter for row in live])


def _admit(lm: "LanguageModel", cache: RowCache, new: Sequence[_Row], adapters: RowAdapters | None) -> None:
    """Run the new rows' prompts less their last token, each (prompt, adapter) once, into the cache."""
    shared: dict[tuple[int, tuple[int, ...]], list[_Row]] = {}
    for row in new:
        shared.setdefault((row.adapter, row.prompt[:-1]), []).append(row)
    groups = list(shared.values())
    own = adapters.apart() if adapters else None
    while groups:
        # sorted by length: the first is the longest
        width = len(groups[0][0].prompt) - 1
        count = max(PREFILL_TOKENS // max(width, 1), 1)
        part, groups = groups[:count], groups[count:]
        cached: list[tuple[Tensor, Tensor]] = []
        if width:
            if own:
                own.set_rows([rows[0].adapter for rows in part], tokens=width)
            with own.applied() if own else contextlib.nullcontext():
                cached = _prefill(lm, [rows[0].prompt[:-1] for rows in part])
        source = [i for i, rows in enumerate(part) for _ in rows]
        cache.add(cached, source, [len(row.prompt) - 1 for rows in part for row in rows])


def _prefill(lm: "LanguageModel", prompts: Sequence[Sequence[int]]) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of the prompts, padded on the right: no token sees the padding, so no mask is needed.

    For each layer two [prompts, heads, tokens, width].
    """
    width = max(map(len, prompts))
    ids = torch.tensor([[*prompt, *[0] * (width - len(prompt))] for prompt in prompts])
    # without the model's configuration: every layer keeps all columns, a window is the mask's affair
    cache = Cache(layer_class_to_replicate=DynamicLayer)
    # past the head: nothing is drawn here, and the head on the last column would copy its weight once a row
    lm.hf.base_model(input_ids=ids.to(lm.device), cache=cache, use_cache=True)
    return [(layer.keys, layer.values) for layer in cache.layers]  # type: ignore[union-attr,misc]


def _layer_count(hf: PreTrainedModel) -> int:
    """Layers of the model. Raises MassError for those whose state is not keys and values of every token."""
    config = hf.config.get_text_config()
    if getattr(config, "num_kv_shared_layers", 0):
        raise MassError("generation does not know layers that share keys and values with others")
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    unknown = kinds - {"full_attention", "sliding_attention"}
    if unknown:
        raise MassError(
            f"generation knows full and sliding attention; this model also has {', '.join(sorted(unknown))}"
        )
    return config.num_hidden_layers


@contextlib.contextmanager
def _inference(hf: nn.Module) -> Iterator[None]:
    """Inference mode within the context: no versions and views, which under no_grad take a small model's step a fifteenth
    of its time. A tensor that a layer made and kept meanwhile (frequencies for a longer row) is made an ordinary one.
    """
    try:
        with torch.inference_mode():
            yield
    finally:
        for module in hf.modules():
            for name, kept in [*module.named_buffers(recurse=False), *vars(module).items()]:
                if isinstance(kept, Tensor) and kept.is_inference():
                    setattr(module, name, kept.clone())


@contextlib.contextmanager
def _evaluating(hf: nn.Module) -> Iterator[None]:
    """Evaluation mode within the context."""
    training = {module for module in hf.modules() if module.training}
    try:
        hf.eval()
        yield
    finally:
        for module in training:
            module.training = True


class _Stop:
    """Whether a row has ended; decodes only the tokens that a stop string can span, and those seldom."""

    def __init__(self, tokenizer: Any, stop_ids: Sequence[int], stop_strings: Sequence[str]) -> None:
        if any(not string for string in stop_strings):
            raise MassError("a stop string is empty: it would end every row at once")
        self.tokenizer, self.ids, self.strings = tokenizer, frozenset(stop_ids), tuple(stop_strings)
        # a token is one byte at least
        self.span = max((len(string.encode()) for string in stop_strings), default=0) + 4
        self.may_end: dict[int, bool] = {}

    def ends(self, tokens: Sequence[int]) -> bool:
        if tokens[-1] in self.ids:
            return True
        if not self.strings or not self._completes(tokens[-1]):
            return False
        tail = self._decode(tokens[-self.span :])
        return any(string in tail for string in self.strings)

    def text(self, tokens: Sequence[int]) -> str:
        body = tokens[:-1] if tokens and tokens[-1] in self.ids else tokens
        text = self._decode(body)
        return text[: min((at for at in map(text.find, self.strings) if at >= 0), default=len(text))]

    def _completes(self, token: int) -> bool:
        """Whether a stop string can end inside this token: it holds one, or begins with the end of one."""
        if token not in self.may_end:
            # after itself, because a tokenizer may drop a space that begins a text
            piece = self._decode([token, token]).removeprefix(self._decode([token]))
            ends = (string[i:] for string in self.strings for i in range(1, len(string)))
            # U+FFFD: a part of a character
            self.may_end[token] = (
                "\ufffd" in piece
                or any(string in piece for string in self.strings)
                or any(piece.startswith(end) for end in ends)
            )
        return self.may_end[token]

    def _decode(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(
            list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
