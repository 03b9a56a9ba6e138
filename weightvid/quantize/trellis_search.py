"""Trellis-coded quantization: the Viterbi encoder.

Minimises over each run ``sum (w - value)^2 + lam * (4 * step)^2 * bits(k)`` over all sequences of
levels k. ``bits`` is a static price of the level alone, see `weightvid.quantize.rate`.

The four subsets a level can come from are Q0 even, Q0 odd, Q1 even and Q1 odd. What the best member
of each costs depends on the weight alone, so it is one table look-up per subset; the state machine
then chooses among four numbers per weight. In shift-register numbering, states j and j + S/2 lead
to 2j and 2j + 1 only, so a step of the search is adds and minima of contiguous halves.

Runs of several matrices are searched side by side, so that small tensors also make long vectors.
Metrics are float32, and each operation is one IEEE operation: numpy and torch agree exactly.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from weightvid.errors import QuantizationError
from weightvid.quantize.params import MAX_LEVEL
from weightvid.quantize.rate import TABLE_MAX, RateModel, check_range
from weightvid.quantize.trellis import DEFAULT_STATES, Machine, machine

LAM = 0.09
"""Default price of a bit in squares of ``4 * step``; see tools/results/trellis.md."""

FloatMatrix = npt.NDArray[np.float32]

_CELLS = 32
_SUBSETS = 4
RENORM = 64
_LANES = 2048
_MIN_LANES = 256
_CHUNK_WEIGHTS = 1 << 14
_DECISION_BYTES = 1 << 26
_SAMPLE = 1 << 16


@dataclass(frozen=True, slots=True)
class TrellisConfig:
    """How the encoder searches.

    Attributes
    ----------
    states : int
        4, 8, 16, 32 or 64; the time grows in proportion from 16 on.
    lam : float
        Price of a bit in squares of ``4 * step``, >= 0; 0 minimises the squared error alone. As
        ``4 * step`` is the step of the plain quantizer, it compares with `rdoq.LAM`.
    axis : int
        1, each row is a run; 0, each column is one.
    iterations : int
        Rounds of fitting the rate model to the trellis's own levels (on a sample of runs) when no
        model is given.
    """

    states: int = DEFAULT_STATES
    lam: float = LAM
    axis: int = 1
    iterations: int = 1

    def __post_init__(self) -> None:
        machine(self.states)
        if not (np.isfinite(self.lam) and self.lam >= 0.0):
            raise QuantizationError(f"lam must be finite and at least 0, not {self.lam!r}")
        if self.axis not in (0, 1):
            raise QuantizationError(f"axis must be 0 or 1, not {self.axis}")


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
    peaked : bool
        Whether some weights lie beyond the table and take the slow, exact way.
    """

    point: npt.NDArray[np.float32]
    price: npt.NDArray[np.float32]
    level: npt.NDArray[np.int16]
    middle: int
    model: RateModel
    lam: float
    peaked: bool

    @classmethod
    def build(cls, model: RateModel, lam: float, peak: float) -> CostTables:
        """Tables for magnitudes up to ``peak`` units, at most about ``2 * TABLE_MAX``."""
        reach = int(min(max(peak, 4.0), 2.0 * TABLE_MAX - 8.0)) + 2
        centre = (np.arange(-reach * _CELLS, reach * _CELLS) + 0.5) / _CELLS
        point, price, level = _best_members(centre, model, lam)
        return cls(
            point=point.astype(np.float32),
            price=price.astype(np.float32),
            level=level.astype(np.int16),
            middle=reach * _CELLS,
            model=model,
            lam=lam,
            peaked=peak >= reach - 1.0 / _CELLS,
        )


def _best_members(
    units: npt.NDArray[np.float64], model: RateModel, lam: float
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """``n / 2``, price and level of the cheapest member of each subset, shapes (4, n).

    Candidates: the nearest member, two to either side, and those nearest to level 0.
    """
    points, prices, levels = [], [], []
    around = np.array([[0], [-1], [1], [-2], [2]])
    for subset in range(_SUBSETS):
        mirror, parity = 1 - (subset & 2), subset & 1
        nearest = np.rint((mirror * units + 0.5 - 2.0 * parity) * 0.25).astype(np.int64)
        middle = np.zeros((2, nearest.size), np.int64) - np.array([[0], [parity]])
        level = 2 * np.concatenate([nearest + around, middle]) + parity
        point = mirror * (2.0 * level - 0.5)
        price = 4.0 * lam * model.of(level)
        best = np.argmin((units - point) ** 2 + price, axis=0)[None]
        points.append(np.take_along_axis(point, best, 0)[0])
        prices.append(np.take_along_axis(price, best, 0)[0])
        levels.append(np.take_along_axis(level, best, 0)[0])
    return np.stack(points), np.stack(prices), np.stack(levels)


def quantize(
    weights: FloatMatrix,
    step: float,
    config: TrellisConfig | None = None,
    rate_model: RateModel | None = None,
) -> npt.NDArray[np.int32]:
    """Levels of a matrix of weights.

    Parameters
    ----------
    weights : ndarray of float32, shape (R, C)
        Finite.
    step : float
        As in `weightvid.quantize.trellis`: a quarter of the plain quantizer's step. Above 0,
        rounded to float32.
    config : TrellisConfig, optional
    rate_model : RateModel, optional
        Price of levels; fitted to these weights when absent.

    Returns
    -------
    ndarray of int32, shape (R, C)
        ``|level|`` at most 2**22.

    Raises
    ------
    QuantizationError
        For weights that are not a finite matrix, or a step that is not positive or is too small.
    """
    job = TrellisJob(weights, step, rate_model)
    return quantize_many([job], config)[0]


@dataclass(frozen=True, slots=True)
class TrellisJob:
    """One matrix: weights (R, C), step, and the rate model unless it is to be fitted."""

    weights: FloatMatrix
    step: float
    rate_model: RateModel | None = None


def quantize_many(
    jobs: Sequence[TrellisJob], config: TrellisConfig | None = None, backend: str = "auto"
) -> list[npt.NDArray[np.int32]]:
    """Quantize matrices together; the levels are those of `quantize` on each alone.

    Parameters
    ----------
    jobs : sequence of TrellisJob
        Small matrices gain most from company: runs of all of them fill the vectors.
    config : TrellisConfig, optional
    backend : {"auto", "numpy", "torch"}
        Same levels either way. "auto" takes whichever was measured faster on a CPU: numpy.

    Raises
    ------
    QuantizationError
        As for `quantize`; also for an unknown backend.
    """
    config = config or TrellisConfig()
    search = _backend(backend)
    normalised = [_normalise(job, config.axis) for job in jobs]
    models: list[RateModel | None] = [job.rate_model for job in jobs]
    open_jobs = [i for i, model in enumerate(models) if model is None and normalised[i].size]
    samples = {i: _sample_runs(normalised[i]) for i in open_jobs}
    for i in open_jobs:
        models[i] = RateModel.from_levels(np.rint(samples[i] * 0.5 + 0.25).astype(np.int32))
    for _ in range(config.iterations):
        fitted = _search_all(
            [samples[i] for i in open_jobs], [models[i] for i in open_jobs], config, search
        )
        for i, levels in zip(open_jobs, fitted, strict=True):
            models[i] = RateModel.from_levels(levels)
    found = _search_all(normalised, models, config, search)
    return [np.ascontiguousarray(k.T) if config.axis == 0 else k for k in found]


def _normalise(job: TrellisJob, axis: int) -> FloatMatrix:
    """Weights in units of two steps, runs as rows."""
    weights = np.asarray(job.weights, np.float32)
    if weights.ndim != 2:
        raise QuantizationError(f"weights must be a matrix, not {weights.ndim}-dimensional")
    step = np.float32(job.step)
    check_range(weights, float(step), 4.0 * (MAX_LEVEL - 2))
    scaled = weights / (step + step)
    return scaled.T if axis == 0 else scaled


def _sample_runs(runs: FloatMatrix) -> FloatMatrix:
    """About 65,536 weights of evenly spaced runs (starts of runs, when they are very long)."""
    if runs.size <= _SAMPLE:
        return runs
    length = min(runs.shape[1], _SAMPLE // 16)
    count = max(1, _SAMPLE // length)
    stride = max(1, runs.shape[0] // count)
    return runs[::stride, :length]


@dataclass(frozen=True, slots=True)
class _Lanes:
    """Runs searched side by side: consecutive lanes of jobs, by job."""

    length: int
    parts: tuple[tuple[int, int, int], ...]
    """(job, first run, one past the last run)."""

    @property
    def count(self) -> int:
        return sum(stop - start for _, start, stop in self.parts)


def _plan(shapes: Iterable[tuple[int, int]], lanes: int) -> list[_Lanes]:
    """Group runs of like length into blocks of at most ``lanes``; padding below a third."""
    blocks: list[_Lanes] = []
    parts: list[tuple[int, int, int]] = []
    length = used = 0
    order = sorted(
        ((runs, size, job) for job, (runs, size) in enumerate(shapes) if runs and size),
        key=lambda item: -item[1],
    )
    for runs, size, job in order:
        start = 0
        while start < runs:
            if parts and (used == lanes or (3 * size < 2 * length and used >= 64)):
                blocks.append(_Lanes(length, tuple(parts)))
                parts, used = [], 0
            if not parts:
                length = size
            stop = min(runs, start + lanes - used)
            parts.append((job, start, stop))
            used += stop - start
            start = stop
    if parts:
        blocks.append(_Lanes(length, tuple(parts)))
    return blocks


class _Search(Protocol):
    def __call__(
        self, lanes: Sequence[FloatMatrix], tables: Sequence[CostTables], trellis: Machine
    ) -> list[npt.NDArray[np.int32]]: ...


def _backend(name: str) -> _Search:
    if name in ("auto", "numpy"):
        return search_numpy
    if name == "torch":
        from weightvid.quantize.trellis_torch import search_torch

        return search_torch
    raise QuantizationError(f"no trellis backend {name!r}; choose auto, numpy or torch")


def _search_all(
    runs: Sequence[FloatMatrix],
    models: Sequence[RateModel | None],
    config: TrellisConfig,
    search: _Search,
) -> list[npt.NDArray[np.int32]]:
    trellis = machine(config.states)
    found = [np.zeros(matrix.shape, np.int32) for matrix in runs]
    tables = [
        CostTables.build(model, config.lam, float(np.abs(matrix).max()))
        if model is not None and matrix.size
        else None
        for matrix, model in zip(runs, models, strict=True)
    ]
    longest = max((matrix.shape[1] for matrix in runs), default=1)
    lanes = min(_LANES, max(_MIN_LANES, _DECISION_BYTES // (config.states * max(longest, 1))))
    for block in _plan((matrix.shape for matrix in runs), lanes):
        parts = [runs[job][start:stop] for job, start, stop in block.parts]
        prices = [table for job, _, _ in block.parts if (table := tables[job]) is not None]
        for (job, start, stop), levels in zip(
            block.parts, search(parts, prices, trellis), strict=True
        ):
            found[job][start:stop] = levels
    return found


@dataclass(slots=True)
class Branches:
    """The machine as index tables for a vectorised search; S states, L lanes.

    Attributes
    ----------
    entering : ndarray of intp, shape (2 * S,)
        Subset on the branch into state ``2 j + w`` from ``j + d * S / 2``, in order d, w, j.
    subset, previous : ndarray, shape (2 * S,)
        Subset and predecessor of the branch d into a state, at ``2 * state + d``.
    """

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
        return cls(entering.ravel(), subset.ravel(), previous.ravel())


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

    def costs(self, start: int, stop: int) -> FloatMatrix:
        """Cost of the best member of each subset for columns start..stop, shape (4, n, lanes)."""
        cost = np.zeros((_SUBSETS, stop - start, self.count), np.float32)
        for (first, last, size), table in zip(self._parts, self._tables, strict=True):
            if size <= start:
                continue
            end = min(stop, size)
            weight = self.scaled[start:end, first:last]
            position = weight * np.float32(_CELLS)
            position += np.float32(table.middle)
            top = 2 * table.middle - 1
            np.clip(position, np.float32(0), np.float32(top), out=position)
            cell = position.astype(np.intp)
            self._cells[start:end, first:last] = cell
            for subset in range(_SUBSETS):
                error = np.take(table.point[subset], cell, mode="clip")
                np.subtract(weight, error, out=error)
                error *= error
                price = np.take(table.price[subset], cell, mode="clip")
                np.add(error, price, out=cost[subset, : end - start, first:last])
            if table.peaked:
                far = np.nonzero((cell == 0) | (cell == top))
                if far[0].size:
                    cost[:, far[0], far[1] + first] = self._far_costs(weight[far], table)
        return cost

    @staticmethod
    def _far_costs(weight: npt.NDArray[np.float32], table: CostTables) -> FloatMatrix:
        exact = weight.astype(np.float64)
        point, price, _ = _best_members(exact, table.model, table.lam)
        return ((exact - point) ** 2 + price).astype(np.float32)

    def levels(self, subsets: npt.NDArray[np.uint8]) -> list[npt.NDArray[np.int32]]:
        """Levels of each part, shape (runs, columns), from the subset of every weight."""
        found = []
        for (first, last, size), table in zip(self._parts, self._tables, strict=True):
            scaled = self.scaled[:size, first:last]
            subset = subsets[:size, first:last].astype(np.intp)
            cell = self._cells[:size, first:last]
            cells = 2 * table.middle
            level = np.take(table.level.ravel(), subset * cells + cell).astype(np.int32)
            if table.peaked:
                far = np.nonzero((cell == 0) | (cell == cells - 1))
                exact = scaled[far].astype(np.float64)
                members = _best_members(exact, table.model, table.lam)[2]
                level[far] = np.take_along_axis(members, subset[far][None], 0)[0]
            found.append(np.ascontiguousarray(level.T))
        return found


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
    half = states // 2
    # Branch metrics in the order d, w, j; metrics in the order of states, 2 j + w.
    branch = np.empty((2 * states, count), np.float32)
    by_source = branch.reshape(2, 2, half, count)
    metric = np.full((states, count), np.float32(np.inf))
    metric[0] = 0.0
    after = np.empty_like(metric)
    taken = np.empty((block.length, states, count), np.bool_)
    for start, stop in block.chunks():
        cost = block.costs(start, stop)
        for column in range(start, stop):
            np.take(cost[:, column - start], branches.entering, axis=0, out=branch, mode="clip")
            by_source += metric.reshape(2, 1, half, count)
            np.minimum(by_source[0], by_source[1], out=after.reshape(half, 2, count).swapaxes(0, 1))
            np.less(
                by_source[1],
                by_source[0],
                out=taken[column].reshape(half, 2, count).swapaxes(0, 1),
            )
            metric, after = after, metric
        if stop % RENORM == 0:
            metric -= metric.min(axis=0)
    subsets = trace_back(taken, np.argmin(metric, axis=0), branches)
    return block.levels(subsets)


def trace_back(
    taken: npt.NDArray[np.bool_], state: npt.NDArray[np.intp], branches: Branches
) -> npt.NDArray[np.uint8]:
    """Subset of every weight along the best paths that end in ``state``, shape (columns, lanes)."""
    length, _, count = taken.shape
    lane = np.arange(count)
    subsets = np.empty((length, count), np.uint8)
    entry = np.empty(count, np.intp)
    for column in range(length - 1, -1, -1):
        np.multiply(state, count, out=entry)
        entry += lane
        decision = np.take(taken[column], entry, mode="clip")
        np.add(state, state, out=entry)
        entry += decision
        np.take(branches.subset, entry, out=subsets[column], mode="clip")
        state = np.take(branches.previous, entry, mode="clip")
    return subsets
