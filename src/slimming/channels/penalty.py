"""The L1 penalty on BatchNorm scales, as a subgradient added to the gradients; penalties.py holds the others.

Source: Liu et al., Learning Efficient Convolutional Networks through Network Slimming, ICCV 2017, equation 1.
"""

from collections import Counter
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

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
    """The penalty sparsity * sum |gamma| over some gammas of a network: the paper's, and the base of the others.

    A penalty acts at two moments of a step. `add_gradient`, after the backward pass, adds its subgradient; `after_step`, once
    the optimizer has stepped, moves the gammas themselves: `follow` sees to that.

    Args:
        gammas: the scales, by layer name; each (C,).
        sparsity: lambda of the paper's equation 1, >= 0; may be set anew at any time.

    Attributes:
        removed: gammas that the network has lost since its training began; they count as zeros.
    """

    moves = "a gamma by"  # what the maximum shrinkage is of

    def __init__(self, gammas: dict[str, nn.Parameter], sparsity: float) -> None:
        self.gammas, self.sparsity = gammas, sparsity
        self.removed = 0

    @torch.no_grad()
    def add_gradient(self, factor: float | torch.Tensor = 1.0) -> None:
        """Add factor * sparsity * `slopes` to the gradients; a missing gradient counts as zero.

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
        slopes = self.slopes(gammas)
        if isinstance(factor, torch.Tensor):
            torch._foreach_mul_(slopes, factor.to(gammas[0]) * self.sparsity)
            torch._foreach_add_(gradients, slopes)
        else:
            torch._foreach_add_(gradients, slopes, alpha=factor * self.sparsity)

    def slopes(self, gammas: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return new tensors: the subgradient at sparsity 1, here sign(gamma) with sign(0) = 0."""
        return list(torch._foreach_sign(gammas))

    def after_step(self, gammas: list[torch.Tensor], lr: float) -> None:
        """Move gammas that an optimizer has just stepped at the learning rate `lr`, without gradients; here not at all."""

    def follow(self, optimizer: Optimizer) -> RemovableHandle:
        """Call `after_step` whenever the optimizer has stepped, for the gammas that it holds, until the handle is removed.

        Not after a step that a GradScaler skips for gradients that are not finite.
        """

        @torch.no_grad()
        def hook(optimizer: Optimizer, *_: Any) -> None:
            if self.sparsity == 0 or _skipped(optimizer):
                return
            penalised = {id(gamma) for gamma in self.gammas.values()}
            for group in optimizer.param_groups:
                if gammas := [p for p in group["params"] if id(p) in penalised]:
                    self.after_step(gammas, float(group["lr"]))

        return optimizer.register_step_post_hook(hook)

    @torch.no_grad()
    def value(self) -> torch.Tensor:
        """Return the penalty, here sparsity * sum |gamma|, a scalar on the gammas' device."""
        if not self.gammas:
            return torch.tensor(0.0)
        return torch.stack(torch._foreach_norm(list(self.gammas.values()), 1)).sum() * self.sparsity

    def flat(self) -> torch.Tensor:
        """Return all |gamma| as one float32 CPU vector, those that are in the network first."""
        gammas = [g.detach().abs().float().cpu().flatten() for g in self.gammas.values()]
        return torch.cat([*gammas, torch.zeros(self.removed)])

    def narrow(self, wide: "Penalty", kept: torch.Tensor) -> None:
        """Count what has left the network since a wider one's penalty was made.

        Args:
            wide: of the same kind.
            kept: (gammas,) of its gammas those that this penalty acts on, in order.
        """
        self.removed = len(wide.flat()) - len(kept)

    def reach(self, lr_sum: float, momentum: float | None) -> float | None:
        """Return how far the penalty alone can move what `moves` names, for sparsity 1; None: not known.

        Args:
            lr_sum: sum of the learning rate over the optimizer steps.
            momentum: of SGD, in [0, 1); a constant gradient g moves by lr * g / (1 - momentum) per step. None for another
                optimizer.
        """
        return None if momentum is None else lr_sum / (1 - momentum)

    def start(self) -> float:
        """Return the median of the |gamma| that the penalty begins with."""
        gammas = self.flat()
        return float(gammas[: len(gammas) - self.removed].median())

    def describe(self) -> str:
        """Say what a training should tell of this penalty beside lambda; nothing of the paper's."""
        return ""


def _skipped(optimizer: Optimizer) -> bool:
    """Return whether a fused optimizer ran without stepping: a GradScaler calls it in any case and lets it look itself.

    Waits for the device, as the GradScaler does for optimizers that are not fused.
    """
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


def near_zero_share(gammas: torch.Tensor, fraction: float = 0.01) -> float:
    """Return the share of |gamma| below `fraction` of the largest; 0 where there are none."""
    return float((gammas < fraction * gammas.max()).float().mean()) if len(gammas) else 0.0
