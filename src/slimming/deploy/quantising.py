"""Int8: an exported network, quantised with ranges seen on training images; layers that cost too much accuracy stay float.

Static quantisation: every tensor gets its scale beforehand, from its range on calibration images; weights get one scale per
output channel. onnxruntime's quantiser does it for .onnx, nncf for OpenVINO's .xml; this module decides which layers.
"""

import tempfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from slimming.deploy.engines import Engine, open_engine
from slimming.deploy.timing import cpu_flags, has_vnni
from slimming.errors import ConfigError, ExportError

Labelled = Sequence[tuple[np.ndarray, np.ndarray]]  # batches of float32 images (N, C, H, W) with labels (N,)
SHOWN = 8  # layers that a message names


class Quantiser(Protocol):
    """One library's way to quantise one network.

    Attributes:
        engine: that runs what it writes.
        scheme: in words.
        layers: names of the operators that may go back to float, in order.
    """

    engine: str
    scheme: str
    layers: list[str]

    def write(self, path: Path, floats: Collection[str]) -> None:
        """Write the network with all layers in int8 but `floats`."""


@dataclass
class Quantised:
    """What a quantisation did.

    Attributes:
        scheme: in words.
        calibration_images: that the ranges were seen on.
        layers: how many could be quantised; `floats`: those that are not, the most sensitive first.
        sensitivity: squared error of the logits with that layer alone in int8, relative to their square; {} where nobody
            had to know.
        accuracy, accuracy_before: in int8 and in float, in [0, 1], on `checked_images` images; None where not checked.
        max_drop: that was allowed, in points.
    """

    scheme: str
    calibration_images: int
    layers: int
    floats: list[str] = field(default_factory=list)
    sensitivity: dict[str, float] = field(default_factory=dict)
    accuracy: float | None = None
    accuracy_before: float | None = None
    checked_images: int = 0
    max_drop: float | None = None

    def describe(self, checked_on: str) -> str:
        """Return what was done, in lines; `checked_on`: whose images the accuracies are of."""
        lines = [f"int8: {self.scheme}; calibrated on {self.calibration_images:,} training images"]
        if self.accuracy is not None and self.accuracy_before is not None:
            drop = 100 * (self.accuracy_before - self.accuracy)
            allowed = f", allowed {self.max_drop:g}" if self.max_drop is not None else ""
            lines.append(
                f"  accuracy on {self.checked_images:,} {checked_on}: {self.accuracy_before:.2%} -> {self.accuracy:.2%} "
                f"(a drop of {drop:.2f} points{allowed})"
            )
        if self.floats:
            lines.append(f"  {len(self.floats)} of {self.layers} layers went back to float: {_some(self.floats)}")
        return "\n".join(lines)


def quantise(
    source: Path,
    target: Path,
    calibration: Sequence[np.ndarray],
    check: Labelled = (),
    *,
    max_drop: float | None = 1.0,
    reduce_range: bool | None = None,
    symmetric: bool = False,
) -> Quantised:
    """Quantise an exported network.

    Args:
        source: a float .onnx or .xml with a free batch size; `target`: where the quantised one goes, of the same kind.
        calibration: batches of training images as the network gets them.
        check: labelled images, not of the test set, to judge by; not needed where `max_drop` is None.
        max_drop: points of accuracy that may be lost on them; layers go back to float until no more is lost. None: all
            layers are quantised.
        reduce_range: weights in 7 bits, for CPUs that add products of 8 bits up in 16; None: as this CPU needs it.
        symmetric: zero points of 0 for all tensors, as TensorRT wants them; for .onnx alone.

    Raises:
        ConfigError: no images to calibrate on or to judge by.
        ExportError: so little accuracy can only be lost with every layer in float.
    """
    if not calibration:
        raise ConfigError(
            "quantize=int8 needs training images to calibrate on: give data=<name> (and data.root=<folder>)"
        )
    if max_drop is not None and not check:
        raise ConfigError("quantize.max_drop needs labelled images to judge by: give some, or quantize.max_drop=null")
    reduce_range, why = _range(reduce_range)
    with tempfile.TemporaryDirectory() as folder:
        quantiser = _quantiser(source, Path(folder), calibration, reduce_range, symmetric)
        found = Quantised(f"{quantiser.scheme}, {why}", sum(map(len, calibration)), len(quantiser.layers))
        if not quantiser.layers:
            raise ExportError(f"{source.name} has no layer that can be quantised")
        quantiser.write(target, ())
        if check:
            _Search(quantiser, source, target, check, max_drop, found).run()
    return found


def _quantiser(
    source: Path, folder: Path, calibration: Sequence[np.ndarray], reduce_range: bool, symmetric: bool
) -> Quantiser:
    if source.suffix == ".onnx":
        from slimming.deploy.quantising_onnx import OnnxQuantiser

        return OnnxQuantiser(source, folder, calibration, reduce_range, symmetric)
    if source.suffix == ".xml":
        from slimming.deploy.quantising_openvino import OpenVinoQuantiser

        return OpenVinoQuantiser(source, calibration, reduce_range)
    raise ConfigError(f"quantize=int8 is for format=onnx and format=openvino, not for {source.suffix}")


def _range(asked: bool | None) -> tuple[bool, str]:
    """Return whether weights get 7 bits, and why, in words."""
    if asked is not None:
        return asked, f"weights in {7 if asked else 8} bits as asked"
    if has_vnni(cpu_flags()):
        return False, "weights in 8 bits (this CPU has VNNI)"
    return True, "weights in 7 bits (this CPU lacks VNNI, and sums of products of 8 bits would overflow)"


@dataclass
class _Search:
    """Sends layers back to float, the most sensitive first, until the drop is met; `target` then holds that network."""

    quantiser: Quantiser
    source: Path
    target: Path
    check: Labelled
    max_drop: float | None
    found: Quantised

    def run(self) -> None:
        found, before = self.found, open_engine(self.source, self.quantiser.engine)
        found.checked_images = sum(len(labels) for _, labels in self.check)
        found.accuracy_before, found.accuracy = accuracy(before, self.check), self._accuracy(())
        found.max_drop = self.max_drop
        if self._met():
            return
        found.sensitivity = self._sensitivity(before)
        ranking = sorted(self.quantiser.layers, key=lambda name: -found.sensitivity[name])
        found.floats = ranking[: self._fewest(ranking)]
        found.accuracy = self._accuracy(found.floats)

    def _met(self) -> bool:
        found = self.found
        assert found.accuracy is not None and found.accuracy_before is not None
        return found.max_drop is None or 100 * (found.accuracy_before - found.accuracy) <= found.max_drop + 1e-9

    def _accuracy(self, floats: Collection[str]) -> float:
        self.quantiser.write(self.target, floats)
        return accuracy(open_engine(self.target, self.quantiser.engine), self.check)

    def _fewest(self, ranking: list[str]) -> int:
        """Return how many layers of the ranking must be float: 1, 2, 4 ... are tried, then what lies in between."""
        too_few, enough = 0, None
        while enough is None or enough - too_few > 1:
            most = len(ranking) - 1  # with all of them in float nothing would be quantised
            if too_few == most:
                raise ExportError(
                    f"quantize.max_drop={self.max_drop:g} cannot be met: with one layer left in int8, accuracy falls from "
                    f"{self.found.accuracy_before:.2%} to {self.found.accuracy:.2%}; allow more, or export in float"
                )
            count = min(max(1, 2 * too_few), most) if enough is None else (too_few + enough) // 2
            self.found.accuracy = self._accuracy(ranking[:count])
            too_few, enough = (too_few, count) if self._met() else (count, enough)
        return enough

    def _sensitivity(self, before: Engine) -> dict[str, float]:
        """Return the error of the logits with one layer alone in int8, for every layer, on the first images."""
        images = self.check[0][0]
        expected = before(images).astype(np.float64)
        sensitivity = {}
        for name in self.quantiser.layers:
            self.quantiser.write(self.target, [other for other in self.quantiser.layers if other != name])
            error = open_engine(self.target, self.quantiser.engine)(images) - expected
            sensitivity[name] = float(np.square(error).sum() / np.square(expected).sum())
        return sensitivity


def accuracy(run: Any, batches: Labelled) -> float:
    """Return the share of labelled images whose largest logit is that of their class."""
    right = sum(int((run(images).argmax(1) == labels).sum()) for images, labels in batches)
    return right / sum(len(labels) for _, labels in batches)


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + f" and {len(names) - SHOWN} more" * (len(names) > SHOWN)
