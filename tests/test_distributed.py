"""The DeepSpeed engine over the outer parameters against torch.optim, at every ZeRO stage, on one and on two ranks."""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks
from safetensors.torch import load_file, save_file
from torch import Tensor

from mass import distributed
from mass.engine import Outer, merge, settings
from mass.errors import MassError
from mass.model import find_device

STAGES = (0, 1, 2, 3)
LR = {"policy": 1e-2, "scorer": 1e-1, "inner_lr": 3e-2}
CLIP, WARMUP = 1.0, 2
OFFLOAD = False


def groups(rates: bool = True) -> dict[str, dict[str, Tensor]]:
    """Names with dots, sizes that two ranks do not divide."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "policy": {"model.layers.0.q_proj.A": random(3, 5), "model.layers.0.q_proj.B": random(7, 3)},
        "scorer": {"net.0.weight": random(5), "net.0.bias": random(1)},
        "inner_lr": {"all": random(1)} if rates else {},
    }


def flat(tree: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{group}/{key}": x for group, own in tree.items() for key, x in own.items()}


def gradients(step: int, rank: int, tree: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """Another for each rank and step; long enough to be clipped at step 0, and short enough not to be at step 1."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    size = 0.02 if step == 1 else 3.0
    return {key: size * torch.randn(x.shape, generator=generator) for key, x in flat(tree).items()}


def mean_gradient(step: int, world: int, tree: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    many = [gradients(step, rank, tree) for rank in range(world)]
    return {key: torch.stack([own[key] for own in many]).mean(0) for key in many[0]}


def reference(
    tree: dict[str, dict[str, Tensor]], world: int, steps: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Values and first moments after AdamW on the mean gradient, clipped as a whole, with linear warm-up."""
    leaf = {key: x.clone().requires_grad_() for key, x in flat(tree).items()}
    params = [
        {"params": [x for key, x in leaf.items() if key.startswith(group)], "lr": LR[group]} for group in tree
    ]
    optimizer = torch.optim.AdamW([p for p in params if p["params"]], weight_decay=0.0)
    full = [group["lr"] for group in optimizer.param_groups]
    for step in range(steps):
        for key, g in mean_gradient(step, world, tree).items():
            leaf[key].grad = g
        size = torch.nn.utils.clip_grad_norm_(list(leaf.values()), CLIP)
        assert (size > CLIP) == (step != 1)
        for group, lr in zip(optimizer.param_groups, full, strict=True):
            group["lr"] = lr * min(1.0, (step + 1) / WARMUP)
        optimizer.step()
    return (
        {key: x.detach() for key, x in leaf.items()},
        {key: optimizer.state[x]["exp_avg"] for key, x in leaf.items()},
    )


def make(stage: int, world: distributed.World, tree: dict[str, dict[str, Tensor]] | None = None) -> Outer:
    config = settings(stage, CLIP, offload=OFFLOAD)
    return Outer(tree or groups(), LR, config, warmup=WARMUP, device=world.device)


def values(outer: Outer) -> dict[str, Tensor]:
    return flat({group: outer.values(group) for group in LR})


def steps_as_torch_optim(stage: int, world: distributed.World, rates: bool) -> Outer:
    tree = groups(rates)
    outer = make(stage, world, tree)
    for key, x in values(outer).items():
        assert torch.equal(x, flat(tree)[key]), "what goes in is there"
    state = outer.state()
    assert state["adam_steps"] == 0 and not state["m:scorer/net.0.weight"].any()
    for step in range(3):
        assert outer.learning_rate("scorer") == pytest.approx(LR["scorer"] * min(1.0, (step + 1) / WARMUP))
        applied, norms = outer.step(gradients(step, world.rank, tree))
        assert applied
        mean = mean_gradient(step, world.size, tree)
        for group in LR:
            own = [x.flatten() for key, x in mean.items() if key.startswith(f"{group}/")]
            assert norms[group] == pytest.approx(torch.cat([*own, torch.zeros(1)]).norm().item(), rel=1e-5)
    want, moment = reference(tree, world.size, 3)
    got, state = values(outer), outer.state()
    assert got.keys() == want.keys()
    for key in want:
        torch.testing.assert_close(got[key], want[key], rtol=0, atol=1e-6)
        torch.testing.assert_close(state[f"m:{key}"].view_as(moment[key]), moment[key], rtol=1e-5, atol=1e-7)
    assert state["adam_steps"] == state["outer_steps"] == 3
    return outer


def skips_what_is_not_finite(outer: Outer, world: distributed.World, bad: float) -> None:
    """One rank's one element is enough, and nothing changes on any rank."""
    before, state = values(outer), outer.state()
    spoiled = gradients(5, world.rank, groups())
    if world.rank == world.size - 1:
        spoiled["scorer/net.0.weight"][2] = bad
    applied, norms = outer.step(spoiled)
    assert not applied and not math.isfinite(norms["scorer"]) and math.isfinite(norms["policy"])
    after, late = values(outer), outer.state()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert late["outer_steps"] == state["outer_steps"] + 1
    assert all(torch.equal(state[key], late[key]) for key in state if key != "outer_steps")
    assert outer.step(gradients(6, world.rank, groups()))[0]
    assert not torch.equal(
        values(outer)["policy/model.layers.0.q_proj.A"], before["policy/model.layers.0.q_proj.A"]
    )


def goes_on_from_its_state(outer: Outer, stage: int, world: distributed.World) -> None:
    """Bitwise, in a fresh engine whose own start is another."""
    other = {group: {key: x + 1 for key, x in own.items()} for group, own in groups().items()}
    again = make(stage, world, other)
    again.load({group: outer.values(group) for group in LR}, outer.state())
    for step in (7, 8):
        for engine in (outer, again):
            assert engine.step(gradients(step, world.rank, groups()))[0]
        one, two = values(outer) | outer.state(), values(again) | again.state()
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one), [
            k for k in one if not torch.equal(one[k], two[k])
        ]


def collectives(world: distributed.World) -> None:
    assert distributed.reduce_sum([1.0, 10.0 * world.rank]) == [world.size, 10.0 * sum(range(world.size))]
    # fp64: a count of tokens may be large
    assert distributed.reduce_sum([2.0**40 + 1]) == [world.size * (2.0**40 + 1)]
    own = torch.tensor([world.rank, 7], dtype=torch.uint8)
    assert [x.tolist() for x in distributed.gather_bytes(own)] == [[r, 7] for r in range(world.size)]
    assert distributed.any_rank(world.rank == world.size - 1) and not distributed.any_rank(False)
    many = {"a": torch.full((2, 3), 1.0 + world.rank), "b": torch.tensor(2.0), "c": torch.zeros(0)}
    mean = distributed.mean_over_ranks(many)
    assert mean["a"].tolist() == [[1 + (world.size - 1) / 2] * 3] * 2
    assert mean["b"] == 2 and mean["c"].shape == (0,)
    assert many["a"][0, 0] == 1.0 + world.rank, "its input stays"
    one = {"a": torch.tensor([1.0, float("inf") if world.rank == 0 else 1.0])}
    assert distributed.mean_over_ranks(one)["a"].isfinite().tolist() == [True, False]


def on_each_rank(folder: str) -> None:
    """Runs in the forked ranks."""
    world = distributed.start("cpu")
    assert (world.rank, world.size) == (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    assert world.main == (world.rank == 0) and world.device.type == "cpu"
    collectives(world)
    for stage in STAGES:
        outer = steps_as_torch_optim(stage, world, rates=True)
        saved = {f"value:{key}": x.contiguous() for key, x in values(outer).items()} | outer.state()
        if world.main:
            save_file(saved, Path(folder) / f"{world.size}-{stage}.safetensors")
        # 1e25 is finite, and its square is not
        for bad in (float("nan") if stage % 2 else float("inf"), 1e25):
            skips_what_is_not_finite(outer, world, bad)
        goes_on_from_its_state(outer, stage, world)
    steps_as_torch_optim(2, world, rates=False)
    global OFFLOAD
    OFFLOAD = True
    for stage in STAGES[1:]:
        goes_on_from_its_state(steps_as_torch_optim(stage, world, rates=True), stage, world)
    distributed.stop()


def moved(folder: str, worlds: list[int]) -> None:
    """What was saved at any size and stage goes on at this size at any stage; all steps from here are alike."""
    world = distributed.start("cpu")
    for size in worlds:
        results = []
        for stage in STAGES:
            saved = load_file(Path(folder) / f"{size}-{(stage + 1) % 4}.safetensors")
            tree: dict[str, dict[str, Tensor]] = {group: {} for group in LR}
            for key, x in saved.items():
                if key.startswith("value:"):
                    group, _, name = key.removeprefix("value:").partition("/")
                    tree[group][name] = x
            outer = make(stage, world)
            outer.load(tree, {key: x for key, x in saved.items() if not key.startswith("value:")})
            # the same gradient on every rank, so that the number of ranks does not matter
            assert outer.step(gradients(9, 0, groups()))[0]
            results.append(values(outer))
        want = reference_after(size)
        for got in results:
            for key in want:
                torch.testing.assert_close(got[key], want[key], rtol=0, atol=2e-6)
    distributed.stop()


def reference_after(size: int) -> dict[str, Tensor]:
    """Three steps on `size` ranks, then the step of `moved`."""
    tree = groups()
    leaf = {key: x.clone().requires_grad_() for key, x in flat(tree).items()}
    params: list[dict[str, Any]] = [
        {"params": [x for key, x in leaf.items() if key.startswith(group)], "lr": LR[group]} for group in tree
    ]
    optimizer = torch.optim.AdamW(params, weight_decay=0.0)
    for step in (0, 1, 2, 9):
        many = [gradients(step, rank if step < 9 else 0, tree) for rank in range(size)]
        for key, x in leaf.items():
            x.grad = torch.stack([own[key] for own in many]).mean(0)
        torch.nn.utils.clip_grad_norm_(list(leaf.values()), CLIP)
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] / 2 if step == 0 else group["lr"]
        optimizer.step()
        for group, name in zip(optimizer.param_groups, tree, strict=True):
            group["lr"] = LR[name]
    return {key: x.detach() for key, x in leaf.items()}


@pytest.mark.slow
@pytest.mark.multiprocess
def test_the_engine_equals_torch_optim_skips_and_goes_on_at_every_stage_and_size(
    ranks: Ranks, tmp_path: Path
) -> None:
    for world in (1, 2):
        ranks("test_distributed:on_each_rank", str(tmp_path), world=world).good()
    assert len(list(tmp_path.iterdir())) == 2 * len(STAGES)
    for world in (1, 2):
        ranks("test_distributed:moved", str(tmp_path), [1, 2], world=world).good()


def one_of_another(folder: str) -> None:
    """Rank 1 dies while rank 0 waits for it."""
    world = distributed.start("cpu")
    distributed.reduce_sum([1.0])
    if world.rank == 1:
        os._exit(7)
    distributed.reduce_sum([1.0])
    Path(folder, "went on").touch()


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_rank_whose_peer_has_died_fails_instead_of_waiting(ranks: Ranks, tmp_path: Path) -> None:
    done = ranks("test_distributed:one_of_another", str(tmp_path), world=2, limit=120)
    assert done.codes[1] == 7 and done.codes[0] not in (0, -9), done
    assert not (tmp_path / "went on").exists()


def test_a_user_s_own_deepspeed_file(tmp_path: Path) -> None:
    """All that contradicts the recipe in one message, "auto" and what the recipe does not speak of kept."""
    path = tmp_path / "ds.json"
    zero = {"stage": 3, "overlap_comm": True, "offload_optimizer": {"device": "cpu", "pin_memory": True}}
    theirs = {"gradient_clipping": 5.0, "train_batch_size": 64, "optimizer": {"type": "Adam"}}
    old = {"bfloat16": {"enabled": True}, "torch_autocast": {"enabled": True}}
    path.write_text(json.dumps(theirs | old | {"bf16": {"enabled": True}, "zero_optimization": zero}))
    with pytest.raises(MassError) as caught:
        merge(str(path), settings(1, CLIP), 2)
    for words in (
        "gradient_clipping=5.0, where outer.clip_grad stands for 1.0",
        "train_batch_size=64, where the number of processes stands for 2",
        "zero_optimization.stage=3, where zero.stage stands for 1",
        'offload_optimizer.device="cpu", where zero.offload stands for "none"',
        "optimizer.type=",
        "bf16.enabled=true",
        "bfloat16.enabled=true",
        "torch_autocast.enabled=true",
    ):
        assert words in str(caught.value), words
    zero |= {"stage": "auto"}
    path.write_text(
        json.dumps({"gradient_clipping": "auto", "wall_clock_breakdown": False, "zero_optimization": zero})
    )
    merged = merge(str(path), settings(2, CLIP, offload=True), 2)
    assert merged["gradient_clipping"] == CLIP and merged["wall_clock_breakdown"] is False
    own = merged["zero_optimization"]
    assert (
        own["stage"] == 2 and own["overlap_comm"] is True and own["offload_optimizer"]["pin_memory"] is True
    )
    path.write_text("{")
    with pytest.raises(MassError, match="zero.config=.*JSON"):
        merge(str(path), settings(0, CLIP), 1)


def test_a_gpu_that_is_not_there_is_no_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for find in (distributed.start, find_device):
        with pytest.raises(MassError, match="model.device=cuda: PyTorch .* finds no GPU here"):
            find("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    with pytest.raises(MassError, match="model.device=cuda: the variable DS_ACCELERATOR=cpu keeps to CPUs"):
        distributed.start("cuda")


def test_a_process_by_itself_reduces_without_a_group() -> None:
    assert distributed.reduce_sum([1.5]) == [1.5]
    assert distributed.gather_bytes(torch.tensor([3], dtype=torch.uint8))[0].tolist() == [3]
    assert distributed.any_rank(True) and not distributed.any_rank(False)
    assert distributed.mean_over_ranks({"a": torch.ones(2)})["a"].tolist() == [1.0, 1.0]


def kept_as_it_is(stage: int) -> None:
    """A group whose rate is 0 has a norm that is told, and no share in the one that the others are clipped by."""
    world = distributed.start("cpu")
    tree, results = groups(), []
    for spoil in (1.0, 1e6):
        outer = Outer(tree, LR | {"scorer": 0.0}, settings(stage, CLIP), warmup=WARMUP, device=world.device)
        own = {key: g * spoil if key.startswith("scorer") else g for key, g in gradients(0, 0, tree).items()}
        applied, norms = outer.step(own)
        assert applied and norms["scorer"] > spoil / 10
        results.append(values(outer))
        state = outer.state()
        size = torch.cat([state[f"m:{key}"].flatten() for key in own]).norm()
        # the first moment after one step is a tenth of the clipped gradient
        assert size == pytest.approx(0.1 * CLIP, rel=1e-4)
    for key, x in flat(tree).items():
        assert torch.equal(results[0][key], results[1][key]), key
        assert torch.equal(results[0][key], x) == key.startswith("scorer"), key
    distributed.stop()


@pytest.mark.multiprocess
def test_what_is_kept_as_it_is_does_not_clip_the_rest(ranks: Ranks) -> None:
    for stage in (0, 2):
        ranks("test_distributed:kept_as_it_is", stage).good()


def test_more_processes_than_gpus_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    import deepspeed  # noqa: F401  # before there is a GPU to look at

    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setenv("LOCAL_RANK", "4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(MassError, match=r"this machine has 4 GPU\(s\), and process 5 on it wants one"):
        distributed.start("auto")
