"""Latency at equal MACs of the three ways of ties: together, apart and aligned, in eager torch and in onnxruntime.

    python benchmarks/ties.py [--only REGEX] [--macs 0.5] [--round-to 1,8] [--batch 16] [--threads 1] [--turns 15]
                              [--shaped] [--out FILE.md]

Untrained networks with gammas drawn uniformly in [0, 1] (seed 1): these are times, not accuracies. Each is pruned to the same
share of its MACs (budget.macs) with each way of ties and each round_to, then all of one network are timed in turns in one
process, the dense one among them. --shaped adds what export.py shape=auto would write, which takes some exports more: of
multiples of 1 and 8, with selections as they are and with BatchNorms of full width, the fastest. Prints Markdown.
"""

import argparse
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from slimming import Budget, cost, models, prune, trace
from slimming.channels.embedding import selecting
from slimming.deploy import onnx_format
from slimming.deploy.capturing import Network
from slimming.deploy.engines import open_engine
from slimming.deploy.shaping import AS_PRUNED, shaped, shapes_of
from slimming.deploy.timing import Timing, core_share, machine, time_in_turns
from slimming.errors import GraphError
from slimming.files import write_text
from slimming.records import Record
from slimming.report.document import Table
from slimming.report.latencies import describe

NETWORKS: dict[str, tuple[str, dict[str, Any], int]] = {  # name -> (factory, arguments, pixels)
    "preresnet56": ("preresnet", {"depth": 56}, 32),
    "densenet40": ("densenet", {"depth": 40}, 32),
    "resnet50": ("torchvision", {"name": "resnet50"}, 224),
}
TIES = ("together", "apart", "aligned")
DENSE = ("dense", 1)
ENGINES = ("torch", "onnxruntime")
HEAD = ["ties", "round_to", "MACs left", "gammas left", "selections", *(f"{engine} (ms)" for engine in ENGINES)]
BEST = "onnxruntime, shaped (ms)"


def build(name: str) -> tuple[nn.Module, tuple[int, int, int]]:
    factory, arguments, pixels = NETWORKS[name]
    torch.manual_seed(1)
    model = models.build(factory, **arguments)
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight)
    return model.eval(), (3, pixels, pixels)


def pruned(
    model: nn.Module, image: tuple[int, int, int], macs: float, round_to: list[int]
) -> dict[Any, nn.Module | str]:
    """Return the network of every way of ties and every round_to, by both; the reason where the MACs cannot be reached."""
    graph = trace(model, torch.zeros(1, *image))
    found: dict[Any, nn.Module | str] = {DENSE: model}
    for ties in TIES:
        for block in round_to:
            try:
                plan = graph.plan(Budget(macs=macs), ties=ties, round_to=block)
                found[ties, block] = prune(model, plan).eval()
            except GraphError as error:
                found[ties, block] = str(error)
    return found


def runs(
    networks: dict[Any, nn.Module], image: tuple[int, int, int], options: argparse.Namespace, folder: Path
) -> dict:
    """Return what runs every network in every engine, by (network, engine, shape)."""
    images = np.random.default_rng(0).standard_normal((options.batch, *image), dtype=np.float32)
    found: dict[Any, Callable[[], Any]] = {}
    for key, model in networks.items():
        eager = open_engine(model, "torch", options.threads)
        found[key, "torch", AS_PRUNED] = lambda eager=eager: eager(images)
        shapes = [s for s in shapes_of(model) if s.block in (1, 8)] if options.shaped and key != DENSE else [AS_PRUNED]
        for shape, network in shaped(model, torch.randn(2, *image), shapes).made.items():
            path = folder / f"{len(found)}.onnx"
            onnx_format.write(Network(network, image, Record({}, config={})), path)
            session = open_engine(path, "onnxruntime", options.threads)
            found[key, "onnxruntime", shape] = lambda session=session: session(images)
    return found


def row(key: Any, network: nn.Module | str, share: tuple[float, float], times: dict[Any, Timing]) -> list[str]:
    """Return the cells of one network; `share` of the MACs and the gammas that are left."""
    named = [key[0], "-" if key == DENSE else str(key[1])]
    if isinstance(network, str):
        return [*named, network, *["-"] * (len(HEAD) - 2)]
    own = {(engine, shape): timing for (k, engine, shape), timing in times.items() if k == key}
    best = min((t for (engine, _), t in own.items() if engine == "onnxruntime"), key=lambda t: t.median_ms)
    cells = [*(own[engine, AS_PRUNED] for engine in ENGINES), best]
    return [*named, *(f"{s:.1%}" for s in share), str(len(selecting(network))), *map(_cell, cells)]


def _cell(timing: Timing) -> str:
    low, high = timing.quartiles_ms
    return f"{timing.median_ms:.2f} ({low:.2f}-{high:.2f})"


def section(name: str, options: argparse.Namespace) -> str:
    """Prune, time and describe one network."""
    model, image = build(name)
    found = pruned(model, image, options.macs, [int(n) for n in options.round_to.split(",")])
    networks = {key: network for key, network in found.items() if isinstance(network, nn.Module)}
    with tempfile.TemporaryDirectory() as folder:
        times = time_in_turns(runs(networks, image, options, Path(folder)), turns=options.turns)
    example = torch.zeros(1, *image)

    def size(network: nn.Module | str) -> tuple[float, float]:
        if isinstance(network, str):
            return 0.0, 0.0
        norms = (m for m in network.modules() if isinstance(m, nn.BatchNorm2d))
        return cost(network, example).macs, sum(m.num_features for m in norms)

    dense = size(model)
    shares = {key: tuple(a / b for a, b in zip(size(network), dense, strict=True)) for key, network in found.items()}
    rows = [row(key, network, shares[key], times) for key, network in found.items()]
    table = Table([*HEAD, BEST], rows)
    shown = table if options.shaped else table.columns(HEAD)
    return f"## {name}\n\n{dense[0] / 1e6:.1f}M MACs dense.\n\n{shown.markdown()}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="regular expression of network names")
    parser.add_argument("--macs", type=float, default=0.5, help="share of the MACs that may remain")
    parser.add_argument("--round-to", default="1,8")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--shaped", action="store_true", help="time the best shape for onnxruntime as well")
    parser.add_argument("--out", type=Path, help="where the page goes; it is printed in any case")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    begun = core_share()
    sections = [section(name, options) for name in NETWORKS if re.search(options.only, name)]
    told = ("macs", "round_to", "batch", "threads", "turns")
    given = [f"--{key.replace('_', '-')} {getattr(options, key)}" for key in told] + ["--shaped"] * options.shaped
    command = " ".join(["python benchmarks/ties.py", *given])
    head = [
        "# The three ways of ties at equal MACs",
        "",
        f"`{command}`. {describe(machine())}. Medians over the turns, in brackets their quartiles; a thread had {begun:.0%} of "
        f"its core before and {core_share():.0%} after.",
        "",
    ]
    text = "\n".join([*head, *sections])
    print(text)
    if options.out:
        write_text(options.out, text)


if __name__ == "__main__":
    main()
