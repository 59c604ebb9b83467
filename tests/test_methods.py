"""mass.methods and mass.choices: every method on a tiny random model, with hand-made examples where it writes none."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from handmade import GOOD, PROBLEMS
from ranks import ROOT
from tiny import tiny_kit

from mass import choices
from mass.choices import Gated, Kit
from mass.errors import MassError
from mass.lora import using
from mass.methods import METHODS, Method, Record, solve
from mass.optimizers import Rule
from mass.problems import Problem
from mass.recipe import load
from mass.setting import answer_sampling, example_sampling


@pytest.fixture(scope="module")
def kit() -> Kit:
    return tiny_kit()


def texts(records: Sequence[Record]) -> list[str]:
    return [record.solution for record in records]


def losses(records: Sequence[Record]) -> list[list[float]]:
    return [[x for step in record.steps for x in (step.before, step.after)] for record in records]


@pytest.mark.usefixtures("handmade")
@pytest.mark.parametrize("method", ["quest", "in-context"])
def test_problems_adapted_together_and_alone_are_the_same(kit: Kit, method: str) -> None:
    together = solve(kit, PROBLEMS, method)
    for one, problem in zip(together, PROBLEMS, strict=True):
        (alone,) = solve(kit, [problem], method)
        assert alone.solution == one.solution and alone.base_solution == one.base_solution
        assert (
            alone.tokens == one.tokens and alone.votes == one.votes and alone.vote_answer == one.vote_answer
        )
        assert np.allclose(losses([alone]), losses([one]), rtol=1e-9, atol=0)
    assert texts(together) != [record.base_solution for record in together]


@pytest.mark.usefixtures("handmade")
def test_fresh_adapters_together_and_alone(kit: Kit) -> None:
    bare = replace(kit, policy=None)
    together = solve(bare, PROBLEMS, "quest", baselines=False)
    alone = [solve(bare, [p], "quest", baselines=False)[0] for p in PROBLEMS]
    assert texts(alone) == texts(together)
    assert np.allclose(losses(alone), losses(together), rtol=1e-5, atol=0)
    base = texts(solve(bare, PROBLEMS, "none", baselines=False))
    assert base != texts(together)
    # a fresh adapter is the base model, not the policy
    assert base != texts(solve(kit, PROBLEMS, "none", baselines=False))


@pytest.mark.usefixtures("handmade")
def test_mass_is_quest_while_all_scores_are_equal_and_not_afterwards(kit: Kit) -> None:
    quest, mass = (solve(kit, PROBLEMS, name, baselines=False) for name in ("quest", "mass"))
    assert texts(quest) == texts(mass) and losses(quest) == losses(mass)
    assert [r.examples for r in quest] == [r.examples for r in mass]
    assert [e.weight for e in quest[0].examples] == [1, 1, 1]
    assert [e.weight for e in quest[1].examples] == [1.5, 1.5, 0]
    assert kit.head is not None
    generator = torch.Generator().manual_seed(0)
    eta = {key: torch.randn(x.shape, generator=generator) for key, x in kit.head.named_parameters()}
    moved = solve(replace(kit, eta=eta), PROBLEMS, "mass", baselines=False)
    assert losses(moved) != losses(mass)
    for record in moved:
        weights = [e.weight for e in record.examples]
        assert sum(weights) == pytest.approx(3) and len(set(weights)) == 3
        assert all((weight > 0) == e.valid for weight, e in zip(weights, record.examples, strict=True))


@pytest.mark.usefixtures("handmade")
def test_update_lowers_the_inner_loss_step_by_step(kit: Kit) -> None:
    (record,) = solve(kit, PROBLEMS[:1], "quest", baselines=False)
    first, second = record.steps
    assert first.before > first.after == second.before > second.after
    sequences = [
        kit.prompts.solve(problem) + kit.prompts.solution(solution) for problem, solution in GOOD["a"]
    ]
    assert record.tokens.trained == 2 * sum(map(len, sequences))
    greedy = solve(kit, PROBLEMS[:1], "none")[0]
    assert record.base_answer is None and record.votes == 0 and greedy.votes == 1
    assert record.tokens.generated == 9 + 8


@pytest.mark.usefixtures("handmade")
def test_model_is_left_as_it_was_also_after_exceptions(kit: Kit) -> None:
    hf, lora = kit.lm.hf, kit.lm.lora
    assert kit.policy is not None

    def state() -> Any:
        tensors = {**hf.state_dict(), **{f"policy/{key}": x for key, x in (kit.policy or {}).items()}}
        flags = [(m.training, getattr(m, "slot", None)) for m in hf.modules()]
        needs = [(p.requires_grad, p.grad) for p in hf.parameters()]
        return {key: x.clone() for key, x in tensors.items()}, flags, needs, torch.get_rng_state()

    def same(before: Any) -> None:
        after = state()
        assert before[0].keys() == after[0].keys() and before[1:3] == after[1:3]
        assert all(torch.equal(x, after[0][key]) for key, x in before[0].items())
        assert torch.equal(before[3], after[3])

    taught = replace(kit, teacher=lambda texts, shots, seeds: [["nothing"] * len(own) for own in seeds])
    taught = replace(taught, truth=lambda *_: None)
    shown = Problem("s", "What is 3 + 1?", (("1 + 1", "2"), ("2 + 1", "3")))
    before = state()
    for method in METHODS:
        solve(taught, [shown] if method == "ttt" else PROBLEMS[:2], method, baselines=method == "mass")
        same(before)
    layer, calls = hf.get_decoder().layers[1], 0
    # while scoring, tuning, answering, voting
    for last in (1, 4, 9, 20):

        def breaks(*_: Any, last: int = last) -> None:
            nonlocal calls
            calls += 1
            if calls == last:
                raise RuntimeError("stop here")

        calls, hook = 0, layer.register_forward_pre_hook(breaks)
        with pytest.raises(RuntimeError, match="stop here"):
            solve(kit, PROBLEMS[:2], "mass")
        hook.remove()
        same(before)
    # a slot that was in use is in use again
    with using(lora, {key: x.unsqueeze(0) for key, x in kit.policy.items()}):
        before = state()
        solve(kit, PROBLEMS[:1], "quest", baselines=False)
        same(before)


def test_without_a_valid_example_the_answer_is_the_base_answer_and_says_so(kit: Kit) -> None:
    for method in ("mass", "quest", "in-context"):
        (record,) = solve(kit, PROBLEMS[:1], method)
        assert not any(e.valid for e in record.examples) and {e.weight for e in record.examples} == {0}
        assert record.solution == record.base_solution != ""
        assert record.steps == () and record.tokens.trained == 0
        assert record.note.startswith("none of 3 examples is valid (truncated 3")


@pytest.mark.usefixtures("handmade")
def test_problem_without_valid_examples_beside_others(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(GOOD, "b", [None, None, None])
    records = solve(kit, PROBLEMS, "mass")
    assert (
        records[1].solution == records[1].base_solution
        and records[1].steps == ()
        and "empty 3" in records[1].note
    )
    assert records[0].note == "" and len(records[0].steps) == 2
    assert [records[1].tokens.trained, records[0].tokens.trained > 0] == [0, True]


@pytest.mark.usefixtures("handmade")
@pytest.mark.parametrize("change", [{"max_growth": 0.5}, {"rule": Rule("sgd", momentum=1e308)}])
def test_update_that_explodes_is_dropped(kit: Kit, change: dict[str, Any]) -> None:
    (record,) = solve(replace(kit, **change), PROBLEMS[:1], "quest")
    assert record.note.startswith("the inner loss went from ") and "the update was dropped" in record.note
    assert len(record.steps) == 2 and record.tokens.trained > 0
    assert (
        record.solution
        == record.base_solution
        != solve(kit, PROBLEMS[:1], "quest", baselines=False)[0].solution
    )


@pytest.mark.usefixtures("handmade")
def test_shuffled_deals_the_weights_of_mass_to_other_examples(
    kit: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight_TN = torch.tensor([[0.5, 2.0, 0.5 + 1e-3], [1.25, 1.75, 0.0], [2.5, 0.0, 0.5]])
    monkeypatch.setattr(
        choices.weights.scorer, "weights", lambda score, valid, _: weight_TN[: len(score)].clone()
    )
    seen = set()
    for seed in range(8):
        records = solve(replace(kit, seed=seed), PROBLEMS, "shuffled", baselines=False)
        for record, own in zip(records, weight_TN.tolist(), strict=True):
            dealt = [e.weight for e in record.examples]
            assert sorted(dealt) == pytest.approx(sorted(own))
            assert all(e.weight == 0 for e in record.examples if not e.valid)
        seen.add(tuple(e.weight for e in records[0].examples))
        (alone,) = solve(replace(kit, seed=seed), PROBLEMS[:1], "shuffled", baselines=False)
        assert alone.examples == records[0].examples and len(alone.steps) == 2
    assert len(seen) >= 3
    (mass,) = solve(kit, PROBLEMS[:1], "mass", baselines=False)
    assert [e.weight for e in mass.examples] == pytest.approx(weight_TN[0].tolist())


@pytest.mark.usefixtures("handmade")
def test_in_context_shows_the_best_examples_as_far_as_they_fit(
    kit: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    greedily = choices.answers.greedily

    def spied(*args: Any, **keywords: Any) -> Any:
        seen.append(keywords["shots"])
        return greedily(*args, **keywords)

    monkeypatch.setattr(choices.answers, "greedily", spied)
    weights = torch.tensor([[0.5, 1.5, 1.0]])
    monkeypatch.setattr(choices.weights.scorer, "weights", lambda *_: weights)
    (record,) = solve(kit, PROBLEMS[:1], "in-context", baselines=False)
    # best last, next to the problem
    assert seen == [[[GOOD["a"][2], GOOD["a"][1]]]] and record.steps == ()
    kit = replace(kit, prompts=replace(kit.prompts, generate_instruction=""))
    length = len(kit.prompts.solve(PROBLEMS[0].text, [GOOD["a"][1]])) + kit.answering.max_new_tokens
    monkeypatch.setattr(choices.kit, "context_length", lambda _: length)
    solve(kit, PROBLEMS[:1], "in-context", baselines=False)
    assert seen[1] == [[GOOD["a"][1]]]


def test_random_draws_training_problems_but_never_the_target(kit: Kit) -> None:
    target = Problem("x", "What is 2 +  1?")
    (record,) = solve(replace(kit, examples=5), [target], "random", baselines=False)
    assert sorted(e.problem for e in record.examples) == [f"What is {i} + 1?" for i in (0, 1, 3, 4, 5)]
    assert record.tokens.generated == 8 and len(record.steps) == 2
    a, b = (solve(kit, [p], "random", baselines=False)[0].examples for p in PROBLEMS[:2])
    assert a != b
    with pytest.raises(MassError, match=r"generate.examples=7 training problems, and 6 are set aside"):
        solve(replace(kit, examples=7), [target], "random")


def test_a_problem_of_the_pool_that_leaves_too_few_fails_alone(kit: Kit) -> None:
    kit = replace(kit, solve_shots=6, examples=6)
    by_id, by_text = Problem("t2", "What is it?"), Problem("typed", "What is 2 +  1?")
    assert solve(kit, [by_id], "none", baselines=False)[0].error is None, (
        "an id says nothing of another file's"
    )
    for method, wrong, reason in [
        ("none", by_text, "6 shots wanted and 5 problems set aside"),
        ("random", by_text, "generate.examples=6 training problems, and 5 are set aside"),
    ]:
        records = solve(kit, [PROBLEMS[0], wrong, PROBLEMS[1]], method, baselines=False)
        assert [r.error is None for r in records] == [True, False, True]
        assert reason in (records[1].error or "") and records[1].solution == ""


def test_a_target_of_the_pool_is_not_in_its_own_prompt(kit: Kit) -> None:
    kit = replace(kit, solve_shots=5, generate_shots=2)
    shots = choices.shots_for(kit, Problem("typed", "What is 2 +  1?"))
    assert "What is 2 + 1?" not in {text for shot in (*shots.solve, *shots.generate) for text in shot}


def test_too_long_a_problem_fails_alone(kit: Kit) -> None:
    long = Problem("long", "word " * 3000)
    records = solve(kit, [PROBLEMS[0], long, PROBLEMS[1]], "none")
    assert records[1].error is not None and records[1].error.startswith("too long: the prompt has ")
    assert records[1].answer is None and records[1].solution == ""
    assert texts(solve(kit, [PROBLEMS[0], PROBLEMS[1]], "none")) == [records[0].solution, records[2].solution]
    assert [r.id for r in records] == ["a", "long", "b"]
    assert solve(kit, [long], "mass")[0].error and solve(kit, [], "mass") == []


@pytest.mark.usefixtures("handmade")
def test_closed_gate_answers_without_update(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = "the gate is closed: answered without update"
    gated = replace(
        METHODS["quest"],
        gate=lambda kit, problems: [Gated(p.id != "b", [], closed if p.id == "b" else "") for p in problems],
    )
    monkeypatch.setitem(METHODS, "gated", gated)
    records, quest = (solve(kit, PROBLEMS, name, baselines=False) for name in ("gated", "quest"))
    greedy = solve(kit, PROBLEMS[1:2], "none", baselines=False)
    assert [r.id for r in records] == ["a", "b", "c"] and {r.method for r in records} == {"gated"}
    assert records[1].note == "the gate is closed: answered without update"
    assert records[1].examples == () and records[1].solution == greedy[0].solution
    assert [records[0].solution, records[2].solution] == [quest[0].solution, quest[2].solution]


def test_methods_that_cannot_be_used_say_why(kit: Kit) -> None:
    with pytest.raises(MassError, match="'masss': did you mean mass?"):
        solve(kit, PROBLEMS, "masss")
    others = [
        name
        for name, row in METHODS.items()
        if row.weights not in (choices.scored, choices.shuffled, choices.best_scored, choices.by_truth)
    ]
    assert {"none", "vote", "quest"} <= set(others) and not {"mass", "pick", "vds", "oracle"} & set(others)
    with pytest.raises(
        MassError, match=r"mass weighs by a trained scorer, .* \(" + ", ".join(others) + r"\)"
    ):
        solve(replace(kit, head=None), PROBLEMS, "mass")
    with pytest.raises(MassError, match="random draws training problems, and there are none here"):
        solve(replace(kit, pool=()), PROBLEMS, "random")


def test_the_cuts_of_sampling_are_for_practice_examples_alone() -> None:
    own = ["generate.top_p=0.9", "generate.top_k=5", "generate.min_p=0.1"]
    recipe = load(ROOT / "recipes/smoke.yaml", own)
    drawn, answered = example_sampling(recipe), answer_sampling(recipe, 0.7)
    assert (drawn.top_p, drawn.top_k, drawn.min_p) == (0.9, 5, 0.1)
    assert (answered.top_p, answered.top_k, answered.min_p) == (1.0, 0, 0.0)


def test_every_method_is_a_row_of_five_choices() -> None:
    for method in METHODS.values():
        assert isinstance(method, Method)
        assert (method.weights is None) == (method.examples is None)
        assert method.update is None or method.weights is not None
