"""The memory model against what processes really hold, and the engine that `auto` takes."""

import ctypes
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks
from tiny import tiny
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from mass import forward, lora, memory, metagrad
from mass.batch import Packed, Sequence, pack
from mass.blocks import Split, split
from mass.errors import MassError
from mass.inner import Step
from mass.lora import LoraShape, attach
from mass.shallow import depth_of, line, shallow

LAUNCH = Path(__file__).resolve().parents[1] / "launch"
SHAPE = LoraShape(4, 8.0, ("all-linear",))
# for `predict(seen=...)`: a test of the way back alone has no first-order passes measured
NO_FIRST_ORDER = {False: 0}


def batch(tasks: int = 1, examples: int = 3, tokens: int = 24) -> Packed:
    return pack([[Sequence(list(range(1, tokens + 1)), tokens // 2)] * examples] * tasks, 0, row=tokens)


def model(architecture: str = "llama", **changes: Any):  # type: ignore[no-untyped-def]
    hf, _ = tiny(architecture, torch.float32, **changes)
    return hf, split(hf, attach(hf, SHAPE))


def predict(hf, parts, inner: Packed, **how: Any) -> memory.Peak:  # type: ignore[no-untyped-def]
    return memory.predict(hf, parts, SHAPE, inner, batch(len(inner.tokens_TPS), examples=1), **how)


def test_live_counts_what_lives() -> None:
    outside = torch.ones(1000)
    with memory.Live() as live:
        a = outside * 2
        view = a.view(10, 100)
        b = a + 1
        del a
        assert live.now == 8000, "a view keeps its storage"
        del view
        assert live.now == 4000
        del b
    assert (live.now, live.peak) == (0, 8000)


def test_live_counts_what_the_graph_keeps() -> None:
    x = torch.ones(1000, requires_grad=True)
    with memory.Live() as live:
        y = x.exp().sin().sum()
        assert live.now == 4004, (
            "exp keeps its result and sin its input, which is the same; the sum is a number"
        )
        y.backward()
        del y
    assert live.now == 4000, "the gradient alone"


# Random models of SmolLM2's width, each case in its own process. `make bench`-sized cases: launch/meta_bench.py prints
# the prediction beside the measurement.
CASES = [
    {"engine": "reverse", "layers": 4, "tokens": 64, "K": 2},
    {"engine": "blockwise", "layers": 6, "tokens": 64, "K": 2},
    # less of all: a CPU without bf16 instructions takes a minute and a half for as much as the others have
    {"engine": "blockwise_kept", "layers": 4, "tokens": 24, "examples": 2, "K": 2, "dtype": "bf16"},
    {"engine": "finite_difference", "layers": 4, "tokens": 64, "K": 2},
]


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["engine"])
def test_prediction_is_within_15_percent_of_the_peak(ranks: Ranks, case: dict[str, Any]) -> None:
    common = {
        "case": "grid",
        "shape": "SmolLM2-135M",
        "examples": 4,
        "tasks": 1,
        "dtype": "fp32",
        "device": "cpu",
        "init": False,
    }
    row = json.loads(ranks("test_memory:measured", common | case).good().out[0].splitlines()[-1])
    assert row["predicted_gb"] == pytest.approx(row["peak_gb"], rel=0.15)


def measured(case: dict[str, Any]) -> None:
    """In a process of its own: prints what launch/meta_bench_gradients.py says of a case."""
    sys.path.insert(0, str(LAUNCH))
    import meta_bench_gradients

    torch.set_num_threads(1)
    # malloc.h: M_MMAP_THRESHOLD; what is freed is to leave the process
    ctypes.CDLL(None).mallopt(-3, 65536)
    print(json.dumps(meta_bench_gradients.memory(case)))


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_measured_peak_is_not_that_of_the_process_that_started_it() -> None:
    """A child of a process of 1.5 GB that takes 50 MB."""
    child = (
        "import sys; sys.path.insert(0, sys.argv[1]); import meta_bench_gradients as g;"
        "before = g.reset_peak('cpu'); taken = b'x' * 50_000_000; print(g.peak_since('cpu', before))"
    )
    parent = (
        "import subprocess, sys; large = b'x' * 1_500_000_000;"
        "subprocess.run([sys.executable, '-c', sys.argv[2], sys.argv[1]], check=True)"
    )
    words = [sys.executable, "-c", parent, str(LAUNCH), child]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(50e6, rel=0.2)


def test_the_policy_gradient_is_planned_for_where_it_is_the_largest_pass() -> None:
    """Its batch is of one adapter, whose examples follow longer prompts than those that are learned from."""
    hf, parts = model()
    inner, last, long = batch(2), batch(2, examples=1), batch(2, tokens=400)
    how: dict[str, Any] = {"engine": "blockwise", "steps": 1}
    plain = memory.predict(hf, parts, SHAPE, inner, last, **how)
    for with_kl in (False, True):
        written = memory.predict(hf, parts, SHAPE, inner, last, policy=long, with_kl=with_kl, **how)
        alone = memory.predict_outer(hf, parts, SHAPE, long, with_kl=with_kl)
        assert written.first_order == alone.first_order > 3 * plain.first_order
        assert (written.sweep, written.kept) == (plain.sweep, plain.kept)
    # a smaller one changes nothing, and a second inner loop adds its own small states
    how |= {"policy": batch(1, examples=1), "with_kl": True, "loops": 2}
    short = memory.predict(hf, parts, SHAPE, inner, last, **how)
    assert short == replace(plain, kept=2 * plain.kept)


def test_a_divergence_from_the_base_takes_one_more_chunk_of_logits() -> None:
    """Where the vocabulary is far the largest size, so that the peak is in the head."""
    hf, parts = model(vocab_size=20_000)
    last = batch(examples=2)
    for checkpoint in (False, True):
        without, held = (
            memory.predict_outer(hf, parts, SHAPE, last, checkpoint=checkpoint, with_kl=with_kl).first_order
            for with_kl in (False, True)
        )
        assert held - without == pytest.approx(last.label_M.numel() * 20_000 * 4, rel=0.05)


def test_depth_is_drawn_out_and_blockwise_hardly_grows_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    growth = {}
    for engine in ("blockwise", "reverse"):
        drawn: list[tuple[list[int], int]] = []
        monkeypatch.setattr(memory, "line", lambda *given, to=drawn: to.append(given) or line(*given))
        peak = predict(
            *model(num_hidden_layers=12), batch(), engine=engine, steps=2, seen=dict(NO_FIRST_ORDER)
        )
        assert len(drawn) == 2 and [deep for _, deep in drawn] == [12, 12]
        (size, _), (sweep, _) = drawn
        assert peak.sweep == line(sweep, 12) + 3 * line(size, 12)
        growth[engine] = line(sweep, 12) - line(sweep, 4)
    assert 0 < growth["blockwise"] < growth["reverse"] / 3


def test_layers_named_in_full_are_planned_as_the_blocks_that_they_are_of() -> None:
    """The layers of a shallow copy and the depth of an adapter of the last 3 of 8 blocks, whichever way they are named."""
    found = []
    for names in ("down_proj", "model.layers.{}.mlp.down_proj", "layers.{}.mlp.down_proj"):
        hf, _ = tiny("llama", torch.float32, num_hidden_layers=8)
        last = 3 if names == "down_proj" else None
        shape = LoraShape(4, 8.0, (names,) if last else tuple(names.format(i) for i in (5, 6, 7)), last)
        parts = split(hf, attach(hf, shape))
        with FakeTensorMode(allow_non_fake_inputs=True):
            copy = shallow(hf, parts, shape, 2, "cpu")
        layers = {name: layer.weight.shape for name, layer in copy.layers.items()}
        found.append((layers, depth_of(hf, parts, shape)))
    assert found[0] == found[1] == found[2]
    assert list(found[0][0]) == [f"model.layers.{i}.mlp.down_proj" for i in range(2)] and found[0][1] == 3


def held(hf: PreTrainedModel, parts: Split, inner: Packed, engine: str) -> tuple[int, int]:
    """Most bytes that the way back over two steps really holds, and those of an adapter."""
    random = torch.Generator().manual_seed(0)
    adapter = {
        key: torch.randn(2, *x.shape) for key, x in lora.fresh(parts.layers, SHAPE.rank, random).items()
    }
    weight_TN = torch.ones(inner.count_TN.shape)
    made = (
        metagrad.Reverse(hf, parts.layers, inner, weight_TN)
        if engine == "reverse"
        else metagrad.blockwise(hf, parts, inner, weight_TN)
    )
    with memory.Live() as live:
        taken = (
            [made.record(adapter)[1] for _ in range(2)] if isinstance(made, metagrad.Reverse) else [adapter]
        )
        for grad in taken[::-1]:
            made(Step(adapter, {}, grad, weight_TN), adapter, True)
    return live.peak, sum(x.nbytes for x in adapter.values())


@pytest.mark.parametrize("engine", ["reverse", "blockwise"])
def test_blocks_below_the_lowest_adapter_hold_nothing(engine: memory.Engine) -> None:
    """Adapters on the last 3 of 8 blocks: predicted as what a sweep of the whole model really holds at its peak."""
    hf, _ = tiny("llama", torch.float32, num_hidden_layers=8)
    shape = replace(SHAPE, last=3)
    parts, inner = split(hf, attach(hf, shape)), batch(2)
    how: dict[str, Any] = {"engine": engine, "steps": 2, "seen": dict(NO_FIRST_ORDER)}
    peak = memory.predict(hf, parts, shape, inner, batch(2, 1), **how)
    most, size = held(hf, parts, inner, engine)
    # two steps keep where they began and ended, blockwise their gradients, too
    assert peak.kept == size * (3 if engine == "reverse" else 5)
    # the prediction has the cotangents of a step beside the engine's own
    assert peak.sweep - 3 * size == pytest.approx(most, rel=0.05)


def test_memory_grows_with_steps_by_small_states_only() -> None:
    hf, parts = model()
    before = {key: value.clone() for key, value in hf.state_dict().items()}
    seen: dict[bool, int] = {}
    one, two, many = (predict(hf, parts, batch(), engine="blockwise", steps=k, seen=seen) for k in (1, 2, 9))
    assert two.sweep == many.sweep
    size = sum(p.weight.shape[0] + p.weight.shape[1] for p in parts.layers.values()) * SHAPE.rank * 4
    assert many.kept - two.kept == 7 * 2 * size
    assert one.sweep < two.sweep, "the first step's Hessian product is not made"
    # and predicting leaves the model alone
    assert all(torch.equal(value, before[key]) for key, value in hf.state_dict().items())
    assert all(layer.slot is None for layer in parts.layers.values())


@pytest.mark.parametrize("architecture", ["gemma3", "gpt_neox"])
def test_other_architectures(architecture: str) -> None:
    """As above, of the other kinds of blocks."""
    hf, parts = model(architecture)
    inner = batch(2)
    for engine in ("reverse", "blockwise"):
        peak = predict(hf, parts, inner, engine=engine, steps=2, seen=dict(NO_FIRST_ORDER))
        most, size = held(hf, parts, inner, engine)
        assert peak.sweep - 3 * size == pytest.approx(most, rel=0.05)


def test_auto_takes_the_fastest_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    hf, parts = model()
    args = (hf, parts, SHAPE, batch(), batch(1, 1))
    rich = memory.choose(*args, steps=2, memory_gb=64)
    assert (rich.engine, rich.checkpoint) == ("reverse", False)
    assert rich.reason.startswith("reverse needs") and "64.00 GB meta_gradient.memory_gb" in rich.reason

    # the order, with sizes made up
    sizes = {("reverse", False): 8, ("blockwise", False): 9, ("blockwise", True): 4}

    def made_up(*_: Any, engine: str, recompute: bool, checkpoint: bool, **__: Any) -> memory.Peak:
        size = 2 if checkpoint and recompute else sizes[engine, recompute]
        return memory.Peak(size * 10**9, 0, 0)

    monkeypatch.setattr(memory, "predict", made_up)
    monkeypatch.setattr(memory, "free_bytes", lambda device: (10e9, "free"))
    taken = {}
    for limit in (8.5, 5.0, 3.0, None):
        choice = memory.choose(*args, steps=2, memory_gb=limit, ranks=2)
        taken[limit] = (choice.engine, choice.recompute, choice.checkpoint)
    assert taken == {
        8.5: ("reverse", False, False),
        5.0: ("blockwise", True, False),
        3.0: ("blockwise", True, True),
        None: ("blockwise", True, False),
    }
    tight = memory.choose(*args, steps=2, memory_gb=5)
    assert (
        "too large: reverse needs 8.00 GB" in tight.reason
        and "without recomputation needs 9.00" in tight.reason
    )
    with pytest.raises(
        MassError, match=r"no exact engine fits.*meta_gradient\.memory_gb to 2\.00.*finite_difference"
    ):
        memory.choose(*args, steps=2, memory_gb=1)


def test_auto_without_blocks_is_reverse() -> None:
    hf, _ = model()
    hf, _ = tiny("llama", torch.float32)
    attach(hf, SHAPE)
    choice = memory.choose(hf, None, SHAPE, batch(), batch(1, 1), steps=1, memory_gb=8, checkpoint=True)
    assert (choice.engine, choice.checkpoint) == ("reverse", False)


def test_logits_are_predicted_in_the_chunks_of_the_device_that_is_planned_for() -> None:
    """More of them at one time on a GPU; the copies that are measured lie on the CPU."""
    hf, parts = model(vocab_size=20_000)
    inner, last = batch(1), batch(examples=12)
    rows = last.label_M.numel()
    assert forward.CHUNK_ROWS["cpu"] < rows < forward.CHUNK_ROWS["cuda"]
    cpu, cuda, own = (
        memory.predict_outer(hf, parts, SHAPE, last, device=device).first_order
        for device in ("cpu", "cuda", None)
    )
    assert own == cpu
    # logits and their derivative, at least
    more = (rows - forward.CHUNK_ROWS["cpu"]) * 20_000 * 4
    assert cuda - cpu > 1.9 * more
    whole = memory.predict(
        hf, parts, SHAPE, inner, last, engine="blockwise", steps=1, device="cuda", seen=(seen := {})
    )
    assert whole.first_order == seen[False] > cpu


def test_a_way_back_of_one_step_keeps_one_graph() -> None:
    hf, parts = model()
    how: dict[str, Any] = {"engine": "reverse", "seen": {False: 0}}
    one, cut, two = (
        predict(hf, parts, batch(), steps=k, truncate=j, **how).sweep
        for k, j in ((1, None), (2, 1), (2, None))
    )
    assert one == cut < two
    assert [metagrad.recorded(*x) for x in ((1,), (2,), (9,), (9, 1), (9, 5), (2, 1))] == [1, 2, 2, 1, 2, 1]
