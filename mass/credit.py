"""What leaving an example out really does to the outer loss; a cheap guess of it; and how smooth the way there is.

The credit is a derivative, the truth a difference: the inner loop is run again without the example, and the weights of
the others are the softmax over them alone.
"""

from dataclasses import dataclass

import torch
from scipy.stats import spearmanr
from torch import Tensor

from mass import optimizers, scorer
from mass.forward import example_loss, loss_and_grad, token_logprobs
from mass.inner import Step
from mass.lora import Adapter
from mass.outer_loss import outer_loss
from mass.practice import fine_tune, pack_examples, seed_of
from mass.setting import TaskBatch, make_products

# seeds the answers that a verified outer loss samples; not a step that training takes
STEP = -1
# of the finite differences, in scores: with v ~ N(0, I) it changes a weight by about a tenth
REACH = 0.1


@dataclass(frozen=True)
class After:
    """T tasks after an update: the outer loss of each [T], whether its inner loop exploded [T], its adapter [T, ...]; tokens
    and failed verdicts of all outer losses."""

    loss_T: Tensor
    exploded_T: Tensor
    adapter: Adapter
    tokens: int = 0
    failures: int = 0


@dataclass(frozen=True)
class Smoothness:
    """See `smoothness`: all [T]. `moved`: D_f(s, v), the outer loss's first difference quotient along `direction_TN`."""

    agreement_T: Tensor
    curvature_T: Tensor
    moved_T: Tensor
    direction_TN: Tensor


def update(batch: TaskBatch, weight_TN: Tensor, *, watch: bool = True) -> After:
    """The inner loop under given weights, and the outer loss where it ends. `watch`: whether an inner loss that grows is told
    (a forward pass more); else a task has exploded where its adapter is not finite."""
    setting = batch.setting
    tuned = fine_tune(
        setting.lm,
        batch.practice.packed,
        weight_TN,
        batch.start,
        rule=setting.rule,
        lr=batch.lr,
        steps=setting.recipe.inner.steps,
        max_growth=setting.recipe.inner.max_growth if watch else None,
        parts=setting.parts if setting.checkpoint else None,
    )
    return _after(batch, tuned.trajectory.adapter, tuned.exploded_T)


def _after(batch: TaskBatch, adapter: Adapter, exploded_T: Tensor) -> After:
    found = outer_loss(
        batch.setting, batch.tasks, batch.solve_shots, adapter, batch.step, "after", need_grad=False
    )
    return After(found.loss_T, exploded_T, adapter, found.tokens, found.failures)


def _each_gradient(batch: TaskBatch) -> Adapter:
    """The gradient of each example's own loss where the loop starts, [T, N, ...]; zero for a malformed one."""
    setting, shape = batch.setting, batch.practice.valid_TN.shape
    lm = setting.lm
    alone = [[example] for own in batch.practice.examples for example in own]
    shots = [own for own in batch.solve_shots for _ in range(shape[1])]
    packed, _ = pack_examples(lm, setting.prompts, alone, shots)
    own = {key: x.repeat_interleave(shape[1], 0) for key, x in batch.start.items()}
    _, _, gradient = loss_and_grad(
        lm.hf,
        lm.lora,
        packed,
        own,
        lambda logprob_M: example_loss(packed, logprob_M).sum(),
        parts=setting.parts if setting.checkpoint else None,
    )
    return {key: g.unflatten(0, shape) for key, g in gradient.items()}


def left_out(batch: TaskBatch, score_TN: Tensor) -> tuple[Tensor, After]:
    """How much the outer loss rises when an example is left out, [T, N] (NaN for a malformed one); and the update with all.

    Positive: the example helps, as with the credit. The weights are the softmax of `score_TN` over the examples that are
    left; a task whose only example goes stays as it was.
    """
    whole = update(batch, _weights(batch, score_TN))
    return rises(batch, score_TN, whole.loss_T)[0], whole


def rises(batch: TaskBatch, score_TN: Tensor, whole_T: Tensor) -> tuple[Tensor, int, int]:
    """`left_out` where the outer loss with all, `whole_T`, is known (under the seeds of the batch's step); tokens and failed
    verdicts of its outer losses.

    With one inner step every example's gradient is taken once, an adapter an example; else it is N inner loops. Either way on
    every rank alike, whatever is malformed there.
    """
    rule, valid_TN = batch.setting.rule, batch.practice.valid_TN
    gradient = _each_gradient(batch) if batch.setting.recipe.inner.steps == 1 else None
    change_TN = torch.full_like(score_TN, float("nan"))
    tokens = failures = 0
    for i in range(valid_TN.shape[1]):
        rest_TN = valid_TN.clone()
        rest_TN[:, i] = False
        weight_TN = _weights(batch, score_TN, rest_TN)
        if gradient is None:
            less = update(batch, weight_TN, watch=False)
        else:
            mean = {
                key: torch.einsum("tn,tnij->tij", weight_TN / weight_TN.shape[1], g)
                for key, g in gradient.items()
            }
            state = optimizers.init(rule, batch.start)
            adapter, _ = optimizers.update(rule, 0, mean, state, batch.start, batch.lr)
            less = _after(batch, adapter, torch.zeros_like(valid_TN[:, 0]))
        change_TN[:, i] = torch.where(valid_TN[:, i], less.loss_T - whole_T, float("nan"))
        tokens, failures = tokens + less.tokens, failures + less.failures
    return change_TN, tokens, failures


def _weights(batch: TaskBatch, score_TN: Tensor, among_TN: Tensor | None = None) -> Tensor:
    among_TN = batch.practice.valid_TN if among_TN is None else among_TN
    return scorer.weights(score_TN, among_TN, batch.setting.recipe.scorer.temperature)


def one_step(batch: TaskBatch) -> tuple[Tensor, Tensor]:
    """<grad l_i, grad L> of each example where the loop starts, [T, N]: what a single small SGD step would make of the credit;
    and the outer loss there, [T].

    Of the weights it knows nothing. Source: TracIn, arXiv 2002.08484; for fine-tuning LESS, arXiv 2402.04333.
    """
    before = outer_loss(batch.setting, batch.tasks, batch.solve_shots, batch.start, batch.step, "before")
    setting, packed = batch.setting, batch.practice.packed
    zero_TN = torch.zeros_like(batch.practice.valid_TN, dtype=before.loss_T.dtype)
    loss_TN = zero_TN
    if setting.recipe.meta_gradient.one_sided:
        # its difference is to the losses at the start
        with torch.no_grad():
            loss_TN = example_loss(
                packed, token_logprobs(setting.lm.hf, setting.lm.lora, packed, batch.start)
            )
    products = make_products(setting, packed, zero_TN)
    dot_TN, _ = products(Step(batch.start, {}, before.grad, loss_TN), before.grad, False)
    return dot_TN, before.loss_T


def smoothness(batch: TaskBatch, score_TN: Tensor, whole: After, reach: float = REACH) -> Smoothness:
    """Two-point smoothness of the way from scores to adapter and outer loss: do finite differences at s and s + hv agree?

    The metaparameter is the vector of scores s of a task, its direction v ~ N(0, I) (the same at every call), h = `reach`.
    A(s) is the adapter after the inner loop, all its numbers in one vector, f(s) the outer loss there, and
    D_g(s, v) = (g(s + hv) - g(s)) / h. Three inner loops, at s (`whole`), s + hv and s + 2hv, give

        agreement  sign(D_A(s, v))' diag(d / |d|_1) sign(D_A(s + hv, v))   with d = |A(s + 2hv) - A(s)|, within [-1, 1];
                   1: every number of the adapter moves on in the direction in which it began
        curvature  |D_f(s + hv, v) - D_f(s, v)| / h, nats; 0: the outer loss is straight along v

    Source: metasmoothness, "Optimizing ML Training with Metagradient Descent", arXiv 2503.13751: definition 2 (empirical
    metasmoothness) and definition 1. There the metaparameters are weights of data; here their logarithms.
    """
    generators = [
        torch.Generator().manual_seed(seed_of(batch.setting.recipe.run.seed, "direction", t.problem.id))
        for t in batch.tasks
    ]
    direction_TN = torch.stack([torch.randn(score_TN.shape[1], generator=g) for g in generators]).to(score_TN)
    at = [whole]
    for k in (1, 2):
        at.append(update(batch, _weights(batch, score_TN + k * reach * direction_TN)))
    same_T = torch.zeros_like(whole.loss_T)
    total_T = torch.zeros_like(whole.loss_T)
    for key in whole.adapter:
        a, b, c = (x.adapter[key].flatten(1) for x in at)
        d = (c - a).abs()
        same_T += (d * (b - a).sign() * (c - b).sign()).sum(1)
        total_T += d.sum(1)
    first_T, second_T = ((at[k + 1].loss_T - at[k].loss_T) / reach for k in (0, 1))
    # a single example has weight 1 whatever its score: nothing moves
    agreement_T = torch.where(total_T > 0, same_T / total_T, float("nan"))
    return Smoothness(agreement_T, (second_T - first_T).abs() / reach, first_T, direction_TN)


def rank_correlation(x: Tensor, y: Tensor) -> float:
    """Spearman's, of two flat tensors; NaN under three points or without spread."""
    if x.numel() < 3 or x.std() == 0 or y.std() == 0:
        return float("nan")
    return float(spearmanr(x.cpu(), y.cpu()).statistic)
