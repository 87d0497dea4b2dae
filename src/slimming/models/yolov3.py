"""YOLOv3: Darknet-53 and predictions on three scales."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from slimming.errors import check_number
from slimming.models.yolo import Unit, Yolo, scaled, upsampled

# Source: arXiv:1804.02767, section 2.3: clusters on COCO, for images of 416 pixels.
PRIORS = [(10, 13), (16, 30), (33, 23), (30, 61), (62, 45), (59, 119), (116, 90), (156, 198), (373, 326)]
STAGES = ((64, 1), (128, 2), (256, 8), (512, 8), (1024, 4))  # channels and residual blocks of each, Table 1


class Residual(nn.Module):
    """1x1 to half of the channels, 3x3 back, added to the input."""

    def __init__(self, channels: int, half: int):
        super().__init__()
        self.narrow, self.wide = Unit(channels, half, 1), Unit(half, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.wide(self.narrow(x))


class Scale(nn.Module):
    """The predictions of one scale: five units, whose output a finer scale goes on with, one more, and the output."""

    def __init__(self, in_channels: int, narrow: int, wide: int, out_channels: int):
        super().__init__()
        widths = [in_channels, narrow, wide, narrow, wide, narrow]
        kernels = (1, 3, 1, 3, 1)
        self.trunk = nn.Sequential(*(Unit(a, b, k) for a, b, k in zip(widths[:-1], widths[1:], kernels, strict=True)))
        self.last = Unit(narrow, wide, 3)
        self.output = nn.Conv2d(wide, out_channels, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.trunk(x)
        return x, self.output(self.last(x))


class YoloV3(Yolo):
    """Darknet-53 without its classifier, and a `Scale` on each of its last three stages."""

    strides = (32, 16, 8)

    def add_layers(self, in_channels: int, w: Callable[[int], int]) -> None:
        self.stem = Unit(in_channels, w(32), 3)
        before = 32
        for number, (channels, blocks) in enumerate(STAGES):
            residual = (Residual(w(channels), w(channels // 2)) for _ in range(blocks))
            self.add_module(f"stage{number + 1}", nn.Sequential(Unit(w(before), w(channels), 3, 2), *residual))
            before = channels
        self.coarse = Scale(w(1024), w(512), w(1024), self.out_channels)
        self.to_middle = Unit(w(512), w(256), 1)
        self.middle = Scale(w(256) + w(512), w(256), w(512), self.out_channels)
        self.to_fine = Unit(w(256), w(128), 1)
        self.fine = Scale(w(128) + w(256), w(128), w(256), self.out_channels)

    def forward(self, x: Tensor) -> list[Tensor]:
        self.check_size(x)
        at_8 = self.stage3(self.stage2(self.stage1(self.stem(x))))  # (N, 256, H / 8, W / 8)
        at_16 = self.stage4(at_8)  # (N, 512, H / 16, W / 16)
        x, coarse = self.coarse(self.stage5(at_16))
        x, middle = self.middle(upsampled(self.to_middle(x), at_16))
        _, fine = self.fine(upsampled(self.to_fine(x), at_8))
        return [coarse, middle, fine]


def yolov3(
    width: float = 1.0,
    priors: Sequence[Sequence[float]] | None = None,
    image_size: int = 416,
    num_classes: int = 80,
    in_channels: int = 3,
    gamma_init: float = 0.5,
) -> YoloV3:
    """Build YOLOv3; `width` multiplies the channels of every layer.

    Source: Redmon and Farhadi, arXiv:1804.02767; the layers between the scales as in the authors' yolov3.cfg.

    Args:
        priors: nine (or another multiple of three) widths and heights, in pixels of the images; None: the paper's, scaled
            from 416 pixels to `image_size`.
        image_size: of the longer side of the images, in pixels.

    Raises:
        ConfigError: a value out of range.
    """
    check_number("model.width", width, 0, above=True)
    given = scaled(PRIORS, image_size) if priors is None else priors
    return YoloV3(given, width, num_classes, in_channels, image_size, gamma_init)
