"""Plain torch networks without any knowledge of pruning, each known by a registered name with plain arguments.

Every factory takes `num_classes` and `in_channels`; the own classifiers end in global average pooling, so that any image
size that their strides allow works. Those of detectors take `image_size`, too, and their networks say what their raw outputs
mean: `loss(outputs, targets, size)` and `detections(outputs, size)`.
"""

import inspect
from collections.abc import Callable

from torch import nn

from slimming.errors import ConfigError
from slimming.models.convnet import convnet
from slimming.models.densenet import densenet
from slimming.models.fresh import redraw_as_built, redraw_layer_by_layer
from slimming.models.mlp import mlp
from slimming.models.preresnet import preresnet
from slimming.models.timm_zoo import normalisation as timm_normalisation
from slimming.models.timm_zoo import timm
from slimming.models.torchvision_detection import torchvision_detection
from slimming.models.vgg import vgg
from slimming.models.yolov3 import yolov3
from slimming.models.yolov3_tiny import yolov3_tiny
from slimming.models.zoo import NORMALISING, torchvision

REGISTRY: dict[str, Callable[..., nn.Module]] = {
    f.__name__: f
    for f in (vgg, preresnet, densenet, convnet, mlp, torchvision, timm, yolov3, yolov3_tiny, torchvision_detection)
}


def build(name: str, /, **arguments) -> nn.Module:
    """Build a registered network.

    Raises:
        ConfigError: an unknown name, or arguments that the factory does not take.
    """
    if name not in REGISTRY:
        raise ConfigError(f"no model is registered as {name!r}; there are {', '.join(REGISTRY)}")
    try:
        inspect.signature(REGISTRY[name]).bind(**arguments)
    except TypeError as error:
        raise ConfigError(f"model {name}: {error}") from error
    return REGISTRY[name](**arguments)


def spec(name: str, arguments: dict) -> dict:
    """Return {name, arguments} that rebuild a network's architecture: without the pretrained weights it started from."""
    if arguments.get("weights"):
        normalises = {"transform_input": True} if name == "torchvision" and arguments.get("name") in NORMALISING else {}
        arguments = arguments | {"weights": None} | normalises
    return {"name": name, "arguments": arguments}


def redraw(model: nn.Module, registered: dict | None) -> nn.Module:
    """Draw fresh weights for the widths that a (pruned) network has now, in place, and return it.

    A registered network gets what its factory draws for layers of these widths: of one seed, the very weights of
    `vgg(widths=...)`. Of any other, every layer's `reset_parameters` runs.

    Args:
        registered: {name, arguments} that rebuild the network before it was pruned; None for one that is not registered.

    Raises:
        ConfigError: a parameter that nothing draws.
    """
    if registered is None:
        redraw_layer_by_layer(model)
    else:
        fresh = spec(**registered)  # without the weights that it may have started from
        redraw_as_built(model, lambda: build(fresh["name"], **fresh["arguments"]))
    return model


def normalisation(name: str, arguments: dict) -> dict[str, list[float]]:
    """Return {mean, std} of the images that a network's pretrained weights expect; {} where it starts from fresh ones."""
    if name == "timm" and arguments.get("weights"):
        return timm_normalisation(arguments["name"], arguments["weights"])
    return {}


def label(name: str, arguments: dict) -> str:
    """Name a network for people: `vgg19`, `preresnet164`, `mobilenet_v2`."""
    return str(arguments.get("name", f"{name}{arguments.get('depth', '')}"))
