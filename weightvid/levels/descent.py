"""Levels of what is added to another layer: mostly zeros, which cost next to nothing.

The error E of a matrix, in steps, costs ``trace(E H E')`` at the output of its layer, H being the
second moment of the inputs (see `weightvid.levels.feedback`); without data it is ``I + b J`` as in
`weightvid.levels.rounding`. What a layer below left over is smaller than a step nearly everywhere,
so the levels start as zeros, and coordinate descent changes those that pay: of the level that is
best for a column, its neighbour towards zero, zero and the present one, the one is taken whose cost
and bits are least, given all others of its row. All rows go side by side.

Source: the trade of distortion for bits is that of Sullivan and Wiegand, "Rate-distortion
optimization for video compression", 1998.
"""

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from weightvid.errors import QuantizationError
from weightvid.levels.feedback import FeedbackConfig, feedback, split_groups
from weightvid.levels.prices import Classes
from weightvid.levels.rounding import MEAN_COUPLING, check_range
from weightvid.levels.trellis import TABLE_MAX, Places
from weightvid.loader import MAX_LEVEL, Floats

_SWEEPS: Final = 5
#: price of a bit for the levels that the descent starts from, in that of its own; their damping.
_START: Final = 1.7
_LEAST_DAMPING: Final = 1e-4
#: columns whose gradients are kept up to date one by one.
_BLOCK: Final = 32


def descend(
    scaled: Floats, moment: npt.NDArray[np.floating[Any]], damping: float, price: float
) -> npt.NDArray[np.int32]:
    """Levels of weights in steps, with few that are not zero.

    Parameters
    ----------
    scaled : ndarray of float32, shape (R, C)
    moment : ndarray of float, shape (C, C) or (groups, C, C)
        In steps; of grouped layers equal shares of the rows belong to each group.
    damping : float
        Part of the mean diagonal that is added to the diagonal.
    price : float
        Of a bit, in squared steps at the mean cost.

    Returns
    -------
    ndarray of int32, shape (R, C)
    """
    check_range(scaled, MAX_LEVEL // 2)
    made = []
    for rows, own in split_groups(scaled, moment):
        mean = float(np.diagonal(own).mean(dtype=np.float64))
        whole = own.astype(np.float64) / mean if mean > 0 else np.eye(len(own))
        cost = (whole + damping * np.eye(len(own))).astype(np.float32)
        try:
            # A bit is worth what an error costs that the other columns make up for.
            free = float(np.square(np.diagonal(np.linalg.cholesky(cost))).mean())
        except np.linalg.LinAlgError:
            why = "the second moment of the inputs is not positive semidefinite"
            raise QuantizationError(why) from None
        start = feedback(rows, own, FeedbackConfig(max(damping, _LEAST_DAMPING), _START * price))
        made.append(_descend(rows, start, cost, price * free))
    return np.concatenate(made)


def _descend(
    scaled: Floats, start: npt.NDArray[np.int32], cost: Floats, price: float
) -> npt.NDArray[np.int32]:
    # Transposed, so that a column of all rows lies together.
    levels = np.ascontiguousarray(start.T, dtype=np.float32)
    error = np.ascontiguousarray(scaled.T) - levels
    diagonal = np.diagonal(cost)
    for _ in range(_SWEEPS):
        known = Classes.of(levels.T)
        classes = np.ascontiguousarray(known.of_places(levels.T).T)
        prices = (price * known.bits(levels.astype(np.int32), classes)).astype(np.float32)
        changed = False
        for first in range(0, len(error), _BLOCK):
            last = min(len(error), first + _BLOCK)
            gradient = cost[first:last] @ error
            for column in range(first, last):
                weight, now = diagonal[column], levels[column]
                best = now + gradient[column - first] / weight
                level = _cheapest(best, now, prices / weight, classes[column])
                moved = level - now
                if moved.any():
                    changed = True
                    levels[column] = level
                    error[column] -= moved
                    gradient -= cost[first:last, column, None] * moved
        if not changed:
            break
    return np.ascontiguousarray(levels.T).astype(np.int32)


def _cheapest(best: Floats, now: Floats, prices: Floats, classes: Places) -> Floats:
    """Of four levels the one of least cost, where ``best`` would be no error at all."""
    nearest = np.rint(best)
    inner = nearest - np.sign(nearest)
    choices = np.stack([nearest, inner, np.zeros_like(best), now])
    places = (np.clip(choices, -TABLE_MAX, TABLE_MAX) + TABLE_MAX).astype(np.intp)
    costs = np.square(best - choices) + prices[classes, places]
    return np.asarray(np.take_along_axis(choices, np.argmin(costs, axis=0)[None], axis=0)[0])


def balanced_moment(columns: int, channels: int) -> Floats:
    """What stands for second moments without data: inputs of frequency 0 have a common mean."""
    moment = np.eye(columns, dtype=np.float32)
    moment[:channels, :channels] += np.float32(MEAN_COUPLING)
    return moment
