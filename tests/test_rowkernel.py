"""The compiled updates of rows: exact to rounding, in any order of rows, and left out with a reason where nothing compiles."""

import os
import re
import shutil
import subprocess
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
    shutil.which((os.environ.get("CXX") or "g++").split()[0]) is None,
    reason="needs a C++ compiler (CXX or g++); without one this code is never used",
)


@pytest.fixture
def anew() -> Iterator[None]:
    """The library is looked for again in the test, and after it."""
    rowkernel.library.cache_clear()
    yield
    rowkernel.library.cache_clear()


def stack(ranks: list[int], outs: list[int]) -> tuple[Tensor, list[tuple[Tensor, Tensor, float]]]:
    """x [7, 1, 137]; A [4, R, 137], B [4, O, R] and a scale for each rank, all that bf16 holds exactly."""
    random = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random).bfloat16().float()

    layers = [
        (draw(4, r, 137), draw(4, out, r), 2.0**at)
        for at, (r, out) in enumerate(zip(ranks, outs, strict=True))
    ]
    return draw(7, 1, 137), layers


def multiply(
    x: Tensor, layers: list[tuple[Tensor, Tensor, float]], dtype: torch.dtype
) -> tuple[list[Tensor], rowkernel.Packed]:
    """The updates of x, and what was laid out for them."""
    packed = rowkernel.pack(layers, dtype)
    places = [torch.empty(7, 1, b_TOR.shape[1], dtype=dtype) for _, b_TOR, _ in layers]
    return list(RowUpdates(packed.pairs, places, ADAPTERS)(x.to(dtype))), packed


@compiled
@pytest.mark.parametrize(("ranks", "outs"), [([8], [64]), ([1, 8, 3], [5, 200, 5]), ([16, 16], [129, 1])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_updates_are_those_of_float64_rounded_once(
    dtype: torch.dtype, ranks: list[int], outs: list[int]
) -> None:
    x, layers = stack(ranks, outs)
    got, _ = multiply(x, layers, dtype)
    for y, (a_TRI, b_TOR, scale) in zip(got, layers, strict=True):
        low = torch.einsum("bi,bri->br", x[:, 0].double(), a_TRI.double()[ADAPTERS])
        want = torch.einsum("br,bor->bo", low, scale * b_TOR.double()[ADAPTERS])
        # the sums' own error may move a number that lies between two bf16 ones
        exact = want.to(dtype).double()
        error = (y[:, 0].double() - exact).abs() / want.abs().clamp(min=1.0)
        if dtype == torch.float32:
            assert error.max() < 1e-5
        else:
            assert (error > 0).double().mean() < 0.02 and error.max() < 2**-7


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_are_laid_out_as_pytorch_rounds_and_transposes_them(dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(1)
    layers = [
        (torch.randn(3, r, i, generator=random), torch.randn(3, o, r, generator=random), scale)
        for r, i, o, scale in [(8, 37, 20, 2.0), (3, 37, 5, 0.7), (1, 64, 1, 1.0)]
    ]
    # other places in memory, and numbers that rounding has to carry
    layers[0] = (layers[0][0].mT.contiguous().mT, layers[0][1], 2.0)
    layers[1][0][0, 0, :4] = torch.tensor([float("inf"), float("nan"), -0.0, 3.3961e38])
    packed = rowkernel.pack(layers, dtype)
    for (a, b), (a_TRI, b_TOR, scale) in zip(packed.pairs, layers, strict=True):
        torch.testing.assert_close(a, a_TRI.to(dtype), rtol=0, atol=0, equal_nan=True)
        assert torch.equal(b, (b_TOR * scale).to(dtype).mT)
        assert a.dtype == b.dtype == dtype
        # behind one another
        assert b.data_ptr() == a.data_ptr() + a[0].numel() * dtype.itemsize and a.stride(0) == b.stride(0)


@compiled
def test_memory_that_was_given_back_is_used_again_and_no_other() -> None:
    rowkernel._spare.clear()
    x, layers = stack([8, 8], [64, 96])
    want, first = multiply(x, layers, torch.float32)
    held, second = multiply(x, layers, torch.float32)
    assert first.block.data_ptr() != second.block.data_ptr()
    rowkernel.give_back(first)
    small = rowkernel.pack(layers[:1], torch.bfloat16)
    assert small.block.data_ptr() == first.block.data_ptr()
    again, third = multiply(x, layers, torch.float32)
    assert third.block.data_ptr() not in (small.block.data_ptr(), second.block.data_ptr())
    for ys in (held, again):
        assert all(torch.equal(one, two) for one, two in zip(want, ys, strict=True))
    # of two the larger one, whichever comes first
    larger = rowkernel.pack(layers * 2, torch.float32)
    for given in (third, larger, small):
        rowkernel.give_back(given)
    assert [block.data_ptr() for block in rowkernel._spare] == [larger.block.data_ptr()]
    rowkernel._spare.clear()
    with torch.inference_mode():
        # what that mode makes would be nothing for a forward outside of it
        assert not rowkernel.pack(layers, torch.float32).block.is_inference()


@compiled
def test_threads_share_the_rows_and_change_no_number() -> None:
    x, layers = stack([8, 8], [64, 96])
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(multiply(x, layers, torch.bfloat16)[0])
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)


@compiled
def test_a_number_that_is_none_stays_one() -> None:
    """A diverged adapter is seen, not rounded to something."""
    for dtype in (torch.float32, torch.bfloat16):
        x, layers = stack([8], [64])
        layers[0][0][2, 0, 0] = float("nan")
        layers[0][1][0, 0, 0] = float("inf")
        (y,), _ = multiply(x, layers, dtype)
        bad = [adapter == 2 for adapter in ADAPTERS]
        assert y.isnan().flatten(1).all(1).tolist() == bad
        assert y[:, 0, 0].isinf().tolist() == [adapter == 0 for adapter in ADAPTERS]


@compiled
def test_an_input_that_lies_otherwise_in_memory_is_read_as_it_is() -> None:
    x, layers = stack([8], [64])
    pairs = rowkernel.pack(layers, torch.bfloat16).pairs
    updates = RowUpdates(pairs, [torch.empty(7, 1, 64, dtype=torch.bfloat16)], ADAPTERS)
    want = updates(x.bfloat16())[0].clone()
    wide = torch.zeros(7, 1, 180, dtype=torch.bfloat16)
    wide[..., 40:177] = x
    assert torch.equal(updates(wide[..., 40:177])[0], want)
    assert torch.equal(updates(x)[0], want)


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


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (subprocess.TimeoutExpired("g++", 120, stderr=b"still at it\n"), "still at it"),
        (subprocess.TimeoutExpired("g++", 120), "timed out after 120 seconds"),
        (subprocess.CalledProcessError(1, "g++", stderr=" \n"), "non-zero exit status 1"),
        (
            subprocess.CalledProcessError(1, "g++", stderr="In file a:\na:1: error: no b"),
            "(a:1: error: no b)",
        ),
    ],
)
def test_whatever_a_compiler_does_is_a_reason(
    error: Exception, reason: str, anew: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.warns(UserWarning, match=re.escape(reason)):
        assert rowkernel.library() is None


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


@compiled
def test_calls_after_one_another_share_memory_and_leave_each_others_text_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where a call ended in an exception, and where the next has fewer adapters or another dtype."""
    how: dict[str, Any] = {"max_new_tokens": 6, "temperature": 0.0}
    alone = []
    for dtype in (torch.float32, torch.bfloat16):
        lm = build(dtype=dtype)
        for count in (3, 1):
            rowkernel._spare.clear()
            call = {"prompts": [[5, 6, 7], [9, 8], [4, 4, 4, 4]][:count], "adapter": some_adapters(lm, count)}
            call |= how | {"seeds": range(count)}
            alone.append((lm, call, tokens(generate(lm, **call))))
    rowkernel._spare.clear()
    for lm, call, want in alone:
        with monkeypatch.context() as patch:
            patch.setattr("mass.generate.pick", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                generate(lm, **call)
        (block,) = rowkernel._spare
        assert tokens(generate(lm, **call)) == want
        assert rowkernel._spare[0] is block
