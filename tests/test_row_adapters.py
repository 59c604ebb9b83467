"""Products with an adapter a row: how exact they are in bf16, and what is not done twice."""

from typing import Any

import pytest
import torch
from test_generate import build, some_adapters, tokens

from mass import fastlinear, lora
from mass.fastlinear import ROWS_FOR_BASE_TYPE, RowAdapters, has_bf16_products, packed_linears
from mass.generate import generate


def operations(call: Any) -> dict[str, int]:
    with torch.profiler.profile() as seen:
        call()
    return {event.key: event.count for event in seen.key_averages()}


# rows that come sorted, that come so backwards, and that do not
@pytest.mark.parametrize("order", ["sorted", "backwards", "mixed"])
@pytest.mark.parametrize(
    ("count", "rows", "width"), [(1, 1, 1), (5, 1, 1), (70, 1, 1), (2, 8, 1), (3, 20, 1), (4, 1, 30)]
)
def test_a_bf16_layer_is_as_near_to_float64_as_one_task_by_itself(
    count: int, rows: int, width: int, order: str
) -> None:
    """Against `LoraLinear`, whose adapter is fp32 whatever the number of rows."""
    lm = build(dtype=torch.bfloat16)
    adapters = some_adapters(lm, count)
    index = [i // rows for i in range(count * rows)]
    if order == "backwards":
        index.reverse()
    if order == "mixed":
        index = index[1::2] + index[::2]
    layers = [lm.lora[name] for name in list(lm.lora)[:7]]
    x = {w: torch.randn(len(index), width, w).bfloat16() for w in (64, 96)}
    with torch.no_grad():
        own = RowAdapters(lm.lora, adapters)
        own.set_rows(index, tokens=width)
        with packed_linears(lm.hf), own.applied():
            got = [layer(x[layer.weight.shape[1]]).double() for layer in layers]
        with lora.using(lm.lora, lora.select(adapters, index)):
            alone = [layer(x[layer.weight.shape[1]]).double() for layer in layers]
        wide = lora.select({key: tensor.double() for key, tensor in adapters.items()}, index)
        with lora.using(lm.lora, wide):
            lm.hf.double()
            want = [layer(x[layer.weight.shape[1]].double()) for layer in layers]
    # where A and B are rounded too it may be a little farther; more so where the base's product is rounded before they are added
    rounded = rows * width >= ROWS_FOR_BASE_TYPE or width == 1
    bound = 1.1 if not rounded else 1.25 if has_bf16_products() else 1.5
    for ours, theirs, truth in zip(got, alone, want, strict=True):
        assert (ours - truth).norm() < bound * (theirs - truth).norm() < 0.01 * truth.norm()


@pytest.mark.skipif(
    not has_bf16_products(),
    reason="needs a CPU with bf16 instructions; on others no layer is packed (the next test)",
)
def test_a_packed_layer_adds_before_it_rounds() -> None:
    lm = build(dtype=torch.bfloat16)
    base = next(iter(lm.lora.values())).base
    x, plus = torch.randn(200, 1, 64).bfloat16(), torch.randn(200, 1, base.out_features).bfloat16()
    with torch.no_grad(), packed_linears(lm.hf):
        got, apart = base.forward(x, plus), base(x) + plus
    truth = x.double() @ base.weight.double().mT + plus.double()
    assert (got - truth).norm() < 0.9 * (apart - truth).norm()


def test_a_cpu_without_bf16_instructions_multiplies_by_the_weights_as_they_are(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    """Without a word: it was said when the model was loaded."""
    monkeypatch.setattr(fastlinear, "has_bf16_products", lambda: False)
    lm = build(dtype=torch.bfloat16)
    with packed_linears(lm.hf):
        assert not any("forward" in module.__dict__ for module in lm.hf.modules())
    assert not recwarn.list


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("index", [[2, 3], [1, 3], [3, 2, 2], [0, 1]])
def test_rows_that_use_some_adapters_use_these(dtype: torch.dtype, tokens: int, index: list[int]) -> None:
    """Neighbours or not, from the first one on or not; after more rows, and at once."""
    lm = build(dtype=dtype)
    adapters = {key: tensor.to(dtype) for key, tensor in some_adapters(lm, 5).items()}
    layer = next(iter(lm.lora.values()))
    rows = RowAdapters(lm.lora, adapters)
    with torch.no_grad():
        for chosen in ([0, 1, 2, 3, 4], index, list(reversed(index))):
            x = torch.randn(len(chosen), tokens, 64, dtype=dtype)
            for own in (rows, rows.apart()):
                own.set_rows(chosen, tokens=tokens)
                with own.applied():
                    got = layer(x)
                with lora.using(lm.lora, lora.select(adapters, chosen)):
                    torch.testing.assert_close(got, layer(x))


def test_rows_sorted_by_adapter_either_way_are_not_put_in_another_order() -> None:
    lm = build()
    rows = RowAdapters(lm.lora, some_adapters(lm, 3))
    x = torch.randn(6, 1, 64)
    layer = next(iter(lm.lora.values()))
    for index, moved in (([0, 0, 1, 1, 2, 2], 0), ([2, 2, 1, 1, 0, 0], 0), ([0, 1, 0, 1, 2, 2], 2)):
        rows = RowAdapters(lm.lora, rows.adapter, traced=True)
        rows.set_rows(index)
        with torch.no_grad(), rows.applied():
            assert operations(lambda: layer(x)).get("aten::index", 0) == moved


def test_rows_of_one_adapter_and_prompt_share_its_forward() -> None:
    lm = build()
    adapters = some_adapters(lm, 3)
    prompt, other = [5, 6, 7, 8], [9, 8, 7, 6]
    shapes: list[list[int]] = []
    settings: dict[str, Any] = {"seeds": range(12), "max_new_tokens": 3}
    handle = lm.hf.model.embed_tokens.register_forward_pre_hook(lambda _, x: shapes.append(list(x[0].shape)))
    try:
        rows = generate(lm, [prompt] * 12, adapter=adapters, **settings)
        # three prompts for twelve rows, then a token of each row at each step
        assert shapes == [[3, 3]] + [[12, 1]] * 3
        shapes.clear()
        generate(lm, [prompt, other] * 6, adapter=adapters, **settings)
        assert shapes[0] == [6, 3]
    finally:
        handle.remove()
    for i in (0, 5, 11):
        how = {"seeds": [i], "max_new_tokens": 3, "adapter": lora.select(adapters, [i // 4])}
        assert tokens(generate(lm, [prompt], **how)) == [rows[i].tokens]


def test_the_prompts_forward_shows_the_decode_step_which_layers_share_an_input() -> None:
    lm = build()
    adapters = RowAdapters(lm.lora, some_adapters(lm, 2), traced=True)
    first = adapters.apart()
    ids = torch.tensor([[5, 6, 7], [8, 9, 3]])
    first.set_rows([0, 1], tokens=3)
    adapters.set_rows([0, 1])
    with torch.no_grad():
        with first.applied():
            apart = operations(lambda: lm.hf(ids))
        with adapters.applied():
            together = operations(lambda: lm.hf(ids[:, :1]))
    assert [len(group) for group in adapters.groups] == [3, 1, 2, 1] * 2

    def products(seen: dict[str, int]) -> int:
        return seen["aten::bmm"]

    # of seven layers three have no product by A of their own, in each of two blocks
    assert products(apart) - products(together) == 2 * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("first", [[0, 1, 2, 3, 4], [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]])
def test_rows_that_leave_and_come_use_their_own_adapters(dtype: torch.dtype, first: list[int]) -> None:
    lm = build(dtype=dtype)
    adapters = some_adapters(lm, 5)
    layers = [lm.lora[name] for name in list(lm.lora)[:7]]
    rows = RowAdapters(lm.lora, adapters)
    rows.set_rows(first)
    with torch.no_grad(), rows.applied():
        lm.hf(torch.tensor([[5 + i] for i in range(len(first))]))
    for index in (first, [3, 1, 4], [1, 3, 1, 4, 0], [4, 4, 4]):
        x = {w: torch.randn(len(index), 1, w).to(dtype) for w in (64, 96)}
        rows.set_rows(index)
        with torch.no_grad():
            with rows.applied():
                got = [layer(x[layer.weight.shape[1]]).float() for layer in layers]
            with lora.using(lm.lora, lora.select(adapters, index)):
                want = [layer(x[layer.weight.shape[1]]).float() for layer in layers]
        for ours, theirs in zip(got, want, strict=True):
            assert (ours - theirs).norm() < (1e-5 if dtype == torch.float32 else 0.01) * theirs.norm()
