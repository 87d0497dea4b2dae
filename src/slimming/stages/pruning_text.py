"""What `prune.py` prints: the table of a pruning, and the inspection of what could go."""

import json
import math

import torch

from slimming.channels.criteria import GlobalRatio
from slimming.channels.graph import ChannelGraph
from slimming.channels.options import REDUCED
from slimming.channels.penalty import near_zero_share
from slimming.channels.plan import PruningPlan
from slimming.records import Result
from slimming.stages.measuring import uncounted

QUANTILES = (0.1, 0.3, 0.5, 0.7, 0.9)
RATIOS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)  # that the guide compares
MOST = 0.9  # near zero: there is nothing more to prepare


def table(result: Result, plan: PruningPlan) -> str:
    """Return a table of the layers, and below it what went in total."""
    lines = [f"  {'layer':34} {'channels':>13} {'parameters':>23} {'MACs (M)':>17}"]
    for layer in result.details["layers"]:
        channels, params = (f"{a:,} -> {b:,}" for a, b in (layer["channels"], layer["params"]))
        a, b = (m / 1e6 for m in layer["macs"])
        lines.append(f"  {layer['name']:34} {channels:>13} {params:>23} {f'{a:.2f} -> {b:.2f}':>17}")
    return "\n".join([*lines, *_summary(result, plan)])


def _summary(result: Result, plan: PruningPlan) -> list[str]:
    details, after, got = result.details, result.cost, plan.got
    before, asked = details["cost_before"], details["ratio"]["asked"]
    wanted = f"asked {asked:.1%}" if asked is not None else ", ".join(f"{k} {v}" for k, v in plan.asked.items())
    if asked is not None and "ties" in plan.asked:
        wanted += f", ties {plan.asked['ties']}"
    change = {key: after[key] / before[key] - 1 for key in ("num_params", "macs")}
    lines = [
        f"channels: {got['removed']:,} of {got['candidates']:,} candidates removed, {got['ratio']:.1%} ({wanted}); "
        f"{got['restored']} restored by constraints, {got['dead']} more removed as dead",
        f"parameters: {before['num_params']:,} -> {after['num_params']:,} ({change['num_params']:+.1%}); "
        f"MACs: {before['macs'] / 1e6:,.1f}M -> {after['macs'] / 1e6:,.1f}M ({change['macs']:+.1%}){uncounted(before)}",
        f"activations of one image: {details['activation_bytes_before'] / 1e3:,.0f} -> "
        f"{details['activation_bytes'] / 1e3:,.0f} kB; "
        f"weights: {details['size_bytes_before'] / 1e6:.2f} -> {details['size_bytes'] / 1e6:.2f} MB",
        f"widths: {json.dumps(details['widths'])}",
    ]
    if not plan.keep:
        lines.append("nothing is removed: no channel meets the criterion, or the constraints restored all")
    return lines


def inspection(graph: ChannelGraph) -> str:
    """Return what could go, and the quantiles of |gamma| over all candidates."""
    gammas = graph.scores("gamma")
    lines = [graph.describe(), "", "|gamma| at ratio:  (what a global ratio would take as its threshold)"]
    for ties in REDUCED:
        free = gammas[graph.candidates(ties)]
        if len(free):
            values = torch.quantile(free, torch.tensor(QUANTILES, dtype=free.dtype)).tolist()
            shown = "  ".join(f"{mark}: {value:.2g}" for mark, value in zip(QUANTILES, values, strict=True))
            lines.append(f"  ties={ties} ({len(free):,} candidates)  {shown}")
    return "\n".join([*lines, *_guide(graph)])


def _guide(graph: ChannelGraph) -> list[str]:
    """Return what a global ratio would take, ratio by ratio, and which one to ask for.

    The advice is what results/cifar10 shows: up to the share near zero a pruning that is calibrated loses nothing; beyond it
    a layer that is all but emptied costs most. max_layer_ratio prevents that; the reconstruction score sees it coming.
    """
    free = graph.scores("gamma")[graph.candidates("together")]
    if not len(free):
        return []
    ready = near_zero_share(free)
    lines = ["", f"  {'ratio':>6} {'of all gamma^2':>15}   the layer that keeps least"]
    squares = free.sort().values.square()
    for ratio in RATIOS:
        gone = float(squares[: round(ratio * len(squares))].sum() / squares.sum())
        lines.append(f"  {ratio:>6} {gone:>15.2%}   {_thinnest(graph.plan(GlobalRatio(ratio)))}")
    safe = math.floor(20 * ready + 1e-3) / 20  # down to a multiple of 0.05
    lines += ["", f"{ready:.1%} of the candidates are near zero (below 1% of the largest gamma)."]
    if safe:
        lines.append(f"  ratio={safe:g}: what is near zero; calibration is enough")
    if safe < MOST:
        lines.append("  more, without training afterwards: budget.macs=0.4 score=reconstruction per=macs repair=true")
        lines.append("  more, and finetune.py afterwards: a larger ratio with max_layer_ratio=0.9")
        lines.append(f"  to prepare more: train.py sparsity=auto target_ratio={max(0.5, min(0.9, safe + 0.2)):.1g}")
    return lines


def _thinnest(plan: PruningPlan) -> str:
    """Name the BatchNorm that keeps the least share of its channels: `feature.31 keeps 1 of 128`."""
    kept = {name: (len(channels), plan.layers[name].size[0]) for name, channels in plan.keep.items()}
    if not kept:
        return "all keep all"
    name = min(kept, key=lambda name: kept[name][0] / kept[name][1])
    return "{} keeps {} of {}".format(name, *kept[name])
