"""How much memory can still be had: of a GPU, of the machine, and of the control groups that this process is in."""

import math
from pathlib import Path

import psutil
import torch

# of a group: its limit, what it uses, and of that the files which can go at once; by version of control groups
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = ("memory.max", "memory.current", "inactive_file")


def free_bytes(device: torch.device) -> tuple[float, str]:
    """Memory that can still be had, and whose it is: of a CUDA device what is free and what PyTorch keeps unused, else the
    least of what the machine has and what a container or a batch system leaves to this process."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + unused), "free"
    machine, group = float(psutil.virtual_memory().available), group_bytes()
    return (group, "free in this process's control group") if group < machine else (machine, "free")


def group_bytes(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float:
    """What the tightest memory limit over this process leaves, of control groups of either version; inf without one.

    `root`, `own`: where the groups lie, and which are ours (docs.kernel.org: cgroup-v2, cgroup-v1/memory).
    """
    left = math.inf
    for line in own.read_text().splitlines() if own.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            top, (limit, used, files) = root, _V2
        elif "memory" in controllers.split(","):
            top, (limit, used, files) = root / "memory", _V1
        else:
            continue
        # a container sees its own group at the top, whatever it is called outside
        group = top if ".." in Path(path).parts else top / path.lstrip("/")
        # a limit holds for all groups below it
        for folder in [group, *group.parents]:
            if folder == root.parent:
                break
            most = _number(folder / limit)
            if most < math.inf:
                left = min(
                    left, max(0.0, most - _number(folder / used) + _stat(folder / "memory.stat", files))
                )
    return left


def _number(path: Path) -> float:
    """A file that holds a number; "max", and a file that is not there, is no limit."""
    text = path.read_text().strip() if path.is_file() else "max"
    return math.inf if text == "max" else float(text)


def _stat(path: Path, name: str) -> float:
    words = path.read_text().split() if path.is_file() else []
    return float(words[words.index(name) + 1]) if name in words else 0.0
