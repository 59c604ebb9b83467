"""What the adapters do with weighted examples: weighted fine-tuning, the same on one example, or a policy gradient."""

from collections.abc import Sequence as Seq
from dataclasses import replace

import torch
from torch import Tensor

from mass import inner, outer
from mass.batch import Packed
from mass.choices import guards
from mass.choices.kit import Kit, Updated, beginning, shots_for
from mass.forward import example_loss, loss_and_grad, reference_states, token_logprobs, token_values
from mass.lora import Adapter, expand
from mass.practice import Practice, fine_tune, pack_examples
from mass.problems import Problem

# how far a token's policy ratio may leave 1, as in PPO (arXiv 1707.06347)
RATIO_CLIP = 0.2
# the band that SPINE's option keeps the entropy of forking tokens in: these quantiles of theirs at the start
BAND = (0.1, 0.9)


def fine_tuned(kit: Kit, problems: Seq[Problem], practice: Practice, weight_TN: Tensor) -> Updated:
    """K weighted fine-tuning steps of T adapters, from the policy or from a fresh adapter (B = 0), with the kit's guards."""
    return _fine_tuned(kit, problems, practice.packed, weight_TN)


def fine_tuned_on_best(kit: Kit, problems: Seq[Problem], practice: Practice, weight_TN: Tensor) -> Updated:
    """The same on the one example of most weight. VDS-TTT: arXiv 2505.19475."""
    best_T = weight_TN.argmax(1).tolist()
    chosen = [[own[i]] if own else [] for own, i in zip(practice.examples, best_T, strict=True)]
    chosen = [
        [replace(e, valid=e.valid and bool(weight_TN[t, best_T[t]] > 0)) for e in own]
        for t, own in enumerate(chosen)
    ]
    packed, valid_TN = pack_examples(kit.lm, kit.prompts, chosen, [shots_for(kit, p).solve for p in problems])
    return _fine_tuned(kit, problems, packed, valid_TN.to(weight_TN.dtype))


def _fine_tuned(kit: Kit, problems: Seq[Problem], packed: Packed, weight_TN: Tensor) -> Updated:
    start = expand(beginning(kit), len(problems))
    guard, N = kit.guard, weight_TN.shape[1]
    notes = [""] * len(problems)
    if guard.max_loss is not None or guard.max_grad_norm is not None:
        weight_TN, notes = guards.skip(kit, packed, weight_TN, start)
    held_TN = torch.zeros_like(weight_TN, dtype=torch.bool)
    if guard.heldout:
        held_TN = guards.hold_out(kit, problems, weight_TN)
        weight_TN = guards.rescaled(weight_TN, ~held_TN)
    tuned = fine_tune(
        kit.lm,
        packed,
        weight_TN,
        start,
        rule=kit.rule,
        lr=kit.lr,
        steps=kit.steps,
        max_growth=kit.max_growth,
        parts=kit.parts if kit.recompute else None,
        pull=(lambda adapter: guards.pull_back(kit, start, adapter)) if guard.fisher else None,
        settle=guards.restoring(kit, problems, start) if guard.restore else None,
    )
    steps = tuned.trajectory.steps
    loss_KTN = [step.loss_TN for step in steps]
    if tuned.last_TN is not None:
        loss_KTN.append(tuned.last_TN)
    losses_KT = [((weight_TN * loss_TN).sum(1) / N) for loss_TN in loss_KTN]
    states = [*(step.adapter for step in steps), tuned.trajectory.adapter]
    taken = [len(steps)] * len(problems)
    adapter, ok_T = tuned.trajectory.adapter, ~tuned.exploded_T
    if guard.heldout and kit.max_growth is not None:
        counts_T = held_TN.sum(1)
        held_KT = [(loss_TN * held_TN).sum(1) / counts_T.clamp(min=1) for loss_TN in loss_KTN]
        best = guards.best_steps([x.tolist() for x in held_KT])
        taken = [k if count else len(steps) for k, count in zip(best, counts_T.tolist(), strict=True)]
        adapter = {key: torch.stack([states[k][key][t] for t, k in enumerate(taken)]) for key in adapter}
        used_T = torch.stack([losses_KT[k][t] for t, k in enumerate(taken)])
        ok_T = ~inner.exploded(losses_KT[0], used_T, kit.max_growth)
        told = [
            f"stopped after {k} of {len(steps)} steps by {count} held-out examples" if count else ""
            for k, count in zip(taken, counts_T.tolist(), strict=True)
        ]
        notes = ["; ".join(filter(None, both)) for both in zip(notes, told, strict=True)]
    losses = [[float(loss_T[t]) for loss_T in losses_KT[: taken[t] + 1]] for t in range(len(problems))]
    trained_T = (weight_TN != 0).any(1)
    losses = [own if trained_T[t] else [] for t, own in enumerate(losses)]
    ok = [bool(x) for x in ok_T]
    notes = [note if ok[t] or not losses[t] else _dropped(losses[t]) for t, note in enumerate(notes)]
    ok = [x and bool(trained_T[t]) and taken[t] > 0 for t, x in enumerate(ok)]
    return Updated(adapter, losses, ok, notes, len(steps))


def policy_gradient(kit: Kit, problems: Seq[Problem], practice: Practice, weight_TN: Tensor) -> Updated:
    """K steps of the clipped policy gradient on T problems' own samples, `weight_TN` being their advantages.

    The KL term is against where the update starts. TTRL: Zuo et al., arXiv 2504.16084. With `knobs.forking` under 1 only
    that share of a problem's tokens, those of most entropy at the start, is learned from; `knobs.band` is the coefficient
    of the squared distance of their entropy from the band. SPINE: Wu et al., arXiv 2511.17938.
    """
    start = expand(beginning(kit), len(problems))
    packed, knobs = practice.packed, kit.knobs
    low_M = high_M = None
    if knobs.forking < 1 or knobs.band:
        with torch.no_grad():
            _, _, entropy_M = token_values(kit.lm.hf, kit.lm.lora, packed, start, entropy=True)
        assert entropy_M is not None
        keep_M = forking(packed, entropy_M, knobs.forking)
        packed = packed.only(keep_M)
        low_M, high_M = band(packed, entropy_M[keep_M])
    with torch.no_grad():
        old_M = token_logprobs(kit.lm.hf, kit.lm.lora, packed, start)
    start_MD = reference_states(kit.lm.hf, kit.lm.lora, packed, start) if knobs.kl else None
    count_T = practice.valid_TN.sum(1).clamp(min=1)

    def loss_T(logprob_M: Tensor, kl_M: Tensor | None = None, entropy_M: Tensor | None = None) -> Tensor:
        loss_TN, _ = outer.policy_loss(
            packed, logprob_M, old_M, kl_M, weight_TN, ratio_clip=RATIO_CLIP, beta=knobs.kl
        )
        if entropy_M is not None and low_M is not None and high_M is not None:
            outside_M = (entropy_M - high_M).clamp(min=0) + (low_M - entropy_M).clamp(min=0)
            loss_TN = loss_TN + knobs.band * packed.mean_by_example(outside_M.square())
        # a problem without any difference of rewards has nothing to learn, and the band alone teaches nothing
        return (loss_TN.sum(1) / count_T) * (weight_TN != 0).any(1)

    seen: list[Tensor] = []

    def values(adapter: Adapter) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return token_values(
            kit.lm.hf, kit.lm.lora, packed, adapter, reference_MD=start_MD, entropy=knobs.band > 0
        )

    def loss(logprob_M: Tensor, kl_M: Tensor | None = None) -> Tensor:
        value_T = loss_T(logprob_M, kl_M)
        seen.append(value_T.detach())
        return value_T.sum()

    def gradient(adapter: Adapter) -> tuple[Tensor, Adapter]:
        if knobs.band:
            leaf = {key: x.detach().requires_grad_() for key, x in adapter.items()}
            value_T = loss_T(*values(leaf))
            grads = torch.autograd.grad(
                value_T.sum(), list(leaf.values()), allow_unused=True, materialize_grads=True
            )
            seen.append(value_T.detach())
            return value_T.detach().unsqueeze(1), dict(zip(leaf, grads, strict=True))
        _, logprob_M, grad = loss_and_grad(
            kit.lm.hf,
            kit.lm.lora,
            packed,
            adapter,
            loss,
            reference_MD=start_MD,
            parts=kit.parts if kit.recompute else None,
        )
        return example_loss(packed, logprob_M), grad

    trajectory = inner.adapt(gradient, start, kit.rule, kit.lr, kit.steps)
    with torch.no_grad():
        seen.append(loss_T(*values(trajectory.adapter)))
    finite_T = torch.stack(seen).isfinite().all(0)
    learns_T = (weight_TN != 0).any(1)
    losses = [[float(x[t]) for x in seen] if learns_T[t] else [] for t in range(len(problems))]
    notes = ["" if finite_T[t] or not losses[t] else _dropped(losses[t]) for t in range(len(problems))]
    ok = [bool(x) for x in finite_T & learns_T]
    return Updated(trajectory.adapter, losses, ok, notes, kit.steps)


def forking(packed: Packed, entropy_M: Tensor, share: float) -> Tensor:
    """Which target tokens are among the `share` of their problem's with the most entropy, [M] bool; one at least."""
    keep_M = torch.zeros_like(entropy_M, dtype=torch.bool)
    task_M = packed.owner_M // packed.count_TN.shape[1]
    for t in range(packed.count_TN.shape[0]):
        own = (task_M == t).nonzero().flatten()
        if len(own):
            most = max(1, round(share * len(own)))
            keep_M[own[entropy_M[own].topk(most).indices]] = True
    return keep_M


def band(packed: Packed, entropy_M: Tensor) -> tuple[Tensor, Tensor]:
    """The lower and upper end of each target token's band: quantiles over its problem's tokens, [M] each."""
    low_M, high_M = entropy_M.clone(), entropy_M.clone()
    task_M = packed.owner_M // packed.count_TN.shape[1]
    for t in range(packed.count_TN.shape[0]):
        own = task_M == t
        if own.any():
            low_M[own], high_M[own] = (entropy_M[own].quantile(q) for q in BAND)
    return low_M, high_M


def _dropped(losses: Seq[float]) -> str:
    if len(losses) == 1:
        return "the adapter is not finite: the update was dropped"
    return f"the inner loss went from {losses[0]:.3g} to {losses[-1]:.3g}: the update was dropped"
