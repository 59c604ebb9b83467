"""What befalls a run of several ranks: one is killed, stopped, stuck, or fails by itself.

In each case the others end within a minute and name the rank and the place, and the run goes on from its last save.
Damage to saved files is in test_checkpoint.py, full disks, signals and gradients that are not finite in
test_train_stops.py, verifiers by themselves in test_judge.py.
"""

import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ranks import ROOT, Ranks
from runs import is_run_folder, log_of, tensors

from mass import watchdog
from mass.errors import MassError
from mass.rewards import Verifier
from mass.shards import Shards
from mass.watchdog import Peer, Watchdog


def befallen(argv: list[str], place: str, rank: int, what: str) -> None:
    """`mass-train` in which something happens to one rank at its second call of a function ("module:function")."""
    import importlib

    from mass.console import train

    # the same rules in less time
    watchdog.GONE, watchdog.STILL = 4.0, 5.0
    leave = os._exit

    def note(name: str) -> None:
        Path(argv[1].removeprefix("run.folder="), name).write_text(str(time.time()))

    def noted(code: int) -> None:
        note(f"left-{os.environ['RANK']}")
        leave(code)

    os._exit = noted  # type: ignore[assignment]
    module, _, name = place.partition(":")
    owner = importlib.import_module(module)
    whole, count = getattr(owner, name), 0

    def call(*arguments: Any, **more: Any) -> Any:
        nonlocal count
        count += 1
        if count == 2 and int(os.environ["RANK"]) == rank:
            note("befallen")
            happen(what)
        return whole(*arguments, **more)

    setattr(owner, name, call)
    train(argv)


def happen(what: str) -> None:
    if what == "sleeps":
        time.sleep(100)
    elif what == "spins":
        while True:
            pass
    elif what == "fails":
        raise ValueError("a fault of one rank")
    elif what == "errs":
        raise MassError("no file of problems here")
    else:
        os.kill(os.getpid(), getattr(signal, what))


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("place", "rank", "what", "told"),
    [
        ("mass.episode:write_examples", 1, "SIGKILL", ["rank 1", "gone or stopped", "last seen in"]),
        ("mass.metagrad:sweep", 0, "SIGKILL", ["rank 0", "gone or stopped", "last seen in"]),
        ("mass.stepfolder:_seal", 0, "SIGKILL", ["rank 0", "gone or stopped"]),
        ("mass.metagrad:sweep", 0, "SIGSTOP", ["rank 0", "gone or stopped"]),
        ("mass.episode:write_examples", 1, "SIGSTOP", ["rank 1", "gone or stopped"]),
        ("mass.episode:write_examples", 1, "sleeps", ["rank 1", "has stood still", "run (episode.py:"]),
        ("mass.episode:write_examples", 1, "spins", ["rank 1", "computes in", "run.patience=10"]),
        ("mass.metagrad:sweep", 1, "fails", ["rank 1", "left: ValueError: a fault of one rank"]),
        ("mass.metagrad:sweep", 1, "errs", ["rank 1", "left: no file of problems here"]),
    ],
)
def test_the_others_end_with_the_reason_and_the_run_goes_on(
    ranks: Ranks, recipe: Path, tmp_path: Path, place: str, rank: int, what: str, told: list[str]
) -> None:
    patience = 10 if what == "spins" else 20
    own = [str(recipe), f"run.folder={tmp_path}", f"run.patience={patience}", "outer.steps=2"]
    # a stopped rank cannot end itself: that is its launcher's work
    grace = 1 if what == "SIGSTOP" else 60
    done = ranks("test_faults:befallen", own, place, rank, what, world=2, limit=120, grace=grace)
    other = 1 - rank
    assert done.codes[other] == 3, done
    assert all(word in done.err[other] for word in told), done.err[other]
    assert "run.resume=auto" in done.err[other] and "Traceback" not in done.err[other]
    assert done.codes[rank] == {"SIGKILL": -9, "SIGSTOP": -9, "fails": 1, "errs": 2}.get(what, 3), done
    if what in ("fails", "errs"):
        # a launcher ends the others once one has left: rank 0 has said why by then
        first, last = (float((tmp_path / f"left-{r}").read_text()) for r in (0, 1))
        assert first < last
    befell, left = (float((tmp_path / name).read_text()) for name in ("befallen", f"left-{other}"))
    assert 0 < left - befell < 60
    is_run_folder_after(tmp_path / "run")
    if (place, what) in (("mass.stepfolder:_seal", "SIGKILL"), ("mass.episode:write_examples", "sleeps")):
        ranks("mass.console:train", [*own, "run.resume=auto"], world=2).good()
        is_run_folder(tmp_path / "run", [1, 2])
        assert [entry["step"] for entry in log_of(tmp_path / "run")] == [0, 1, 2]


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_rank_that_waits_for_a_part_of_a_sharded_base_is_given_run_patience(
    ranks: Ranks, recipe: Path, tmp_path: Path
) -> None:
    """Rank 0 stands in `Shards._turn` for longer than `STILL`, while rank 1 computes."""
    own = [str(recipe), f"run.folder={tmp_path}", "run.patience=10", "outer.steps=2", "zero.stage=3"]
    done = ranks("test_faults:befallen", own, "mass.episode:write_examples", 1, "spins", world=2, limit=120)
    assert done.codes == [3, 3], done
    for text in done.err:
        assert "rank 1 (process" in text and "computes in" in text and "run.patience=10" in text, text
        assert "stood still" not in text, text


@pytest.mark.parametrize("name", ["_turn", "settle"])
def test_the_watchdog_knows_a_wait_for_a_part_of_the_base_and_sees_parts_come(name: str) -> None:
    part = threading.Lock()
    part.acquire()
    # as the C++ Work: no Python frame in its wait
    work = SimpleNamespace(wait=part.acquire)
    shards = Shards.__new__(Shards)
    shards._talk, shards._move, shards._want = None, (work, 0, torch.zeros(0)), 0
    shards._now = shards._arrived = None
    shards._served, shards.waited = 0, 1.5
    shards._ask = lambda u: None  # type: ignore[method-assign]
    call = (lambda: Shards._turn(shards, True)) if name == "_turn" else (lambda: Shards.settle(shards))
    thread = threading.Thread(target=call)
    thread.start()
    try:
        assert thread.ident is not None
        end = time.monotonic() + 10
        while (frame := sys._current_frames()[thread.ident]).f_code.co_name != "_turn":
            assert time.monotonic() < end
            time.sleep(0.01)
        where, waits, got, _ = watchdog._place(frame, 0.0)
        assert waits and where.startswith("_turn (shards.py:") and got == 1.5
        shards.waited = 2.0
        assert watchdog._place(frame, got)[1:3] == (True, 2.0), "another wait, at the same place"
    finally:
        part.release()
        thread.join(10)
    assert not thread.is_alive()
    assert watchdog._place(sys._getframe(), 2.0)[1:] == (False, 2.0, False)


def is_run_folder_after(run: Path) -> None:
    """The save before is there, whole, and nothing after it."""
    from mass.checkpoint import newest_good, steps

    assert [step.name for step in steps(run)] == ["step_000001"]
    assert newest_good(run) == run / "step_000001"


def broken_model(argv: list[str], steps: list[int], rank: int) -> None:
    """`mass-train` in which every norm of one rank's model gives NaN throughout these steps."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    from mass import episode
    from mass.console import train

    whole, norm, broken = episode.run, LlamaRMSNorm.forward, [False]

    def run(setting: Any, tasks: Any, step: int, *arguments: Any, **more: Any) -> Any:
        broken[0] = step in steps and int(os.environ["RANK"]) == rank
        result = whole(setting, tasks, step, *arguments, **more)
        broken[0] = False
        return result

    def forward(self: Any, hidden: Any) -> Any:
        return norm(self, hidden) * (float("nan") if broken[0] else 1.0)

    episode.run, LlamaRMSNorm.forward = run, forward
    train(argv)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_model_that_gives_nan_on_one_rank_costs_its_steps_and_ends_the_run_when_it_goes_on(
    ranks: Ranks, recipe: Path, tmp_path: Path
) -> None:
    own = [
        str(recipe),
        f"run.folder={tmp_path}",
        "outer.steps=5",
        "outer.max_skipped=2",
        "outer.loss=verifier",
    ]
    done = ranks("test_faults:broken_model", own, [1, 3, 4], 1, world=2)
    assert done.codes == [2, 2], done
    assert "2 outer steps in a row had a gradient that is not finite (outer.max_skipped)" in done.err[0]
    assert f"The last good checkpoint is {tmp_path}/run/step_000004" in done.err[0]
    assert "Traceback" not in done.err[0] + done.err[1]
    assert [entry["meta/skipped_steps"] for entry in log_of(tmp_path / "run")] == [0, 1, 1, 2, 3]
    saved = [tensors(tmp_path / f"run/step_{step:06d}") for step in (1, 2, 3, 4)]
    for key in saved[0]:
        if key != "optimizer outer_steps":
            assert torch.equal(saved[0][key], saved[1][key]), key
    assert not torch.equal(saved[1]["scorer net.4.weight"], saved[2]["scorer net.4.weight"])
    ranks("mass.console:train", [*own, "run.resume=auto"], world=2).good()
    is_run_folder(tmp_path / "run", [1, 2, 3, 4, 5])
    assert all(torch.isfinite(x).all() for x in tensors(tmp_path / "run/step_000005").values())


def worker_befallen(argv: list[str]) -> None:
    """`mass-train` whose verifier's worker is stopped at its third question and killed at its fifth."""
    from mass.console import train
    from mass.rewards import Verifier

    ask, count = Verifier._ask, 0

    def asked(self: Any, message: Any, seconds: float) -> Any:
        nonlocal count
        count += message[1] is not None
        if message[1] is not None and count in (3, 5):
            os.kill(self._process.pid, signal.SIGSTOP if count == 3 else signal.SIGKILL)
        return ask(self, message, min(seconds, 0.5) if message[1] is not None else seconds)

    Verifier._ask = asked  # type: ignore[method-assign]
    train(argv)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_verifier_s_worker_that_is_stopped_or_killed_is_a_metric_and_the_run_goes_on(
    ranks: Ranks, recipe: Path, tmp_path: Path
) -> None:
    own = [
        str(recipe),
        f"run.folder={tmp_path}",
        "outer.loss=verifier",
        "problems.verifier=math",
        "outer.steps=2",
    ]
    ranks("test_faults:worker_befallen", own).good()
    is_run_folder(tmp_path / "run", [1, 2])
    log = log_of(tmp_path / "run")
    assert log[0]["verifier/failures"] == 2 and log[1]["verifier/failures"] == 0
    assert log[0]["reward/solve_after"] > 0, "the other verdicts are there"


def test_the_watchdog_knows_what_waits_for_other_processes() -> None:
    """Each of `WAITS` is a function of this package; and a verifier that loads is seen to be one."""
    for file, name in watchdog.WAITS:
        assert f"def {name}(" in (ROOT / "mass" / file).read_text(), (file, name)
    seen: list[bool] = []

    class Pipe:
        def send(self, message: object) -> None:
            seen.append(watchdog._place(sys._getframe(), 0.0)[3])
            raise EOFError

        def close(self) -> None:
            pass

    verifier = Verifier()
    verifier._pipe = Pipe()  # type: ignore[assignment]
    verifier._process = subprocess.Popen([sys.executable, "-c", ""])
    assert verifier._ask(("math", None), 1.0).status == "failed" and seen == [True]


def test_what_the_watchdog_calls_a_stall() -> None:
    watch = Watchdog(0, 1, patience=100)
    long = watchdog.STILL + 1
    moving = Peer(where="generate", host="process 7 on a")
    waiting = Peer(where="any_rank", waits=True, still=long, waited=long)

    def told(*peers: Peer) -> str | None:
        watch.peers = list(peers)
        return watch._stalled()

    assert told(moving, waiting) is None, "waiting for one that moves is no stall"
    assert told(moving, replace(waiting, waited=101)) is not None
    assert told(waiting, replace(waiting, still=1)) is None
    text = told(replace(waiting, where="step"), waiting)
    assert text == "all ranks wait for each other and none moves (rank 0: step; rank 1: any_rank)"
    text = told(moving, replace(moving, still=long))
    assert text is not None and text.startswith(
        "rank 1 (process 7 on a) has stood still for 41 s in generate"
    )
    assert told(moving, replace(moving, still=long, left="its reason")) is None, "another rule's"
    assert told(moving, replace(moving, still=long, may=100)) is None, (
        "it waits for another process, or the disk"
    )
    assert told(moving, replace(moving, still=101, may=100)) is not None


def test_the_tests_that_the_documentation_names_exist() -> None:
    """docs/reliability.md has a test for each fault."""
    rows = [
        line for line in (ROOT / "docs/reliability.md").read_text().splitlines() if line.startswith("| ")
    ][1:]
    assert len(rows) > 10
    for row in rows[1:]:
        cell = row.split("|")[-2].strip()
        named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", cell)
        assert named or cell == "the same", row
        for file, name in named:
            assert f"def {name}(" in (ROOT / "tests" / file).read_text(), (file, name)


def test_rank_0_s_last_words_outlive_its_store() -> None:
    """It left with a reason, and the store went with it before the others' time for the same mistake was over."""
    watch = Watchdog(0, 1, patience=100)
    watch.rank = 1
    watch._answered = -math.inf
    watch.peers = [Peer(where="save", host="process 7 on a", left="no space left"), Peer()]
    assert watch._gone() == "rank 0 (process 7 on a) left: no space left"
    watch.peers[0].left = ""
    assert watch._gone() == "rank 0 (process 7 on a) is gone or stopped, last seen in save"
