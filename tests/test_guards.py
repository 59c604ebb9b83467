"""Guards of an update on a tiny random model: skipped examples, the Fisher pull, restored weights, held-out examples."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from handmade import PLAIN, SUMS

from mass import choices
from mass.choices import Kit, guards, updates, weights
from mass.errors import MassError
from mass.forward import example_loss, token_logprobs
from mass.lora import expand
from mass.optimizers import Rule
from mass.practice import Practice, pack_examples
from mass.prompts import Example
from mass.schema import Guard


@pytest.fixture
def practice(kit: Kit) -> Practice:
    said = ["Answer: 3", "Answer: 10", "zz zz", "Answer: 9"]
    own = [[Example(f"What is {i}?", text, True, "") for i, text in enumerate(said)] for _ in range(2)]
    own[1] = own[1][:2]
    packed, valid_TN = pack_examples(kit.lm, kit.prompts, own, [(), ()])
    return Practice([], [[], []], own, packed, valid_TN)


TWO = [PLAIN, SUMS]


def run(kit: Kit, practice: Practice, **guard: Any) -> Any:
    kit = replace(kit, guard=Guard(**guard))
    if kit.guard.fisher:
        kit = replace(kit, fisher=guards.fisher_information(kit))
    weight_TN = weights.uniform(kit, TWO, practice)
    return updates.fine_tuned(kit, TWO, practice, weight_TN.double())


def same(a: Any, b: Any) -> bool:
    return all(torch.allclose(x, b.adapter[key], rtol=1e-12, atol=0) for key, x in a.adapter.items())


def test_examples_over_a_loss_or_a_gradient_norm_are_skipped(kit: Kit, practice: Practice) -> None:
    plain = run(kit, practice)
    start = expand(choices.kit.beginning(kit), 2)
    loss = example_loss(practice.packed, token_logprobs(kit.lm.hf, kit.lm.lora, practice.packed, start))
    norm = guards.gradient_norms(kit, practice.packed, start)
    for t, n in ((0, 2), (1, 0)):
        alone = practice.packed.only(practice.packed.owner_M == 4 * t + n)
        leaf = {key: x.clone().requires_grad_() for key, x in start.items()}
        own = example_loss(alone, token_logprobs(kit.lm.hf, kit.lm.lora, alone, leaf)).sum()
        grads = torch.autograd.grad(own, list(leaf.values()))
        assert float(norm[t, n]) == pytest.approx(float(sum(g.square().sum() for g in grads) ** 0.5))
    for key, value in (("max_loss", loss), ("max_grad_norm", norm)):
        limit = float(value[0].sort().values[2:].mean())
        guarded = run(kit, practice, **{key: limit})
        keep = value <= limit
        weight_TN = guards.rescaled(weights.uniform(kit, TWO, practice).double(), keep & practice.valid_TN)
        assert weight_TN.sum(1).tolist() == pytest.approx([4, 4]) and (weight_TN[0] == 0).sum() == 1
        assert same(updates.fine_tuned(kit, TWO, practice, weight_TN), guarded) and not same(plain, guarded)
        assert guarded.notes[0] == "1 example skipped by a guard"
        assert same(run(kit, practice, **{key: 1e9}), plain)
    nothing = run(kit, practice, max_loss=1e-9)
    assert nothing.ok == [False, False] and nothing.losses == [[], []]


def test_fisher_pull(kit: Kit, practice: Practice) -> None:
    start = expand(choices.kit.beginning(kit), 1)
    information = guards.fisher_information(kit)
    key = next(k for k in information if k.endswith(".B"))
    total = torch.zeros_like(information[key])
    for task in kit.pool:
        packed, _ = pack_examples(
            kit.lm, kit.prompts, [[Example(task.problem.text, task.solution, True, "")]], [()]
        )
        leaf = {k: x.clone().requires_grad_() for k, x in start.items()}
        loss = example_loss(packed, token_logprobs(kit.lm.hf, kit.lm.lora, packed, leaf)).sum()
        total += torch.autograd.grad(loss, leaf[key])[0][0] ** 2 / len(kit.pool)
    assert torch.allclose(information[key], total, rtol=1e-9)
    plain, pulled = run(kit, practice), run(kit, practice, fisher=50.0)

    def far(updated: Any) -> float:
        gap = (updated.adapter[key] - start[key]).square() * information[key]
        return float(gap.sum())

    assert far(pulled) < far(plain)
    # at the start there is nothing to pull
    once = replace(kit, steps=1)
    assert same(run(once, practice), run(once, practice, fisher=50.0))
    with pytest.raises(MassError, match="guard.fisher takes the Fisher information of training problems"):
        guards.fisher_information(replace(kit, pool=()))


def test_stochastic_restore(kit: Kit, practice: Practice) -> None:
    start = expand(choices.kit.beginning(kit), 2)
    plain, all_back, some = (run(kit, practice, restore=x) for x in (0.0, 1.0, 0.4))
    assert all(torch.equal(x, start[key]) for key, x in all_back.adapter.items())
    key = next(k for k in start if k.endswith(".B"))
    share = (some.adapter[key] == start[key]).double().mean()
    assert 0.3 < float(share) < 0.5 and not (plain.adapter[key] == start[key]).any()
    # the draw is the problem's own
    alone = replace(practice, examples=practice.examples[:1])
    packed, valid = pack_examples(kit.lm, kit.prompts, alone.examples, [()])
    one = replace(alone, packed=packed, valid_TN=valid)
    guarded = replace(kit, guard=Guard(restore=0.4))
    own = updates.fine_tuned(guarded, TWO[:1], one, weights.uniform(kit, TWO[:1], one).double())
    assert torch.allclose(own.adapter[key][0], some.adapter[key][0], rtol=1e-9)


def test_held_out_examples_pick_the_step(kit: Kit, practice: Practice) -> None:
    assert guards.best_steps([[3.0, 1.0], [2.0, 1.0], [2.0, math.nan]]) == [1, 0]
    fast = {key: 40 * x for key, x in kit.lr.items()}
    wild = replace(kit, steps=4, rule=Rule("sgd", clip=5.0), lr=fast, max_growth=1e9)
    held = guards.hold_out(replace(wild, guard=Guard(heldout=0.3)), TWO, weights.uniform(kit, TWO, practice))
    assert held.sum(1).tolist() == [1, 1] and not (held & ~practice.valid_TN).any()
    guarded = run(wild, practice, heldout=0.3)
    weight = guards.rescaled(weights.uniform(kit, TWO, practice).double(), ~held)
    states = [expand(choices.kit.beginning(kit), 2)]
    for k in range(1, 5):
        states.append(updates.fine_tuned(replace(wild, steps=k), TWO, practice, weight).adapter)
    losses = [
        (
            example_loss(practice.packed, token_logprobs(kit.lm.hf, kit.lm.lora, practice.packed, x)) * held
        ).sum(1)
        for x in states
    ]
    best = torch.stack(losses).argmin(0).tolist()
    assert min(best) < 4
    for t, k in enumerate(best):
        assert all(torch.allclose(x[t], states[k][key][t], rtol=1e-9) for key, x in guarded.adapter.items())
        assert len(guarded.losses[t]) == k + 1 and guarded.ok[t] == (k > 0)
        assert guarded.notes[t] == f"stopped after {k} of 4 steps by 1 held-out examples"
