"""Any network of timm, the library of image models that most pretrained weights come from."""

import difflib
import pathlib

import torch
from torch import nn

from slimming.errors import ConfigError
from slimming.models.init import check_io_shape, set_gammas

DEFAULT = "DEFAULT"


def timm(
    name: str,
    weights: str | None = None,
    num_classes: int = 10,
    in_channels: int = 3,
    gamma_init: float | None = None,
) -> nn.Module:
    """Build a network of timm with a head for `num_classes` and a stem for `in_channels`.

    Args:
        name: as in `timm.list_models()`, e.g. `mobilenetv3_small_050`.
        weights: None, a tag of pretrained weights (`lamb_in1k`), DEFAULT, or the path of a state dict on disk.
        gamma_init: sets every BatchNorm scale; None keeps timm's own (1, or what `weights` brings).

    Raises:
        ConfigError: timm is not installed, an unknown name or tag, or weights that cannot be had.
    """
    library = _library()
    check_io_shape(num_classes, in_channels)
    _check_name(library, name)
    arguments = {"num_classes": num_classes, "in_chans": in_channels}
    if weights is None:
        model = library.create_model(name, pretrained=False, **arguments)
    elif pathlib.Path(weights).is_file():
        model = _filled(library.create_model(name, pretrained=False, **arguments), name, weights)
    else:
        model = _pretrained(library, name, weights, arguments)
    return set_gammas(model, gamma_init)


def normalisation(name: str, weights: str | None) -> dict[str, list[float]]:
    """Return the mean and std, per channel, of the images that weights of timm were trained on.

    Raises:
        ConfigError: as `timm`.
    """
    library = _library()
    _check_name(library, name)
    tags = _tags(library, name)
    tag = next(iter(tags), None) if weights == DEFAULT or weights not in tags else weights
    found = tags[tag] if tag is not None else library.get_pretrained_cfg(name, allow_unregistered=True)
    return {"mean": list(found.mean), "std": list(found.std)}


def _library():
    try:
        import timm as library
    except ImportError as error:
        raise ConfigError("model=timm needs the package timm: pip install 'slimming[timm]'") from error
    return library


def _check_name(library, name: str) -> None:
    name = str(name)
    if library.is_model(name) and "." not in name:
        return
    base, _, tag = name.partition(".")
    if tag and library.is_model(base):
        raise ConfigError(f"model.name={name!r} holds a tag of weights: set model.name={base} model.weights={tag}")
    near = difflib.get_close_matches(name, library.list_models(), 3)
    hint = f"did you mean {' or '.join(near)}?" if near else "timm.list_models() lists them"
    raise ConfigError(f"model.name={name!r} is not a model of timm {library.__version__}; {hint}")


def _tags(library, name: str) -> dict:
    """Return the pretrained configurations of a network by their tag, the default first."""
    names = [n for n in library.list_pretrained(f"{name}.*") if n.partition(".")[0] == name]
    default = library.get_pretrained_cfg(name, allow_unregistered=True)
    tags = {n.partition(".")[2]: library.get_pretrained_cfg(n) for n in names}
    first = default.tag if default is not None and default.tag in tags else None
    return ({first: tags[first]} if first else {}) | tags


def _pretrained(library, name: str, weights: str, arguments: dict) -> nn.Module:
    known = _tags(library, name)
    if weights not in (*known, DEFAULT):
        some = ", ".join(known) or "none, timm has no weights of this network"
        raise ConfigError(f"model.weights={weights!r} is neither a file nor a tag of {name}; there are {some}")
    tag = next(iter(known), None) if weights == DEFAULT else weights
    if tag is None:
        raise ConfigError(f"model.weights=DEFAULT: timm has no pretrained weights of {name}; leave model.weights=null")
    try:
        return library.create_model(f"{name}.{tag}", pretrained=True, **arguments)
    except Exception as error:  # the hub's client raises a dozen kinds
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"model.weights={weights}: the weights of {name}.{tag} could not be loaded ({reason}): fetch them where the "
            "network reaches the hub, save their state dict, and give its path as model.weights"
        ) from error


def _filled(model: nn.Module, name: str, path: str) -> nn.Module:
    try:
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:
        raise ConfigError(
            f"model.weights={path} is not a state dict of {name} with this head and stem: {' '.join(str(error).split())[:300]}"
        ) from error
    return model
