"""One outer step without an inner loop (inner.steps=0): the solver alone is trained, on the outer loss itself.

gold is plain supervised fine-tuning on the reference solutions; verifier is GRPO (arXiv 2402.03300) on own answers. No
example is written, scored or trained on, and nothing is second-order: what meta-training has to beat at the same number of steps.
"""

from collections.abc import Mapping
from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from mass.batch import pack
from mass.episode import Clock, Result
from mass.lora import Adapter, expand
from mass.outer_loss import outer_loss
from mass.practice import Practice, answer
from mass.problems import Task
from mass.setting import Setting, answer_sampling, draw_shots


def run(
    setting: Setting,
    tasks: Seq[Task],
    step: int,
    policy: Adapter,
    eta: Mapping[str, Tensor],
    *,
    show: int = 0,
) -> Result:
    """The outer loss's gradient at the policy, the mean over T tasks; the scorer's is zero, so it stays as it is.

    `show`: for so many tasks also answer greedily. The result has no example, and no metric of what was not done.
    """
    clock = Clock()
    waited = setting.lm.shards.waited if setting.lm.shards else 0.0
    T = len(tasks)
    one = expand(policy, 1)
    shots = [own.solve for own in draw_shots(setting, tasks)]
    with clock("outer"):
        found = outer_loss(setting, tasks, shots, one, step, "before", beta=setting.recipe.outer.beta)
        texts = []
        if show:
            drawn = answer(
                setting.lm,
                setting.prompts,
                [task.problem.text for task in tasks[:show]],
                shots=shots[:show],
                adapter=one,
                sampling=answer_sampling(setting.recipe),
                seeds=[[0]] * min(show, T),
            )
            texts = [own[0].text for own in drawn]
    setting.lm.settle()
    if setting.lm.shards:
        clock.seconds["gather"] = setting.lm.shards.waited - waited
    gradients = {f"policy/{key}": found.grad[key].squeeze(0) / T for key in policy}
    gradients |= {f"scorer/{key}": torch.zeros_like(x) for key, x in eta.items()}
    judged_T = ~found.loss_T.isnan()
    metrics = {
        "meta/loss_before": found.loss_T[judged_T].mean().item(),
        "verifier/failures": float(found.failures),
        "tokens/outer": float(found.tokens),
    }
    if found.solved_T is not None:
        metrics["reward/solve_before"] = found.solved_T[judged_T].mean().item()
    if found.kl_T is not None:
        metrics["policy/kl"] = found.kl_T.mean().item()
    sums = dict.fromkeys(("verifier/failures", "tokens/outer"), 1)
    none_TN = torch.zeros(T, 0)
    nothing: list[list] = [[] for _ in tasks]
    practice = Practice([], nothing, nothing, pack(nothing, 0), none_TN.bool())
    counts = dict.fromkeys(metrics, T) | sums
    counts |= {
        key: int(judged_T.sum()) for key in ("meta/loss_before", "reward/solve_before") if key in metrics
    }
    return Result(gradients, metrics, counts, practice, none_TN, none_TN, (texts, []), clock.seconds)
