"""Learning-rate schedules in terms of the whole training, and what they add up to."""

from collections.abc import Callable, Sequence

import torch
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LRScheduler, MultiStepLR

from slimming.errors import check_number


def multistep(
    optimizer: Optimizer, max_epochs: int, milestones: Sequence[float] = (0.5, 0.75), gamma: float = 0.1
) -> MultiStepLR:
    """Multiply the learning rate by `gamma` at each milestone, a share of `max_epochs`.

    Source: Network Slimming section 4.3 (divided by 10 at 50% and 75% of the epochs).
    """
    for share in milestones:
        check_number("each entry of scheduler.milestones", share, 0, 1)
    check_number("scheduler.gamma", gamma, 0)
    return MultiStepLR(optimizer, [max(1, round(share * max_epochs)) for share in milestones], gamma)


def lr_per_epoch(
    optimizer: Callable[..., Optimizer], scheduler: Callable[[Optimizer], LRScheduler], epochs: int
) -> list[float]:
    """Return the learning rate of every epoch, found by running the schedule on a dummy parameter."""
    dummy = torch.nn.Parameter(torch.zeros(1))
    dummy.grad = torch.zeros(1)
    opt = optimizer([dummy])
    schedule = scheduler(opt)
    rates = []
    for _ in range(epochs):
        rates.append(float(opt.param_groups[0]["lr"]))
        opt.step()
        schedule.step()
    return rates


def sgd_momentum(optimizer: Callable[..., Optimizer]) -> float | None:
    """Return the momentum of an SGD factory, None for another kind of optimizer."""
    opt = optimizer([torch.nn.Parameter(torch.zeros(1))])
    return float(opt.param_groups[0]["momentum"]) if type(opt) is SGD else None
