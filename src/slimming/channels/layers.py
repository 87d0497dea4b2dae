"""BatchNorms between tensors of more channels than they have.

Surgery changes the class of such a BatchNorm in place, to a subclass of its own class: parameters, buffers, hooks, children
and everything that its forward does around `batch_norm` stay.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, sync_batch_norm
from torch.overrides import TorchFunctionMode

_NORMALISE = (F.batch_norm, torch.batch_norm)  # the same operator, its arguments in another order


class SelectBatchNorm(nn.Module):
    """Selects input channels, normalises them, and scatters them among zeros; a mixin before a class of BatchNorm.

    Attributes:
        select: (C,) input channels to read; None: all, in order.
        scatter: (C,) output channels to write; None: all, in order.
        width: output channels where `scatter` is given.

    The indices belong to the plan and are no part of the state dict.

    Shape: (N, C_in, ...) -> (N, width or C, ...).
    """

    def forward(self, x: Tensor) -> Tensor:
        return self.scattered(super().forward(self.selected(x)))

    def selected(self, x: Tensor) -> Tensor:
        return x if self.select is None else x.index_select(1, self.select)

    def scattered(self, x: Tensor) -> Tensor:
        if self.scatter is None:
            return x
        zeros = torch.zeros((x.shape[0], self.width, *x.shape[2:]), dtype=x.dtype, device=x.device)
        return zeros.index_copy(1, self.scatter, x)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, select={self.select is not None}, scatter={self.scatter is not None}"

    def __reduce__(self):
        return (
            _blank,
            (_base(type(self)), type(self)._mixin),
            self.__dict__,
        )  # a class made on the fly has no importable name


class InnerSelectBatchNorm(SelectBatchNorm):
    """A SelectBatchNorm of a class with a forward of its own: selects and scatters right around its `batch_norm`.

    What that forward does besides (an activation, say) sees the input and the zeros as it would in the masked network.
    """

    synchronised = False  # over the ranks; see `synchronise`

    def forward(self, *args, **kwargs):
        seen: list[bool] = []  # torch.compile follows changes of a list, not of a mode's attribute
        with _Around(self, seen):
            out = super(SelectBatchNorm, self).forward(*args, **kwargs)
        if not seen:
            raise RuntimeError(
                f"{type(self).__name__}: its forward did not call batch_norm on its own weights"
                f"{' in train mode' * self.training}, so its channels could not be selected"
            )
        return out


class _Around(TorchFunctionMode):
    """Wraps the `batch_norm` that a module calls on its own weights."""

    def __init__(self, norm: InnerSelectBatchNorm, seen: list[bool]):
        super().__init__()
        self.norm, self.seen = norm, seen

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func not in _NORMALISE or not args or not self._is_own(args, kwargs):
            return func(*args, **kwargs)
        self.seen.append(True)
        x = self.norm.selected(args[0])
        if self.norm.synchronised and func is F.batch_norm:
            return self.norm.scattered(_synchronised_batch_norm(x, *args[1:], **kwargs))
        return self.norm.scattered(func(x, *args[1:], **kwargs))

    def _is_own(self, args: tuple, kwargs: dict) -> bool:
        own = self.norm.running_mean if self.norm.weight is None else self.norm.weight
        return any(value is own for value in (*args, *kwargs.values()))


def _synchronised_batch_norm(
    x, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5
) -> Tensor:
    """Do what F.batch_norm does with the statistics of all ranks, as nn.SyncBatchNorm does."""
    ranks = torch.distributed.get_world_size() if training and torch.distributed.is_initialized() else 1
    if ranks == 1:
        return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    group = torch.distributed.group.WORLD
    return sync_batch_norm.apply(x, weight, bias, running_mean, running_var, eps, momentum, group, ranks)


def has_plain_forward(norm: _BatchNorm) -> bool:
    """Return whether a BatchNorm normalises and does nothing besides."""
    return _base(type(norm)).forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward)


def set_indices(norm: _BatchNorm, select: Tensor | None, scatter: Tensor | None, width: int) -> None:
    """Turn a BatchNorm of C channels, in place, into a SelectBatchNorm; or back where neither index is given.

    Args:
        norm: of any class whose forward calls `batch_norm` on its own weights.
        select, scatter, width: as the attributes of SelectBatchNorm.
    """
    base = _base(type(norm))
    for name in ("select", "scatter"):
        norm._buffers.pop(name, None)
    if select is None and scatter is None:
        norm.__class__ = base
        return
    _become(norm, InnerSelectBatchNorm if not has_plain_forward(norm) else SelectBatchNorm)
    device = next((t.device for t in (*norm._parameters.values(), *norm._buffers.values()) if t is not None), None)
    if device is not None and device.type == "meta":
        device = torch.device("cpu")  # of an outline too: they tell one architecture from another
    for name, index in (("select", select), ("scatter", scatter)):
        norm.register_buffer(name, None if index is None else index.to(device), persistent=False)
    norm.width = width


def synchronise(model: nn.Module) -> nn.Module:
    """Let every BatchNorm share its statistics over all ranks while it trains; training them needs GPUs.

    Changes the network in place, classes only (its parameters may be in an optimizer's hands), and returns it. torch's own
    conversion would lose the indices of a SelectBatchNorm and the forward of a class that has one of its own.
    """
    for norm in (m for m in model.modules() if isinstance(m, _BatchNorm) and not isinstance(m, nn.SyncBatchNorm)):
        if has_plain_forward(norm):
            norm.process_group = None
            norm.__class__ = (
                nn.SyncBatchNorm if _base(type(norm)) is type(norm) else _class(nn.SyncBatchNorm, SelectBatchNorm)
            )
            continue
        if not isinstance(norm, SelectBatchNorm):
            norm.width = norm.num_features
            norm.register_buffer("select", None, persistent=False)
            norm.register_buffer("scatter", None, persistent=False)
            _become(norm, InnerSelectBatchNorm)
        norm.synchronised = True
    return model


@functools.cache
def _class(base: type, mixin: type) -> type:
    return type(f"Select{base.__name__}", (mixin, base), {"__module__": __name__, "_mixin": mixin, "_wraps": base})


def _base(kind: type) -> type:
    """Return the class that a SelectBatchNorm's class was made from, or the class itself."""
    return getattr(kind, "_wraps", kind)


def _become(norm: _BatchNorm, mixin: type) -> None:
    norm.__class__ = _class(_base(type(norm)), mixin)


def _blank(base: type, mixin: type) -> nn.Module:
    kind = _class(base, mixin)
    return kind.__new__(kind)
