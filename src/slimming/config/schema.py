"""Every option of the command line, declared once: type, default, meaning, and what is allowed.

The groups (model, data, optimizer ...) are open here: their values stand in configs/<group>/,
and the signature of their `_target_` is their schema.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from slimming.channels.options import PENALTY_NAMES, PenaltyOptions, PlanOptions
from slimming.options import option

Group = dict[str, Any]


@dataclass
class ShrinkConfig:
    """Letting channels go while the network trains. `shrink=true` stands for shrink.epochs=2, `shrink=false` for 0."""

    epochs: int = option(
        0,
        "a channel leaves the network once its gamma has stayed low for so many epochs, so that the training gets faster; 0: "
        "none leaves. shrink=true: 2",
        low=0,
        whole=True,
    )
    threshold: float = option(
        0.01, "|gamma| is low below this share of the largest", low=0, high=1, above=True, below=True
    )
    round_to: int = option(
        8,
        "kept channels of every BatchNorm are rounded up to a multiple of this, because convolutions of odd widths take longer",
        low=1,
        whole=True,
    )

    def __bool__(self) -> bool:
        return self.epochs > 0


@dataclass
class TrainOptions:
    """How a network is trained."""

    # Any: a number, or a word.
    sparsity: Any = option(
        1e-4,
        "lambda of the gamma penalty (paper, equation 1); 0 trains the baseline; auto: set during the training with SGD, so "
        "that target_ratio of the gammas end near zero",
        low=0,
        words=("auto",),
    )
    target_ratio: float | None = option(
        None,
        "of sparsity=auto: share of the gammas to bring below 1% of the largest; slim.py: null is the largest ratio",
        low=0,
        high=1,
        above=True,
        below=True,
    )
    penalty: PenaltyOptions = field(default_factory=PenaltyOptions)
    # Any: true and false may stand for a ShrinkConfig; in a checked configuration None says that it is off.
    shrink: Any = field(default_factory=ShrinkConfig)
    decay_batchnorm: bool = option(True, "weight decay also acts on gamma and beta, as in the paper")
    channels_last: bool = option(True, "memory layout (N, H, W, C): faster convolutions, same numbers up to rounding")
    compile: bool = option(False, "torch.compile the network")
    sync_batchnorm: bool = option(False, "BatchNorm statistics over all devices (GPUs)")
    seed: int = option(1, "of weights, order and augmentation", low=0, high=2**32 - 1, whole=True)
    resume: bool = option(False, "true: go on with the run in hydra.run.dir")
    logger: Group = field(default_factory=dict)
    callbacks: Group = field(default_factory=dict)


@dataclass
class TrainConfig(TrainOptions):
    """One training."""

    task: str = option(
        "classification",
        "classification: one class per image; detection: boxes, with model=yolov3, yolov3_tiny or torchvision_detection and "
        "data=boxes or scenes; judged by mean average precision",
        choices=("classification", "detection"),
    )
    model: Group = MISSING
    data: Group = MISSING
    optimizer: Group = MISSING
    scheduler: Group = MISSING
    trainer: Group = MISSING
    init_from: str | None = option(None, "a checkpoint whose weights to start from")


@dataclass
class BudgetConfig:
    """What may remain; one of the three."""

    macs: float | None = option(None, "share of the dense network's MACs that may remain", low=0, high=1, above=True)
    params: float | None = option(
        None, "share of the dense network's parameters that may remain", low=0, high=1, above=True
    )
    latency: float | None = option(
        None,
        "share of the dense network's latency that may remain in `runtime` on this machine, at latency_batch and "
        "latency_threads; measured, and met within 8%",
        low=0,
        high=1,
        above=True,
        below=True,
    )


@dataclass
class CalibrateConfig:
    """Calibration of the BatchNorm statistics after pruning."""

    batches: int | None = option(
        None,
        "training batches to re-estimate the BatchNorm statistics on; null: 100, none after a repair; 0: not at all, as in "
        "the paper's code",
        low=0,
        whole=True,
    )


@dataclass
class RepairConfig:
    """Repair of the pruned layers, without labels. `repair=true` stands for repair.images=2000, `repair=false` for 0."""

    images: int = option(
        0,
        "training images to refit the pruned layers on, by least squares, to what the dense layers give; 0: not at all. "
        "repair=true: 2000",
        low=0,
        whole=True,
    )
    ridge: float = option(
        1e-3, "how strongly the old weights hold in that fit, relative to the mean square of a layer's inputs", low=0
    )


@dataclass
class PruneOptions(PlanOptions):
    """What to remove, and what to do then."""

    criterion: str | None = option(
        None,
        "which channels go: global (default with ratio), per_layer (with ratio), threshold, budget, or optimal (with delta)",
        choices=("global", "per_layer", "threshold", "optimal", "budget"),
    )
    ratio: float | None = option(None, "share of the channels to remove", low=0, high=1, below=True)
    threshold: float | None = option(None, "remove the channels with |gamma| <= threshold", low=0)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    delta: float = option(
        1e-3,
        "criterion=optimal: share of every layer's squared gammas that may go (arXiv:2003.04566)",
        low=0,
        high=1,
    )
    convention: str = option(
        "exact",
        "exact: the ratio to the channel; reference: keep strictly above sort(|gamma|)[int(ratio * N)], as the reference "
        "implementations do",
        choices=("exact", "reference"),
    )
    # Any: true and false may stand for a RepairConfig; in a checked configuration None says that it is off.
    repair: Any = field(default_factory=RepairConfig)
    calibrate: CalibrateConfig = field(default_factory=CalibrateConfig)
    test: bool = option(True, "measure the accuracy before pruning, before calibration and after it")
    latency_batch: int = option(
        64, "images per forward pass when both networks are timed; 0: not timed", low=0, whole=True
    )
    runtime: str | None = option(
        None,
        "of budget.latency: the engine on this machine's CPU. torch: eager, float32; onnx: onnxruntime; openvino",
        choices=("torch", "onnx", "openvino"),
    )
    latency_threads: int | None = option(
        None, "of budget.latency: threads of a pass, at most the cores there are; null: 1", low=1, whole=True
    )


@dataclass
class PruneConfig(PruneOptions):
    """One pruning. The groups hold what was given; the rest is as in the checkpoint's training."""

    checkpoint: str | None = option(
        None, "the network to prune: last.ckpt, a pruned.ckpt, or a file of a reference implementation (with model=)"
    )
    seed: int = option(1, "of score=random", low=0, high=2**32 - 1, whole=True)
    inspect: bool = option(False, "true: print what could go and the statistics of the gammas; nothing is written")
    model: Group = field(default_factory=dict)
    data: Group = field(default_factory=dict)
    trainer: Group = field(default_factory=dict)
    logger: Group = field(default_factory=dict)


@dataclass
class DistillConfig:
    """Learning from a teacher."""

    teacher: str | None = option(None, "a checkpoint of any stage whose raw outputs to learn from; null: no teacher")
    temperature: float | None = option(
        None,
        "that softens the teacher's and the student's chances of the classes; null: 4, for a detector 1",
        low=0,
        above=True,
    )
    alpha: float | None = option(
        None,
        "weight of the teacher in the loss, that of the labels is 1 - alpha; null: 0.9, for a detector 0.5",
        low=0,
        high=1,
    )


@dataclass
class FinetunePenalty(PenaltyOptions):
    """Which penalty acts in a fine-tuning with sparsity > 0; a name that is given replaces the checkpoint's with its values."""

    name: str | None = option(  # type: ignore[assignment]
        None,
        "given as penalty=<name>; null: as in the checkpoint's training, with its layers and t where they are not given",
        choices=PENALTY_NAMES,
    )


@dataclass
class LowRankOption:
    """What may be split before a fine-tuning or an export."""

    low_rank: float | None = option(
        None,
        "split convolutions and linear layers into factors of low rank first: the share of their MACs that may remain",
        low=0,
        high=1,
        above=True,
    )


@dataclass
class FinetuneConfig(TrainOptions, LowRankOption):
    """One fine-tuning. The groups hold what was given; the rest is as in the checkpoint's training."""

    sparsity: Any = option(
        0.0, "lambda of the gamma penalty, or auto; > 0 prepares another pass of pruning", low=0, words=("auto",)
    )
    penalty: FinetunePenalty = field(default_factory=FinetunePenalty)
    decay_batchnorm: bool | None = option(None, "null: as in the checkpoint's training")
    channels_last: bool | None = option(None, "null: as in the checkpoint's training")
    seed: int | None = option(None, "null: as in the checkpoint's training", low=0, high=2**32 - 1, whole=True)
    checkpoint: str | None = option(None, "the network to train: a pruned.ckpt, or a checkpoint of any other stage")
    init: str = option(
        "weights",
        "weights: the checkpoint's; scratch: fresh weights for the same architecture",
        choices=("weights", "scratch"),
    )
    epochs_by: str = option(
        "epochs",
        "macs: train as many epochs as the dense network's compute buys, at most 4 times as many",
        choices=("epochs", "macs"),
    )
    optimizer_state: bool = option(
        False, "true: begin with the optimizer state of the training before the pruning, sliced as the weights were"
    )
    distill: DistillConfig = field(default_factory=DistillConfig)
    model: Group = field(default_factory=dict)
    data: Group = field(default_factory=dict)
    optimizer: Group = field(default_factory=dict)
    scheduler: Group = field(default_factory=dict)
    trainer: Group = field(default_factory=dict)


@dataclass
class TuneConfig:
    """The fine-tuning within slim.py."""

    max_epochs: int | None = option(None, "of the fine-tuning; null: as the sparse training", low=1, whole=True)
    lr: float | None = option(None, "where its learning rate starts; null: as the sparse training", low=0, above=True)
    distill: bool = option(False, "true: the sparse network is the teacher")
    scratch: bool = option(False, "true: also train the thin architecture from fresh weights")


@dataclass
class SlimConfig(TrainConfig, PruneOptions):
    """The whole pipeline: a training's values, a pruning's, and how often."""

    ratio: Any = option(
        None,
        "share of the channels to remove, or a list of shares: each is pruned and fine-tuned; null without "
        "another criterion: 0.5",
        low=0,
        high=1,
        below=True,
    )
    passes: int = option(
        1,
        "how often to train sparsely, prune and fine-tune, each time on the network that the last pass left (paper, table 4)",
        low=1,
        whole=True,
    )
    baseline: bool = option(False, "true: train the unpenalised network as well")
    finetune: TuneConfig = field(default_factory=TuneConfig)


@dataclass
class QuantizeConfig:
    """Quantisation of an export. `quantize=int8` sets quantize.to."""

    to: str | None = option(None, "int8, for format=onnx and openvino; null: stays float", choices=("int8",))
    max_drop: float | None = option(
        1.0,
        "points of accuracy that may be lost, on the validation split or else on held-out training images: layers go back to "
        "float, the most sensitive first, until it is met; null: all are quantised, unchecked",
        low=0,
    )
    batches: int = option(8, "training batches to see the ranges of all tensors on", low=1, whole=True)
    check_images: int = option(2000, "images to measure that drop on, at most", low=1, whole=True)
    reduce_range: bool | None = option(
        None, "true: weights in 7 bits, for CPUs without VNNI; null: as the CPU that quantises needs it"
    )
    symmetric: bool = option(False, "format=onnx: zero points of 0 in all tensors, as TensorRT wants them")


@dataclass
class ExportConfig(LowRankOption):
    """One export. The groups hold what was given; the rest is as in the checkpoint's training."""

    checkpoint: str | None = option(
        None, "the network to export: a checkpoint of any stage, or a file of a reference implementation (with model=)"
    )
    format: str = option(
        "onnx",
        "onnx: for onnxruntime, TensorRT and others; torch: a program of torch.export (.pt2); openvino: its IR (.xml and "
        ".bin); safetensors: the weights, and the architecture for `slimming`",
        choices=("onnx", "torch", "openvino", "safetensors"),
    )
    test_images: int | None = option(
        None,
        "test images, spread over all, to prove on that the artefact computes what the network computes, and to measure the "
        "accuracy of both on; null: all; 0: random images and no accuracy, for which no data are needed",
        low=0,
        whole=True,
    )
    seed: int = option(1, "of those random images", low=0, high=2**32 - 1, whole=True)
    shape: str | None = option(
        None,
        "auto: of networks that compute the same (zero channels up to multiples of 4, 8 or 16; BatchNorms that select, or read "
        "whole tensors) take the fastest in this format's engine here; all are written and timed, a minute or several; none: "
        "leave it as it is; null: auto for a pruned or split network in format=onnx and openvino, else none",
        choices=("auto", "none"),
    )
    shape_from: str | None = option(
        None, "export.json of an earlier export: take the shape that it records, without timing"
    )
    latency_batch: int = option(16, "images per pass in the timing of shapes", low=1, whole=True)
    latency_threads: int = option(1, "of that timing; at most the cores there are", low=1, whole=True)
    quantize: QuantizeConfig = field(default_factory=QuantizeConfig)
    overwrite: bool = option(False, "true: replace what an earlier export has left in hydra.run.dir")
    model: Group = field(default_factory=dict)
    data: Group = field(default_factory=dict)
    logger: Group = field(default_factory=dict)


@dataclass
class BenchConfig:
    """Latencies of several networks, side by side."""

    models: list[str] = option([], "the files to time: checkpoints (.ckpt), .onnx, .pt2, OpenVINO's .xml")
    batch: Any = option([1], "images per pass, a number or several: batch=1,64", low=1, whole=True)
    threads: Any = option(
        [1], "of one pass, a number or several: threads=1,2; at most the cores there are", low=1, whole=True
    )
    engines: list[str] | None = option(
        None,
        "among torch, compile (torch.compile), onnxruntime and openvino: every file is timed in those that read it, "
        "torch and compile .ckpt and .pt2, onnxruntime and openvino .onnx, openvino .xml; null: the first that does",
    )
    turns: int = option(
        15, "how often the networks take turns; the medians and quartiles are of these", low=3, whole=True
    )
    budget_s: float = option(
        20.0,
        "seconds per network, batch and number of threads; slow ones get fewer turns, but at least 3",
        low=0,
        above=True,
    )


@dataclass
class ReportConfig:
    """A report on the runs below a folder."""

    runs: str = option("runs", "the folder whose result.json files are reported, however deep they lie")
    out: str | None = option(None, "where report.html, report.md, report.csv and figures/ go; null: into that folder")


SCHEMAS = {
    "train": TrainConfig,
    "prune": PruneConfig,
    "finetune": FinetuneConfig,
    "slim": SlimConfig,
    "export": ExportConfig,
    "bench": BenchConfig,
    "report": ReportConfig,
}


def plain(config: Any) -> dict:
    """Return a configuration dataclass as plain dicts and lists."""
    return dataclasses.asdict(config)
