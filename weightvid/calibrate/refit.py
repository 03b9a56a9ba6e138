"""Weights fitted anew to the original outputs, from the inputs that quantized layers make.

A layer was to put out ``W x``, but is given x' in place of x. The weights V that come nearest,
``E |W x - V x'|^2`` least, are ``W C (H')^-1`` with ``C = E[x x'^T]`` and ``H' = E[x' x'^T]``; with
damping they stay near W in directions that x' hardly visits. V is what is quantized then, with
error feedback through H'. What is best is tried on samples held back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from weightvid.calibrate.pairs import PairMoments
from weightvid.calibration import TensorMoments
from weightvid.quantize import feedback, shaped
from weightvid.quantize.feedback import FeedbackConfig

Matrix = npt.NDArray[np.float32]
Moments = npt.NDArray[np.float64]

#: dampings of the fit, as parts of the mean diagonal; None: the weights stay as they are.
FITS: Final = (None, 1.0, 0.1, 0.01)
#: rows, and groups of rows, that a trial is made with.
_ROWS: Final = 64
_GROUPS: Final = 16


@dataclass(frozen=True, slots=True)
class Way:
    """How a tensor is quantized.

    Attributes
    ----------
    kind : str
        ``sequential``: for the inputs that the quantized layers make; ``plain``: for those of the
        original model; ``none``: without statistics.
    fit : float or None
        Damping with which the weights of the sequential way are fitted anew.
    """

    kind: str
    fit: float | None = None


def refit(weights: Matrix, pairs: PairMoments, damping: float) -> Matrix:
    """Weights that put out the same for the new inputs, as nearly as can be.

    Parameters
    ----------
    weights : ndarray of float32, shape (R, C)
        Inputs along the columns; of grouped layers equal shares of the rows.
    pairs : PairMoments
    damping : float
        Part of the mean diagonal of H'; > 0.
    """
    parts = np.split(weights, len(pairs.moment))
    found = [
        _refit(part, moment, cross, damping)
        for part, moment, cross in zip(parts, pairs.moment, pairs.cross, strict=True)
    ]
    return np.concatenate(found)


def _refit(weights: Matrix, moment: Moments, cross: Moments, damping: float) -> Matrix:
    mean = float(np.diagonal(moment).mean())
    if not mean > 0.0:
        return weights
    damped = moment + damping * mean * np.eye(len(moment))
    change = np.linalg.solve(damped, (cross - moment).T).T
    found = weights.astype(np.float64) @ (np.eye(len(moment)) + change)
    return found.astype(np.float32)


def shift(weights: Matrix, restored: Matrix, pairs: PairMoments) -> Matrix:
    """What the bias must gain for the mean output to be the original's, shape (R,)."""
    parts = zip(
        np.split(weights, len(pairs.mean)),
        np.split(restored, len(pairs.mean)),
        pairs.original_mean,
        pairs.mean,
        strict=True,
    )
    found = [w @ before - v @ after for w, v, before, after in parts]
    return np.concatenate(found).astype(np.float32)


@dataclass(frozen=True, slots=True)
class Trial:
    """What a way is chosen by.

    Attributes
    ----------
    weights : ndarray of float32, shape (R, C)
    step : float
    kernel : tuple of int
        Kernel positions that rounding without statistics is shaped over; empty for none.
    biased : bool
        A bias takes the shift of the mean output.
    plain : TensorMoments
        Of the original model.
    fitted, held : PairMoments
    """

    weights: Matrix
    step: float
    kernel: tuple[int, ...]
    biased: bool
    plain: TensorMoments
    fitted: PairMoments
    held: PairMoments


def choose(trial: Trial) -> Way:
    """The way with the least error of the outputs on samples held back."""
    ways = [Way("plain"), Way("none"), *(Way("sequential", fit) for fit in FITS)]
    if trial.plain.moment is None:
        ways = ways[1:]
    parts = _shares(trial)
    return min(ways, key=lambda way: sum(_lost(trial, way, *part) for part in parts))


def _shares(trial: Trial) -> list[tuple[int, Matrix]]:
    """Some rows of some groups."""
    parts = list(enumerate(np.split(trial.weights, len(trial.fitted.moment))))
    parts = parts[:: max(1, len(parts) // _GROUPS)]
    return [(group, rows[:: max(1, len(rows) // _ROWS)]) for group, rows in parts]


def _lost(trial: Trial, way: Way, group: int, rows: Matrix) -> float:
    """Error of the outputs of some rows on held-back samples, less what all ways share."""
    target, moment = rows, trial.fitted.moment[group]
    if way.kind == "plain" and trial.plain.moment is not None:
        moment = trial.plain.moment[group].astype(np.float64)
    if way.fit is not None:
        target = _refit(rows, moment, trial.fitted.cross[group], way.fit)
    step = np.float32(trial.step)
    if way.kind != "none":
        config = FeedbackConfig(damping=trial.plain.damping or 0.1, lam=0.0)
        levels = feedback.quantize(target, trial.step, moment, config)
    elif trial.kernel:
        levels = shaped.quantize(rows, trial.step, trial.kernel)
    else:
        levels = np.rint(rows / step).astype(np.int32)
    made, wanted = (levels * step).astype(np.float64), rows.astype(np.float64)
    held = trial.held
    lost = np.vdot(made @ held.moment[group], made)
    lost -= 2 * np.vdot(wanted @ held.cross[group], made)
    if trial.biased:
        fitted = trial.fitted
        gained = wanted @ fitted.original_mean[group] - made @ fitted.mean[group]
        missing = wanted @ held.original_mean[group] - made @ held.mean[group]
        lost += np.vdot(gained, gained - 2 * missing)
    return float(lost)


def turned(array: npt.NDArray[np.floating], pairs_groups: int, axis: int) -> Matrix:
    """A weight as a matrix of rows of groups, inputs along the columns.

    With axis 0 the inputs of all groups lie along the rows of the tensor's matrix.
    """
    matrix = np.asarray(array, np.float32).reshape(len(array), -1)
    if axis:
        return matrix
    return np.concatenate(np.split(matrix.T, pairs_groups, axis=1))


def turned_back(matrix: Matrix, pairs_groups: int, axis: int, shape: Sequence[int]) -> Matrix:
    """The inverse of `turned`."""
    if not axis:
        matrix = np.concatenate(np.split(matrix, pairs_groups), axis=1).T
    return np.ascontiguousarray(matrix).reshape(tuple(shape))
