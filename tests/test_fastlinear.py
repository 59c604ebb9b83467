"""Linear layers of the decode loop: an adapter a row, and packed weights."""

from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from tiny import tiny
from torch import nn
from writers import build, some_adapters, tokens

from mass import fastlinear, lora
from mass.fastlinear import RowAdapters, has_bf16_products, packed_linears
from mass.generate import generate
from mass.kit import lent


def test_layers_called_with_one_tensor_share_the_product_by_a() -> None:
    llama = build()
    adapters = some_adapters(llama, 3)
    rows = RowAdapters(llama.lora, adapters)
    x = torch.tensor([[5, 6, 7], [9, 8, 7], [5, 5, 5]])
    index = [2, 0, 2]
    want = []
    for i, which in enumerate(index):
        with lora.using(llama.lora, lora.select(adapters, [which])):
            want.append(llama.hf(x[i : i + 1]).logits)

    def products() -> int:
        with torch.profiler.profile() as seen:
            got = llama.hf(x).logits
        torch.testing.assert_close(got, torch.cat(want), atol=1e-4, rtol=1e-4)
        return sum(event.count for event in seen.key_averages() if event.key == "aten::bmm")

    rows.set_rows(index, tokens=3)
    with rows.applied():
        first = products()
    # q, k, v and gate, up: three products by A fewer in each of two layers
    with rows.applied():
        assert first - products() == 2 * 3


@pytest.mark.parametrize("count", [1, 5, 70])
def test_bf16_layers_with_an_adapter_a_row(count: int) -> None:
    lm = build(dtype=torch.bfloat16)
    adapters = some_adapters(lm, count)
    layer = next(iter(lm.lora.values()))
    x = torch.randn(count, 1, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    rows = RowAdapters(lm.lora, adapters)
    rows.set_rows(range(count))
    with torch.no_grad():
        with rows.applied():
            got = layer(x).float()
        base = layer(x).float()
        with lora.using(lm.lora, adapters):
            want = layer(x).float()
    assert (want - base).abs().mean() > 0.3
    torch.testing.assert_close(got, want, atol=0.1, rtol=0.02)


def test_a_layer_that_the_first_forward_left_out_follows_the_rows_too() -> None:
    llama = build()
    adapters = some_adapters(llama, 4)
    rows = RowAdapters(llama.lora, adapters)
    rows.set_rows([0, 1, 2, 3])
    first, *_, last = llama.lora
    width = llama.lora[last].weight.shape[1]
    x = torch.randn(1, 1, width, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        with rows.applied():
            llama.lora[first](torch.randn(4, 1, llama.lora[first].weight.shape[1]))
        rows.set_rows([3])
        with rows.applied():
            got = llama.lora[last](x)
        with lora.using(llama.lora, lora.select(adapters, [3])):
            torch.testing.assert_close(got, llama.lora[last](x), atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(
    not has_bf16_products(), reason="needs a CPU with bf16 instructions; on others no layer is packed"
)
def test_packed_weights_follow_a_weight_that_changes() -> None:
    lm = build(dtype=torch.bfloat16)
    settings: dict[str, Any] = {"seeds": [0], "max_new_tokens": 6, "temperature": 0.0}
    first = tokens(generate(lm, [[5, 6, 7]], **settings))
    lm.hf.lm_head.weight.copy_(lm.hf.lm_head.weight.roll(1, 0))
    assert tokens(generate(lm, [[5, 6, 7]], **settings)) != first


def test_packed_weights_of_a_lent_model_are_no_older_than_its_weights() -> None:
    """PEFT merges an adapter through `.data`: address and version of the weight stay."""
    hf, tokenizer = tiny("llama", torch.float32)
    linear = hf.get_submodule("model.layers.0.mlp.down_proj")
    assert isinstance(linear, nn.Linear)
    x = torch.randn(3, linear.in_features, generator=torch.Generator().manual_seed(0))

    def check() -> None:
        # packing needs no bf16 products in fp32
        forward = fastlinear._packed_forward(linear)
        assert forward is not None
        torch.testing.assert_close(forward(x), x @ linear.weight.T, atol=1e-4, rtol=1e-4)

    check()
    linear.weight.data += 1
    with lent(hf, tokenizer):
        check()
    linear.weight.data += 1
    check()


def test_a_forward_that_a_user_put_on_a_layer_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = build()
    adapters = some_adapters(lm, 2)
    settings: dict[str, Any] = {"seeds": [0, 1], "max_new_tokens": 6, "temperature": 0.0, "adapter": adapters}
    plain = tokens(generate(lm, [[5, 6, 7], [9, 8]], **settings))
    base = next(iter(lm.lora.values())).base
    add_hook_to_module(base, ModelHook())
    own = base.forward
    assert tokens(generate(lm, [[5, 6, 7], [9, 8]], **settings)) == plain
    monkeypatch.setattr(fastlinear, "has_bf16_products", lambda: True)
    monkeypatch.setattr(fastlinear, "_packable", lambda _: True)
    with packed_linears(lm.hf):
        assert base.forward is own and lm.hf.lm_head.forward(torch.ones(1, 64)).shape == (1, 300)
        assert "forward" in vars(lm.hf.lm_head)
    assert base.__dict__["forward"] is own and "forward" not in vars(lm.hf.lm_head)
