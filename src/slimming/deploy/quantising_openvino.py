"""Quantisation of OpenVINO's .xml by nncf."""

import contextlib
import io
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slimming.errors import ConfigError
from slimming.quiet import only_errors

LAYERS = ("Convolution", "GroupConvolution", "MatMul", "Add", "Multiply", "Concat")


class OpenVinoQuantiser:
    """See `quantising.Quantiser`."""

    engine = "openvino"

    def __init__(self, source: Path, calibration: Sequence[np.ndarray], reduce_range: bool):
        try:
            import nncf
            import openvino
            from nncf.quantization.range_estimator import RangeEstimatorParametersSet
        except ImportError as error:
            raise ConfigError(
                f"quantize=int8 with format=openvino needs {error.name}: pip install 'slimming[openvino]'"
            ) from error
        self.nncf, self.openvino = nncf, openvino
        self.source, self.calibration = source, list(calibration)
        self.advanced = nncf.AdvancedQuantizationParameters(
            overflow_fix=nncf.OverflowFix.ENABLE if reduce_range else nncf.OverflowFix.DISABLE,
            # nncf's defaults cost 8 points on a sparse VGG-19: they correct biases by statistics that its many nearly dead
            # channels spoil, and cut off what lies above the mean of the batches' largest values. So they cost none.
            disable_bias_correction=True,
            activations_range_estimator_params=RangeEstimatorParametersSet.MINMAX,
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


def _of_images(op: Any) -> bool:
    """Return whether an operator computes with activations; a bias is added, and a scale multiplied, in floats anyway."""
    constants = [value.get_source_output().get_node().get_type_name() == "Constant" for value in op.inputs()]
    return op.get_type_name() not in ("Add", "Multiply") or not any(constants)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keep nncf's notes and progress bars off the screen."""
    with only_errors("nncf"), contextlib.redirect_stdout(io.StringIO()):
        yield
