"""Trellis-coded quantization: costs of the subsets and the Viterbi search over lanes.

The four subsets a level can come from are Q0 even, Q0 odd, Q1 even and Q1 odd. What the best member
of each costs depends on the weight alone, so it is one table look-up per subset; the state machine
then chooses among four numbers per weight. In shift-register numbering, states j and j + S/2 lead
to 2j and 2j + 1 only, so a step of the search is adds and minima of contiguous halves.

Here weights are in units of two steps. Metrics are float32, and each operation is one IEEE
operation, so that numpy and torch agree exactly.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from weightvid.quantize.rate import TABLE_MAX, RateModel, lower_envelope
from weightvid.quantize.trellis import Machine

RENORM = 64
"""The least metric is subtracted after every 64 columns, so that metrics stay small."""

FloatMatrix = npt.NDArray[np.float32]

_CELLS = 32
_SUBSETS = 4
_CHUNK_WEIGHTS = 1 << 14


@dataclass(frozen=True, slots=True)
class CostTables:
    """Best member of each subset, by cell of the weight in units of two steps, 32 cells per unit.

    Attributes
    ----------
    point : ndarray of float32, shape (4, cells)
        ``n / 2``; subsets in the order Q0 even, Q0 odd, Q1 even, Q1 odd.
    price : ndarray of float32, shape (4, cells)
        Price of that member, ``4 * lam * bits``.
    level : ndarray of int16, shape (4, cells)
        Its level k.
    middle : int
        Cell that starts at weight 0.
    model : RateModel
        Prices beyond the table.
    lam : float
    zero : bool
        Numbering of the points.
    peaked : bool
        Whether some weights lie beyond the table and take the slow, exact way.
    """

    point: npt.NDArray[np.float32]
    price: npt.NDArray[np.float32]
    level: npt.NDArray[np.int16]
    middle: int
    model: RateModel
    lam: float
    zero: bool
    peaked: bool

    @classmethod
    def build(cls, model: RateModel, lam: float, peak: float, zero: bool) -> CostTables:
        """Tables for magnitudes up to ``peak`` units, at most about ``2 * TABLE_MAX``."""
        reach = int(min(max(peak, 4.0), 2.0 * TABLE_MAX - 8.0)) + 2
        centre = (np.arange(-reach * _CELLS, reach * _CELLS) + 0.5) / _CELLS
        level = np.empty((_SUBSETS, centre.size), np.int64)
        point = np.empty(level.shape)
        far = reach // 4 + 2
        for subset in range(_SUBSETS):
            sign, offset = _numbering(subset, zero)
            members = int(sign) * np.arange(-2 * far, 2 * far + 1, 2) + (subset & 1)
            places = sign * (2.0 * members + offset)
            prices = 4.0 * lam * model.of(members)
            threshold, winner = lower_envelope(places.tolist(), prices.tolist())
            best = winner[np.searchsorted(threshold, centre)]
            level[subset], point[subset] = members[best], places[best]
        price = 4.0 * lam * model.of(level)
        return cls(
            point=point.astype(np.float32),
            price=price.astype(np.float32),
            level=level.astype(np.int16),
            middle=reach * _CELLS,
            model=model,
            lam=lam,
            zero=zero,
            peaked=peak >= reach - 1.0 / _CELLS,
        )


def _numbering(subset: int, zero: bool) -> tuple[float, float]:
    """``n / 2 = sign * (2 k + offset)``: sign and offset of the quantizer of a subset."""
    quantizer = float(subset >> 1)
    return (1.0, quantizer) if zero else (1.0 - 2.0 * quantizer, -0.5)


def _best_members(
    units: npt.NDArray[np.float64], model: RateModel, lam: float, zero: bool
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """``n / 2``, price and level of the cheapest member of each subset for any weights, (4, n).

    Candidates: the nearest member, two to either side, and those nearest to level 0.
    """
    points, prices, levels = [], [], []
    around = np.array([[0], [-1], [1], [-2], [2]])
    for subset in range(_SUBSETS):
        parity = subset & 1
        sign, offset = _numbering(subset, zero)
        nearest = np.rint((sign * units - offset - 2.0 * parity) * 0.25).astype(np.int64)
        middle = np.zeros((2, nearest.size), np.int64) - np.array([[0], [parity]])
        level = 2 * np.concatenate([nearest + around, middle]) + parity
        point = sign * (2.0 * level + offset)
        price = 4.0 * lam * model.of(level)
        best = np.argmin((units - point) ** 2 + price, axis=0)[None]
        points.append(np.take_along_axis(point, best, 0)[0])
        prices.append(np.take_along_axis(price, best, 0)[0])
        levels.append(np.take_along_axis(level, best, 0)[0])
    return np.stack(points), np.stack(prices), np.stack(levels)


@dataclass(slots=True)
class Branches:
    """The machine as tables for a vectorised search; S states, L lanes.

    A branch goes from state ``d * S / 2 + j`` to state ``2 j + w``. Its subset is ``2 q + p`` with
    ``q`` the XOR of some bits of j, and ``p`` that of d, w and some bits of j. A XOR is the parity
    of a sum: where subset ``2 (q & 1) + (p & 1)`` is held in row ``q * width + p`` for all sums q
    and p, the costs of all branches are a strided view of the rows, and none need be copied.

    Attributes
    ----------
    rows : ndarray of intp, shape (R,)
        Subset of each row.
    strides : tuple of int
        In rows: of d, w, and the bits of j, the highest first.
    entering : ndarray of intp, shape (2 * S,)
        Subset on the branch into state ``2 j + w`` from ``j + d * S / 2``, in order d, w, j.
    subset : ndarray of uint8, shape (2 * S,)
        Subset of the branch d into a state, at ``2 * state + d``.
    previous : ndarray of intp, shape (2 * S,)
        Predecessor, at the same place.
    """

    rows: npt.NDArray[np.intp]
    strides: tuple[int, ...]
    entering: npt.NDArray[np.intp]
    subset: npt.NDArray[np.uint8]
    previous: npt.NDArray[np.intp]

    @classmethod
    def of(cls, trellis: Machine) -> Branches:
        """Tables of one machine."""
        half = trellis.states // 2
        entering = np.zeros((2, 2, half), np.intp)
        subset = np.zeros((trellis.states, 2), np.uint8)
        previous = np.zeros((trellis.states, 2), np.intp)
        for state in range(trellis.states):
            for parity in range(2):
                after = trellis.next_state(state, parity)
                branch = 2 * trellis.quantizer(state) + parity
                entering[state // half, after & 1, state % half] = branch
                subset[after, state // half] = branch
                previous[after, state // half] = state
        # The highest bit is d: it is fed back by every machine, and chooses no quantizer in any.
        fed_back = trellis.feedback & (half - 1)
        width = fed_back.bit_count() + 3
        sums = np.arange((trellis.output.bit_count() + 1) * width)
        bits = [half >> (place + 1) for place in range(half.bit_length() - 1)]
        return cls(
            rows=2 * (sums // width & 1) + (sums % width & 1),
            strides=(
                *(1, 1),
                *(bool(trellis.output & bit) * width + bool(fed_back & bit) for bit in bits),
            ),
            entering=entering.ravel(),
            subset=subset.ravel(),
            previous=previous.ravel(),
        )

    def view(self, rows: FloatMatrix) -> npt.NDArray[np.float32]:
        """Costs of all branches from rows of costs of several columns.

        Parameters
        ----------
        rows : ndarray of float32, shape (n, R, L)

        Returns
        -------
        ndarray of float32, shape (n, 2, 2, 2, ..., L)
            By column, d, w, and the bits of j; not to be written.
        """
        column, row, lane = rows.strides
        shape = (len(rows), *(2 for _ in self.strides), rows.shape[2])
        strides = (column, *(row * each for each in self.strides), lane)
        return np.lib.stride_tricks.as_strided(rows, shape, strides, writeable=False)


class LaneBlock:
    """Weights of a block of runs, column by column, and the costs of their subsets.

    Lanes are runs side by side; runs shorter than the block are padded with columns whose subsets
    all cost nothing, which leaves the best path through the real columns as it is.
    """

    def __init__(self, lanes: Sequence[FloatMatrix], tables: Sequence[CostTables]) -> None:
        self.length = max(part.shape[1] for part in lanes)
        self.count = sum(part.shape[0] for part in lanes)
        self._tables = tables
        self._parts: list[tuple[int, int, int]] = []
        self.scaled = np.zeros((self.length, self.count), np.float32)
        self._cells = np.zeros((self.length, self.count), np.uint16)
        first = 0
        for part in lanes:
            runs, size = part.shape
            self.scaled[:size, first : first + runs] = part.T
            self._parts.append((first, first + runs, size))
            first += runs

    def chunks(self) -> Iterator[tuple[int, int]]:
        """Column ranges that keep the costs in cache; each divides the renormalisation period."""
        columns = RENORM
        while columns > 4 and columns * self.count > _CHUNK_WEIGHTS:
            columns //= 2
        for start in range(0, self.length, columns):
            yield start, min(start + columns, self.length)

    def costs(self, start: int, stop: int, rows: npt.NDArray[np.intp]) -> FloatMatrix:
        """Cost of the best member of a subset for columns start..stop.

        Parameters
        ----------
        start, stop : int
        rows : ndarray of intp, shape (R,)
            A subset each; each of the four at least once.

        Returns
        -------
        ndarray of float32, shape (n, R, lanes)
        """
        homes = [int(np.argmax(rows == subset)) for subset in range(_SUBSETS)]
        cost = np.empty((stop - start, len(rows), self.count), np.float32)
        for (first, last, size), table in zip(self._parts, self._tables, strict=True):
            end = max(start, min(stop, size))
            cost[end - start :, :, first:last] = 0.0
            if end == start:
                continue
            weight = self.scaled[start:end, first:last]
            position = weight * np.float32(_CELLS)
            position += np.float32(table.middle)
            top = 2 * table.middle - 1
            np.clip(position, np.float32(0), np.float32(top), out=position)
            # By way of int32, which vectors convert to.
            short = position.astype(np.int32)
            self._cells[start:end, first:last] = short
            cell = short.astype(np.intp)
            error, price = position, np.empty_like(position)
            part = cost[: end - start, :, first:last]
            for subset, home in enumerate(homes):
                table.point[subset].take(cell, None, error, "clip")
                np.subtract(weight, error, out=error)
                error *= error
                table.price[subset].take(cell, None, price, "clip")
                np.add(error, price, out=part[:, home])
            if table.peaked:
                far = np.nonzero((cell == 0) | (cell == top))
                if far[0].size:
                    for home, exact in zip(homes, self._far_costs(weight[far], table), strict=True):
                        part[far[0], home, far[1]] = exact
        for row, subset in enumerate(rows):
            if row != homes[subset]:
                cost[:, row] = cost[:, homes[subset]]
        return cost

    @staticmethod
    def _far_costs(weight: npt.NDArray[np.float32], table: CostTables) -> FloatMatrix:
        exact = weight.astype(np.float64)
        point, price, _ = _best_members(exact, table.model, table.lam, table.zero)
        return ((exact - point) ** 2 + price).astype(np.float32)

    def levels(self, subsets: npt.NDArray[np.uint8]) -> list[npt.NDArray[np.int32]]:
        """Levels of each part, shape (runs, columns), from the subset of every weight."""
        found = []
        for (first, last, size), table in zip(self._parts, self._tables, strict=True):
            whole = np.empty((last - first, size), np.int32)
            # A few columns at a time: the indices are eight times as large as what they index.
            for begin in range(0, size, RENORM):
                part = slice(begin, min(size, begin + RENORM))
                whole[:, part] = self._levels(part, slice(first, last), subsets, table).T
            found.append(whole)
        return found

    def _levels(
        self, part: slice, lanes: slice, subsets: npt.NDArray[np.uint8], table: CostTables
    ) -> npt.NDArray[np.int32]:
        subset = subsets[part, lanes].astype(np.intp)
        cell = self._cells[part, lanes]
        cells = 2 * table.middle
        level: npt.NDArray[np.int32] = np.take(table.level.ravel(), subset * cells + cell).astype(
            np.int32
        )
        if table.peaked:
            far = np.nonzero((cell == 0) | (cell == cells - 1))
            exact = self.scaled[part, lanes][far].astype(np.float64)
            members = _best_members(exact, table.model, table.lam, table.zero)[2]
            level[far] = np.take_along_axis(members, subset[far][None], 0)[0]
        return level


def search_numpy(
    lanes: Sequence[FloatMatrix], tables: Sequence[CostTables], trellis: Machine
) -> list[npt.NDArray[np.int32]]:
    """Cheapest levels of runs searched side by side.

    Parameters
    ----------
    lanes : sequence of float32 ndarray, shapes (runs, columns)
        Weights in units of two steps.
    tables : sequence of CostTables
        One for each of ``lanes``.
    trellis : Machine
    """
    block = LaneBlock(lanes, tables)
    branches = Branches.of(trellis)
    states, count = trellis.states, block.count
    half, bits = states // 2, (2,) * (len(branches.strides) - 2)
    branch = np.empty((2, 2, half, count), np.float32)
    by_bits = branch.reshape(2, 2, *bits, count)
    metrics = np.empty((2, states, count), np.float32)
    metrics[0] = np.float32(np.inf)
    metrics[0, 0] = 0.0
    # Two metrics take turns. States come as 2 j + w, and go as d, j.
    coming = metrics.reshape(2, half, 2, count).swapaxes(1, 2)
    going = metrics.reshape(2, 2, 1, *bits, count)
    taken = np.empty((block.length, states, count), np.bool_)
    decisions = taken.reshape(block.length, half, 2, count).swapaxes(1, 2)
    turn = 0
    for start, stop in block.chunks():
        costs = branches.view(block.costs(start, stop, branches.rows))
        for cost, decision in zip(costs, decisions[start:stop], strict=True):
            np.add(cost, going[turn], out=by_bits)
            turn ^= 1
            np.minimum(branch[0], branch[1], out=coming[turn])
            np.less(branch[1], branch[0], out=decision)
        if stop % RENORM == 0:
            metrics[turn] -= metrics[turn].min(axis=0)
    subsets = trace_back(taken, np.argmin(metrics[turn], axis=0), branches)
    return block.levels(subsets)


def trace_back(
    taken: npt.NDArray[np.bool_], state: npt.NDArray[np.intp], branches: Branches
) -> npt.NDArray[np.uint8]:
    """Subset of every weight along the best paths that end in ``state``, shape (columns, lanes)."""
    length, states, count = taken.shape
    lane = np.arange(count)
    # A branch into a state is 2 * state + d. Of each: where its predecessor's decision lies.
    place = branches.previous * count
    before = (2 * branches.previous).astype(np.uint8)
    branch = np.empty((length, count), np.uint8)
    at = state * count + lane
    double = (2 * state).astype(np.uint8)
    decision = np.empty(count, np.bool_)
    flat = taken.reshape(length, states * count)
    for column in range(length - 1, -1, -1):
        flat[column].take(at, None, decision, "clip")
        entry = np.add(double, decision.view(np.uint8), out=branch[column])
        place.take(entry, None, at, "clip")
        at += lane
        before.take(entry, None, double, "clip")
    return np.take(branches.subset, branch, mode="clip")
