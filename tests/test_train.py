"""Whole runs: as commands that a user types, and in forked ranks where many runs are compared.

The model is tests/chain.py's: its examples are well-formed and some of its answers right, so every part has a signal.
"""

import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from chain import save_chain, save_problems
from ranks import ROOT, Done, Ranks, clean_environment
from safetensors.torch import load_file

BIN = Path(sys.executable).parent
RECIPE = """\
run: {name: run}
model: {path: CHAIN, dtype: fp32, device: cpu}
prompt: {style: plain, generate_shots: 1, solve_shots: 1, pool: 6}
problems: {train: PROBLEMS, heldout_size: 4}
lora: {rank: 2}
generate: {examples: 3, max_new_tokens: 16, answer_tokens: 8}
scorer: {hidden: 8}
outer: {steps: 3, tasks: 2, rollouts: 6, warmup: 0, lr_scorer: 3e-4}
save: {every: 1, keep: 0}
"""
STEP_FILES = {
    "meta.json",
    "optimizer.safetensors",
    "rng.safetensors",
    "scorer.safetensors",
    "policy/adapter_config.json",
    "policy/adapter_model.safetensors",
}


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks() as started:
        yield started


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chain(tmp_path_factory.mktemp("model") / "chain")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, chain: Path) -> Path:
    """A recipe on the chain model and problems that it can solve by luck."""
    folder = tmp_path_factory.mktemp("recipe")
    problems = save_problems(folder / "problems.jsonl")
    path = folder / "run.yaml"
    path.write_text(RECIPE.replace("CHAIN", str(chain)).replace("PROBLEMS", str(problems)))
    return path


def step_of(run: Path, step: int) -> Path:
    return run / f"step_{step:06d}"


def tensors(step: Path) -> dict[str, torch.Tensor]:
    """All tensors of a step folder but the random states, by file and name."""
    files = {
        "policy": "policy/adapter_model.safetensors",
        "scorer": "scorer.safetensors",
        "optimizer": "optimizer.safetensors",
    }
    return {f"{kind} {key}": x for kind, name in files.items() for key, x in load_file(step / name).items()}


def log_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def no_leftovers(folder: Path) -> None:
    """No half-written file or folder anywhere."""
    assert not [path for path in folder.rglob("*") if ".tmp" in path.name or path.name.endswith(".partial")]


def is_run_folder(run: Path, steps: list[int], tensorboard: bool = True) -> None:
    """Section 5 of the design: everything there, complete, and nothing beside."""
    assert (run / "recipe.yaml").is_file() and (run / "samples.jsonl").is_file()
    assert any((run / "tb").glob("events*")) == tensorboard
    assert (run / "latest").read_text() == f"step_{steps[-1]:06d}\n"
    assert sorted(path.name for path in run.glob("step_*")) == [f"step_{step:06d}" for step in steps]
    for step in steps:
        folder = step_of(run, step)
        files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        assert files == STEP_FILES
        assert json.loads((folder / "meta.json").read_text())["step"] == step
    no_leftovers(run)


# ---- as a user types it


def command(*words: str | Path) -> list[str]:
    """`deepspeed ...`, `python ...` and `mass-train ...` of this environment."""
    return [str(BIN / words[0]), *map(str, words[1:])]


def launcher(*words: str | Path) -> list[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return command("deepspeed", "--num_accelerators", "2", "--master_port", str(port), *words)


def environment() -> dict[str, str]:
    env = clean_environment()
    return env | {"PATH": f"{BIN}{os.pathsep}{env['PATH']}", "PYTHONPATH": str(ROOT)}


def type_in(words: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)


def interrupted(words: list[str], number: signal.Signals, after: str) -> tuple[int, str]:
    """Exit code and output of a command whose whole process group gets a signal once it has printed `after`."""
    process = subprocess.Popen(
        words,
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    limit = threading.Timer(110, os.killpg, (process.pid, signal.SIGKILL))
    limit.start()
    assert process.stdout is not None
    try:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if after in line:
                os.killpg(process.pid, number)
                break
        lines += process.stdout
        return process.wait(30), "".join(lines)
    finally:
        limit.cancel()
        process.stdout.close()


@pytest.mark.slow
@pytest.mark.multiprocess
def test_mass_train_runs_smoke_to_the_end(tmp_path: Path) -> None:
    done = type_in(command("mass-train", "recipes/smoke.yaml", f"run.folder={tmp_path}"))
    assert done.returncode == 0, done.stderr[-3000:]
    is_run_folder(tmp_path / "smoke", [1, 2, 3])
    assert "step 3/3" in done.stdout and f"done: {tmp_path}/smoke" in done.stdout
    assert "Traceback" not in done.stderr
    log = log_of(tmp_path / "smoke")
    assert [entry["step"] for entry in log] == [0, 1, 2, 3]
    wanted = "meta/loss meta/loss_before meta/gain scorer/grad_norm policy/grad_norm generator/valid generator/duplicate"
    wanted += " generator/length policy/kl verifier/failures time/step tokens/generated tokens/trained"
    assert set(wanted.split()) <= log[0].keys()


@pytest.mark.slow
@pytest.mark.multiprocess
def test_python_stops_at_sigint_with_a_save_and_auto_goes_on_to_the_end(recipe: Path, tmp_path: Path) -> None:
    words = command(
        "python", "launch/meta_train.py", recipe, f"run.folder={tmp_path}", "run.resume=auto", "save.every=50"
    )
    words += ["outer.loss=verifier", "problems.verifier=math"]
    code, out = interrupted([*words, "outer.steps=200"], signal.SIGINT, "step 2/")
    assert code == 0, out[-3000:]
    assert "Traceback" not in out and "run.resume=auto" in out
    stopped = int((tmp_path / "run/latest").read_text().removeprefix("step_"))
    assert 2 <= stopped < 200
    is_run_folder(tmp_path / "run", [stopped])
    # a Ctrl-C is not for the verifier's worker: the step that is finished has all its verdicts
    assert all(entry["verifier/failures"] == 0 for entry in log_of(tmp_path / "run"))
    done = type_in([*words, f"outer.steps={stopped + 1}"])
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"continuing {tmp_path}/run/step_{stopped:06d} at step {stopped}" in done.stdout
    is_run_folder(tmp_path / "run", [stopped, stopped + 1])
    assert [entry["step"] for entry in log_of(tmp_path / "run")] == list(range(stopped + 2))


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_deepspeed_stops_at_a_signal_with_a_save_and_auto_goes_on_to_the_end(
    recipe: Path, tmp_path: Path, number: signal.Signals, ranks: Ranks
) -> None:
    own = [f"run.folder={tmp_path}", "run.resume=auto", "save.every=50"]
    code, out = interrupted(
        launcher("launch/meta_train.py", recipe, *own, "outer.steps=200"), number, "step 2/"
    )
    print(f"{number.name}: the launcher exited with {code}")
    assert "stopping after this step" in out and "run.resume=auto continues" in out, out[-3000:]
    stopped = int((tmp_path / "run/latest").read_text().removeprefix("step_"))
    assert 2 <= stopped < 200
    is_run_folder(tmp_path / "run", [stopped])
    again = [str(recipe), *own, f"outer.steps={stopped + 1}"]
    if number == signal.SIGTERM:
        done = type_in(launcher("launch/meta_train.py", *again))
        assert done.returncode == 0, done.stderr[-3000:]
        assert "2 processes on cpu" in done.stdout
    else:
        ranks("mass.train:main", again, world=2).good()
    is_run_folder(tmp_path / "run", [stopped, stopped + 1])
    assert json.loads((step_of(tmp_path / "run", stopped) / "meta.json").read_text())["world_size"] == 2


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_launchers_are_two_nodes_of_one_run(tmp_path: Path) -> None:
    """torchrun on each node with its number, here both on this machine. Each rank is number 0 of its node."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = [
        "--nnodes",
        "2",
        "--nproc_per_node",
        "1",
        "--master_addr",
        "127.0.0.1",
        "--master_port",
        str(port),
    ]
    work = [
        "launch/meta_train.py",
        "recipes/smoke.yaml",
        f"run.folder={tmp_path}",
        "outer.steps=1",
        "zero.stage=3",
    ]
    nodes = [
        subprocess.Popen(
            command("torchrun", *common, "--node_rank", str(node), *work), cwd=ROOT, env=environment(),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for node in (0, 1)
    ]  # fmt: skip
    try:
        said = [node.communicate(timeout=110)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], said
    is_run_folder(tmp_path / "smoke", [1])
    assert "2 processes on cpu" in said[0] and "step 1/1" in said[0] and "step 1/1" not in said[1]
    assert json.loads((step_of(tmp_path / "smoke", 1) / "meta.json").read_text())["world_size"] == 2


# ---- runs compared


def many(runs: list[list[str]]) -> None:
    """Runs one after another in the same ranks."""
    from mass import distributed
    from mass.recipe import load
    from mass.train import train

    for words in runs:
        train(load(words[0], words[1:]))
    distributed.stop()


def mean_gap(a: dict[str, Any], b: dict[str, Any], tag: str) -> float:
    x, y = a[tag], b[tag]
    return 0.0 if x is y is None else abs(x - y) / max(abs(x), abs(y), 1e-3)


# (loss, inner optimizer) -> the stages on which two ranks are compared with one
COMBINATIONS = {
    ("gold", "sgd"): [0, 1, 3],
    ("gold", "adam"): [2, 3],
    ("verifier", "sgd"): [2, 3],
    ("verifier", "adam"): [0, 1, 3],
}
STEPS = 5
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
            own.append(words(f"{loss}-{kind}-{stage}", loss, kind, f"zero.stage={stage}"))
            pairs[stage == 3].append((folder / f"{loss}-{kind}", folder / f"{loss}-{kind}-{stage}"))
    ranks("test_train:many", one, limit=115).good()
    ranks("test_train:many", two, world=2, limit=115).good()
    ranks("test_train:many", three, world=2, limit=115).good()
    return pairs


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_ranks_with_t_tasks_are_one_rank_with_2t(both: tuple[Pairs, Pairs]) -> None:
    """At stages 0, 1 and 2."""
    equal_runs(both[0])
    log = log_of(both[0][0][0])[:STEPS]
    assert min(x["generator/valid"] for x in log) > 0.2 and log[-1]["scorer/grad_norm"] > 1e-3
    assert any(0 < x["generator/empty_tasks"] < 1 for x in log), "tasks that have no mean of their own"


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_ranks_with_t_tasks_are_one_rank_with_2t_at_stage_3(both: tuple[Pairs, Pairs]) -> None:
    equal_runs(both[1])


@pytest.mark.slow
@pytest.mark.multiprocess
def test_the_scorer_s_parameters_move_by_their_gradient_and_not_by_rounding(
    both: tuple[Pairs, Pairs],
) -> None:
    for one, two in both[0]:
        a, b = tensors(step_of(one, STEPS)), tensors(step_of(two, STEPS))
        for key in a:
            if key.startswith("scorer"):
                torch.testing.assert_close(a[key], b[key], rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_four_ranks_with_one_task_are_one_rank_with_four(ranks: Ranks, recipe: Path, tmp_path: Path) -> None:
    """At stages 0 and 3, where no rank has the whole base."""
    own = [str(recipe), f"run.folder={tmp_path}", "outer.steps=3", "save.every=3", "generate.temperature=1.4"]
    ranks("mass.train:main", [*own, "run.name=one", "outer.tasks=4"]).good()
    four = [[*own, f"run.name=four{stage}", "outer.tasks=1", f"zero.stage={stage}"] for stage in (0, 3)]
    ranks("test_train:many", four, world=4).good()
    equal_runs([(tmp_path / "one", tmp_path / f"four{stage}") for stage in (0, 3)], steps=3)


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
    from mass import distributed, engine, train
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
        patch.setattr(train, "Shards", Recorded)
        patch.setattr(engine, "settings", recorded)
        train.train(load(words[0], words[1:]))
    distributed.stop()
    assert seen == [wanted]
    assert all(("offload_optimizer" in config["zero_optimization"]) == offloads for config in configs)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_what_lies_in_main_memory_changes_no_number(ranks: Ranks, recipe: Path, tmp_path: Path) -> None:
    """On one rank, which keeps its base whole unless that is to lie in main memory."""
    own = [str(recipe), f"run.folder={tmp_path}", "outer.steps=2", "zero.stage=3"]
    all_of_it = {"hold": False, "prefetch": False, "in_main_memory": True}
    ranks("test_train:many", [[*own, "run.name=here"]]).good()
    more = [*own, "run.name=there", "zero.offload=all", "zero.prefetch=false"]
    ranks("test_train:recording_shards", more, all_of_it, True).good()
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
        "evaluate.every=2",
    ]
    own += ["evaluate.problems=3", "outer.steps=4"]
    for world, stage in ((1, 0), (2, 2)):
        more = [*own, f"zero.stage={stage}"]
        whole, parts = tmp_path / f"whole{world}", tmp_path / f"parts{world}"
        first = ranks(
            "test_train:many",
            [[*more, f"run.name={whole.name}"], [*more, f"run.name={parts.name}", "outer.steps=2"]],
            world=world,
        )
        first.good()
        second = ranks(
            "mass.train:main", [*more, f"run.name={parts.name}", "run.resume=auto"], world=world
        ).good()
        assert (
            "continuing" in second.out[0]
            and "WARNING: changed since this run began: outer.steps: 2 -> 4" in second.out[0]
        )
        is_run_folder(parts, [1, 2, 3, 4])
        for step in (2, 4):
            for name in STEP_FILES - {"meta.json"}:
                assert (step_of(whole, step) / name).read_bytes() == (
                    step_of(parts, step) / name
                ).read_bytes(), name
        assert [timeless(x) for x in log_of(whole)] == [timeless(x) for x in log_of(parts)]
        assert "heldout/mass" in log_of(parts)[4]
        texts = [(run / "samples.jsonl").read_text().splitlines() for run in (whole, parts)]
        assert [timeless(json.loads(x)) for x in texts[0]] == [timeless(json.loads(x)) for x in texts[1]]
        learned = load_file(step_of(parts, 4) / "optimizer.safetensors")
        assert {key for key in learned if key.startswith("value:inner_lr/")} == {
            "value:inner_lr/block0",
            "value:inner_lr/block1",
        }
        assert learned["value:inner_lr/block0"] != math.log(0.3)

    # two ranks at stage 2 stopped at step 2; one rank at stage 0 goes on in a run of its own
    start = step_of(tmp_path / "parts2", 2)
    ranks("mass.train:main", [*own, "run.name=moved", "outer.tasks=4", f"run.resume={start}"]).good()
    a, b = tensors(step_of(tmp_path / "whole2", 4)), tensors(step_of(tmp_path / "moved", 4))
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
    whole = [*own, "run.name=whole", "outer.tasks=4", "outer.steps=4"]
    ranks(
        "test_train:many", [whole, [*whole, "run.name=accumulated", "outer.tasks_at_once=3"]], limit=115
    ).good()
    moved = [*own, "run.name=moved", "run.resume=auto"]
    for world, stage, steps in ((2, 1, 1), (1, 3, 2), (2, 0, 4)):
        size = [f"outer.tasks={4 // world}", f"zero.stage={stage}", f"outer.steps={steps}"]
        ranks("mass.train:main", [*moved, *size], world=world).good()
    a, one = tensors(step_of(tmp_path / "whole", 4)), log_of(tmp_path / "whole")
    assert all(x["reward/solve_after"] > 0 and x["tokens/generated"] > 0 for x in one[:4])
    for name in ("moved", "accumulated"):
        b, other = tensors(step_of(tmp_path / name, 4)), log_of(tmp_path / name)
        for key in a:
            moment = key.startswith(("optimizer m:", "optimizer v:"))
            gap = (a[key].double() - b[key].double()).abs().max().item()
            assert gap <= 1e-6 + 1e-3 * a[key].abs().max() * moment, (name, key, gap)
        for x, y in zip(one[:4], other[:4], strict=True):
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
    ranks("mass.train:main", [*own, "outer.steps=2"]).good()
    done = ranks("mass.train:main", [*own, "outer.steps=1", "run.resume=auto"])
    is_run_folder(tmp_path / "run", [1, 2])
    assert done.codes[0] in (0, 2) and "Traceback" not in done.err[0]


# ---- signals and gradients that are not finite


def disturbed(argv: list[str], what: str, steps: list[int], rank: int) -> None:
    """`mass-train` in which this happens at these steps: gradients become NaN, or a signal comes, on one rank only."""
    from mass import episode
    from mass.train import main

    whole = episode.run

    def run(setting: Any, tasks: Any, step: int, *arguments: Any, **more: Any) -> Any:
        result = whole(setting, tasks, step, *arguments, **more)
        if step in steps and int(os.environ["RANK"]) == rank:
            if what == "nan":
                result.gradients["scorer/net.0.bias"][1] = float("nan")
            else:
                os.kill(os.getpid(), getattr(signal, what))
        return result

    episode.run = run
    main(argv)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_sigterm_stops_one_process_with_a_save(ranks: Ranks, recipe: Path, tmp_path: Path) -> None:
    own = [str(recipe), f"run.folder={tmp_path}", "save.every=50"]
    done = ranks("test_train:disturbed", own, "SIGTERM", [1], 0).good()
    is_run_folder(tmp_path / "run", [2])
    assert "stopped at step 2 on request; run.resume=auto continues" in done.out[0]
    assert "stopping after this step" in done.err[0]
    ranks("mass.train:main", [*own, "run.resume=auto"]).good()
    is_run_folder(tmp_path / "run", [2, 3])


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_signal_to_one_rank_stops_all_and_rank_0_says_so(
    ranks: Ranks, recipe: Path, tmp_path: Path
) -> None:
    own = [str(recipe), f"run.folder={tmp_path}", "save.every=50"]
    done = ranks("test_train:disturbed", own, "SIGTERM", [0], 1, world=2).good()
    is_run_folder(tmp_path / "run", [1])
    assert "stopped at step 1 on request" in done.out[0]


def one_sentence(done: Done, *words: str, rank: int = 0) -> str:
    """The single clear message of a user's mistake."""
    assert all(code == 2 for code in done.codes), done
    text = done.err[rank].strip()
    assert text and "Traceback" not in text and "Error:" not in text, text
    assert all(word in text for word in words), text
    assert not any(other.strip() for r, other in enumerate(done.err) if r != rank), done.err
    return text


@pytest.mark.slow
@pytest.mark.multiprocess
def test_gradients_that_are_not_finite_are_skipped_counted_and_end_the_run(
    ranks: Ranks, recipe: Path, tmp_path: Path
) -> None:
    """On two ranks, of which the second alone has them."""
    own = [str(recipe), f"run.folder={tmp_path}", "outer.steps=5"]
    done = ranks(
        "test_train:disturbed", [*own, "run.name=some", "outer.max_skipped=2"], "nan", [1, 3], 1, world=2
    ).good()
    assert [entry.get("meta/skipped_steps") for entry in log_of(tmp_path / "some")] == [0, 1, 1, 2, 2, None]
    assert "WARNING: step 2 was skipped: its gradient was not finite (1 skipped so far)" in done.out[0]
    saved = [tensors(step_of(tmp_path / "some", step)) for step in (1, 2, 3)]
    for key in saved[0]:
        if key != "optimizer outer_steps":
            assert torch.equal(saved[0][key], saved[1][key]), key
    assert not torch.equal(saved[1]["scorer net.4.weight"], saved[2]["scorer net.4.weight"])
    assert all(torch.isfinite(x).all() for x in tensors(step_of(tmp_path / "some", 5)).values())

    more = [*own, "run.name=all", "outer.max_skipped=2", "save.every=2"]
    done = ranks("test_train:disturbed", more, "nan", [2, 3, 4], 1, world=2)
    text = one_sentence(done, "2 outer steps in a row", "outer.max_skipped", f"{tmp_path}/all/step_000002")
    assert text.count("\n") == 0
    is_run_folder(tmp_path / "all", [2])
    assert len(log_of(tmp_path / "all")) == 4

    done = ranks("test_train:disturbed", [*own, "run.name=none", "outer.max_skipped=1"], "nan", [0], 0)
    one_sentence(done, "1 outer steps in a row", "nothing was saved")
    assert not list((tmp_path / "none").glob("step_*"))


# ---- a user's mistakes


def lines(path: Path, *rows: str) -> Path:
    path.write_text("\n".join(rows) + "\n")
    return path


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_typing_error_on_the_command_line_ends_with_2(recipe: Path, tmp_path: Path) -> None:
    """As a user types it; the other mistakes are in forks."""
    done = type_in(command("mass-train", recipe, f"run.folder={tmp_path}", "outer.taks=3"))
    assert done.returncode == 2 and done.stdout == ""
    assert (
        "outer.taks: unknown key. Did you mean outer.tasks?" in done.stderr and "Traceback" not in done.stderr
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.multiprocess
def test_bad_input_ends_with_one_clear_sentence_and_no_half_written_file(
    ranks: Ranks, recipe: Path, tmp_path: Path
) -> None:
    good = json.dumps({"problem": "What is 2 - 1?", "answer": "1"})
    runs = tmp_path / "runs"
    own = [f"run.folder={runs}", "outer.steps=1"]

    def refused(*overrides: str, file: Path = recipe, world: int = 1) -> Done:
        return ranks("mass.train:main", [str(file), *own, *overrides], world=world)

    one_sentence(refused("outer.taks=3"), "outer.taks", "outer.tasks")
    not_yaml = lines(tmp_path / "broken.yaml", "run: {name: x", "model: [")
    one_sentence(refused(file=not_yaml), str(not_yaml), "YAML", "line")
    one_sentence(refused(file=tmp_path / "absent.yaml"), str(tmp_path / "absent.yaml"))
    assert not runs.exists(), "nothing is written before the recipe is known to be good"

    missing = tmp_path / "no" / "model"
    one_sentence(refused(f"model.path={missing}"), "model.path", str(missing))
    one_sentence(refused(f"model.path={missing}", world=2), "model.path", str(missing))
    one_sentence(refused("model.path=nobody/nothing"), "model.path=nobody/nothing")
    empty = lines(tmp_path / "empty.jsonl")
    empty.write_text("")
    one_sentence(refused(f"problems.train={empty}"), str(empty))
    one_sentence(refused(f"problems.train={tmp_path}/absent.jsonl"), f"{tmp_path}/absent.jsonl")
    not_json = lines(tmp_path / "text.jsonl", good, good, "{'problem': 3}", good)
    text = one_sentence(refused(f"problems.train={not_json}"), str(not_json), "JSON")
    assert re.search(r"\b(line 3|text\.jsonl:3)\b", text), text
    answerless = lines(tmp_path / "open.jsonl", good, json.dumps({"problem": "What is 5 - 3?"}))
    text = one_sentence(refused(f"problems.train={answerless}"), str(answerless), "answer")
    assert re.search(r"\b(line 2|open\.jsonl:2)\b", text), text
    assert not list(runs.rglob("step_*")) and not list(runs.rglob("*.jsonl"))
    no_leftovers(runs)

    # a run that never began does not stand in the way of a good one of its name; that one does, of the next
    refused().good()
    is_run_folder(runs / "run", [1])
    before = {path: path.read_bytes() for path in runs.rglob("*") if path.is_file() and path.name != ".lock"}
    one_sentence(refused(), "run.resume=auto", "run.name")
    one_sentence(refused(world=2), "run.resume=auto", "run.name")
    one_sentence(refused("run.resume=auto", "lora.rank=4"), "lora.rank")
    one_sentence(refused("run.resume=auto", "model.path=tiny:llama"), "model.path")
    after = {path: path.read_bytes() for path in runs.rglob("*") if path.is_file() and path.name != ".lock"}
    assert before == after


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system that takes one save and a part of the next."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=640k", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("world", [1, 2])
def test_a_full_disk_while_saving_loses_nothing_that_was_saved(
    ranks: Ranks, recipe: Path, small_disk: Path, world: int
) -> None:
    own = [str(recipe), f"run.folder={small_disk}", "log.tensorboard=false"]
    one = ranks("mass.train:main", [*own, "outer.steps=1"], world=world).good()
    assert "done" in one.out[0]
    # room for two thirds of another save
    size = sum(path.stat().st_size for path in step_of(small_disk / "run", 1).rglob("*") if path.is_file())
    stat = os.statvfs(small_disk)
    filler = stat.f_bavail * stat.f_frsize - size * 2 // 3
    assert filler > 0, "the disk is too small for the test"
    (small_disk / "filler").write_bytes(b"x" * filler)
    before = tensors(step_of(small_disk / "run", 1))
    done = ranks("mass.train:main", [*own, "run.resume=auto"], world=world)
    one_sentence(done, "no space left while saving step_000002", "step_000001 and earlier saves are safe")
    is_run_folder(small_disk / "run", [1], tensorboard=False)
    assert tensors(step_of(small_disk / "run", 1)).keys() == before.keys()
    (small_disk / "filler").unlink()
    ranks("mass.train:main", [*own, "run.resume=auto", "outer.steps=2", "save.keep=1"], world=world).good()
    is_run_folder(small_disk / "run", [2], tensorboard=False)


# ---- every recipe


@pytest.mark.slow
@pytest.mark.multiprocess
def test_one_outer_step_of_every_recipe_with_a_tiny_model_and_local_data(
    ranks: Ranks, chain: Path, tmp_path: Path
) -> None:
    worked = [
        {
            "question": f"Tom has {i + 2} pens and loses {i + 1}.",
            "answer": f"{i + 2} - {i + 1} = <<1>>1\n#### 1",
        }
        for i in range(40)
    ]
    boxed = [
        {
            "problem": f"Find ${i + 2} - {i}$.",
            "solution": f"It is $\\boxed{{2}}$, as {i} shows.",
            "answer": "2",
        }
        for i in range(60)
    ]
    gsm8k = lines(tmp_path / "gsm8k.jsonl", *map(json.dumps, worked))
    train = lines(tmp_path / "math.jsonl", *map(json.dumps, boxed[:40]))
    held = lines(tmp_path / "held.jsonl", *map(json.dumps, boxed[40:]))
    local = {
        "gsm8k": [f"problems.train={gsm8k}"],
        "math": [f"problems.train={train}", f"problems.heldout={held}"],
        "demo": ["problems.size=40", "problems.heldout_size=8"],
        "smoke": [],
        "families": [],
        "planted": [],
    }
    found = sorted(ROOT.joinpath("recipes").rglob("*.yaml"))
    assert {path.stem for path in found} == local.keys(), "a new recipe needs its local data here"
    common = [
        f"model.path={chain}",
        "model.device=cpu",
        f"run.folder={tmp_path}",
        "outer.steps=1",
        "outer.tasks=2",
    ]
    common += [
        "generate.max_new_tokens=24",
        "generate.answer_tokens=8",
        "evaluate.problems=4",
        "evaluate.every=1",
    ]
    ranks("test_train:many", [[str(path), *common, *local[path.stem]] for path in found]).good()
    for path in found:
        is_run_folder(tmp_path / path.stem, [1])
        first, last = log_of(tmp_path / path.stem)
        assert first["generator/valid"] > 0, path.stem
        assert all(math.isfinite(first[tag]) for tag in ("meta/loss", "scorer/grad_norm", "policy/grad_norm"))
        if path.stem != "smoke":
            assert {"heldout/none", "heldout/mass"} <= last.keys()
    assert log_of(tmp_path / "math")[0]["verifier/failures"] == 0
