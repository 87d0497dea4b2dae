"""Least squares for one layer: the change of its weights that makes up best for what its outputs lack.

A convolution or linear layer is a linear map of windows of its input. With X the windows, one per row, and R what the outputs
lack there, the change D solves  min |R - 1 b' - X D|^2 + penalty |D|^2,  for every group of channels by itself. A ridge
towards the old weights is a ridge of the change towards zero.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from slimming.errors import GraphError

BLOCK = 2**24  # numbers of X that are laid out in memory at once
CONSTANT = 1e-10  # variance of inputs, relative to their squared mean, that is rounding
Positions = tuple[Tensor, ...]  # (rows,) each: the item, then the position along every axis of space


class Applied(NamedTuple):
    """How a layer is applied: the arguments of its operator. A linear layer is a convolution without axes of space.

    Attributes:
        x: (N, C_in, *space).
        weight: (C_out, C_in / groups, *kernel).
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    stride: Sequence[int] = ()
    padding: Sequence[int] | str = ()
    dilation: Sequence[int] = ()
    groups: int = 1

    def windows(self) -> Tensor:
        """Return a view of what the weights are multiplied with at every output, (N, C_in, *space of the output, *kernel)."""
        x = F.pad(self.x, self._pads()) if any(self._pads()) else self.x
        for axis, size in enumerate(self.weight.shape[2:], 2):
            step, dilation = self.stride[axis - 2], self.dilation[axis - 2]
            x = x.unfold(axis, dilation * (size - 1) + 1, step)[..., ::dilation]
        return x

    def _pads(self) -> list[int]:
        """Return the zeros before and after every axis of space, the last axis first, as F.pad takes them."""
        pads: list[int] = []
        for axis in reversed(range(self.weight.ndim - 2)):
            if isinstance(self.padding, str):  # torch puts the odd zero of "same" at the end
                total = self.dilation[axis] * (self.weight.shape[2 + axis] - 1) * (self.padding == "same")
                pads += [total // 2, total - total // 2]
            else:
                pads += [self.padding[axis]] * 2
        return pads


def applied(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Applied:
    """Return the arguments of a call of conv1d, conv2d, conv3d (of a batch) or linear."""
    names = [argument.name for argument in func._schema.arguments]
    given = {
        argument.name: argument.default_value for argument in func._schema.arguments if argument.has_default_value()
    }
    given |= dict(zip(names, args, strict=False)) | kwargs
    x, weight = given.pop("input"), given.pop("weight")
    dims = weight.ndim - 2
    if not dims:
        return Applied(x.reshape(-1, x.shape[-1]), weight, given["bias"])
    for key in ("stride", "padding", "dilation"):
        value = given[key]
        if not isinstance(value, str):
            values = [value] if isinstance(value, int) else list(value)
            given[key] = values * dims if len(values) == 1 else values
    return Applied(x, weight, **given)


def at(tensor: Tensor, positions: Positions) -> Tensor:
    """Return (rows, C, ...) of a tensor (N, C, *space, ...)."""
    index: list[Any] = [positions[0], slice(None), *positions[1:]]
    return tensor[tuple(index)]


def draw_positions(out: Tensor, limit: int) -> Positions:
    """Draw at most `limit` different positions of an output (N, C, *space), the same ones each time."""
    shape = (out.shape[0], *out.shape[2:])
    count = math.prod(shape)
    flat = torch.arange(count)
    if count > limit:
        flat = torch.randperm(count, generator=torch.Generator().manual_seed(0))[:limit].sort().values
    return torch.unravel_index(flat.to(out.device), shape)


class Equations:
    """The normal equations of one layer, added up over its uses.

    They are of inputs less their mean over the first block: what hardly varies would drown in the rounding of large sums.
    """

    def __init__(self, weight: Tensor, groups: int) -> None:
        """Begin with nothing; `weight` is (C_out, C_in / groups, *kernel)."""
        inputs, outputs = weight[0].numel(), len(weight) // groups
        self.weight, self.groups, self.rows = weight, groups, 0
        zeros = functools.partial(torch.zeros, dtype=torch.float64, device=weight.device)
        self.origin = zeros(groups, 1, inputs)  # that is taken off all inputs
        self.gram, self.cross = zeros(groups, inputs, inputs), zeros(groups, inputs, outputs)  # X'X, X'R
        self.sum_x, self.sum_r = zeros(groups, 1, inputs), zeros(groups, 1, outputs)

    def add(self, call: Applied, positions: Positions, lack: Tensor) -> None:
        """Add the windows at some outputs, and what those outputs lack, (rows, C_out)."""
        windows, height = call.windows(), max(1, BLOCK // (self.groups * self.weight[0].numel()))
        for start in range(0, len(lack), height):
            part = slice(start, start + height)
            x = self._by_group(at(windows, tuple(p[part] for p in positions)))
            r = self._by_group(lack[part])
            if not self.rows and not start:
                self.origin = x.mean(1, keepdim=True).double()
            x = x - self.origin.to(x.dtype)
            self.gram += x.mT @ x
            self.cross += x.mT @ r
            self.sum_x += x.sum(1, keepdim=True)
            self.sum_r += r.sum(1, keepdim=True)
        self.rows += len(lack)

    def _by_group(self, rows: Tensor) -> Tensor:
        """(rows, C, ...) -> (groups, rows, the rest)."""
        rows = rows if rows.dtype == torch.float64 else rows.float()
        return rows.reshape(len(rows), self.groups, -1).transpose(0, 1)

    def normal(self, ridge: float, intercept: bool) -> tuple[Tensor, Tensor]:
        """Return the Gram matrix with the ridge, (groups, inputs, inputs), and X'R, both centred if there is an intercept."""
        if intercept:
            gram = torch.baddbmm(self.gram, self.sum_x.mT, self.sum_x, alpha=-1 / self.rows)
            cross = torch.baddbmm(self.cross, self.sum_x.mT, self.sum_r, alpha=-1 / self.rows)
        else:
            gram = torch.baddbmm(self.gram, self.origin.mT, self.sum_x).baddbmm_(self.sum_x.mT, self.origin)
            gram.baddbmm_(self.origin.mT, self.origin, alpha=self.rows)
            cross = torch.baddbmm(self.cross, self.origin.mT, self.sum_r)
        diagonal = gram.diagonal(dim1=1, dim2=2)  # (groups, inputs), a view
        size, largest = diagonal.mean(1), self.rows * self.origin.square().mean((1, 2))
        varies = size > CONSTANT * largest  # else nothing is changed
        diagonal += torch.where(varies, ridge * size, 1 + largest)[:, None]
        return gram, cross

    def solve(self, ridge: float, intercept: bool) -> tuple[Tensor, Tensor]:
        """Return the change of the weights, in their shape, and the intercept (C_out,), 0 without one.

        Args:
            ridge: of the mean of the Gram matrix's diagonal.

        Raises:
            GraphError: the equations have no solution.
        """
        gram, cross = self.normal(ridge, intercept)
        factor, failed = torch.linalg.cholesky_ex(gram)
        if bool(failed.any()) or not bool(factor.isfinite().all()):
            raise GraphError(f"its Gram matrix is singular or not finite at ridge={ridge:g}: raise repair.ridge")
        change = torch.cholesky_solve(cross, factor)  # (groups, inputs, outputs)
        inputs = self.sum_x + self.rows * self.origin
        shift = (self.sum_r - inputs @ change) / self.rows if intercept else torch.zeros_like(self.sum_r)
        return change.mT.reshape(self.weight.shape), shift.flatten()
