"""A detector as other engines get it: one output, boxes with their scores."""

import torch
from torch import Tensor, nn

from slimming.errors import ConfigError


class BoxesOut(nn.Module):
    """Gives every prediction as a box and the scores of all classes, before non-maximum suppression.

    Boxes are corners x1 y1 x2 y2 as shares of the image's width and height, so that they and the scores are of one size; not
    cut at the image.

    Shape: (N, C, H, W) -> (N, P, 4 + num_classes).

    Args:
        net: a detector with `decoded(outputs, size)`, boxes (N, P, 4) in pixels and scores (N, P, num_classes) in [0, 1].

    Raises:
        ConfigError: a detector without that: how many boxes it has depends on the images.
    """

    def __init__(self, net: nn.Module):
        super().__init__()
        if not callable(getattr(net, "decoded", None)):
            raise ConfigError(
                f"{type(net).__name__} is not exported, as how many boxes it has depends on the images; yolov3, yolov3_tiny, "
                "fcos, retinanet and ssdlite320 are: load its checkpoint by slimming.load, or train one of those"
            )
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        boxes, scores = self.net.decoded(self.net(x), (height, width))
        shares = torch.tensor([1 / width, 1 / height] * 2).to(boxes)
        return torch.cat((boxes * shares, scores), -1)
