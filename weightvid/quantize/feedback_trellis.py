"""Error feedback with the trellis: every survivor of the search carries its own errors.

The run is a row, in its own order of columns. What a column should be depends on the errors of the
columns before it, and so on the path taken: each state keeps the targets of the columns to come in
its block, and hands them on when a path moves to another state. What lies further back than the
window is decided: it is what the best path has there, and the few survivors that part from it
earlier are dropped.

Source: Duel-Hallen and Heegard, "Delayed decision-feedback sequence estimation", 1989, for the
survivors; `weightvid.quantize.feedback` for the feedback.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from weightvid.errors import QuantizationError
from weightvid.quantize.feedback import (
    Factor,
    FeedbackConfig,
    FloatMatrix,
    Moment,
    factorize,
    split_groups,
)
from weightvid.quantize.params import MAX_LEVEL
from weightvid.quantize.rate import RateModel, check_range, sign_coded_bits
from weightvid.quantize.trellis import DEFAULT_STATES, dequantize_index, machine
from weightvid.quantize.trellis_search import LAM
from weightvid.quantize.trellis_viterbi import CostTables

_BLOCK: Final = 16
_WINDOW: Final = 96
_LANES: Final = 512
_MIN_LANES: Final = 64
#: of the paths of one search: origin, value and error of every column, state and lane.
_PATH_BYTES: Final = 1 << 27
_SAMPLE: Final = 1 << 15
_SAMPLE_GROUPS: Final = 64
_CELLS: Final = 32


@dataclass(frozen=True, slots=True)
class Fitted:
    """A quantizer fitted to a tensor, so that its rows can be taken apart.

    Attributes
    ----------
    step : float
    states : int
    table : CostTables
        Holds the numbering of the points and the price of levels.
    factors : tuple of Factor
        One for each group of rows.
    """

    step: float
    states: int
    table: CostTables
    factors: tuple[Factor, ...]

    @property
    def zero(self) -> bool:
        """Numbering of the points."""
        return self.table.zero


def fit(
    weights: FloatMatrix,
    step: float,
    moment: Moment,
    config: FeedbackConfig | None = None,
    states: int = DEFAULT_STATES,
    zero: bool | None = None,
) -> Fitted:
    """Factor the moment, and fit numbering and prices to evenly spaced rows.

    Parameters are those of `quantize`; ``zero`` None: the better numbering by trial.
    """
    chosen = config or FeedbackConfig()
    check_range(weights, float(np.float32(step)), 2.0 * MAX_LEVEL)
    parts = split_groups(weights, moment)
    stride = max(1, len(parts) // _SAMPLE_GROUPS)
    factors = tuple(factorize(h, chosen.damping) for _, h in parts)
    every = max(1, weights.size // stride // _SAMPLE)
    unit = np.float32(2) * np.float32(step)
    sample = [
        (np.asarray(rows[::every], np.float32) / unit, factor)
        for (rows, _), factor in list(zip(parts, factors, strict=True))[::stride]
    ]
    # Feedback moves the targets a little beyond the weights.
    peak = 1.5 * float(np.abs(weights).max(initial=0.0)) / float(unit)
    best: CostTables | None = None
    least = np.inf
    for numbering in (False, True) if zero is None else (zero,):
        shift = np.float32(-0.25 if numbering else 0.25)
        levels = [np.rint(rows * 0.5 + shift).astype(np.int32) for rows, _ in sample]
        table = CostTables.build(_model(levels), chosen.lam, peak, numbering)
        if chosen.lam or zero is None:
            levels = [_search(rows, factor, table, states) for rows, factor in sample]
            table = CostTables.build(_model(levels), chosen.lam, peak, numbering)
        cost = 0.0 if zero is not None else _trial_cost(sample, levels, states, numbering)
        if best is None or cost < least:
            best, least = table, cost
    if best is None:
        raise QuantizationError("nothing to fit a quantizer to")
    return Fitted(float(np.float32(step)), states, best, factors)


def quantize_rows(weights: FloatMatrix, fitted: Fitted, group: int = 0) -> npt.NDArray[np.int32]:
    """Levels of some rows of a fitted tensor, all of one group; each row is coded alone."""
    levels = np.empty(weights.shape, np.int32)
    unit = np.float32(2) * np.float32(fitted.step)
    count = _PATH_BYTES // (16 * fitted.states * max(1, weights.shape[1]))
    count = min(_LANES, max(_MIN_LANES, count))
    for first in range(0, len(weights), count):
        lanes = np.asarray(weights[first : first + count], np.float32) / unit
        part = _search(lanes, fitted.factors[group], fitted.table, fitted.states)
        levels[first : first + len(lanes)] = part
    return levels


def quantize(
    weights: FloatMatrix,
    step: float,
    moment: Moment,
    config: FeedbackConfig | None = None,
    states: int = DEFAULT_STATES,
    zero: bool = False,
) -> npt.NDArray[np.int32]:
    """Levels of the trellis quantizer (runs are rows), with error feedback.

    Parameters
    ----------
    weights : ndarray of float32, shape (R, C)
        Finite.
    step : float
        Of the trellis: a quarter of the plain quantizer's step. Above 0, rounded to float32.
    moment : ndarray of float, shape (C, C) or (groups, C, C)
        Second moment of the inputs.
    config : FeedbackConfig, optional
        ``by_energy`` and ``block`` have no meaning here.
    states : int
        4, 8, 16, 32 or 64.
    zero : bool
        Numbering of the points.

    Returns
    -------
    ndarray of int32, shape (R, C)

    Raises
    ------
    QuantizationError
        As for `weightvid.quantize.feedback.quantize`.
    """
    if not weights.size:
        return np.zeros(weights.shape, np.int32)
    fitted = fit(weights, step, moment, config, states, zero)
    return quantize_groups(weights, fitted)


def quantize_groups(weights: FloatMatrix, fitted: Fitted) -> npt.NDArray[np.int32]:
    """Levels of a whole fitted tensor."""
    parts = np.split(weights, len(fitted.factors))
    return np.concatenate([quantize_rows(part, fitted, g) for g, part in enumerate(parts)])


def _model(levels: list[npt.NDArray[np.int32]]) -> RateModel:
    return RateModel.from_levels(np.concatenate([part.ravel() for part in levels]))


def _trial_cost(
    sample: list[tuple[FloatMatrix, Factor]],
    levels: list[npt.NDArray[np.int32]],
    states: int,
    zero: bool,
) -> float:
    """Output error in squared plain steps plus priced bits, per weight."""
    error = 0.0
    for (rows, factor), part in zip(sample, levels, strict=True):
        miss = rows - dequantize_index(part, states, 1, zero) * np.float32(0.5)
        left = (miss @ factor.feedback.T).astype(np.float64) ** 2
        error += 0.25 * float((left * factor.cost).sum())
    flat = np.concatenate([part.ravel() for part in levels])
    return error / flat.size + LAM * sign_coded_bits(flat)


@dataclass(frozen=True, slots=True)
class _Moves:
    """The state machine as tables; S states.

    Attributes
    ----------
    sign, offset : ndarray of float32, shape (S, 1)
        ``n / 2 = sign * (2 k + offset)`` out of a state.
    row : ndarray of intp, shape (2, S, 1)
        Row of the cost tables for an even and an odd level out of a state.
    source, parity : ndarray of intp, shape (2, S)
        The two ways into a state: where from, and with which parity.
    """

    sign: FloatMatrix
    offset: FloatMatrix
    row: npt.NDArray[np.intp]
    source: npt.NDArray[np.intp]
    parity: npt.NDArray[np.intp]

    @classmethod
    def of(cls, states: int, zero: bool) -> _Moves:
        trellis = machine(states)
        choice = np.array([trellis.quantizer(state) for state in range(states)])
        ways: list[list[tuple[int, int]]] = [[] for _ in range(states)]
        for state in range(states):
            for parity in range(2):
                ways[trellis.next_state(state, parity)].append((state, parity))
        table = np.array(ways, np.intp)
        return cls(
            sign=(1.0 - 2.0 * choice[:, None] * (not zero)).astype(np.float32),
            offset=(choice[:, None] if zero else choice[:, None] * 0 - 0.5).astype(np.float32),
            row=np.stack([2 * choice, 2 * choice + 1])[:, :, None].astype(np.intp),
            source=np.ascontiguousarray(table[:, :, 0].T),
            parity=np.ascontiguousarray(table[:, :, 1].T),
        )


def _search(
    scaled: FloatMatrix, factor: Factor, table: CostTables, states: int
) -> npt.NDArray[np.int32]:
    """Levels of rows searched side by side; weights in units of two steps."""
    moves = _Moves.of(states, table.zero)
    weight = np.ascontiguousarray(scaled.T)
    columns, lanes = weight.shape
    paths = _Paths(columns, states, lanes)
    metric = np.full((states, lanes), np.float32(np.inf))
    metric[0] = 0.0
    decided = np.empty((columns, lanes), np.float32)
    for start in range(0, columns, _BLOCK):
        stop = min(columns, start + _BLOCK)
        first = max(0, start - _WINDOW)
        ahead = np.repeat(weight[start:stop, None], states, axis=1)
        if start:
            recent = paths.errors(first, start)
            settled = max(0, start - _BLOCK - _WINDOW)
            if first:
                best = np.argmin(metric, axis=0)
                metric[paths.strays(best)] = np.inf
                decided[settled:first] = paths.best(settled, first, best)
            feedback = factor.feedback[start:stop]
            ahead += (feedback[:, first:start] @ recent.reshape(start - first, -1)).reshape(
                ahead.shape
            )
            ahead += (feedback[:, :first] @ decided[:first])[:, None]
        for column in range(start, stop):
            place = column - start
            target = ahead[place]
            point, price = _members(target, moves, table)
            miss = target - point
            miss *= miss
            miss *= np.float32(factor.cost[column])
            miss += price
            miss += metric
            into = miss[moves.parity, moves.source]
            second = into[1] < into[0]
            metric = np.where(second, into[1], into[0])
            source = np.where(second, moves.source[1][:, None], moves.source[0][:, None])
            parity = np.where(second, moves.parity[1][:, None], moves.parity[0][:, None])
            flat = source * lanes + paths.lane
            value = np.take(point, parity * target.size + flat)
            error = weight[column] - value
            paths.record(column, flat, value, error)
            later = stop - column - 1
            if later:
                kept = np.take(ahead[place + 1 :].reshape(later, -1), flat.ravel(), axis=1)
                kept = kept.reshape(later, states, lanes)
                kept += factor.feedback[column + 1 : stop, column, None, None] * error
                ahead[place + 1 :] = kept
        metric = metric - metric.min(axis=0)
    return paths.levels(np.argmin(metric, axis=0), moves)


def _members(
    target: FloatMatrix, moves: _Moves, table: CostTables
) -> tuple[FloatMatrix, FloatMatrix]:
    """Best even and odd member out of each state, and their price; shapes (2, S, lanes)."""
    cells = table.point.shape[1]
    position = target * np.float32(_CELLS)
    position += np.float32(table.middle)
    np.clip(position, np.float32(0), np.float32(cells - 1), out=position)
    cell = position.astype(np.intp)
    index = moves.row * cells + cell
    point = np.take(table.point, index)
    price = np.take(table.price, index)
    if table.peaked:
        far = (cell == 0) | (cell == cells - 1)
        if far.any():
            # Beyond the table the nearest member will do.
            offset = moves.offset + np.array([0.0, 2.0], np.float32)[:, None, None]
            nearest = np.rint((moves.sign * target - offset) * np.float32(0.25))
            point = np.where(far, moves.sign * (4 * nearest + offset), point)
    return point, price


class _Paths:
    """Where each survivor came from, and what it chose on the way."""

    def __init__(self, columns: int, states: int, lanes: int) -> None:
        self._states, self._lanes = states, lanes
        self.lane = np.arange(lanes)[None]
        self._from = np.empty((columns, states * lanes), np.intp)
        self._value = np.empty((columns, states * lanes), np.float32)
        self._error = np.empty((columns, states * lanes), np.float32)

    def record(
        self,
        column: int,
        origin: npt.NDArray[np.intp],
        value: FloatMatrix,
        error: FloatMatrix,
    ) -> None:
        """Remember the step into every state."""
        self._from[column] = origin.ravel()
        self._value[column] = value.ravel()
        self._error[column] = error.ravel()

    def errors(self, first: int, stop: int) -> FloatMatrix:
        """Errors along the path of every survivor, shape (stop - first, states, lanes)."""
        found = np.empty((stop - first, self._states * self._lanes), np.float32)
        at = np.arange(self._states * self._lanes)
        for column in range(stop - 1, first - 1, -1):
            np.take(self._error[column], at, out=found[column - first])
            at = np.take(self._from[column], at)
        self._entry = at
        return found.reshape(stop - first, self._states, self._lanes)

    def strays(self, state: npt.NDArray[np.intp]) -> npt.NDArray[np.bool_]:
        """Survivors, shape (states, lanes), that part from the one in ``state`` before the window.

        Follows on from `errors`.
        """
        entry = self._entry.reshape(self._states, self._lanes)
        astray: npt.NDArray[np.bool_] = np.not_equal(entry, entry[state, self.lane[0]])
        return astray

    def best(self, first: int, stop: int, state: npt.NDArray[np.intp]) -> FloatMatrix:
        """Errors of columns first..stop on the path of one survivor of each lane.

        Follows on from `errors`, whose walk back ended at ``stop``.
        """
        at = self._entry.reshape(self._states, self._lanes)[state, self.lane[0]]
        found = np.empty((stop - first, self._lanes), np.float32)
        for column in range(stop - 1, first - 1, -1):
            np.take(self._error[column], at, out=found[column - first])
            at = np.take(self._from[column], at)
        return found

    def levels(self, state: npt.NDArray[np.intp], moves: _Moves) -> npt.NDArray[np.int32]:
        """Levels along the path that ends in ``state``, shape (lanes, columns)."""
        columns = len(self._from)
        found = np.empty((self._lanes, columns), np.int32)
        at = state * self._lanes + self.lane[0]
        sign = np.repeat(moves.sign[:, 0], self._lanes)
        offset = np.repeat(moves.offset[:, 0], self._lanes)
        for column in range(columns - 1, -1, -1):
            origin = np.take(self._from[column], at)
            half_index = np.take(self._value[column], at) * sign[origin]
            found[:, column] = np.rint((half_index - offset[origin]) * np.float32(0.5))
            at = origin
        return found
