"""Fixtures that several test files share. They live for the whole session: a test that changes one makes its own."""

import os

# two cores are shared by all that runs here; set before torch is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from tiny import tiny, tiny_lm
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from mass.model import LanguageModel, byte_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture(scope="session")
def tiny_llama() -> PreTrainedModel:
    """A random two-layer Llama in float64, without LoRA slots."""
    return tiny("llama")[0]


@pytest.fixture(scope="session")
def tiny_llama_lm() -> LanguageModel:
    """The same with empty LoRA slots of rank 2 on every linear layer."""
    return tiny_lm("llama")
