"""Log-probabilities and first-order gradients against the model's own logits, on every architecture of the table."""

from functools import cache

import pytest
import references
import torch
import worlds
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from worlds import ARCHITECTURES, World, error

from mass import blocks, forward, lora
from mass.batch import Sequence, pack
from mass.errors import MassError


@cache
def world_of(name: str) -> World:
    return worlds.make(name)


def plain_logprobs(world: World, examples: list[list[Sequence | None]]) -> torch.Tensor:
    """log p of every target token from the model's own logits, each sequence alone in its batch, under its adapter."""
    out = []
    for t, task in enumerate(examples):
        with torch.no_grad(), lora.using(world.layers, lora.select(world.start, [t])):
            for s in task:
                if s is not None:
                    logits = world.hf(input_ids=torch.tensor([s.tokens]), use_cache=False).logits[0]
                    label = torch.tensor(s.tokens[s.prompt :])
                    picked = logits[s.prompt - 1 : -1].log_softmax(-1).gather(1, label.unsqueeze(1))
                    out.append(picked.squeeze(1))
    return torch.cat(out)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_sequences_are_as_if_each_were_alone(name: str) -> None:
    world = world_of(name)
    assert world.packed.tokens_TPS.shape[1] < 3
    with torch.no_grad():
        got = forward.token_logprobs(world.hf, world.layers, world.packed, world.start)
    want = plain_logprobs(world, world.examples)
    assert got.shape == world.packed.label_M.shape
    assert torch.allclose(got, want, rtol=0, atol=1e-12)
    # the second-order route is the same function
    twice = forward.token_logprobs(world.hf, world.layers, world.packed, world.start, second_order=True)
    assert torch.allclose(twice, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_shared_prefix_is_as_if_each_were_alone(name: str) -> None:
    world = world_of(name)
    full = not any(word in name for word in ("gemma3", "mistral")) or "full" in name
    assert blocks.attends_fully(world.hf) == full
    if not full:
        return
    examples = worlds.alike(world.examples)
    packed = pack(examples, 0, share=True)
    assert packed.mask_B1SS is not None
    with torch.no_grad():
        got = forward.token_logprobs(world.hf, world.layers, packed, world.start)
    assert torch.allclose(got, plain_logprobs(world, examples), rtol=0, atol=1e-12)
    plain, by_block = (
        forward.loss_and_grad(world.hf, world.layers, packed, world.start, lambda x: x.sum(), parts=parts)
        for parts in (None, world.parts)
    )
    assert error(by_block[2], plain[2]) < 1e-12


def test_a_sliding_window_matters_here() -> None:
    """Otherwise the table would not test it."""
    for name in ("gemma3", "mistral"):
        narrow, wide = world_of(name), worlds.make(name, sliding_window=64)
        assert (
            error(
                forward.token_logprobs(narrow.hf, narrow.layers, narrow.packed, None),
                forward.token_logprobs(wide.hf, wide.layers, wide.packed, None),
            )
            > 1e-3
        )


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradient_plain_and_blockwise_equal_autograd_through_the_models_logits(name: str) -> None:
    world = world_of(name)
    leaf = {key: x.clone().requires_grad_() for key, x in world.start.items()}
    want_TN = references.plain_loss(world.hf, world.layers, world.examples, leaf)
    value = (world.weight_TN * want_TN).sum()
    want = dict(zip(leaf, torch.autograd.grad(value, list(leaf.values())), strict=True))
    for parts in (None, world.parts):
        got, logprob_M, grad = forward.loss_and_grad(
            world.hf,
            world.layers,
            world.packed,
            world.start,
            lambda x: (world.weight_TN * forward.example_loss(world.packed, x)).sum(),
            parts=parts,
        )
        assert error(got, value.detach()) < 1e-12
        assert error(forward.example_loss(world.packed, logprob_M), want_TN.detach()) < 1e-12
        assert error(grad, want) < 1e-12
        assert not any(x.requires_grad for x in (got, logprob_M, *grad.values()))


def test_no_gradient_is_made_below_the_lowest_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters on the last block alone: block by block as by autograd, and no other block is run again."""
    own = worlds.make()
    lora.detach(own.hf, own.layers)
    layers = lora.attach(own.hf, lora.LoraShape(2, 4.0, ("all-linear",), last=1))
    parts = blocks.split(own.hf, layers)
    start = {key: x for key, x in own.start.items() if key.rpartition(".")[0] in layers}
    assert 0 < len(start) < len(own.start)
    ran: list[int] = []
    run = forward.run_block
    monkeypatch.setattr(forward, "run_block", lambda *args: ran.append(args[2]) or run(*args))
    plain, by_block = (
        forward.loss_and_grad(own.hf, layers, own.packed, start, lambda x: x.square().mean(), parts=p)
        for p in (None, parts)
    )
    assert error(by_block[0], plain[0]) < 1e-12 and error(by_block[2], plain[2]) < 1e-12
    last = len(parts.blocks) - 1
    assert ran == [*range(last + 1), last]


def test_a_loss_that_is_not_linear_in_the_logprobs() -> None:
    """The policy-gradient losses are made of ratios exp(logprob - old), so the gradient takes the loss as it comes."""
    world = worlds.shared()

    def loss(logprob_M: torch.Tensor) -> torch.Tensor:
        return (logprob_M + 5.0).exp().clamp(max=0.8).sum() + logprob_M.square().mean()

    results = [
        forward.loss_and_grad(world.hf, world.layers, world.packed, world.start, loss, parts=parts)
        for parts in (None, world.parts)
    ]
    along = {key: torch.randn_like(x) for key, x in world.start.items()}
    h = 1e-6
    moved = [
        loss(
            forward.token_logprobs(
                world.hf,
                world.layers,
                world.packed,
                {k: x + sign * h * along[k] for k, x in world.start.items()},
            )
        )
        for sign in (1, -1)
    ]
    for _, _, grad in results:
        assert error(worlds.dot(grad, along), (moved[0] - moved[1]) / (2 * h)) < 1e-6


def test_a_loss_that_ignores_the_logprobs_has_zero_gradient() -> None:
    world = worlds.shared()
    for parts in (None, world.parts):
        _, _, grad = forward.loss_and_grad(
            world.hf, world.layers, world.packed, world.start, lambda x: (0 * x).sum(), parts=parts
        )
        assert all((x == 0).all() for x in grad.values())


@pytest.mark.parametrize("parts", [False, True])
def test_no_target_token_at_all(parts: bool) -> None:
    world = worlds.shared()
    empty = pack([[None] * 3, [None] * 3], 0)
    value, logprob_M, grad = forward.loss_and_grad(
        world.hf,
        world.layers,
        empty,
        world.start,
        lambda x: forward.example_loss(empty, x).sum(),
        parts=world.parts if parts else None,
    )
    assert value == 0 and logprob_M.shape == (0,)
    base_MD = forward.reference_states(world.hf, world.layers, empty, None)
    assert base_MD.shape == (0, 32)
    value, _, again = forward.loss_and_grad(
        world.hf, world.layers, empty, world.start, lambda x, kl: (x + kl).sum(), reference_MD=base_MD
    )
    assert value == 0 and all((x == 0).all() for x in again.values())
    assert grad.keys() == world.start.keys() and all((x == 0).all() for x in grad.values())
    assert forward.token_logprobs(world.hf, world.layers, empty, world.start).shape == (0,)


def test_logits_are_made_for_one_chunk_of_target_tokens_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    world = worlds.shared()
    M = world.packed.label_M.numel()
    rows: list[int] = []
    hook = world.hf.lm_head.register_forward_hook(lambda module, args, out: rows.append(out.shape[0]))

    def run() -> list[lora.Adapter]:
        return [
            forward.loss_and_grad(
                world.hf, world.layers, world.packed, world.start, lambda x: x.sum(), parts=parts
            )[2]
            for parts in (None, world.parts)
        ]

    try:
        whole = run()
        assert rows == [M, M]
        rows.clear()
        monkeypatch.setitem(forward.CHUNK_ROWS, "cpu", 5)
        parts = run()
        assert max(rows) == 5 and sum(rows) == 2 * M
        rows.clear()
        with torch.no_grad():
            forward.token_logprobs(world.hf, world.layers, world.packed, world.start)
        assert max(rows) == 5 and sum(rows) == M
    finally:
        hook.remove()
    assert all(error(a, b) < 1e-12 for a, b in zip(parts, whole, strict=True))


def test_blockwise_runs_under_no_grad_and_leaves_the_adapter_alone() -> None:
    world = worlds.shared()
    with torch.no_grad():
        _, _, grad = forward.loss_and_grad(
            world.hf, world.layers, world.packed, world.start, lambda x: x.sum(), parts=world.parts
        )
    want = forward.loss_and_grad(world.hf, world.layers, world.packed, world.start, lambda x: x.sum())[2]
    assert error(grad, want) < 1e-12
    assert not any(x.requires_grad for x in world.start.values())


@pytest.mark.parametrize("dtype,bound", [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
def test_low_precision_bases(dtype: torch.dtype, bound: float) -> None:
    """Log-probs and adapter gradients are fp32 over a bf16 base; the error is the base's own rounding."""
    world = worlds.make_huggingface("llama", dtype)
    truth = worlds.in_float64(world)
    want = forward.loss_and_grad(truth.hf, truth.layers, truth.packed, truth.start, lambda x: x.mean())
    for parts in (None, world.parts):
        got = forward.loss_and_grad(
            world.hf, world.layers, world.packed, world.start, lambda x: x.mean(), parts=parts
        )
        assert got[1].dtype == torch.float32 and all(x.dtype == torch.float32 for x in got[2].values())
        assert error(got[1], want[1]) < bound
        assert error(got[2], want[2]) < bound


# ---- what must be refused


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_check_model_passes_on_the_table(name: str) -> None:
    forward.check_model(world_of(name).hf)


def foreign(kind: str, **settings: object) -> PreTrainedModel:
    """A tiny model of an architecture outside the table."""
    sizes = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.1,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(0)
    return (
        AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(sizes | settings)))
        .eval()
        .requires_grad_(False)
    )


@pytest.mark.parametrize("kind,settings", [("granite", {"logits_scaling": 8.0}), ("cohere", {})])
def test_check_model_refuses_a_logit_scale_it_does_not_know(kind: str, settings: dict[str, float]) -> None:
    hf = foreign(kind, **settings)
    with pytest.raises(MassError, match="makes its logits in a way") as caught:
        forward.check_model(hf)
    assert type(hf).__name__ in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_check_model_refuses_a_base_that_mixes_packed_sequences(dtype: torch.dtype) -> None:
    """Its logits are what we take them for; what goes wrong is larger than bf16's rounding."""
    hf = foreign("opt", ffn_dim=48, word_embed_proj_dim=32).to(dtype)
    with pytest.raises(MassError, match="OPTForCausalLM mixes sequences"):
        forward.check_model(hf)


def test_check_model_sees_a_mixing_that_is_smaller_than_the_rounding_of_bf16(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A twentieth of a row's mean state in each of its states. In bf16 as much is let pass as rounding between two shapes."""
    hf = foreign("llama").bfloat16()
    forward.check_model(hf)
    norm = hf.model.norm.forward
    monkeypatch.setattr(hf.model.norm, "forward", lambda x: norm(x) + 0.05 * norm(x).mean(1, keepdim=True))
    with pytest.raises(MassError, match="mixes sequences"):
        forward.check_model(hf)


@pytest.mark.parametrize(
    "kind,settings,refused",
    [
        ("phi", {}, None),
        ("gemma2", {"head_dim": 8, "sliding_window": 4}, None),
        ("gptj", {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}, None),
        ("falcon", {}, None),
        # masks that do not read position ids as borders, a recurrent state, a scale of the logits
        ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}, "mixes sequences"),
        ("bloom", {"n_layer": 2, "n_head": 4}, "mixes sequences"),
        ("mamba", {"state_size": 4}, "mixes sequences"),
        ("biogpt", {}, "mixes sequences"),
        ("granite", {"logits_scaling": 8.0}, "makes its logits"),
    ],
)
def test_an_architecture_packs_without_mixing_or_is_refused(
    kind: str, settings: dict[str, int], refused: str | None
) -> None:
    hf = foreign(kind, **settings)
    g = torch.Generator().manual_seed(0)
    one = worlds.sequences(g, 3, 6, 12, 2, vocabulary=97)
    if refused:
        with pytest.raises(MassError, match=refused):
            forward.check_model(hf)
        return
    forward.check_model(hf)
    layers = lora.attach(hf, lora.LoraShape(2, 4.0, ("all-linear",)))
    packed = pack([one], 0)
    assert packed.tokens_TPS.shape[1] < 3
    got = forward.token_logprobs(hf, layers, packed, None)
    alone = torch.cat([forward.token_logprobs(hf, layers, pack([[s]], 0), None) for s in one])
    assert torch.allclose(got, alone, rtol=0, atol=1e-4)
