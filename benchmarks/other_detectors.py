"""Prune other people's detectors with random weights, and compare each with its specification; prints a table.

    pip install ultralytics libreyolo      # one of them will do
    python benchmarks/other_detectors.py

Every BatchNorm is drawn at random; a global ratio of 0.5 is pruned with ties together and apart. Exactness: float64, images of
64 pixels, a batch of 2 in eval mode and of 4 in train mode with the running statistics, prune against mask, by the comparison
of the tests. MACs: one image of 640 pixels.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

import torch

import slimming

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "channels"))
from exactness import assert_exact, randomise
from test_other_detectors import LIBREYOLO, NAMES, network_of

COLUMNS = ("network", "parameters (M)", "MACs (G)", "gammas", "may go together (%)")
COLUMNS += ("parameters, MACs left together (%)", "apart (%)")


def row(name: str) -> list[str]:
    """Measure one network."""
    model, image, large = network_of(name), torch.randn(1, 3, 64, 64).double(), torch.zeros(1, 3, 640, 640).double()
    model = randomise(model.requires_grad_(True))
    graph = slimming.trace(model, image)
    dense, left = slimming.cost(model, large), []
    for ties in ("together", "apart"):
        thin = slimming.cost(assert_exact(model, graph.plan(slimming.GlobalRatio(0.5), ties=ties), image), large)
        left.append(f"{100 * thin.num_params / dense.num_params:.1f}, {100 * thin.macs / dense.macs:.1f}")
    gammas = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d))
    may_go = f"{100 * int(graph.candidates('together').sum()) / gammas:.1f}"
    sizes = f"{dense.num_params / 1e6:.2f}", f"{dense.macs / 1e9:.2f}", f"{gammas:,}"
    return [name, *sizes, may_go, *left]


def main() -> None:
    torch.set_num_threads(1)
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for name in NAMES:
        if find_spec("libreyolo" if name in LIBREYOLO else "ultralytics"):
            print(f"| {' | '.join(row(name))} |", flush=True)


if __name__ == "__main__":
    main()
