"""LoRA slots with a task axis, and PEFT's files in both directions."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import worlds
from safetensors.torch import load_file, save_file
from tiny import tiny
from transformers import PreTrainedModel

from mass import lora
from mass.errors import MassError
from mass.lora import Adapter, Layers, LoraLinear, LoraShape

SHAPE = LoraShape(4, 8.0, ("all-linear",))
TOKENS = torch.arange(3, 3 + 4 * 6).view(4, 6)


def random_policy(layers: Layers, rank: int = 4, seed: int = 0) -> Adapter:
    """An adapter without task axis whose B is not zero."""
    g = torch.Generator().manual_seed(seed)
    return {
        key: x if key.endswith(".A") else 0.1 * torch.randn(x.shape, generator=g)
        for key, x in lora.fresh(layers, rank, g).items()
    }


def model(architecture: str = "llama") -> PreTrainedModel:
    return tiny(architecture, torch.float32, **worlds.SMALL)[0]


def logits(hf: Any, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    with torch.no_grad():
        return hf(input_ids=tokens).logits


def with_slots(architecture: str = "llama", shape: LoraShape = SHAPE) -> tuple[PreTrainedModel, Layers]:
    hf = model(architecture)
    return hf, lora.attach(hf, shape)


# ---- slots


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma3", "mistral", "gpt_neox"])
def test_attach_and_detach_are_bitwise_nothing(architecture: str) -> None:
    hf = model(architecture)
    before, modules = logits(hf), dict(hf.named_modules())
    layers = lora.attach(hf, SHAPE)
    assert torch.equal(logits(hf), before)
    with lora.using(layers, lora.expand(random_policy(layers), 1)):
        assert (logits(hf) - before).abs().max() > 1e-3
    assert torch.equal(logits(hf), before)
    lora.detach(hf, layers)
    assert dict(hf.named_modules()).keys() == modules.keys()
    assert all(module is modules[name] for name, module in hf.named_modules())
    assert torch.equal(logits(hf), before)


def test_a_fresh_adapter_is_the_base_model() -> None:
    hf, layers = with_slots()
    policy = lora.fresh(layers, 4, torch.Generator().manual_seed(0))
    with lora.using(layers, lora.expand(policy, 2)):
        assert torch.equal(logits(hf), logits_without(hf, layers))
    for name, layer in layers.items():
        a, b = policy[f"{name}.A"], policy[f"{name}.B"]
        bound = layer.weight.shape[1] ** -0.5
        assert a.shape == (4, layer.weight.shape[1]) and b.shape == (layer.weight.shape[0], 4)
        assert (b == 0).all() and a.dtype == torch.float32
        assert 0.8 * bound < a.abs().max() <= bound
    again = lora.fresh(layers, 4, torch.Generator().manual_seed(0))
    assert all(torch.equal(policy[key], again[key]) for key in policy)


def logits_without(hf: PreTrainedModel, layers: Layers) -> torch.Tensor:
    with lora.using(layers, None):
        return logits(hf)


def test_targets() -> None:
    hf, layers = with_slots(shape=LoraShape(2, 4.0, ("q_proj", "model.layers.1.mlp.down_proj")))
    assert list(layers) == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.down_proj",
    ]
    lora.detach(hf, layers)
    every = lora.attach(hf, SHAPE)
    assert len(every) == 14 and not any("lm_head" in name for name in every)
    with pytest.raises(MassError, match="already has LoRA slots"):
        lora.attach(hf, SHAPE)
    with pytest.raises(MassError, match=r"lora.targets: no linear layer is named 'queue'.*q_proj"):
        lora.attach(model(), LoraShape(2, 4.0, ("q_proj", "queue")))
    # half a name is no name
    with pytest.raises(MassError, match="no linear layer"):
        lora.attach(model(), LoraShape(2, 4.0, ("proj",)))


def test_nothing_to_adapt_is_said(tmp_path: Path) -> None:
    with pytest.raises(MassError, match=r"lora.targets=\[\] names no layer"):
        lora.attach(model(), LoraShape(2, 4.0, ()))
    made_by_peft(tmp_path, target_modules=r".*q_proj")
    save_file({}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(MassError, match="holds no LoRA matrices"):
        lora.read_peft_shape(tmp_path)


def test_the_last_blocks_alone() -> None:
    hf, layers = with_slots(shape=LoraShape(2, 4.0, ("q_proj", "down_proj"), last=1))
    assert list(layers) == ["model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj"]
    lora.detach(hf, layers)
    assert len(lora.attach(hf, LoraShape(2, 4.0, ("all-linear",), last=2))) == 14
    with pytest.raises(MassError, match="lora.last=1: no layer of lora.targets is in the last 1"):
        lora.attach(model(), LoraShape(2, 4.0, ("model.layers.0.mlp.down_proj",), last=1))
    with pytest.raises(MassError, match="lora.last=3: this model has 2 decoder blocks; take fewer"):
        lora.attach(model(), LoraShape(2, 4.0, ("all-linear",), last=3))


def test_a_model_without_linear_layers_is_refused() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    hf = GPT2LMHeadModel(GPT2Config(vocab_size=31, n_embd=16, n_layer=1, n_head=2, n_positions=16))
    with pytest.raises(MassError, match="lora.targets: no linear layer is named 'all-linear'"):
        lora.attach(hf, SHAPE)


def test_rows_use_the_adapter_of_their_task() -> None:
    """Row b of B uses adapter b // (B / T), so T adapters at once equal each alone on its rows."""
    hf, layers = with_slots()
    policies = [random_policy(layers, seed=seed) for seed in range(2)]
    both = {key: torch.stack([p[key] for p in policies]) for key in policies[0]}
    with lora.using(layers, both):
        got = logits(hf)
    for t, policy in enumerate(policies):
        with lora.using(layers, lora.expand(policy, 1)):
            alone = logits(hf, TOKENS[2 * t : 2 * t + 2])
        assert torch.allclose(got[2 * t : 2 * t + 2], alone, rtol=1e-5, atol=1e-5)
        assert (got[2 - 2 * t : 4 - 2 * t] - logits(hf)[2 - 2 * t : 4 - 2 * t]).abs().max() > 1e-3
    with lora.using(layers, lora.select(both, [1, 0, 0, 1])):
        swapped = logits(hf)
    assert torch.allclose(swapped[3], got[3], rtol=1e-5, atol=1e-5)
    with lora.using(layers, lora.expand(policies[1], 1)):
        assert torch.allclose(swapped[0], logits(hf, TOKENS[:1])[0], rtol=1e-5, atol=1e-5)


def test_rows_that_tasks_do_not_divide_are_refused() -> None:
    hf, layers = with_slots()
    with lora.using(layers, lora.expand(random_policy(layers), 2)), pytest.raises(ValueError, match="3 rows"):
        logits(hf, TOKENS[:3, :5])


def test_rows_that_tasks_do_not_divide_are_refused_whatever_their_length() -> None:
    hf, layers = with_slots()
    with lora.using(layers, lora.expand(random_policy(layers), 2)), pytest.raises(ValueError, match="3 rows"):
        logits(hf, TOKENS[:3])


def test_using_restores_what_was_there_also_after_an_error() -> None:
    hf, layers = with_slots()
    outer, inside = (lora.expand(random_policy(layers, seed=seed), 1) for seed in (0, 1))
    name = next(iter(layers))
    part = {key: x for key, x in inside.items() if key.startswith(name)}
    with lora.using(layers, outer):
        want = logits(hf)
        with pytest.raises(ZeroDivisionError), lora.using(layers, inside):
            assert (logits(hf) - want).abs().max() > 1e-4
            raise ZeroDivisionError
        assert torch.equal(logits(hf), want)
        with lora.using(layers, None):
            assert all(layer.slot is None for layer in layers.values())
        # a part of the layers: the others keep what they have
        with lora.using(layers, part):
            other = list(layers)[1]
            assert layers[name].slot == (part[f"{name}.A"], part[f"{name}.B"])
            assert layers[other].slot == (outer[f"{other}.A"], outer[f"{other}.B"])
        assert torch.equal(logits(hf), want)
        with pytest.raises(KeyError), lora.using(layers, {"nowhere.A": inside[f"{name}.A"]}):
            pass
        # A without its B: nothing stays half set
        half = {key: x for key, x in inside.items() if key != f"{list(layers)[-1]}.B"}
        with pytest.raises(KeyError), lora.using(layers, half):
            pass
        assert torch.equal(logits(hf), want)
    assert all(layer.slot is None for layer in layers.values())


def test_expand_and_select_copy() -> None:
    _, layers = with_slots()
    policy = random_policy(layers)
    many = lora.expand(policy, 3)
    key = next(iter(policy))
    assert many[key].shape == (3, *policy[key].shape)
    many[key][0] += 1
    assert torch.equal(many[key][1], policy[key]) and not torch.equal(many[key][0], policy[key])
    picked = lora.select(many, [2, 0])
    assert torch.equal(picked[key][1], many[key][0]) and torch.equal(picked[key][0], many[key][2])


def test_a_bf16_base_keeps_the_adapter_in_fp32() -> None:
    hf = tiny("llama", torch.bfloat16, **worlds.SMALL)[0]
    layers = lora.attach(hf, SHAPE)
    adapter = {key: x.requires_grad_() for key, x in lora.expand(random_policy(layers), 1).items()}
    with lora.using(layers, adapter):
        out = hf(input_ids=TOKENS).logits
    assert out.dtype == torch.bfloat16
    grads = torch.autograd.grad(out.float().square().sum(), list(adapter.values()))
    assert all(g.dtype == torch.float32 and g.norm() > 0 for g in grads)


def test_weight_and_bias_are_the_bases() -> None:
    _, layers = with_slots("qwen2")
    layer = layers["model.layers.0.self_attn.q_proj"]
    assert isinstance(layer, LoraLinear)
    assert layer.weight is layer.base.weight and layer.bias is layer.base.bias is not None


# ---- PEFT's files


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma3", "mistral", "gpt_neox"])
@pytest.mark.parametrize(
    "shape", [SHAPE, LoraShape(4, 10.5, ("all-linear",)), LoraShape(4, 8.0, ("all-linear",), last=1)]
)
def test_peft_loads_what_we_save(architecture: str, shape: LoraShape, tmp_path: Path) -> None:
    hf, layers = with_slots(architecture, shape)
    policy = random_policy(layers)
    lora.save_peft(tmp_path / "new" / "folder", policy, shape, "some/base")
    with lora.using(layers, lora.expand(policy, 1)):
        ours = logits(hf)
    theirs = peft.PeftModel.from_pretrained(model(architecture), str(tmp_path / "new" / "folder")).eval()
    assert torch.allclose(logits(theirs), ours, rtol=1e-5, atol=1e-5)
    assert (ours - logits(hf)).abs().max() > 1e-2
    # and we load it too, to the same numbers
    own, names = lora.read_peft_shape(tmp_path / "new" / "folder"), set(layers)
    assert (own.rank, own.alpha, set(own.targets)) == (4, shape.alpha, names)
    back = lora.load_peft(tmp_path / "new" / "folder", layers)
    assert list(back) == list(policy) and all(torch.equal(back[key], policy[key]) for key in policy)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "down_proj"]},
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj"], "use_rslora": True, "r": 8},
        {"target_modules": ["q_proj"], "lora_dropout": 0.5},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
        {"target_modules": r".*layers\.1\..*(q_proj|down_proj)"},
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*layers\.0\..*"},
    ],
)
def test_we_load_what_peft_saves(settings: dict[str, Any], tmp_path: Path) -> None:
    folder = made_by_peft(tmp_path, **settings)
    theirs = peft.PeftModel.from_pretrained(model(), str(folder)).eval()
    shape = lora.read_peft_shape(folder)
    hf, layers = with_slots(shape=shape)
    policy = lora.load_peft(folder, layers)
    assert all(x.dtype == torch.float32 for x in policy.values())
    with lora.using(layers, lora.expand(policy, 1)):
        ours = logits(hf)
    assert torch.allclose(ours, logits(theirs), rtol=1e-5, atol=1e-5)
    assert (ours - logits(hf)).abs().max() > 1e-3


def made_by_peft(folder: Path, **settings: Any) -> Path:
    """A folder that PEFT itself wrote, with B not zero."""
    given: dict[str, Any] = {"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM"} | settings
    config = peft.LoraConfig(**given)
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(model(), config)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    wrapped.save_pretrained(str(folder))
    return folder


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"use_dora": True}, "use_dora=True is not supported"),
        ({"bias": "all"}, "bias='all' is not supported"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern="),
        ({"alpha_pattern": {"q_proj": 8}}, "alpha_pattern="),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save="),
        ({"fan_in_fan_out": True}, "fan_in_fan_out="),
        ({"alora_invocation_tokens": [3, 4]}, "alora_invocation_tokens="),
        ({"lora_bias": True}, "lora_bias="),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4' belongs to a base model"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
    ],
)
def test_adapters_that_the_layers_cannot_hold_are_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    made_by_peft(tmp_path, target_modules=["q_proj"])
    assert lora.read_peft_shape(tmp_path).rank == 4
    edit_config(tmp_path, **changes)
    with pytest.raises(MassError) as caught:
        lora.read_peft_shape(tmp_path)
    assert message in str(caught.value) and "adapter_config.json" in str(caught.value)


def test_dora_made_by_peft_is_refused(tmp_path: Path) -> None:
    made_by_peft(tmp_path, target_modules=["q_proj"], use_dora=True)
    with pytest.raises(MassError, match="use_dora"):
        lora.read_peft_shape(tmp_path)


def test_ways_to_begin_that_leave_the_base_alone_are_read(tmp_path: Path) -> None:
    made_by_peft(tmp_path, target_modules=["q_proj"], init_lora_weights="gaussian")
    assert lora.read_peft_shape(tmp_path).rank == 4


def test_missing_and_broken_configs(tmp_path: Path) -> None:
    with pytest.raises(MassError, match="has no adapter_config.json"):
        lora.read_peft_shape(tmp_path)
    for broken in (b'{"peft_type": "LORA",', b"\xff\xfe\x00"):
        (tmp_path / "adapter_config.json").write_bytes(broken)
        with pytest.raises(MassError, match="not JSON"):
            lora.read_peft_shape(tmp_path)


def test_a_pickled_or_missing_adapter_is_not_read(tmp_path: Path) -> None:
    _, layers = with_slots()
    torch.save(random_policy(layers), tmp_path / "adapter_model.bin")
    with pytest.raises(
        MassError, match="no adapter_model.safetensors .pickled adapter_model.bin files are not"
    ):
        lora.load_peft(tmp_path, layers)


def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    _, layers = with_slots()
    lora.save_peft(tmp_path / "a", random_policy(layers), SHAPE, "base")
    # more layers than the adapter knows; fewer; other widths
    for changes, message in (
        ({"num_hidden_layers": 3}, r"it lacks model.layers.2"),
        ({"num_hidden_layers": 1}, r"it has model.layers.1.*which this base lacks"),
        ({"intermediate_size": 64}, r"has shape \(.*\), the base wants \(.*R.*\)"),
    ):
        other = tiny("llama", torch.float32, **(worlds.SMALL | changes))[0]
        with pytest.raises(MassError, match="made for another base model.*" + message):
            lora.load_peft(tmp_path / "a", lora.attach(other, SHAPE))


def test_a_truncated_adapter_is_refused_by_name(tmp_path: Path) -> None:
    _, layers = with_slots()
    lora.save_peft(tmp_path, random_policy(layers), SHAPE, "base")
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(MassError, match="adapter_model.safetensors"):
        lora.load_peft(tmp_path, layers)


def test_an_adapter_whose_ranks_disagree_is_refused(tmp_path: Path) -> None:
    _, layers = with_slots()
    lora.save_peft(tmp_path, random_policy(layers), SHAPE, "base")
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if "lora_A" in key)
    save_file(tensors | {key: tensors[key][:2].contiguous()}, path)
    with pytest.raises(MassError):
        lora.load_peft(tmp_path, layers)


def test_what_is_saved_is_plain_safetensors(tmp_path: Path) -> None:
    hf, layers = with_slots()
    policy = {key: x.requires_grad_() for key, x in random_policy(layers).items()}
    lora.save_peft(tmp_path, policy, SHAPE, "some/base")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert len(tensors) == len(policy)
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in tensors
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "some/base" and config["r"] == 4
