"""The engine `hf` answers as our loop does wherever nothing is drawn, and leaves the model as it was."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_lm
from transformers import GenerationConfig
from writers import build, interrupted, some_adapters, some_prompts, tokens

from mass import lora
from mass.generate import Rollout, generate
from mass.practice import answer
from mass.prompts import make_prompts
from mass.recipe import load
from mass.setting import answer_sampling, example_sampling

INDEX = [i % 3 for i in range(20)]


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
@pytest.mark.parametrize("with_adapters", [False, True])
def test_greedy_rollouts_are_ours(kind: str, with_adapters: bool) -> None:
    lm = build(kind)
    # what comes with a model must not matter
    lm.hf.generation_config = GenerationConfig(eos_token_id=77, repetition_penalty=3.0, do_sample=True)
    settings: dict[str, Any] = {"seeds": [0] * 20, "max_new_tokens": 12, "temperature": 0.0, "batch_rows": 4}
    if with_adapters:
        settings |= {"adapter": some_adapters(lm, 3), "adapter_index": INDEX}
    free = generate(lm, some_prompts(20), **settings)
    string = free[3].text[4:6]
    settings |= {"stop_ids": list(range(20, 40)), "stop_strings": [string]}
    want = generate(lm, some_prompts(20), **settings)
    assert 5 < sum(row.finished for row in want) < 20 and want[3].finished
    got = generate(lm, some_prompts(20), engine="hf", **settings)
    assert tokens(got) == tokens(want)
    for a, b in zip(got, want, strict=True):
        assert (a.text, a.finished) == (b.text, b.finished)
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)


def test_draws_are_cut_and_seeded_and_leave_other_random_numbers_alone(llama: Any) -> None:
    settings: dict[str, Any] = {"max_new_tokens": 1, "engine": "hf", "batch_rows": 200, "temperature": 8.0}

    def draw(seed: int, **cuts: Any) -> list[Rollout]:
        return generate(llama, [[7, 8, 9]] * 200, seeds=[seed] * 200, **settings, **cuts)

    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = draw(3, top_k=4)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert first == draw(3, top_k=4) != draw(4, top_k=4)
    with torch.no_grad():
        logits = llama.hf(torch.tensor([[7, 8, 9]])).logits[0, -1]
    # at temperature 1 and uncut, whatever they were drawn with
    logprobs = logits.log_softmax(-1)
    for row in first:
        assert row.logprobs == pytest.approx([logprobs[row.tokens[0]].item()], abs=1e-3)
    chance, order = (logits / 8).softmax(-1).sort(descending=True)
    assert {row.tokens[0] for row in first} == set(order[:4].tolist())
    nucleus = order[chance.cumsum(0) - chance < 0.2].tolist()
    likely = order[chance >= 0.2 * chance[0]].tolist()
    assert 1 < len(nucleus) != len(likely) > 1
    assert {row.tokens[0] for row in draw(3, top_p=0.2)} == set(nucleus)
    assert {row.tokens[0] for row in draw(3, min_p=0.2)} == set(likely)


def test_control_c_leaves_the_model_as_it_was(llama: Any) -> None:
    settings, adapters = llama.hf.generation_config, some_adapters(llama, 2)
    with lora.using(llama.lora, lora.select(adapters, [1])):
        slot = next(iter(llama.lora.values())).slot
        with interrupted(llama.hf, 3), pytest.raises(KeyboardInterrupt):
            generate(llama, [[5, 6], [8, 9]], seeds=[1, 2], max_new_tokens=9, adapter=adapters, engine="hf")
        assert next(iter(llama.lora.values())).slot is slot
    assert llama.hf.generation_config is settings


@pytest.mark.parametrize("engine", ["ours", "hf"])
def test_the_recipe_names_the_engine(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipes = Path(__file__).resolve().parents[1] / "recipes"
    recipe = load(recipes / "smoke.yaml", [f"generate.engine={engine}"])
    lm = tiny_lm(dtype=torch.float32)
    calls: list[dict[str, Any]] = []
    theirs: Any = lm.hf.generate
    monkeypatch.setattr(lm.hf, "generate", lambda **how: calls.append(how) or theirs(**how))
    for sampling in (answer_sampling(recipe), example_sampling(recipe)):
        few = replace(sampling, max_new_tokens=3)
        prompts = make_prompts(lm.tokenizer, "plain")
        answer(lm, prompts, ["1 + 1"], shots=[[]], adapter=None, sampling=few, seeds=[[0]])
    assert [how["max_new_tokens"] for how in calls] == ([3, 3] if engine == "hf" else [])
