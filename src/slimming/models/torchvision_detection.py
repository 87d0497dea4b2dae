"""torchvision's detectors by name, every norm a BatchNorm whose scales can be penalised."""

import difflib
import pathlib

import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from slimming.errors import ConfigError, check_number
from slimming.models.init import check_io_shape, set_gammas
from slimming.models.torchvision_one_stage import Fcos, Ssd, TorchvisionDetector
from slimming.models.torchvision_two_stage import FasterRcnn, MobileFasterRcnn
from slimming.models.zoo import fit_stem

FAMILIES = {
    "fcos_resnet50_fpn": Fcos,
    "retinanet_resnet50_fpn": TorchvisionDetector,
    "retinanet_resnet50_fpn_v2": TorchvisionDetector,
    "ssdlite320_mobilenet_v3_large": Ssd,
    "fasterrcnn_resnet50_fpn": FasterRcnn,
    "fasterrcnn_resnet50_fpn_v2": FasterRcnn,
    "fasterrcnn_mobilenet_v3_large_fpn": MobileFasterRcnn,
    "fasterrcnn_mobilenet_v3_large_320_fpn": MobileFasterRcnn,
}
WITHOUT = {"ssd300_vgg16": "it has no BatchNorm whose scales could be penalised"}  # not served, and why


def torchvision_detection(
    name: str,
    weights: str | None = None,
    image_size: int = 416,
    num_classes: int = 90,
    in_channels: int = 3,
    gamma_init: float | None = None,
) -> TorchvisionDetector:
    """Build a detector of torchvision; a BatchNorm2d stands wherever it has a frozen one or a GroupNorm.

    GroupNorm normalises over channels, so that none could go without changing the others. What stays whole are the feature
    pyramids: no BatchNorm writes their channels; of fasterrcnn_resnet50_fpn_v2 their outputs, out of which boxes are cut.

    Args:
        name: fcos_resnet50_fpn, retinanet_resnet50_fpn, retinanet_resnet50_fpn_v2, ssdlite320_mobilenet_v3_large,
            fasterrcnn_resnet50_fpn, fasterrcnn_resnet50_fpn_v2, fasterrcnn_mobilenet_v3_large_fpn or
            fasterrcnn_mobilenet_v3_large_320_fpn.
        weights: None, or the path of torchvision's state dict for it; entries of another shape (the layers that depend on the
            number of classes) or of norms that were replaced stay fresh. Nothing is downloaded.
        image_size: of the images, in pixels.
        gamma_init: sets every BatchNorm scale; None keeps 1, or what `weights` brings.

    Raises:
        ConfigError: an unknown name, or weights that are not of it.
    """
    check_io_shape(num_classes, in_channels)
    check_number("data.image_size", image_size, 1, whole=True)
    _check_name(name)
    net = _build(name, num_classes, image_size)
    replace_norms(net)
    if weights is not None:
        _fill(net, name, weights)
    fit_stem(net, in_channels)
    return FAMILIES[name](set_gammas(net, gamma_init))


def _check_name(name: str) -> None:
    if name in FAMILIES:
        return
    near = difflib.get_close_matches(str(name), FAMILIES, 1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(FAMILIES)}"
    if name in WITHOUT:
        raise ConfigError(f"model.name={name} is not served: {WITHOUT[name]}; {hint}")
    raise ConfigError(f"model.name={name!r} is not a detector of torchvision that is served; {hint}")


def _build(name: str, num_classes: int, image_size: int) -> nn.Module:
    """Build torchvision's own network."""
    from torchvision.models import detection

    told = FAMILIES[name].arguments(num_classes, image_size)
    return getattr(detection, name)(weights=None, weights_backbone=None, **told)


def replace_norms(model: nn.Module) -> None:
    """Put a BatchNorm2d in the place of every frozen one, with its values, and of every GroupNorm, in place."""
    for parent in [*model.modules()]:
        for name, child in parent.named_children():
            if isinstance(child, FrozenBatchNorm2d):
                norm = nn.BatchNorm2d(len(child.weight), child.eps)
                norm.load_state_dict(child.state_dict(), strict=False)  # it counts no batches
                setattr(parent, name, norm)
            elif isinstance(child, nn.GroupNorm):
                setattr(parent, name, nn.BatchNorm2d(child.num_channels))


def _fill(net: nn.Module, name: str, path: str) -> None:
    """Copy the entries of a state dict that fit; torchvision's code renames those of its earlier versions."""
    if not pathlib.Path(path).is_file():
        raise ConfigError(f"model.weights={path} is not a file: give the path of a state dict of torchvision's {name}")
    try:
        given = torch.load(path, map_location="cpu", weights_only=True)
        own = net.state_dict()
        fitting = {k: v for k, v in given.items() if k not in own or own[k].shape == v.shape}
    except Exception as error:
        raise ConfigError(f"model.weights={path} is not a state dict: {' '.join(str(error).split())[:200]}") from error
    if not any(key.startswith("backbone.") for key in own.keys() & fitting.keys()):
        raise ConfigError(f"model.weights={path} is not a state dict of {name}: no weight of its backbone fits")
    net.load_state_dict(fitting, strict=False)
