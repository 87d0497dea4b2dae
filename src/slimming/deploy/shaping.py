"""Shaping a pruned network for an engine: which of several networks that compute the same is fastest there.

Engines compute in blocks of 8 or 16 channels, and a selection before a BatchNorm takes a tensor out of that layout. So widths
get zero channels, and a selecting BatchNorm may read the whole tensor instead, gamma = beta = 0 where it selected nothing.
What pays depends on the engine, the network and the machine: whole networks are timed, the dense one beside them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from slimming.channels.embedding import embed, selecting
from slimming.channels.trace import trace
from slimming.errors import CheckpointError, PlanError, check_choice, check_number

BLOCKS = (1, 4, 8, 16)  # 1: widths as they were pruned
SELECTIONS = ("select", "full")
DENSE = "dense"
LARGEST_BLOCK = 256


@dataclass(frozen=True)
class Shape:
    """How a pruned network is laid out.

    Attributes:
        block: convolutions read and write multiples of it.
        selections: what a selecting BatchNorm does: `select` as it is, or read the `full` tensor.
    """

    block: int = 1
    selections: str = "select"

    def __post_init__(self) -> None:
        check_number("shape.block", self.block, 1, LARGEST_BLOCK, whole=True)
        check_choice("shape.selections", self.selections, SELECTIONS)

    @property
    def label(self) -> str:
        """Name the shape in tables: `block 8, full`."""
        return f"block {self.block}, {self.selections}"

    def record(self) -> dict[str, Any]:
        """Return plain data, which `replayed` reads; with the checkpoint and the versions it determines the file."""
        return {"block": self.block, "selections": self.selections}


AS_PRUNED = Shape()


class Shaped(NamedTuple):
    """Different networks by their shape, and why others could not be made."""

    made: dict[Shape, nn.Module]
    refused: dict[Shape, str]


def shaped(thin: nn.Module, example: Any, shapes: Sequence[Shape]) -> Shaped:
    """Make the networks of several shapes, each proven equal to the thin one; of several alike the first.

    Args:
        thin: a pruned network, or any other; it is not changed.
        example: an input with a batch of 2 or more.
    """
    graph, names = trace(thin, example), {"select": [], "full": selecting(thin)}
    made: dict[Shape, nn.Module] = {}
    seen: list[Any] = []
    refused: dict[Shape, str] = {}
    for shape in shapes:
        try:
            found = thin if shape == AS_PRUNED else embed(graph, shape.block, names[shape.selections])
        except PlanError as error:
            refused[shape] = str(error)
            continue
        if (layout := _layout(found)) not in seen:
            seen.append(layout)
            made[shape] = found
    return Shaped(made, refused)


def _layout(model: nn.Module) -> Any:
    """Return what tells shapes of one network apart."""
    return {key: value.shape for key, value in model.state_dict().items()}, selecting(model)


def shapes_of(thin: nn.Module, blocks: Sequence[int] = BLOCKS) -> list[Shape]:
    """Return the shapes worth trying: every block, and full width only where something selects."""
    return [Shape(block, kind) for kind in SELECTIONS[: 2 if selecting(thin) else 1] for block in blocks]


@dataclass(frozen=True)
class Decision:
    """Which shape was chosen, and what was timed.

    Attributes:
        shape: the fastest.
        dense_ms: of the dense network, None where there was none.
        times_ms: of every shape.
    """

    shape: Shape
    times_ms: Mapping[Shape, float]
    dense_ms: float | None = None

    @property
    def beats_dense(self) -> bool | None:
        return None if self.dense_ms is None else self.times_ms[self.shape] < self.dense_ms

    def table(self) -> str:
        """Return a table for people, fastest first: time, and how many times as fast as the dense network and as pruned."""
        pruned = self.times_ms.get(AS_PRUNED)
        rows = sorted(self.times_ms.items(), key=lambda row: row[1])
        lines = [f"{'shape':28} {'ms':>9} {'x dense':>8} {'x pruned':>9}"]
        if self.dense_ms is not None:
            lines.append(_row(DENSE, self.dense_ms, self.dense_ms, pruned))
        lines += [_row(shape.label, ms, self.dense_ms, pruned) + " <-" * (shape == self.shape) for shape, ms in rows]
        if self.beats_dense is False:
            lines.append("no shape of the pruned network is faster than the dense network in this engine")
        return "\n".join(lines)

    def record_times(self) -> list[dict[str, Any]]:
        """Return what was timed as plain data: the dense network first, then the shapes in the order of their trial."""
        dense = [] if self.dense_ms is None else [{"shape": DENSE, "ms": self.dense_ms}]
        return dense + [{"shape": shape.record(), "ms": ms} for shape, ms in self.times_ms.items()]


def _row(label: str, ms: float, dense: float | None, pruned: float | None) -> str:
    ratios = [f"{other / ms:.2f}" if other else "-" for other in (dense, pruned)]
    return f"{label:28} {ms:9.2f} {ratios[0]:>8} {ratios[1]:>9}"


def choose(
    candidates: Mapping[Shape, Any],
    measure: Callable[[dict[Any, Any]], Mapping[Any, float]],
    dense: Any = None,
    margin: float = 0.01,
) -> Decision:
    """Time the candidates, and the dense network if it is given, and choose the fastest.

    Args:
        candidates: engine models, by their shape.
        measure: {key: engine model} -> {key: milliseconds}; it should time them in turns.
        dense: the engine model of the dense network.
        margin: a share of the time: of shapes that are as fast as the fastest but for this, the one that adds the least is
            chosen, so that noise does not.
    """
    runs: dict[Any, Any] = dict(candidates)
    if dense is not None:
        runs = {DENSE: dense} | runs
    times = measure(runs)
    own = {shape: float(times[shape]) for shape in candidates}
    limit = min(own.values()) * (1 + margin)
    fast = [shape for shape, ms in own.items() if ms <= limit]
    best = min(fast, key=lambda shape: (shape.selections == "full", shape.block))
    return Decision(best, own, None if dense is None else float(times[DENSE]))


def replayed(record: Any, path: Any) -> Shape:
    """Return the shape that an export recorded (`Shape.record`).

    Raises:
        CheckpointError: it is none.
    """
    try:
        return Shape(record["block"], record["selections"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its shape cannot be read ({type(error).__name__}: {error})") from error
