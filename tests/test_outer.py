"""Outer losses, credit and the policy gradient, each against a loop that spells the formula out."""

import math

import pytest
import torch
from scipy.stats import mannwhitneyu

from mass.batch import Packed, Sequence, pack
from mass.outer import (
    auc,
    correlation,
    credit_advantage,
    gold_loss,
    group_advantage,
    normalised,
    ordered_pairs,
    policy_loss,
    verifier_loss,
)

NAN = math.nan


def packed_of(lengths: list[list[int]], prompt: int = 2) -> Packed:
    """A batch in which example (t, n) has lengths[t][n] target tokens."""
    return pack([[Sequence(list(range(3, 3 + prompt + n)), prompt) for n in task] for task in lengths], 0)


def by_example(packed: Packed, value_M: torch.Tensor) -> dict[tuple[int, int], list[torch.Tensor]]:
    """The target tokens' values, by example."""
    n = packed.count_TN.shape[1]
    out: dict[tuple[int, int], list[torch.Tensor]] = {}
    for owner, value in zip(packed.owner_M.tolist(), value_M, strict=True):
        out.setdefault((owner // n, owner % n), []).append(value)
    return out


def random_logprobs(packed: Packed, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return -torch.rand(packed.label_M.numel(), dtype=torch.float64, generator=generator) * 3


def test_gold_loss_is_the_mean_cross_entropy_of_each_reference_solution() -> None:
    packed = packed_of([[3], [5]])
    logprob_M = random_logprobs(packed, 0)
    tokens = by_example(packed, logprob_M)
    wanted = [-sum(x.item() for x in tokens[t, 0]) / len(tokens[t, 0]) for t in range(2)]
    assert gold_loss(packed, logprob_M).tolist() == pytest.approx(wanted)


def test_verifier_loss_weighs_each_answer_s_mean_log_probability() -> None:
    packed = packed_of([[3, 1, 4], [2, 2, 5]])
    logprob_M = random_logprobs(packed, 1)
    advantage_TG = torch.tensor([[1.0, -0.5, -0.5], [0.0, 2.0, -2.0]], dtype=torch.float64)
    tokens = by_example(packed, logprob_M)
    wanted = [
        -sum(advantage_TG[t, g].item() * torch.stack(tokens[t, g]).mean().item() for g in range(3)) / 3
        for t in range(2)
    ]
    assert verifier_loss(packed, logprob_M, advantage_TG).tolist() == pytest.approx(wanted)


def test_group_advantage_standardises_within_a_task_and_leaves_failed_verdicts_out() -> None:
    reward_TG = torch.tensor(
        [[1.0, 0.0, 0.0, 1.0], [1.0, NAN, 0.0, 0.5], [1.0, 1.0, 1.0, 1.0], [1.0, NAN, NAN, NAN]]
    )
    got = group_advantage(reward_TG, 1e-8)
    std = math.sqrt(4 * 0.25 / 3)
    assert got[0].tolist() == pytest.approx([0.5 / std, -0.5 / std, -0.5 / std, 0.5 / std])
    # of the three known ones: mean 0.5, sample deviation 0.5
    assert got[1].tolist() == pytest.approx([1.0, 0.0, -1.0, 0.0])
    assert (got[2] == 0).all() and (got[3] == 0).all()
    assert (group_advantage(torch.full((1, 4), NAN), 1e-8) == 0).all()


def test_credit_advantage_is_the_credit_standardised_over_valid_examples() -> None:
    by_score_TN = torch.tensor([[0.3, -0.1, 0.2, 99.0], [1e-3, 2e-3, 1.5e-3, 0.0]], dtype=torch.float64)
    valid_TN = torch.tensor([[True, True, True, False], [True, True, True, False]])
    got = credit_advantage(-by_score_TN, valid_TN, 1e-8, 0.7)
    credit = -by_score_TN[0, :3]
    torch.testing.assert_close(got[0, :3], (credit - credit.mean()) / credit.std())
    assert got[0].argmax() == 1, "the example that lowers the outer loss most is encouraged most"
    assert got[:, 3].tolist() == pytest.approx([-0.7, -0.7]), "malformed"
    # the second task's credits spread by 5e-4
    assert got[1, :3].abs().max() > 1
    flat = credit_advantage(-by_score_TN, valid_TN, 1e-3, 0.7)
    assert (flat[1, :3] == 0).all() and torch.equal(flat[0], got[0])


def test_credit_advantage_of_one_or_no_valid_example_is_zero() -> None:
    by_score_TN = torch.tensor([[0.3, -0.1], [0.2, 0.1]])
    valid_TN = torch.tensor([[True, False], [False, False]])
    got = credit_advantage(-by_score_TN, valid_TN, 1e-8, 1.0)
    assert got.tolist() == [[0.0, -1.0], [-1.0, -1.0]]


def test_normalised_has_root_mean_square_one_or_is_zero() -> None:
    by_score_TN = torch.tensor([[3.0, -4.0], [1e-9, -1e-9], [0.0, 0.0]])
    got = normalised(by_score_TN, 1e-8)
    assert got[0].square().mean().sqrt().item() == pytest.approx(1.0)
    assert (got[0, 1] / got[0, 0]).item() == pytest.approx(-4 / 3)
    assert (got[1:] == 0).all()


def naive_policy_loss(
    packed: Packed,
    logprob_M: torch.Tensor,
    old_M: torch.Tensor,
    kl_M: torch.Tensor | None,
    advantage_TN: torch.Tensor,
    clip: float,
    beta: float,
) -> torch.Tensor:
    """-min(r A, clip(r) A) + beta KL, token by token, mean over an example's tokens; summed over examples."""
    total = torch.zeros((), dtype=torch.float64)
    new, old = by_example(packed, logprob_M), by_example(packed, old_M)
    kl = by_example(packed, kl_M) if kl_M is not None else None
    for (t, n), tokens in new.items():
        part = torch.zeros((), dtype=torch.float64)
        for j, lp in enumerate(tokens):
            ratio, a = torch.exp(lp - old[t, n][j]), advantage_TN[t, n]
            low, high = ratio * a, min(max(ratio.item(), 1 - clip), 1 + clip) * a
            # what is clipped is a constant
            part = part - (low if low.item() <= high.item() else high)
            if kl is not None:
                part = part + beta * kl[t, n][j]
        total = total + part / len(tokens)
    return total


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_policy_loss_and_its_gradient_equal_a_loop_over_tokens(beta: float) -> None:
    packed = packed_of([[3, 1, 4], [2, 6, 5]])
    logprob_M = random_logprobs(packed, 2).requires_grad_()
    old_M = (
        logprob_M.detach()
        + 0.3 * torch.randn(logprob_M.shape, generator=torch.Generator().manual_seed(5)).double()
    )
    kl_M = (logprob_M - random_logprobs(packed, 3)).square() if beta else None
    advantage_TN = torch.tensor([[1.0, -2.0, 0.5], [-1.0, 0.0, 3.0]], dtype=torch.float64)
    loss_TN, kl_TN = policy_loss(packed, logprob_M, old_M, kl_M, advantage_TN, ratio_clip=0.2, beta=beta)
    wanted = naive_policy_loss(packed, logprob_M, old_M, kl_M, advantage_TN, 0.2, beta)
    assert loss_TN.shape == kl_TN.shape == (2, 3)
    torch.testing.assert_close(loss_TN.sum(), wanted)
    got = torch.autograd.grad(loss_TN.sum(), logprob_M, retain_graph=True)[0]
    torch.testing.assert_close(got, torch.autograd.grad(wanted, logprob_M)[0])
    if kl_M is not None:
        own = by_example(packed, kl_M)
        means = [[torch.stack(own[t, n]).mean() for n in range(3)] for t in range(2)]
        torch.testing.assert_close(kl_TN, torch.stack([torch.stack(x) for x in means]))
    else:
        ratio_M, a_M = (logprob_M - old_M).exp(), advantage_TN.flatten()[packed.owner_M]
        dead = ((ratio_M > 1.2) & (a_M > 0)) | ((ratio_M < 0.8) & (a_M < 0))
        wrong_side = ((ratio_M > 1.2) & (a_M < 0)) | ((ratio_M < 0.8) & (a_M > 0))
        assert (
            ((ratio_M > 1.2) & (a_M > 0)).any() and ((ratio_M < 0.8) & (a_M < 0)).any() and wrong_side.any()
        )
        assert (got[dead] == 0).all(), "beyond the clip on the side that the advantage pushes to: no gradient"
        assert (got[wrong_side] != 0).all(), "beyond the clip on the other side: pulled back"
        assert (kl_TN == 0).all()


def test_on_policy_gradient_is_the_plain_policy_gradient() -> None:
    packed = packed_of([[3, 2]])
    logprob_M = random_logprobs(packed, 4).requires_grad_()
    advantage_TN = torch.tensor([[1.5, -0.5]], dtype=torch.float64)
    loss_TN, _ = policy_loss(
        packed, logprob_M, logprob_M.detach(), None, advantage_TN, ratio_clip=0.2, beta=0.0
    )
    got = torch.autograd.grad(loss_TN.sum(), logprob_M)[0]
    wanted = -(advantage_TN / packed.count_TN).flatten()[packed.owner_M]
    torch.testing.assert_close(got, wanted)


def test_correlation() -> None:
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert correlation(x, 5 - 2 * x) == pytest.approx(-1.0)
    assert correlation(x, torch.tensor([1.0, -1.0, -1.0, 1.0])) == pytest.approx(0.0, abs=1e-6)
    assert math.isnan(correlation(x[:2], x[:2])) and math.isnan(correlation(x, torch.ones(4)))


def test_auc_counts_pairs_within_tasks() -> None:
    """Against the Mann-Whitney U statistic, task by task; ties among the values, unknown examples, tasks of one kind."""
    generator = torch.Generator().manual_seed(2)
    value_TN = torch.randint(0, 5, (6, 9), generator=generator).float()
    good_TN = torch.rand(6, 9, generator=generator) < 0.4
    known_TN = torch.rand(6, 9, generator=generator) < 0.8
    good_TN[0], good_TN[1] = True, False
    won, pairs = 0.0, 0
    for t in range(2, 6):
        good, bad = value_TN[t][good_TN[t] & known_TN[t]], value_TN[t][~good_TN[t] & known_TN[t]]
        won += mannwhitneyu(good, bad).statistic
        pairs += len(good) * len(bad)
    assert pairs > 30 and ordered_pairs(value_TN, good_TN, known_TN) == (won, pairs)
    assert auc(value_TN, good_TN, known_TN) == pytest.approx(won / pairs)
    # a shift of a task's values changes nothing
    assert auc(value_TN + 10 * torch.arange(6).view(-1, 1), good_TN, known_TN) == pytest.approx(won / pairs)
    assert auc(good_TN.float(), good_TN, known_TN) == 1 and auc(-good_TN.float(), good_TN, known_TN) == 0
    assert math.isnan(auc(value_TN[:2], good_TN[:2], known_TN[:2]))
