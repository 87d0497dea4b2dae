"""Which channels to remove so that a table of the layers' times says a network takes so long: the most score for the time.

A column holds the units that live in the same BatchNorms. Its weakest units go first, down to multiples of `step` channels, as
engines compute in blocks. Of all columns, the one that loses the least score for the time that it saves goes next. Several
steps ahead are looked at: where a layer gets faster with every 16 channels, 8 buy nothing and 16 do.

Source: Shen et al., Structural Pruning via Latency-Saliency Knapsack (HALP), NeurIPS 2022, arXiv:2210.06659: a table of
latencies over widths, and a knapsack of groups of channels. It is solved here by the best ratio, one move after the other: the
times of neighbouring layers depend on each other, and a smaller budget takes what a larger one takes, and more.
"""

import bisect
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from slimming.channels.criteria import Choice

if TYPE_CHECKING:
    from slimming.channels.graph.deciding import Settling
    from slimming.channels.graph.liveness import Solution
    from slimming.channels.graph.structure import Structure

BLOCK = 16  # channels that engines compute at once, at most; `LayerTimes` has a factor for what is no multiple
AHEAD = 8  # steps that are looked at
BACK = 8  # moves that are taken back where the next one falls far below what is asked
NEAR = 0.01  # a share of the dense time: a choice that is farther below what is asked is replaced by other moves

Widths = tuple[float, float]  # (inputs, outputs) of a layer


@dataclass(frozen=True)
class LayerTimes:
    """Milliseconds that a layer takes over its widths, from a few that were measured.

    Attributes:
        ins, outs: widths that were measured, ascending; a single one: the time does not depend on it.
        ms: for each of `ins` a row over `outs`.
        odd: how many times as long it takes where the inputs, and where the outputs, are no multiple of BLOCK.
    """

    ins: Sequence[int]
    outs: Sequence[int]
    ms: Sequence[Sequence[float]]
    odd: tuple[float, float] = (1.0, 1.0)

    def __call__(self, ins: float, outs: float) -> float:
        """Return the milliseconds at any widths: linear in each between the measured ones, and beyond."""
        (i, a), (o, b) = _place(self.ins, ins), _place(self.outs, outs)
        upper = self.ms[i]
        lower = self.ms[min(i + 1, len(self.ms) - 1)]
        j = min(o + 1, len(upper) - 1)
        found = (1 - a) * ((1 - b) * upper[o] + b * upper[j]) + a * ((1 - b) * lower[o] + b * lower[j])
        for width, axis, factor in ((ins, self.ins, self.odd[0]), (outs, self.outs, self.odd[1])):
            if width % BLOCK and width < axis[-1]:
                found *= factor
        return max(found, 0.0)


def _place(axis: Sequence[int], width: float) -> tuple[int, float]:
    """Return after which entry of the axis a width lies, and how far on the way to the next."""
    if len(axis) == 1:
        return 0, 0.0
    i = min(max(bisect.bisect_right(axis, width) - 1, 0), len(axis) - 2)
    return i, (width - axis[i]) / (axis[i + 1] - axis[i])


@dataclass
class Column:
    """Units that live in the same BatchNorms.

    Attributes:
        units: weakest first.
        losses: what the removal of the first so many of them loses, one more entry than units.
        levels: how many may go, ascending, the first 0.
        rates: step -> (inputs, outputs) that it loses with each of them.
        level: where it stands in `levels`.
    """

    units: Tensor
    losses: list[float]
    levels: list[int]
    rates: dict[int, Widths]
    level: int = 0

    @property
    def gone(self) -> int:
        return self.levels[self.level]


class Move(NamedTuple):
    """A column's step to a level: what it loses for each millisecond, and the milliseconds that it saves."""

    price: float
    saved: float
    level: int


@dataclass(frozen=True)
class Picked:
    """What goes for some time: (U,) bool, and the share of the dense network's time that the table says remains."""

    removed: Tensor
    share: float


@dataclass
class _State:
    columns: list[int]  # the level of each
    widths: list[Widths]  # of each step
    total: float
    moves: dict[int, Move | None] = field(default_factory=dict)  # the best of each column, where known


class Knapsack:
    """The choices for all times, from the whole network down to the least that the constraints allow.

    Args:
        choice: the units and their scores.
        settling: says what stays when units go.
        times: by the name of a layer; the others take no time.
        step: widths of columns are multiples of it.
        additive: scores are losses that add up. Else squared scores do, for each BatchNorm of a column; their sum is divided by
            the share of the column's squared scores that remains, so that no layer is emptied because its channels are dear.
    """

    def __init__(
        self,
        choice: Choice,
        settling: "Settling",
        times: Mapping[str, LayerTimes],
        step: int,
        additive: bool = False,
    ) -> None:
        self.graph = settling.graph
        self.count = len(choice.score)
        evaluated = self.graph.steps[: self.graph.recording.evaluated[0]]  # the others are those of train mode
        steps = [(number, times.get(s.use.name)) for number, s in enumerate(evaluated)]
        self.times = {number: found for number, found in steps if found is not None}
        nothing = torch.zeros(self.count, dtype=torch.bool)
        dense = _widths(self.graph, settling.outcome(nothing))
        self.columns = _columns(choice, settling, dense, set(self.times), step, additive)
        self.sharing: dict[int, set[int]] = {}  # step -> columns that change it
        for number, column in enumerate(self.columns):
            for touched in column.rates:
                self.sharing.setdefault(touched, set()).add(number)
        self.dense_ms = sum(table(*dense[number]) for number, table in self.times.items())
        self.state = _State([0] * len(self.columns), list(dense), self.dense_ms)
        self.path: list[tuple[int, int, float]] = [(-1, 0, self.dense_ms)]  # (column, level, total) after every move
        self.dense = dense

    def pick(self, share: float) -> Picked:
        """Return the choice whose time by the table is nearest to a share of the dense network's."""
        aim = share * self.dense_ms
        while self.path[-1][2] > aim and self._extend():
            pass
        after = next((n for n, (*_, total) in enumerate(self.path) if total <= aim), len(self.path) - 1)
        before = max(after - 1, 0)
        levels, total = self._levels(after), self.path[after][2]
        if abs(total - aim) > NEAR * self.dense_ms:
            found = [(levels, total), *self._alternatives(before, aim)]
            levels, total = min(found, key=lambda pair: (self._off(pair[1], aim), self._loss(pair[0])))
        return self._picked(levels, total)

    def between(self, above: Picked, below: Picked, share: float) -> Picked:
        """Return the choice nearest to a time by the table on the way from one to another, a step of a column at a time."""
        levels, ends = self._levels_of(above), self._levels_of(below)
        state, found = self._at(levels), []
        for number, (level, end) in enumerate(zip(levels, ends, strict=True)):
            for to in range(level, end, 1 if level < end else -1):
                self._make(state, number, to + (1 if level < end else -1))
                found.append((list(state.columns), state.total))
        found.pop()  # the other end
        aim = share * self.dense_ms
        return self._picked(*min(found, key=lambda pair: abs(pair[1] - aim))) if found else above

    def _levels_of(self, picked: Picked) -> list[int]:
        return [column.levels.index(int(picked.removed[column.units].sum())) for column in self.columns]

    def _picked(self, levels: list[int], total: float) -> Picked:
        removed = torch.zeros(self.count, dtype=torch.bool)
        for column, level in zip(self.columns, levels, strict=True):
            removed[column.units[: column.levels[level]]] = True
        return Picked(removed, total / self.dense_ms)

    @property
    def least(self) -> Picked:
        """The choice in which everything goes that may."""
        return self.pick(0.0)

    # --- the path of the best ratios ---

    def _extend(self) -> bool:
        """Make one more move of the path; return whether there was any."""
        if moved := self._move(self.state):
            self.path.append((*moved, self.state.total))
        return moved is not None

    def _move(self, state: _State, most: float = math.inf) -> tuple[int, int] | None:
        """Make the best move of all columns that saves at most so many milliseconds; return the column and its level."""
        for number in range(len(self.columns)):
            if number not in state.moves:
                state.moves[number] = self._best_move(state, number, most)
        found = [(move, number) for number, move in state.moves.items() if move is not None and move.saved <= most]
        if not found:
            return None
        move, number = min(found, key=lambda pair: (pair[0].price, -pair[0].saved, pair[1]))
        self._make(state, number, move.level)
        return number, move.level

    def _best_move(self, state: _State, number: int, most: float) -> Move | None:
        """Return the step of a column, one or several levels, that loses least for the time saved; None if none saves."""
        column, level = self.columns[number], state.columns[number]
        moves = [
            Move((column.losses[column.levels[to]] - column.losses[column.levels[level]]) / saved, saved, to)
            for to in range(level + 1, min(level + AHEAD, len(column.levels) - 1) + 1)
            if 1e-12 < (saved := self._saved(state, number, to)) <= most
        ]
        return min(moves, key=lambda move: (move.price, -move.saved), default=None)

    def _saved(self, state: _State, number: int, to: int) -> float:
        """Return the milliseconds that a column saves at another level."""
        column = self.columns[number]
        more = column.levels[to] - column.levels[state.columns[number]]
        saved = 0.0
        for touched, (ins, outs) in column.rates.items():
            now, table = state.widths[touched], self.times[touched]
            saved += table(*now) - table(*_less(now, ins * more, outs * more))
        return saved

    def _make(self, state: _State, number: int, to: int) -> None:
        column = self.columns[number]
        more = column.levels[to] - column.levels[state.columns[number]]
        state.total -= self._saved(state, number, to)
        state.columns[number] = to
        for touched, (ins, outs) in column.rates.items():
            state.widths[touched] = _less(state.widths[touched], ins * more, outs * more)
            for other in self.sharing[touched]:
                state.moves.pop(other, None)

    def _levels(self, upto: int) -> list[int]:
        levels = [0] * len(self.columns)
        for number, level, _ in self.path[1 : upto + 1]:
            levels[number] = level
        return levels

    def _alternatives(self, before: int, aim: float) -> Iterator[tuple[list[int], float]]:
        """Yield levels and times around a time that the path jumps over.

        From each of the last points before the jump: it, what a single column makes of it, and where it leads by moves that do
        not fall far below the aim.
        """
        for point in range(before, max(before - BACK, -1), -1):
            levels = self._levels(point)
            state = self._at(levels)
            yield levels, state.total
            for number, column in enumerate(self.columns):
                for to in range(levels[number] + 1, len(column.levels)):
                    yield [*levels[:number], to, *levels[number + 1 :]], state.total - self._saved(state, number, to)
            while self._move(state, state.total - aim + NEAR * self.dense_ms):
                state.moves.clear()  # what was allowed may be too much now
                yield list(state.columns), state.total

    def _at(self, levels: list[int]) -> _State:
        state = _State([0] * len(levels), list(self.dense), self.dense_ms)
        for number, level in enumerate(levels):
            self._make(state, number, level)
        return state

    def _off(self, total: float, aim: float) -> float:
        """Return how far a time is from what is asked, beyond half of NEAR."""
        return max(abs(total - aim) - NEAR / 2 * self.dense_ms, 0.0)

    def _loss(self, levels: list[int]) -> float:
        return sum(c.losses[c.levels[level]] for c, level in zip(self.columns, levels, strict=True))


def _less(widths: Widths, ins: float, outs: float) -> Widths:
    return round(max(widths[0] - ins, 0.0), 6), round(max(widths[1] - outs, 0.0), 6)


def _widths(graph: "Structure", solution: "Solution") -> list[Widths]:
    """Return (inputs, outputs) of every step; of a BatchNorm the channels that it keeps, twice."""
    gammas = graph.count_gammas(solution.kept)
    found: list[Widths] = []
    for step, sides in zip(graph.steps, graph.count_sides(solution.live), strict=True):
        kept = gammas.get(step.use.name)
        found.append(sides if kept is None else (kept, kept))
    return found


def _columns(
    choice: Choice, settling: "Settling", dense: list[Widths], timed: set[int], step: int, additive: bool
) -> list[Column]:
    """Gather units into columns, those that can go; each removed by itself shows what its units take with them."""
    pairs = torch.stack((choice.unit, choice.layer)).unique(dim=1).T.tolist()
    norms = {unit: tuple(n for _, n in group) for unit, group in itertools.groupby(pairs, lambda pair: pair[0])}
    members: dict[tuple[int, ...], list[int]] = {}
    for unit, signature in sorted(norms.items()):
        members.setdefault(signature, []).append(unit)
    columns = []
    for units in members.values():
        order = torch.tensor(units)
        order = order[choice.score[order].argsort(stable=True)]
        removed = torch.zeros(len(choice.score), dtype=torch.bool)
        removed[order] = True
        solution = settling.outcome(removed)
        stays = removed.new_zeros(len(removed))
        stays[choice.unit[solution.kept[choice.gammas]]] = True
        gone = int((removed & ~stays).sum())
        if gone:
            rates = _rates(dense, _widths(settling.graph, solution), gone, timed)
            losses = _losses(choice.score[order], None if additive else float(choice.size[order].double().mean()))
            columns.append(Column(order, losses, _levels(len(units), gone, step), rates))
    return [column for column in columns if len(column.levels) > 1]


def _losses(scores: Tensor, norms: float | None) -> list[float]:
    """Return what is lost with the first so many of ascending scores, from none to all.

    Args:
        norms: BatchNorms that each of them is in; None: the scores are losses that add up.
    """
    if norms is None:
        return [0.0, *scores.cumsum(0).tolist()]
    energy = scores.square()
    gone = torch.cat((energy.new_zeros(1), energy.cumsum(0)))
    whole = gone[-1].clamp_min(1e-30)
    found: list[float] = (norms * gone * whole / (whole - gone).clamp_min(1e-12 * whole)).tolist()
    return found


def _rates(dense: list[Widths], thin: list[Widths], gone: int, timed: set[int]) -> dict[int, Widths]:
    lost = {n: ((dense[n][0] - thin[n][0]) / gone, (dense[n][1] - thin[n][1]) / gone) for n in timed}
    return {n: widths for n, widths in sorted(lost.items()) if any(widths)}


def _levels(size: int, gone: int, step: int) -> list[int]:
    """Return how many of `size` units may go, at most `gone`, so that a multiple of `step` stays."""
    return [0, *(size - kept for kept in range((size - 1) // step * step, 0, -step) if size - kept <= gone)]


def record(times: Mapping[str, LayerTimes]) -> dict[str, Any]:
    """Return tables as plain data; layers that share one name it once."""
    tables = list({id(table): table for table in times.values()}.values())
    number = {id(table): n for n, table in enumerate(tables)}
    plain = [{"ins": [*t.ins], "outs": [*t.outs], "ms": [[*row] for row in t.ms], "odd": [*t.odd]} for t in tables]
    return {"layers": {name: number[id(table)] for name, table in times.items()}, "tables": plain}


def read(data: Mapping[str, Any]) -> dict[str, LayerTimes]:
    """Return the tables of `record`; ValueError, TypeError or KeyError where the data are of another kind."""
    tables = []
    for entry in data["tables"]:
        table = LayerTimes(entry["ins"], entry["outs"], entry["ms"], tuple(entry["odd"]))
        ascending = all(len(a) and sorted(set(a)) == list(a) for a in (table.ins, table.outs))
        if not ascending or [len(row) for row in table.ms] != [len(table.outs)] * len(table.ins) or len(table.odd) != 2:
            raise ValueError("a layer's widths do not fit its times")
        table(1, 1)
        tables.append(table)
    return {name: tables[number] for name, number in data["layers"].items()}
