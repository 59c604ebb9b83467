"""What stands behind an example's answer (a check) has no share in its credit: which tokens, and the gradient."""

import pytest
import torch
from steps import GOOD, SGD, make_world, naive_kl, naive_logprobs
from test_outer import by_example, packed_of, random_logprobs
from tiny import tiny_lm

from mass.generate import Rollout
from mass.outer import policy_loss
from mass.practice import unrewarded
from mass.prompts import answer_end, parse_example


@pytest.mark.parametrize(
    ("text", "behind"),
    [
        ("2 + 2\nSolution: Answer: 4\nCheck: 4 - 2 is 2", "\nCheck: 4 - 2 is 2"),
        ("2 + 2\nSolution: so\nAnswer: 4", ""),
        ("2 + 2\nSolution: Answer: 4\n\n", ""),
        ("2 + 2\nSolution: Answer: 5\nno\nAnswer: 4\nyes", "\nyes"),
        ("2 + 2\nSolution: Answer: 4\nCheck\nAnswer: 4", "\nCheck\nAnswer: 4"),
        ("no answer\nat all", ""),
        ("", ""),
    ],
)
def test_what_stands_behind_the_line_that_first_states_the_answer(text: str, behind: str) -> None:
    assert text[answer_end(text) :] == behind or (not behind and answer_end(text) == len(text))


def test_the_tokens_behind_the_answer() -> None:
    lm = tiny_lm("llama", torch.float64, targets=("q_proj",))

    def tokens_of(text: str) -> list[int]:
        return lm.tokenizer.encode(text, add_special_tokens=False)

    head, check = " 2 + 2\nSolution: Answer: 4", "\nCheck: yes\n\n"
    tokens = [*tokens_of(head), *tokens_of(check)]
    text = (head + check).rstrip("\n")
    rollout = Rollout(tokens, [0.0] * len(tokens), True, text)
    read = parse_example(text, finished=True)
    assert read.valid
    behind = [False] * len(tokens_of(head)) + [True] * len(tokens_of(check))
    assert unrewarded(lm, rollout, read, "answer") == behind
    before = len(tokens_of(" 2 + 2\nSolution:"))
    problem = [True] * before + [False] * (len(tokens_of(head)) - before)
    assert unrewarded(lm, rollout, read, "solution") == [*problem, *behind[len(problem) :]]
    assert not any(unrewarded(lm, rollout, read, "example"))
    # a text that ends with its answer has nothing behind it, and a malformed one bears its penalty whole
    plain = Rollout(tokens_of(head), [0.0] * len(tokens_of(head)), True, head)
    read = parse_example(head, finished=True)
    assert (
        not any(unrewarded(lm, plain, read, "answer")) and unrewarded(lm, plain, read, "solution") == problem
    )
    for reward in ("answer", "solution"):
        assert not any(unrewarded(lm, rollout, parse_example(text, finished=False), reward))


@pytest.mark.parametrize("beta", [0.0, 0.2])
def test_evidence_has_no_advantage_and_a_divergence_of_its_own(beta: float) -> None:
    packed = packed_of([[3, 2], [4, 5]])
    logprob_M = random_logprobs(packed, 2).requires_grad_()
    # whatever the divergences are made of, they depend on what the policy's log-probabilities do
    old_M, kl_M = random_logprobs(packed, 3), (logprob_M - random_logprobs(packed, 4)).square()
    advantage_TN = torch.tensor([[1.0, -2.0], [0.5, -1.0]], dtype=torch.float64)
    place = {owner: list(range(len(x))) for owner, x in by_example(packed, logprob_M).items()}
    # the last two tokens of each example
    behind = {owner: [i >= len(x) - 2 for i in x] for owner, x in place.items()}
    seen = dict.fromkeys(behind, 0)
    flags = []
    for owner in packed.owner_M.tolist():
        key = (owner // 2, owner % 2)
        flags.append(behind[key][seen[key]])
        seen[key] += 1
    loss_TN, kl_TN = policy_loss(
        packed, logprob_M, old_M, kl_M, advantage_TN, ratio_clip=0.2, beta=beta,
        unrewarded_M=torch.tensor(flags), beta_unrewarded=0.7,
    )  # fmt: skip
    new, old, kl = (by_example(packed, x) for x in (logprob_M, old_M, kl_M))
    for (t, n), own in new.items():
        parts = []
        for j, lp in enumerate(own):
            ratio = (lp - old[t, n][j]).exp()
            a = advantage_TN[t, n]
            gain = torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a)
            parts.append(0.7 * kl[t, n][j] if behind[t, n][j] else beta * kl[t, n][j] - gain)
        torch.testing.assert_close(loss_TN[t, n], torch.stack(parts).mean())
    got = torch.autograd.grad(loss_TN.sum(), logprob_M, retain_graph=True)[0]
    alone = torch.autograd.grad(
        policy_loss(
            packed, logprob_M, old_M, kl_M, 0 * advantage_TN, ratio_clip=0.2, beta=beta,
            unrewarded_M=torch.tensor(flags), beta_unrewarded=0.7,
        )[0].sum(),
        logprob_M,
    )[0]  # fmt: skip
    own_M = torch.tensor(flags)
    assert (got[own_M] == alone[own_M]).all() and (got[~own_M] != alone[~own_M]).any()


@pytest.mark.parametrize("checked", [False, True])
def test_an_outer_step_leaves_checks_out_of_the_reward(
    monkeypatch: pytest.MonkeyPatch, checked: bool
) -> None:
    """Without a check nothing changes; with one, the generator's gradient does."""
    own = [[(p, f"{s}\nso it is" if checked else s) for p, s in task] for task in GOOD]
    off = ("outer.gamma=0", "outer.beta=0", "outer.malformed_penalty=0")
    found = [
        make_world(monkeypatch, *SGD, *off, f"outer.reward={reward}", examples=own).run().gradients
        for reward in ("example", "answer")
    ]
    keys = [key for key in found[0] if key.startswith("policy/")]
    same = [torch.equal(found[0][key], found[1][key]) for key in keys]
    assert all(same) if not checked else not any(same)


def test_an_outer_step_leaves_the_problems_out_of_the_reward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the plain loop: no advantage before the solution, and the divergence there has its own coefficient."""
    more = ("outer.gamma=0", "outer.beta=0.3", "outer.reward=solution", "outer.beta_check=0.8")
    world = make_world(monkeypatch, *SGD, *more)
    lm, count = world.setting.lm, len(GOOD[0])
    result = world.run()
    leaf = {key: x.detach().requires_grad_() for key, x in world.policy.items()}
    total = torch.zeros((), dtype=torch.float64)
    for t, own in enumerate(world.practice.rollouts):
        credit_N = result.credit_TN[t]
        advantage_N = (credit_N - credit_N.mean()) / credit_N.std()
        for n, rollout in enumerate(own):
            asked = world.practice.prompts[t]
            new = naive_logprobs(lm, asked + rollout.tokens, len(asked), leaf)
            kl = naive_kl(lm, asked + rollout.tokens, len(asked), leaf)
            ratio = (new - torch.tensor(rollout.logprobs)).exp()
            a = advantage_N[n]
            gain = torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a)
            text = f" {world.practice.examples[t][n].problem}\nSolution:"
            before = len(lm.tokenizer.encode(text, add_special_tokens=False))
            at = torch.arange(len(new)) < before
            parts = torch.where(at, 0.8 * kl, 0.3 * kl - gain)
            # GOOD's solutions end with their answer, but for the blank line that ends the example
            assert 0 < before < len(new)
            total = total + parts.mean() / (len(GOOD) * count)
    for (key, x), want in zip(leaf.items(), torch.autograd.grad(total, list(leaf.values())), strict=True):
        torch.testing.assert_close(result.gradients[f"policy/{key}"], want, rtol=1e-5, atol=1e-8)
        assert want.abs().max() > 0 and x.requires_grad
