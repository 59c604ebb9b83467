"""The sharded base against the whole one: the same numbers, whatever the other ranks do meanwhile, and a part of it in memory."""

import random
from collections.abc import Callable
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from safetensors.torch import load_file, save_file
from tiny import tiny
from torch import Tensor

import mass.tiny
from mass import blocks, distributed, model, scorer, weights
from mass.batch import Packed, Sequence, pack
from mass.checkpoint import fingerprint
from mass.errors import MassError
from mass.forward import check_model, example_loss, loss_and_grad, reference_states, token_logprobs
from mass.generate import generate
from mass.inner import Step
from mass.lora import LoraShape, attach
from mass.metagrad import Reverse, blockwise, finite_difference
from mass.model import LanguageModel
from mass.shards import ShardedEmbedding, ShardedLinear, Shards, _chosen, gathering_bytes

SHAPE = LoraShape(2, 4.0, ("all-linear",))
T, N = 2, 3


def sharded(architecture: str, dtype: torch.dtype, world: distributed.World, **how: bool) -> LanguageModel:
    hf, tokenizer = tiny(architecture, dtype, num_hidden_layers=3)
    whole = dict(hf.named_parameters())
    shards = Shards(world.device, **how)
    shards.take(hf, lambda name, low, high: whole[name].flatten()[low:high], dtype)
    return LanguageModel(hf, tokenizer, attach(hf, SHAPE), SHAPE, "sharded", shards)


def whole(architecture: str, dtype: torch.dtype) -> LanguageModel:
    hf, tokenizer = tiny(architecture, dtype, num_hidden_layers=3)
    return LanguageModel(hf, tokenizer, attach(hf, SHAPE), SHAPE, "whole")


# ---- everything that is done with a base, as functions of (model, seed) -> tensors


def batch(seed: int) -> tuple[Packed, Tensor]:
    """Ragged examples; for one seed in four there is none at all."""
    draw = random.Random(seed)
    rows: list[list[Sequence | None]] = []
    for _ in range(T):
        own: list[Sequence | None] = []
        for _ in range(N):
            tokens = [draw.randrange(3, 250) for _ in range(draw.randrange(4, 20))]
            own.append(Sequence(tokens, 2) if seed % 4 and draw.random() < 0.8 else None)
        rows.append(own)
    packed = pack(rows, 0)
    return packed, torch.rand(T, N, generator=torch.Generator().manual_seed(seed)).double()


def adapter(lm: LanguageModel, seed: int, scale: float = 0.1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for name, layer in lm.lora.items():
        rows, width = layer.weight.shape
        out[f"{name}.A"] = scale * torch.randn(T, 2, width, generator=generator, dtype=lm.dtype)
        out[f"{name}.B"] = scale * torch.randn(T, rows, 2, generator=generator, dtype=lm.dtype)
    return out


def first_order(lm: LanguageModel, seed: int, split: bool) -> list[Tensor]:
    packed, weight_TN = batch(seed)
    parts = blocks.split(lm.hf, lm.lora) if split else None
    value, logprob_M, grad = loss_and_grad(
        lm.hf,
        lm.lora,
        packed,
        adapter(lm, seed),
        lambda x: (weight_TN * example_loss(packed, x)).sum(),
        parts=parts,
    )
    with torch.no_grad():
        base_M = token_logprobs(lm.hf, lm.lora, packed, None)
    return [value, logprob_M, base_M, *grad.values()]


def divergence(lm: LanguageModel, seed: int, split: bool) -> list[Tensor]:
    packed, weight_TN = batch(seed)
    kept: list[Tensor] = []

    def loss(logprob_M: Tensor, kl_M: Tensor) -> Tensor:
        kept.append(kl_M.detach())
        return (weight_TN * packed.mean_by_example(kl_M - logprob_M)).sum()

    value, logprob_M, grad = loss_and_grad(
        lm.hf,
        lm.lora,
        packed,
        adapter(lm, seed),
        loss,
        reference_MD=reference_states(lm.hf, lm.lora, packed, None),
        parts=blocks.split(lm.hf, lm.lora) if split else None,
    )
    return [value, logprob_M, *kept, *grad.values()]


def second_order(lm: LanguageModel, seed: int, engine: str) -> list[Tensor]:
    packed, weight_TN = batch(seed)
    weight_TN = weight_TN.to(lm.dtype)
    parts = blocks.split(lm.hf, lm.lora)
    products = {
        "reverse": lambda: Reverse(lm.hf, lm.lora, packed, weight_TN),
        "blockwise": lambda: blockwise(lm.hf, parts, packed, weight_TN),
        "kept": lambda: blockwise(lm.hf, parts, packed, weight_TN, recompute=False),
        "difference": lambda: finite_difference(lm.hf, lm.lora, packed, weight_TN),
    }[engine]()
    start, mu = adapter(lm, seed), adapter(lm, seed + 1)
    c_TN, curve = products(Step(start, {}, mu, torch.zeros(T, N)), mu, seed % 3 > 0)
    return [c_TN, *(curve or {}).values()]


def recorded(lm: LanguageModel, seed: int) -> list[Tensor]:
    """The second-order graph is kept from the inner step to the sweep; other units have come and gone in between."""
    packed, weight_TN = batch(seed)
    engine, start = Reverse(lm.hf, lm.lora, packed, weight_TN.to(lm.dtype)), adapter(lm, seed)
    loss_TN, grad = engine.record(start)
    between = features(lm, seed, False)
    c_TN, curve = engine(Step(start, {}, grad, loss_TN), adapter(lm, seed + 1), True)
    assert curve is not None
    return [loss_TN, c_TN, *between, *grad.values(), *curve.values()]


def text(lm: LanguageModel, seed: int) -> list[Tensor]:
    draw = random.Random(seed)
    rows = draw.randrange(5)
    prompts = [[draw.randrange(3, 250) for _ in range(draw.randrange(1, 12))] for _ in range(rows)]
    done = generate(
        lm,
        prompts,
        seeds=list(range(rows)),
        max_new_tokens=draw.randrange(1, 9),
        adapter=adapter(lm, seed, 0.3),
        adapter_index=[i % T for i in range(rows)],
        stop_ids=range(100),
        batch_rows=3,
    )
    return [torch.tensor(x) for r in done for x in (r.tokens, r.logprobs)]


def features(lm: LanguageModel, seed: int, split: bool) -> list[Tensor]:
    parts = blocks.split(lm.hf, lm.lora) if split else None
    return [scorer.features(lm.hf, lm.lora, parts, batch(seed)[0], [0.5, 1.0])]


WORK: dict[str, Callable[[LanguageModel, int], list[Tensor]]] = {
    "plain": lambda lm, seed: first_order(lm, seed, False),
    "by block": lambda lm, seed: first_order(lm, seed, True),
    "divergence": lambda lm, seed: divergence(lm, seed, False),
    "divergence by block": lambda lm, seed: divergence(lm, seed, True),
    "reverse": lambda lm, seed: second_order(lm, seed, "reverse"),
    "recorded": recorded,
    "blockwise": lambda lm, seed: second_order(lm, seed, "blockwise"),
    "kept": lambda lm, seed: second_order(lm, seed, "kept"),
    "difference": lambda lm, seed: second_order(lm, seed, "difference"),
    "text": text,
    "features": lambda lm, seed: features(lm, seed, False),
    "features by block": lambda lm, seed: features(lm, seed, True),
}


def same(got: list[Tensor], want: list[Tensor], where: Any) -> None:
    assert len(got) == len(want), where
    for x, y in zip(got, want, strict=True):
        assert torch.equal(x, y), (where, (x - y).abs().max())


def gathered_bytes(shards: Shards) -> int:
    """Gathered memory that a rank holds now."""
    flats = [pair[1] for pair in (shards._now, shards._arrived) if pair is not None]
    return sum(x.nbytes for x in [*flats, *shards._held.values()]) + (
        shards._move[2].nbytes if shards._move else 0
    )


def in_any_order(world: distributed.World, lm: LanguageModel, reference: LanguageModel, seed: int) -> None:
    """Each rank does other work in another order and amount, and at odd seeds rank 1 does nothing at all."""
    draw = random.Random(seed * world.size + world.rank)
    jobs = [(name, draw.randrange(100)) for name in WORK] * (1 + world.rank % 2)
    draw.shuffle(jobs)
    assert lm.shards is not None
    shards, turn, peak = lm.shards, lm.shards._turn, [0]

    def watched(wait: bool) -> None:
        turn(wait)
        peak.append(gathered_bytes(shards))

    shards._turn = watched  # type: ignore[method-assign]
    idle = seed % 2 and world.rank == 1
    for name, number in [] if idle else jobs:
        same(WORK[name](lm, number), WORK[name](reference, number), (world.rank, name, number))
    lm.settle()
    assert distributed.reduce_sum([1.0]) == [world.size]
    one = max(unit.part.nbytes * shards.ranks for unit in shards.units)
    assert 0 < max(peak) <= shards.working_bytes
    # while one computes the next is on its way, or there is one at a time
    if not shards.prefetch:
        assert shards.working_bytes == one
    elif not idle:
        assert max(peak) > one


def in_step(lm: LanguageModel, reference: LanguageModel, seeds: Seq[int]) -> None:
    for name, work in WORK.items():
        for seed in seeds:
            same(work(lm, seed), work(reference, seed), (lm.dtype, name, seed))
    lm.settle()


def on_each_rank(folder: str, architectures: list[str]) -> None:
    world = distributed.start("cpu")
    for architecture in architectures:
        dtype = torch.float64 if architecture == "llama" else torch.float32
        lm, reference = sharded(architecture, dtype, world), whole(architecture, dtype)
        check_model(lm.hf)
        assert isinstance(lm.hf.get_input_embeddings(), ShardedEmbedding)
        assert isinstance(lm.hf.get_output_embeddings(), ShardedLinear)
        # 4: no examples at all; 6, below: no Hessian product is wanted
        in_step(lm, reference, (4, 5) if architecture == "llama" else (5,))
        if architecture == "llama":
            in_any_order(world, lm, reference, 0)
            in_any_order(world, lm, reference, 1)
            single = sharded(architecture, dtype, world, prefetch=False)
            in_step(single, reference, (6,))
            in_any_order(world, single, reference, 3)
            held = sharded("llama", dtype, world, hold=True)
            assert held.shards is not None
            same(text(held, 5), text(reference, 5), "held")
            with held.shards.held():
                assert gathered_bytes(held.shards) >= sum(p.nbytes for p in held.hf.parameters()) * 0.95
            assert gathered_bytes(held.shards) <= held.shards.working_bytes
            held.settle()
    parts_in_main_memory(world)
    read_in_parts(world, Path(folder))
    large, _ = tiny("llama", torch.float32)
    large.register_parameter("experts", torch.nn.Parameter(torch.zeros(100_000)))
    with pytest.raises(
        MassError, match="zero.stage=3: [0-9]+% of the weights of LlamaForCausalLM lie outside"
    ):
        Shards(world.device).take(large, lambda *_: torch.zeros(0), torch.float32)
    # the rank that converts a GGUF is the first to come, not always rank 0
    own = Path(folder) / f"saved{world.rank}"
    model.save(tiny("llama", torch.float32)[0], own)
    assert (own / "config.json").is_file() and (own / "model.safetensors").is_file()
    distributed.stop()


def parts_in_main_memory(world: distributed.World) -> None:
    """A device that holds no numbers stands for the GPU: the parts are still here, right, and the matrices are not.
    Where the device is main memory itself, nothing changes.
    """
    hf, _ = tiny("llama", torch.float32, num_hidden_layers=3)
    values = dict(hf.named_parameters())
    shards = Shards(torch.device("meta"), in_main_memory=True)
    shards.take(hf, lambda name, low, high: values[name].flatten()[low:high], torch.float32)
    largest = max(unit.part.nbytes for unit in shards.units)
    assert (
        shards.working_bytes
        == gathering_bytes([unit.part.nbytes for unit in shards.units], world.size, True, False) + largest
    )
    for unit in shards.units:
        flat = torch.empty(world.size * len(unit.part))
        torch.distributed.all_gather_into_tensor(flat, unit.part)
        for i, name in enumerate(unit.names):
            assert torch.equal(unit.view(flat, i), values[name])
    assert {p.device.type for name, p in hf.named_parameters() if name in shards._place} == {"meta"}
    lm = sharded("llama", torch.float64, world, in_main_memory=True)
    assert lm.shards is not None and lm.shards.home == lm.device
    in_any_order(world, lm, whole("llama", torch.float64), 2)


def read_in_parts(world: distributed.World, folder: Path) -> None:
    """A folder, sharded as it is read: the values, buffers, logits and fingerprint of the whole one, from 1/W of the bytes."""
    seen: list[int] = []
    part = weights.Weights.part

    def counted(*arguments: Any) -> Tensor:
        seen.append(len(part(*arguments)))
        return part(*arguments)

    for architecture, dtype in (("gpt_neox", "fp32"), ("gemma3", "bf16")):
        path = str(folder / architecture)
        seen.clear()
        shards = Shards(world.device)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(weights.Weights, "part", counted)
            hf, _ = model.load(path, dtype=dtype, device="cpu", shards=shards)
        other, _ = model.load(path, dtype=dtype, device="cpu")
        total = sum(shape.numel() for unit in shards.units for shape in unit.shapes)
        assert abs(sum(seen) - total / world.size) < 200 * len(shards.units), "no more than its own part"
        assert not any(p.device.type == "meta" for p in [*hf.parameters(), *hf.buffers()])
        memory = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in hf.parameters()}
        assert sum(memory.values()) < 0.05 * sum(p.nbytes for p in other.parameters())
        wanted = dict(other.named_parameters())
        names = []
        for name, value in shards.named_parameters(hf):
            names.append(name)
            assert torch.equal(value, wanted[name]) and value.dtype == wanted[name].dtype, name
        assert names == list(wanted)
        mine, theirs = dict(hf.named_buffers()), dict(other.named_buffers())
        assert mine.keys() == theirs.keys()
        for name, value in mine.items():
            assert torch.equal(value, theirs[name]) and value.dtype == theirs[name].dtype, name
        tokens = torch.tensor([[1, 2, 3, 4]])
        assert torch.equal(hf(tokens).logits, other(tokens).logits)
        assert fingerprint(shards.named_parameters(hf)) == fingerprint(other.named_parameters())
        shards.settle()


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize(("world", "architectures"), [(2, ["llama", "gemma3"]), (3, ["gpt_neox"])])
def test_a_sharded_base_gives_the_whole_one_s_numbers_whatever_the_ranks_do(
    ranks: Ranks, tmp_path: Path, world: int, architectures: list[str]
) -> None:
    for architecture in ("gpt_neox", "gemma3"):
        hf, tokenizer = mass.tiny.tiny(architecture, vocab_size=270)
        # several files and an index; gpt_neox's names in files are older than its names in the model
        hf.save_pretrained(tmp_path / architecture, max_shard_size="100KB")
        tokenizer.save_pretrained(tmp_path / architecture)
        assert (tmp_path / architecture / "model.safetensors.index.json").exists()
    ranks("test_shards:on_each_rank", str(tmp_path), architectures, world=world).good()


def test_a_wait_for_a_part_has_the_limit_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch gives a new group limits of its own, of 10 and 30 minutes."""
    made: list[Any] = []
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "new_group", lambda **how: made.append(how["timeout"].total_seconds()))
    Shards(torch.device("cpu"), patience=5000)
    assert made == [5060, 5060]


def test_the_rank_that_got_least_goes_first_and_nobody_starves() -> None:
    assert _chosen([[-1, 9], [-1, 0]]) == -1
    assert _chosen([[4, 7], [6, 3], [-1, 0]]) == 6
    assert _chosen([[4, 3], [6, 3]]) == 4


def test_files_that_do_not_fit_the_model_are_named(tmp_path: Path) -> None:
    hf, _ = mass.tiny.tiny("llama")
    hf.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    weights.Weights(str(tmp_path), "M", local_files_only=True).match(hf)
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({key: x for key, x in tensors.items() if key != name}, file, metadata={"format": "pt"})
    with pytest.raises(MassError, match=f"M: the files lack weights of the model, among them {name}"):
        weights.Weights(str(tmp_path), "M", local_files_only=True).match(hf)
    save_file(tensors | {name: tensors[name][:5].clone()}, file, metadata={"format": "pt"})
    with pytest.raises(MassError, match=r"up_proj.weight has shape \(5, 64\) in the files"):
        weights.Weights(str(tmp_path), "M", local_files_only=True).match(hf)
