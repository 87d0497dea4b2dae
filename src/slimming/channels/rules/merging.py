"""Rules of operators that make one tensor of several."""

import torch
from torch import Tensor

from slimming.channels.atoms import broadcast, compress, varying
from slimming.channels.rules.call import Call
from slimming.channels.tape import Tape, UnsupportedOperator


def concatenate(tape: Tape, call: Call) -> Tensor:
    tensors, axis = call.args[0], call.arg(1, "dim", 0) % call.out.ndim
    tensors = [t for t in tensors if t.numel()]  # torch lets an empty one pass
    atoms = call.atoms_of_all(tensors, "a constant is concatenated")
    channels = any(axis in varying(a) for a in atoms)
    if any(set(varying(a)) - {axis} for a in atoms) and channels:
        raise UnsupportedOperator("its operands have channels along different axes")
    if not channels and any(varying(a) for a in atoms):  # along space: the same positions must go everywhere
        if all(torch.equal(a, atoms[0]) for a in atoms):
            return atoms[0]
        return tape.derived("all", broadcast(*(a.shape for a in atoms)), atoms)
    parts = [
        a.expand([t.shape[axis] if i == axis else 1 for i in range(t.ndim)])
        for a, t in zip(atoms, tensors, strict=True)
    ]
    return compress(torch.cat(parts, axis))


def stack(tape: Tape, call: Call) -> Tensor:
    axis = call.arg(1, "dim", 0) % call.out.ndim
    atoms = call.atoms_of_all(call.args[0], "a constant is stacked")
    shape = broadcast(*(a.shape for a in atoms))
    stacked = compress(torch.stack([a.expand(shape) for a in atoms], axis))
    inner = [i for i in varying(stacked) if i != axis]
    tape.flexible(stacked, inner[-1] if inner else None)
    return stacked
