"""The compiled updates of rows: exact to rounding, in any order of rows, and left out with a reason where nothing compiles."""

import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from writers import build, some_adapters, tokens

from mass import lora, rowkernel
from mass.fastlinear import RowAdapters, packed_linears
from mass.generate import generate
from mass.rowkernel import RowUpdates

ADAPTERS = [2, 0, 0, 3, 1, 2, 2]
compiled = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++").split()[0]) is None, reason="needs a C++ compiler"
)


@pytest.fixture
def anew() -> Iterator[None]:
    """The library is looked for again in the test, and after it."""
    rowkernel.library.cache_clear()
    yield
    rowkernel.library.cache_clear()


def stack(dtype: torch.dtype, ranks: list[int], outs: list[int]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """x [7, 1, 37], A [4, K, 37], B."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(7, 1, 37, generator=random)
    a = torch.randn(4, sum(ranks), 37, generator=random)
    b = [torch.randn(4, r, out, generator=random) for r, out in zip(ranks, outs, strict=True)]
    return x.to(dtype), a.to(dtype), [b_TRO.to(dtype) for b_TRO in b]


@compiled
@pytest.mark.parametrize(("ranks", "outs"), [([8], [64]), ([1, 8, 3], [5, 200, 5]), ([16, 16], [129, 1])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_updates_are_those_of_float64_rounded_once(
    dtype: torch.dtype, ranks: list[int], outs: list[int]
) -> None:
    x, a, b = stack(dtype, ranks, outs)
    places = [torch.empty(7, 1, out, dtype=dtype) for out in outs]
    got = RowUpdates(a, b, places, ADAPTERS)(x)
    low = torch.einsum("bi,bki->bk", x[:, 0].double(), a.double()[ADAPTERS])
    for y, low_BR, b_TRO in zip(got, low.split(ranks, 1), b, strict=True):
        want = torch.einsum("br,bro->bo", low_BR, b_TRO.double()[ADAPTERS])
        # the sums' own error may move a number that lies between two bf16 ones
        exact = want.to(dtype).double()
        error = (y[:, 0].double() - exact).abs() / want.abs().clamp(min=1.0)
        if dtype == torch.float32:
            assert error.max() < 1e-5
        else:
            assert (error > 0).double().mean() < 0.02 and error.max() < 2**-7


@compiled
def test_threads_share_the_rows_and_change_no_number() -> None:
    x, a, b = stack(torch.bfloat16, [8, 8], [64, 96])
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            places = [torch.empty(7, 1, out, dtype=torch.bfloat16) for out in (64, 96)]
            found.append(RowUpdates(a, b, places, ADAPTERS)(x))
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)


@compiled
def test_a_number_that_is_none_stays_one() -> None:
    """A diverged adapter is seen, not rounded to something."""
    for dtype in (torch.float32, torch.bfloat16):
        x, a, b = stack(dtype, [8], [64])
        a[2, 0, 0] = float("nan")
        b[0][0, 0, 0] = float("inf")
        (y,) = RowUpdates(a, b, [torch.empty(7, 1, 64, dtype=dtype)], ADAPTERS)(x)
        bad = [adapter == 2 for adapter in ADAPTERS]
        assert y.isnan().flatten(1).all(1).tolist() == bad
        assert y[:, 0, 0].isinf().tolist() == [adapter == 0 for adapter in ADAPTERS]


@compiled
def test_an_input_that_lies_otherwise_in_memory_is_read_as_it_is() -> None:
    x, a, b = stack(torch.bfloat16, [8], [64])
    updates = RowUpdates(a, b, [torch.empty(7, 1, 64, dtype=torch.bfloat16)], ADAPTERS)
    want = updates(x)[0].clone()
    wide = torch.zeros(7, 1, 80, dtype=torch.bfloat16)
    wide[..., 40:77] = x
    assert torch.equal(updates(wide[..., 40:77])[0], want)
    assert torch.equal(updates(x.float())[0], want)


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false", "echo"])
def test_without_a_compiler_the_reason_is_said_once_and_text_is_the_same(
    compiler: str, anew: None, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    lm = build()
    how: dict[str, Any] = {"seeds": range(6), "max_new_tokens": 8, "temperature": 0.0}
    how |= {"adapter": some_adapters(lm, 3)}
    prompts = [[5, 6, 7], [5, 6, 7], [9, 8], [9, 8], [4], [4]]
    want = tokens(generate(lm, prompts, **how))
    assert not [w for w in recwarn if "adapters" in str(w.message)]
    rowkernel.library.cache_clear()
    monkeypatch.setenv("CXX", compiler)
    for _ in range(2):
        assert tokens(generate(lm, prompts, **how)) == want
    said = [str(w.message) for w in recwarn if "adapters" in str(w.message)]
    assert len(said) == 1 and f"{compiler} does not compile rowkernel.cpp (" in said[0]


@compiled
def test_a_traced_step_has_no_compiled_call() -> None:
    """Its numbers would be those of the step that was traced."""
    lm = build(dtype=torch.bfloat16)
    layers = [lm.lora[name] for name in list(lm.lora)[:3]]
    for traced in (False, True):
        rows = RowAdapters(lm.lora, some_adapters(lm, 4), traced=traced)
        rows.set_rows(range(4))
        x = torch.randn(4, 1, 64).bfloat16()
        with torch.no_grad(), torch.profiler.profile() as seen, packed_linears(lm.hf), rows.applied():
            got = [layer(x) for layer in layers]
        assert any(event.key == "aten::bmm" for event in seen.key_averages()) is traced
        with torch.no_grad(), lora.using(lm.lora, rows.adapter):
            for y, layer in zip(got, layers, strict=True):
                torch.testing.assert_close(y, layer(x), atol=0.1, rtol=0.02)
