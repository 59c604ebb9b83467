"""The arms of an evaluation: what runs with which settings, and those that cannot be."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from folders import SHOTS, make_run

from mass import arms, chooser
from mass.choices import leave_one_out, teacher_made, training_problems
from mass.chooser import Chooser
from mass.errors import MassError
from mass.methods import AUTO, METHODS
from mass.wanted import plan


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs"), "r")


def test_arms_say_what_runs_with_which_settings(run: Path) -> None:
    wanted = plan(str(run), None, ["inner.clip=0.2"])
    text = f"none, mass[inner.steps=1,scorer.layers=[0.5,1.0],budget=500],base:quest,{run}/step_000001:vote"
    with pytest.raises(MassError, match=r"arm mass\[.*scorer.layers"):
        arms.parse(text, wanted, ["inner.clip=0.2"], (str(run), None))
    text = text.replace("scorer.layers=[0.5,1.0],", "model.attention=sdpa,")
    none, mass, bare, other = arms.parse(text, wanted, ["inner.clip=0.2"], (str(run), None))
    assert (none.method, mass.method, bare.method, other.method) == ("none", "mass", "quest", "vote")
    assert (mass.plan.recipe.inner.steps, mass.plan.budget, none.plan.budget) == (1, 500, None)
    assert {arm.plan.recipe.inner.clip for arm in (none, mass, bare, other)} == {0.2}
    assert bare.bare and not none.bare and other.plan.step == run / "step_000001"
    assert len({arm.key for arm in (none, mass, bare, other)}) == 4
    assert len({arm.file for arm in (none, mass, bare, other)}) == 4 and none.file == "none.jsonl"
    assert all("/" not in arm.file and not arm.file.startswith(".") for arm in (mass, bare, other))


def test_arms_that_cannot_be_are_named(run: Path, tmp_path: Path) -> None:
    wanted = plan(str(run), None)
    cases = [
        ("quets", "arm quets: method 'quets': did you mean quest?"),
        ("none,none", "the arm none twice"),
        (",", "names no arm"),
        ("mass]", r"arm mass\]: an arm is METHOD"),
        ("mass[problems.size=3]", "all arms answer the same problems"),
        (
            "mass[inner.stepz=3]",
            r"arm mass\[inner.stepz=3\]: (.|\n)*inner.stepz: unknown key. Did you mean inner.steps",
        ),
        ("random", "random draws training problems, and there are none here"),
        ("base:mass", "arm base:mass: method mass weighs by a trained scorer"),
        (f"{tmp_path}/nowhere:mass", "there is no such folder"),
        ("vote[budget=3]", "a budget of 3 is less than generate.answer_tokens=48"),
        ("vote[budget=many]", "a number of tokens"),
        ("ttrl[guard.restore=0.1]", r"arm ttrl\[guard.restore=0.1\]: method ttrl is no fine-tuning"),
        ("base:ttrl[guard.restore=0.1]", "arm base:ttrl.*: method ttrl is no fine-tuning"),
    ]
    for text, sentence in cases:
        with pytest.raises(MassError, match=sentence):
            arms.parse(text, wanted, [], (str(run), None))


def test_every_usable_arm_and_why_the_others_are_not(run: Path) -> None:
    usable, reasons = arms.every_usable(plan(str(run), None), [])
    # nothing to draw from, no demonstrations, no teacher
    absent = (training_problems, leave_one_out, teacher_made)
    left_out = [name for name, row in METHODS.items() if row.examples in absent] + [AUTO]
    assert [arm.name for arm in usable] == [name for name in METHODS if name not in left_out]
    assert [reason.partition(" ")[0] for reason in reasons] == left_out
    assert {"random", "ttt", "tt-d"} <= set(left_out) and not {"mass", "none"} & set(left_out)


def test_what_the_settings_forbid_is_left_out_and_refused(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "r")
    (copy / "shots.jsonl").write_text("".join(json.dumps(shot) + "\n" for shot in SHOTS))
    flat = {"none": (0.0,) * 5}
    chooser.save(Chooser(60, 4, 10, (0.0,) * 4, (1.0,) * 4, flat, {"none": 0.5}), copy)
    own = ["generate.examples=5", "guard.restore=0.1"]
    wanted = replace(plan(str(copy), None, own), budget=100)
    usable, reasons = arms.every_usable(wanted, [])
    assert "random" in [arm.name for arm in usable], "a budget takes what there is"
    assert any(x.startswith("auto is left out: ") and "--budget 60, not 100" in x for x in reasons)
    wanted = replace(wanted, budget=None)
    usable, reasons = arms.every_usable(wanted, [])
    assert not {"random", "ttrl"} & {arm.name for arm in usable} and "auto" in [arm.name for arm in usable]
    assert any(x.startswith("random is left out: ") and "and 4 are set aside" in x for x in reasons)
    assert any(x.startswith("ttrl is left out: ") and "leave guard.* out" in x for x in reasons)
    for name in ("random", "base:random"):
        with pytest.raises(MassError, match=f"arm {name}: method random draws generate.examples=5"):
            arms.parse(name, wanted, own, (str(copy), None))
