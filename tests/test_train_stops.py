"""Runs that are stopped by a signal, by gradients that are not finite, or by a full disk."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks
from runs import STEP_FILES, is_run_folder, log_of, one_sentence, step_of, tensors


def disturbed(argv: list[str], what: str, steps: list[int], rank: int) -> None:
    """`mass-train` in which this happens at these steps: gradients become NaN, or a signal comes, on one rank only."""
    from mass import episode
    from mass.console import train

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
    train(argv)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_sigterm_stops_one_process_with_a_save(ranks: Ranks, recipe: Path, tmp_path: Path) -> None:
    own = [str(recipe), f"run.folder={tmp_path}", "save.every=50"]
    done = ranks("test_train_stops:disturbed", own, "SIGTERM", [1], 0).good()
    is_run_folder(tmp_path / "run", [2])
    assert "stopped at step 2 on request; run.resume=auto continues" in done.out[0]
    assert "stopping after this step" in done.err[0]
    ranks("mass.console:train", [*own, "run.resume=auto"]).good()
    is_run_folder(tmp_path / "run", [2, 3])


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_signal_to_one_rank_stops_all_and_rank_0_says_so(
    ranks: Ranks, recipe: Path, tmp_path: Path
) -> None:
    own = [str(recipe), f"run.folder={tmp_path}", "save.every=50"]
    done = ranks("test_train_stops:disturbed", own, "SIGTERM", [0], 1, world=2).good()
    is_run_folder(tmp_path / "run", [1])
    assert "stopped at step 1 on request" in done.out[0]


@pytest.mark.slow
@pytest.mark.multiprocess
def test_gradients_that_are_not_finite_are_skipped_counted_and_end_the_run(
    ranks: Ranks, recipe: Path, tmp_path: Path
) -> None:
    """On two ranks, of which the second alone has them."""
    own = [str(recipe), f"run.folder={tmp_path}", "outer.steps=5"]
    some = [*own, "run.name=some", "outer.max_skipped=2"]
    done = ranks("test_train_stops:disturbed", some, "nan", [1, 3, 4], 1, world=2)
    text = one_sentence(done, "2 outer steps in a row", "outer.max_skipped", f"{tmp_path}/some/step_000004")
    assert text.count("\n") == 0
    is_run_folder(tmp_path / "some", [1, 2, 3, 4])
    assert [entry["meta/skipped_steps"] for entry in log_of(tmp_path / "some")] == [0, 1, 1, 2, 3]
    assert "WARNING: step 2 was skipped: its gradient was not finite (1 skipped so far)" in done.out[0]
    saved = [tensors(step_of(tmp_path / "some", step)) for step in (1, 2, 3, 4)]
    for key in saved[0]:
        if key != "optimizer outer_steps":
            assert torch.equal(saved[0][key], saved[1][key]), key
            assert torch.equal(saved[2][key], saved[3][key]), key
    assert not torch.equal(saved[1]["scorer net.4.weight"], saved[2]["scorer net.4.weight"])
    assert all(torch.isfinite(x).all() for x in saved[3].values())

    done = ranks("test_train_stops:disturbed", [*own, "run.name=none", "outer.max_skipped=1"], "nan", [0], 0)
    one_sentence(done, "1 outer steps in a row", "nothing was saved")
    assert not list((tmp_path / "none").glob("step_*"))


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_run_branched_from_another_s_step_goes_on_from_there_when_it_is_killed_before_its_first_save(
    ranks: Ranks, recipe: Path, tmp_path: Path
) -> None:
    own = [str(recipe), f"run.folder={tmp_path}"]
    ranks("test_train_stops:disturbed", [*own, "run.name=a", "outer.steps=2"], "nan", [0], 0).good()
    start, branch = step_of(tmp_path / "a", 2), [*own, "outer.steps=4", "save.every=50"]
    from_a = [*branch, f"run.resume={start}"]
    ranks("mass.console:train", [*from_a, "run.name=whole"]).good()
    done = ranks("test_train_stops:disturbed", [*from_a, "run.name=b"], "SIGKILL", [3], 0)
    assert done.codes == [-9], done
    # the step that its parent skipped is no news
    assert "step 3/4" in done.out[0] and "skipped 1" in done.out[0] and "was skipped" not in done.out[0]
    is_run_folder(tmp_path / "b", [2])
    for name in STEP_FILES - {"meta.json"}:
        assert (step_of(tmp_path / "b", 2) / name).read_bytes() == (start / name).read_bytes(), name
    done = ranks("mass.console:train", [*branch, "run.name=b", "run.resume=auto"]).good()
    assert f"continuing {tmp_path}/b/step_000002 at step 2" in done.out[0]
    assert [entry["step"] for entry in log_of(tmp_path / "b")] == [2, 3, 4]
    is_run_folder(tmp_path / "b", [2, 4])
    a, b = (tensors(step_of(tmp_path / name, 4)) for name in ("whole", "b"))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_full_disk_while_saving_loses_nothing_that_was_saved(
    ranks: Ranks, recipe: Path, small_disk: Path
) -> None:
    own = [str(recipe), f"run.folder={small_disk}", "log.tensorboard=false"]
    one = ranks("mass.console:train", [*own, "outer.steps=1"], world=2).good()
    assert "done" in one.out[0]
    # room for two thirds of another save
    size = sum(path.stat().st_size for path in step_of(small_disk / "run", 1).rglob("*") if path.is_file())
    stat = os.statvfs(small_disk)
    filler = stat.f_bavail * stat.f_frsize - size * 2 // 3
    assert filler > 0, "the disk is too small for the test"
    (small_disk / "filler").write_bytes(b"x" * filler)
    before = tensors(step_of(small_disk / "run", 1))
    done = ranks("mass.console:train", [*own, "run.resume=auto"], world=2)
    one_sentence(done, "no space left while saving step_000002", "step_000001 and earlier saves are safe")
    is_run_folder(small_disk / "run", [1], tensorboard=False)
    after = tensors(step_of(small_disk / "run", 1))
    assert after.keys() == before.keys() and all(torch.equal(after[key], x) for key, x in before.items())
    (small_disk / "filler").unlink()
    ranks("mass.console:train", [*own, "run.resume=auto", "outer.steps=2", "save.keep=1"], world=2).good()
    is_run_folder(small_disk / "run", [2], tensorboard=False)
