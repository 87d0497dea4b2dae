"""What a plan may be told beside its criterion; without torch, so that a configuration can be built from it."""

from dataclasses import dataclass

from slimming.options import option

MEASURED = ("reconstruction",)  # scores that take training images


@dataclass
class PlanOptions:
    """How gammas are scored and decided, and which constraints restore channels afterwards."""

    ties: str = option(
        "together",
        "together: gammas whose channels are tied (by additions, say) are decided as one; apart: every gamma by itself "
        "(smaller, slower)",
        choices=("together", "apart"),
    )
    score: str = option(
        "gamma",
        "score of a channel, the lowest go first: |gamma|; lamp: gamma^2 over those of its layer that are not smaller; "
        "reconstruction: the error that no repair makes up for (training images, no labels); or, to compare with, random (by "
        "seed) or weight_l1 of its filter",
        choices=("gamma", "lamp", "reconstruction", "random", "weight_l1"),
    )
    per: str = option(
        "channel",
        "what a score is compared by: channel; or macs: it is divided by the MACs of all that reads or writes the channel, so "
        "that of equal channels the expensive ones go first",
        choices=("channel", "macs"),
    )
    reduce: str = option("max", "score of tied channels: max or mean of theirs", choices=("max", "mean"))
    min_channels: int = option(1, "channels that every BatchNorm keeps at least", low=1, whole=True)
    max_layer_ratio: float = option(
        1.0, "largest share of one BatchNorm's channels that may go", low=0, high=1, above=True
    )
    round_to: int = option(
        1, "kept channels of every BatchNorm are rounded up to a multiple of this", low=1, whole=True
    )
    ignore: list[str] = option([], "shell patterns of BatchNorm layers that stay whole")
