"""What a plan or a penalty may be told; without torch, so that a configuration can be built from it."""

from dataclasses import dataclass

from slimming.errors import ConfigError
from slimming.options import check_options, option

MEASURED = ("reconstruction",)  # scores that take training images
REDUCED = {"together": "max", "apart": "max", "aligned": "mean"}  # by ties: what `reduce` is where it is not given


@dataclass
class PlanOptions:
    """How gammas are scored and decided, and which constraints restore channels afterwards."""

    ties: str = option(
        "together",
        "together: gammas whose channels are tied (by additions, say) are decided as one; apart: every gamma by itself "
        "(smaller, slower); aligned: a channel leaves every tensor that it lives in or none, so that all of them get narrower "
        "(no selections)",
        choices=tuple(REDUCED),
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
    reduce: str | None = option(
        None,
        "score of gammas that are decided as one: max, mean or sum of theirs; null: max, with ties=aligned mean",
        choices=("max", "mean", "sum"),
    )
    min_channels: int = option(1, "channels that every BatchNorm keeps at least", low=1, whole=True)
    max_layer_ratio: float = option(
        1.0, "largest share of one BatchNorm's channels that may go", low=0, high=1, above=True
    )
    round_to: int = option(
        1,
        "kept channels of every BatchNorm (with ties=aligned: of those that live in the same tensors) are rounded up to a "
        "multiple of this",
        low=1,
        whole=True,
    )
    ignore: list[str] = option([], "shell patterns of BatchNorm layers that stay whole")

    @property
    def reduction(self) -> str:
        """What `reduce` is, or stands for where it is not given."""
        return self.reduce or REDUCED[self.ties]


PENALTY_NAMES = ("l1", "proximal", "polarization", "group")


@dataclass
class PenaltyOptions:
    """Which penalty acts, and on which gammas."""

    name: str = option(
        "l1",
        "given as penalty=<name>. l1: the paper's; proximal: a soft threshold after every step, exact zeros; polarization: "
        "gammas go to 0 or away from it, within [0, 1]; group: gammas that share a channel of a stream go together",
        choices=PENALTY_NAMES,
    )
    layers: list[str] | None = option(
        None, "shell patterns of BatchNorm layers to penalise, e.g. ['layer1.*']; null: all with a trainable scale"
    )
    t: float | None = option(
        None, "penalty=polarization: the larger, the more go to 0, by itself the share (t + 2) / 4", low=-2, high=2
    )


def check_penalty(options: PenaltyOptions) -> None:
    """Raise ConfigError if a value is not allowed, or belongs to another penalty."""
    check_options(options, "penalty.")
    layers = options.layers
    if layers is not None and not (isinstance(layers, list) and all(isinstance(p, str) for p in layers)):
        raise ConfigError(f"penalty.layers must be a list of shell patterns such as ['layer1.*'], got {layers!r}")
    if options.t is not None and options.name != "polarization":
        raise ConfigError(
            f"penalty.t={options.t:g} is of penalty=polarization, and this is penalty={options.name}: leave it out"
        )
