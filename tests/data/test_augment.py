"""Augmentation against the obvious per-image way."""

import torch

from slimming.data.augment import normalise, random_crop, random_flip


def test_normalise():
    images = torch.randint(256, (3, 2, 4, 4), dtype=torch.uint8)
    mean, std = torch.tensor([0.4, 0.5]), torch.tensor([0.2, 0.3])
    expected = (images / 255 - mean.view(2, 1, 1)) / std.view(2, 1, 1)
    torch.testing.assert_close(normalise(images, mean, std), expected)


def test_each_crop_is_a_window_of_the_padded_image_and_all_places_occur():
    images, fill = torch.rand(400, 2, 5, 6), torch.tensor([7.0, 8.0])
    crops = random_crop(images, 1, fill)
    positions = set()
    for image, crop in zip(images, crops, strict=True):
        padded = fill.view(2, 1, 1).expand(2, 7, 8).clone()
        padded[:, 1:6, 1:7] = image
        found = [(y, x) for y in range(3) for x in range(3) if torch.equal(padded[:, y : y + 5, x : x + 6], crop)]
        assert len(found) == 1
        positions |= set(found)
    assert len(positions) == 9


def test_flips_are_mirrors_about_half_the_time():
    images = torch.rand(400, 2, 3, 4)
    flipped = random_flip(images)
    kept = [torch.equal(a, b) for a, b in zip(images, flipped, strict=True)]
    mirrored = [torch.equal(a.flip(2), b) for a, b in zip(images, flipped, strict=True)]
    assert all(k != m for k, m in zip(kept, mirrored, strict=True)) and 140 < sum(kept) < 260


def test_the_seed_decides():
    images = torch.rand(8, 3, 8, 8)

    def draw(seed):
        torch.manual_seed(seed)
        return random_flip(random_crop(images, 2, torch.zeros(3)))

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
