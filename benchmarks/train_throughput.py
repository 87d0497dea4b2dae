"""Images/s of SlimmingModule under the Trainer against a bare PyTorch loop, in one process.

    python benchmarks/train_throughput.py [--steps 60] [--repeats 5] [--precision 32-true]

Both train the same network with the same batches (in memory, augmented and normalised the same way), layout, precision,
optimizer and penalty; they take turns, and the printed ratio is the median over the turns of Trainer / bare.
"""

import argparse
import logging
import statistics
import time
import warnings

import lightning.pytorch as pl
import torch
from torch.nn import functional as F

from slimming import models
from slimming.data import ImageData
from slimming.data.sampler import TensorImages
from slimming.training.module import SlimmingModule

NETS = {
    "vgg19 x 0.25": lambda: models.vgg(19, width=0.25),
    "preresnet56": lambda: models.preresnet(56),
}


class Noise(ImageData):
    """Random images of CIFAR's shape."""

    num_classes, in_channels, image_size, flips = 10, 3, 32, True
    mean, std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)

    def setup(self, stage=None):
        if self.splits:
            return
        n = 64 * 400
        self.splits = {
            "train": TensorImages(torch.randint(256, (n, 3, 32, 32), dtype=torch.uint8), torch.arange(n) % 10)
        }


def sgd(parameters):
    return torch.optim.SGD(parameters, 0.1, 0.9, weight_decay=1e-4)


class Clock(pl.Callback):
    """Measures the steps after `skip` warm-up steps."""

    def __init__(self, skip: int):
        self.skip = skip

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if batch_idx == self.skip - 1:
            self.start = time.perf_counter()
        self.end = time.perf_counter()


def trainer_rate(build, data, steps, skip, precision) -> float:
    module = SlimmingModule(build().to(memory_format=torch.channels_last), 10, sgd, sparsity=1e-4)
    clock = Clock(skip)
    trainer = pl.Trainer(
        max_epochs=1,
        limit_train_batches=steps + skip,
        accelerator="cpu",
        devices=1,
        precision=precision,
        callbacks=[clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        limit_val_batches=0,
    )
    trainer.fit(module, datamodule=data)
    return steps * data.batch_size / (clock.end - clock.start)


def bare_rate(build, data, steps, skip, precision) -> float:
    model = build().to(memory_format=torch.channels_last).train()
    optimizer = sgd(model.parameters())
    gammas = [m.weight for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    training = type(
        "T", (), {"training": True, "lightning_module": torch.nn.Module(), "global_rank": 0, "world_size": 1}
    )
    training.lightning_module.dtype = torch.float32
    data.trainer = training
    for step, batch in enumerate(data.train_dataloader()):
        if step == skip:
            start = time.perf_counter()
        if step == skip + steps:
            break
        images, labels = data.on_after_batch_transfer(batch, 0)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        for gamma in gammas:
            gamma.grad.add_(gamma.detach().sign(), alpha=1e-4)
        optimizer.step()
    return steps * data.batch_size / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--precision", choices=["32-true", "bf16-mixed"], default="32-true")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    data = Noise()
    data.setup()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {options.precision}, batch {data.batch_size}")
    for name, build in NETS.items():
        rates = []
        for _ in range(options.repeats):
            rates.append([f(build, data, options.steps, 5, options.precision) for f in (trainer_rate, bare_rate)])
        ratios = [a / b for a, b in rates]
        ours, bare = (statistics.median(column) for column in zip(*rates, strict=True))
        print(
            f"{name:14} Trainer {ours:7.0f} images/s, bare loop {bare:7.0f} images/s, "
            f"ratio {statistics.median(ratios):.3f} ({min(ratios):.3f} ... {max(ratios):.3f}, n={len(ratios)})"
        )


if __name__ == "__main__":
    main()
