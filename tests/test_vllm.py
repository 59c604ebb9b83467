"""vLLM itself against our loop: text, log-probs, seeds. Run where vLLM is installed (docs/performance.md): pytest -m vllm."""

import os
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from test_generate import some_adapters, some_prompts, tokens
from tiny import tiny_lm

from mass import lora, vllm_engine
from mass.errors import MassError
from mass.generate import generate
from mass.model import LanguageModel
from mass.vllm_engine import IN_MEMORY

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.multiprocess,
    pytest.mark.skipif(
        find_spec("vllm") is None, reason="needs vLLM, an optional extra (docs/performance.md)"
    ),
]
ROWS = 12
INDEX = [i % 3 for i in range(ROWS)]


def build(kind: str, dtype: torch.dtype = torch.float32) -> LanguageModel:
    # heads of a width that vLLM's CPU build knows
    sizes = {"hidden_size": 128} if kind == "gpt_neox" else {"head_dim": 32}
    return tiny_lm(kind, dtype, rank=4, **sizes)


@pytest.fixture(scope="module")
def lm() -> Iterator[LanguageModel]:
    made = build("llama")
    yield made
    vllm_engine.drop(made.hf)


def prompts(lm: LanguageModel) -> list[list[int]]:
    most = lm.hf.config.vocab_size
    return [[token % most for token in prompt] for prompt in some_prompts(ROWS)]


def test_greedy_text_and_logprobs_are_ours(lm: LanguageModel) -> None:
    adapters = {"adapter": some_adapters(lm, 3), "adapter_index": INDEX}
    settings: dict[str, Any] = {"seeds": [0] * ROWS, "max_new_tokens": 16, "temperature": 0.0}
    environment, names = dict(os.environ), list(lm.hf.state_dict())
    folders = set(IN_MEMORY.glob("mass-vllm-*"))
    want = []
    for case in ({}, adapters):
        free = generate(lm, prompts(lm), **settings, **case)
        # the byte tokenizer writes what is no character as U+FFFD
        string = next(
            row.text[i : i + 2] for row in free for i in range(14) if "\ufffd" not in row.text[i : i + 2]
        )
        stop: dict[str, Any] = {"stop_ids": [free[0].tokens[3]], "stop_strings": [string]}
        ended = generate(lm, prompts(lm), **settings, **case, **stop)
        assert 0 < sum(row.finished for row in ended) < ROWS
        want += [(case, free), (case | stop, ended)]
    # the last first: an engine with adapters serves rows without as well
    for case, ours in reversed(want):
        got = generate(lm, prompts(lm), engine="vllm", batch_rows=8, **settings, **case)
        assert tokens(got) == tokens(ours)
        for a, b in zip(got, ours, strict=True):
            assert (a.text, a.finished) == (b.text, b.finished)
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
    assert tokens(want[0][1]) != tokens(want[2][1])
    assert len(vllm_engine.engines) == 1
    # nothing is left behind
    assert dict(os.environ) == environment and list(lm.hf.state_dict()) == names
    assert set(IN_MEMORY.glob("mass-vllm-*")) == folders
    assert not vllm_engine.engines[lm.hf][0].list_loras()


def test_a_row_s_text_depends_on_its_seed(lm: LanguageModel) -> None:
    settings: dict[str, Any] = {"max_new_tokens": 8, "engine": "vllm"}
    settings |= {"adapter": some_adapters(lm, 1), "batch_rows": 8}
    many = generate(lm, [[7, 8, 9]] * 8, seeds=range(8), **settings)
    assert len({tuple(row.tokens) for row in many}) > 4
    again = generate(lm, [[7, 8, 9]] * 3, seeds=[5, 2, 2**63 - 1], **settings)
    assert tokens(again[:2]) == [many[5].tokens, many[2].tokens]
    assert again[2].tokens != many[5].tokens


def test_draws_are_cut(lm: LanguageModel) -> None:
    def draw(**cuts: Any) -> set[int]:
        settings: dict[str, Any] = {
            "max_new_tokens": 1,
            "engine": "vllm",
            "temperature": 2.0,
            "batch_rows": 8,
        }
        return {r.tokens[0] for r in generate(lm, [[7, 8, 9]] * 400, seeds=range(400), **settings, **cuts)}

    with torch.no_grad(), lora.using(lm.lora, None):
        logits = lm.hf(torch.tensor([[7, 8, 9]])).logits[0, -1]
    chance, order = (logits / 2).softmax(-1).sort(descending=True)
    assert draw(top_k=4) == set(order[:4].tolist())
    nucleus = order[chance.cumsum(0) - chance < 0.2].tolist()
    likely = order[chance >= 0.6 * chance[0]].tolist()
    assert 1 < len(nucleus) != len(likely) > 1
    assert draw(top_p=0.2) == set(nucleus)
    assert draw(min_p=0.6) == set(likely)


def test_another_content_is_another_adapter_and_another_model_is_refused(lm: LanguageModel) -> None:
    settings: dict[str, Any] = {"seeds": [0] * ROWS, "max_new_tokens": 8, "temperature": 0.0, "batch_rows": 8}
    adapters = some_adapters(lm, 1)
    for _ in range(2):
        adapters = {key: -x for key, x in adapters.items() if key.endswith(".A")} | {
            key: x for key, x in adapters.items() if key.endswith(".B")
        }
        want = tokens(generate(lm, prompts(lm), adapter=adapters, **settings))
        assert tokens(generate(lm, prompts(lm), adapter=adapters, engine="vllm", **settings)) == want
    head = lm.hf.get_output_embeddings().weight
    with torch.no_grad():
        head.neg_()
        try:
            with pytest.raises(MassError, match="another model than mass does"):
                generate(lm, prompts(lm), engine="vllm", **settings)
        finally:
            head.neg_()
