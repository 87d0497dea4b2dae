"""Multiply-accumulates of one operator call.

Convention: convolutions, transposed convolutions, matrix products and attention count. BatchNorm, activations, pooling,
interpolation and element-wise operators count nothing. Any other operator that multiplies tensors is taken apart; if it has
no parts, its MACs are unknown, and `Cost.uncounted` names it.
"""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

aten = torch.ops.aten
Formula = Callable[[list[Tensor], tuple[Any, ...], Any], int]  # of the operands, all arguments and the result


def macs_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int | None:
    """Return the multiply-accumulates of one operator call; 0 for what sums no products, None where they are not known."""
    operands = tensors((args, kwargs))
    if formula := _FORMULAS.get(func._overloadpacket):
        return formula(operands, args, out)
    return _macs_of_parts(func, args, kwargs) if _may_multiply(func, operands) else 0


def _may_multiply(func: Any, operands: list[Tensor]) -> bool:
    """Return whether an operator may sum products: it combines several tensors, and not element by element."""
    if title(func).startswith(("fft_", "_fft_")):
        return True
    numbers = [t for t in operands if t.ndim and (t.is_floating_point() or t.is_complex())]
    if len(numbers) < 2:
        return False
    harmless = torch.Tag.pointwise in func.tags or _SUM_NO_PRODUCTS.fullmatch(title(func).rstrip("_"))
    return not harmless


def _macs_of_parts(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """Take an operator apart on the meta device, where it costs nothing; None for one that has no parts."""
    parts = _Parts()
    try:
        shapes = tree_map_only(Tensor, lambda t: torch.empty_like(t, device="meta"), (args, kwargs))
        with parts:
            whole = func.decompose(*shapes[0], **shapes[1]) is NotImplemented
    except Exception:  # it asks for values
        return None
    return None if whole else parts.macs


class _Parts(TorchDispatchMode):
    """Adds up what the parts of a composite operator count; None where one of them cannot be counted."""

    def __init__(self) -> None:
        super().__init__()
        self.macs: int | None = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        count = macs_of(func, args, kwargs, out)
        self.macs = None if count is None or self.macs is None else self.macs + count
        return out


def _convolution(operands: list[Tensor], args: tuple[Any, ...], out: Tensor) -> int:
    return out.shape[2:].numel() * out.shape[0] * operands[1].numel()


def _transposed_convolution(operands: list[Tensor], args: tuple[Any, ...], out: Tensor) -> int:
    data, weight = operands[:2]
    return data.shape[2:].numel() * data.shape[0] * weight.numel()


def _attention(operands: list[Tensor], args: tuple[Any, ...], out: Tensor) -> int:
    """Count the scores and their use, of (..., T, E) queries and (..., S, E) keys."""
    query, key, value = operands[:3]
    return query[..., 0].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def _whole_layer(weights: list[int]) -> Formula:
    """Make the formula of attention to oneself with matrices around it: the fast path of nn.MultiheadAttention."""

    def count(operands: list[Tensor], args: tuple[Any, ...], out: Any) -> int:
        data: Tensor = args[0]  # (N, T, E)
        matrices: int = sum(args[i].numel() for i in weights)
        return data[..., 0].numel() * (matrices + 2 * data.shape[-1] * data.shape[-2])

    return count


def _product(first: int) -> Formula:
    """Make the formula of a product of matrices whose first factor is this operand."""
    return lambda operands, args, out: out.numel() * operands[first].shape[-1]


_FORMULAS: dict[Any, Formula] = {
    **dict.fromkeys((aten.conv1d, aten.conv2d, aten.conv3d), _convolution),
    **dict.fromkeys((aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d), _transposed_convolution),
    aten.convolution: lambda o, args, out: (_transposed_convolution if args[6] else _convolution)(o, args, out),
    **dict.fromkeys((aten.linear, aten.matmul, aten.mm, aten.bmm, aten.mv, aten.dot, aten.vdot), _product(0)),
    **dict.fromkeys((aten.addmm, aten.addmv, aten.baddbmm), _product(1)),
    aten.addbmm: lambda o, args, out: out.numel() * o[1].shape[0] * o[1].shape[-1],
    aten.scaled_dot_product_attention: _attention,
    aten._native_multi_head_attention: _whole_layer([5, 7]),
    aten._transformer_encoder_layer_fwd: _whole_layer([3, 5, 14, 16]),
}
# Operators that combine several tensors and sum no products; element-wise ones have torch's tag `pointwise`.
_SUM_NO_PRODUCTS = re.compile(
    r"(native_)?(batch|instance|layer|group|rms)_norm|prelu|_prelu_kernel|_weight_norm|cat|concat|stack|copy|index_\w+|"
    r"\w*scatter\w*|\w+_as|grid_sampler\w*|bucketize|searchsorted|torchvision::(nms|\w*roi_\w+)"
)


def title(func: Any) -> str:
    """Name an operator for people: `einsum`, `torchvision::deform_conv2d`."""
    name: str = func._schema.name
    return name.removeprefix("aten::")


def tensors(value: Any) -> list[Tensor]:
    """Return the tensors of nested lists, tuples and dicts."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for v in value for t in tensors(v)] if isinstance(value, (list, tuple)) else []
