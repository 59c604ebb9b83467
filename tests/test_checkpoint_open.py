"""Opening a run folder: no run overwrites another, one is continued where it was left, and by one process at a time."""

import os

import pytest
from saves import RECIPE, assert_same, begin, contents, hidden, make_layers, names

from mass.checkpoint import commit, load, open_run, save
from mass.errors import MassError


def test_an_existing_run_is_never_overwritten(tmp_path):
    run = begin(tmp_path)
    assert (run.start, run.changed) == (None, ())
    begin(tmp_path)  # nothing in it yet
    (run.folder / "log.jsonl").touch()
    begin(tmp_path)  # a run that died before its first line
    (run.folder / "log.jsonl").write_text("{}\n")
    with pytest.raises(
        MassError, match=r"run .*/a exists: run.resume=auto continues it, or choose another run.name"
    ):
        begin(tmp_path)
    (run.folder / "log.jsonl").unlink()
    save(run, 10, contents(), keep=3)
    with pytest.raises(MassError, match="exists"):
        begin(tmp_path)
    assert_same(load(run.folder, make_layers()), contents())


def test_auto_starts_or_continues(tmp_path):
    run = begin(tmp_path, "auto")
    assert run.start is None
    save(run, 10, contents(), keep=3)
    save(run, 20, contents(), keep=3)
    # a kill between the rename and the pointer
    (run.folder / "latest").write_text("step_000010\n")
    run = begin(tmp_path, "auto")
    assert run.start == run.folder / "step_000020" and run.changed == ()
    assert (run.folder / "latest").read_text() == "step_000020\n"


def test_changed_keys_are_listed_and_the_recipe_is_renewed(tmp_path):
    run = begin(tmp_path)
    save(run, 10, contents(), keep=3)
    recipe = RECIPE.replace("steps: 10", "steps: 20, gamma: 0.5").replace("'no'", "auto")
    run = begin(tmp_path, "auto", recipe)
    assert run.changed == ("outer.steps: 10 -> 20", "outer.gamma: absent -> 0.5")
    assert (run.folder / "recipe.yaml").read_text() == recipe


@pytest.mark.parametrize(
    "old, new", [("rank: 2", "rank: 4"), ("path: m", "path: n"), ("[all-linear]", "[q_proj]")]
)
def test_another_network_is_refused(tmp_path, old, new):
    run = begin(tmp_path)
    save(run, 10, contents(), keep=3)
    with pytest.raises(MassError, match=r"another network.*(lora|model)\.\w+: .* -> "):
        begin(tmp_path, "auto", RECIPE.replace(old, new))
    assert (run.folder / "recipe.yaml").read_text() == RECIPE


def test_a_network_saved_before_a_key_existed_is_the_one_of_its_default(tmp_path):
    run = begin(tmp_path)
    save(run, 10, contents(), keep=3)
    known = RECIPE.replace("targets:", "alpha: 16.0, last: null, targets:") + "scorer: {hidden: 64}\n"
    assert begin(tmp_path, "auto", known).changed == ()
    (run.folder / "recipe.yaml").write_text(RECIPE)
    with pytest.raises(
        MassError, match=r"another network than the recipe asks for \(lora.last: absent -> 1\)"
    ):
        begin(tmp_path, "auto", known.replace("last: null", "last: 1"))


@pytest.mark.parametrize("text", [None, b"lora: [", b"\xff"], ids=["missing", "no YAML", "no text"])
def test_a_run_whose_recipe_is_missing_says_so_and_one_whose_recipe_cannot_be_read_is_refused(tmp_path, text):
    run = begin(tmp_path)
    save(run, 10, contents(), keep=3)
    path = run.folder / "recipe.yaml"
    if text is None:
        path.unlink()
        (changed,) = begin(tmp_path, "auto").changed
        assert changed == f"{path} is missing: what has changed since is not known"
        assert path.read_text() == RECIPE
    else:
        path.write_bytes(text)
        with pytest.raises(
            MassError, match="recipe.yaml cannot be read .*: mend it, or choose another run.name"
        ):
            begin(tmp_path, "auto")
        assert path.read_bytes() == text


def test_going_back_sets_later_steps_aside_and_retention_ignores_them(tmp_path):
    run = begin(tmp_path)
    for step in (10, 20, 30):
        save(run, step, contents(step), keep=0)
    run = begin(tmp_path, run.folder / "step_000010")
    assert run.start == run.folder / "step_000010"
    assert [name.partition(".")[0] for name in run.aside] == ["step_000020", "step_000030"]
    assert names(run) == ["step_000010"] and all((run.folder / name).is_dir() for name in run.aside)
    save(run, 20, contents(99), keep=1)
    assert names(run) == ["step_000020"]
    assert_same(load(run.folder, make_layers()), contents(99))


def test_nothing_of_a_run_changes_before_the_call_is_sure(tmp_path):
    run = begin(tmp_path)
    for step in (10, 20):
        save(run, step, contents(step), keep=0)
    before = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
    recipe = RECIPE.replace("seed: 0", "seed: 1")
    again = open_run(tmp_path, "a", recipe, run.folder / "step_000010")
    assert again.changed == ("run.seed: 0 -> 1",) and again.aside == ()
    assert {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()} == before
    assert len(commit(again).aside) == 1 and names(run) == ["step_000010"]
    assert (run.folder / "recipe.yaml").read_text() == recipe
    assert (run.folder / "latest").read_text() == "step_000010\n"


def test_a_step_of_another_run_starts_a_new_one(tmp_path):
    first = begin(tmp_path)
    step = save(first, 10, contents(), keep=3)
    second = begin(tmp_path, step, RECIPE.replace("seed: 0", "seed: 1"), name="b")
    assert second.start == step and second.changed == ("run.seed: 0 -> 1",)
    assert second.branches and not first.branches and not begin(tmp_path, step).branches
    assert names(first) == ["step_000010"] and names(second) == []
    save(second, 20, contents(), keep=3)
    with pytest.raises(MassError, match="run .*/b exists"):
        begin(tmp_path, step, name="b")


@pytest.mark.parametrize("name", ["", "a/b", "..", ".", "/etc", "step_000010"])
def test_a_name_that_leaves_the_folder_is_refused(tmp_path, name):
    with pytest.raises(MassError, match="run.name"):
        begin(tmp_path, name=name)


def test_bad_places_are_one_sentence(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(MassError, match="run.folder: .*file/a cannot be written"):
        begin(tmp_path / "file")
    with pytest.raises(MassError, match="run.resume=nowhere: there is no such folder"):
        begin(tmp_path, "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(MassError, match="neither a step folder nor a run"):
        begin(tmp_path, tmp_path / "empty")


def test_leftovers_of_a_kill_are_removed(tmp_path):
    run = begin(tmp_path)
    (run.folder / ".step_000010.tmp-123").mkdir()
    (run.folder / ".step_000010.tmp-123" / "x").touch()
    (run.folder / ".latest.tmp-123").touch()
    begin(tmp_path)
    assert hidden(run.folder) == []


def refused(folder: str) -> None:
    """In another process: says why a run is not opened."""
    try:
        open_run(folder, "a", "", "auto")
    except MassError as error:
        print(error)


@pytest.mark.multiprocess
def test_a_run_in_use_by_another_process_is_refused(ranks, tmp_path):
    run = begin(tmp_path)
    begin(tmp_path, "auto")  # the same process may reopen it
    (run.folder / ".step_000010.tmp-123").mkdir()
    out = ranks("test_checkpoint_open:refused", str(tmp_path)).good().out[0]
    assert f"is in use by process {os.getpid()}" in out
    # what a living process is writing was not taken for a leftover
    assert hidden(run.folder) == [".step_000010.tmp-123"]
