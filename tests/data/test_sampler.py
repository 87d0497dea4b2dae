"""Order and split: functions of seed and epoch, covering everything once."""

import pytest
import torch

from slimming.data.base import split_off
from slimming.data.sampler import EpochSampler, TensorImages, mix
from slimming.errors import ConfigError


def _order(epoch=0, **kwargs):
    sampler = EpochSampler(101, **({"shuffle": True, "seed": 1} | kwargs))
    sampler.set_epoch(epoch)
    order = list(sampler)
    assert len(order) == len(sampler)
    return order


def test_order_depends_on_seed_and_epoch_alone():
    assert _order() == _order()
    assert sorted(_order()) == list(range(101))
    assert len({tuple(_order(e, seed=s)) for e in range(3) for s in range(3)}) == 9


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_training_images_evenly(world):
    shares = [_order(rank=r, world_size=world) for r in range(world)]
    assert {len(s) for s in shares} == {101 // world}
    assert len(set().union(*shares)) == 101 // world * world
    assert [i for group in zip(*shares, strict=True) for i in group] == _order()[: 101 // world * world]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_counts_every_image_once(world):
    shares = [_order(rank=r, world_size=world, shuffle=False) for r in range(world)]
    assert sorted(i for share in shares for i in share) == list(range(101))


def test_mix_separates_neighbours():
    seeds = {mix(s, e, r) for s in range(20) for e in range(20) for r in range(20)}
    assert len(seeds) == 8000 and all(0 <= s < 2**63 for s in seeds)


def test_batches_are_fetched_whole():
    images = torch.arange(20, dtype=torch.uint8).view(5, 1, 2, 2)
    data = TensorImages(images, torch.arange(5))
    x, y = data.__getitems__([3, 0, 3])
    assert torch.equal(x, images[[3, 0, 3]]) and y.tolist() == [3, 0, 3]


@pytest.mark.parametrize(("size", "expected"), [(0.2, 30), (31, 31), (0.5, 75), (6, 6)])
def test_validation_split_is_stratified_disjoint_and_exact(size, expected):
    labels = torch.tensor([0] * 100 + [1] * 30 + [2] * 20)
    rest, held = split_off(labels, size)
    assert len(held) == expected and sorted([*rest.tolist(), *held.tolist()]) == list(range(150))
    share = labels[held].bincount(minlength=3) - torch.tensor([100, 30, 20]) * expected / 150
    assert share.abs().max() < 1
    assert torch.equal(held, split_off(labels, size)[1])


def test_no_validation_split():
    rest, held = split_off(torch.zeros(7), 0)
    assert rest.tolist() == list(range(7)) and len(held) == 0


@pytest.mark.parametrize("size", [1, 9, 100])
def test_a_split_that_empties_a_side_is_refused(size):
    with pytest.raises(ConfigError, match=rf"data.val_size={size} would hold out"):
        split_off(torch.tensor([0] * 5 + [1] * 5), size)
