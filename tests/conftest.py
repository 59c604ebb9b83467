"""Fixtures that several test files share. A test that changes one makes its own."""

import os

# two cores are shared by all that runs here; set before torch is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Iterator
from pathlib import Path

import pytest
from chain import save_chain
from ranks import Ranks
from runs import write_recipe
from tiny import tiny, tiny_lm
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from mass.model import LanguageModel
from mass.tiny import byte_tokenizer


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


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks() as started:
        yield started


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of tests/chain.py's model."""
    return save_chain(tmp_path_factory.mktemp("model") / "chain")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, chain: Path) -> Path:
    """A recipe on the chain model and problems that it can solve by luck."""
    return write_recipe(tmp_path_factory.mktemp("recipe"), chain)
