"""Random models and their tokenizer: the same everywhere, and those of the tests exact."""

import pytest
import torch
from tiny import tiny as exact_tiny
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedTokenizerFast

from mass import model
from mass.errors import MassError
from mass.model import load
from mass.tiny import TINY, tiny


@pytest.mark.parametrize("architecture", TINY)
@pytest.mark.parametrize("dtype", ["bf16", "fp32", "fp64"])
def test_tiny_models_load_frozen(architecture: str, dtype: str) -> None:
    hf, tokenizer = load(f"tiny:{architecture}", dtype=dtype, device="cpu")
    assert not hf.training and not any(p.requires_grad for p in hf.parameters())
    assert {p.dtype for p in hf.parameters()} == {model.DTYPES[dtype]} and hf.dtype == model.DTYPES[dtype]
    ids = torch.tensor([tokenizer.encode("4 + 3 =")])
    logits = hf(ids).logits
    assert logits.shape == (1, 8, len(tokenizer)) and logits.isfinite().all()
    assert logits.float().std() > 0.3, "predictions are nearly uniform"


def test_tiny_weights_are_the_same_everywhere() -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first, second, half = tiny("qwen3")[0], tiny("qwen3")[0], tiny("qwen3", dtype=torch.bfloat16)[0]
    assert torch.equal(torch.random.get_rng_state(), before)
    for a, b, c in zip(first.parameters(), second.parameters(), half.parameters(), strict=True):
        assert torch.equal(a, b) and torch.equal(a.bfloat16(), c)


def test_tiny_keeps_rotary_frequencies_in_fp32() -> None:
    hf = tiny("llama", dtype=torch.bfloat16)[0]
    assert {buffer.dtype for buffer in hf.buffers()} == {torch.float32}


def test_tiny_takes_changes() -> None:
    assert tiny("gemma3", num_hidden_layers=3)[0].config.layer_types[2] == "sliding_attention"
    with pytest.raises(MassError, match="tiny:bert: there are tiny:llama"):
        load("tiny:bert")


@pytest.mark.parametrize("architecture", TINY)
def test_tests_own_models_are_exact_in_fp64(architecture: str) -> None:
    """A numeric derivative agrees to 1e-6; Hugging Face's own norms, which pass through fp32, miss it by 1e-3."""
    hf, tokenizer = exact_tiny(architecture)
    embedded = hf.get_input_embeddings()(torch.tensor([tokenizer.encode("4 + 3 =")]))
    direction = torch.randn(embedded.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def loss(step: torch.Tensor) -> torch.Tensor:
        out = hf(inputs_embeds=embedded + step * direction).logits
        return out.log_softmax(-1)[0, :, 7].sum()

    with sdpa_kernel(SDPBackend.MATH):
        step = torch.zeros((), dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(loss(step), step)
        h = torch.tensor(1e-5, dtype=torch.float64)
        numeric = (loss(h) - loss(-h)) / (2 * h)
    torch.testing.assert_close(gradient, numeric, rtol=2e-6, atol=1e-7)


def test_byte_tokenizer_gives_every_text_back(tokenizer: PreTrainedTokenizerFast) -> None:
    for text in ("Problem: 4 + 3 =\n\n", " \u00e9\u4e2d\U0001f600", "".join(map(chr, range(256)))):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids) == text and len(ids) == len(text.encode())
    assert tokenizer.encode("") == [tokenizer.bos_token_id] and len(tokenizer) == 259
