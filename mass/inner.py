"""The inner loop: K weighted fine-tuning steps on T adapters at once, each state kept for the sweep back.

phi_{k+1} = U(phi_k, state_k, sum_i w_i grad l_i(phi_k) / N). The weights are inputs; the scorer is outside.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mass import optimizers
from mass.lora import Adapter
from mass.optimizers import Rule, Tensors

# adapter -> (loss_TN, gradient of sum_i w_i l_i / N): one first-order pass over the examples
Gradient = Callable[[Adapter], tuple[Tensor, Adapter]]
# (k, adapter after step k) -> the adapter that the next step starts from; nothing differentiates through it
Settle = Callable[[int, Adapter], Adapter]


@dataclass(frozen=True)
class Step:
    """Everything of inner step k that the adjoint sweep needs: what the step started from and the gradient it took (None:
    not kept, since the step is one of plain SGD that cut no task's gradient)."""

    adapter: Adapter
    state: Tensors
    grad: Adapter | None
    loss_TN: Tensor


@dataclass(frozen=True)
class Trajectory:
    """K steps and where they ended. All LoRA-sized. `clipped_T`: True where some step's gradient of that task was cut to
    the clip norm."""

    steps: list[Step]
    adapter: Adapter
    rule: Rule
    lr: dict[str, Tensor]
    clipped_T: Tensor


def adapt(
    gradient: Gradient,
    start: Adapter,
    rule: Rule,
    lr: Mapping[str, Tensor],
    steps: int,
    *,
    last: Gradient | None = None,
    count: int = 0,
    settle: Settle | None = None,
    keep_grads: bool = True,
) -> Trajectory:
    """Take K steps from `start` [T, ...]. `lr` holds a 0-d tensor for each adapter tensor.

    `last`: makes the gradient of the last `count` steps, for an engine that keeps their graph (`metagrad.Reverse`).
    `settle`: test time alone. `keep_grads=False`: a step's gradient is kept only where the step's own derivative by the
    adapter and the gradient cannot be told without it (not so by the rate, and for an engine that compares with it).
    """
    lr = {key: value.detach() for key, value in lr.items()}
    adapter = {key: tensor.detach() for key, tensor in start.items()}
    state = optimizers.init(rule, adapter)
    taken = []
    clipped_T = optimizers.cut(replace(rule, clip=None), adapter)
    for k in range(steps):
        recorded = last is not None and k >= steps - count
        loss_TN, grad = last(adapter) if last and recorded else gradient(adapter)
        cut_T = optimizers.cut(rule, grad)
        clipped_T = clipped_T | cut_T
        # a recorded step's gradient is part of its graph, and known by it
        spare = not keep_grads and not recorded and optimizers.is_plain(rule) and not cut_T.any()
        taken.append(Step(adapter, state, None if spare else grad, loss_TN))
        with torch.no_grad():
            adapter, state = optimizers.update(rule, k, grad, state, adapter, lr)
            adapter = adapter if settle is None else settle(k, adapter)
        # the next step's gradient is not made beside this one
        del grad
    return Trajectory(taken, adapter, rule, lr, clipped_T)


def exploded(before_T: Tensor, after_T: Tensor, growth: float) -> Tensor:
    """True [T] where the weighted inner loss is not finite after adaptation, or has grown by more than `growth`.

    The credit of such a task is noise: a step that overshoots has a derivative hundreds of times the usual one.
    """
    return ~torch.isfinite(after_T) | (after_T > growth * before_T.clamp(min=1e-3))
