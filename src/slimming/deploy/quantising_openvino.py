"""Quantisation of OpenVINO's .xml by nncf."""

import contextlib
import logging
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slimming.errors import ConfigError

LAYERS = ("Convolution", "GroupConvolution", "MatMul", "Add", "Multiply", "Concat")


class OpenVinoQuantiser:
    """See `quantising.Quantiser`."""

    engine = "openvino"

    def __init__(self, source: Path, calibration: Sequence[np.ndarray], reduce_range: bool):
        try:
            import nncf
            import openvino
        except ImportError as error:
            raise ConfigError(f"quantize=int8 with format=openvino needs {error.name}: pip install 'slimming[export]'") from error
        self.nncf, self.openvino = nncf, openvino
        self.source, self.calibration = source, list(calibration)
        self.advanced = nncf.AdvancedQuantizationParameters(
            overflow_fix=nncf.OverflowFix.ENABLE if reduce_range else nncf.OverflowFix.DISABLE
        )
        with _silent():
            found = {op.get_friendly_name(): op for op in openvino.Core().read_model(source).get_ordered_ops()}
        self.layers = [name for name, op in found.items() if op.get_type_name() in LAYERS and _of_images(op)]
        self.scheme = "static, per channel, by nncf"

    def write(self, path: Path, floats: Collection[str]) -> None:
        with _silent():
            model = self.nncf.quantize(
                self.openvino.Core().read_model(self.source),
                self.nncf.Dataset(self.calibration),
                subset_size=len(self.calibration),
                ignored_scope=self.nncf.IgnoredScope(names=sorted(floats)),
                advanced_parameters=self.advanced,
            )
        self.openvino.save_model(model, path, compress_to_fp16=False)
