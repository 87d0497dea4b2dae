"""The L1 penalty on BatchNorm scales, as a subgradient added to the gradients.

Source: Liu et al., Learning Efficient Convolutional Networks through Network Slimming, ICCV 2017, equation 1.
"""

from collections import Counter
from collections.abc import Iterable
from fnmatch import fnmatchcase

import torch
from torch import nn

from slimming.errors import check_patterns


def batchnorm_gammas(model: nn.Module, layers: Iterable[str] | None = None) -> dict[str, nn.Parameter]:
    """Return the trainable BatchNorm scales by layer name; a shared layer once.

    Args:
        model: any network.
        layers: shell patterns of layer names (`layer1.*`); None: all.

    Raises:
        ConfigError: a pattern that matches no BatchNorm with a trainable scale.
    """
    found = {
        name: module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine and module.weight.requires_grad
    }
    if layers is None:
        return found
    check_patterns("penalty.layers", layers, found, "BatchNorm with a trainable scale")
    return {name: gamma for name, gamma in found.items() if any(fnmatchcase(name, p) for p in layers)}


def other_norms(model: nn.Module) -> str:
    """Return what a network without BatchNorm scales has instead: `it normalises by LayerNorm (18 layers)`, or ""."""
    kinds = Counter(type(m).__name__ for m in model.modules() if m._parameters and "norm" in type(m).__name__.lower())
    if not kinds:
        return ""
    listed = ", ".join(f"{kind} ({count} layers)" for kind, count in kinds.most_common(3))
    return f"it normalises by {listed}, whose scales tell nothing of single channels' share in the output"


class Penalty:
    """The penalty sparsity * sum |gamma| over some gammas of a network.

    Args:
        gammas: the scales, by layer name; each (C,).
        sparsity: lambda of the paper's equation 1, >= 0.
    """

    def __init__(self, gammas: dict[str, nn.Parameter], sparsity: float) -> None:
        self.gammas, self.sparsity = gammas, sparsity

    @torch.no_grad()
    def add_gradient(self, factor: float | torch.Tensor = 1.0) -> None:
        """Add factor * sparsity * sign(gamma), with sign(0) = 0, to every gradient; a missing gradient counts as zero.

        Args:
            factor: what the loss was multiplied by before its backward pass: 1 / accumulated batches, or the scale of a
                GradScaler (a tensor, so that nothing waits for the device).
        """
        gammas: list[torch.Tensor] = list(self.gammas.values())
        if not gammas or self.sparsity == 0:
            return
        gradients = []
        for gamma in gammas:
            if gamma.grad is None:
                gamma.grad = torch.zeros_like(gamma)
            gradients.append(gamma.grad)
        signs = torch._foreach_sign(gammas)
        if isinstance(factor, torch.Tensor):
            torch._foreach_mul_(signs, factor.to(gammas[0]) * self.sparsity)
            torch._foreach_add_(gradients, signs)
        else:
            torch._foreach_add_(gradients, signs, alpha=factor * self.sparsity)

    @torch.no_grad()
    def value(self) -> torch.Tensor:
        """Return sparsity * sum |gamma|, a scalar on the gammas' device."""
        if not self.gammas:
            return torch.tensor(0.0)
        return torch.stack(torch._foreach_norm(list(self.gammas.values()), 1)).sum() * self.sparsity

    def flat(self) -> torch.Tensor:
        """Return all |gamma| as one float32 CPU vector."""
        gammas = [g.detach().abs().float().cpu().flatten() for g in self.gammas.values()]
        return torch.cat(gammas) if gammas else torch.empty(0)


def near_zero_share(gammas: torch.Tensor, fraction: float = 0.01) -> float:
    """Return the share of |gamma| below `fraction` of the largest; 0 where there are none."""
    return float((gammas < fraction * gammas.max()).float().mean()) if len(gammas) else 0.0


def max_shrinkage(sparsity: float, lr_sum: float, momentum: float) -> float:
    """Return the maximum shrinkage: how far SGD with this penalty alone can move a gamma in a run.

    Args:
        sparsity: lambda.
        lr_sum: sum of the learning rate over all optimizer steps.
        momentum: of SGD, in [0, 1); a constant gradient g moves by lr * g / (1 - momentum) per step.
    """
    return sparsity * lr_sum / (1 - momentum)
