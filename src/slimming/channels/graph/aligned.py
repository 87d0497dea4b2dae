"""The network as `ties=aligned` sees it: a channel leaves every tensor that it lives in, or none.

A BatchNorm then ties what it reads to what it writes; what is tied so is called a class. Where a class goes, every tensor gets
narrower by it, and no BatchNorm has to select or scatter. It goes only where it is zero: behind BatchNorms its pruned gammas
see to that; in a tensor that a convolution or linear layer writes without a BatchNorm, filters of zeros have to.
"""

import functools

import torch
from torch import Tensor

from slimming.channels.graph.liveness import zero_atoms
from slimming.channels.graph.structure import Structure
from slimming.channels.tape import WITH_FILTERS


class Aligned(Structure):
    """A Structure whose components are the classes; gammas have the same numbers.

    Args:
        graph: of the same network.
    """

    def __init__(self, graph: Structure) -> None:
        super().__init__(graph.model, graph.recording, graph.distrusted)

    def _components(self) -> Tensor:
        return self.recording.aligned

    @functools.cached_property
    def bare(self) -> Tensor:
        """(atoms,) bool: written by a filter, in a tensor of which a layer reads what no gamma makes zero."""
        zero = zero_atoms(self, torch.zeros(self.count, dtype=torch.bool))
        read = torch.cat((self.weighed, self.summed))
        tensor = self.recording.component
        bare = torch.zeros(self.tape.count, dtype=torch.bool)
        written = bare.clone()
        bare[tensor[read[~zero[read]]]] = True
        for use in self.tape.uses:
            # The bias of a layer without a module of its own has a name that no plan knows.
            if use.kind in WITH_FILTERS and (use.name in self.modules or not use.bias):
                written[use.write] = True
        found: Tensor = bare[tensor] & written
        return found

    def silenced(self, kept: Tensor) -> Tensor:
        gone = torch.zeros(self.tape.count, dtype=torch.bool)
        gone[self.slots[~kept]] = True
        silenced: Tensor = self.bare & gone[self.component]
        return silenced

    def bands(self) -> list[Tensor]:
        """Return gammas, (n,) each, whose classes have gammas in the same BatchNorms; of every band those of its first one.

        So a stream is one band, and so is what one layer of a DenseNet adds. Where every band is a multiple of some width,
        every tensor is.
        """
        first = torch.full((self.tape.count,), len(self.norms)).scatter_reduce(0, self.slots, self.norm_of, "amin")
        marks = torch.randint(2**62, (len(self.norms),), generator=torch.Generator().manual_seed(0))
        where = torch.zeros(self.tape.count, dtype=torch.long).index_add_(0, self.slots, marks[self.norm_of])
        gammas = (first[self.slots] == self.norm_of).nonzero().flatten()
        _, band = where[self.slots[gammas]].unique(return_inverse=True)
        return list(gammas[band.argsort(stable=True)].split(band.bincount().tolist()))
