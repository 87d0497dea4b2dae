"""A plain deep ConvNet: what a first network of one's own looks like."""

from slimming.errors import check_number
from slimming.models.vgg import VGG

WIDTHS = [64, 64, 128, 128, "M", 256, 256, 512, 512, 512, "M", 1024, 1024]


def convnet(width: float = 1.0, num_classes: int = 10, in_channels: int = 3, gamma_init: float = 0.5) -> VGG:
    """Build a chain of eleven 3x3 convolutions with BatchNorm and ReLU, global average pooling, one linear layer."""
    check_number("model.width", width, 0, above=True)
    widths = [w if w == "M" else max(1, round(w * width)) for w in WIDTHS]
    return VGG(widths, num_classes, in_channels, gamma_init)
