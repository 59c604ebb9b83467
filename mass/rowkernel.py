"""The compiled product of `rowkernel.cpp`: the LoRA updates of rows of one token, for layers that share their input.

A step of a small model on a CPU is bound by memory and by the number of operations. PyTorch's products of one row by a
small bf16 matrix read 3 to 6 GB/s (docs/performance.md) and need several operations a layer; this is one call for q, k
and v, and reads every adapter once, at 11 to 14 GB/s. The C++ is compiled when it is first needed, in about a second, by the compiler that
`torch.compile` would use (`CXX`, or `g++`), into a folder that is gone again once it is loaded.
"""

import ctypes
import functools
import os
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-shared", "-fPIC")
SYMBOLS = {torch.float32: "updates_fp32", torch.bfloat16: "updates_bf16"}


class _Layout(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "width", "ranks", "layers", "threads")),
        *((name, ctypes.c_void_p) for name in ("adapter", "rank", "out", "a", "b", "y")),
    )


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled code; None, with a warning that says why, on a machine that cannot compile it."""
    compiler = os.environ.get("CXX") or "g++"
    try:
        with tempfile.TemporaryDirectory(prefix="mass-") as folder:
            file = Path(folder) / "rowkernel.so"
            command = [*compiler.split(), *FLAGS, str(SOURCE), "-o", str(file)]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
            found = ctypes.CDLL(str(file))
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        # compilers say where they are before they say what is wrong
        reason = next((line for line in said if "error" in line), said[0])
        warnings.warn(
            f"generation multiplies by adapters with PyTorch's own products, which is slower: {compiler} does not compile "
            f"{SOURCE.name} ({reason})",
            stacklevel=2,
        )
        return None
    for symbol in SYMBOLS.values():
        function = getattr(found, symbol)
        function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_void_p), None
    return found


def works_for(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether rows of this type can be multiplied here."""
    return device.type == "cpu" and dtype in SYMBOLS and library() is not None


class RowUpdates:
    """The updates of a stack of layers, each row by its own adapter.

    a_TKI: their A one below the other, K the sum of the ranks; b_TRO: the B of each, scaled; y_B1O: where the update of
    each goes. All contiguous, of one dtype (fp32 or bf16), on the CPU. adapter_B: the entry of T of each row.
    """

    def __init__(
        self, a_TKI: Tensor, b_TRO: Sequence[Tensor], y_B1O: Sequence[Tensor], adapter_B: Sequence[int]
    ) -> None:
        found = library()
        assert found is not None
        self.multiply = getattr(found, SYMBOLS[a_TKI.dtype])
        self.dtype, self.y_B1O = a_TKI.dtype, y_B1O
        count = len(b_TRO)
        numbers, pointers = ctypes.c_int64 * count, ctypes.c_void_p * count
        # what the layout points to has to stay
        self.held = a_TKI, b_TRO
        self.arrays: tuple[ctypes.Array[Any], ...] = (
            (ctypes.c_int64 * len(adapter_B))(*adapter_B),
            numbers(*(b.shape[1] for b in b_TRO)),
            numbers(*(b.shape[2] for b in b_TRO)),
            pointers(*(b.data_ptr() for b in b_TRO)),
            pointers(*(y.data_ptr() for y in y_B1O)),
        )
        adapter, rank, out, b, y = (ctypes.addressof(array) for array in self.arrays)
        sizes = len(adapter_B), a_TKI.shape[2], a_TKI.shape[1], count, torch.get_num_threads()
        self.layout = _Layout(*sizes, adapter, rank, out, a_TKI.data_ptr(), b, y)
        self.address = ctypes.addressof(self.layout)

    def __call__(self, x_B1I: Tensor) -> Sequence[Tensor]:
        """The update of each layer, [B, 1, O], which the next call overwrites."""
        x_B1I = x_B1I.to(self.dtype).contiguous()
        self.multiply(self.address, x_B1I.data_ptr())
        return self.y_B1O
