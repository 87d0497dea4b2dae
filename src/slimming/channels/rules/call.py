"""What a rule is given: one operator call, with the atoms and layers behind its tensors."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from slimming.channels.atoms import frozen, varying
from slimming.channels.sizes import Given
from slimming.channels.tape import Tape, UnsupportedOperator


@dataclass
class Call:
    """One operator call: its arguments, its result, and the atoms and layers behind its tensors."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any
    atoms_of: Callable[[Any], Tensor | None]  # None for what does not depend on the input
    owner_of: Callable[[Tensor | None], tuple[str, nn.Module] | None]  # layer of a parameter or buffer
    tensor_name: Callable[[Tensor], str] = str  # of a parameter or buffer in the network
    running: Sequence[nn.Module] = ()  # modules whose forward runs, the innermost last
    sizes: Given = field(default_factory=Given)  # whole numbers that the code gave, with what they are made of

    @property
    def name(self) -> str:
        """The operator's ATen name, the same for its in-place form."""
        name: str = self.func._schema.name
        return name.removeprefix("aten::").rstrip("_")

    @property
    def x(self) -> Tensor:
        """Atoms of the first argument."""
        atoms = self.atoms_of(self.args[0])
        if atoms is None:
            raise UnsupportedOperator("its first argument is a constant")
        return atoms

    def arg(self, index: int, name: str, default: Any = None) -> Any:
        return self.args[index] if len(self.args) > index else self.kwargs.get(name, default)

    def axis(self, index: int, name: str = "dim", default: int = 0) -> int:
        """Return an argument that names an axis of the first one, counted from the front."""
        axis: int = self.arg(index, name, default) % self.args[0].ndim
        return axis

    def only_first(self) -> None:
        """Raise UnsupportedOperator where another argument depends on the input, too."""
        rest = [*self.args[1:], *self.kwargs.values()]
        if any(self.atoms_of(a) is not None for a in rest if isinstance(a, Tensor)):
            raise UnsupportedOperator("a second argument depends on the input")

    def atoms_or_frozen(self, tensor: Tensor) -> Tensor:
        """Return a tensor's atoms; frozen ones for a constant."""
        atoms = self.atoms_of(tensor)
        return frozen(tensor.ndim) if atoms is None else atoms

    def atoms_of_all(self, tensors: Sequence[Tensor], otherwise: str) -> list[Tensor]:
        """Return the atoms of tensors; raise UnsupportedOperator with a reason where one of them is a constant."""
        found = [atoms for tensor in tensors if (atoms := self.atoms_of(tensor)) is not None]
        if len(found) < len(tensors):
            raise UnsupportedOperator(otherwise)
        return found

    def channels(self, tensor: Tensor, axis: int) -> Tensor:
        """Return a tensor's atoms (C,) along `axis`; they must not change along any other axis."""
        atoms = self.atoms_of(tensor)
        if atoms is None:
            raise UnsupportedOperator("its input is a constant")
        axis %= tensor.ndim
        if set(varying(atoms)) - {axis}:
            raise UnsupportedOperator("its channels do not lie along one axis")
        return atoms.reshape(-1).expand(tensor.shape[axis])


Rule = Callable[[Tape, Call], Tensor | list[Tensor]]
