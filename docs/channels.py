"""Draws channels.png: one pruned block from its real plan. python docs/channels.py"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import nn

import slimming

GAMMAS = {"bn1": [0.9, 0.04, 0.6, 0.03, 0.7, 0.5, 0.02, 0.8], "bn2": [0.7, 0.03, 0.05, 0.9, 0.04, 0.6, 0.5, 0.02]}
GAMMAS["bn0"] = [0.8, 0.5, 0.6, 0.7, 0.9, 0.6, 0.02, 0.03]
KEPT, GONE = "#1b3a6b", "#d9d9d9"


class Block(nn.Module):
    """A residual block between a stem and a head."""

    def __init__(self):
        super().__init__()
        for i, c_in in enumerate((3, 8, 8)):
            setattr(self, f"conv{i}", nn.Conv2d(c_in, 8, 3, padding=1, bias=False))
            norm = nn.BatchNorm2d(8)
            norm.weight.data = torch.tensor(GAMMAS[f"bn{i}"])
            setattr(self, f"bn{i}", norm)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        x = torch.relu(self.bn0(self.conv0(x)))
        y = torch.relu(self.bn1(self.conv1(x)))
        return self.head(torch.relu(x + self.bn2(self.conv2(y))))


def main() -> None:
    model = Block()
    graph = slimming.trace(model, torch.randn(1, 3, 8, 8))
    figure, axes = plt.subplots(1, 2, figsize=(10.5, 4.6), layout="constrained", sharey=True)
    for axis, ties in zip(axes, ("together", "apart"), strict=True):
        plan = graph.plan(slimming.Threshold(0.1), ties=ties)
        rows = [(n, plan.layers[n].outs) for n in ("conv0", "bn0", "conv1", "bn1", "conv2", "bn2") if n in plan.layers]
        kept = {
            "conv0": range(8),
            "bn0": range(8),
            "conv1": range(8),
            "bn1": range(8),
            "conv2": range(8),
            "bn2": range(8),
        }
        kept |= dict(rows) | {"sum, head": plan.layers["head"].ins if "head" in plan.layers else range(8)}
        for row, (name, stay) in enumerate(kept.items()):
            for i in range(8):
                axis.add_patch(plt.Rectangle((i, -row - 0.72), 0.86, 0.72, color=KEPT if i in set(stay) else GONE))
                if name in GAMMAS:
                    colour = "white" if i in set(stay) else "black"
                    axis.text(i + 0.43, -row - 0.36, f"{GAMMAS[name][i]:g}", ha="center", va="center", color=colour)
            layer = plan.layers.get(name)
            note = " + ".join(s for s in ("select", "scatter") if layer is not None and getattr(layer, s) is not None)
            axis.text(8.1, -row - 0.36, note, va="center", fontsize=9, style="italic")
        axis.set(xlim=(-0.1, 10), ylim=(-7, 0.2), xticks=[])
        axis.set_yticks([-r - 0.36 for r in range(len(kept))], list(kept))
        axis.set_title(f'ties="{ties}": {plan.got["params"]:.0%} of the parameters remain', fontsize=11)
        for side in axis.spines.values():
            side.set_visible(False)
        axis.tick_params(length=0)
    figure.suptitle(
        "relu(bn0(conv0)) + bn2(conv2(relu(bn1(conv1)))), Threshold(0.1): dark channels stay; numbers are |gamma|"
    )
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
