"""The choices that learn from demonstrations, own answers or a teacher; the guards; equal budgets. Tiny random model."""

import json
import math
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_kit, tiny_lm

from mass import choices, methods, teacher
from mass.batch import Sequence as Tokens
from mass.batch import pack
from mass.choices import Kit, Room, examples, gates, guards, updates, weights
from mass.choices.answers import vote_over_views
from mass.choices.views import views
from mass.errors import MassError
from mass.forward import example_loss, logprobs_and_entropies, token_logprobs
from mass.generate import Rollout
from mass.lora import expand
from mass.methods import METHODS, Method, solve
from mass.optimizers import Rule
from mass.practice import Practice, Sampling, pack_examples
from mass.problems import Problem
from mass.prompts import Example, make_prompts
from mass.schema import Guard, Knobs
from mass.worlds import Truth

GRIDS = Problem(
    "g", "1 0\n0 0", (("1 2\n0 0", "0 0\n1 2"), ("3 0\n0 4", "0 4\n3 0"), ("5 5\n0 1", "0 1\n5 5")), True
)
SUMS = Problem("s", "3 + 3", (("1 + 1", "2"), ("2 + 1", "3"), ("2 + 2", "4")))
PLAIN = Problem("p", "What is 4 + 3?")


@pytest.fixture(scope="module")
def kit() -> Kit:
    return tiny_kit(examples=4)


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model states no answer: its first character counts as one."""
    stated = lambda text, **_: text[:1] or None  # noqa: E731
    for module in (choices.answers, examples, gates, choices.kit, weights, choices.signals, methods):
        monkeypatch.setattr(module, "find_answer", stated)


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


def test_policy_gradient_is_the_gradient_of_its_loss(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    """One SGD step against numeric differences of the loss written out, with SPINE's options and without."""
    rule = Rule("sgd")
    rows = [[Tokens([5, 6, 7, 8, 9, 30, 31], 3), Tokens([5, 6, 7, 40, 41, 42], 3)]]
    packed = pack(rows, 0)
    advantage = torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    blank = [[Example("", "", True, "")] * 2]
    practice = Practice([], [[]], blank, packed, packed.count_TN > 0)
    start = expand(choices.kit.beginning(kit), 1)
    key = next(k for k in start if k.endswith(".B"))
    for knobs in (Knobs(kl=0.2), Knobs(kl=0.2, forking=0.5, band=3.0), Knobs(kl=0.0, forking=0.5)):
        one = replace(kit, rule=rule, steps=1, knobs=knobs)
        moved = updates.policy_gradient(one, [PLAIN], practice, advantage).adapter
        gradient = (start[key] - moved[key]) / 0.7
        with torch.no_grad():
            old, entropy = logprobs_and_entropies(kit.lm.hf, kit.lm.lora, packed, start)
        keep = entropy >= entropy.sort(descending=True).values[max(1, round(knobs.forking * 7)) - 1]
        low, high = entropy[keep].quantile(0.1), entropy[keep].quantile(0.9)

        def loss(adapter: Any) -> float:
            with torch.no_grad():
                new, ent = logprobs_and_entropies(kit.lm.hf, kit.lm.lora, packed, adapter)
            total = 0.0
            for n in range(2):
                own = keep & (packed.owner_M == n)  # noqa: B023
                if own.any():
                    term = -(new - old).exp() * advantage[0, n]  # noqa: B023
                    term = term + knobs.kl * ((old - new).exp() - (old - new) - 1)  # noqa: B023
                    out = (ent - high).clamp(min=0) + (low - ent).clamp(min=0)  # noqa: B023
                    term = term + knobs.band * out.square()  # noqa: B023
                    total += float(term[own].mean()) / 2
            return total

        for i, j in ((0, 0), (3, 1)):
            sides = []
            for sign in (1, -1):
                near = {k: x.clone() for k, x in start.items()}
                near[key][0, i, j] += sign * 1e-5
                sides.append(loss(near))
            numeric = (sides[0] - sides[1]) / 2e-5
            assert float(gradient[0, i, j]) == pytest.approx(numeric, rel=1e-4, abs=1e-8)


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


# ---- the teacher


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, list[Any], dict[str, Any]]]:
    """An address that answers as `behave` says, and what it was asked."""
    asked: list[Any] = []
    behave: dict[str, Any] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((self.path, body, self.headers.get("Authorization")))
            problem = next(p for p in behave if p in body["messages"][-1]["content"])
            what = behave[problem]
            if what == "slow":
                time.sleep(1.5)
                return
            if isinstance(what, int):
                self.send_response(what)
                self.send_header("Location", "http://127.0.0.1:9/")
                self.end_headers()
                return
            text = f"Problem: {what} {body['seed']}?\nSolution: Answer: 3"
            data = json.dumps({"choices": [{"message": {"content": text}, "finish_reason": "stop"}]})
            data = "{" if what == "broken" else data
            self.send_response(200)
            self.end_headers()
            self.wfile.write(data.encode())

        def log_message(self, *_: Any) -> None:
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever)
    thread.start()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield f"http://127.0.0.1:{httpd.server_port}/v1#big", asked, behave
    httpd.shutdown()
    httpd.server_close()
    thread.join()


def test_teacher_at_an_address(kit: Kit, server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    url, asked, behave = server
    behave |= {
        "4 + 3": "What is 1 + 2, or",
        "slow one": "slow",
        "refused": 503,
        "moved": 302,
        "torn": "broken",
    }
    monkeypatch.setenv("MASS_TEACHER_KEY", "sesame")
    far = teacher.address(url, kit.lm.tokenizer, kit.writing, 0.5)
    open_gate = replace(METHODS["tt-d"], gate=None)
    monkeypatch.setitem(METHODS, "tt-d", open_gate)
    problems = [PLAIN, *(Problem(x, x) for x in ("slow one", "refused", "moved", "torn"))]
    started = time.monotonic()
    kit = replace(kit, teacher=far, examples=2)
    records = solve(kit, problems, "tt-d", baselines=False)
    assert time.monotonic() - started < 20
    good = records[0]
    assert (
        all(e.valid and e.problem.startswith("What is 1 + 2") for e in good.examples) and len(good.steps) == 2
    )
    assert good.examples[0].problem != good.examples[1].problem and good.tokens.generated > 60
    for record, reason in zip(
        records[1:],
        ("gave nothing within 0.5 s 2", "answers 503", "answers 302", "reply cannot be read"),
        strict=True,
    ):
        assert record.error is None and record.steps == () and record.solution
        assert record.note.startswith("none of 2 examples is valid (teacher") and reason in record.note
    path, body, key = asked[0]
    assert path == "/v1/chat/completions" and body["model"] == "big" and body["max_tokens"] == 10
    assert key == "Bearer sesame" and [m["role"] for m in body["messages"]] == ["user"]
    # alone as beside those that fail
    (alone,) = solve(kit, [PLAIN], "tt-d", baselines=False)
    assert alone.solution == good.solution


def test_teacher_that_is_a_model_writes_and_the_student_learns(
    kit: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tiny_lm("qwen2")
    near = teacher.local(other, make_prompts(other.tokenizer, "plain"), Sampling(10, 1.0))
    (own,) = near([PLAIN.text], [()], [[1, 2]])
    assert [len(r.tokens) for r in own if isinstance(r, Rollout)] == [3, 10]
    with pytest.raises(
        MassError, match="tt-d has its examples from a stronger model: name it with --teacher"
    ):
        solve(kit, [PLAIN], "tt-d")
    for wrong in ("http://x/v1", "http://#m", "ftp://x/v1#m"):
        with pytest.raises(MassError, match="an address is written http://HOST:PORT/v1#MODEL"):
            teacher.address(wrong, kit.lm.tokenizer, kit.writing, 1.0)


# ---- guards


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


# ---- budgets


@pytest.mark.usefixtures("answers")
@pytest.mark.parametrize("method", list(METHODS))
def test_no_method_spends_more_than_the_budget(
    kit: Kit, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if method in ("quest", "mass", "shuffled", "oracle", "tt-si", "in-context"):
        # examples that a random model writes are malformed: count every one as valid
        whole = lambda text, finished: Example(text or "x", "Answer: 3", True, "")  # noqa: E731
        monkeypatch.setattr(examples, "parse_example", whole)
        monkeypatch.setattr(choices.examples, "read_examples", _read(whole))
    written = Rollout([1] * 20, [0.0] * 20, True, "Problem: What is 1 + 1?\nSolution: Answer: 2")
    taught = replace(kit, teacher=lambda texts, shots, seeds: [[written] * len(own) for own in seeds])
    taught = replace(taught, truth=lambda *_: Truth(True, True, None))
    problems = [SUMS, PLAIN] if method != "ttt" else [SUMS, GRIDS]
    counts = []
    for budget in (8, 60, 900):
        records = solve(replace(taught, budget=budget), problems, method)
        for record in records:
            spent = record.tokens.generated + record.tokens.trained
            assert record.error is None and 0 < spent <= budget, (method, budget, record.tokens)
            assert record.votes >= 1
        counts.append(len(records[0].examples))
        alone = solve(replace(taught, budget=budget), problems[1:], method)[0]
        assert (alone.tokens, alone.solution, alone.votes) == (
            records[1].tokens,
            records[1].solution,
            records[1].votes,
        )
    if METHODS[method].examples and method not in ("tt-d",):
        assert counts[-1] > counts[0]
    if method in ("vote", "rpc", "pick", "first-finish"):
        assert 900 - 8 < records[0].tokens.generated and records[0].votes == counts[-1]


def _read(parse: Any) -> Any:
    def read(lm: Any, prompts: Any, texts: Any, rollouts: Any, shots: Any) -> Practice:
        made = [
            choices.examples.filter_examples([parse(r.text, r.finished) for r in own], text)
            for own, text in zip(rollouts, texts, strict=True)
        ]
        packed, valid_TN = pack_examples(lm, prompts, made, shots)
        return Practice([], rollouts, made, packed, valid_TN)

    return read


def test_a_budget_without_room_for_an_example_says_so(kit: Kit) -> None:
    record = solve(replace(kit, budget=8), [PLAIN], "quest")[0]
    assert record.note == "the budget has no room for an example" and record.solution == record.base_solution
    with pytest.raises(ValueError, match="does not pay for one answer"):
        solve(replace(kit, budget=7), [PLAIN], "none")


def test_another_method_is_a_row(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    row = Method(
        choices.own_answers, choices.probable, choices.fine_tuned, choices.small_margin, choices.greedy
    )
    monkeypatch.setitem(METHODS, "mine", row)
    (record,) = solve(replace(kit, budget=200), [PLAIN], "mine")
    assert record.error is None and record.tokens.generated + record.tokens.trained <= 200
