"""BatchNorms whose input or output tensor has more channels than they have.

Surgery changes the class of such a BatchNorm in place, to a subclass of its own class: parameters, buffers, hooks, children
and everything that its forward does around `batch_norm` stay.
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules._functions import SyncBatchNorm as sync_batch_norm
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

_MADE: dict[tuple[type, type], type[_BatchNorm]] = {}  # by `_class`
_NORMALISE = (F.batch_norm, torch.batch_norm)  # the same operator, its arguments in another order


class SelectBatchNorm(nn.Module):
    """Selects input channels, normalises them, and scatters them among zeros; a mixin before a class of BatchNorm.

    Attributes:
        select: (C,) input channels to read; None: all, in order.
        scatter: (C,) output channels to write; None: all, in order.
        width: output channels where `scatter` is given.

    The indices belong to the plan, so the state dict does not hold them.

    Shape: (N, C_in, ...) -> (N, width or C, ...).
    """

    select: Tensor | None
    scatter: Tensor | None
    width: int
    _mixin: ClassVar[type["SelectBatchNorm"]]
    _wraps: ClassVar[type[_BatchNorm]]

    def forward(self, x: Tensor) -> Tensor:
        normalised: Tensor = super().forward(self.selected(x))
        return self.scattered(normalised)

    def selected(self, x: Tensor) -> Tensor:
        return x if self.select is None else x.index_select(1, self.select)

    def scattered(self, x: Tensor) -> Tensor:
        if self.scatter is None:
            return x
        zeros = torch.zeros((x.shape[0], self.width, *x.shape[2:]), dtype=x.dtype, device=x.device)
        return zeros.index_copy(1, self.scatter, x)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, select={self.select is not None}, scatter={self.scatter is not None}"

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by the two classes that this one was made of: a class made on the fly has no importable name."""
        return _blank, (self._wraps, self._mixin), self.__dict__


class InnerSelectBatchNorm(SelectBatchNorm):
    """A SelectBatchNorm of a class with a forward of its own: it selects and scatters right around its `batch_norm`.

    Whatever else that forward does (an activation, say) gets the whole input and the zeros, as in the masked network.
    """

    synchronised = False  # over the ranks; see `synchronise`

    def forward(self, *args: Any, **kwargs: Any) -> Any:
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

    def __init__(self, norm: InnerSelectBatchNorm, seen: list[bool]) -> None:
        super().__init__()
        self.norm, self.seen = norm, seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _NORMALISE or not args or not self._is_own(args, kwargs):
            return func(*args, **kwargs)
        self.seen.append(True)
        x = self.norm.selected(args[0])
        if self.norm.synchronised and func is F.batch_norm:
            return self.norm.scattered(_synchronised_batch_norm(x, *args[1:], **kwargs))
        return self.norm.scattered(func(x, *args[1:], **kwargs))

    def _is_own(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        own = self.norm.running_mean if self.norm.weight is None else self.norm.weight
        return any(value is own for value in (*args, *kwargs.values()))


def _synchronised_batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Do what F.batch_norm does, with the statistics of all ranks, as nn.SyncBatchNorm does."""
    ranks = torch.distributed.get_world_size() if training and torch.distributed.is_initialized() else 1
    if ranks == 1:
        return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    group = torch.distributed.group.WORLD
    normalised: Tensor = sync_batch_norm.apply(x, weight, bias, running_mean, running_var, eps, momentum, group, ranks)
    return normalised


def has_plain_forward(norm: _BatchNorm) -> bool:
    """Return whether a BatchNorm normalises and does nothing else."""
    return _base(type(norm)).forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward)


def set_indices(norm: _BatchNorm, select: Tensor | None, scatter: Tensor | None, width: int) -> None:
    """Turn a BatchNorm of C channels into a SelectBatchNorm, in place; or back where both indices are None.

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
    selecting = _become(norm, SelectBatchNorm if has_plain_forward(norm) else InnerSelectBatchNorm)
    device = next((t.device for t in (*norm._parameters.values(), *norm._buffers.values()) if t is not None), None)
    if device is not None and device.type == "meta":
        device = torch.device("cpu")  # of a network without values, too: indices tell one architecture from another
    for name, index in (("select", select), ("scatter", scatter)):
        norm.register_buffer(name, None if index is None else index.to(device), persistent=False)
    selecting.width = width


def synchronise(model: nn.Module) -> nn.Module:
    """Let every BatchNorm share its statistics over all ranks while it trains; training them needs GPUs.

    Changes the classes of a network's BatchNorms in place, so that an optimizer's parameters stay valid, and returns the
    network. torch's own conversion would lose the indices of a SelectBatchNorm and the forward of any other subclass.
    """
    for norm in (m for m in model.modules() if isinstance(m, _BatchNorm) and not isinstance(m, nn.SyncBatchNorm)):
        if has_plain_forward(norm):
            selects = isinstance(norm, SelectBatchNorm)
            norm.__class__ = _class(nn.SyncBatchNorm, SelectBatchNorm) if selects else nn.SyncBatchNorm
            assert isinstance(norm, nn.SyncBatchNorm)
            norm.process_group = None
            continue
        if not isinstance(norm, InnerSelectBatchNorm):
            norm.register_buffer("select", None, persistent=False)
            norm.register_buffer("scatter", None, persistent=False)
            _become(norm, InnerSelectBatchNorm).width = norm.num_features
        assert isinstance(norm, InnerSelectBatchNorm)
        norm.synchronised = True
    return model


def _class(base: type[_BatchNorm], mixin: type[SelectBatchNorm]) -> type[_BatchNorm]:
    """Return the one class that puts a mixin before a class of BatchNorm."""
    if (base, mixin) not in _MADE:
        contents = {"__module__": __name__, "_mixin": mixin, "_wraps": base}
        _MADE[base, mixin] = type(f"Select{base.__name__}", (mixin, base), contents)
    return _MADE[base, mixin]


def _base(kind: type[_BatchNorm]) -> type[_BatchNorm]:
    """Return the class that a SelectBatchNorm's class was made from, or the class itself."""
    return kind._wraps if issubclass(kind, SelectBatchNorm) else kind


def _become(norm: _BatchNorm, mixin: type[SelectBatchNorm]) -> SelectBatchNorm:
    """Change the class of a BatchNorm in place; return it as what it now is."""
    norm.__class__ = _class(_base(type(norm)), mixin)
    assert isinstance(norm, SelectBatchNorm)
    return norm


def _blank(base: type[_BatchNorm], mixin: type[SelectBatchNorm]) -> _BatchNorm:
    kind = _class(base, mixin)
    return kind.__new__(kind)
