"""The choices that learn from demonstrations or own answers, and the gate, on a tiny random model."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from handmade import GRIDS, PLAIN, SUMS
from tiny import tiny_lm

from mass import choices
from mass.batch import Sequence as Tokens
from mass.batch import pack
from mass.choices import Kit, Room, examples, gates, updates, weights
from mass.choices.answers import vote_over_views
from mass.choices.views import views
from mass.errors import MassError
from mass.forward import example_loss, token_logprobs
from mass.generate import Rollout
from mass.lora import expand, using
from mass.methods import solve
from mass.optimizers import Rule
from mass.practice import Practice, pack_examples
from mass.problems import Problem
from mass.prompts import Example
from mass.schema import Guard, Knobs


def free(kit: Kit, problems: Sequence[Problem]) -> Room:
    return Room(None, kit.steps, False, [[] for _ in problems])


# ---- ttt


def test_tasks_of_ttt_learn_every_output_but_the_first(kit: Kit) -> None:
    tokenizer = kit.lm.tokenizer
    asked, spans = kit.prompts.in_context(
        "2 + 2", "Answer: 4", [("1 + 1", "Answer: 2"), ("2 + 1", "Answer: 3")]
    )  # type: ignore[misc]
    texts = [tokenizer.decode([asked[j] for j in span], skip_special_tokens=True).strip() for span in spans]
    assert texts == ["Answer: 2", "Answer: 3", "Answer: 4"]
    assert asked == [
        *kit.prompts.solve("2 + 2", [("1 + 1", "Answer: 2"), ("2 + 1", "Answer: 3")]),
        *kit.prompts.solution("Answer: 4"),
    ]
    practice = examples.leave_one_out(kit, [SUMS], free(kit, [SUMS]))
    packed = practice.packed
    for n in range(4):
        own = packed.label_M[packed.owner_M == n].tolist()
        said = tokenizer.decode(own, skip_special_tokens=True)
        solved = dict(SUMS.demonstrations)
        # the second and the third output, and nothing between them
        assert said.count("Answer:") == 2 and "Problem" not in said
        assert said.rstrip().endswith(f"Answer: {solved[practice.examples[0][n].problem]}")


def test_each_demonstration_is_left_out_and_grids_are_turned(kit: Kit) -> None:
    wide = replace(kit, examples=30)
    practice = examples.leave_one_out(wide, [GRIDS, SUMS], free(kit, [GRIDS, SUMS]))
    turned, plain = ([e.problem for e in own] for own in practice.examples)
    assert sorted(turned[:3]) == sorted(given for given, _ in GRIDS.demonstrations)
    assert len(turned) == 30 and len(set(turned)) > 12
    # three demonstrations have six orders
    assert len(plain) == 6 and {plain.count(given) for given, _ in SUMS.demonstrations} == {2}
    again = examples.leave_one_out(wide, [SUMS], free(kit, [SUMS]))
    assert again.examples[0] == practice.examples[1]


def test_loss_of_a_skipped_token_is_left_out() -> None:
    lm = tiny_lm("llama")
    sequence = Tokens([5, 6, 7, 8, 9], 2, frozenset({3}))
    packed = pack([[sequence]], 0)
    whole = pack([[Tokens(sequence.tokens, 1)]], 0)
    each = token_logprobs(lm.hf, lm.lora, whole, None)
    assert packed.label_M.tolist() == [7, 9] and packed.length_TN.tolist() == [[5]]
    loss = example_loss(packed, token_logprobs(lm.hf, lm.lora, packed, None))
    assert torch.allclose(loss, -(each[1] + each[3]).view(1, 1) / 2, rtol=1e-12)
    kept = packed.only(torch.tensor([False, True]))
    assert kept.label_M.tolist() == [9] and kept.count_TN.tolist() == [[1]]


def test_hierarchical_vote() -> None:
    a, b, c = "1 1\n1 1", "2 2\n2 2", "3 3\n3 3"
    # c has most votes in all, but one symmetry alone says so
    groups = {"transpose": [c] * 5, "rotate 90": [a], "flip up-down": [a, b]}
    assert vote_over_views(groups, True) == a
    # as many symmetries: what the identity says
    assert vote_over_views({"identity": [b], "transpose": [a, a, a]}, True) == b
    assert vote_over_views({"transpose": [b, a, a]}, False) == a
    assert vote_over_views({"identity": list("wwxxyyz"), "transpose": list("zz")}, False) != "z"
    assert vote_over_views({}, True) is None
    # filled up with the row-wise majority, which nobody said
    mixed = ["1 1\n2 2", "1 1\n3 3", "4 4\n3 3"]
    assert vote_over_views({"identity": mixed[:2], "transpose": ["1 1\n3 3"]}, True) == "1 1\n3 3"


def test_ttt_answers_in_every_view_and_turns_back(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    truth = "7 8\n9 1"

    def greedily(kit: Kit, problems: Any, adapter: Any, shots: Any, adapter_of: Any) -> list[Any]:
        out = []
        for p, own, t in zip(problems, shots, adapter_of, strict=True):
            seen.append((p.text, own, t))
            (view,) = [v.view for v in views(kit, GRIDS) if v.problem.text == p.text and v.shots == own]
            out.append(choices.Answered(view.apply(truth), "", 3))
        return out

    monkeypatch.setattr(choices.answers, "greedily", greedily)
    record = solve(kit, [GRIDS], "ttt", baselines=False)[0]
    assert record.answer == truth and record.solution == f"Answer:\n{truth}"
    assert len(seen) == len(views(kit, GRIDS)) == 16 and record.tokens.generated == 48
    assert record.tokens.trained > 0 and len(record.steps) == 2
    assert len({own for _, own, _ in seen}) > 8


def test_ttt_together_and_alone(kit: Kit) -> None:
    other = replace(SUMS, id="o", text="1 + 3", demonstrations=SUMS.demonstrations[:2])
    together = solve(kit, [SUMS, PLAIN, other, GRIDS], "ttt", baselines=False)
    assert together[1].error and "method ttt learns from a problem's demonstrations" in together[1].error
    assert "this one has none" in together[1].error and together[0].error is None
    for p, record in ((SUMS, together[0]), (other, together[2]), (GRIDS, together[3])):
        (alone,) = solve(kit, [p], "ttt", baselines=False)
        assert (alone.solution, alone.tokens) == (record.solution, record.tokens)
        assert np.allclose([e.weight for e in record.examples], 1)
        got = [[x.before, x.after] for x in record.steps]
        assert np.allclose(got, [[x.before, x.after] for x in alone.steps], rtol=1e-9)
    assert len(together[2].examples) == 2


def test_demonstrations_are_shown_by_every_method(kit: Kit) -> None:
    shots = choices.shots_for(kit, SUMS)
    assert shots.solve == (("1 + 1", "Answer: 2"), ("2 + 1", "Answer: 3"), ("2 + 2", "Answer: 4"))
    assert shots.generate == (("1 + 1", "2 + 1", "Answer: 3"),)
    bare = replace(SUMS, demonstrations=())
    assert solve(kit, [SUMS], "none")[0].solution != solve(kit, [bare], "none")[0].solution


# ---- vds, ttrl, gates


@pytest.mark.usefixtures("answers")
def test_vds_learns_from_the_best_own_answer_above_the_threshold(
    kit: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    share = torch.tensor([[0.1, 0.5, 0.3, 0.1]])
    monkeypatch.setattr(weights.scorer, "weights", lambda *_: 4 * share)
    record = solve(kit, [PLAIN], "vds", baselines=False)[0]
    assert [e.weight for e in record.examples] == [0, 4, 0, 0] and len(record.steps) == 2
    chosen = Example(PLAIN.text, record.examples[1].solution, True, "")
    packed, _ = pack_examples(kit.lm, kit.prompts, [[chosen]], [()])
    start = expand(choices.kit.beginning(kit), 1)
    loss = example_loss(packed, token_logprobs(kit.lm.hf, kit.lm.lora, packed, start))
    assert record.steps[0].before == pytest.approx(float(loss), rel=1e-9)
    assert record.tokens.trained == 2 * int(packed.length_TN)
    strict = replace(kit, knobs=Knobs(threshold=0.6))
    record = solve(strict, [PLAIN], "vds")[0]
    assert record.note == "no own answer reaches the threshold: there was no update" and record.steps == ()
    assert record.solution == record.base_solution and record.tokens.trained == 0


def samples(*texts: str) -> list[Rollout]:
    return [
        Rollout([10 + ord(x or "-") % 50, 20 + i], [-0.5 - i, -1.0], True, x) for i, x in enumerate(texts)
    ]


@pytest.mark.usefixtures("answers")
def test_ttrl_raises_what_the_majority_says(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = samples("a", "b", "a", "")
    monkeypatch.setattr(examples, "sample", lambda kit, problems, which: [list(drawn) for _ in problems])
    practice = examples.own_samples(kit, [PLAIN], free(kit, [PLAIN]))
    # also the sample without an answer, and the very tokens that were sampled
    assert practice.valid_TN.all() and practice.packed.count_TN.tolist() == [[2, 2, 2, 2]]
    assert practice.packed.label_M.tolist() == [x for r in drawn for x in r.tokens]
    advantage = weights.agreement(kit, [PLAIN], practice)
    assert torch.allclose(advantage, torch.tensor([[1.0, -1, 1, -1]]) * math.sqrt(3) / 2)

    def logprobs(adapter: Any) -> torch.Tensor:
        return practice.packed.mean_by_example(
            token_logprobs(kit.lm.hf, kit.lm.lora, practice.packed, adapter)
        )

    gentle = replace(kit, lr={key: x * 0.1 for key, x in kit.lr.items()})
    done = updates.policy_gradient(gentle, [PLAIN], practice, advantage)
    change = logprobs(done.adapter) - logprobs(expand(choices.kit.beginning(kit), 1))
    assert (change * advantage).sum() > 0 and done.losses[0][-1] < done.losses[0][0] and done.ok == [True]


def distributions(kit: Kit, rows: list[Tokens], adapter: Any) -> torch.Tensor:
    """log p of the whole vocabulary at each target token, each sequence alone in the model."""
    out = []
    with torch.no_grad(), using(kit.lm.lora, adapter):
        for row in rows:
            found = kit.lm.hf(input_ids=torch.tensor([row.tokens]), use_cache=False).logits[0]
            out.append(found[row.prompt - 1 : -1].log_softmax(-1))
    return torch.cat(out)


@pytest.mark.parametrize("steps", [1, 2])
def test_policy_gradient_is_the_gradient_of_its_loss(kit: Kit, steps: int) -> None:
    """The last SGD step against numeric differences of the loss written out, with SPINE's options and without. At the
    first the divergence from the start is 0, and so is its derivative."""
    rule = Rule("sgd")
    rows = [Tokens([5, 6, 7, 8, 9, 30, 31], 3), Tokens([5, 6, 7, 40, 41, 42], 3)]
    packed = pack([rows], 0)
    advantage = torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    blank = [[Example("", "", True, "")] * 2]
    practice = Practice([], [[]], blank, packed, packed.count_TN > 0)
    start = expand(choices.kit.beginning(kit), 1)
    key = next(k for k in start if k.endswith(".B"))
    label = packed.label_M.unsqueeze(1)
    before = distributions(kit, rows, start)
    old, entropy = before.gather(1, label).squeeze(1), -(before.exp() * before).sum(1)
    for knobs in (Knobs(kl=0.2), Knobs(kl=0.2, forking=0.5, band=3.0), Knobs(kl=0.0, forking=0.5)):
        at = start
        for k in range(1, steps + 1):
            last = at
            one = replace(kit, rule=rule, steps=k, knobs=knobs)
            at = updates.policy_gradient(one, [PLAIN], practice, advantage).adapter
        gradient = (last[key] - at[key]) / 0.7
        keep = entropy >= entropy.sort(descending=True).values[max(1, round(knobs.forking * 7)) - 1]
        low, high = entropy[keep].quantile(0.1), entropy[keep].quantile(0.9)

        def terms(adapter: Any) -> tuple[float, float]:
            """The loss, and what of it is the divergence."""
            now = distributions(kit, rows, adapter)
            new, ent = now.gather(1, label).squeeze(1), -(now.exp() * now).sum(1)
            divergence = knobs.kl * (now.exp() * (now - before)).sum(1)  # noqa: B023
            total = held = 0.0
            for n in range(2):
                own = keep & (packed.owner_M == n)  # noqa: B023
                if own.any():
                    ratio, a = (new - old).exp(), advantage[0, n]
                    term = divergence - torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a)
                    out = (ent - high).clamp(min=0) + (low - ent).clamp(min=0)  # noqa: B023
                    term = term + knobs.band * out.square()  # noqa: B023
                    total += float(term[own].mean()) / 2
                    held += float(divergence[own].mean()) / 2
            return total, held

        shares = []
        for i, j in ((0, 0), (3, 1)):
            sides = []
            for sign in (1, -1):
                near = {k: x.clone() for k, x in last.items()}
                near[key][0, i, j] += sign * 1e-5
                sides.append(terms(near))
            numeric, share = ((up - down) / 2e-5 for up, down in zip(*sides, strict=True))
            assert float(gradient[0, i, j]) == pytest.approx(numeric, rel=1e-4, abs=1e-8)
            shares.append(abs(share))
        assert max(shares) > 1e-5 if steps > 1 and knobs.kl else max(shares) < 1e-7


@pytest.mark.usefixtures("answers")
def test_ttrl_without_difference_does_nothing(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        examples, "sample", lambda kit, problems, which: [samples("a", "a", "a", "a") for _ in problems]
    )
    record = solve(kit, [PLAIN], "ttrl", baselines=False)[0]
    assert record.note == "all samples have the same reward: there was no update" and record.steps == ()
    with pytest.raises(MassError, match="guards are for: leave guard"):
        solve(replace(kit, guard=Guard(max_loss=1.0)), [PLAIN], "ttrl")


@pytest.mark.usefixtures("answers")
def test_gate_opens_at_a_small_margin_and_its_samples_count(
    kit: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = samples("a", "b", "a", "a")
    # log-likelihoods -1.5 (a, the likeliest) and -2.5 (b)
    expected = (1 - math.exp(-1)) / (1 + math.exp(-1))
    assert gates.margin(own) == pytest.approx(expected)
    assert gates.margin(samples("a", "a")) == 1 and gates.margin([]) == 0
    monkeypatch.setattr(gates, "sample", lambda kit, problems, which: [own for _ in problems])
    record = solve(replace(kit, knobs=Knobs(margin=0.4)), [PLAIN], "tt-si")[0]
    greedy = solve(kit, [PLAIN], "none", baselines=False)[0]
    assert record.note.startswith("the gate is closed (margin 0.462") and record.examples == ()
    assert record.tokens.generated == greedy.tokens.generated + 8 and record.solution == greedy.solution
    record = solve(replace(kit, knobs=Knobs(margin=0.5)), [PLAIN], "tt-si", baselines=False)[0]
    assert record.note.startswith("gate: margin 0.462") and len(record.examples) == 4
