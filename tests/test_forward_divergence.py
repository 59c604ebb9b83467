"""The KL divergence of whole next-token distributions from a reference's, and its gradient, against the model's own logits."""

import pytest
import torch
import worlds
from worlds import World, error

import mass.tiny
from mass import blocks, forward, lora, memory


def plain_kl(world: World, adapter: lora.Adapter) -> torch.Tensor:
    """sum_v p(v) log(p(v) / q(v)) at every target token, from the model's own logits, each sequence alone; q: no adapter."""
    out = []
    for t, task in enumerate(world.examples):
        for s in task:
            if s is not None:
                ids = torch.tensor([s.tokens])
                with lora.using(world.layers, lora.select(adapter, [t])):
                    p = world.hf(input_ids=ids, use_cache=False).logits[0, s.prompt - 1 : -1].softmax(-1)
                with torch.no_grad(), lora.using(world.layers, None):
                    q = world.hf(input_ids=ids, use_cache=False).logits[0, s.prompt - 1 : -1].softmax(-1)
                out.append((p * (p / q).log()).sum(1))
    return torch.cat(out)


def with_kl(
    world: World, parts: blocks.Split | None, adapter: lora.Adapter | None = None
) -> tuple[torch.Tensor, torch.Tensor, lora.Adapter]:
    """A loss that is not linear in either: its value, the divergences, and its gradient."""
    seen = []

    def loss(logprob_M: torch.Tensor, kl_M: torch.Tensor) -> torch.Tensor:
        seen.append(kl_M.detach())
        return (kl_M + 0.3 * kl_M.square() + 0.1 * kl_M * logprob_M).sum()

    base_MD = forward.reference_states(world.hf, world.layers, world.packed, None)
    assert base_MD.shape == (world.packed.label_M.numel(), 32) and not base_MD.requires_grad
    value, _, grad = forward.loss_and_grad(
        world.hf,
        world.layers,
        world.packed,
        world.start if adapter is None else adapter,
        loss,
        reference_MD=base_MD,
        parts=parts,
    )
    return value, seen[0], grad


@pytest.mark.parametrize("name", ["llama", "gemma3 untied, soft cap"])
def test_divergence_and_its_gradient_equal_autograd_through_the_models_logits(name: str) -> None:
    world = worlds.make(name)
    leaf = {key: x.clone().requires_grad_() for key, x in world.start.items()}
    kl_M = plain_kl(world, leaf)
    logprob_M = forward.token_logprobs(world.hf, world.layers, world.packed, leaf)
    value = (kl_M + 0.3 * kl_M.square() + 0.1 * kl_M * logprob_M).sum()
    want = dict(zip(leaf, torch.autograd.grad(value, list(leaf.values())), strict=True))
    assert kl_M.min() > 1e-4
    for parts in (None, world.parts):
        got, got_M, grad = with_kl(world, parts)
        assert error(got, value.detach()) < 1e-12 and error(got_M, kl_M.detach()) < 1e-12
        assert error(grad, want) < 1e-12


@pytest.mark.parametrize("dtype,bound", [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
def test_low_precision_bases(dtype: torch.dtype, bound: float) -> None:
    """Divergences are fp32 over a bf16 base; the error is the base's own rounding."""
    world = worlds.make_huggingface("llama", dtype)
    want = with_kl(worlds.in_float64(world), None)
    for parts in (None, world.parts):
        got = with_kl(world, parts)
        assert got[1].dtype == torch.float32
        assert all(error(x, y) < bound for x, y in zip(got, want, strict=True)), [
            error(x, y) for x, y in zip(got, want, strict=True)
        ]


def test_gradient_of_the_divergence_equals_numeric_differences() -> None:
    world = worlds.shared()
    _, _, grad = with_kl(world, None)
    g = torch.Generator().manual_seed(0)
    for _ in range(3):
        along = {key: torch.randn(x.shape, generator=g, dtype=x.dtype) for key, x in world.start.items()}
        up, down = (
            with_kl(world, None, {key: x + sign * 1e-6 * along[key] for key, x in world.start.items()})[0]
            for sign in (1, -1)
        )
        assert error(worlds.dot(grad, along), (up - down) / 2e-6) < 1e-6


def test_divergence_of_two_small_distributions() -> None:
    """A closed form: two outcomes. And gradcheck by the policy's logits; none goes to the reference."""
    p, q = torch.tensor([0.1, 0.5, 0.9]).double(), torch.tensor([0.3, 0.5, 0.2]).double()
    rows, reference = (torch.stack([x, 1 - x], 1).log() + 2.0 for x in (p, q))
    want = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    torch.testing.assert_close(forward.divergence(rows, reference), want)
    g = torch.Generator().manual_seed(1)
    at, other = (3 * torch.randn(4, 7, generator=g, dtype=torch.float64) for _ in range(2))
    assert torch.autograd.gradcheck(lambda x: forward.divergence(x, other), at.requires_grad_())
    # what no float of a vocabulary may break: an outcome that the policy has given up, or the reference
    far = torch.tensor([[0.0, -300.0, 1.0]], requires_grad=True)
    for a, b in ((far, torch.zeros(1, 3)), (torch.zeros(1, 3, requires_grad=True), far.detach())):
        kl = forward.divergence(a, b)
        assert kl.isfinite() and torch.autograd.grad(kl.sum(), a)[0].isfinite().all()


def test_the_sampled_estimate_agrees_with_the_divergence_on_average() -> None:
    """Schulman's k3, exp(d) - d - 1 with d = log q - log p of a token drawn from p."""
    g = torch.Generator().manual_seed(2)
    p, q = (torch.randn(1, 30, generator=g, dtype=torch.float64).log_softmax(1) for _ in range(2))
    drawn = torch.multinomial(p[0].exp(), 200_000, replacement=True, generator=g)
    gap = (q - p)[0, drawn]
    k3 = gap.exp() - gap - 1
    assert abs(k3.mean() - forward.divergence(p, q)) < 4 * k3.std() / 200_000**0.5


def test_divergence_and_its_gradient_are_zero_where_the_policy_is_the_reference() -> None:
    world = worlds.shared()
    base = {key: x * (0 if key.endswith("B") else 1) for key, x in world.start.items()}
    for parts in (None, world.parts):
        _, kl_M, grad = with_kl(world, parts, base)
        assert kl_M.abs().max() < 1e-14 and max(x.abs().max() for x in grad.values()) < 1e-14
    # another adapter as the reference
    own_MD = forward.reference_states(world.hf, world.layers, world.packed, world.start)
    with torch.no_grad():
        values = forward.token_values(
            world.hf, world.layers, world.packed, world.start, reference_MD=own_MD, entropy=True
        )
    assert values[1] is not None and values[2] is not None
    assert values[1].abs().max() < 1e-14 and values[2].min() > 0.1
    want = forward.token_logprobs(world.hf, world.layers, world.packed, world.start)
    assert torch.equal(values[0], want)


def test_a_chunk_holds_few_tensors_as_large_as_its_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """And two chunks no more than one: of both models. The vocabulary is far the largest size here."""
    hf = mass.tiny.tiny("llama", vocab_size=20_000, hidden_size=16, intermediate_size=16)[0].eval()
    hidden_MD, reference_MD = torch.randn(2, 32, 16)
    label_M = torch.arange(32)
    for p in hf.parameters():
        p.requires_grad_(False)
    peak = {}
    for size in (16, 32):
        monkeypatch.setitem(forward.CHUNK_ROWS, "cpu", size)
        for other in (None, reference_MD):
            with memory.Live() as live:
                forward.head_rows(hf, hidden_MD, label_M, other)
            peak[size, other is not None] = live.peak / (size * 20_000 * 4)
    assert peak[16, True] == pytest.approx(peak[32, True], rel=0.05)
    assert peak[16, True] < 5.5 and peak[16, False] < 4.5, peak


def test_divergence_in_chunks_is_the_whole_one_s(monkeypatch: pytest.MonkeyPatch) -> None:
    world = worlds.shared()
    M = world.packed.label_M.numel()
    assert forward.chunk_rows(world.hf) >= M
    whole = [with_kl(world, parts) for parts in (None, world.parts)]
    monkeypatch.setitem(forward.CHUNK_ROWS, "cpu", 5)
    rows: list[int] = []
    hook = world.hf.lm_head.register_forward_hook(lambda module, args, out: rows.append(out.shape[0]))
    try:
        parts = [with_kl(world, parts) for parts in (None, world.parts)]
    finally:
        hook.remove()
    # of both models, and of neither for more tokens at a time
    assert max(rows) == 5 and sum(rows) == 2 * 2 * M
    for got, want in zip(parts, whole, strict=True):
        assert all(error(a, b) < 1e-12 for a, b in zip(got, want, strict=True))
