"""Generated text against `transformers`' own, alone and in company; the model afterwards."""

import gc
import math
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from writers import MODELS, build, interrupted, some_adapters, some_prompts, tokens

from mass import lora
from mass.errors import MassError
from mass.generate import generate
from mass.kvcache import RowCache


def reference(lm: Any, prompt: Sequence[int], new: int) -> list[int]:
    out = lm.hf.generate(torch.tensor([prompt]), max_new_tokens=new, do_sample=False)
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("kind", MODELS)
def test_greedy_is_hugging_face_s_token_by_token(kind: str) -> None:
    lm = build(kind)
    prompts = some_prompts(32 if kind in ("llama", "qwen3", "gemma3") else 16)
    seeds = [0] * len(prompts)
    want = [reference(lm, prompt, 20) for prompt in prompts]
    assert sum(len(set(row)) > 5 for row in want) > len(want) // 2
    settings: dict[str, Any] = {"max_new_tokens": 20, "temperature": 0.0}
    assert tokens(generate(lm, prompts, seeds=seeds, **settings)) == want
    # few places: rows join while others are under way
    assert tokens(generate(lm, prompts, seeds=seeds, batch_rows=5, **settings)) == want
    for prompt, row in zip(prompts[::4], want[::4], strict=True):
        assert tokens(generate(lm, [prompt], seeds=[0], **settings)) == [row]


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3"])
def test_greedy_with_adapters_is_hugging_face_s(kind: str) -> None:
    lm = build(kind)
    adapters = some_adapters(lm, 4)
    prompts = some_prompts(32)
    draw = random.Random(1)
    index = [draw.randrange(4) for _ in prompts]
    want = []
    for prompt, which in zip(prompts, index, strict=True):
        with lora.using(lm.lora, lora.select(adapters, [which])):
            want.append(reference(lm, prompt, 12))
    settings: dict[str, Any] = {"seeds": [0] * 32, "max_new_tokens": 12, "temperature": 0.0}
    base = tokens(generate(lm, prompts, **settings))
    got = tokens(generate(lm, prompts, adapter=adapters, adapter_index=index, **settings))
    assert got == want != base
    assert (
        tokens(generate(lm, prompts, adapter=adapters, adapter_index=index, batch_rows=4, **settings)) == want
    )
    settings["seeds"] = [0]
    for prompt, which, row in list(zip(prompts, index, want, strict=True))[::4]:
        assert tokens(generate(lm, [prompt], adapter=adapters, adapter_index=[which], **settings)) == [row]
    settings["seeds"] = [0] * 32
    # without an index: the first quarter uses the first adapter, and so on
    parts = tokens(generate(lm, prompts, adapter=adapters, **settings))
    assert parts == tokens(
        generate(lm, prompts, adapter=adapters, adapter_index=[i // 8 for i in range(32)], **settings)
    )


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_shared_prompts_and_prompts_of_one_row_decode_side_by_side(kind: str) -> None:
    lm = build(kind)
    prompts = sorted(some_prompts(14, longest=50, seed=5), key=len)
    # the longest are taken first; rows end at their own times, and others join those that remain
    copies = [*prompts, *prompts[-2:] * 2, *prompts[4:7] * 3]
    stops = list(range(3, 40))
    want = {}
    for prompt in prompts:
        row = reference(lm, prompt, 14)
        last = next((i for i, token in enumerate(row) if token in stops), 13)
        want[tuple(prompt)] = row[: last + 1]
    assert len({len(row) for row in want.values()}) > 4
    settings: dict[str, Any] = {"max_new_tokens": 14, "temperature": 0.0, "stop_ids": stops}
    for batch_rows in (64, 9, 4):
        rows = generate(lm, copies, seeds=[0] * len(copies), batch_rows=batch_rows, **settings)
        assert tokens(rows) == [want[tuple(prompt)] for prompt in copies]


def test_only_a_prompt_that_rows_share_is_kept_apart() -> None:
    def prompts(count: int, width: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        keys = torch.arange(1.0, count * width + 1).view(count, 1, width, 1)
        return [(keys, -keys)]

    cache = RowCache(1, 8, "cpu")
    (layer,) = cache.row_layers
    cache.add(prompts(1, 3), [0, 0], [3, 3])
    assert layer.prefix is not None and cache.positions().tolist() == [3, 3]
    # 40 columns, more than a chunk: those of the first two rows, none so far, move to the right
    cache.add(prompts(2, 40), [0, 1], [40, 39])
    assert cache.group_count == 1 and cache.positions().tolist() == [3, 3, 40, 39]
    cache.reserve()
    seen = cache.bias(None)[:, 0, 0] == 0
    assert seen.sum(1).tolist() == [4, 4, 41, 40]
    assert layer.keys[2, 0, :40, 0].tolist() == list(range(1, 41))
    assert layer.values[3, 0, 1:40, 0].tolist() == [-float(i) for i in range(41, 80)]


@pytest.mark.parametrize(("prompts", "copies", "batch_rows"), [(3, 4, 4), (6, 4, 12), (5, 1, 2)])
@pytest.mark.parametrize("size", [math.nan, 1e25])
def test_an_adapter_that_is_not_finite_spoils_no_other_s_text(
    llama: Any, prompts: int, copies: int, batch_rows: int, size: float
) -> None:
    """Rows that come into the places of its rows, and rows beside its prompt: what is masked is multiplied by 0."""
    asked = [p for p in some_prompts(prompts) for _ in range(copies)]
    # one prompt without another row of it, beside those that share theirs
    asked, index = [*asked, [5, 6, 7]], [*(i // copies for i in range(len(asked))), prompts]
    adapters = some_adapters(llama, prompts + 1)
    settings: dict[str, Any] = {"seeds": range(len(asked)), "max_new_tokens": 9, "batch_rows": batch_rows}
    want = generate(llama, asked, adapter=adapters, adapter_index=index, **settings)
    for bad in (0, prompts - 1):
        broken = {key: x.clone() for key, x in adapters.items()}
        for x in broken.values():
            x[bad] *= size
        got = generate(llama, asked, adapter=broken, adapter_index=index, **settings)
        sound = [i for i, which in enumerate(index) if which != bad]
        assert [got[i].tokens for i in sound] == [want[i].tokens for i in sound]
        assert all(math.isfinite(p) for i in sound for p in got[i].logprobs)


def test_rows_beside_a_prompt_that_is_not_finite_do_not_see_it(llama: Any) -> None:
    """Rows of one prompt stay; those of another leave early, and rows with prompts of their own come into their places."""
    long, short, *own = sorted(some_prompts(5), key=len, reverse=True)
    asked, index = [long, long, short, short, *own], [0, 0, 1, 1, 2, 3, 4]
    adapters = some_adapters(llama, 5)
    settings: dict[str, Any] = {"seeds": [0] * 7, "max_new_tokens": 9, "temperature": 0.0, "batch_rows": 4}
    first = generate(llama, asked, adapter=adapters, adapter_index=index, **settings)[2].tokens[0]
    settings["stop_ids"] = [first]
    want = generate(llama, asked, adapter=adapters, adapter_index=index, **settings)
    assert len(want[2].tokens) == 1 and all(len(row.tokens) > 2 for row in want[4:])
    for x in adapters.values():
        x[0] *= math.nan
    got = generate(llama, asked, adapter=adapters, adapter_index=index, **settings)
    assert tokens(got[2:]) == tokens(want[2:]) and len(got[0].tokens) == 9
    assert all(math.isfinite(p) for row in got[2:] for p in row.logprobs)


def test_the_base_model_answers_where_a_slot_is_full(llama: Any) -> None:
    settings: dict[str, Any] = {"seeds": [0], "max_new_tokens": 8, "temperature": 0.0}
    want = tokens(generate(llama, [[5, 6]], **settings))
    with lora.using(llama.lora, some_adapters(llama, 1)):
        assert tokens(generate(llama, [[5, 6]], **settings)) == want


@pytest.mark.parametrize(
    "cut", [{}, {"temperature": 0.7, "top_p": 0.8}, {"top_k": 20, "min_p": 0.05}], ids=str
)
def test_a_row_s_text_depends_on_its_seed_only(llama: Any, cut: dict[str, Any]) -> None:
    prompts = [prompt for prompt in some_prompts(6) for _ in range(4)]
    seeds = [100 + i for i in range(24)]
    settings: dict[str, Any] = {"max_new_tokens": 15, "stop_ids": [40, 41, 42], **cut}
    want = generate(llama, prompts, seeds=seeds, **settings)
    assert len({tuple(row.tokens) for row in want}) > 20
    order = random.Random(0).sample(range(24), 24)
    shuffled = generate(
        llama, [prompts[i] for i in order], seeds=[seeds[i] for i in order], batch_rows=7, **settings
    )
    assert tokens(shuffled) == [want[i].tokens for i in order]
    for i in (0, 9, 23):
        alone = generate(llama, [prompts[i]], seeds=[seeds[i]], **settings)[0]
        assert alone.tokens == want[i].tokens
        assert alone.logprobs == pytest.approx(want[i].logprobs, abs=1e-4)


def test_one_seed_gives_one_text_and_prompts_that_share_a_prefill_do_not_mix(llama: Any) -> None:
    prompts = [[7, 8, 9], [7, 8, 10], [7, 8, 9], [9]]
    rows = generate(llama, prompts, seeds=[1, 1, 1, 1], max_new_tokens=10)
    assert rows[0] == rows[2]
    assert rows[0].tokens != rows[1].tokens


@pytest.mark.parametrize("with_adapters", [False, True])
def test_logprobs_are_those_of_a_full_forward(llama: Any, with_adapters: bool) -> None:
    adapters = some_adapters(llama, 2) if with_adapters else None
    prompts = some_prompts(8, seed=4)
    rows = generate(
        llama, prompts, seeds=range(8), max_new_tokens=12, temperature=0.5, top_k=30, adapter=adapters
    )
    for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        using = lora.select(adapters, [i // 4]) if adapters else None
        with torch.no_grad(), lora.using(llama.lora, using):
            logits = llama.hf(torch.tensor([prompt + row.tokens])).logits[0, len(prompt) - 1 : -1]
        want = logits.log_softmax(-1).gather(1, torch.tensor(row.tokens).unsqueeze(1)).squeeze(1)
        torch.testing.assert_close(torch.tensor(row.logprobs), want, atol=2e-4, rtol=1e-4)


def test_long_rows_outgrow_the_buffers(llama: Any) -> None:
    prompts = some_prompts(9, seed=2)
    want = [reference(llama, prompt, 75) for prompt in prompts]
    for batch_rows in (9, 2):
        rows = generate(
            llama, prompts, seeds=[0] * 9, max_new_tokens=75, temperature=0.0, batch_rows=batch_rows
        )
        assert tokens(rows) == want


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("after", [0, 5])
def test_control_c_leaves_the_model_as_it_was(dtype: torch.dtype, after: int) -> None:
    lm = build(dtype=dtype)
    lm.hf.model.layers[0].train()
    ids = torch.tensor([some_prompts(1)[0]])
    before = lm.hf(ids).logits
    attention = lm.hf.config._attn_implementation
    adapters = some_adapters(lm, 2)
    held = lora.select(adapters, [1])
    with lora.using(lm.lora, held):
        slot = next(iter(lm.lora.values())).slot
        with interrupted(lm.hf, after), pytest.raises(KeyboardInterrupt):
            generate(lm, [[5, 6, 7], [8, 9]], seeds=[1, 2], max_new_tokens=20, adapter=adapters)
        assert next(iter(lm.lora.values())).slot is slot
    assert lm.hf.model.layers[0].training
    assert not lm.hf.model.layers[1].training
    assert lm.hf.config._attn_implementation == attention
    assert not [m for m in lm.hf.modules() if "forward" in m.__dict__]
    assert torch.equal(lm.hf(ids).logits, before)
    assert torch.is_grad_enabled()


def test_bf16_follows_its_own_full_forward() -> None:
    lm = build(dtype=torch.bfloat16)
    rows = generate(lm, some_prompts(12), seeds=range(12), max_new_tokens=10, adapter=some_adapters(lm, 1))
    off = []
    with torch.no_grad(), lora.using(lm.lora, some_adapters(lm, 1)):
        for prompt, row in zip(some_prompts(12), rows, strict=True):
            logits = lm.hf(torch.tensor([prompt + row.tokens])).logits[0, len(prompt) - 1 : -1].float()
            want = logits.log_softmax(-1).gather(1, torch.tensor(row.tokens).unsqueeze(1)).squeeze(1)
            off.append((torch.tensor(row.logprobs) - want).abs().mean())
    # either is 0.1 from the same weights in fp64, a single row up to 0.5
    assert torch.stack(off).mean() < 0.2


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prompts": [[]]}, "prompt 0 is empty"),
        ({"seeds": [1, 2]}, "1 prompts but 2 seeds"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"top_p": 0.0}, "top_p"),
        ({"stop_strings": [""]}, "stop string is empty"),
        ({"adapter_index": [1]}, "adapter_index"),
    ],
)
def test_wrong_arguments_are_named(llama: Any, wrong: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"prompts": [[5]], "seeds": [1], "max_new_tokens": 3, **wrong}
    with pytest.raises(MassError, match=message):
        generate(llama, arguments.pop("prompts"), **arguments)


def test_no_prompts_give_no_rollouts(llama: Any) -> None:
    assert generate(llama, [], seeds=[], max_new_tokens=3) == []


@pytest.mark.slow
def test_memory_stays_flat_over_many_batches(llama: Any) -> None:
    def batch(seed: int) -> None:
        generate(
            llama,
            some_prompts(4, seed=seed),
            seeds=range(4),
            max_new_tokens=3,
            adapter=some_adapters(llama, 2),
        )

    def held() -> int:
        gc.collect()
        return sum(1 for thing in gc.get_objects() if isinstance(thing, torch.Tensor))

    for seed in range(5):
        batch(seed)
    before = held()
    for seed in range(100):
        batch(seed)
    assert held() <= before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_can_be_differentiated_after_it_has_written(dtype: torch.dtype) -> None:
    """What a forward in inference mode makes must not stay in the model: a backward refuses it."""
    lm = build(dtype=dtype)
    # makes its frequencies anew for a long row
    rope = lm.hf.model.rotary_emb
    rope.rope_type, rope.config.rope_parameters["factor"] = "dynamic", 2.0
    adapters = some_adapters(lm, 2)
    ids = torch.tensor([[5, 6, 7, 8], [9, 8, 7, 6]])

    def gradient() -> torch.Tensor:
        leaf = {key: tensor.clone().requires_grad_() for key, tensor in adapters.items()}
        with lora.using(lm.lora, leaf):
            loss = lm.hf(ids).logits.float().logsumexp(-1).sum()
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(leaf.values()))])

    before = gradient()
    generate(lm, [[5, 6, 7], [8, 9]], seeds=[0, 1], max_new_tokens=300, adapter=adapters)
    assert not any(tensor.is_inference() for tensor in [*lm.hf.parameters(), *lm.hf.buffers()])
    torch.testing.assert_close(gradient(), before)
