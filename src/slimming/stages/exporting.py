"""Export: from a checkpoint to a file that runs elsewhere, proven in a fresh process, with what its user must know."""

import contextlib
import hashlib
import json
import math
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from slimming import deploy
from slimming.config import ExportConfig, plain
from slimming.data import ImageData
from slimming.deploy.capturing import BATCH, INPUT, Network
from slimming.deploy.fresh import fresh_process
from slimming.deploy.proving import TOLERANCE, Proof, check, prove
from slimming.errors import ExportError, RunDirectoryError
from slimming.files import replacing, write_text
from slimming.records import Result
from slimming.stages.building import data_label, try_model
from slimming.stages.exporting_text import summary
from slimming.stages.quantising import quantise_artefact
from slimming.stages.recording import OngoingStage, recorded, relative, versions
from slimming.stages.shaping import write_shaped
from slimming.stages.sources import DataNeed, Source, load_source
from slimming.stages.splitting import compare_split, split_source

NAME = "model"  # of the artefact, before its suffix
FACTS = "export.json"
WORKSHOP = ".export-"  # prefix of the folder in the run directory where an artefact waits for its proof
RANDOM_BATCHES = (1, 5, 26)  # where there are no images


def export(cfg: ExportConfig, out: Path) -> float:
    """Export a checkpoint's network; leave model.<suffix>, export.json and result.json in `out`.

    Returns:
        The test accuracy of what was exported, in [0, 1]; nan if it was not tested.

    Raises:
        SlimmingError: anything that the user can mend; no artefact is then left but an earlier one.
    """
    begun = Result("export", "exported", cfg.seed, relative(cfg.checkpoint, out), plain(cfg))
    with recorded(out, begun, cfg.logger, cfg.checkpoint) as run:
        _export(cfg, run)
    return run.result.metrics.get("test/acc", math.nan)


def _export(cfg: ExportConfig, run: OngoingStage) -> None:
    out, result = run.out, run.result
    file_format = deploy.format_named(cfg.format)
    names = [NAME + suffix for suffix in file_format.SUFFIXES]
    _check_free(out, [*names, FACTS], cfg.overwrite)
    whole, data = load_source(cfg, _data_need(cfg))
    whole.task.check_export(cfg)
    whole = whole.exported()
    source, split = split_source(cfg, whole)
    result.model, result.data = source.label, data_label(source.training.get("data") or {})
    result.cost = try_model(source.model, source.example).record()
    print(f"{source.label} of {cfg.checkpoint}\n  run directory: {out}")
    output = source.task.output(source.model, source.example, source.record.data or {})
    network = Network(source.model, tuple(source.example.shape[1:]), source.record, output["name"])
    with _workshop(out) as workshop:
        shaping = write_shaped(cfg, source, network, file_format, workshop / names[0])
        with fresh_process(workshop / names[0]) as artefact:
            proof = prove(artefact, source.model, _batches(cfg, data, network))
        check(proof)
        facts = _facts(cfg, source, network, proof) | {"output": output, "shaping": shaping}
        if split:
            facts["low_rank"] = split | compare_split(whole, source, _batches(cfg, data, network))
        if cfg.quantize.to:
            facts |= _quantised(cfg, source, data, workshop / names[0], _batches(cfg, data, network))
        facts |= _files([workshop / name for name in names], file_format)
        _install(workshop, out, names, facts)
    result.metrics = facts["accuracy"] or {}
    result.details["export"] = facts
    print(summary(facts))
    _ = run.loggers  # opened now that the export has succeeded; they get what it left


def _quantised(
    cfg: ExportConfig,
    source: Source,
    data: ImageData | None,
    artefact: Path,
    batches: Iterator[tuple[Tensor, Tensor | None]],
) -> dict[str, Any]:
    """Put an int8 artefact in the place of a float one; return what export.json says of it."""
    found, checked_on = quantise_artefact(cfg.quantize, data, artefact)
    with fresh_process(artefact) as run:
        proof = prove(run, source.model, batches)
    print(found.describe(checked_on))
    facts = {"quantize": asdict(found) | {"to": cfg.quantize.to, "checked_on": checked_on, "relative": proof.relative}}
    return facts | {"accuracy": _accuracy(proof)}


# --- the images -------------------------------------------------------------------------------------------------------


def _data_need(cfg: ExportConfig) -> DataNeed | None:
    if cfg.quantize.to:
        return DataNeed(f"quantize={cfg.quantize.to}, which calibrates on training images, needs", "quantize=none")
    if cfg.test_images == 0:
        return None
    return DataNeed("the proof on test images, and the accuracy, need", "test_images=0: random images, no accuracy")


def _batches(cfg: ExportConfig, data: ImageData | None, network: Network) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield images as the network gets them, one alone first of all, with their classes; without data random ones."""
    if data is None or cfg.test_images == 0:
        generator = torch.Generator().manual_seed(cfg.seed)
        yield from ((torch.randn(n, *network.image, generator=generator), None) for n in RANDOM_BATCHES)
        return
    for number, (images, labels) in enumerate(_loader(data, cfg.test_images)):
        for part in (slice(0, 1), slice(1, None)) if number == 0 else (slice(None),):
            if len(labels[part]):
                yield data.transform(images[part]), labels[part] if isinstance(labels, Tensor) else None


def _loader(data: ImageData, wanted: int | None) -> DataLoader:
    """Return the test images in batches; where fewer are wanted, spread over all, as they may be sorted by class."""
    if wanted is None:
        return data.test_dataloader()
    images = data.splits["test"]
    picked = torch.linspace(0, len(images) - 1, min(wanted, len(images))).round().long().tolist()
    return DataLoader(Subset(images, picked), data.eval_batch_size, collate_fn=data.collate)


# --- what is left -----------------------------------------------------------------------------------------------------


def _check_free(out: Path, names: list[str], overwrite: bool) -> None:
    there = [name for name in names if (out / name).exists()]
    if there and not overwrite:
        raise RunDirectoryError(f"{out} holds {there[0]} already: give overwrite=true or another hydra.run.dir")


@contextlib.contextmanager
def _workshop(out: Path) -> Iterator[Path]:
    """Give a folder beside the results that is gone afterwards; and clear away those of exports that were killed.

    Raises:
        ExportError: the disk is full or not writable.
    """
    for left in out.glob(WORKSHOP + "*"):
        shutil.rmtree(left, ignore_errors=True)
    try:
        with tempfile.TemporaryDirectory(prefix=WORKSHOP, dir=out) as folder:
            yield Path(folder)
    except OSError as error:
        raise ExportError(f"{out} cannot be written ({error}): make room or give another hydra.run.dir") from error


def _install(workshop: Path, out: Path, names: list[str], facts: dict[str, Any]) -> None:
    """Move the proven artefact to its place; export.json, which says what it is, goes first and comes last."""
    (out / FACTS).unlink(missing_ok=True)
    for name in names:
        with replacing(out / name) as temporary:
            (workshop / name).replace(temporary)
    write_text(out / FACTS, json.dumps(facts, indent=1))


def _facts(cfg: ExportConfig, source: Source, network: Network, proof: Proof) -> dict[str, Any]:
    """Return what export.json says beside the files: how to feed the artefact, and what was found in its proof."""
    seen = source.record.data or {}
    return {
        "format": cfg.format,
        "model": source.label,
        "input": {
            "name": INPUT,
            "shape": [BATCH, *network.image],
            "type": "float32",
            "pixel_range": [0, 1],
            "mean": seen.get("mean"),
            "std": seen.get("std"),
        },
        "output": None,
        "parity": {
            "images": proof.images,
            "of": "random" if cfg.test_images == 0 else "the test images",
            "difference": proof.difference,
            "relative": proof.relative,
            "allowed": TOLERANCE,
        },
        "accuracy": _accuracy(proof),
        "quantize": None,
        "low_rank": None,
        "shaping": None,
    }


def _accuracy(proof: Proof) -> dict[str, Any] | None:
    if not proof.labelled:
        return None
    return {"test/acc": proof.accuracy, "test/acc_before": proof.accuracy_before, "n_test": proof.labelled}


def _files(paths: list[Path], file_format: ModuleType) -> dict[str, Any]:
    """Return what export.json says of the files, and of what wrote them."""
    contents = {path.name: path.read_bytes() for path in paths}
    packages = {name: version(name) for name in file_format.PACKAGES}
    return {
        "opset": getattr(file_format, "OPSET", None),
        "files": {n: {"bytes": len(c), "sha256": hashlib.sha256(c).hexdigest()} for n, c in contents.items()},
        "size_bytes": sum(map(len, contents.values())),
        "versions": versions() | packages,
    }
