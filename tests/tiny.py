"""Tiny random models for the tests (`from tiny import tiny`): nothing is downloaded, the weights are always the same."""

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import mass.tiny
from mass import model
from mass.choices import Kit
from mass.lora import LoraShape, attach, fresh
from mass.optimizers import Rule
from mass.practice import Sampling
from mass.problems import Problem, Task
from mass.prompts import make_prompts
from mass.scorer import Scorer


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
    """(hf, tokenizer) of `mass.tiny.tiny`, frozen and in eval mode.

    In float64 every norm is computed in float64, so that numeric derivatives are good to about 1e-9. Attention must
    then be `sdpa` (Hugging Face's eager softmax rounds to fp32).
    """
    hf, tokenizer = mass.tiny.tiny(architecture, dtype=dtype, attention=attention, **changes)
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


def tiny_kit(**changes: Any) -> Kit:
    """A Kit on `tiny_lm` with a policy that is not the base model and a pool of six sums; `changes` are its fields."""
    lm = tiny_lm("llama")
    generator = torch.Generator().manual_seed(1)
    policy = {
        key: x + 0.05 * torch.randn(x.shape, generator=generator, dtype=x.dtype)
        for key, x in fresh(lm.lora, 2, generator, torch.float64).items()
    }
    pool = [
        Task(Problem(f"t{i}", f"What is {i} + 1?"), str(i + 1), f"Answer: {i + 1}", "sums", "exact")
        for i in range(6)
    ]
    kit = Kit(
        lm,
        make_prompts(lm.tokenizer, "plain"),
        Rule("sgd", clip=1.0),
        {key: torch.tensor(0.7, dtype=torch.float64) for key in policy},
        writing=Sampling(10, 1.0),
        answering=Sampling(8, 1.0),
        examples=3,
        max_growth=10.0,
        policy=policy,
        head=Scorer(lm.hf.config.hidden_size, 2, 8),
        pool=pool,
    )
    return replace(kit, **changes)
