"""Steps per second with one and with several processes, at the same global batch, and what they exchange per step.

    python benchmarks/scaling.py [--devices 1,2] [--model vgg19] [--width 0.25] [--accelerator cpu] [--rounds 3]

Trains on the embedded digits at 32x32 through the same launcher as `train.py trainer.devices=N`; the runs of a round take
turns, and each figure is the median over the rounds of the median epoch, the first epoch left out. On CPUs the cores are
shared out among the processes, so that both use the whole machine.
"""

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path

from hydra import compose, initialize_config_dir

from slimming import config, models, stages

ROOT = Path(__file__).resolve().parents[1]


def steps_per_s(options: argparse.Namespace, devices: int) -> float:
    overrides = [f"model={options.model}", f"model.width={options.width}", "data=digits", "data.batch_size=64"]
    overrides += [f"trainer.accelerator={options.accelerator}", f"trainer.devices={devices}", "trainer.max_epochs=4"]
    overrides += ["trainer.limit_test_batches=1", "trainer.limit_val_batches=1", "trainer.enable_progress_bar=false"]
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        cfg = config.check(compose("train", overrides))
    with tempfile.TemporaryDirectory() as out:
        stages.run_on_devices("train", cfg, Path(out))
        history = json.loads((Path(out) / "result.json").read_text())["history"]
    return statistics.median(row["images_per_s"] for row in history[1:]) / 64


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--devices", default="1,2")
    parser.add_argument("--model", default="vgg19")
    parser.add_argument("--width", type=float, default=0.25)
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    counts = [int(n) for n in options.devices.split(",")]
    speeds: dict[int, list[float]] = {n: [] for n in counts}
    for _ in range(options.rounds):
        for n in counts:
            speeds[n].append(steps_per_s(options, n))
    depth = {"depth": int(options.model[3:]), "width": options.width} if options.model.startswith("vgg") else {}
    network = models.build(options.model.rstrip("0123456789"), in_channels=1, **depth)
    gradient = sum(p.numel() * p.element_size() for p in network.parameters())
    print(f"\n{options.model} x {options.width}, {os.cpu_count()} cores, global batch 64, {options.rounds} rounds")
    print("| processes | steps/s | against the first | gradient bytes per step and rank |")
    print("|---|---|---|---|")
    for n in counts:
        median = statistics.median(speeds[n])
        ratio = statistics.median(b / a for a, b in zip(speeds[counts[0]], speeds[n], strict=True))
        sent = 0 if n == 1 else round(2 * (n - 1) / n * gradient)  # a ring all-reduce sends this much
        print(f"| {n} | {median:.2f} | {ratio:.2f} | {gradient:,} reduced, {sent:,} sent |")


if __name__ == "__main__":
    main()
