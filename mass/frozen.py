"""The product with a frozen matrix, exact in reverse and in forward mode, that keeps nothing for its derivatives.

torch's own linear layer multiplies by the zero tangent of its weight in forward mode: three products where two will do.
Here the matrix is no input of the graph at all. Value, tangent and cotangent are made by one pair of products, x W' and
y W, and each asks for W when it runs; so W may as well be a matrix that is only there when it is asked for.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# Gives W [out, in], the same numbers at every call.
Matrix = Callable[[], Tensor]


def linear(x: Tensor, matrix: Matrix, bias: Tensor | None = None) -> Tensor:
    """x W' + b, [..., in] -> [..., out]: `F.linear` for a weight and a bias [out] that are never differentiated.

    Differentiable in x any number of times, in both modes and under `torch.func` transforms.
    """
    return _Forward.apply(x, matrix, bias)


class _Forward(torch.autograd.Function):
    """x -> x W' + b. Linear in x, so that its tangent is the same product without b and its cotangent `_Transposed`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, matrix: Matrix, bias: Tensor | None) -> Tensor:
        return F.linear(x, matrix(), bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Matrix, Tensor | None], output: Tensor) -> None:
        ctx.matrix = inputs[1]

    @staticmethod
    def backward(ctx: Any, by_y: Tensor) -> tuple[Tensor, None, None]:
        return _Transposed.apply(by_y, ctx.matrix), None, None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor, matrix: None, bias: None) -> Tensor:
        return _Forward.apply(dx, ctx.matrix, None)


class _Transposed(torch.autograd.Function):
    """y -> y W."""

    generate_vmap_rule = True

    @staticmethod
    def forward(y: Tensor, matrix: Matrix) -> Tensor:
        return y @ matrix()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Matrix], output: Tensor) -> None:
        ctx.matrix = inputs[1]

    @staticmethod
    def backward(ctx: Any, by_x: Tensor) -> tuple[Tensor, None]:
        return _Forward.apply(by_x, ctx.matrix, None), None

    @staticmethod
    def jvp(ctx: Any, dy: Tensor, matrix: None) -> Tensor:
        return _Transposed.apply(dy, ctx.matrix)
