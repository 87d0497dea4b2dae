"""Pruning: from a checkpoint to a thin network, calibrated, with what it costs and gives."""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn

from slimming import checkpoint, ports
from slimming.channels import criteria, surgery
from slimming.channels.calibrate import calibrate
from slimming.channels.cost import Cost, latency_ms, widths
from slimming.channels.graph import ChannelGraph
from slimming.channels.plan import PruningPlan
from slimming.channels.trace import trace
from slimming.config import PruneConfig, criterion_name, plain
from slimming.data import ImageData
from slimming.errors import ConfigError, DataError, RunDirectoryError
from slimming.files import write_text
from slimming.report import figures
from slimming.stages.common import (
    accuracies,
    build,
    build_data,
    data_label,
    dtype_of,
    inherit,
    model_label,
    model_spec,
    quiet,
    recorded,
    relative,
    try_model,
    uncounted,
    weight_bytes,
)
from slimming.stages.precision import of_record, settled, warn_of_emulation
from slimming.stages.training import LAST
from slimming.training.recorder import BINS, histogram
from slimming.untrusted import need

PRUNED = "pruned.ckpt"


@dataclass
class Source:
    """The network to prune, in eval mode on the CPU, and the record that it came with."""

    model: nn.Module
    record: dict[str, Any]

    @property
    def label(self) -> str:
        return model_label(self.record["model"], self.model)


def prune(cfg: PruneConfig, out: Path) -> float:
    """Prune a checkpoint's network; leave pruned.ckpt, plan.json, result.json, widths.png and gammas.png in `out`.

    Returns:
        The test accuracy of the thin network, in [0, 1]; nan if it was not tested.

    Raises:
        SlimmingError: anything that the user can mend; result.json then says `failed`.
    """
    if cfg.inspect:
        with quiet():
            source, _ = load_source(cfg)
            print(_inspection(trace(source.model, _example(source))))
        return math.nan
    result = {"stage": "prune", "role": "pruned", "seed": cfg.seed}
    result |= {"parent": relative(cfg.checkpoint, out), "config": plain(cfg)}
    with recorded(out, result) as result:
        cfg = replace(cfg, trainer=settled(cfg.trainer))
        result["config"] = plain(cfg)
        for name, what in ((PRUNED, "pruned network"), (LAST, "run")):
            if (out / name).exists():
                raise RunDirectoryError(f"{out} holds a {what} already: give another hydra.run.dir")
        result |= _prune(cfg, out)
    return result["metrics"].get("test/acc", math.nan)


def _prune(cfg: PruneConfig, out: Path) -> dict[str, Any]:
    criterion = make_criterion(cfg)
    source, data = load_source(cfg)
    trainer: pl.Trainer = build("trainer", _trainer(cfg, source), default_root_dir=str(out))
    example = _example(source)
    costs = try_model(source.model, example)
    graph = trace(source.model, example)
    options = ("ties", "min_channels", "max_layer_ratio", "round_to", "ignore", "reduce", "score", "seed")
    plan = graph.plan(criterion, **{k: getattr(cfg, k) for k in options})
    thin = surgery.prune(source.model, plan)
    thin_costs = try_model(thin, example)
    result: dict[str, Any] = {"model": source.label, "data": data_label(source.record["config"]["data"])}
    result |= {"metrics": {}} | _describe(graph, plan, thin, cfg, costs, thin_costs)
    print(f"{source.label} of {cfg.checkpoint}\n  run directory: {out}")
    if cfg.test or cfg.calibrate.batches:
        warn_of_emulation(print, trainer)
    print(_table(result, plan))
    if not plan.keep:
        print("nothing is removed: no channel meets the criterion, or the guards put all back")
    if cfg.test:
        result["metrics"], result["n_test"] = _test_uncalibrated(source, thin, data, trainer)
    if cfg.calibrate.batches:
        thin = _calibrated(cfg, thin, data, trainer)
    if cfg.test:
        result["metrics"] |= _test_finally(cfg, thin, data, trainer, result["metrics"])
    if cfg.latency_batch:
        result["latency_ms"] = _latency(cfg.latency_batch, source, thin, example, trainer)
    source.record["parent"] = relative(cfg.checkpoint, out)
    _write(out, source, thin, plan, result)
    return result


def make_criterion(cfg: PruneConfig) -> criteria.Criterion:
    """Build the criterion that the values ask for; ConfigError for a value out of range."""
    return {
        "global": lambda: criteria.GlobalRatio(cfg.ratio, cfg.convention),
        "per_layer": lambda: criteria.PerLayerRatio(cfg.ratio),
        "threshold": lambda: criteria.Threshold(cfg.threshold),
        "optimal": lambda: criteria.OptimalThreshold(cfg.delta),
        "budget": lambda: criteria.Budget(cfg.budget.macs, cfg.budget.params),
    }[criterion_name(cfg)]()


# --- where it comes from ----------------------------------------------------------------------------------------------


def load_source(cfg: PruneConfig) -> tuple[Source, ImageData | None]:
    """Load the network, and its data if calibration or a test will need them.

    Raises:
        CheckpointError: no checkpoint of ours nor of a known port.
        DataError: the data are not there.
    """
    weights = ports.read(cfg.checkpoint)
    content = None if weights is not None else checkpoint.read(cfg.checkpoint)
    before = content["slimming"] if content else {"config": {}, "plans": []}
    if content:
        need(before, cfg.checkpoint, "config", "data")
    needed = not cfg.inspect and (cfg.test or cfg.calibrate.batches > 0)
    node = inherit("data", cfg.data, before["config"].get("data"))
    data = _load_data(node, weights is not None) if needed else None
    heads = {k: before["data"][k] for k in ("num_classes", "in_channels")} if content else ports.heads(weights)
    if data and data.num_classes != heads["num_classes"]:
        raise ConfigError(
            f"the data have {data.num_classes} classes, {cfg.checkpoint} was trained for {heads['num_classes']}"
        )
    given = build("model", cfg.model, **heads) if cfg.model.get("_target_") else None
    record = before | {"format": checkpoint.FORMAT, "stage": "prune", "config": before["config"] | {"data": node}}
    if data:
        record["data"] = data.statistics()
    if content:
        return Source(checkpoint.rebuild(content, cfg.checkpoint, given), record), data
    if given is None:
        raise ConfigError(
            f"{cfg.checkpoint} is of a public PyTorch port and does not name its network: "
            "give model=vgg19, model=preresnet164, model=densenet40 (ports: model.init_channels=24) ..."
        )
    record.setdefault("data", heads | {"image_size": 32})
    model, plans = ports.convert(weights, given, torch.zeros(1, heads["in_channels"], 32, 32), cfg.checkpoint)
    record |= {"model": model_spec(cfg.model, heads), "plans": [p.to_dict() for p in plans]}
    return Source(model, record), data


def _load_data(node: dict, port: bool) -> ImageData:
    advice = "calibration and accuracy need the data: give {}, or go without by calibrate.batches=0 test=false"
    if not node.get("_target_"):
        raise DataError(advice.format("data=cifar10 or another" if port else "data=<name>"))
    try:
        data = build_data(node)
        data.prepare_data()
        data.setup()
    except DataError as error:
        raise DataError(f"{error}; {advice.format('data.root=<folder>')}") from error
    return data


def _example(source: Source) -> torch.Tensor:
    seen = source.record["data"]
    return torch.zeros(1, seen["in_channels"], seen["image_size"], seen["image_size"], dtype=dtype_of(source.model))


def _trainer(cfg: PruneConfig, source: Source) -> dict:
    """Return the Trainer's values; the precision, and nothing else, is the training's unless given."""
    precision = cfg.trainer.get("precision")
    if precision is None:
        precision = of_record(source.record)
    return cfg.trainer | {"precision": precision}


# --- what it gives ----------------------------------------------------------------------------------------------------


def _test_uncalibrated(
    source: Source, thin: nn.Module, data: ImageData, trainer: pl.Trainer
) -> tuple[dict[str, float], int]:
    """Return the accuracies of the dense and of the thin network, and on how many test images."""
    metrics, count = {}, 0
    for suffix, model in (("_before", source.model), ("_pruned", thin)):
        found, count = accuracies(trainer, model, data)
        metrics |= {key + suffix: value for key, value in found.items()}
    return metrics, count


def _calibrated(cfg: PruneConfig, thin: nn.Module, data: ImageData, trainer: pl.Trainer) -> nn.Module:
    device = trainer.strategy.root_device
    batches = (b.to(dtype_of(thin)) for b in data.training_batches(cfg.calibrate.batches, device))
    with trainer.precision_plugin.forward_context():
        return calibrate(thin.to(device), batches).cpu()


def _test_finally(
    cfg: PruneConfig, thin: nn.Module, data: ImageData, trainer: pl.Trainer, metrics: dict[str, float]
) -> dict[str, float]:
    """Return the accuracies of what is kept: measured again only if calibration has changed it."""
    pruned = {k.removesuffix("_pruned"): v for k, v in metrics.items() if k.endswith("_pruned")}
    final = accuracies(trainer, thin, data)[0] if cfg.calibrate.batches else pruned
    if not final:  # limited to no test batch at all
        return {}
    path = [f"{metrics['test/acc_before']:.2%} before", f"{metrics['test/acc_pruned']:.2%} right after pruning"]
    if cfg.calibrate.batches:
        path.append(f"{final['test/acc']:.2%} calibrated on {cfg.calibrate.batches} batches")
    print(f"test accuracy: {' -> '.join(path)}")
    return final


def _latency(batch: int, source: Source, thin: nn.Module, example: torch.Tensor, trainer: pl.Trainer) -> dict[str, Any]:
    device = trainer.strategy.root_device
    images = example.expand(batch, *example.shape[1:]).contiguous().to(device)
    if source.record["config"].get("channels_last"):
        images = images.contiguous(memory_format=torch.channels_last)
    plugin = trainer.precision_plugin

    def runner(model: nn.Module):
        model = model.to(device).eval()
        if source.record["config"].get("channels_last"):
            model.to(memory_format=torch.channels_last)
        return lambda: model(images)

    with plugin.forward_context():
        times = latency_ms({"before": runner(source.model), "after": runner(thin)}, device)
    source.model.cpu(), thin.cpu()
    where = f"{device.type}, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type
    print(f"latency of {batch} images ({where}, {trainer.precision}): ", end="")
    print(f"{times['before']:.1f} -> {times['after']:.1f} ms (medians of 15, taking turns)")
    return times | {"batch": batch, "device": where, "precision": trainer.precision}


def _describe(
    graph: ChannelGraph, plan: PruningPlan, thin: nn.Module, cfg: PruneConfig, costs: Cost, thin_costs: Cost
) -> dict[str, Any]:
    """Return what result.json says of the networks and the plan."""
    gone = torch.zeros(graph.count, dtype=torch.bool)
    for name, kept in plan.keep.items():
        gone[graph.norms[name].all] = True
        gone[graph.norms[name].start + torch.tensor(kept)] = False
    gammas = graph.scores("gamma")
    common = cfg.score == "gamma" and criterion_name(cfg) in ("global", "threshold", "budget")
    before, after = dict(graph.model.named_modules()), dict(thin.named_modules())
    return {
        "cost_before": costs.record(),
        "cost": thin_costs.record(),
        "activation_bytes_before": costs.activation_bytes,
        "activation_bytes": thin_costs.activation_bytes,
        "size_bytes_before": weight_bytes(graph.model),
        "size_bytes": weight_bytes(thin),
        "widths_before": widths(graph.model),
        "widths": widths(thin),
        "layers": [
            {
                "name": name,
                "channels": [_channels(before[name]), _channels(after[name])],
                "params": [c.layer_params.get(name, 0) for c in (costs, thin_costs)],
                "macs": [c.layers.get(name, 0) for c in (costs, thin_costs)],
            }
            for name in costs.layers
            if name in before
        ],
        "ratio": {"asked": cfg.ratio and round(cfg.ratio, 9), "got": plan.got["ratio"]},
        "criterion": {k: round(v, 9) if isinstance(v, float) else v for k, v in plan.asked.items()},
        "ties": cfg.ties,
        "score": cfg.score,
        "plan": plan.got,
        "gammas": {
            "edges": BINS.tolist(),
            "kept": histogram(gammas[~gone].float()),
            "removed": histogram(gammas[gone].float()),
            "threshold": plan.got["highest_score"] if common else None,
        },
    }


def _channels(layer: nn.Module) -> int | None:
    return getattr(layer, "out_channels", getattr(layer, "out_features", None))


def _write(out: Path, source: Source, thin: nn.Module, plan: PruningPlan, result: dict[str, Any]) -> None:
    write_text(out / "plan.json", plan.to_json())
    figures.widths(result["widths_before"], result["widths"], out / "widths.png")
    g = result["gammas"]
    figures.split_gammas(g["kept"], g["removed"], g["edges"], g["threshold"], out / "gammas.png")
    record = source.record | {"plans": [*source.record["plans"], plan.to_dict()], "metrics": result["metrics"]}
    content = {
        "state_dict": {checkpoint.PREFIX + k: v for k, v in thin.state_dict().items()},
        "slimming": record,
        "epoch": 0,
        "global_step": 0,
        "pytorch-lightning_version": pl.__version__,
    }
    checkpoint.save(content, out / PRUNED)


# --- tables for people ------------------------------------------------------------------------------------------------


def _table(result: dict[str, Any], plan: PruningPlan) -> str:
    lines = [f"  {'layer':34} {'channels':>13} {'parameters':>23} {'MACs (M)':>17}"]
    for layer in result["layers"]:
        channels, params = (f"{a:,} -> {b:,}" for a, b in (layer["channels"], layer["params"]))
        a, b = (m / 1e6 for m in layer["macs"])
        lines.append(f"  {layer['name']:34} {channels:>13} {params:>23} {f'{a:.2f} -> {b:.2f}':>17}")
    before, after = result["cost_before"], result["cost"]
    got, asked = plan.got, result["ratio"]["asked"]
    wanted = (
        f" (asked {asked:.1%})" if asked is not None else f" ({', '.join(f'{k} {v}' for k, v in plan.asked.items())})"
    )
    lines += [
        f"channels: {got['removed']:,} of {got['candidates']:,} candidates removed, {got['ratio']:.1%}{wanted}; "
        f"{got['restored']} put back by guards, {got['dead']} more went because nothing needed them",
        f"parameters: {before['num_params']:,} -> {after['num_params']:,} "
        f"(-{1 - after['num_params'] / before['num_params']:.1%}); "
        f"MACs: {before['macs'] / 1e6:,.1f}M -> {after['macs'] / 1e6:,.1f}M (-{1 - after['macs'] / before['macs']:.1%})"
        f"{uncounted(before)}",
        f"activations of one image: {result['activation_bytes_before'] / 1e3:,.0f} -> "
        f"{result['activation_bytes'] / 1e3:,.0f} kB; weights: {result['size_bytes_before'] / 1e6:.2f} -> "
        f"{result['size_bytes'] / 1e6:.2f} MB",
        f"widths: {json.dumps(result['widths'])}",
    ]
    return "\n".join(lines)


def _inspection(graph: ChannelGraph) -> str:
    """Return what could go, and the quantiles of |gamma| over all candidates."""
    gammas = graph.scores("gamma")
    lines = [graph.describe(), "", "|gamma| at ratio:  (what a global ratio would take as its threshold)"]
    for ties in ("together", "apart"):
        free = gammas[graph.candidates(ties)]
        if len(free):
            marks = [0.1, 0.3, 0.5, 0.7, 0.9]
            values = torch.quantile(free, torch.tensor(marks, dtype=free.dtype)).tolist()
            shown = "  ".join(f"{mark}: {value:.2g}" for mark, value in zip(marks, values, strict=True))
            lines.append(f"  ties={ties} ({len(free):,} candidates)  {shown}")
    return "\n".join(lines)
