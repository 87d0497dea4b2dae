"""What a run leaves in writing: the "slimming" entry of a checkpoint, result.json, and which keys of a configuration matter."""

import contextlib
import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slimming.errors import CheckpointError
from slimming.files import write_text

RECORD_FORMAT = 1
RESULT_FORMAT = 1
RESULT = "result.json"
ROLES = ("baseline", "sparse", "pruned", "finetuned", "scratch")

# Everything else matters. These say where things lie, how a run is shown, or how fast it goes; not what comes out of it.
IRRELEVANT = {
    *("resume", "checkpoint", "init_from", "logger", "callbacks", "latency_batch"),
    *("data.root", "data.cache_dir", "data.download", "data.num_workers", "data.eval_batch_size"),
    *("trainer.enable_progress_bar", "trainer.enable_model_summary", "trainer.profiler"),
}
IMPLIED = {"penalty.name": "l1", "task": "classification"}  # what configurations of versions without the key meant
IMPLIED |= {  # what they wrote where null stands now
    f"{at}distill.{key}": value for at in ("", "finetune.") for key, value in (("temperature", 4.0), ("alpha", 0.9))
}
WHETHER = {"distill.teacher", "finetune.distill.teacher"}  # paths of which it matters only whether there is one


@dataclass(frozen=True)
class Score:
    """What the networks of a task are judged by: `key` in metrics (test/<key>, in [0, 1]), and what people call it.

    Attributes:
        loss: what they are trained on.
    """

    key: str
    called: str
    loss: str


SCORES = {  # by task
    "classification": Score("acc", "accuracy", "cross-entropy"),
    "detection": Score("map50", "mAP@0.5", "loss of the detector"),
}


@dataclass
class Record:
    """The "slimming" entry of a checkpoint: plain data that says what network it holds and where that comes from.

    Attributes:
        model: {name, arguments} of the dense network in `slimming.models`; None: not registered there.
        plans: the pruning plans that led from it to this network, in order, as dicts.
        low_rank: {layer: {kind, ranks}} of the layers that were split after the last plan; None: none were.
        stage: that wrote the file: train, prune or finetune; None: `slimming.save`.
        config: of the training (a pruning keeps that of its checkpoint); None: unknown.
        data: {num_classes, in_channels, image_size, mean, std ...} of the data; None: unknown.
        metrics: of this network, such as test/acc in [0, 1].
        parent: path of the checkpoint that a pruning began with, as seen from this one's folder.
        format: of the entry.
    """

    model: dict[str, Any] | None
    plans: list[dict] = field(default_factory=list)
    stage: str | None = None
    config: dict[str, Any] | None = None
    data: dict[str, Any] | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    parent: str | None = None
    format: int = RECORD_FORMAT
    low_rank: dict[str, dict[str, Any]] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, without what is unknown."""
        optional = ("stage", "config", "data", "parent", "low_rank")
        found = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {key: value for key, value in found.items() if value is not None or key not in optional}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Record":
        """Rebuild a record from checked plain data; keys of later versions are dropped."""
        return cls(**{f.name: data[f.name] for f in dataclasses.fields(cls) if f.name in data})

    def need(self, path: Any, *keys: str) -> "Record":
        """Return the record.

        Raises:
            CheckpointError: one of `keys` is unknown, so that no stage can work on the file.
        """
        for key in keys:
            if getattr(self, key) is None:
                raise CheckpointError(f"{path} lacks {key!r} in its 'slimming' record: it can be loaded, not worked on")
        return self

    @property
    def io_shape(self) -> dict[str, int]:
        """{num_classes, in_channels}: what a model factory is told of the data."""
        return {key: (self.data or {})[key] for key in ("num_classes", "in_channels")}


@dataclass
class Result:
    """result.json: what one stage was told, what it did, and what that cost.

    Attributes:
        stage, role: train, prune or finetune; and what its network is: one of ROLES.
        config: in full; `asked`: as it was given, where that differs (a fine-tuning takes the rest from its checkpoint).
        parent: the checkpoint that it began with, as seen from the run directory.
        model, data: their names.
        metrics: test/acc, train/loss ... of the last epoch; of a pruning test/acc_before (the dense network's),
            test/acc_pruned (before calibration) and test/acc, in [0, 1].
        cost: {num_params, macs} of the network that the stage leaves, for one image.
        details: everything else, by its key in the file: history, gammas, widths, layers, plan, latency_ms ...
        status: finished, or failed with an `error`.
    """

    stage: str
    role: str | None = None
    seed: int | None = None
    parent: str | None = None
    config: dict[str, Any] | None = None
    asked: dict[str, Any] | None = None
    model: str | None = None
    data: str | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    cost: dict[str, Any] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    wall_time_s: float | None = None
    status: str = "failed"
    error: str | None = None

    def write(self, folder: Path) -> None:
        """Write result.json whole or not at all."""
        found = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "details"}
        told = {key: value for key, value in found.items() if value is not None or key in ("error", "parent")}
        write_text(folder / RESULT, json.dumps({"format": RESULT_FORMAT} | told | self.details, indent=1))


def finished(folder: Path) -> dict[str, Any] | None:
    """Return the content of a folder's result.json if it is of a finished run, else None."""
    result = _read(folder)
    return result if result and result.get("status") == "finished" else None


def write_failure(folder: Path, stage: str, message: str, *, over: bool = True) -> None:
    """Write into result.json why a stage failed; the record of a finished run stays.

    Args:
        over: replace the cause that is recorded already (a rank's, say); else the first one stays.
    """
    before = _read(folder) or {}
    if before.get("status") == "finished" or (before and not over):
        return
    failure = {"format": RESULT_FORMAT, "stage": stage} | before | {"status": "failed", "error": message}
    with contextlib.suppress(OSError):  # the failure itself is what must be told
        write_text(folder / RESULT, json.dumps(failure, indent=1))


def _read(folder: Path) -> dict[str, Any] | None:
    with contextlib.suppress(OSError, ValueError):
        result = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        return result if isinstance(result, dict) else None
    return None


def what_matters(config: dict) -> dict[str, Any]:
    """Flatten a configuration to dotted keys: those that can change the result and are neither None nor implied."""
    flat = _flat(config, "")
    if flat.get("budget.latency") is not None:  # only a budget of latency depends on how it is timed
        flat["latency_batch"] = config.get("latency_batch")
    return {key: value for key, value in flat.items() if value not in (None, IMPLIED.get(key))}


def config_differences(before: dict, now: dict) -> str:
    """Say where two configurations differ in what matters to the result: `sparsity was 0.1, is 0.2; ...`, or ""."""
    a, b = (what_matters(json.loads(json.dumps(config))) for config in (before, now))  # tuples are lists in a file
    changed = [k for k in sorted(a | b) if a.get(k) != b.get(k)]
    return "; ".join(f"{k} was {a.get(k, IMPLIED.get(k))}, is {b.get(k, IMPLIED.get(k))}" for k in changed)


def _flat(config: dict, prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in config.items():
        key = f"{prefix}{name}"
        if key in IRRELEVANT:
            continue
        if isinstance(value, dict):
            flat |= _flat(value, f"{key}.")
        else:
            flat[key] = value is not None if key in WHETHER else value
    return flat
