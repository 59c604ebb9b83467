"""What befalls a run of several ranks: one is killed, stopped, stuck, or fails by itself.

In each case the others end within a minute and name the rank and the place, and the run goes on from its last save.
Damage to saved files is in test_checkpoint.py, full disks, NaN and signals in test_train.py, verifiers in test_rewards.py.
"""

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from chain import save_chain, save_problems
from ranks import Ranks
from test_train import RECIPE, is_run_folder, log_of

from mass import watchdog
from mass.watchdog import Peer, Watchdog


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks() as started:
        yield started


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    path = folder / "run.yaml"
    path.write_text(
        RECIPE.replace("CHAIN", str(save_chain(folder / "chain"))).replace(
            "PROBLEMS", str(save_problems(folder / "problems.jsonl"))
        )
    )
    return path


def befallen(argv: list[str], place: str, rank: int, what: str) -> None:
    """`mass-train` in which something happens to one rank at its second call of a function ("module:function")."""
    import importlib

    from mass.train import main

    # the same rules in less time
    watchdog.GONE, watchdog.STILL = 4.0, 5.0
    module, _, name = place.partition(":")
    owner = importlib.import_module(module)
    whole, count = getattr(owner, name), 0

    def call(*arguments: Any, **more: Any) -> Any:
        nonlocal count
        count += 1
        if count == 2 and int(os.environ["RANK"]) == rank:
            happen(what)
        return whole(*arguments, **more)

    setattr(owner, name, call)
    main(argv)


def happen(what: str) -> None:
    if what == "sleeps":
        time.sleep(100)
    elif what == "spins":
        while True:
            pass
    elif what == "fails":
        raise ValueError("a fault of one rank")
    else:
        os.kill(os.getpid(), getattr(signal, what))


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("place", "rank", "what", "told"),
    [
        ("mass.episode:write_examples", 1, "SIGKILL", ["rank 1", "gone or stopped", "last seen in"]),
        ("mass.metagrad:sweep", 0, "SIGKILL", ["rank 0", "gone or stopped", "last seen in"]),
        ("mass.checkpoint:_seal", 0, "SIGKILL", ["rank 0", "gone or stopped"]),
        ("mass.metagrad:sweep", 0, "SIGSTOP", ["rank 0", "gone or stopped"]),
        ("mass.episode:write_examples", 1, "SIGSTOP", ["rank 1", "gone or stopped"]),
        ("mass.episode:write_examples", 1, "sleeps", ["rank 1", "has stood still", "run (episode.py:"]),
        ("mass.episode:write_examples", 1, "spins", ["rank 1", "computes in", "run.patience=10"]),
        ("mass.metagrad:sweep", 1, "fails", ["rank 1", "left: ValueError: a fault of one rank"]),
    ],
)
def test_the_others_end_with_the_reason_and_the_run_goes_on(
    ranks: Ranks, recipe: Path, tmp_path: Path, place: str, rank: int, what: str, told: list[str]
) -> None:
    own = [str(recipe), f"run.folder={tmp_path}", "run.patience=10", "outer.steps=2"]
    begin = time.monotonic()
    # a stopped rank is ended by its launcher, here by the limit
    limit = 35 if what == "SIGSTOP" else 60
    done = ranks("test_faults:befallen", own, place, rank, what, world=2, limit=limit)
    other = 1 - rank
    assert done.codes[other] == 3, done
    assert all(word in done.err[other] for word in told), done.err[other]
    assert "run.resume=auto" in done.err[other] and "Traceback" not in done.err[other]
    assert done.codes[rank] == {"SIGKILL": -9, "SIGSTOP": -9, "fails": 1}.get(what, 3), done
    assert time.monotonic() - begin < 60
    is_run_folder_after(tmp_path / "run")
    if (what, rank) in (("SIGKILL", 0), ("sleeps", 1)):
        ranks("mass.train:main", [*own, "run.resume=auto"], world=2).good()
        is_run_folder(tmp_path / "run", [1, 2])
        assert [entry["step"] for entry in log_of(tmp_path / "run")] == [0, 1, 2]


def is_run_folder_after(run: Path) -> None:
    """The save before is there, whole, and nothing after it."""
    from mass.checkpoint import newest_good, steps

    assert [step.name for step in steps(run)] == ["step_000001"]
    assert newest_good(run) == run / "step_000001"


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
