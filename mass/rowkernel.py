"""The compiled product of `rowkernel.cpp`: the LoRA updates of rows of one token, for layers that share their input.

A step of a small model on a CPU is bound by memory and by the number of operations. PyTorch's products of one row by a
small bf16 matrix read 3 to 6 GB/s (docs/performance.md) and need several operations a layer; this is one call for q, k
and v, and reads every adapter once, in the order in which `pack` has laid it out. The C++ is compiled when it is first
needed, in about a second, by the compiler that `torch.compile` would use (`CXX`, or `g++`), into a folder that is gone
again once it is loaded.
"""

import ctypes
import functools
import os
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-shared", "-fPIC")
# the ends of its functions' names
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rank", "out", "stride")),
        *((name, ctypes.c_void_p) for name in ("a", "b", "y")),
    )


class _Stack(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "width", "layers", "threads")),
        *((name, ctypes.c_void_p) for name in ("adapter", "layer")),
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
        # of a compiler that was stopped it is bytes, whatever was asked for
        said = getattr(error, "stderr", None) or ""
        lines = (said if isinstance(said, str) else said.decode(errors="replace")).strip().splitlines()
        # compilers say where they are before they say what is wrong
        reason = next((line for line in lines if "error" in line), (lines or [str(error)])[0])
        warnings.warn(
            f"generation multiplies by adapters with PyTorch's own products, which is slower: {compiler} does not compile "
            f"{SOURCE.name} ({reason})",
            stacklevel=2,
        )
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    for name in NAMES.values():
        updates, packs = getattr(found, f"updates_{name}"), getattr(found, f"pack_{name}")
        updates.argtypes, updates.restype = (pointer, pointer), None
        packs.argtypes, packs.restype = (*(number,) * 4, ctypes.c_float, *(pointer,) * 3), None
    return found


def works_for(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether rows of this type can be multiplied here."""
    return device.type == "cpu" and dtype in NAMES and library() is not None


class Packed(NamedTuple):
    """The adapters of some layers, laid out for `RowUpdates`."""

    pairs: list[tuple[Tensor, Tensor]]
    """A [T, R, I] and scaled B [T, R, O] of each."""
    block: Tensor
    """The bytes that these are views of: layer after layer, and in a layer each adapter's A with its B behind it."""


def pack(layers: Sequence[tuple[Tensor, Tensor, float]], dtype: torch.dtype) -> Packed:
    """Lay out A [T, R, I] and scale * B [T, O, R], rounded to `dtype`, of each (A, B, scale).

    Of fp32 tensors on the CPU; `works_for(dtype, ...)` has to be true.
    """
    run = _function(f"pack_{NAMES[dtype]}")
    numbers = [a_TRI.numel() + b_TOR.numel() for a_TRI, b_TOR, _ in layers]
    size = sum(numbers) * dtype.itemsize
    block, pairs = _memory(size), []
    for part, (a_TRI, b_TOR, scale) in zip(block[:size].view(dtype).split(numbers), layers, strict=True):
        (count, rank, width), out = a_TRI.shape, b_TOR.shape[1]
        a_TRI, b_TOR = a_TRI.contiguous(), b_TOR.contiguous()
        run(count, rank, width, out, scale, a_TRI.data_ptr(), b_TOR.data_ptr(), part.data_ptr())
        a_TX, b_TX = part.view(count, -1).split([rank * width, rank * out], 1)
        pairs.append((a_TX.unflatten(1, (rank, width)), b_TX.unflatten(1, (rank, out))))
    return Packed(pairs, block)


# The largest block that was given back. To touch new memory takes several times as long as to lay out adapters in it.
_spare: list[Tensor] = []


def give_back(packed: Packed) -> None:
    """Nobody uses the pairs any more: the next call of `pack` may write over them."""
    if not _spare or len(_spare[0]) < len(packed.block):
        _spare[:] = [packed.block]


def _memory(size: int) -> Tensor:
    if _spare:
        block = _spare.pop()
        if len(block) >= size:
            return block
        # not beside the larger one that takes its place
        del block
    # an ordinary tensor, whatever mode this call is made in: the next one's may be another
    with torch.inference_mode(False):
        return torch.empty(size, dtype=torch.uint8)


class RowUpdates:
    """The updates of layers that share an input, each row by its own adapter.

    layers: A [T, R, I] and B [T, R, O] of each as `pack` makes them; y_B1O: where the update of each goes, contiguous and of
    their dtype. adapter_B: the entry of T of each row.
    """

    def __init__(
        self, layers: Sequence[tuple[Tensor, Tensor]], y_B1O: Sequence[Tensor], adapter_B: Sequence[int]
    ) -> None:
        a_TRI = layers[0][0]
        self.multiply = _function(f"updates_{NAMES[a_TRI.dtype]}")
        self.dtype, self.y_B1O = a_TRI.dtype, y_B1O
        # what the layout points to has to stay
        self.held = layers
        self.adapters = (ctypes.c_int64 * len(adapter_B))(*adapter_B)
        self.layers = (_Layer * len(layers))(
            *(
                _Layer(a.shape[1], b.shape[2], a.stride(0), a.data_ptr(), b.data_ptr(), y.data_ptr())
                for (a, b), y in zip(layers, y_B1O, strict=True)
            )
        )
        sizes = len(adapter_B), a_TRI.shape[2], len(layers), torch.get_num_threads()
        self.stack = _Stack(*sizes, ctypes.addressof(self.adapters), ctypes.addressof(self.layers))
        self.address = ctypes.addressof(self.stack)

    def __call__(self, x_B1I: Tensor) -> Sequence[Tensor]:
        """The update of each layer, [B, 1, O], which the next call overwrites."""
        x_B1I = x_B1I.to(self.dtype).contiguous()
        self.multiply(self.address, x_B1I.data_ptr())
        return self.y_B1O


def _function(symbol: str) -> Any:
    found = library()
    assert found is not None
    return getattr(found, symbol)
