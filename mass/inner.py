"""The inner loop: K weighted fine-tuning steps on T adapters at once, each state kept for the sweep back.

phi_{k+1} = U(phi_k, state_k, sum_i w_i grad l_i(phi_k) / N). The weights are inputs; the scorer is outside.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

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
    """Everything of inner step k that the adjoint sweep needs: what the step started from and the gradient it took."""

    adapter: Adapter
    state: Tensors
    grad: Adapter
    loss_TN: Tensor


@dataclass(frozen=True)
class Trajectory:
    """K steps and where they ended. All LoRA-sized."""

    steps: list[Step]
    adapter: Adapter
    rule: Rule
    lr: dict[str, Tensor]

    @property
    def clipped_T(self) -> Tensor:
        """True where some step's gradient of that task was cut to the clip norm."""
        if self.rule.clip is None:
            return torch.zeros_like(optimizers.norm(self.steps[0].grad), dtype=torch.bool)
        return torch.stack([optimizers.norm(step.grad) > self.rule.clip for step in self.steps]).any(0)


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
) -> Trajectory:
    """Take K steps from `start` [T, ...]. `lr` holds a 0-d tensor for each adapter tensor.

    `last`: makes the gradient of the last `count` steps, for an engine that keeps their graph (`metagrad.Reverse`).
    `settle`: test time alone.
    """
    lr = {key: value.detach() for key, value in lr.items()}
    adapter = {key: tensor.detach() for key, tensor in start.items()}
    state = optimizers.init(rule, adapter)
    taken = []
    for k in range(steps):
        loss_TN, grad = last(adapter) if last and k >= steps - count else gradient(adapter)
        taken.append(Step(adapter, state, grad, loss_TN))
        with torch.no_grad():
            adapter, state = optimizers.update(rule, k, grad, state, adapter, lr)
            adapter = adapter if settle is None else settle(k, adapter)
    return Trajectory(taken, adapter, rule, lr)


def exploded(before_T: Tensor, after_T: Tensor, growth: float) -> Tensor:
    """True [T] where the weighted inner loss is not finite after adaptation, or has grown by more than `growth`.

    The credit of such a task is noise: a step that overshoots has a derivative hundreds of times the usual one.
    """
    return ~torch.isfinite(after_T) | (after_T > growth * before_T.clamp(min=1e-3))
