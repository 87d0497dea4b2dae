"""A network as a file that runs elsewhere: one module per format, and the proof that the file computes what the network does.

Every module of a format has the same names; what it writes is run by the first engine that reads it (engines.READS):

SUFFIXES: of the files it writes, the one that is opened first of all.
PACKAGES, EXTRA: what it needs beside torch, and the extra of `slimming` that brings it.
write(network, path): write the file (and those beside it) of a `Network`.
"""

import importlib
import importlib.util
from types import ModuleType

from slimming.errors import ConfigError, check_choice

FORMATS = ("onnx", "torch", "openvino", "safetensors")  # each a module here, <name>_format


def format_named(name: str) -> ModuleType:
    """Return the module of a format.

    Raises:
        ConfigError: there is none of that name, or a package that it needs is not installed.
    """
    check_choice("format", name, FORMATS)
    module = importlib.import_module(f"slimming.deploy.{name}_format")
    missing = [package for package in module.PACKAGES if importlib.util.find_spec(package) is None]
    if missing:
        raise ConfigError(
            f'format={name} needs {" and ".join(missing)}, not installed here: pip install "slimming[{module.EXTRA}]"'
        )
    return module
