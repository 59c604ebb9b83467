"""Tokens are drawn from the distribution they are said to come from."""

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from mass.errors import MassError
from mass.sampling import TRIES, Cuts, _invert, _nucleus, pick, row_uniforms


def exact(logits: Tensor, cuts: Cuts) -> Tensor:
    """The distribution by the definition of each cut, with a full sort; fp64."""
    logits = logits.double() / cuts.temperature
    ranked = logits.sort(descending=True).values
    if cuts.top_k:
        logits = logits.masked_fill(logits < ranked[min(cuts.top_k, len(ranked)) - 1], -torch.inf)
    if cuts.top_p < 1:
        chance = logits.softmax(0).sort(descending=True)
        kept = chance.values.cumsum(0) - chance.values < cuts.top_p
        gone = torch.ones(len(logits), dtype=torch.bool)
        gone[chance.indices[kept]] = False
        logits = logits.masked_fill(gone, -torch.inf)
    if cuts.min_p:
        chance = logits.softmax(0)
        logits = logits.masked_fill(chance < cuts.min_p * chance.max(), -torch.inf)
    return logits.softmax(0)


def draw(logits: Tensor, cuts: Cuts, count: int, seed: int = 0) -> Tensor:
    """Tokens drawn `count` times from one row of logits."""
    uniform = row_uniforms([seed], count, cuts)[0]
    return pick(logits.expand(count, -1), uniform, cuts)[0]


CUTS = [
    Cuts(),
    Cuts(temperature=0.6),
    Cuts(temperature=1.7),
    Cuts(top_k=5),
    Cuts(top_p=0.8),
    Cuts(top_p=0.3),
    Cuts(min_p=0.2),
    Cuts(temperature=0.8, top_k=12, top_p=0.7),
    Cuts(temperature=1.3, top_k=20, top_p=0.9, min_p=0.1),
]


@pytest.mark.parametrize("cuts", CUTS, ids=str)
@pytest.mark.parametrize("vocabulary", [30, 300])
def test_draws_follow_the_exact_distribution(cuts: Cuts, vocabulary: int) -> None:
    logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(vocabulary))
    want = exact(logits, cuts).numpy()
    got = np.bincount(draw(logits, cuts, 20_000).numpy(), minlength=vocabulary)
    assert not got[want == 0].any()
    # the test's approximation needs a handful of draws in each cell
    rare = want * got.sum() < 10
    cells = np.append(got[~rare], got[rare].sum()), np.append(want[~rare], want[rare].sum()) * got.sum()
    full = cells[1] > 1e-9
    assert full.sum() > 2
    assert chisquare(cells[0][full], cells[1][full]).pvalue > 1e-4


@pytest.mark.parametrize("cuts", [c for c in CUTS if c != Cuts()], ids=str)
def test_the_set_of_tokens_is_the_sorted_definition_s(cuts: Cuts) -> None:
    # flat enough that every token left shows up
    logits = torch.rand(40, generator=torch.Generator().manual_seed(3))
    seen = set(draw(logits, cuts, 6_000).tolist())
    assert seen == set(exact(logits, cuts).nonzero().squeeze(1).tolist())


def test_rejection_and_the_sorted_nucleus_agree_and_ties_stay_together() -> None:
    logits = torch.tensor([[2.0, 1.0, 1.0, 1.0, -3.0, 0.5]])
    weight = (logits - 2).exp()
    for top_p in (0.1, 0.6, 0.7, 0.95):
        cuts = Cuts(top_p=top_p)
        inside = _nucleus(logits, weight, top_p * weight.sum(-1, keepdim=True)).nonzero()[:, 1].tolist()
        assert set(draw(logits[0], cuts, 2_000).tolist()) == set(inside)
        assert len({1, 2, 3} & set(inside)) in (0, 3)


def test_a_token_refused_every_time_is_drawn_from_the_sorted_nucleus() -> None:
    logits = torch.tensor([[3.0, 0.0, 0.0, 0.0]])
    # numbers at the end of the unit interval always fall on the last token, which top_p 0.5 cuts
    uniform = torch.full((1, TRIES + 1), 0.999, dtype=torch.float64)
    token, _ = pick(logits, uniform, Cuts(top_p=0.5))
    assert token.tolist() == [0]


def test_greedy_takes_the_first_of_the_largest_in_any_type() -> None:
    logits = torch.randn(9, 1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    logits[3, [900, 40, 41]] = 9.0
    tokens, _ = pick(logits, torch.empty(9, 0, dtype=torch.float64), Cuts(temperature=0))
    assert tokens.tolist() == [row.float().numpy().argmax() for row in logits]
    assert tokens[3] == 40


@pytest.mark.parametrize(
    "cuts", [Cuts(), Cuts(temperature=0), Cuts(temperature=0.5, top_k=3, top_p=0.5)], ids=str
)
def test_logprobs_are_the_policy_s_whatever_the_cut(cuts: Cuts) -> None:
    logits = torch.randn(7, 333, generator=torch.Generator().manual_seed(1)) * 3
    tokens, logprobs = pick(logits, row_uniforms(range(7), 1, cuts)[:, 0], cuts)
    want = logits.log_softmax(-1).gather(1, tokens.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(logprobs, want)
    assert logprobs.dtype == torch.float32


@pytest.mark.parametrize("cuts", CUTS, ids=str)
def test_a_row_s_token_does_not_depend_on_its_neighbours(cuts: Cuts) -> None:
    logits = torch.randn(11, 257, generator=torch.Generator().manual_seed(2))
    uniform = row_uniforms(range(11), 1, cuts)[:, 0]
    together, _ = pick(logits, uniform, cuts)
    alone = [pick(logits[i : i + 1], uniform[i : i + 1], cuts)[0].item() for i in range(11)]
    assert together.tolist() == alone


@pytest.mark.parametrize("cuts", CUTS, ids=str)
def test_a_row_of_nan_draws_token_0_with_log_prob_nan_and_its_neighbours_as_ever(cuts: Cuts) -> None:
    logits = torch.randn(5, 257, generator=torch.Generator().manual_seed(3))
    uniform = row_uniforms(range(5), 1, cuts)[:, 0]
    tokens, logprobs = pick(logits, uniform, cuts)
    broken = logits.clone()
    broken[1], broken[3, 7] = torch.nan, torch.inf
    got, said = pick(broken, uniform, cuts)
    assert got.tolist() == [tokens[0], 0, tokens[2], 0, tokens[4]]
    assert torch.equal(said[[0, 2, 4]], logprobs[[0, 2, 4]]) and said[[1, 3]].isnan().all()


def test_uniforms_belong_to_the_seed_and_begin_alike() -> None:
    cuts = Cuts(top_p=0.9)
    long, short = row_uniforms([5, 6], 10, cuts), row_uniforms([6], 4, cuts)
    assert torch.equal(long[1, :4], short[0])
    assert not torch.equal(long[0], long[1])
    assert row_uniforms([], 3, cuts).shape == (0, 3, TRIES + 1)


def test_the_ends_of_the_unit_interval_hit_tokens_that_have_weight() -> None:
    weight = torch.tensor([[0.0, 0.0, 1.0, 2.0, 0.0]], dtype=torch.float64)
    for uniform, want in ((0.0, 2), (1 / 3 - 1e-9, 2), (1 / 3 + 1e-9, 3), (1 - 2.0**-53, 3), (1.0, 3)):
        index, rest = _invert(weight, torch.tensor([[uniform]], dtype=torch.float64))
        assert index.item() == want
        assert 0 <= rest.item() <= 1


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_k": -1}, {"min_p": 2.0}],
)
def test_settings_out_of_range_are_named(wrong: dict[str, float]) -> None:
    with pytest.raises(MassError, match=next(iter(wrong))):
        Cuts(**wrong)  # type: ignore[arg-type]
