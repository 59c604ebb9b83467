"""The scorer head: hidden states of (task, example) -> a score -> a weight in the inner loss.

Features are means of hidden states of the frozen base (a middle and the last layer) over an example's solution tokens,
the same over the task's tokens, and their product. They are taken without adapter, so they stay what they were while the
policy learns. Last-token pooling and last-layer-over-all-tokens were measured to be much weaker probes of correctness.
"""

from collections.abc import Sequence as Seq

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from mass.batch import Packed
from mass.blocks import Split, enter, model_inputs, run_block
from mass.lora import Layers, using


class Scorer(nn.Module):
    """eta: standardised [task, example, task * example] features -> MLP -> one score an example."""

    def __init__(self, width: int, depth: int, hidden: int) -> None:
        """`width`: the model's hidden size; `depth`: how many layers the features come from."""
        super().__init__()
        self.width = width
        self.net = nn.Sequential(
            nn.Linear(3 * width * depth, hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            # no bias: the softmax does not see a shift
            nn.Linear(hidden, 1, bias=False),
        )
        # All scores start equal: the first credits are taken under uniform weights, where they are cleanest.
        for tensor in self.net[-1].parameters():
            nn.init.zeros_(tensor)

    def forward(self, task_TF: Tensor, example_TNF: Tensor) -> Tensor:
        """Scores [T, N], fp32."""
        example = self._standardise(example_TNF)
        task = self._standardise(task_TF).unsqueeze(1).expand_as(example)
        return self.net(torch.cat([task, example, task * example], -1)).squeeze(-1)

    def _standardise(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.unflatten(-1, (-1, self.width)), (self.width,)).flatten(-2)


def features(
    hf: PreTrainedModel, layers: Layers, parts: Split | None, packed: Packed, depths: Seq[float]
) -> Tensor:
    """Mean hidden state over each sequence's target tokens at the given depths (0..1 of the blocks), [T, N, F], fp32.

    The base model alone, no gradient. The state read is the target token's own, not the one that predicts it.
    """
    total = hf.config.get_text_config().num_hidden_layers
    wanted = [max(1, round(depth * total)) for depth in depths]
    with torch.no_grad(), using(layers, None):
        if parts is None:
            out = hf.base_model(**model_inputs(hf, packed), use_cache=False, output_hidden_states=True)
            states = [out.hidden_states[i] for i in wanted]
        else:
            call = enter(parts, packed)
            hidden, seen = call.hidden_BSD, {}
            for i in range(max(wanted)):
                hidden = run_block(parts, call, i, hidden, {})
                if i + 1 in wanted:
                    # The model's own list of hidden states has its last one after the final norm.
                    seen[i + 1] = parts.norm(hidden) if i + 1 == total else hidden
            states = [seen[i] for i in wanted]
        at_MF = torch.cat([state.flatten(0, 1)[packed.own_M].float() for state in states], -1)
        count = packed.count_TN.numel()
        sum_F = at_MF.new_zeros(count, at_MF.shape[1]).index_add_(0, packed.owner_M, at_MF)
        return (sum_F / packed.count_TN.clamp(min=1).view(-1, 1)).view(*packed.count_TN.shape, -1)


def weights(score_TN: Tensor, valid_TN: Tensor, temperature: float) -> Tensor:
    """w = N softmax(s / tau) over a task's valid examples, [T, N]; 0 for malformed ones and for a task without any."""
    masked = (score_TN / temperature).masked_fill(~valid_TN, float("-inf"))
    # A row of -inf alone has no softmax; it gets zeros without ever making a NaN that could reach a gradient.
    empty_T1 = ~valid_TN.any(1, keepdim=True)
    soft = torch.softmax(masked.masked_fill(empty_T1, 0.0), 1)
    return score_TN.shape[1] * soft * (valid_TN & ~empty_T1)


def score_gradient(score_TN: Tensor, valid_TN: Tensor, temperature: float, by_weight_TN: Tensor) -> Tensor:
    """dL/ds from dL/dw through the softmax, [T, N]. Sums to zero over a task (softmax ignores shifts)."""
    leaf = score_TN.detach().requires_grad_()
    (by_score,) = torch.autograd.grad(weights(leaf, valid_TN, temperature), leaf, by_weight_TN.to(leaf.dtype))
    return by_score


def saturation(score_TN: Tensor, valid_TN: Tensor) -> Tensor:
    """Mean square of the centred scores of valid examples, per task [T]. Without it scores grow without bound."""
    count_T1 = valid_TN.sum(1, keepdim=True).clamp(min=1)
    mean_T1 = (score_TN * valid_TN).sum(1, keepdim=True) / count_T1
    return (((score_TN - mean_T1) * valid_TN).square().sum(1, keepdim=True) / count_T1).squeeze(1)


def effective_examples(weight_TN: Tensor) -> Tensor:
    """1 / sum of squared normalised weights, [T]: N for uniform weights, 1 for a single one, 0 for none."""
    total_T = weight_TN.sum(1)
    square_T = weight_TN.square().sum(1)
    return torch.where(total_T > 0, total_T.square() / square_T.clamp(min=1e-30), 0.0)
