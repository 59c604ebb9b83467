"""Tiny random models that write text that does not settle, with prompts and adapters for them."""

import contextlib
import random
import types
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from mass import lora
from mass.generate import Rollout

VOCABULARY = 300
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {}),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": 9}),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config, {"sliding_window": 9, "attn_implementation": "eager"}),
    "gemma3": (
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        {
            "sliding_window": 9,
            "layer_types": ["sliding_attention", "full_attention"],
            "query_pre_attn_scalar": 16,
        },
    ),
}


class Letters:
    """A tokenizer that only decodes: token i is the character chr(32 + i), 0 to 2 are special."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False, **_: object) -> str:
        return "".join(chr(32 + i) for i in ids if not (skip_special_tokens and i < 3))


def build(kind: str = "llama", dtype: torch.dtype = torch.float32) -> Any:
    """A tiny model with random weights whose greedy text does not settle on one token."""
    cls, config, more = MODELS[kind]
    torch.manual_seed(0)
    hf = cls(config(**SIZES, **more)).to(dtype).eval().requires_grad_(False)
    for name, parameter in hf.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, 0.3)
        elif "norm" in name:
            parameter.add_(0.5 * torch.randn_like(parameter))
    # or a tied head names the token that came in
    with torch.no_grad():
        hf.lm_head.weight = torch.nn.Parameter(torch.randn(VOCABULARY, 64).to(dtype), requires_grad=False)
    layers = lora.attach(hf, lora.LoraShape(4, 8, ("all-linear",)))
    return types.SimpleNamespace(
        hf=hf, tokenizer=Letters(), lora=layers, shards=None, device=torch.device("cpu")
    )


def some_prompts(count: int, longest: int = 24, seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(3, VOCABULARY) for _ in range(draw.randint(1, longest))] for _ in range(count)]


def some_adapters(lm: Any, count: int, rank: int = 4) -> lora.Adapter:
    generator = torch.Generator().manual_seed(7)
    one = [lora.fresh(lm.lora, rank, generator) for _ in range(count)]
    return {
        key: torch.stack([torch.randn(a[key].shape, generator=generator) * 0.2 for a in one])
        for key in one[0]
    }


def tokens(rollouts: Sequence[Rollout]) -> list[list[int]]:
    return [rollout.tokens for rollout in rollouts]


@contextlib.contextmanager
def interrupted(hf: torch.nn.Module, after: int) -> Iterator[None]:
    """Ctrl-C in the middle of the second layer, some steps in."""
    calls = 0

    def hook(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls > after:
            raise KeyboardInterrupt

    handle = hf.model.layers[1].mlp.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
