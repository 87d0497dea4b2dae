"""Any torchvision classification network, its first and last layers fitted to the data set."""

import difflib
import pathlib

import torch
from torch import nn

from slimming.errors import ConfigError
from slimming.models.init import check_io_shape, set_gammas

NORMALISING = ("googlenet", "inception_v3")  # with pretrained weights they change the normalisation of their input


def torchvision(
    name: str,
    weights: str | None = None,
    num_classes: int = 10,
    in_channels: int = 3,
    gamma_init: float | None = None,
    transform_input: bool = False,
) -> nn.Module:
    """Build a torchvision classification model.

    Args:
        name: as in `torchvision.models`, e.g. `mobilenet_v2`.
        weights: None, a torchvision weights name (`DEFAULT`, `IMAGENET1K_V2`), or the path of a state dict on disk.
        gamma_init: sets every BatchNorm scale; None keeps torchvision's own (1, or what `weights` brings).
        transform_input: GoogLeNet and Inception as `weights` would make them: the input's normalisation is changed.

    Raises:
        ConfigError: unknown name or weights, or weights that cannot be had.
    """
    from torchvision import models

    check_io_shape(num_classes, in_channels)
    known = models.list_models(module=models)
    if name not in known:
        near = difflib.get_close_matches(str(name), known, 3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known)}"
        raise ConfigError(f"model.name={name!r} is not a torchvision classification model; {hint}")
    # These two warn unless told how to initialise; True is what they do today.
    initialise = {"init_weights": True} if name in NORMALISING and weights is None else {}
    model = (
        models.get_model(name, weights=None, **initialise) if weights is None else _pretrained(models, name, weights)
    )
    if transform_input and name in NORMALISING:
        model.transform_input = True
    _fit_head(model, num_classes)
    fit_stem(model, in_channels)
    return set_gammas(model, gamma_init)


def _pretrained(models, name: str, weights: str) -> nn.Module:
    known = [w.name for w in models.get_model_weights(name)]
    path = pathlib.Path(weights)
    if path.is_file():
        model = models.get_model(name, weights=None)
        try:
            model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        except Exception as error:
            raise ConfigError(f"model.weights={weights} is not a state dict of {name}: {error}") from error
        return model
    if weights not in [*known, "DEFAULT"]:
        raise ConfigError(f"model.weights={weights!r} is neither a file nor one of {', '.join([*known, 'DEFAULT'])}")
    try:
        return models.get_model(name, weights=weights)
    except OSError as error:  # urllib's errors are OSErrors
        url = models.get_model_weights(name)[weights].url
        raise ConfigError(
            f"model.weights={weights} could not be downloaded ({error}): fetch {url} elsewhere, "
            f"put it into {torch.hub.get_dir()}/checkpoints and start again"
        ) from error


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


def _fit_head(model: nn.Module, num_classes: int) -> None:
    """Replace every classifier of 1000 classes: the head and, in GoogLeNet and Inception, the auxiliary heads."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and layer.out_features == 1000 != num_classes:
            _replace(model, name, nn.Linear(layer.in_features, num_classes, bias=layer.bias is not None))
        elif isinstance(layer, nn.Conv2d) and layer.out_channels == 1000 != num_classes:  # SqueezeNet
            _replace(model, name, nn.Conv2d(layer.in_channels, num_classes, layer.kernel_size))


def fit_stem(model: nn.Module, in_channels: int) -> None:
    """Give the first convolution another number of input channels, in place."""
    stem = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    if stem.in_channels == in_channels:
        return
    if getattr(model, "transform_input", False):
        model.transform_input = False  # GoogLeNet and Inception with weights: arithmetic on three colours
    with torch.no_grad():  # the same response to a grey image as the colour network has
        grey = stem.weight.sum(1, keepdim=True).div(in_channels)  # (out channels, 1, k, k)
    stem.weight = nn.Parameter(grey.repeat(1, in_channels, 1, 1))
    stem.in_channels = in_channels
