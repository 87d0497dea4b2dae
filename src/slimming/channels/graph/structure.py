"""What is tied to what in a network, as everything else in this folder needs it."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from slimming.channels.atoms import FROZEN, components
from slimming.channels.tape import CARRYING, Tape, Use


@dataclass
class Recording:
    """What `trace` saw of a network.

    Attributes:
        tape: of eval mode, and of train mode where that runs.
        evaluated: how many uses and products on the tape are of eval mode; their MACs count.
        spec: of the example input, see inputs.py.
        train_reason: why train mode could not be watched; "" if it was.
    """

    tape: Tape
    evaluated: tuple[int, int]
    spec: Any
    train_reason: str

    @functools.cached_property
    def component(self) -> Tensor:
        """(atoms,) the component of every atom: its smallest atom."""
        return components(self.tape.count, self.tape.ties)

    @functools.cached_property
    def aligned(self) -> Tensor:
        """(atoms,) the same where every BatchNorm ties what it reads to what it writes."""
        passed = [torch.stack((use.read, use.write)) for use in self.tape.uses if use.kind == "norm"]
        return components(self.tape.count, [*self.tape.ties, *passed])


@dataclass
class Norm:
    """A BatchNorm with scales.

    Attributes:
        name: of the layer.
        module: the layer.
        start: position of its first gamma among all gammas of the network.
        use: its first use.
        trainable: whether its gammas may be chosen at all.
    """

    name: str
    module: nn.modules.batchnorm._BatchNorm
    start: int
    use: Use
    trainable: bool

    @property
    def all(self) -> slice:
        """The positions of its gammas among all gammas."""
        return slice(self.start, self.start + self.module.num_features)


class Step(NamedTuple):
    """A use of a layer with the components that it reads and writes, and its norm if it is one with scales."""

    use: Use
    reads: Tensor
    writes: Tensor
    norm: Norm | None


class Structure:
    """Components, layers and BatchNorms of a network.

    Attributes:
        component: (atoms,) the component of every atom.
        frozen: (atoms,) bool, which components must stay.
        frozen_for: atoms that must stay, and why.
        unknown: reasons for which something was frozen that is not understood.
        norms: BatchNorms with scales, by name; their gammas are numbered in this order.
        count: number of all gammas.
        steps: all uses in the order in which they ran.
        layers: the first use of every layer, by name.
    """

    def __init__(self, model: nn.Module, recording: Recording, distrusted: Sequence[tuple[Tensor, str]] = ()) -> None:
        self.model, self.recording = model, recording
        self.tape, self.spec, self.train_reason = recording.tape, recording.spec, recording.train_reason
        self.modules = dict(model.named_modules())
        self.component, self.distrusted = self._components(), distrusted
        self.frozen_for = [*self.tape.frozen, *distrusted]
        self.frozen = self._find_frozen()
        reasons = dict.fromkeys(reason for _, reason in self.frozen_for if reason != "network output")
        self.unknown = [*reasons, *(f"batch_norm in {name}: {reason}" for name, reason in self.tape.fixed.items())]
        self.norms = self._find_norms()
        self.count = sum(n.module.num_features for n in self.norms.values())
        self.steps = [
            Step(use, self.component[use.read], self.component[use.write], self.norms.get(use.name))
            for use in self.tape.uses
        ]
        self.layers: dict[str, Step] = {}
        for step in self.steps:
            self.layers.setdefault(step.use.name, step)

    def _components(self) -> Tensor:
        return self.recording.component

    def silenced(self, kept: Tensor) -> Tensor | None:
        """Return which atoms, (atoms,) bool, filters of zeros write once the gammas outside `kept` are pruned; None: none."""
        return None

    def _find_frozen(self) -> Tensor:
        sides = [side for use in self.tape.uses if use.name in self.tape.fixed for side in use.sides()]
        atoms = torch.cat([torch.tensor([FROZEN]), *(atoms for atoms, _ in self.frozen_for), *sides])
        frozen = torch.zeros(self.tape.count, dtype=torch.bool)
        frozen[self.component[atoms]] = True
        return frozen

    def _find_norms(self) -> dict[str, Norm]:
        norms: dict[str, Norm] = {}
        start = 0
        for use in self.tape.uses:
            module = self.modules[use.name] if use.kind == "norm" and use.name not in norms else None
            if not isinstance(module, nn.modules.batchnorm._BatchNorm):
                continue
            if module.weight is not None and module.bias is not None:
                trainable = module.weight.requires_grad and use.name not in self.tape.fixed
                norms[use.name] = Norm(use.name, module, start, use, trainable)
                start += module.num_features
        return norms

    # --- all layers at once: one operator instead of one for each layer ---

    @functools.cached_property
    def slots(self) -> Tensor:
        """(all gammas,) the component of every gamma's slot."""
        return _joined([self.layers[name].writes for name in self.norms])

    @functools.cached_property
    def norm_of(self) -> Tensor:
        """(all gammas,) the number of every gamma's BatchNorm."""
        sizes = torch.tensor([n.module.num_features for n in self.norms.values()], dtype=torch.long)
        return torch.arange(len(sizes)).repeat_interleave(sizes)

    @functools.cached_property
    def norm_sides(self) -> tuple[Tensor, Tensor, Tensor]:
        """What all uses of BatchNorms read and write, and the gamma between; -1 where there is none. (n,) each."""
        steps = [step for step in self.steps if step.use.kind == "norm"]
        gammas = [torch.full((len(s.writes),), -1) if s.norm is None else self._positions(s.norm) for s in steps]
        return _joined([s.reads for s in steps]), _joined([s.writes for s in steps]), _joined(gammas)

    def _positions(self, norm: Norm) -> Tensor:
        return torch.arange(norm.all.start, norm.all.stop)

    @functools.cached_property
    def weighed(self) -> Tensor:
        """(n,) atoms that a convolution or linear layer reads and needs, unless they are zero."""
        return _joined([s.use.read for s in self.steps if s.use.kind != "norm" and s.use.kind not in CARRYING])

    @functools.cached_property
    def summed(self) -> Tensor:
        """(n,) atoms over which products of activations sum."""
        return _joined([product.atoms for product in self.tape.products if product.sums])

    @functools.cached_property
    def _sides(self) -> tuple[Tensor, Tensor]:
        """The components of all sides of all steps in one row, and for each the number of its side."""
        sides = [side for step in self.steps for side in (step.reads, step.writes)]
        lengths = torch.tensor([len(side) for side in sides], dtype=torch.long)
        return _joined(sides), torch.arange(len(sides)).repeat_interleave(lengths)

    def count_sides(self, live: Tensor | None = None) -> list[tuple[int, int]]:
        """Count what lives (None: everything) of what every step reads and writes."""
        flat, number = self._sides
        alive = number if live is None else number[live[flat]]
        counts = alive.bincount(minlength=2 * len(self.steps)).tolist()
        return list(zip(counts[::2], counts[1::2], strict=True))

    def count_gammas(self, kept: Tensor | None = None) -> dict[str, int]:
        """Count the gammas that every BatchNorm keeps (None: all)."""
        counts = (self.norm_of if kept is None else self.norm_of[kept]).bincount(minlength=len(self.norms))
        return dict(zip(self.norms, counts.tolist(), strict=True))


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.long)
