"""A recorded decode step against the step as it is."""

from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from writers import build, some_adapters, some_prompts

from mass import decode
from mass.generate import Rollout, generate


def record_only(step: decode.DecodeStep) -> Any:
    """The operations of one step with all numbers that Python held at that moment, as a CUDA graph keeps them."""
    inputs = step.ids_B1, step.position_B1
    traced = make_fx(lambda ids_B1, position_B1: step._forward(ids_B1, position_B1))(*inputs)
    return lambda: traced(*inputs)


@pytest.mark.parametrize("with_adapters", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_replayed_steps_write_the_text_of_steps_as_they_are(
    kind: str, with_adapters: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of unlike length that share prompts or do not, more than there are places, beyond one chunk of columns."""
    recorded = []

    def record(step: decode.DecodeStep) -> Any:
        replay = record_only(step)
        recorded.append(0)

        def counted() -> torch.Tensor:
            recorded[-1] += 1
            return replay()

        return counted

    monkeypatch.setattr(decode.DecodeStep, "_compiled", record)
    lm = build(kind)
    prompts = some_prompts(12) + [prompt for prompt in some_prompts(3, seed=5) for _ in range(4)]
    how: dict[str, Any] = {
        "seeds": range(24),
        "max_new_tokens": 40,
        "batch_rows": 10,
        "stop_ids": range(40, 60),
        # drawing is after the step: nothing that is recorded depends on how
        "top_p": 0.9,
    }
    how["adapter"] = some_adapters(lm, 24) if with_adapters else None
    want = generate(lm, prompts, **how)
    assert len({len(rollout.tokens) for rollout in want}) > 2
    got = generate(lm, prompts, step="compile", **how)
    assert same(got, want)
    # many steps, few recordings
    assert sum(recorded) > 2 * len(recorded) > 0


def same(got: list[Rollout], want: list[Rollout]) -> bool:
    """The same text; its log-probs up to the rounding of products of another size."""
    close = all(
        torch.allclose(torch.tensor(a.logprobs), torch.tensor(b.logprobs), atol=1e-4)
        for a, b in zip(got, want, strict=True)
    )
    return close and [(a.tokens, a.finished, a.text) for a in got] == [
        (b.tokens, b.finished, b.text) for b in want
    ]


@pytest.mark.slow
def test_a_compiled_step_writes_the_same_text() -> None:
    lm = build()
    prompts = [prompt for prompt in some_prompts(2) for _ in range(3)]
    how: dict[str, Any] = {"seeds": range(6), "max_new_tokens": 8, "temperature": 0.0}
    assert same(generate(lm, prompts, step="compile", **how), generate(lm, prompts, **how))


def test_a_step_that_cannot_be_recorded_says_why_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = build()
    prompts = some_prompts(3)
    want = generate(lm, prompts, seeds=range(3), max_new_tokens=6)
    with pytest.warns(UserWarning, match="without cuda_graph: the model is on cpu"):
        got = generate(lm, prompts, seeds=range(3), max_new_tokens=6, step="cuda_graph")
    assert same(got, want)

    def broken(step: decode.DecodeStep) -> Any:
        raise RuntimeError("no compiler here\nand more")

    monkeypatch.setattr(decode.DecodeStep, "_compiled", broken)
    with pytest.warns(UserWarning, match="without compile: no compiler here$"):
        got = generate(lm, prompts, seeds=range(3), max_new_tokens=6, step="compile")
    assert same(got, want)
