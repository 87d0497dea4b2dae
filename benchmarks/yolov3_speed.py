"""How long the full-size YOLOv3 takes to be pruned, its proof included.

    python benchmarks/yolov3_speed.py [--pixels 416] [--ratio 0.85] [--repeats 3] [--threads 1]

80 classes, weights fresh, gammas drawn uniformly in [0, 1] (seed 1). Medians of the repeats, in seconds.
"""

import argparse
import statistics
import time

import torch
from torch import nn

import slimming
from slimming import models


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pixels", type=int, default=416)
    parser.add_argument("--ratio", type=float, default=0.85)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(1)
    model = models.build("yolov3", num_classes=80).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight)
    example = torch.zeros(1, 3, options.pixels, options.pixels)
    rows = []
    for _ in range(options.repeats):
        began = time.perf_counter()
        plan = slimming.trace(model, example).plan(slimming.GlobalRatio(options.ratio))
        planned = time.perf_counter()
        thin = slimming.prune(model, plan)
        rows.append((planned - began, time.perf_counter() - planned))
    traced, pruned = (statistics.median(column) for column in zip(*rows, strict=True))
    left = [sum(p.numel() for p in net.parameters()) for net in (model, thin)]
    gone = sum(len(plan.layers[name].outs) for name in plan.keep) / sum(plan.layers[n].size[1] for n in plan.keep)
    print(f"yolov3, {options.pixels} pixels, ratio {options.ratio}, {options.threads} thread(s)")
    print(f"{left[0]:,} -> {left[1]:,} parameters; {1 - gone:.1%} of the channels of pruned BatchNorms gone")
    print(f"trace and plan {traced:.2f} s, surgery and proof {pruned:.2f} s, together {traced + pruned:.2f} s")


if __name__ == "__main__":
    main()
