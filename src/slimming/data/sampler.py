"""Which image comes when: a function of seed, epoch and rank, and of nothing else."""

from collections.abc import Iterator

import torch
from torch.utils.data import Dataset, Sampler


class EpochSampler(Sampler[int]):
    """Yields this rank's share of the indices 0 ... n-1; Lightning calls `set_epoch`.

    Shuffled (training): the permutation of (seed, epoch), sliced by rank, every rank equally many. In order
    (evaluation): sliced by rank and never padded, so that every image counts once.

    Attributes:
        index_by_epoch: yield epoch * n + index instead of the index, for data sets that augment by themselves.
    """

    index_by_epoch = False

    def __init__(self, n: int, *, shuffle: bool, seed: int = 0, rank: int = 0, world_size: int = 1):
        self.n, self.shuffle, self.seed, self.rank, self.world_size = n, shuffle, seed, rank, world_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        if not self.shuffle:
            return iter(range(self.rank, self.n, self.world_size))
        generator = torch.Generator().manual_seed(mix(self.seed, self.epoch))
        order = torch.randperm(self.n, generator=generator)
        mine = order[self.rank :: self.world_size][: len(self)]
        return iter((mine + self.epoch * self.n * self.index_by_epoch).tolist())

    def __len__(self) -> int:
        if self.shuffle:
            return self.n // self.world_size
        return len(range(self.rank, self.n, self.world_size))


def mix(*numbers: int) -> int:
    """Hash whole numbers into one 63-bit seed, so that neighbouring (seed, epoch, rank) give unrelated streams."""
    state = 0
    for number in numbers:
        state = (state ^ number) + 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF  # the splitmix64 finaliser
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1


class TensorImages(Dataset):
    """uint8 images (N, C, H, W) and int64 labels (N,) in memory, fetched a whole batch at a time."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor):
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        index = torch.tensor(indices)
        return self.images[index], self.labels[index]
