"""Helpers: random BatchNorms, and the comparison of prune with its specification mask."""

import torch
from torch import nn

import slimming
from slimming.channels.inputs import call_model, tensors_in
from slimming.channels.modes import set_training
from slimming.channels.plan import PruningPlan
from slimming.channels.proof import relative_difference

NORM = nn.modules.batchnorm._BatchNorm


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw gammas, betas and running statistics; in place, in float64."""
    generator = torch.Generator().manual_seed(seed)
    model.double()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, NORM):
                for name, tensor in (*module.named_parameters(), *module.named_buffers()):
                    if tensor.is_floating_point():
                        draw = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
                        tensor.copy_(draw.abs() + 0.5 if name == "running_var" else draw)
    return model


def widen(example, batch: int = 4):
    """Return an example like the one given with `batch` random items."""
    if isinstance(example, dict):
        return {k: widen(v, batch) for k, v in example.items()}
    if isinstance(example, tuple):
        return tuple(widen(v, batch) for v in example)
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, *example.shape[1:], generator=generator, dtype=torch.float64)


def assert_exact(model: nn.Module, plan: PruningPlan, example, train: bool = True) -> nn.Module:
    """Compare prune and mask in eval mode and, with running statistics, in train mode; returns the thin network."""
    thin, dense = slimming.prune(model, plan, verify=False), slimming.mask(model, plan)
    assert type(thin) is type(model)
    assert set(thin.state_dict()) == set(model.state_dict())
    with torch.no_grad():
        outputs = [tensors_in(call_model(m.eval(), widen(example, 2))) for m in (thin, dense)]
        assert relative_difference(*outputs) <= 1e-9
        if train:
            outputs = [tensors_in(call_model(set_training(m), widen(example))) for m in (thin, dense)]
            assert relative_difference(*outputs) <= 1e-9
            for name, module in dense.named_modules():
                if isinstance(module, NORM) and module.running_mean is not None:
                    keep = plan.layers[name].outs if name in plan.layers else slice(None)
                    for key in ("running_mean", "running_var"):
                        a, b = getattr(thin.get_submodule(name), key), getattr(module, key)[keep]
                        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=f"{name}.{key}")
    return thin


def empty_sides(model: nn.Module) -> list[str]:
    """Return the names of parameters without elements."""
    return [name for name, p in model.named_parameters() if p.numel() == 0]
