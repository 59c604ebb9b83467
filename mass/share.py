"""Processes that a launcher started share the batches of a file: which ones are this process's, and which device."""

import os
from dataclasses import dataclass

import torch
from accelerate import PartialState


@dataclass(frozen=True)
class Share:
    """This process among those that a launcher started: it takes the batches rank, rank + size, ..."""

    rank: int = 0
    size: int = 1

    def wait(self) -> None:
        """Go on when all processes are here."""
        if self.size > 1:
            PartialState().wait_for_everyone()

    def leave(self) -> None:
        """Part from the others; nothing is waited for."""
        if self.size > 1:
            PartialState().destroy_process_group()


def launched() -> bool:
    """Whether a launcher started several processes."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def join() -> tuple[Share, list[str]]:
    """Our share, and which device is ours, as a recipe override."""
    if not launched():
        return Share(), []
    state = PartialState(cpu=not torch.accelerator.is_available())
    # which of them is this process's own, PartialState has told torch
    device = [] if state.device.type == "cpu" else [f"model.device={state.device.type}"]
    return Share(state.process_index, state.num_processes), device
