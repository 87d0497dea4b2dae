"""Augmentation of a whole batch at once, on its device, with torch's global random generator."""

import torch


def normalise(images: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """Turn uint8 (N, C, H, W) into float32 of zero mean and unit deviation per channel; mean, std: (C,) in [0, 1]."""
    scale, shift = 1 / (255 * std), -mean / std
    return torch.addcmul(shift.view(-1, 1, 1), images.float(), scale.view(-1, 1, 1))


def random_crop(images: torch.Tensor, padding: int, fill: torch.Tensor) -> torch.Tensor:
    """Pad every side of (N, C, H, W) by `padding` pixels of colour `fill` (C,), crop H x W at a random position each."""
    n, c, h, w = images.shape
    padded = fill.view(-1, 1, 1).to(images).expand(n, c, h + 2 * padding, w + 2 * padding).clone()
    padded[:, :, padding : padding + h, padding : padding + w] = images
    dy, dx = torch.randint(2 * padding + 1, (2, n), device=images.device)
    windows = padded.unfold(2, h, 1).unfold(3, w, 1)  # (N, C, 2p+1, 2p+1, H, W), a view
    return windows[torch.arange(n, device=images.device), :, dy, dx]


def random_flip(images: torch.Tensor) -> torch.Tensor:
    """Mirror each of (N, C, H, W) left to right with probability 1/2."""
    coin = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
    return torch.where(coin, images.flip(3), images)
