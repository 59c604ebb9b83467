"""Random models of two layers, made on the spot, and the tokenizer of bytes that they have."""

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from mass.errors import MassError

# what is not common to the random models; everything else is in `tiny`
TINY: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16, "tie_word_embeddings": True},
    "gemma3": {
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 32,
        "layer_types": ["sliding_attention", "full_attention"],
        "tie_word_embeddings": True,
    },
    "gpt_neox": {},
}


def tiny(
    architecture: str, *, dtype: torch.dtype = torch.float32, attention: str = "sdpa", **changes: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A random model (two layers, width 64, byte vocabulary): the same weights every time, rounded to `dtype`.

    `changes` are keys of the architecture's Hugging Face config (num_hidden_layers=4).
    """
    if architecture not in TINY:
        raise MassError(
            f"model.path=tiny:{architecture}: there are {', '.join('tiny:' + name for name in TINY)}"
        )
    tokenizer = byte_tokenizer()
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        # at the usual 0.02 every prediction of so narrow a model is nearly uniform
        "initializer_range": 0.1,
        "tie_word_embeddings": False,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    if architecture == "gpt_neox":
        del settings["num_key_value_heads"]
    model_type = "gemma3_text" if architecture == "gemma3" else architecture
    settings |= TINY[architecture] | changes
    if "layer_types" in settings:
        settings["layer_types"] = (settings["layer_types"] * settings["num_hidden_layers"])[
            : settings["num_hidden_layers"]
        ]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = AutoConfig.for_model(model_type, **settings)
        hf = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)
    # parameters only: rotary frequencies stay fp32, as from_pretrained leaves them
    for parameter in hf.parameters():
        parameter.data = parameter.data.to(dtype)
    hf.config.dtype = dtype
    return hf, tokenizer


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """<pad>, <bos>, <eos> and the 256 bytes; <bos> is put in front as Llama's does. It has no chat template."""
    special = ["<pad>", "<bos>", "<eos>"]
    alphabet = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    backend.add_special_tokens(special)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        model_max_length=4096,
    )
