"""YOLOv3-tiny: a short chain of convolutions and predictions on two scales."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from slimming.errors import check_number
from slimming.models.yolo import Unit, Yolo, scaled, upsampled

PRIORS = [(10, 14), (23, 27), (37, 58), (81, 82), (135, 169), (344, 319)]  # for images of 416 pixels


class YoloV3Tiny(Yolo):
    """Seven convolutions with 2x2 max pooling between them, and predictions at strides 32 and 16."""

    strides = (32, 16)

    def add_layers(self, in_channels: int, w: Callable[[int], int]) -> None:
        layers, before = [], in_channels
        for channels in (16, 32, 64, 128, 256):
            layers += [Unit(before, w(channels), 3), nn.MaxPool2d(2)]
            before = w(channels)
        self.shallow = nn.Sequential(*layers[:-1])  # to stride 16
        self.deep = Unit(w(256), w(512), 3)
        self.wide = Unit(w(512), w(1024), 3)
        self.narrow = Unit(w(1024), w(256), 1)
        self.coarse = nn.Sequential(Unit(w(256), w(512), 3), nn.Conv2d(w(512), self.out_channels, 1))
        self.to_fine = Unit(w(256), w(128), 1)
        self.fine = nn.Sequential(Unit(w(128) + w(256), w(256), 3), nn.Conv2d(w(256), self.out_channels, 1))

    def forward(self, x: Tensor) -> list[Tensor]:
        self.check_size(x)
        at_16 = self.shallow(x)  # (N, 256, H / 16, W / 16)
        x = self.deep(F.max_pool2d(at_16, 2))  # (N, 512, H / 32, W / 32)
        x = F.pad(x, (0, 1, 0, 1), mode="replicate")  # adds nothing to a maximum, as Darknet's border
        x = self.narrow(self.wide(F.max_pool2d(x, 2, 1)))
        return [self.coarse(x), self.fine(upsampled(self.to_fine(x), at_16))]


def yolov3_tiny(
    width: float = 1.0,
    priors: Sequence[Sequence[float]] | None = None,
    image_size: int = 416,
    num_classes: int = 80,
    in_channels: int = 3,
    gamma_init: float = 0.5,
) -> YoloV3Tiny:
    """Build YOLOv3-tiny; `width` multiplies the channels of every layer.

    Source: the authors' yolov3-tiny.cfg (github.com/pjreddie/darknet). It leaves one of the six priors to nobody and gives
    another to both scales; here each belongs to one scale.

    Args:
        priors: six (or another multiple of two) widths and heights, in pixels of the images; None: the authors', scaled from
            416 pixels to `image_size`.
        image_size: of the longer side of the images, in pixels.

    Raises:
        ConfigError: a value out of range.
    """
    check_number("model.width", width, 0, above=True)
    given = scaled(PRIORS, image_size) if priors is None else priors
    return YoloV3Tiny(given, width, num_classes, in_channels, image_size, gamma_init)
