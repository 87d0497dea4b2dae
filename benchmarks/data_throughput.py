"""Our in-memory batches against torchvision's CIFAR10 with per-sample transforms; data's and penalty's share of a step.

    python benchmarks/data_throughput.py [--repeats 5]

Random images in CIFAR-10's shape; pad, crop, flip and normalise in both. The loaders take turns; ratios are medians.
"""

import argparse
import statistics
import time
from types import SimpleNamespace

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from slimming import models
from slimming.channels.penalty import Penalty, batchnorm_gammas
from train_throughput import Noise, sgd


class RandomCIFAR(datasets.CIFAR10):
    """torchvision's own class with random pixels in place of the files."""

    def __init__(self, n: int, transform):
        self.data = np.random.default_rng(0).integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
        self.targets = [i % 10 for i in range(n)]
        self.transform, self.target_transform = transform, None


def theirs(workers: int) -> DataLoader:
    transform = transforms.Compose(
        [
            transforms.RandomCrop(32, padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize((0.5,) * 3, (0.25,) * 3),
        ]
    )
    return DataLoader(RandomCIFAR(64 * 150, transform), 64, shuffle=True, num_workers=workers)


def batches_per_s(loader, finish=lambda batch: batch) -> float:
    start, count = time.perf_counter(), 0
    for batch in loader:
        finish(batch)
        count += 1
    return count / (time.perf_counter() - start)


def seconds(function, repeats: int) -> float:
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def step_of(model) -> tuple:
    """Return a function that does one training step without penalty, and the penalty."""
    model = model.to(memory_format=torch.channels_last).train()
    optimizer, images, labels = sgd(model.parameters()), torch.randn(64, 3, 32, 32), torch.arange(64) % 10

    def step():
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return step, Penalty(batchnorm_gammas(model), 1e-4)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    data = Noise()
    data.setup()
    data.trainer = SimpleNamespace(
        training=True, global_rank=0, world_size=1, lightning_module=SimpleNamespace(dtype=torch.float32)
    )
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, batch 64, n={repeats}")
    ours = lambda: batches_per_s(data.train_dataloader(), lambda b: data.on_after_batch_transfer(b, 0))  # noqa: E731
    for workers in (0, 2):
        loader = theirs(workers)
        pairs = [(ours(), batches_per_s(loader)) for _ in range(repeats)]
        a, b = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratio = statistics.median(x / y for x, y in pairs)
        print(f"ours {a:6.0f} batches/s, torchvision with {workers} workers {b:5.0f} batches/s, ratio {ratio:.1f}")
    batch_s = 1 / statistics.median(ours() for _ in range(repeats))
    step, _ = step_of(models.vgg(19))
    step_s = seconds(step, repeats)
    print(f"data: {batch_s * 1e3:.2f} ms of a {step_s * 1e3:.0f} ms step of VGG-19: {batch_s / step_s:.2%}")
    step, penalty = step_of(models.preresnet(164))
    step_s = seconds(step, repeats)
    penalty_s = seconds(penalty.add_gradient, 20 * repeats)
    count = len(penalty.gammas)
    print(
        f"penalty: {penalty_s * 1e3:.2f} ms of a {step_s * 1e3:.0f} ms step of preresnet164 "
        f"({count} BatchNorms): {penalty_s / step_s:.2%}"
    )


if __name__ == "__main__":
    main()
