"""The probe: what it says of a sound setting, and which fault it names where there is one."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from chain import save_chain, save_problems

from mass import lora, metrics, prepare, probe
from mass.distributed import World
from mass.problems import Task
from mass.recipe import load
from mass.setting import Setting
from mass.splits import Cursor

ROOT = Path(__file__).parent.parent
HERE = World(0, 1, torch.device("cpu"))


def open_recipe(name: str, *overrides: str) -> tuple[Setting, list[Task], Any, Any]:
    """What `probe` takes, for the first 8 tasks of a recipe."""
    recipe = load(ROOT / f"recipes/{name}.yaml", ["outer.tasks=8", *overrides])
    tasks, _, pool = prepare.tasks_of(recipe)
    setting, _ = prepare.make_setting(recipe, HERE, pool, None)
    policy = lora.fresh(setting.lm.lora, recipe.lora.rank, torch.Generator().manual_seed(0))
    eta = {key: p.detach().clone() for key, p in setting.head.named_parameters()}
    return setting, Cursor(tasks, 0).next(16), policy, eta


@pytest.fixture(scope="module")
def families() -> Iterator[tuple[Setting, list[Task], Any, Any]]:
    yield open_recipe("families", f"model.path={ROOT}/tests/data/families")


@pytest.fixture(scope="module")
def report(families: tuple[Setting, list[Task], Any, Any]) -> probe.Report:
    return probe.probe(*families)


def test_a_sound_setting_looks_sound(report: probe.Report) -> None:
    assert (report.tasks, report.examples, report.judged) == (16, 8, "truth")
    assert 0.1 < report.right < 0.45
    assert report.credit_auc > 0.97 and report.feature_auc > 0.85
    assert report.exact > 0.85 and report.exact > report.one_step
    assert 0 < report.credit_median < report.credit_max and report.flat == 0


def test_the_window_of_the_inner_rate(report: probe.Report, families: Any) -> None:
    lr = families[0].recipe.inner.lr
    assert [x.lr for x in report.rates] == pytest.approx([lr * 10 ** (k / 2) for k in range(-3, 4)])
    tiny, _, _, middle, _, _, huge = report.rates
    assert tiny.uniform == pytest.approx(tiny.before, rel=0.02) and tiny.right < tiny.before
    assert middle.right < 0.5 * middle.before and middle.exploded < 0.3
    assert huge.exploded > 0.7 and huge.uniform > huge.before
    # no pool, no solved problems to update on
    assert all(x.before == tiny.before and x.solved != x.solved for x in report.rates)
    said = next(line for line in report.lines if line.startswith("at least half"))
    low, high = (float(word) for word in said.partition("from ")[2].split(" to "))
    assert low <= lr <= high < report.rates[-1].lr


def test_a_credit_that_does_not_know_right_from_wrong_shows(
    families: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The truth shuffled: neither the credit nor the features can tell."""
    whole = metrics.known_truth
    generator = torch.Generator().manual_seed(0)

    def shuffled(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        good_TN, known_TN = whole(*arguments)
        return torch.rand(good_TN.shape, generator=generator) < 0.5, known_TN

    monkeypatch.setattr(metrics, "known_truth", shuffled)
    monkeypatch.setattr(probe, "RATES", ())
    monkeypatch.setattr(probe, "_leave_one_out", lambda *_: (0.0, 0.0))
    report = probe.probe(*families)
    assert 0.35 < report.credit_auc < 0.65 and report.feature_auc < 0.7


def test_without_a_truth_the_verifier_judges_own_answers(tmp_path: Path) -> None:
    overrides = [
        f"model.path={save_chain(tmp_path / 'chain')}",
        f"problems.train={save_problems(tmp_path / 'p.jsonl')}",
    ]
    setting, tasks, policy, eta = open_recipe(
        "smoke",
        *overrides,
        "generate.answer_tokens=8",
        "inner.checkpoint=false",
        "meta_gradient.mode=reverse",
    )
    said: list[str] = []
    report = probe.probe(setting, tasks[:8], policy, eta, said.append)
    assert report.judged == "verifier" and 0 < report.right < 1
    assert 0 <= report.credit_auc <= 1 and "own answers, by the verifier" in " ".join(report.lines)
    assert any("own answers" in text for text in said)
    assert all(x.right != x.right and x.auc != x.auc for x in report.rates)
    tiny, *_, huge = report.rates
    assert len(setting.pool) > report.examples and tiny.solved < tiny.before < huge.solved
    # with uniform weights alone it is their loss that the window is about
    assert any(line.startswith(("at least half", "no rate")) for line in report.lines)


def test_an_update_on_solved_problems_shows_the_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the families world solved problems of other families teach no target its method: right examples do, and by far more."""
    setting, tasks, policy, eta = open_recipe(
        "families", f"model.path={ROOT}/tests/data/families", "prompt.pool=64"
    )
    monkeypatch.setattr(probe, "RATES", (1.0,))
    monkeypatch.setattr(probe, "_leave_one_out", lambda *_: (0.0, 0.0))
    (x,) = probe.probe(setting, tasks, policy, eta).rates
    assert x.right < 0.5 * x.before < x.solved < 2 * x.before
    own = probe._solved_problems(setting, tasks[:2], policy, eta)
    assert (
        own is not None and own.valid_TN.all() and own.valid_TN.shape == (2, setting.recipe.generate.examples)
    )
    known = {(t.problem.text, t.solution) for t in setting.pool}
    assert all((e.problem, e.solution) in known for row in own.examples for e in row)


def test_the_probe_works_as_many_tasks_at_once_as_training_does(
    families: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting, *rest = families
    few = replace(setting.recipe.outer, tasks_at_once=4)
    setting = replace(setting, recipe=replace(setting.recipe, outer=few))
    whole, seen = probe.episode.run, []

    def run(setting: Setting, tasks: list[Task], *arguments: Any, **more: Any) -> Any:
        seen.append(len(tasks))
        return whole(setting, tasks, *arguments, **more)

    monkeypatch.setattr(probe.episode, "run", run)
    monkeypatch.setattr(probe, "RATES", ())
    monkeypatch.setattr(probe, "_leave_one_out", lambda *_: (0.0, 0.0))
    assert probe.probe(setting, *rest).tasks == 16
    assert seen == [4] * 4


def test_the_probe_leaves_everything_as_it_was(families: Any, report: probe.Report) -> None:
    setting, tasks, policy, eta = families
    assert setting.recipe.outer.lr_policy == 0 and setting.recipe.inner.lr == report.rates[3].lr
    assert all((eta[key] == p).all() for key, p in setting.head.named_parameters())
    assert all((x == 0).all() for key, x in policy.items() if key.endswith(".B"))
