"""Tiny random models for the tests (`from tiny import tiny`): nothing is downloaded, the weights are always the same."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from mass import model
from mass.lora import LoraShape, attach


class ExactRMSNorm(nn.Module):
    """RMSNorm in the dtype of its input. Hugging Face's rounds to fp32 in between, which spoils fp64 derivatives."""

    def __init__(self, weight: nn.Parameter, shift: float, eps: float) -> None:
        super().__init__()
        self.weight, self.shift, self.eps = weight, shift, eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * (self.shift + self.weight)


def tiny(
    architecture: str = "llama", dtype: torch.dtype = torch.float64, attention: str = "sdpa", **changes: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """(hf, tokenizer) of `mass.model.tiny`, frozen and in eval mode.

    In float64 every norm is computed in float64, so that numeric derivatives are good to about 1e-9. Attention must
    then be `sdpa` (Hugging Face's eager softmax rounds to fp32).
    """
    hf, tokenizer = model.tiny(architecture, dtype=dtype, attention=attention, **changes)
    if dtype == torch.float64:
        for name, module in list(hf.named_modules()):
            if type(module).__name__.endswith("RMSNorm"):
                # Gemma stores weight - 1
                shift = 1.0 if type(module).__name__.startswith("Gemma") else 0.0
                eps = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
                hf.set_submodule(name, ExactRMSNorm(module.weight, shift, eps))
    return hf.eval().requires_grad_(False), tokenizer


def tiny_lm(
    architecture: str = "llama",
    dtype: torch.dtype = torch.float64,
    rank: int = 2,
    targets: tuple[str, ...] = ("all-linear",),
    **changes: Any,
) -> model.LanguageModel:
    """`tiny` with LoRA slots, as a LanguageModel. Make a new one in a test that changes it."""
    hf, tokenizer = tiny(architecture, dtype, **changes)
    shape = LoraShape(rank=rank, alpha=2.0 * rank, targets=targets)
    return model.LanguageModel(hf, tokenizer, attach(hf, shape), shape, f"tiny:{architecture}")
