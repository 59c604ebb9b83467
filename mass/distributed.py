"""Processes: joining and leaving the group, and the few collectives that the loop uses."""

import logging
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from mass.errors import MassError

# DeepSpeed reads these when it is imported; a machine without accelerator needs the first to be asked for gloo.
os.environ.setdefault("DS_SKIP_CUDA_CHECK", "1")


@dataclass(frozen=True)
class World:
    """This process among the others."""

    rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        return self.rank == 0


def start(device: str = "auto", patience: float = 600.0) -> World:
    """Join the process group (of one, when no launcher made more) and take this process's device.

    `patience`: seconds; no collective waits longer for a rank than this and a minute. Works under `deepspeed`, `torchrun` and plain `python`. On CPU the backend is gloo.
    """
    if device.startswith("cuda") and (no_gpu := why_no_gpu()):
        raise MassError(f"model.device={device}: {no_gpu}. Use model.device=auto or cpu")
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    for key, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(key, value)
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(_free_port())
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed

    # DeepSpeed would compile a shared-memory all-reduce for CPUs: it wants a compiler, and when a rank dies its peers
    # spin on shared flags for ever. Gloo notices a dead peer.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    local = int(os.environ["LOCAL_RANK"])
    on_cuda = os.environ.get("DS_ACCELERATOR") != "cpu" and torch.cuda.is_available()
    chosen = torch.device("cuda", local) if on_cuda else torch.device("cpu")
    # DeepSpeed 0.19 still calls collectives by names that torch 2.13 deprecates, at every step.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    if on_cuda:
        if local >= torch.cuda.device_count():
            raise MassError(
                f"this machine has {torch.cuda.device_count()} GPU(s), and process {local + 1} on it wants one of its own. "
                "Start no more processes than GPUs (deepspeed --num_gpus, torchrun --nproc_per_node)"
            )
        torch.cuda.set_device(chosen)
    if not dist.is_initialized():
        deepspeed.init_distributed(
            dist_backend="nccl" if on_cuda else "gloo",
            timeout=longest_wait(patience),
            verbose=False,
        )
    return World(dist.get_rank(), dist.get_world_size(), chosen)


def why_no_gpu() -> str | None:
    """What keeps this process from a GPU; None where it can use one."""
    if not torch.cuda.is_available():
        return f"PyTorch {torch.__version__} finds no GPU here"
    return (
        "the variable DS_ACCELERATOR=cpu keeps to CPUs" if os.environ.get("DS_ACCELERATOR") == "cpu" else None
    )


def longest_wait(patience: float) -> timedelta:
    """Of a collective: by then the watchdog has ended a run whose rank is late, and said why."""
    return timedelta(seconds=patience + 60)


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def mean_over_ranks(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The mean of each tensor over all ranks, the same bits on each. DeepSpeed's own mean of equal parts changes nothing
    more; known here, the gradient's norm can be logged and its step left out before the engine sees it.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return dict(tensors)
    flat = torch.cat([x.flatten() for x in tensors.values()])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    parts = flat.split([x.numel() for x in tensors.values()])
    return {key: part.view_as(x) for (key, x), part in zip(tensors.items(), parts, strict=True)}


def reduce_sum(values: list[float]) -> list[float]:
    """Sum of each number over all ranks, in fp64."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return values
    flat = torch.tensor(values, dtype=torch.float64, device=_collective_device())
    dist.all_reduce(flat)
    return flat.tolist()


def gather_bytes(value: Tensor) -> list[Tensor]:
    """Each rank's uint8 tensor (of equal length), on every rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    own = value.to(_collective_device())
    out = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(out, own)
    return [x.cpu() for x in out]


def any_rank(flag: bool) -> bool:
    """True on every rank when it is true on one."""
    return reduce_sum([float(flag)])[0] > 0


def _collective_device() -> torch.device:
    return (
        torch.device("cuda", torch.cuda.current_device())
        if dist.get_backend() == "nccl"
        else torch.device("cpu")
    )


def _free_port() -> int:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
