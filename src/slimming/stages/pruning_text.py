"""What `prune.py` prints: the table of a pruning, and the inspection of what could go."""

import json

import torch

from slimming.channels.graph import ChannelGraph
from slimming.channels.plan import PruningPlan
from slimming.records import Result
from slimming.stages.measuring import uncounted

QUANTILES = (0.1, 0.3, 0.5, 0.7, 0.9)


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
    share = {key: 1 - after[key] / before[key] for key in ("num_params", "macs")}
    lines = [
        f"channels: {got['removed']:,} of {got['candidates']:,} candidates removed, {got['ratio']:.1%} ({wanted}); "
        f"{got['restored']} restored by constraints, {got['dead']} more removed as dead",
        f"parameters: {before['num_params']:,} -> {after['num_params']:,} (-{share['num_params']:.1%}); "
        f"MACs: {before['macs'] / 1e6:,.1f}M -> {after['macs'] / 1e6:,.1f}M (-{share['macs']:.1%}){uncounted(before)}",
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
    for ties in ("together", "apart"):
        free = gammas[graph.candidates(ties)]
        if len(free):
            values = torch.quantile(free, torch.tensor(QUANTILES, dtype=free.dtype)).tolist()
            shown = "  ".join(f"{mark}: {value:.2g}" for mark, value in zip(QUANTILES, values, strict=True))
            lines.append(f"  ties={ties} ({len(free):,} candidates)  {shown}")
    return "\n".join(lines)
