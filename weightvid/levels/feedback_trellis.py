"""Error feedback with the trellis: every survivor of the search carries its own errors.

What a column should be depends on the errors of the columns before it, and so on the path taken:
each state keeps the errors of its path and the targets of the columns to come, and hands them on
when the path moves to another state. What lies further back than the window is decided: it is what
the best path has there, and the few survivors that part from it earlier are dropped.

Source: Duel-Hallen and Heegard, "Delayed decision-feedback sequence estimation", 1989, for the
survivors; `weightvid.levels.feedback` for the feedback.
"""

from typing import Final

import numpy as np
import numpy.typing as npt

from weightvid.levels.trellis import STATES, CostTables, Places, branches_into
from weightvid.loader import Floats

#: columns whose targets are brought up to date by one product of matrices.
_BLOCK: Final = 16
_WINDOW: Final = 144


def search(
    weight: Floats, classes: Places, feedback: Floats, cost: Floats, table: CostTables
) -> tuple[npt.NDArray[np.int32], Floats]:
    """Levels of runs searched side by side, and what they stand for, in steps.

    Parameters
    ----------
    weight : ndarray of float32, shape (C, lanes)
        In steps.
    classes : ndarray of intp, shape (C, lanes)
        Whose prices hold.
    feedback : ndarray of float32, shape (C, C)
        Unit lower triangular: what the errors of earlier columns add to the target of a column.
    cost : ndarray of float32, shape (C, lanes) or (C, 1)
        Of a squared error in each column.
    table : CostTables

    Returns
    -------
    ndarray of int32, and of float32, shape (C, lanes)
    """
    columns, lanes = weight.shape
    metric = np.full((STATES, lanes), np.inf, np.float32)
    metric[0] = 0.0
    decided = np.empty_like(weight)
    recent = np.empty((0, STATES, lanes), np.float32)
    branches, cells = _Branches(table), classes * table.cells_of_class
    coupled = np.count_nonzero(feedback) > columns
    for start in range(0, columns, _BLOCK):
        stop = min(columns, start + _BLOCK)
        first = start - len(recent)
        if len(recent) > _WINDOW:
            leaving, recent = recent[:_BLOCK], recent[_BLOCK:]
            best = _of_best(leaving, metric)
            metric[(leaving != best[:, None]).any(axis=0)] = np.inf
            decided[first : first + _BLOCK] = best
            first += _BLOCK
        # Of each survivor: errors in the columns of the block so far, and targets of those to come.
        block = np.repeat(weight[start:stop, None], STATES, axis=1)
        if coupled:
            block += (feedback[start:stop, :first] @ decided[:first])[:, None]
            block += np.tensordot(feedback[start:stop, first:start], recent, axes=1)
        origin = np.repeat(np.arange(STATES, dtype=np.float32), lanes).reshape(1, STATES, lanes)
        for at, column in enumerate(range(start, stop)):
            value, metric, second = branches.step(block[at], cells[column], metric, cost[column])
            block, origin = _follow(block, second), _follow(origin, second)
            error = np.subtract(weight[column], value, out=block[at])
            if coupled:
                block[at + 1 :] += feedback[column + 1 : stop, column, None, None] * error
        metric -= metric.min(axis=0)
        place = (origin[0].astype(np.intp) * lanes + np.arange(lanes)).ravel()
        kept = recent.reshape(len(recent), STATES * lanes).take(place, axis=1, mode="clip")
        recent = np.concatenate([kept.reshape(recent.shape), block])
    decided[columns - len(recent) :] = _of_best(recent, metric)
    # n / 2 = 2 k, or 2 k + 1 of the second quantizer.
    value = weight - decided
    return np.rint(2 * value).astype(np.int32) >> 1, value


def _of_best(values: Floats, metric: Floats) -> Floats:
    """Of values (n, 32, lanes), those of the best survivor of each lane."""
    return np.take_along_axis(values, np.argmin(metric, axis=0)[None, None], axis=1)[:, 0]


def _follow(values: Floats, second: npt.NDArray[np.int32]) -> Floats:
    """Hand on what survivors carry: states 2 j + w take it from state j, or j + 16 if second.

    Values, (n, 32, lanes), are selected by masks of their bits, which is faster than `np.where`:
    ``second``, (16, 2, lanes), is -1 or 0.
    """
    bits = values.view(np.int32)
    first = bits[:, : STATES // 2, None]
    found = (first ^ bits[:, STATES // 2 :, None]) & second
    found ^= first
    return found.reshape(values.shape).view(np.float32)


class _Branches:
    """The branches into each state: looked up, and the better one chosen."""

    def __init__(self, table: CostTables) -> None:
        self._table = table
        # By d, j and w: the branch from state 16 d + j to state 2 j + w.
        subset = branches_into()[1].T.reshape(2, STATES // 2, 2, 1)
        self._base = subset * table.level.shape[1]
        self._value = (table.level + np.array([[0], [0], [0.5], [0.5]], np.float32)).ravel()
        self._price = table.price.ravel()

    def step(
        self, target: Floats, first_cell: Places, metric: Floats, cost: Floats
    ) -> tuple[Floats, Floats, npt.NDArray[np.int32]]:
        """Advance every survivor by a column, whose squared errors cost so much.

        Parameters are of shape (32, lanes), or (lanes,): where the cells of its class begin. So are
        the value that each survivor has chosen, in steps, and its new metric; last comes ``second``
        of `_follow`.
        """
        by_branch = (2, STATES // 2, 1, target.shape[1])
        cell, moved = self._table.cells(target)
        place = self._base + (cell + first_cell).reshape(by_branch)
        value = self._value.take(place, mode="clip")
        if moved is not None:
            value += moved.reshape(by_branch)
        miss = target.reshape(by_branch) - value
        miss *= miss
        miss *= cost
        miss += self._price.take(place, mode="clip")
        miss += metric.reshape(by_branch)
        second = miss[1] < miss[0]
        value = np.where(second, value[1], value[0]).reshape(target.shape)
        least = np.minimum(miss[0], miss[1]).reshape(target.shape)
        return value, least, -second.astype(np.int32)
