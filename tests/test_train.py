"""Whole runs as commands that a user types, a user's mistakes, and every recipe.

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
from pathlib import Path

import pytest
from ranks import ROOT, Done, Ranks, clean_environment
from runs import is_run_folder, log_of, no_leftovers, one_sentence, step_of

from mass.recipe import load
from mass.schema import Recipe

BIN = Path(sys.executable).parent


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
        # in the background (`nohup make test &`) it would be ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
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
    # as a start of another recipe leaves it that ended before its first step
    shots = tmp_path / "smoke/shots.jsonl"
    shots.parent.mkdir()
    shots.write_text('{"id": "stale", "problem": "1", "solution": "1", "answer": "1", "source": "x"}\n')
    done = type_in(command("mass-train", "recipes/smoke.yaml", f"run.folder={tmp_path}"))
    assert done.returncode == 0, done.stderr[-3000:]
    is_run_folder(tmp_path / "smoke", [1, 2, 3])
    ids = [json.loads(line)["id"] for line in shots.read_text().splitlines()]
    assert len(ids) > 1 and "stale" not in ids
    assert done.stdout.startswith("loading tiny:llama\nplanning memory")
    assert "step 3/3" in done.stdout and f"done: {tmp_path}/smoke" in done.stdout
    assert "Traceback" not in done.stderr
    log = log_of(tmp_path / "smoke")
    assert [entry["step"] for entry in log] == [0, 1, 2, 3]
    # what a resume holds the recipe against, before it keeps the engine
    meta = json.loads((step_of(tmp_path / "smoke", 3) / "meta.json").read_text())
    assert meta["extra"]["asked"] == ["auto", None, True]
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
    # the launcher has no handler of its own (docs/reliability.md)
    assert code == -number, out[-3000:]
    assert "stopping after this step" in out and "run.resume=auto continues" in out, out[-3000:]
    stopped = int((tmp_path / "run/latest").read_text().removeprefix("step_"))
    assert 2 <= stopped < 200
    is_run_folder(tmp_path / "run", [stopped])
    assert "2 processes on cpu" in out
    ranks("mass.console:train", [str(recipe), *own, f"outer.steps={stopped + 1}"], world=2).good()
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
        "meta_gradient.mode=reverse",
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
        return ranks("mass.console:train", [str(file), *own, *overrides], world=world)

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

    long = refused("generate.max_new_tokens=3000")
    one_sentence(long, "problems.train: 30 problems", "context of 2048 tokens", "lower prompt.solve_shots")
    assert not list(runs.rglob("step_*"))

    # a run that never began does not stand in the way of a good one of its name; that one does, of the next
    refused().good()
    is_run_folder(runs / "run", [1])
    before = {path: path.read_bytes() for path in runs.rglob("*") if path.is_file() and path.name != ".lock"}
    one_sentence(refused(), "run.resume=auto", "run.name")
    one_sentence(refused(world=2), "run.resume=auto", "run.name")
    one_sentence(refused("run.resume=auto", "lora.rank=4"), "lora.rank")
    one_sentence(refused("run.resume=auto", "model.path=tiny:llama"), "model.path")
    # what is found only when the model is loaded
    other = lines(tmp_path / "other.jsonl", *(recipe.parent / "problems.jsonl").read_text().splitlines()[:-1])
    text = one_sentence(refused("run.resume=auto", f"problems.train={other}", "inner.lr=9"), "changed since")
    after = {path: path.read_bytes() for path in runs.rglob("*") if path.is_file() and path.name != ".lock"}
    assert before == after
    # one that has begun goes on, whatever its problems are
    refused("run.resume=auto", "generate.max_new_tokens=3000").good()


# ---- every recipe


def holds_out(recipe: Recipe) -> bool:
    return recipe.problems.heldout is not None or recipe.problems.heldout_size > 0


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
        "arithmetic": ["problems.size=120", "problems.heldout_size=8", "lora.last=1"],
        "numbers": ["problems.size=120", "problems.heldout_size=8"],
        "numbers_loop": ["problems.size=120", "problems.heldout_size=8"],
        "smoke": [],
        "families": [],
        "families_loop": ["problems.size=400"],
        "planted": [],
    }
    found = sorted(ROOT.joinpath("recipes").rglob("*.yaml"))
    assert {path.stem for path in found} == local.keys(), "a new recipe needs its local data here"
    # a baseline is a recipe as well: no inner loop, nothing held out
    text = (ROOT / "recipes/smoke.yaml").read_text() + "inner: {steps: 0}\n"
    plain = lines(tmp_path / "plain.yaml", text.replace("name: smoke", "name: plain"))
    found, local["plain"] = [*found, plain], ["problems.heldout_size=0"]
    recipes = {path.stem: load(path, [*local[path.stem], "evaluate.every=0"]) for path in found}
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
        # planning for memory takes ten seconds each; the smoke run above does it
        "meta_gradient.mode=reverse",
    ]
    evaluated = {
        name: ["evaluate.problems=2", "evaluate.every=1"] if holds_out(r) else []
        for name, r in recipes.items()
    }
    ranks(
        "runs:many", [[str(path), *common, *local[path.stem], *evaluated[path.stem]] for path in found]
    ).good()
    for name, recipe in recipes.items():
        is_run_folder(tmp_path / name, [1])
        first, last = log_of(tmp_path / name)
        tags = ["meta/loss_before", "policy/grad_norm"]
        if recipe.inner.steps:
            assert first["generator/valid"] > 0, name
            tags += ["meta/loss", "scorer/grad_norm"]
        assert all(math.isfinite(first[tag]) for tag in tags), name
        wanted = {"heldout/none", "heldout/mass"} if recipe.inner.steps else {"heldout/none"}
        assert last.keys() & {"heldout/none", "heldout/mass"} == (wanted if evaluated[name] else set()), name
    assert log_of(tmp_path / "math")[0]["verifier/failures"] == 0
