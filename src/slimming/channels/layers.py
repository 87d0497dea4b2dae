"""A BatchNorm between tensors of more channels than it has."""

import torch
from torch import Tensor, nn


class SelectBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Selects input channels, normalises them, and places them among zeros.

    Takes over the parameters and buffers of a BatchNorm whose channels are the kept ones; its state-dict keys are those of
    that BatchNorm, the indices belong to the plan.

    Args:
        norm: BatchNorm1d/2d/3d (or a SelectBatchNorm) of C channels.
        select: (C,) input channels to read; None: all, in order.
        place: (C,) output channels to write; None: all, in order.
        width: output channels where `place` is given.

    Shape: (N, C_in, ...) -> (N, width or C, ...).
    """

    def __init__(self, norm: nn.modules.batchnorm._BatchNorm, select: Tensor | None, place: Tensor | None, width: int):
        nn.Module.__init__(self)
        for name in ("num_features", "eps", "momentum", "affine", "track_running_stats", "training"):
            setattr(self, name, getattr(norm, name))
        self._parameters.update(norm._parameters)
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            self.register_buffer(name, getattr(norm, name))
        device = next((t.device for t in (*norm._parameters.values(), *norm._buffers.values()) if t is not None), None)
        for name, index in (("select", select), ("place", place)):
            self.register_buffer(name, None if index is None else index.to(device), persistent=False)
        self.width = width

    def _check_input_dim(self, x: Tensor) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        if self.select is not None:
            x = x.index_select(1, self.select)
        x = self.normalise(x)
        if self.place is not None:
            zeros = torch.zeros((x.shape[0], self.width, *x.shape[2:]), dtype=x.dtype, device=x.device)
            x = zeros.index_copy(1, self.place, x)
        return x

    def normalise(self, x: Tensor) -> Tensor:
        return nn.modules.batchnorm._BatchNorm.forward(self, x)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, select={self.select is not None}, place={self.place is not None}"


class SelectSyncBatchNorm(SelectBatchNorm, nn.SyncBatchNorm):
    """A SelectBatchNorm whose statistics are those of all ranks; training it needs GPUs."""

    def __init__(self, norm: SelectBatchNorm, process_group=None):
        super().__init__(norm, norm.select, norm.place, norm.width)
        self.process_group = process_group

    def _check_non_zero_input_channels(self, x: Tensor) -> None:
        pass

    def normalise(self, x: Tensor) -> Tensor:
        return nn.SyncBatchNorm.forward(self, x)


def synchronise(model: nn.Module) -> nn.Module:
    """Turn every BatchNorm into one that shares its statistics over all ranks; parameters, buffers and keys stay.

    Changes the network in place (its parameters may be in an optimizer's hands) and returns it; torch's own conversion would
    replace a SelectBatchNorm by a plain one and lose its indices.
    """
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.modules.batchnorm._BatchNorm) or isinstance(module, nn.SyncBatchNorm):
            continue
        if isinstance(module, SelectBatchNorm):
            new: nn.Module = SelectSyncBatchNorm(module)
        else:
            new = nn.SyncBatchNorm.convert_sync_batchnorm(module)
        if not name:
            return new
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new)
    return model
