"""The split of a decoder into embed / blocks / head, and what is said where there is none."""

from functools import cache
from typing import Any

import pytest
import references
import torch
import worlds
from accelerate.hooks import ModelHook, add_hook_to_module
from test_forward import foreign
from torch import nn
from worlds import ARCHITECTURES, World

from mass import blocks, lora, metagrad
from mass.batch import Sequence, pack
from mass.errors import MassError
from mass.lora import LoraShape


@cache
def world_of(name: str) -> World:
    return worlds.make(name)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_blocks_in_order_are_the_models_own_forward(name: str) -> None:
    world = world_of(name)
    parts = world.parts
    assert len(parts.blocks) == len(parts.prefix) == world.hf.config.num_hidden_layers
    call = blocks.enter(parts, world.packed)
    hidden = call.hidden_BSD
    for i in range(len(parts.blocks)):
        hidden = blocks.run_block(parts, call, i, hidden, blocks.of_block(parts, i, world.start))
    with lora.using(world.layers, world.start):
        whole = world.hf.base_model(**blocks.model_inputs(world.hf, world.packed), use_cache=False)
    assert torch.equal(parts.norm(hidden), whole.last_hidden_state)
    assert call.hidden_BSD.shape == (*world.packed.tokens_BS.shape, 32)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_adapter_tensor_belongs_to_one_block(name: str) -> None:
    world = world_of(name)
    seen = [
        key for i in range(len(world.parts.blocks)) for key in blocks.of_block(world.parts, i, world.start)
    ]
    assert sorted(seen) == sorted(world.start)
    # by name, too: ten blocks and more must not take each other's keys for their own
    for i, prefix in enumerate(world.parts.prefix):
        assert world.hf.get_submodule(prefix.rstrip(".")) is world.parts.blocks[i]


def test_block_1_does_not_own_block_10() -> None:
    world = worlds.make("llama", num_hidden_layers=11)
    keys = blocks.of_block(world.parts, 1, world.start)
    assert keys and all(key.startswith("model.layers.1.") for key in keys)


def test_enter_leaves_the_model_as_it_was_also_after_an_error() -> None:
    world = worlds.make()
    before = [block.forward for block in world.parts.blocks]
    blocks.enter(world.parts, world.packed)
    wrong = pack([[Sequence([10**6, 3, 4], 1)]], 0)
    with pytest.raises(IndexError):
        blocks.enter(world.parts, wrong)
    assert all("forward" not in vars(block) for block in world.parts.blocks)
    assert [block.forward for block in world.parts.blocks] == before


def test_enter_puts_a_user_s_own_forward_back() -> None:
    world = worlds.make()
    block = world.parts.blocks[0]
    add_hook_to_module(block, ModelHook())
    own, keys = block.forward, list(vars(block))
    blocks.enter(world.parts, world.packed)
    assert block.__dict__["forward"] is own and list(vars(block)) == keys
    assert "forward" not in vars(world.parts.blocks[1])


def test_no_cache_reaches_the_blocks() -> None:
    world = worlds.shared()
    assert world.hf.config.use_cache
    for _, kwargs in blocks.enter(world.parts, world.packed).arguments:
        assert kwargs.get("cache") is None and not kwargs.get("use_cache")


def test_each_layer_kind_gets_its_own_mask_and_rotation() -> None:
    world = world_of("gemma3")
    assert [k for k in world.hf.config.layer_types] == ["sliding_attention", "full_attention"]
    (_, first), (_, second) = blocks.enter(world.parts, world.packed).arguments
    assert not torch.equal(first["attention_mask"], second["attention_mask"])
    assert not torch.equal(first["position_embeddings"][0], second["position_embeddings"][0])


def test_split_works_in_low_precision() -> None:
    for name in ("llama", "gemma3", "gpt_neox"):
        for dtype in (torch.float32, torch.bfloat16):
            worlds.make_huggingface(name, dtype)


def test_split_leaves_slots_as_they_were() -> None:
    world = worlds.make()
    with lora.using(world.layers, world.start):
        blocks.split(world.hf, world.layers)
        assert all(layer.slot is not None for layer in world.layers.values())


def test_second_order_kernels_are_on_only_inside() -> None:
    q = torch.randn(1, 1, 4, 8, dtype=torch.float64, requires_grad=True)

    def second() -> None:
        out = nn.functional.scaled_dot_product_attention(q, q, q)
        (g,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
        torch.autograd.grad(g.square().sum(), q)

    with blocks.second_order():
        assert not torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.math_sdp_enabled()
        second()
    assert torch.backends.cuda.flash_sdp_enabled()
    with pytest.raises(RuntimeError, match="not implemented|derivative"):
        second()


@pytest.mark.parametrize(
    "kind,settings",
    [
        ("mamba", {"state_size": 4}),
        ("biogpt", {}),
    ],
)
def test_without_findable_blocks_the_message_names_the_engines_that_work(
    kind: str, settings: dict[str, int]
) -> None:
    hf = foreign(kind, **settings)
    layers = lora.attach(hf, LoraShape(2, 4.0, ("all-linear",)))
    with pytest.raises(MassError) as caught:
        blocks.split(hf, layers)
    message = str(caught.value)
    assert type(hf).__name__ in message
    assert "reverse" in message and "finite_difference" in message


def test_blocks_that_answer_otherwise_than_a_decoders_are_refused() -> None:
    world = worlds.make()
    for block in world.parts.blocks:
        block.register_forward_hook(lambda module, args, out: {"hidden": out})
    with pytest.raises(MassError, match="driven one by one.*reverse"):
        blocks.split(world.hf, world.layers)


def test_blocks_that_do_not_give_the_models_own_states_are_refused() -> None:
    """Something between the blocks and the end that the split does not know of."""
    world = worlds.make()

    def stretch(module: nn.Module, args: object, out: Any) -> Any:
        out.last_hidden_state = 1.1 * out.last_hidden_state
        return out

    world.hf.model.register_forward_hook(stretch)
    with pytest.raises(MassError, match="do not give its own hidden states.*reverse"):
        blocks.split(world.hf, world.layers)


def test_engines_that_need_no_split_work_without_one() -> None:
    """Reverse and finite differences on a model whose blocks are hidden from the split."""
    world = worlds.make()
    world.hf.model.final_layernorm = nn.Identity()  # two norms: no split
    with pytest.raises(MassError, match="no list of 2 decoder blocks"):
        blocks.split(world.hf, world.layers)
    rule, lr = worlds.RULES["sgd"]
    want = references.truth("sgd", 2)
    trajectory = worlds.loop(world, rule, worlds.rates(world, lr), 2)
    lam = worlds.outer_grad(world, trajectory.adapter)
    for engine in ("reverse", "central", "one-sided"):
        got = metagrad.sweep(worlds.products(world, engine, world.weight_TN), trajectory, lam)
        assert worlds.error(got.weight_TN, want.weight_TN) < 1e-5
