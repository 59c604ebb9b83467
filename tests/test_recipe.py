"""Recipes: every key, every recipe on disk, the command line and the docs."""

import contextlib
import gc
import importlib
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mass import recipe as module
from mass.errors import MassError
from mass.prompts import pick_shots
from mass.recipe import command_line, dump, load, markdown
from mass.schema import KEYS
from mass.sources import load_all

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
NEEDED = "model: {path: 'tiny:llama'}\nproblems: {train: gym:chain_sum}\n"


def errors(path: Path, *overrides: str) -> list[str]:
    """The lines of the one error message, without its head."""
    with pytest.raises(MassError) as caught:
        load(path, overrides)
    head, *lines = str(caught.value).splitlines()
    count = len(lines)
    assert head == f"{path}: {count} error{'s' if count > 1 else ''}"
    return [line.removeprefix("  ") for line in lines]


# ---- what is right


def test_the_recipes_of_the_issue_are_there():
    assert {"smoke", "demo", "gsm8k", "math", "planted", "families"} <= {path.stem for path in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_on_disk_resolves_and_says_how_it_is_run(path):
    found = load(path)
    assert found.run.name == path.stem, "two recipes with one name would meet in one run folder"
    head = list(itertools.takewhile(lambda line: line.startswith("#"), path.read_text().splitlines()))
    for part in (
        f"#   deepspeed .*launch/meta_train.py recipes/{path.name}",
        "# Hardware: ",
        "# How long: ",
        "# Change first: ",
    ):
        assert any(re.match(part, line) for line in head), part


def reloads_to_itself(path, write):
    own = ["run.resume=no", "scorer.layers=[0.25, 1]", "inner.clip=null"]
    # without an inner loop there is no rate to learn
    own += ["inner.learned_lr=one"] if load(path).inner.steps else []
    found = load(path, own)
    again = write(dump(found))
    assert load(again) == found
    assert dump(load(again)) == dump(found)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_resolved_recipe_reloads_to_itself(path, write):
    reloads_to_itself(path, write)


def test_so_does_one_without_an_inner_loop_or_held_out_problems(write, tmp_path):
    path = tmp_path / "supervised.yaml"
    path.write_text(
        "model: {path: 'tiny:llama'}\nproblems: {train: gym:chain_sum, heldout_size: 0}\ninner: {steps: 0}\n"
    )
    reloads_to_itself(path, write)


def test_a_dump_names_every_key(write):
    text = dump(load(write(NEEDED)))
    assert [name for name, _ in module._leaves(yaml.safe_load(text))] == list(KEYS)


def test_an_override_is_an_edited_file(write):
    edited = write(
        NEEDED + "inner: {steps: 3, lr: 1e-2, learned_lr: no}\nlora: {targets: [q_proj]}\nrun: {name: x}\n"
    )
    wanted = load(edited)
    plain = write(NEEDED)
    overrides = [
        "inner.steps=3",
        "inner.lr=1e-2",
        "inner.learned_lr=no",
        "lora.targets=[q_proj]",
        "run.name=x",
    ]
    assert load(plain, overrides) == wanted
    assert (wanted.inner.steps, wanted.inner.lr, wanted.lora.targets) == (3, 0.01, ["q_proj"])


def test_a_later_override_wins_and_mends_the_file(write):
    path = write(NEEDED + "inner: {steps: many}\n")
    assert load(path, ["inner.steps=3", "inner.steps=4"]).inner.steps == 4


def test_a_bare_no_is_not_false(write):
    found = load(write(NEEDED + "run: {resume: no}\ninner: {learned_lr: no}\n"), ["run.resume=no"])
    assert (found.run.resume, found.inner.learned_lr) == ("no", "no")
    # what recipes said before there was more to offload than the optimizer
    assert load(write(NEEDED + "zero: {offload: false}\n")).zero.offload == "no"


def test_one_source_or_many(write):
    path = write(NEEDED)
    assert load(path).problems.train == ["gym:chain_sum"]
    found = load(path, ["problems.train=[a.jsonl, gym:chain_sum]", "problems.heldout=b.jsonl"])
    assert (found.problems.train, found.problems.heldout) == (["a.jsonl", "gym:chain_sum"], ["b.jsonl"])


def test_settings_of_a_family_that_others_stand_in_for_at_test_time(write):
    """A run's own recipe, with other problems to answer: its settings of the others are nothing to remove by hand."""
    text = (
        "model: {path: x}\nproblems: {train: gym:chain_sum, heldout: gym:gcd, gym: {gcd: {max_value: 9}}}\n"
    )
    path, other = write(text), "problems.heldout=[test.jsonl]"
    assert load(path, training=False).problems.gym == {"gcd": {"max_value": 9}}
    assert load(path, [other], training=False).problems.gym == {}
    assert load(path, ["problems.gym=${problems.world}"]).problems.gym == {}
    with pytest.raises(MassError, match="problems.gym.gcd: settings of a family that is not used"):
        load(path, [other])
    with pytest.raises(MassError, match="problems.gym.gdc: settings of a family that is not used"):
        load(path, ["problems.gym.gdc.max_value=7"], training=False)


def test_gym_settings_from_file_and_override_are_merged(write):
    path = write("model: {path: x}\nproblems: {train: gym:chain_sum, gym: {chain_sum: {min_terms: 2}}}\n")
    found = load(path, ["problems.gym.chain_sum.max_terms=3"])
    assert found.problems.gym == {"chain_sum": {"min_terms": 2, "max_terms": 3}}
    assert type(found.problems.gym["chain_sum"]) is dict


def test_a_group_with_all_its_keys_commented_out(write):
    assert load(write(NEEDED + "inner:\n# steps: 3\n")).inner.steps == 2


def test_an_interpolation_is_resolved(write, monkeypatch):
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    path = write(NEEDED + "run: {folder: '${oc.env:SCRATCH}/runs'}\n")
    assert load(path).run.folder == "/scratch/me/runs"
    monkeypatch.delenv("SCRATCH")
    assert "SCRATCH" in errors(path)[0]


def test_defaults_of_a_recipe_are_its_own(write):
    path = write(NEEDED)
    load(path).lora.targets.append("spoilt")
    assert load(path).lora.targets == ["all-linear"]


# ---- the command line and the docs


def test_help_shows_every_key_with_type_default_and_meaning(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as caught:
        command_line(["--help"], "mass-train", "Meta-train.")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 100
    flat = " ".join(text.split())
    for key in KEYS.values():
        line = f"{key.name} = {module._default(key)} ({module._type(key)}) {key.meaning}"
        assert " ".join(line.split()) in flat
        assert key.meaning


def test_cfg_prints_the_resolved_recipe_and_stops(write, capsys):
    path = write(NEEDED)
    with pytest.raises(SystemExit) as caught:
        command_line([str(path), "--cfg", "inner.steps=3"], "mass-train", "")
    assert caught.value.code == 0
    assert capsys.readouterr().out == dump(load(path, ["inner.steps=3"]))


@pytest.mark.parametrize("rank", [["--local_rank=1"], ["--local-rank", "1"]])
def test_the_launchers_local_rank_is_ignored(write, rank):
    path = write(NEEDED)
    # the deepspeed launcher puts it before the script's own arguments
    assert command_line([*rank, str(path), "inner.steps=3"], "", "") == (
        load(path, ["inner.steps=3"]),
        None,
        None,
    )


@pytest.mark.parametrize(
    "words, asked",
    [
        (["--probe"], (64, None)),
        (["--probe", "8"], (8, None)),
        ([], (None, None)),
        (["--plan"], (None, "1")),
        (["--plan=8x80"], (None, "8x80")),
    ],
)
def test_probe_and_plan_are_asked_for_with_a_size_or_without(write, words, asked):
    path = write(NEEDED)
    assert command_line([str(path), "inner.steps=3", *words], "", "") == (
        load(path, ["inner.steps=3"]),
        *asked,
    )
    assert command_line([str(path), *words, "--local_rank=0"], "", "") == (load(path), *asked)
    # whatever follows is no size
    assert command_line([str(path), *words, "inner.steps=3"], "", "") == (
        load(path, ["inner.steps=3"]),
        *asked,
    )
    assert command_line([*words, str(path)], "", "") == (load(path), *asked)


@pytest.mark.parametrize("words", [["--probe", "0"], ["--probe=0"], ["--probe=-3"]])
def test_a_probe_of_no_task_is_refused(write, capsys, words):
    """And does not train."""
    with pytest.raises(SystemExit) as end:
        command_line([str(write(NEEDED)), *words], "", "")
    assert end.value.code == 2 and "it wants 1 or more" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["010", "2024_01_05", "1:30", "1e3", "7e55012", "12"])
def test_text_on_the_command_line_that_looks_like_a_number_stays_text(write, text):
    path = write(NEEDED)
    assert load(path, [f"run.name={text}"]).run.name == text
    assert load(path, [f"problems.train={text}"]).problems.train == [text]
    assert load(path, ["run.name='a b'", "outer.steps=010"]).outer.steps == 8


def test_a_faulty_recipe_exits_with_2_and_one_message(write, capsys, monkeypatch):
    path = write(NEEDED)
    with pytest.raises(SystemExit) as caught:
        command_line([str(path), "inner.stps=3", "--nonsense"], "mass-train", "")
    assert caught.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(f"{path}: 2 errors\n")
    assert "inner.stps: unknown key" in shown.err and "--nonsense: unknown option" in shown.err
    # of many ranks one says it
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as caught:
        command_line([str(path), "inner.stps=3"], "mass-train", "")
    assert caught.value.code == 2
    assert capsys.readouterr().err == ""


def test_no_recipe_at_all(capsys):
    with pytest.raises(SystemExit) as caught:
        command_line([], "mass-train", "")
    assert caught.value.code == 2
    assert "RECIPE" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("typed", "code", "said"),
    [
        ("['recipes/demo.yaml', '--cfg']", 0, "model:"),
        ("['--help']", 0, "usage: mass-train"),
        ("['recipes/demo.yaml', 'inner.stps=3']", 2, "inner.stps: unknown key"),
    ],
)
def test_what_needs_no_model_is_said_without_torch(typed: str, code: int, said: str) -> None:
    program = (
        "import sys\n"
        "from mass.console import train\n"
        f"try: train({typed})\n"
        "finally: print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", program]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code and said in done.stdout + done.stderr, done
    assert done.stdout.splitlines()[-1] == "False False"


def test_the_docs_are_in_step():
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert page == markdown(), "python -m mass.recipe > docs/recipes.md"
    for name in KEYS:
        assert f"| `{name}` |" in page


def commands(page):
    """Those of a page that start a training, as words."""
    text = (ROOT / page).read_text(encoding="utf-8").replace("\\\n", " ")
    found = re.findall(r"^(?:    |\t)(?:deepspeed launch/meta_train.py|mass-train) (.*)$", text, re.MULTILINE)
    return [shlex.split(one, comments=True) for one in found]


@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md"])
def test_the_commands_of_the_first_pages_resolve(page, capsys):
    for words in commands(page):
        assert (ROOT / words[0]).is_file()
        with pytest.raises(SystemExit) as end:
            command_line([str(ROOT / words[0]), *words[1:], "--cfg"], "mass-train", "")
        assert end.value.code == 0, capsys.readouterr().err
    # typed again, it goes on, as `make demo` does
    assert commands(page)[0] == commands("Makefile")[0] == ["recipes/demo.yaml", "run.resume=auto"]
    assert "source .venv/bin/activate" in (ROOT / page).read_text(encoding="utf-8")


def test_so_many_lines_of_ones_own_are_enough_for_the_quickstart(tmp_path):
    (words,) = [x for x in commands("docs/quickstart.md") if "problems.train=mine.jsonl" in x]
    file = tmp_path / "mine.jsonl"
    for count, enough in ((7, True), (6, False)):
        rows = [json.dumps({"problem": f"What is {i} + 1?", "answer": str(i + 1)}) for i in range(count)]
        file.write_text("\n".join(rows) + "\n")
        recipe = load(ROOT / words[0], [x.replace("mine.jsonl", str(file)) for x in words[1:]])
        pool, asked = load_all(recipe).pool, recipe.prompt.generate_shots
        with contextlib.nullcontext() if enough else pytest.raises(MassError, match="pairs of problems"):
            pick_shots(pool, 0, recipe.run.seed, "", pairs=asked)


@pytest.mark.parametrize("tasks, at_once, together", [(4, "null", 4), (4, 3, 3), (2, 3, 2)])
def test_a_rank_works_on_no_more_tasks_than_a_step_has(tasks: int, at_once: object, together: int) -> None:
    own = [f"outer.tasks={tasks}", f"outer.tasks_at_once={at_once}"]
    assert load(ROOT / "recipes/smoke.yaml", own).outer.together == together


def test_ctrl_c_before_the_loop_is_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mass import console, train

    def follow(order: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "follow", follow)
    with pytest.raises(SystemExit) as caught:
        console.train([str(ROOT / "recipes/smoke.yaml")])
    assert caught.value.code == 130 and capsys.readouterr().err == "mass-train: interrupted\n"


@pytest.mark.parametrize(("name", "module"), [("adapt", "command"), ("evaluate", "evaluate")])
def test_commands_import_without_a_collector_and_have_one_afterwards(
    name: str, module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mass import console

    own, frozen = importlib.import_module(f"mass.{module}"), gc.get_freeze_count()
    seen: list[bool] = []
    monkeypatch.setattr(gc, "disable", lambda: seen.append(gc.isenabled()))
    try:
        monkeypatch.setattr(own, "main", lambda argv: seen.append(gc.isenabled()) or 2)
        assert getattr(console, name)(["x"]) == 2 and seen == [True, True]
        assert gc.get_freeze_count() > frozen
    finally:
        gc.unfreeze()

    def main(argv: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(own, "main", main)
    with pytest.raises(SystemExit) as caught:
        getattr(console, name)([])
    assert caught.value.code == 130
    assert capsys.readouterr().err.endswith(f"mass-{'adapt' if name == 'adapt' else 'eval'}: interrupted\n")
    gc.unfreeze()
