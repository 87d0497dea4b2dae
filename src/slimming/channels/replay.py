"""Running a network a second time without computing, to see whether it still does the same."""

from typing import Any

from torch import Tensor, nn

from slimming.channels.inputs import tensors_in
from slimming.channels.tape import Tape
from slimming.channels.watch import Watcher, flat, run_watched


class Differs(Exception):
    """A second pass does something else than the first."""


class Replay(Watcher):
    """Hands out the results of a first pass; what the network calls must be what it called there, on the same operands."""

    def __init__(self, first: Watcher) -> None:
        super().__init__(Tape(), first.owners, first.names)
        self.first = first

    def known_call(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], leaves: list[Any], operands: list[Tensor]
    ) -> Any:
        step = len(self.log)
        self.log.append((func, *map(self.sign, leaves)))
        if step >= len(self.first.results) or self.log[step] != self.first.log[step]:
            raise Differs
        out = self.first.results[step]
        for tensor in (t for t in flat([out]) if isinstance(t, Tensor)):
            self.learn(tensor, self.first.known[id(tensor)][1])
        return out


def does_the_same(first: Watcher, copied: nn.Module, example: Any) -> bool:
    """Return whether the copy, its modes changed since, would do to the example what it did when it was watched."""
    replay = Replay(first)
    try:
        outputs = tensors_in(run_watched(replay, copied, example))
    except Exception:  # Differs, unless the network's code wraps it
        return False
    return [*replay.log, ("output", *(replay.serial.get(id(t)) for t in outputs))] == first.log
