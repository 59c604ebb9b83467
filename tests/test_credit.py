"""mass.credit in float64: leaving out, the one-step guess and the smoothness of the way, each made again by other means."""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from steps import SGD, make_world, tasks
from tiny import ExactRMSNorm
from torch import Tensor

from mass import credit, episode, lora, prepare, scorer
from mass.credit import After
from mass.distributed import World
from mass.forward import example_loss, loss_and_grad
from mass.lora import Adapter, expand
from mass.outer_loss import outer_loss
from mass.practice import Practice, pack_examples
from mass.problems import Task
from mass.recipe import load
from mass.setting import Setting, TaskBatch, task_batch
from mass.splits import Cursor

ROOT = Path(__file__).parent.parent
T, N = 3, 5


class Made(NamedTuple):
    setting: Setting
    tasks: list[Task]
    practice: Practice
    policy: Adapter
    score_TN: Tensor

    def batch(self, practice: Practice | None = None) -> TaskBatch:
        return task_batch(self.setting, self.tasks, practice or self.practice, self.policy, {}, credit.STEP)


@pytest.fixture(scope="module")
def made() -> Made:
    """Three targets of the families world with five examples, of which one is malformed; a policy that has moved."""
    overrides = [
        f"model.path={ROOT}/tests/data/families",
        f"outer.tasks={T}",
        f"generate.examples={N}",
        "inner.lr=1",
    ]
    recipe = load(ROOT / "recipes/families.yaml", overrides)
    tasks, _, pool = prepare.tasks_of(recipe)
    setting, _ = prepare.make_setting(recipe, World(0, 1, torch.device("cpu")), pool, None)
    hf = setting.lm.hf.double()
    for name, module in list(hf.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            hf.set_submodule(name, ExactRMSNorm(module.weight, 0.0, module.variance_epsilon))
    generator = torch.Generator().manual_seed(0)
    policy = {
        key: (x + 0.02 * torch.randn(x.shape, generator=generator)).double()
        for key, x in lora.fresh(setting.lm.lora, recipe.lora.rank, generator).items()
    }
    some = Cursor(tasks, 0).next(T)
    eta = {key: p.detach() for key, p in setting.head.named_parameters()}
    practice = episode.run(setting, some, credit.STEP, policy, eta, {}).practice
    practice = without(setting, practice, 1, 2)
    score_TN = torch.randn(T, N, generator=generator, dtype=torch.float64)
    return Made(setting, some, practice, policy, score_TN)


def without(setting: Setting, practice: Practice, task: int, number: int) -> Practice:
    """The batch written anew, with one example malformed."""
    examples = [
        [replace(e, valid=e.valid and (t, i) != (task, number)) for i, e in enumerate(own)]
        for t, own in enumerate(practice.examples)
    ]
    packed, valid_TN = pack_examples(setting.lm, setting.prompts, examples, [[]] * len(examples))
    return replace(practice, examples=examples, packed=packed, valid_TN=valid_TN)


def loss(made: Made, score_TN: Tensor, practice: Practice | None = None) -> Tensor:
    """Outer loss of each task after the update."""
    practice = practice or made.practice
    weight_TN = scorer.weights(score_TN, practice.valid_TN, made.setting.recipe.scorer.temperature)
    return credit.update(made.batch(practice), weight_TN).loss_T


def test_leaving_an_example_out_is_to_fine_tune_without_it(made: Made) -> None:
    setting, practice, score_TN = made.setting, made.practice, made.score_TN
    change_TN, whole = credit.left_out(made.batch(), score_TN)
    assert torch.equal(whole.loss_T, loss(made, score_TN))
    assert torch.equal(torch.isnan(change_TN), ~practice.valid_TN) and practice.valid_TN.sum() >= T * N - 3
    for t, i in ((0, 3), (1, 0), (2, 4)):
        assert practice.valid_TN[t, i]
        less = loss(made, score_TN, without(setting, practice, t, i))
        assert change_TN[t, i].item() == pytest.approx((less - whole.loss_T)[t].item(), rel=1e-9)
    # other weights, other truth
    other_TN, _ = credit.left_out(made.batch(), torch.zeros_like(score_TN))
    assert (other_TN - change_TN).nan_to_num().abs().max() > 0.01 * change_TN.nan_to_num().abs().max()


def test_a_task_whose_only_example_goes_stays_as_it_was(made: Made) -> None:
    practice, score_TN = made.practice, made.score_TN
    for i in range(N - 1):
        practice = without(made.setting, practice, 0, i)
    assert practice.valid_TN[0].tolist() == [False] * (N - 1) + [True]
    batch = made.batch(practice)
    change_TN, whole = credit.left_out(batch, score_TN)
    _, before_T = credit.one_step(batch)
    assert change_TN[0, N - 1].item() == pytest.approx((before_T - whole.loss_T)[0].item(), rel=1e-12)
    # a single example has weight 1 whatever its score
    smooth = credit.smoothness(batch, score_TN, whole)
    assert smooth.agreement_T[0].isnan() and not smooth.agreement_T[1:].isnan().any()


def test_the_credit_is_the_derivative_of_the_loss_that_is_left_out_of(made: Made) -> None:
    """The whole chain that the report compares, by central differences of the very function that makes the truth."""
    setting, tasks, practice, policy, _ = made
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        eta = {key: 0.3 * torch.randn_like(p) for key, p in setting.head.named_parameters()}
    gold = replace(
        setting, recipe=replace(setting.recipe, scorer=replace(setting.recipe.scorer, temperature=2.0))
    )
    at = made._replace(setting=gold)
    result = episode.run(gold, tasks, credit.STEP, policy, eta, {}, practice=practice)
    # the weights say what the scores are, up to a shift
    score_TN = torch.where(practice.valid_TN, 2.0 * result.weight_TN.double().log(), 0.0)
    assert (result.weight_TN > 0).sum(1).min() > 1 and result.weight_TN.std() > 0.1
    h = 1e-4
    for i in (0, 2, 4):
        up_TN, down_TN = score_TN.clone(), score_TN.clone()
        up_TN[:, i] += h
        down_TN[:, i] -= h
        found_T = (loss(at, up_TN) - loss(at, down_TN)) / (2 * h)
        torch.testing.assert_close(-result.credit_TN[:, i].double(), found_T, rtol=1e-4, atol=1e-8)


def test_the_one_step_guess_is_a_product_of_two_gradients(made: Made) -> None:
    setting, tasks, practice, policy, _ = made
    start = expand(policy, T)
    before = outer_loss(setting, tasks, [[]] * T, start, credit.STEP, "before")
    dot_TN, before_T = credit.one_step(made.batch())
    assert torch.equal(before_T, before.loss_T)
    for i in range(N):

        def own(logprob_M: Tensor, i: int = i) -> Tensor:
            return example_loss(practice.packed, logprob_M)[:, i].sum()

        grad = loss_and_grad(setting.lm.hf, setting.lm.lora, practice.packed, start, own)[2]
        want_T = torch.stack([(grad[key] * before.grad[key]).flatten(1).sum(1) for key in grad]).sum(0)
        torch.testing.assert_close(dot_TN[:, i], want_T, rtol=1e-9, atol=1e-12)


def test_the_one_step_guess_by_one_sided_differences(made: Made) -> None:
    want_TN, _ = credit.one_step(made.batch())
    r = made.setting.recipe
    recipe = replace(r, meta_gradient=replace(r.meta_gradient, mode="finite_difference", one_sided=True))
    rough = made._replace(setting=replace(made.setting, recipe=recipe, engine="finite_difference"))
    got_TN, _ = credit.one_step(rough.batch())
    torch.testing.assert_close(got_TN, want_TN, rtol=1e-4, atol=1e-5 * want_TN.abs().max().item())


def test_the_credit_is_measured_with_the_shots_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    world = make_world(monkeypatch, *SGD, "prompt.solve_shots=2")
    targets = tasks()
    pool = [replace(task, problem=replace(task.problem, id=f"shot {i}")) for i, task in enumerate(targets)]
    world = replace(world, setting=replace(world.setting, pool=pool))
    batch = task_batch(world.setting, targets, world.practice, world.policy, {}, credit.STEP)
    before = world.run(practice=world.practice).metrics["meta/loss_before"]
    assert credit.one_step(batch)[1].mean().item() == pytest.approx(before, rel=1e-9)
    bare = replace(batch, solve_shots=[[] for _ in targets])
    assert credit.one_step(bare)[1].mean().item() != pytest.approx(before, rel=1e-3)


def test_smoothness_by_hand(made: Made) -> None:
    setting, practice, policy, score_TN = made.setting, made.practice, made.policy, made.score_TN
    batch = made.batch()
    weights = [
        scorer.weights(score_TN, practice.valid_TN, setting.recipe.scorer.temperature),
    ]
    whole = credit.update(batch, weights[0])
    found = credit.smoothness(batch, score_TN, whole, reach=0.2)
    again = credit.smoothness(batch, score_TN, whole, reach=0.2)
    assert torch.equal(found.direction_TN, again.direction_TN) and found.direction_TN.std() > 0.5
    for k in (1, 2):
        moved_TN = score_TN + 0.2 * k * found.direction_TN
        weights.append(scorer.weights(moved_TN, practice.valid_TN, setting.recipe.scorer.temperature))
    at = [credit.update(batch, w) for w in weights]
    f = np.stack([x.loss_T.numpy() for x in at])
    A = np.stack([np.concatenate([x.adapter[key].flatten(1).numpy() for key in policy], 1) for x in at])
    assert found.moved_T.numpy() == pytest.approx((f[1] - f[0]) / 0.2)
    assert found.curvature_T.numpy() == pytest.approx(np.abs(f[2] - 2 * f[1] + f[0]) / 0.04, rel=1e-6)
    d = np.abs(A[2] - A[0])
    agree = np.sign(A[1] - A[0]) * np.sign(A[2] - A[1])
    assert found.agreement_T.numpy() == pytest.approx((d * agree).sum(1) / d.sum(1))
    assert (found.agreement_T > 0.8).all() and (found.agreement_T < 1).all()


def test_what_is_straight_is_smooth_and_what_turns_back_is_not(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter of two numbers that a kink turns back on one side of the way, for each of the tasks."""
    zero_TN = torch.zeros(T, N, dtype=torch.float64)
    seen: list[Tensor] = []

    def update(_: Any, weight_TN: Tensor) -> After:
        """In place of the inner loop: k-th call, the adapter's numbers at k h."""
        k = len(seen)
        seen.append(weight_TN)
        straight, kink = 3.0 * k, -1.0 * min(k, 2 - k)
        place = torch.tensor([[[straight, kink]], [[straight, 0.0]], [[0.0, kink]]], dtype=torch.float64)
        # 2 k: a slope of 20 over h = 0.1; k^2: D goes from 10 to 30
        loss_T = torch.tensor([2.0 * k, 1.0, k**2], dtype=torch.float64)
        return After(loss_T, torch.zeros(T, dtype=torch.bool), {"x": place})

    monkeypatch.setattr(credit, "update", update)
    batch = made.batch()
    found = credit.smoothness(batch, zero_TN, update(None, zero_TN))
    # the kink's number ends where it began: d gives it no say, and where it is alone nothing has moved
    assert found.agreement_T[:2].tolist() == [1.0, 1.0] and found.agreement_T[2].isnan()
    assert found.moved_T.tolist() == pytest.approx([20.0, 0.0, 10.0])
    assert found.curvature_T.tolist() == pytest.approx([0.0, 0.0, 200.0])
    assert len(seen) == 3 and all((w.sum(1) - N).abs().max() < 1e-6 for w in seen[1:])

    def turned(_: Any, weight_TN: Tensor) -> After:
        at = (0.0, 1.0, -2.0)[len(seen)]
        seen.append(weight_TN)
        return After(torch.zeros(T), torch.zeros(T, dtype=torch.bool), {"x": torch.full((T, 1, 1), at)})

    seen.clear()
    monkeypatch.setattr(credit, "update", turned)
    found = credit.smoothness(batch, zero_TN, turned(None, zero_TN))
    assert found.agreement_T.tolist() == [-1.0] * T


def test_rank_correlation() -> None:
    x, y = torch.tensor([1.0, 2.0, 3.0, 10.0]), torch.tensor([0.1, 0.3, 0.2, 0.2])
    assert credit.rank_correlation(x, y) == pytest.approx(spearmanr(x, y).statistic)
    assert credit.rank_correlation(x, x**3) == pytest.approx(1) == -credit.rank_correlation(x, -x)
    for a, b in ((x[:2], y[:2]), (x, torch.ones(4)), (torch.zeros(4), y)):
        assert np.isnan(credit.rank_correlation(a, b))
