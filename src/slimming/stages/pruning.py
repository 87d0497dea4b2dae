"""Pruning: from a checkpoint to a thin network, calibrated, with what it costs and gives."""

import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn

from slimming import checkpoint
from slimming.channels import criteria, surgery
from slimming.channels.calibrate import calibrate
from slimming.channels.cost import Cost, widths
from slimming.channels.graph import ChannelGraph
from slimming.channels.latency import Latency
from slimming.channels.options import MEASURED, PlanOptions
from slimming.channels.plan import PruningPlan
from slimming.channels.trace import trace
from slimming.config import PruneConfig, criterion_name, plain
from slimming.data import ImageData
from slimming.errors import RunDirectoryError
from slimming.files import write_text
from slimming.records import Result
from slimming.report import figures
from slimming.stages.building import build, data_label, dtype_of, try_model
from slimming.stages.latency_budget import check as check_latency
from slimming.stages.latency_budget import latency_budget
from slimming.stages.latency_budget import text as latency_text
from slimming.stages.measuring import latencies, scores, weight_bytes
from slimming.stages.precision import of_record, settled, warn_of_emulation
from slimming.stages.pruning_text import inspection, table
from slimming.stages.recording import OngoingStage, quiet, recorded, relative
from slimming.stages.repairing import repaired
from slimming.stages.restoring import left_in_training, planned_first
from slimming.stages.resuming import LAST
from slimming.stages.scoring import scoring_batches
from slimming.stages.sources import DataNeed, Source, load_source
from slimming.stages.tasks import Task
from slimming.training.recorder import BINS, histogram

PRUNED = "pruned.ckpt"
SILENT = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False, "logger": False}


def prune(cfg: PruneConfig, out: Path) -> float:
    """Prune a checkpoint's network; leave pruned.ckpt, plan.json, result.json, widths.png and gammas.png in `out`.

    Returns:
        The test accuracy (of a detector mAP@0.5) of the thin network, in [0, 1]; nan if it was not tested.

    Raises:
        SlimmingError: anything that the user can mend; result.json then says `failed`.
    """
    if cfg.inspect:
        with quiet():
            source, _ = load_source(cfg, None)
            print(inspection(trace(source.model, source.example)))
        return math.nan
    begun = Result("prune", "pruned", cfg.seed, relative(cfg.checkpoint, out), plain(cfg))
    with recorded(out, begun, cfg.logger, cfg.checkpoint) as run:
        cfg = replace(cfg, trainer=settled(cfg.trainer))
        run.result.config = plain(cfg)
        for name, what in ((PRUNED, "pruned network"), (LAST, "run")):
            if (out / name).exists():
                raise RunDirectoryError(f"{out} holds a {what} already: give another hydra.run.dir")
        task = _prune(cfg, run)
    return run.result.metrics.get(f"test/{task.score}", math.nan)


def _prune(cfg: PruneConfig, run: OngoingStage) -> Task:
    out, result = run.out, run.result
    criterion = make_criterion(cfg)
    source, data = load_source(cfg, _data_need(cfg))
    trainer: pl.Trainer = build("trainer", _trainer(cfg, source), default_root_dir=str(out))
    dense_costs = try_model(source.model, source.example)
    graph = trace(source.model, source.example)
    left = left_in_training(graph) if source.shrunk else None
    with latency_budget(cfg, source, graph) as budget:
        plan = _planned(cfg, graph, budget.criterion if budget else criterion, data, trainer, left)
        if budget:
            result.details["latency"] = budget.facts(plan)
    thin = surgery.prune(source.model, plan)
    result.model, result.data = source.label, data_label(source.training["data"])
    result.details["task"] = source.task.name
    _describe(result, cfg, graph, plan, thin, (dense_costs, try_model(thin, source.example)))
    print(f"{source.label} of {cfg.checkpoint}\n  run directory: {out}")
    if cfg.test or cfg.calibrate.batches or cfg.repair:
        warn_of_emulation(print, trainer)
    print(table(result, plan))
    if "latency" in result.details:
        print(latency_text(result.details["latency"]))
    if data is not None:
        thin = _tested_and_corrected(cfg, source, thin, plan, data, trainer, result)
        source.task.draw({"before pruning": source.model, "pruned": thin}, data, out)
    if cfg.latency_batch:
        images = source.example.expand(cfg.latency_batch, -1, -1, -1).contiguous()
        pair = {"before": source.model, "after": thin}
        times = latencies(pair, images, trainer, bool(source.training.get("channels_last")))
        result.details["latency_ms"] = times
        print(f"latency of {times['batch']} images ({times['device']}, {times['precision']}): ", end="")
        print(f"{times['before']:.1f} -> {times['after']:.1f} ms (medians of 15, taking turns)")
    _leave(cfg, out, source, thin, plan, result)
    _ = run.loggers  # opened now that the pruning has succeeded; they get what it left
    return source.task


def _data_need(cfg: PruneConfig) -> DataNeed | None:
    measured = cfg.score in MEASURED
    if not (cfg.test or cfg.calibrate.batches or cfg.repair or measured):
        return None
    needs, without = "calibration and accuracy need", "calibrate.batches=0 test=false"
    if cfg.repair:
        needs, without = f"repair, {needs}", f"repair=false {without}"
    if measured:
        needs, without = f"score={cfg.score}, {needs}", f"score=gamma {without}"
    return DataNeed(needs, without)


def _planned(
    cfg: PruneConfig,
    graph: ChannelGraph,
    criterion: criteria.Criterion | None,
    data: ImageData | None,
    trainer: pl.Trainer,
    left: torch.Tensor | None,
) -> PruningPlan:
    """Make the plan; a score that is measured is measured on the trainer's device.

    Args:
        left: (all gammas,) bool, those that have left the network in training; None: none has.
    """
    assert criterion is not None
    options = {f.name: getattr(cfg, f.name) for f in fields(PlanOptions)}
    if isinstance(criterion, Latency):
        options["round_to"] = criterion.step
    device = trainer.strategy.root_device
    batches = scoring_batches(cfg.score, data, device, dtype_of(graph.model))
    if batches:
        graph.model.to(device)
    if left is None:
        plan = graph.plan(criterion, seed=cfg.seed, batches=batches, **options)
    else:
        plan = planned_first(graph, criterion, graph.scores(cfg.score, cfg.seed, batches), left, options)
    graph.model.cpu()
    return plan


def make_criterion(cfg: PruneConfig) -> criteria.Criterion | None:
    """Build the criterion that the values ask for, None for a latency, whose table is needed first.

    Raises:
        ConfigError: a value out of range, or a runtime that is not installed.
    """
    if cfg.budget.latency is not None:
        check_latency(cfg)
        return None
    return {
        "global": lambda: criteria.GlobalRatio(cfg.ratio, cfg.convention),
        "per_layer": lambda: criteria.PerLayerRatio(cfg.ratio),
        "threshold": lambda: criteria.Threshold(cfg.threshold),
        "optimal": lambda: criteria.OptimalThreshold(cfg.delta),
        "budget": lambda: criteria.Budget(cfg.budget.macs, cfg.budget.params),
    }[criterion_name(cfg)]()


def _trainer(cfg: PruneConfig, source: Source) -> dict[str, Any]:
    """Return the Trainer's values; the precision, and nothing else, is the training's unless given."""
    precision = cfg.trainer.get("precision")
    if precision is None:
        precision = of_record(source.record)
    return SILENT | cfg.trainer | {"precision": precision}


# --- accuracy ---------------------------------------------------------------------------------------------------------


def _tested_and_corrected(
    cfg: PruneConfig,
    source: Source,
    thin: nn.Module,
    plan: PruningPlan,
    data: ImageData,
    trainer: pl.Trainer,
    result: Result,
) -> nn.Module:
    """Repair and calibrate the thin network; add to `result` the accuracies before pruning, before that and in the end."""
    if cfg.test:
        for suffix, model in (("_before", source.model), ("_pruned", thin)):
            found, result.details["n_test"] = scores(source.task, trainer, model, data)
            result.metrics |= {key + suffix: value for key, value in found.items()}
    pruned = {k.removesuffix("_pruned"): v for k, v in result.metrics.items() if k.endswith("_pruned")}
    corrected = []
    if cfg.repair:
        thin = repaired(cfg.repair, (source.model, thin), plan, data, trainer, result)
        corrected.append(f"repaired on {result.details['repair']['images']} images")
    if cfg.calibrate.batches:
        thin = _calibrated(cfg, thin, data, trainer)
        corrected.append(f"calibrated on {cfg.calibrate.batches} batches")
    if cfg.test:
        result.metrics |= scores(source.task, trainer, thin, data)[0] if corrected else pruned
    key = f"test/{source.task.score}"
    if key in result.metrics:  # not where testing is limited to no batch
        before, uncorrected, final = (result.metrics[key + suffix] for suffix in ("_before", "_pruned", ""))
        line = f"test {source.task.called}: {before:.2%} before pruning -> {uncorrected:.2%} before calibration"
        print(line + f" -> {final:.2%} {' and '.join(corrected)}" * bool(corrected))
    return thin


def _calibrated(cfg: PruneConfig, thin: nn.Module, data: ImageData, trainer: pl.Trainer) -> nn.Module:
    device = trainer.strategy.root_device
    batches = (b.to(dtype_of(thin)) for b in data.training_batches(cfg.calibrate.batches, device))
    with trainer.precision_plugin.forward_context():
        return calibrate(thin.to(device), batches).cpu()


# --- what is left ------------------------------------------------------------------------------------------------------


def _describe(
    result: Result, cfg: PruneConfig, graph: ChannelGraph, plan: PruningPlan, thin: nn.Module, costs: tuple[Cost, Cost]
) -> None:
    """Add to `result` what went, and what the dense and the thin network cost."""
    dense_costs, thin_costs = costs
    result.cost = thin_costs.record()
    result.details |= {
        "cost_before": dense_costs.record(),
        "activation_bytes_before": dense_costs.activation_bytes,
        "activation_bytes": thin_costs.activation_bytes,
        "size_bytes_before": weight_bytes(graph.model),
        "size_bytes": weight_bytes(thin),
        "widths_before": widths(graph.model),
        "widths": widths(thin),
        "layers": _layers(graph.model, thin, costs),
        "ratio": {"asked": cfg.ratio and round(cfg.ratio, 9), "got": plan.got["ratio"]},
        "criterion": {k: round(v, 9) if isinstance(v, float) else v for k, v in plan.asked.items()},
        "ties": cfg.ties,
        "score": cfg.score,
        "plan": plan.got,
        "gammas": _gammas(cfg, graph, plan),
    }


def _layers(dense: nn.Module, thin: nn.Module, costs: tuple[Cost, Cost]) -> list[dict[str, Any]]:
    """Return channels, parameters and MACs of every layer, each [before, after]."""
    before, after = dict(dense.named_modules()), dict(thin.named_modules())
    return [
        {
            "name": name,
            "channels": [_channels(before[name]), _channels(after[name])],
            "params": [c.layer_params.get(name, 0) for c in costs],
            "macs": [c.layers.get(name, 0) for c in costs],
        }
        for name in costs[0].layers
        if name in before
    ]


def _channels(layer: nn.Module) -> int | None:
    return getattr(layer, "out_channels", getattr(layer, "out_features", None))


def _gammas(cfg: PruneConfig, graph: ChannelGraph, plan: PruningPlan) -> dict[str, Any]:
    """Return the histograms of |gamma| of the channels that stayed and went, and the threshold between them if there is one."""
    gone = torch.zeros(graph.count, dtype=torch.bool)
    for name, kept in plan.keep.items():
        gone[graph.norms[name].all] = True
        gone[graph.norms[name].start + torch.tensor(kept)] = False
    gammas = graph.scores("gamma")
    by_gamma = cfg.score == "gamma" and cfg.per == "channel" and cfg.budget.latency is None
    by_gamma = by_gamma and cfg.ties != "aligned"  # which compares means
    common = by_gamma and criterion_name(cfg) in ("global", "threshold", "budget")
    return {
        "edges": BINS.tolist(),
        "kept": histogram(gammas[~gone].float()),
        "removed": histogram(gammas[gone].float()),
        "threshold": plan.got["highest_score"] if common else None,
    }


def _leave(cfg: PruneConfig, out: Path, source: Source, thin: nn.Module, plan: PruningPlan, result: Result) -> None:
    """Write the plan, the figures and, last of all, the checkpoint."""
    write_text(out / "plan.json", plan.to_json())
    details = result.details
    figures.widths(details["widths_before"], details["widths"], out / "widths.png")
    g = details["gammas"]
    figures.split_gammas(g["kept"], g["removed"], g["edges"], g["threshold"], out / "gammas.png")
    plans = [*source.record.plans, plan.to_dict()]
    record = replace(source.record, plans=plans, metrics=result.metrics, parent=relative(cfg.checkpoint, out))
    checkpoint.write_network(thin, record, out / PRUNED)
