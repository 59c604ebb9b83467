"""Runs that must be equal: on more ranks and at other stages, in parts, and resumed.

They run in forked ranks, on tests/chain.py's model.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks
from runs import STEP_FILES, is_run_folder, log_of, one_sentence, step_of, tensors
from safetensors.torch import load_file

# (loss, inner optimizer) -> the stages on which two ranks are compared with one: each stage below 3, where one differs from
# the next in what DeepSpeed holds alone, and 3, where text is written by a base in parts, with both losses
COMBINATIONS = {
    ("gold", "sgd"): [0, 3],
    ("gold", "adam"): [2],
    ("verifier", "sgd"): [1],
    ("verifier", "adam"): [0, 3],
}
STEPS = 3
# means over tasks, some of them over the tasks that have a value
MEANS = (
    "meta/loss", "meta/loss_before", "meta/gain", "meta/exploded", "inner/loss_first", "inner/loss_last", "inner/clipped",
    "scorer/effective_examples", "scorer/score_std", "credit/spread", "generator/valid", "generator/length",
    "generator/truncated", "generator/no_solution", "generator/empty_tasks", "policy/kl",
)  # fmt: skip
Pairs = list[tuple[Path, Path]]


@pytest.fixture(scope="module")
def both(ranks: Ranks, recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Pairs, Pairs]:
    """(run of 1 rank with 4 tasks, run of 2 ranks with 2 tasks each) for stages 0 to 2, and for stage 3."""
    folder = tmp_path_factory.mktemp("both")

    def words(name: str, loss: str, kind: str, *more: str) -> list[str]:
        adam = ["inner.optimizer=adam", "inner.lr=0.01", "inner.eps_root=1e-4"] if kind == "adam" else []
        through = ["outer.through_init=true"] if kind == "sgd" else ["inner.learned_lr=one"]
        own = [
            f"run.folder={folder}",
            f"run.name={name}",
            f"outer.loss={loss}",
            f"outer.steps={STEPS}",
            f"save.every={STEPS}",
            # hot enough that some tasks have no valid example
            "generate.temperature=1.4",
            *adam,
            *through,
        ]
        return [str(recipe), *own, *more]

    one: list[list[str]] = []
    two: list[list[str]] = []
    three: list[list[str]] = []
    pairs: tuple[Pairs, Pairs] = ([], [])
    for (loss, kind), stages in COMBINATIONS.items():
        one.append(words(f"{loss}-{kind}", loss, kind, "outer.tasks=4"))
        for stage in stages:
            own = three if stage == 3 else two
            # rank 0 plans for all, once
            auto = ["meta_gradient.mode=auto"] if (loss, kind, stage) == ("gold", "sgd", 3) else []
            own.append(words(f"{loss}-{kind}-{stage}", loss, kind, f"zero.stage={stage}", *auto))
            pairs[stage == 3].append((folder / f"{loss}-{kind}", folder / f"{loss}-{kind}-{stage}"))
    ranks("runs:many", one, limit=250).good()
    ranks("runs:many", two, world=2, limit=250).good()
    ranks("runs:many", three, world=2, limit=250).good()
    return pairs


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_ranks_with_t_tasks_are_one_rank_with_2t(both: tuple[Pairs, Pairs]) -> None:
    """At stages 0, 1 and 2."""
    equal_runs(both[0])
    logs = [log_of(one)[:STEPS] for one, _ in both[0]]
    assert min(x["generator/valid"] for log in logs for x in log) > 0.2
    assert min(max(x["scorer/grad_norm"] for x in log) for log in logs) > 1e-3
    assert any(0 < x["generator/empty_tasks"] < 1 for log in logs for x in log), (
        "tasks that have no mean of their own"
    )


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_ranks_with_t_tasks_are_one_rank_with_2t_at_stage_3(both: tuple[Pairs, Pairs]) -> None:
    equal_runs(both[1])


@pytest.mark.slow
@pytest.mark.multiprocess
def test_four_ranks_with_one_task_are_one_rank_with_four(ranks: Ranks, recipe: Path, tmp_path: Path) -> None:
    """At stage 3, where no rank has the whole base."""
    own = [str(recipe), f"run.folder={tmp_path}", "outer.steps=2", "save.every=2", "generate.temperature=1.4"]
    ranks("mass.console:train", [*own, "run.name=one", "outer.tasks=4"]).good()
    ranks("mass.console:train", [*own, "run.name=four", "outer.tasks=1", "zero.stage=3"], world=4).good()
    equal_runs([(tmp_path / "one", tmp_path / "four")], steps=2)


def mean_gap(a: dict[str, Any], b: dict[str, Any], tag: str) -> float:
    x, y = a[tag], b[tag]
    return 0.0 if x is y is None else abs(x - y) / max(abs(x), abs(y), 1e-3)


def equal_runs(pairs: Pairs, steps: int = STEPS) -> None:
    """Parameters, optimizer state (whose scale Adam's steps would hide) and what is logged, after the last step."""
    for one, two in pairs:
        a, b = tensors(step_of(one, steps)), tensors(step_of(two, steps))
        assert a.keys() == b.keys()
        for key in a:
            gap = (a[key].double() - b[key].double()).abs().max().item()
            moment = key.startswith(("optimizer m:", "optimizer v:"))
            limit = 2e-4 * a[key].abs().max().item() if moment else 1e-6
            assert gap <= limit, (two.name, key, gap, limit)
        for kind, rate in (("policy", 3e-5), ("scorer", 3e-4)):
            moved = max(
                x.abs().max()
                for key, x in a.items()
                if key.startswith(kind) and ("lora_B" in key or "4.w" in key)
            )
            assert moved > rate, "more than a step at this rate"
        assert (step_of(one, steps) / "policy/adapter_config.json").read_text() == (
            step_of(two, steps) / "policy/adapter_config.json"
        ).read_text()
        for x, y in zip(log_of(one)[:steps], log_of(two)[:steps], strict=True):
            assert x.keys() == y.keys() - {"time/gather"}
            for tag in MEANS:
                assert mean_gap(x, y, tag) < 1e-4, (two.name, tag, x[tag], y[tag])
            assert x["tokens/generated"] == y["tokens/generated"]


@pytest.mark.slow
@pytest.mark.multiprocess
def test_the_logged_gradient_norm_does_not_depend_on_the_number_of_ranks(both: tuple[Pairs, Pairs]) -> None:
    for one, two in both[0]:
        for x, y in zip(log_of(one)[:STEPS], log_of(two)[:STEPS], strict=True):
            assert mean_gap(x, y, "policy/grad_norm") < 1e-3 and mean_gap(x, y, "scorer/grad_norm") < 1e-3


def recording_shards(words: list[str], wanted: dict[str, Any], offloads: bool) -> None:
    """A run that sees what the recipe's zero keys come to."""
    from mass import distributed, engine, prepare, train
    from mass.recipe import load
    from mass.shards import Shards

    seen: list[dict[str, Any]] = []
    configs: list[dict[str, Any]] = []
    settings = engine.settings

    class Recorded(Shards):
        def __init__(self, device: torch.device, **how: Any) -> None:
            seen.append(how)
            super().__init__(device, **how)

    def recorded(*arguments: Any) -> dict[str, Any]:
        configs.append(settings(*arguments))
        return configs[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "Shards", Recorded)
        patch.setattr(engine, "settings", recorded)
        train.train(load(words[0], words[1:]))
    distributed.stop()
    assert seen == [wanted] and configs
    assert all(("offload_optimizer" in config["zero_optimization"]) == offloads for config in configs)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_what_lies_in_main_memory_changes_no_number(ranks: Ranks, recipe: Path, tmp_path: Path) -> None:
    """On one rank, which keeps its base whole unless that is to lie in main memory."""
    own = [str(recipe), f"run.folder={tmp_path}", "outer.steps=2", "zero.stage=3"]
    all_of_it = {"hold": False, "prefetch": False, "in_main_memory": True, "patience": 600.0}
    ranks("runs:many", [[*own, "run.name=here"]]).good()
    more = [*own, "run.name=there", "zero.offload=all", "zero.prefetch=false"]
    ranks("test_train_equal:recording_shards", more, all_of_it, True).good()
    here, there = (tensors(step_of(tmp_path / name, 2)) for name in ("here", "there"))
    assert here.keys() == there.keys()
    for key, x in here.items():
        assert torch.equal(x, there[key]), key
    before, after = (log_of(tmp_path / name)[:2] for name in ("here", "there"))
    assert [timeless(x) for x in before] == [timeless(x) for x in after]
    assert after[0].keys() - before[0].keys() == {"time/gather"}


def timeless(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: x for key, x in entry.items() if not key.startswith(("time", "memory/"))}


@pytest.mark.slow
@pytest.mark.multiprocess
def test_n_steps_are_half_resume_half_bitwise(ranks: Ranks, recipe: Path, tmp_path: Path) -> None:
    """Policy, scorer, optimizer, random states, log and samples; then the same save at another size and stage."""
    own = [
        str(recipe),
        f"run.folder={tmp_path}",
        "outer.loss=verifier",
        "inner.learned_lr=layer",
        "evaluate.every=1",
    ]
    own += ["evaluate.problems=3", "outer.steps=2"]
    for world, stage in ((1, 0), (2, 2)):
        more = [*own, f"zero.stage={stage}"]
        whole, parts = tmp_path / f"whole{world}", tmp_path / f"parts{world}"
        first = ranks(
            "runs:many",
            [[*more, f"run.name={whole.name}"], [*more, f"run.name={parts.name}", "outer.steps=1"]],
            world=world,
        )
        first.good()
        second = ranks(
            "mass.console:train", [*more, f"run.name={parts.name}", "run.resume=auto"], world=world
        ).good()
        assert (
            "continuing" in second.out[0]
            and "WARNING: changed since this run began: outer.steps: 1 -> 2" in second.out[0]
        )
        is_run_folder(parts, [1, 2])
        for step in (1, 2):
            for name in STEP_FILES - {"meta.json"}:
                assert (step_of(whole, step) / name).read_bytes() == (
                    step_of(parts, step) / name
                ).read_bytes(), name
        assert [timeless(x) for x in log_of(whole)] == [timeless(x) for x in log_of(parts)]
        assert "heldout/mass" in log_of(parts)[2]
        texts = [(run / "samples.jsonl").read_text().splitlines() for run in (whole, parts)]
        assert [timeless(json.loads(x)) for x in texts[0]] == [timeless(json.loads(x)) for x in texts[1]]
        learned = load_file(step_of(parts, 2) / "optimizer.safetensors")
        assert {key for key in learned if key.startswith("value:inner_lr/")} == {
            "value:inner_lr/block0",
            "value:inner_lr/block1",
        }
        assert learned["value:inner_lr/block0"] != math.log(0.3)

    # two ranks at stage 2 stopped at step 1; one rank at stage 0 goes on in a run of its own
    start = step_of(tmp_path / "parts2", 1)
    ranks("mass.console:train", [*own, "run.name=moved", "outer.tasks=4", f"run.resume={start}"]).good()
    a, b = tensors(step_of(tmp_path / "whole2", 2)), tensors(step_of(tmp_path / "moved", 2))
    for key in a:
        gap = (a[key].double() - b[key].double()).abs().max().item()
        assert gap <= 1e-6 + 1e-3 * a[key].abs().max() * key.startswith(("optimizer m:", "optimizer v:")), (
            key,
            gap,
        )


@pytest.mark.slow
@pytest.mark.multiprocess
def test_resume_at_other_sizes_and_stages(ranks: Ranks, recipe: Path, tmp_path: Path) -> None:
    """Two ranks at stage 1, one at stage 3, two at stage 0: the loss curve and the parameters of one rank throughout.
    That one works its tasks three at a time, so an outer step in parts (3 and 1 tasks) is compared as well.
    """
    own = [str(recipe), f"run.folder={tmp_path}", "save.every=1", "outer.loss=verifier"]
    whole = [*own, "run.name=whole", "outer.tasks=4", "outer.steps=3"]
    ranks("runs:many", [whole, [*whole, "run.name=accumulated", "outer.tasks_at_once=3"]], limit=250).good()
    moved = [*own, "run.name=moved", "run.resume=auto"]
    for world, stage, steps in ((2, 1, 1), (1, 3, 2), (2, 0, 3)):
        size = [f"outer.tasks={4 // world}", f"zero.stage={stage}", f"outer.steps={steps}"]
        ranks("mass.console:train", [*moved, *size], world=world).good()
    a, one = tensors(step_of(tmp_path / "whole", 3)), log_of(tmp_path / "whole")
    assert all(x["reward/solve_after"] > 0 and x["tokens/generated"] > 0 for x in one[:3])
    for name in ("moved", "accumulated"):
        b, other = tensors(step_of(tmp_path / name, 3)), log_of(tmp_path / name)
        for key in a:
            moment = key.startswith(("optimizer m:", "optimizer v:"))
            gap = (a[key].double() - b[key].double()).abs().max().item()
            assert gap <= 1e-6 + 1e-3 * a[key].abs().max() * moment, (name, key, gap)
        for x, y in zip(one[:3], other[:3], strict=True):
            for tag in (
                "meta/loss",
                "meta/gain",
                "generator/valid",
                "reward/solve_after",
                "scorer/grad_norm",
            ):
                assert mean_gap(x, y, tag) < 1e-3, (name, tag, x[tag], y[tag])
            assert x["tokens/generated"] == y["tokens/generated"]


@pytest.mark.slow
@pytest.mark.multiprocess
def test_resuming_beyond_the_last_step_ends_without_a_traceback(
    ranks: Ranks, recipe: Path, tmp_path: Path
) -> None:
    own = [str(recipe), f"run.folder={tmp_path}"]
    ranks("mass.console:train", [*own, "outer.steps=2"]).good()
    kept = [tmp_path / "run" / name for name in ("recipe.yaml", "latest", "log.jsonl", "samples.jsonl")]
    before = [path.read_bytes() for path in kept]
    done = ranks("mass.console:train", [*own, "outer.steps=1", "run.resume=auto"])
    one_sentence(done, "outer.steps=1", f"{tmp_path}/run/step_000002 is at step 2", "Raise outer.steps")
    assert done.codes == [2]
    assert [path.read_bytes() for path in kept] == before
    is_run_folder(tmp_path / "run", [1, 2])


def evaluated(words: list[str], wanted: list[int]) -> None:
    """A run whose held-out evaluations have to take so many problems at once."""
    from mass import console, train

    whole, seen = train.evaluate, []

    def evaluate(*arguments: Any, batch: int, **more: Any) -> dict[str, float]:
        seen.append(batch)
        return whole(*arguments, batch=batch, **more)

    train.evaluate = evaluate
    console.train(words)
    assert seen == wanted, seen


@pytest.mark.slow
@pytest.mark.multiprocess
def test_an_evaluation_while_training_takes_no_more_at_once_than_training_does(
    ranks: Ranks, recipe: Path, tmp_path: Path
) -> None:
    own = [str(recipe), f"run.folder={tmp_path}", "outer.steps=1", "evaluate.every=1", "evaluate.problems=4"]
    less = [*own, "outer.tasks=4", "outer.tasks_at_once=3", "run.name=less"]
    ranks("test_train_equal:evaluated", less, [3, 3]).good()
