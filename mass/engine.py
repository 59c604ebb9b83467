"""The DeepSpeed engine over the outer parameters.

It wraps a bag of the outer parameters only (policy adapter, scorer head, learned inner learning rates). Their
gradients are made elsewhere, exactly; the bag's `forward` returns <parameter, gradient> summed, whose backward hands the
engine those gradients, and reduction, sharding, clipping and the optimizer step are DeepSpeed's own at every stage.
"""

import json
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mass.distributed import mean_over_ranks
from mass.errors import MassError

# What a user's file may not switch on, and what does it here. The optimizer must be the one whose state is saved.
FOREIGN = {
    "optimizer": "outer.lr_policy, outer.lr_scorer and outer.lr_inner",
    "scheduler": "outer.warmup",
    "fp16.enabled": "fp32 outer parameters, always",
    "bf16.enabled": "fp32 outer parameters, always (model.dtype is the base's)",
    # its older name, which DeepSpeed still reads
    "bfloat16.enabled": "fp32 outer parameters, always (model.dtype is the base's)",
    "torch_autocast.enabled": "fp32 outer parameters, always",
    "amp.enabled": "fp32 outer parameters, always",
    "zero_optimization.offload_param": "zero.offload=all, which moves the base",
}
# what a user's file says of a setting, or of a whole group, that it leaves to others
ABSENT = ("auto", None)
# our settings by the recipe key they come from
SOURCE = {
    "gradient_clipping": "outer.clip_grad",
    "zero_optimization.stage": "zero.stage",
    "zero_optimization.offload_optimizer": "zero.offload",
    "gradient_accumulation_steps": "outer.tasks_at_once",
    "train_micro_batch_size_per_gpu": "outer.tasks",
    "train_batch_size": "the number of processes",
}


def settings(stage: int, clip: float, offload: bool = False) -> dict[str, Any]:
    """The DeepSpeed configuration that the recipe stands for. The engine sees one ready gradient a step."""
    # At stage 3 DeepSpeed would put a linear without forward mode in the place of torch's, for the whole process.
    zero: dict[str, Any] = {"stage": stage, "memory_efficient_linear": False}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }


def merge(path: str, ours: Mapping[str, Any], world: int) -> dict[str, Any]:
    """A user's own DeepSpeed JSON with our settings in it. "auto" and null agree with everything, as if they were not there.

    Raises one MassError that names every entry which contradicts the recipe.
    """
    try:
        theirs = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MassError(f"zero.config={path}: cannot be read as JSON ({error})") from None
    if not isinstance(theirs, dict):
        raise MassError(f"zero.config={path}: a DeepSpeed configuration is a JSON object")
    has = _flat(theirs)
    wants = _flat(ours) | {"train_batch_size": world}
    wants.setdefault("zero_optimization.offload_optimizer.device", "none")
    groups = {name.rpartition(".")[0] for name in [*wants, *FOREIGN]} - {""}
    faults = []
    for name, value in has.items():
        if value in ABSENT:
            continue
        if name in groups:
            faults.append(f"{name}={json.dumps(value)}, where an object is wanted")
        if name in wants and value != wants[name]:
            source = next((key for start, key in SOURCE.items() if name.startswith(start)), "mass itself")
            faults.append(f"{name}={json.dumps(value)}, where {source} stands for {json.dumps(wants[name])}")
        for start, key in FOREIGN.items():
            if (name == start or name.startswith(f"{start}.")) and value not in (False, "none"):
                faults.append(f"{name}={json.dumps(value)}, which belongs to {key}")
    if faults:
        lines = "\n  ".join(faults)
        raise MassError(
            f"zero.config={path} contradicts the recipe. Remove these, or change the keys:\n  {lines}"
        )
    return _within(theirs, ours) | {"train_batch_size": world}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return out


def _within(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
    """Both trees; ours where both have a value."""
    out = {
        key: _within(value, {}) if isinstance(value, dict) else value
        for key, value in theirs.items()
        if value not in ABSENT
    }
    for key, value in ours.items():
        out[key] = _within(out.get(key, {}), value) if isinstance(value, dict) else value
    return out


class Bag(nn.Module):
    """The outer parameters, in named groups; `forward(gradients)` = sum of <parameter, gradient>."""

    def __init__(self, groups: Mapping[str, Mapping[str, Tensor]]) -> None:
        super().__init__()
        self.values = nn.ParameterDict()
        for group, tensors in groups.items():
            for key, tensor in tensors.items():
                # Module names may not hold dots.
                self.values[f"{group}/{key}".replace(".", "|")] = nn.Parameter(
                    tensor.detach().clone().float()
                )

    def forward(self, gradients: Mapping[str, Tensor]) -> Tensor:
        return torch.stack(
            [(p * gradients[key.replace("|", ".")]).sum() for key, p in self.values.items()]
        ).sum()


class Outer:
    """The DeepSpeed engine, seen as named tensors: `"<group>/<key>"`."""

    def __init__(
        self,
        groups: Mapping[str, Mapping[str, Tensor]],
        lr: Mapping[str, float],
        config: dict[str, Any],
        *,
        warmup: int,
        device: torch.device,
    ) -> None:
        """`groups`: name -> its tensors; `lr`: one learning rate a group; `config`: of `settings`; `warmup`: outer steps of linear warm-up."""
        import deepspeed

        self.lr, self.warmup, self.step_count = dict(lr), warmup, 0
        bag = Bag(groups).to(device)
        params = [
            {
                "params": [p for key, p in bag.values.items() if key.startswith(f"{group}/")],
                "lr": lr[group],
                "name": group,
            }
            for group, tensors in groups.items()
            if tensors
        ]
        optimizer = torch.optim.AdamW(params, betas=(0.9, 0.999), weight_decay=0.0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.engine, self.optimizer, _, _ = deepspeed.initialize(
                model=bag, optimizer=optimizer, config=config
            )
        self.bag = bag

    def values(self, group: str) -> dict[str, Tensor]:
        """The current values of a group, whole on every rank, detached copies."""
        from deepspeed.utils import safe_get_full_fp32_param

        out = {}
        for key, p in self.bag.values.items():
            if key.startswith(f"{group}/"):
                whole = p if not hasattr(p, "ds_id") else safe_get_full_fp32_param(p)
                out[key.partition("/")[2].replace("|", ".")] = whole.detach().clone()
        return out

    def learning_rate(self, group: str) -> float:
        """The rate that the next step uses."""
        return self.lr[group] * min(1.0, (self.step_count + 1) / max(1, self.warmup))

    def step(self, gradients: Mapping[str, Tensor]) -> tuple[bool, dict[str, float]]:
        """One optimizer step on the mean over ranks of `gradients`.

        Returns whether it was taken, and the norm of each group's mean gradient before clipping. Where the mean or a
        norm is not finite, nothing is changed on any rank.
        """
        gradients = mean_over_ranks(gradients)
        norms = {
            group: sum(g.square().sum().item() for key, g in gradients.items() if key.startswith(f"{group}/"))
            ** 0.5
            for group in self.lr
        }
        # a norm that overflows is DeepSpeed's reason to leave a step out, at some stages
        finite = all(math.isfinite(norm) for norm in norms.values())
        if not finite or not all(torch.isfinite(g).all() for g in gradients.values()):
            self.step_count += 1
            return False, norms
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(group["name"])
        # what is kept as it is has no share in the norm that the others are clipped by
        kept = {group for group, lr in self.lr.items() if lr == 0}
        gradients = {
            key: torch.zeros_like(g) if key.partition("/")[0] in kept else g for key, g in gradients.items()
        }
        self.engine.backward(self.engine(gradients))
        self.engine.step()
        self.step_count += 1
        return True, norms

    def state(self) -> dict[str, Tensor]:
        """Optimizer state, whole on every rank: Adam's moments as `"m:<name>"`, `"v:<name>"`, and the step counts."""
        from deepspeed.utils import safe_get_full_optimizer_state

        taken = self._adam_steps()
        out = {"outer_steps": torch.tensor(self.step_count), "adam_steps": torch.tensor(taken)}
        if taken:
            self._link()
        for key, p in self.bag.values.items():
            for short, long in _MOMENTS:
                if not taken:
                    whole = torch.zeros(_shape(p))
                elif self._sharded:
                    whole = safe_get_full_optimizer_state(p, long)
                else:
                    whole = self.optimizer.state[p][long]
                out[f"{short}:{key.replace('|', '.')}"] = whole.detach().cpu().clone()
        return out

    def load(self, groups: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Tensor]) -> None:
        """Put back values and optimizer state saved at any stage and any number of ranks."""
        self.step_count, taken = int(state["outer_steps"]), int(state["adam_steps"])
        inner = self.optimizer.optimizer if self._sharded else self.optimizer
        if taken:
            stage3 = self.engine.zero_optimization_stage() == 3
            flat = self.optimizer.fp32_partitioned_groups_flat if stage3 else None
            for held in flat or [p for group in inner.param_groups for p in group["params"]]:
                moments = {long: torch.zeros_like(held) for _, long in _MOMENTS}
                inner.state[held] = {"step": torch.tensor(float(taken)), **moments}
            self._link()
        for key, p in self.bag.values.items():
            name = key.replace("|", ".")
            group_name, _, rest = name.partition("/")
            self._set(p, groups[group_name][rest], None)
            for short, long in _MOMENTS if taken else ():
                self._set(p, state[f"{short}:{name}"], long)

    @property
    def _sharded(self) -> bool:
        return self.engine.zero_optimization_stage() > 0

    def _link(self) -> None:
        """Stages 1 and 2 find a parameter's moments through links that DeepSpeed 0.19 makes after the first step of the
        first parameter group only, when the other groups have no moments yet.
        """
        if self.engine.zero_optimization_stage() in (1, 2):
            from deepspeed.utils import lazy_init_hp_params_optimizer_state as link

            flat = self.optimizer.single_partition_of_fp32_groups
            for group, partition in zip(self.optimizer.bit16_groups, flat, strict=True):
                link(group, partition, self.optimizer.optimizer.state)

    def _set(self, p: nn.Parameter, value: Tensor, moment: str | None) -> None:
        """Set a parameter (and its master copy, where DeepSpeed keeps one) or one of its moments from the whole value."""
        import deepspeed
        from deepspeed import utils

        value = value.to(self.engine.device)
        if moment is None:
            gathered = deepspeed.zero.GatheredParameters([p], modifier_rank=0, enabled=hasattr(p, "ds_id"))
            with torch.no_grad(), gathered:
                p.copy_(value)
        if hasattr(p, "ds_id"):
            # The setters of whole values fail where a parameter does not divide by the ranks; those of parts do not.
            size = p.ds_tensor.numel()  # type: ignore[attr-defined]
            flat = torch.zeros(size * dist.get_world_size(), device=value.device)
            flat[: value.numel()] = value.flatten()
            own = flat[size * dist.get_rank() : size * (dist.get_rank() + 1)]
            if moment is None:
                utils.safe_set_local_fp32_param(p, own)
            else:
                utils.safe_set_local_optimizer_state(p, own, moment)
        elif self._sharded:
            if moment is None:
                utils.safe_set_full_fp32_param(p, value)
            else:
                utils.safe_set_full_optimizer_state(p, value, moment)
        elif moment is not None:
            self.optimizer.state[p][moment].copy_(value)

    def _adam_steps(self) -> int:
        inner = self.optimizer.optimizer if self._sharded else self.optimizer
        return max((int(entry["step"]) for entry in inner.state.values() if "step" in entry), default=0)


_MOMENTS = (("m", "exp_avg"), ("v", "exp_avg_sq"))


def _shape(p: nn.Parameter) -> torch.Size:
    return getattr(p, "ds_shape", p.shape)
