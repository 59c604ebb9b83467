"""Guards of a fine-tuning update, each off by default. They act at test time; meta-training refuses them, since its
derivative knows none of them.

max_loss, max_grad_norm   examples whose loss, or the norm of whose own gradient, is larger at the start are skipped:
                          EATA (Niu et al., arXiv 2204.02610) and SAR (Niu et al., arXiv 2302.12400), there by entropy
fisher                    a pull to the start, weighted by the diagonal Fisher information: EATA
restore                   after each step, weights go back to the start with this probability: CoTTA (arXiv 2203.13591)
heldout                   this share of a problem's examples is not trained on; of all steps the one with the least loss on
                          them is used
"""

import math
from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from mass import optimizers
from mass.batch import Packed, pack
from mass.choices.kit import Kit, beginning, shots_for
from mass.errors import MassError
from mass.forward import Loss, example_loss, loss_and_grad, token_logprobs
from mass.inner import Settle
from mass.lora import Adapter, expand
from mass.practice import seed_of, solve_sequence
from mass.problems import Problem

# training problems whose gradients are taken at once for the Fisher information
FISHER_ROWS = 8


def rescaled(weight_TN: Tensor, keep_TN: Tensor) -> Tensor:
    """The weights of the examples to keep, with the sum that all had: what is left out does not lower the step."""
    kept_TN = weight_TN * keep_TN
    left_T1 = kept_TN.sum(1, keepdim=True)
    scale_T1 = torch.where(left_T1 > 0, weight_TN.sum(1, keepdim=True) / left_T1.clamp(min=1e-30), 0.0)
    return kept_TN * scale_T1


def skip(kit: Kit, packed: Packed, weight_TN: Tensor, start: Adapter) -> tuple[Tensor, list[str]]:
    """The weights without examples over `max_loss` or `max_grad_norm` at the start, and a note for each problem."""
    keep_TN = weight_TN > 0
    if kit.guard.max_loss is not None:
        with torch.no_grad():
            loss_TN = example_loss(packed, token_logprobs(kit.lm.hf, kit.lm.lora, packed, start))
        keep_TN = keep_TN & (loss_TN <= kit.guard.max_loss)
    if kit.guard.max_grad_norm is not None:
        keep_TN = keep_TN & (gradient_norms(kit, packed, start) <= kit.guard.max_grad_norm)
    skipped_T = ((weight_TN > 0) & ~keep_TN).sum(1).tolist()
    notes = [f"{n} example{'s' * (n > 1)} skipped by a guard" if n else "" for n in skipped_T]
    return (rescaled(weight_TN, keep_TN) if any(skipped_T) else weight_TN), notes


def gradient_norms(kit: Kit, packed: Packed, start: Adapter) -> Tensor:
    """The 2-norm of each example's own gradient, [T, N]; N backward passes."""
    columns = []

    def alone(n: int) -> Loss:
        return lambda logprob_M: example_loss(packed, logprob_M)[:, n].sum()

    for n in range(packed.count_TN.shape[1]):
        _, _, grad = loss_and_grad(
            kit.lm.hf,
            kit.lm.lora,
            packed,
            start,
            alone(n),
            parts=kit.parts if kit.recompute else None,
        )
        columns.append(optimizers.norm(grad))
    return torch.stack(columns, 1)


def hold_out(kit: Kit, problems: Seq[Problem], weight_TN: Tensor) -> Tensor:
    """Which examples are held out, [T, N] bool: a seeded choice of those with a weight, at least 1 if there are 2."""
    held_TN = torch.zeros_like(weight_TN, dtype=torch.bool)
    for t, p in enumerate(problems):
        own = weight_TN[t].nonzero().flatten().tolist()
        count = min(max(1, round(kit.guard.heldout * len(own))), len(own) - 1)
        for i in sorted(own, key=lambda i: seed_of(kit.seed, "heldout", p.text, i))[: max(0, count)]:
            held_TN[t, i] = True
    return held_TN


def fisher_information(kit: Kit) -> Adapter:
    """The mean square of the gradient of each pool problem's reference solution at the start, without task axis."""
    if not kit.pool:
        raise MassError(
            "guard.fisher takes the Fisher information of training problems, and there are none here: "
            "set problems.train=FILE.jsonl, or guard.fisher=0"
        )
    total: Adapter = {}

    def summed(packed: Packed) -> Loss:
        return lambda logprob_M: example_loss(packed, logprob_M).sum()

    for i in range(0, len(kit.pool), FISHER_ROWS):
        some = kit.pool[i : i + FISHER_ROWS]
        rows = [
            [solve_sequence(kit.prompts, x.problem.text, x.solution, shots_for(kit, x.problem).solve)]
            for x in some
        ]
        packed = pack(rows, kit.lm.tokenizer.pad_token_id, kit.lm.device)
        _, _, grad = loss_and_grad(
            kit.lm.hf,
            kit.lm.lora,
            packed,
            expand(beginning(kit), len(some)),
            summed(packed),
            parts=kit.parts if kit.recompute else None,
        )
        total = {key: total.get(key, 0) + g.square().sum(0) / len(kit.pool) for key, g in grad.items()}
    return total


def pull_back(kit: Kit, start: Adapter, adapter: Adapter) -> Adapter:
    """The gradient of fisher * sum_j F_j (phi_j - start_j)^2. Zero at the start, so it acts from the second step on."""
    assert kit.fisher is not None
    return {key: 2 * kit.guard.fisher * kit.fisher[key] * (x - start[key]) for key, x in adapter.items()}


def restoring(kit: Kit, problems: Seq[Problem], start: Adapter) -> Settle:
    """Each weight goes back to the start with probability `restore`, by a draw that hangs on seed, problem and step."""

    def settle(k: int, adapter: Adapter) -> Adapter:
        out = {key: x.clone() for key, x in adapter.items()}
        for t, p in enumerate(problems):
            draw = torch.Generator().manual_seed(seed_of(kit.seed, "restore", p.text, k))
            for key, x in out.items():
                back = (torch.rand(x[t].shape, generator=draw) < kit.guard.restore).to(x.device)
                x[t] = torch.where(back, start[key][t], x[t])
        return out

    return settle


def best_steps(loss_KT: Seq[Seq[float]]) -> list[int]:
    """For each problem after how many steps its loss is least (the fewest that tie), from losses after 0, 1, ... steps."""
    out = []
    for own in zip(*loss_KT, strict=True):
        finite = [x if math.isfinite(x) else math.inf for x in own]
        out.append(finite.index(min(finite)))
    return out
