"""The initialisation of the paper's code."""

import math

from torch import nn

from slimming.errors import check_number


def initialise(model: nn.Module, gamma_init: float) -> None:
    """Initialise in place: gamma `gamma_init`, beta 0, conv N(0, sqrt(2 / (k*k*c_out))), linear N(0, 0.01), bias 0.

    Source: github.com/liuzhuang13/slimming (models/*.lua); gamma 0.5 is in the paper's section 4.3.
    """
    check_number("model.gamma_init", gamma_init)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, 0.0, math.sqrt(2 / (math.prod(module.kernel_size) * module.out_channels)))
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0.0, 0.01)
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.constant_(module.weight, gamma_init)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)


def check_io_shape(num_classes: int, in_channels: int) -> None:
    """Raise ConfigError unless both are whole numbers >= 1."""
    check_number("num_classes", num_classes, 1, whole=True)
    check_number("in_channels", in_channels, 1, whole=True)


def set_gammas(model: nn.Module, value: float | None) -> nn.Module:
    """Set every BatchNorm scale, in place; None leaves them as they are."""
    if value is not None:
        check_number("model.gamma_init", value)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
                nn.init.constant_(module.weight, value)
    return model
