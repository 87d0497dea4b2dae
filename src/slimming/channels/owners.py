"""Which layer a parameter or buffer belongs to."""

from typing import NamedTuple

from torch import nn


class Owner(NamedTuple):
    """The module that holds a parameter or buffer.

    Attributes:
        layer: its name in plans: the module's, or the tensor's own where a module holds it beside weight and bias.
        module: the module itself.
        tensor: the tensor's name in the network.
    """

    layer: str
    module: nn.Module
    tensor: str


def find_owners(names: dict[nn.Module, str]) -> dict[int, Owner]:
    """Map the id of every parameter and buffer that one module alone holds to its owner."""
    found: dict[int, list[Owner]] = {}
    for module, prefix in names.items():
        for attribute, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                plain = attribute in ("weight", "bias") or isinstance(module, nn.modules.batchnorm._BatchNorm)
                own = f"{prefix}.{attribute}".lstrip(".")
                found.setdefault(id(tensor), []).append(Owner(prefix if plain else own, module, own))
    return {key: owners[0] for key, owners in found.items() if len(owners) == 1}
