"""Training without an inner loop (inner.steps=0): its gradient against autograd of the plain loss, that it learns, and whole runs."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks
from runs import log_of, step_of, tensors
from tiny import tiny_lm
from torch import Tensor

from mass import accumulate, blocks, heldout, lora, outer_loss, plan, prepare, train
from mass import setting as setting_module
from mass.episode import Result
from mass.errors import MassError
from mass.generate import Rollout
from mass.lora import using
from mass.methods import solve
from mass.optimizers import Rule
from mass.problems import Problem, Task
from mass.prompts import make_prompts
from mass.recipe import load
from mass.rewards import Verdict
from mass.scorer import Scorer
from mass.setting import Setting

TASKS = [
    Task(Problem(f"p{i}", text), answer, f"{text} {answer}\nAnswer: {answer}", "t", "numeric")
    for i, (text, answer) in enumerate([("3 + 4 =", "7"), ("9 - 4 =", "5"), ("2 + 2 =", "4")])
]
# answers of each task, and what each is worth
DRAWN = [["Answer: 7", "7", "8 is it"], ["5", "4", "Answer: 5"], ["4", "Answer: 4", "four"]]
REWARD = [[1.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.5, 1.0, 0.0]]


class FixedVerifier:
    def verify_all(self, items: Any) -> list[Verdict]:
        worth = {(t, text): r for t in range(3) for text, r in zip(DRAWN[t], REWARD[t], strict=True)}
        return [Verdict(worth[int(task.problem.id[1]), text], "right") for text, task in items]


def make(tmp_path: Path, *overrides: str) -> tuple[Setting, dict[str, Tensor], dict[str, Tensor]]:
    """A setting, a policy away from the base model, and the scorer's parameters, in float64."""
    file = tmp_path / "r.yaml"
    file.write_text("model: {path: tiny:llama}\nproblems: {train: 'gym:chain_sum'}\n")
    few = ["inner.steps=0", "prompt.generate_shots=0", "prompt.pool=0", "outer.rollouts=3"]
    recipe = load(file, [*few, *overrides])
    lm = tiny_lm("llama", torch.float64, targets=("q_proj", "v_proj", "down_proj"))
    generator = torch.Generator().manual_seed(7)
    policy = {
        key: 0.2 * torch.randn(x.shape, dtype=torch.float64, generator=generator)
        for key, x in lora.fresh(lm.lora, 2, generator, torch.float64).items()
    }
    head = Scorer(64, 2, 8).double()
    setting = Setting(
        recipe, lm, blocks.split(lm.hf, lm.lora), prepare.NO_ENGINE, True, "inner.checkpoint=true" in overrides, "",
        make_prompts(lm.tokenizer, "plain", None, None), [], FixedVerifier(), Rule("sgd"), head,
    )  # type: ignore[arg-type] # fmt: skip
    return setting, policy, {key: p.detach() for key, p in head.named_parameters()}


def step(setting: Setting, policy: Mapping[str, Tensor], eta: Mapping[str, Tensor], **more: Any) -> Result:
    return accumulate.run(setting, TASKS, 0, dict(policy), eta, {}, **{"at_once": None} | more)


def given_answers(monkeypatch: pytest.MonkeyPatch, setting: Setting) -> list[list[list[int]]]:
    """Instead of sampling, DRAWN; returns its tokens."""
    encode = setting.lm.tokenizer.encode
    drawn = [[encode(text, add_special_tokens=False) for text in own] for own in DRAWN]

    def answer(lm: Any, prompts: Any, targets: list[str], **_: Any) -> list[list[Rollout]]:
        where = [next(t for t, task in enumerate(TASKS) if task.problem.text == text) for text in targets]
        return [
            [Rollout(x, [0.0] * len(x), True, text) for x, text in zip(drawn[t], DRAWN[t], strict=True)]
            for t in where
        ]

    monkeypatch.setattr(outer_loss, "answer", answer)
    return drawn


def rows(setting: Setting, text: str, target: list[int], adapter: Mapping[str, Tensor] | None) -> Tensor:
    """log p of the whole vocabulary at each target token, by the whole model on one sequence."""
    asked = setting.prompts.solve(text)
    own = None if adapter is None else {key: x.unsqueeze(0) for key, x in adapter.items()}
    with using(setting.lm.lora, own):
        logits = setting.lm.hf(input_ids=torch.tensor([asked + target]), use_cache=False).logits[0]
    return logits[len(asked) - 1 : -1].log_softmax(-1)


def logprobs(setting: Setting, text: str, target: list[int], adapter: Mapping[str, Tensor] | None) -> Tensor:
    """log p of each target token."""
    return rows(setting, text, target, adapter)[torch.arange(len(target)), torch.tensor(target)]


def close(found: Mapping[str, Tensor], loss: Tensor, leaf: Mapping[str, Tensor]) -> None:
    wanted = dict(zip(leaf, torch.autograd.grad(loss, list(leaf.values())), strict=True))
    scale = max(g.abs().max().item() for g in wanted.values())
    assert scale > 1e-3
    for key, g in wanted.items():
        torch.testing.assert_close(found[f"policy/{key}"], g, rtol=1e-5, atol=1e-7 * scale)


@pytest.mark.parametrize("checkpoint", ["false", "true"])
def test_gold_is_the_gradient_of_the_reference_solutions(tmp_path: Path, checkpoint: str) -> None:
    setting, policy, eta = make(tmp_path, f"inner.checkpoint={checkpoint}", "outer.gamma=0.3")
    leaf = {key: x.clone().requires_grad_() for key, x in policy.items()}
    losses = [
        -logprobs(setting, t.problem.text, setting.prompts.solution(t.solution), leaf).mean() for t in TASKS
    ]
    result = step(setting, policy, eta)
    loss = torch.stack(losses).mean()
    # the coefficient is 1, whatever gamma is
    close(result.gradients, loss, leaf)
    assert result.metrics["meta/loss_before"] == pytest.approx(loss.item())
    assert all((result.gradients[f"scorer/{key}"] == 0).all() for key in eta)
    parts = step(setting, policy, eta, at_once=2)
    for key, g in result.gradients.items():
        torch.testing.assert_close(parts.gradients[key], g, rtol=1e-9, atol=1e-12)
    assert parts.metrics["tokens/outer"] == result.metrics["tokens/outer"] > 0


def test_gold_lowers_the_loss(tmp_path: Path) -> None:
    setting, policy, eta = make(tmp_path)
    seen = []
    for _ in range(8):
        result = step(setting, policy, eta)
        seen.append(result.metrics["meta/loss_before"])
        policy = {key: x - 0.1 * result.gradients[f"policy/{key}"] for key, x in policy.items()}
    assert all(after < before for before, after in zip(seen, seen[1:], strict=False))
    assert seen[-1] < seen[0] - 0.3


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_verifier_is_grpo_with_a_divergence_from_the_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, beta: float
) -> None:
    setting, policy, eta = make(tmp_path, "outer.loss=verifier", f"outer.beta={beta}")
    drawn = given_answers(monkeypatch, setting)
    leaf = {key: x.clone().requires_grad_() for key, x in policy.items()}
    total, divergence = torch.zeros((), dtype=torch.float64), 0.0
    for t, task in enumerate(TASKS):
        r = torch.tensor(REWARD[t], dtype=torch.float64)
        advantage = (r - r.mean()) / r.std()
        for j, tokens in enumerate(drawn[t]):
            ours = logprobs(setting, task.problem.text, tokens, leaf)
            whole = rows(setting, task.problem.text, tokens, leaf)
            with torch.no_grad():
                base = rows(setting, task.problem.text, tokens, None)
            kl = (whole.exp() * (whole - base)).sum(1).mean()
            total = total + (-advantage[j] * ours.mean() + beta * kl) / 9
            divergence += kl.item() / 9
    result = step(setting, policy, eta)
    close(result.gradients, total, leaf)
    assert result.metrics["reward/solve_before"] == pytest.approx(sum(map(sum, REWARD)) / 9)
    if beta:
        assert result.metrics["policy/kl"] == pytest.approx(divergence) and divergence > 1e-3
    else:
        assert "policy/kl" not in result.metrics
        # rewards without a difference teach nothing
        monkeypatch.setattr(
            FixedVerifier, "verify_all", lambda self, items: [Verdict(1.0, "right")] * len(items)
        )
        assert all((g == 0).all() for g in step(setting, policy, eta).gradients.values())


def test_held_out_problems_are_answered_without_update_alone(tmp_path: Path) -> None:
    setting, policy, eta = make(tmp_path, "generate.answer_tokens=6")
    kit = setting_module.kit(setting, {key: x.float() for key, x in policy.items()}, eta, {})
    verifier: Any = dataclasses.make_dataclass("V", [])()
    verifier.verify = lambda solution, task: Verdict(float(task.problem.id == "p1"), "right")
    found = heldout.evaluate(kit, TASKS, {"t"}, verifier, batch=2)
    assert set(found) == {"heldout/none", "heldout/failures", "time/evaluate"} and found[
        "heldout/none"
    ] == pytest.approx(1 / 3)
    for method in ("quest", "mass", "ttrl"):
        with pytest.raises(
            MassError, match=f"{method} updates, and inner.steps=0 .* inner.steps=1 or more, or .*none"
        ):
            solve(kit, [TASKS[0].problem], method)


def test_what_has_no_meaning_without_an_inner_loop_is_refused(tmp_path: Path) -> None:
    for bad, words in (
        ("inner.learned_lr=one", "inner.learned_lr=one with inner.steps=0"),
        ("outer.through_init=true", "outer.through_init=true with inner.steps=0"),
        ("outer.lr_policy=0", "only the policy is trained"),
        ("meta_gradient.truncate=1", "truncate=1 is more than inner.steps=0"),
    ):
        with pytest.raises(MassError, match=words):
            make(tmp_path, bad)
    # one example makes a scorer without gradient, and here there is none to train
    setting, _, _ = make(tmp_path, "generate.examples=1")
    with pytest.raises(MassError, match="--probe looks at an inner loop"):
        train.look(setting.recipe, 2)


def test_a_plan_has_the_outer_loss_alone(tmp_path: Path) -> None:
    made = {
        name: plan.make(make(tmp_path, *more)[0].recipe, 2, ["reverse"])
        for name, more in {
            "gold": [],
            "verifier": ["outer.loss=verifier", "zero.stage=3"],
            "loop": ["inner.steps=1"],
        }.items()
    }
    gold, loop = made["gold"], made["loop"]
    assert list(gold.engines) == [plan.NO_LOOP] and gold.engines[plan.NO_LOOP].sweep == 0
    assert gold.total(plan.NO_LOOP) < loop.total("reverse") and sum(gold.flops.values()) < sum(
        loop.flops.values()
    )
    # one answer a task at most, and no examples
    assert gold.generating["KV cache"] < 0.5 * loop.generating["KV cache"]
    assert gold.flops["generate"] == 0 < made["verifier"].flops["generate"]
    assert made["verifier"].sent["base, gathered"] > 0
    assert plan.report(make(tmp_path)[0].recipe, 1, 80.0).endswith("It fits.")
    # forward and backward through all of it, and through the blocks once more for what was not kept; with a divergence the base's
    # forward, and back through the head once more
    for part, *more in (["outer loss", "outer.loss=verifier"], ["policy gradient", "inner.steps=1"]):
        without, held = (
            plan._flops(make(tmp_path, *more, f"outer.beta={beta}")[0].recipe, 100, 10)[part]
            for beta in (0, 1)
        )
        assert held / without == pytest.approx((3 * 110 + 100 + 10) / (2 * 110 + 100))


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("loss", ["gold", "verifier"])
def test_runs_on_two_ranks_and_in_two_parts_are_the_whole_run(
    ranks: Ranks, recipe: Path, tmp_path: Path, loss: str
) -> None:
    own = [str(recipe), f"run.folder={tmp_path}", "inner.steps=0", f"outer.loss={loss}", "outer.steps=2"]
    own += ["outer.lr_policy=1e-3", "evaluate.every=2", "evaluate.problems=4", "generate.temperature=1.4"]
    one = [
        [*own, "run.name=whole", "outer.tasks=4"],
        [*own, "run.name=part", "outer.tasks=4", "outer.steps=1"],
    ]
    one += [[*own, "run.name=part", "outer.tasks=4", "run.resume=auto"]]
    done = ranks("runs:many", one).good()
    ranks("runs:many", [[*own, "run.name=two", "outer.tasks=2"]], world=2).good()
    whole, part, two = (tensors(step_of(tmp_path / name, 2)) for name in ("whole", "part", "two"))
    first = tensors(step_of(tmp_path / "whole", 1))
    moved = 0.0
    for key, x in whole.items():
        assert torch.equal(x, part[key])
        # Adam's first steps make a sign of rounding where a gradient is nothing else
        torch.testing.assert_close(x, two[key], rtol=1e-3, atol=2e-5)
        if key.startswith("scorer"):
            assert torch.equal(x, first[key])
        if key.startswith("policy"):
            moved = max(moved, (x - first[key]).abs().max().item())
    assert moved > 1e-4
    log = log_of(tmp_path / "whole")
    assert "heldout/none" in log[0] and "heldout/none" in log[2]
    assert not [x for line in log for x in line.values() if x is None]
    absent = (
        "inner/",
        "scorer/",
        "credit/",
        "generator/",
        "heldout/mass",
        "heldout/gain",
        "meta/gain",
        "meta/exploded",
    )
    assert not [
        tag
        for line in log
        for tag in line
        if tag.startswith(absent) or tag in ("meta/loss", "outer/lr_scorer")
    ]
    said = done.out[0]
    assert f"no inner loop (inner.steps=0): outer.loss={loss} trains the policy alone" in said
    assert "nan" not in said and "self-made" not in said
    table = json.loads((tmp_path / "whole" / "samples.jsonl").read_text().splitlines()[0])
    assert table["rows"] == [] and table["answer_after"] is None
    # a meta-training may begin with what was trained so, and then chooses an engine
    more = [*own[:2], "run.name=whole", "outer.tasks=4", "outer.steps=3", "run.resume=auto", "inner.steps=1"]
    later = ranks("mass.console:train", [*more, "outer.loss=gold"]).good().out[0]
    assert "meta-gradient: reverse, K = 1" in later
