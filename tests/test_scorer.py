"""Scores to weights, and the hidden states that scores are made of."""

import pytest
import torch
from tiny import tiny_lm

from mass import blocks, scorer
from mass.batch import Sequence, pack
from mass.lora import fresh, using
from mass.scorer import Scorer, effective_examples, features, saturation, score_gradient, weights


def random_scores(tasks: int = 3, examples: int = 5) -> torch.Tensor:
    return torch.randn(tasks, examples, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


VALID = torch.tensor([[True] * 5, [True, False, True, False, False], [False] * 5])


def test_weights_are_a_softmax_over_the_valid_examples_times_their_number() -> None:
    score_TN = random_scores()
    weight_TN = weights(score_TN, VALID, 0.7)
    for t in range(3):
        top = [(score_TN[t, n] / 0.7).exp().item() if VALID[t, n] else 0.0 for n in range(5)]
        wanted = [5 * x / sum(top) if sum(top) else 0.0 for x in top]
        assert weight_TN[t].tolist() == pytest.approx(wanted, abs=1e-12)
    assert weight_TN.sum(1).tolist() == pytest.approx([5.0, 5.0, 0.0])
    assert (weight_TN[~VALID] == 0).all()


def test_weights_do_not_change_when_a_task_s_scores_shift() -> None:
    score_TN = random_scores()
    shifted = weights(score_TN + torch.tensor([[100.0], [-3.0], [7.0]]), VALID, 1.0)
    torch.testing.assert_close(shifted, weights(score_TN, VALID, 1.0), rtol=1e-10, atol=1e-12)


def test_a_low_temperature_sharpens_and_a_high_one_flattens() -> None:
    score_TN = random_scores()[:1]
    valid = VALID[:1]
    assert weights(score_TN, valid, 1e-3).max().item() == pytest.approx(5.0)
    torch.testing.assert_close(weights(score_TN, valid, 1e6), torch.ones(1, 5).double(), rtol=0, atol=1e-5)


def test_a_malformed_example_s_score_does_not_matter_even_when_not_finite() -> None:
    score_TN = random_scores()
    spoiled = score_TN.masked_fill(~VALID, float("nan"))
    torch.testing.assert_close(weights(spoiled, VALID, 1.0), weights(score_TN, VALID, 1.0))


def test_score_gradient_is_the_derivative_through_the_softmax_and_sums_to_zero() -> None:
    score_TN = random_scores()
    by_weight_TN = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    got = score_gradient(score_TN, VALID, 0.7, by_weight_TN)
    numeric = torch.zeros_like(score_TN)
    for t in range(3):
        for n in range(5):
            step = torch.zeros_like(score_TN)
            step[t, n] = 1e-6
            up, down = (weights(score_TN + s * step, VALID, 0.7) for s in (1, -1))
            numeric[t, n] = ((up - down) * by_weight_TN).sum() / 2e-6
    torch.testing.assert_close(got, numeric, rtol=1e-6, atol=1e-8)
    assert got.sum(1).abs().max() < 1e-12
    assert got[0].abs().max() > 1e-3
    assert (got[2] == 0).all(), "a task without examples passes no gradient, and no NaN"


def test_effective_examples_counts_how_many_carry_the_weight() -> None:
    weight_TN = torch.tensor(
        [[1.0, 1.0, 1.0, 1.0], [4.0, 0.0, 0.0, 0.0], [2.0, 2.0, 0.0, 0.0], [0.0] * 4, [3.0, 1.0, 0.0, 0.0]]
    )
    assert effective_examples(weight_TN).tolist() == pytest.approx(
        [4.0, 1.0, 2.0, 0.0, 1 / (9 / 16 + 1 / 16)]
    )


def test_saturation_is_the_mean_square_of_centred_valid_scores() -> None:
    score_TN = random_scores().requires_grad_()
    got_T = saturation(score_TN, VALID)
    wanted = [score_TN[0].var(correction=0).item(), score_TN[1, [0, 2]].var(correction=0).item(), 0.0]
    assert got_T.tolist() == pytest.approx(wanted, abs=1e-12)
    assert saturation(score_TN + 100, VALID).tolist() == pytest.approx(wanted, abs=1e-9)
    (grad,) = torch.autograd.grad(got_T.sum(), score_TN)
    assert torch.isfinite(grad).all() and (grad[~VALID] == 0).all() and grad[0].abs().max() > 0


def test_all_scores_are_equal_at_first_and_the_gradient_reaches_the_last_layer() -> None:
    torch.manual_seed(0)
    head = Scorer(width=4, depth=2, hidden=6)
    score_TN = head(torch.randn(2, 8), torch.randn(2, 3, 8))
    assert score_TN.shape == (2, 3) and (score_TN == 0).all()
    (score_TN * torch.tensor([1.0, -1.0, 0.5])).sum().backward()
    assert head.net[-1].weight.grad.abs().max() > 0


def test_the_head_reads_standardised_task_example_and_product() -> None:
    torch.manual_seed(0)
    head = Scorer(width=4, depth=2, hidden=6)
    with torch.no_grad():
        for p in head.parameters():
            p.normal_()
    task_TF, example_TNF = torch.randn(2, 8), torch.randn(2, 3, 8)

    def standard(x: torch.Tensor) -> torch.Tensor:
        parts = [(part - part.mean()) / (part.var(correction=0) + 1e-5).sqrt() for part in x.split(4)]
        return torch.cat(parts)

    got = head(task_TF, example_TNF)
    for t in range(2):
        for n in range(3):
            task, example = standard(task_TF[t]), standard(example_TNF[t, n])
            wanted = head.net(torch.cat([task, example, task * example]))
            assert got[t, n].item() == pytest.approx(wanted.item(), abs=1e-5)
    # each layer's part has its own scale taken out
    scaled = torch.cat([7 * example_TNF[..., :4], 0.1 * example_TNF[..., 4:]], -1)
    torch.testing.assert_close(head(task_TF, scaled), got, rtol=1e-2, atol=1e-2)


def test_features_do_not_depend_on_whether_the_blocks_are_driven() -> None:
    lm = tiny_lm("llama", torch.float32, num_hidden_layers=4)
    packed = pack([[Sequence(list(range(3, 20)), 4), Sequence(list(range(40, 50)), 2)]], 0)
    driven, whole = (
        features(lm.hf, lm.lora, parts, packed, [0.5, 1.0]) for parts in (blocks.split(lm.hf, lm.lora), None)
    )
    torch.testing.assert_close(driven, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("driven", [True, False], ids=["blocks", "whole"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_features_are_mean_hidden_states_of_the_target_tokens(architecture: str, driven: bool) -> None:
    """Packed with others as alone, read at the middle and the last layer, without the adapter that is in the slots."""
    lm = tiny_lm(architecture, torch.float32, num_hidden_layers=4)
    parts = blocks.split(lm.hf, lm.lora) if driven else None
    generator = torch.Generator().manual_seed(3)

    def sequence(length: int, prompt: int) -> Sequence:
        return Sequence(torch.randint(3, 259, (length,), generator=generator).tolist(), prompt)

    tasks = [[sequence(9, 4), None, sequence(5, 1)], [sequence(17, 16), sequence(6, 2), sequence(3, 2)]]
    packed = pack(tasks, 0)
    assert packed.tokens_TPS.shape[1] * packed.tokens_TPS.shape[0] < 5, "some row holds several sequences"
    noise = {key: torch.randn_like(x).unsqueeze(0) for key, x in fresh(lm.lora, 2, generator).items()}
    with using(lm.lora, noise):
        got = features(lm.hf, lm.lora, parts, packed, [0.5, 1.0])
    assert got.shape == (2, 3, 128) and got.dtype == torch.float32
    assert (got[0, 1] == 0).all()
    for t, task in enumerate(tasks):
        for n, s in enumerate(task):
            if s is None:
                continue
            with torch.no_grad():
                out = lm.hf(input_ids=torch.tensor([s.tokens]), output_hidden_states=True)
            wanted = torch.cat(
                [state[0, s.prompt :].mean(0) for state in (out.hidden_states[2], out.hidden_states[4])]
            )
            torch.testing.assert_close(got[t, n], wanted, rtol=1e-4, atol=1e-4)


def test_depths_name_the_layers_by_fraction() -> None:
    lm = tiny_lm("llama", torch.float32, num_hidden_layers=4)
    packed = pack([[Sequence([5, 6, 7, 8], 2)]], 0)
    one = [features(lm.hf, lm.lora, None, packed, [d])[0, 0] for d in (0.0, 0.25, 0.5, 0.75, 1.0)]
    torch.testing.assert_close(one[0], one[1])  # the embedding alone says nothing: at least one block
    for a, b in zip(one[1:], one[2:], strict=False):
        assert not torch.allclose(a, b)
    both = scorer.features(lm.hf, lm.lora, None, packed, [0.5, 1.0])[0, 0]
    torch.testing.assert_close(both, torch.cat([one[2], one[4]]))
