"""Rate-aware rounding for the plain uniform quantizer, and its centroid shifts.

Rate-aware rounding picks, for each weight alone, the level that minimises
``(w / step - q)^2 + lam * bits(q)``. Centroid shifts pull the reconstruction of a level towards
zero by a few 256ths of a step, one shift each for ``|q|`` = 1, 2 and 3 or more
(`weightvid.quantize.params.UniformParams`).

Source: G. Sullivan, "Efficient scalar quantization of exponential and Laplacian random variables",
IEEE Trans. Information Theory 42(5), 1996.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from weightvid.errors import QuantizationError
from weightvid.quantize.params import MAX_LEVEL, SHIFT_UNITS
from weightvid.quantize.rate import TABLE_MAX, IntArray, RateModel, check_range, lower_envelope

LAM = 0.1
"""Default price of a bit, in squared steps of the plain quantizer; see tools/results/trellis.md."""

_CLASSES = 3
_MAX_SHIFT = 127
_CELLS = 16
_BLOCK = 1 << 16

FloatArray = npt.NDArray[np.float32]


def thresholds(model: RateModel, lam: float) -> tuple[npt.NDArray[np.float64], IntArray]:
    """Weights (in steps) where the best level changes, ascending, and the levels between them.

    Parameters
    ----------
    model : RateModel
    lam : float
        Price of a bit in squared steps.

    Returns
    -------
    threshold : ndarray of float64, shape (n - 1,)
    level : ndarray of int64, shape (n,), within -127..127
        ``level[i]`` is best between ``threshold[i - 1]`` and ``threshold[i]``; levels too dear to
        be ever best are left out.

    >>> thresholds(RateModel.laplacian(1.0), 0.0)[0][125:129].tolist()
    [-1.5, -0.5, 0.5, 1.5]
    """
    levels = np.arange(-TABLE_MAX, TABLE_MAX + 1)
    threshold, winner = lower_envelope(
        levels.astype(np.float64).tolist(), (lam * model.bits).tolist()
    )
    return threshold, levels[winner]


def quantize(
    weights: FloatArray,
    step: float,
    lam: float = LAM,
    rate_model: RateModel | None = None,
    iterations: int = 2,
) -> npt.NDArray[np.int32]:
    """Levels of weights by rate-aware rounding, element by element.

    Parameters
    ----------
    weights : ndarray of float32, any shape
        Finite.
    step : float
        Above 0; rounded to float32.
    lam : float
        Price of a bit in squared steps, >= 0; 0 rounds to nearest (ties towards zero).
    rate_model : RateModel, optional
        Fitted to the weights' own levels when absent.
    iterations : int
        Rounds of fitting, >= 1.

    Returns
    -------
    ndarray of int32, shape of ``weights``
        ``|level|`` at most 2**22.

    Raises
    ------
    QuantizationError
        For non-finite weights, a step that is not positive or is too small, or a negative ``lam``.
    """
    if not (np.isfinite(lam) and lam >= 0.0):
        raise QuantizationError(f"lam must be finite and at least 0, not {lam!r}")
    rounded_step = np.float32(step)
    check_range(weights, float(rounded_step), float(MAX_LEVEL))
    scaled = np.asarray(weights, np.float32) / rounded_step
    model = rate_model or RateModel.from_levels(np.rint(scaled).astype(np.int32))
    levels = round_with_rate(scaled, model, lam)
    if rate_model is None:
        for _ in range(iterations - 1):
            levels = round_with_rate(scaled, RateModel.from_levels(levels), lam)
    return levels


def round_with_rate(scaled: FloatArray, model: RateModel, lam: float) -> npt.NDArray[np.int32]:
    """Cheapest level of each weight, given in steps; same shape, int32."""
    threshold, level = thresholds(model, lam)
    # Look-up by cell of 1/16 step, then correction by the thresholds inside the cell.
    start = np.arange(-TABLE_MAX * _CELLS, TABLE_MAX * _CELLS + 1) / _CELLS
    limit = np.append(threshold, np.inf).astype(np.float32)
    first = np.searchsorted(limit[:-1].astype(np.float64), start, side="left")
    rounds = int(np.diff(np.append(first, threshold.size)).max(initial=0))
    found = np.empty(scaled.size, np.int32)
    flat = scaled.ravel()
    for begin in range(0, flat.size, _BLOCK):
        part = flat[begin : begin + _BLOCK]
        cell = np.clip(part, -TABLE_MAX, TABLE_MAX) * np.float32(_CELLS)
        np.floor(cell, out=cell)
        rank = np.take(first, cell.astype(np.intp) + TABLE_MAX * _CELLS)
        for _ in range(rounds):
            rank += np.take(limit, rank) < part
        best = np.take(level, rank).astype(np.int32)
        far = np.nonzero(np.abs(part) > TABLE_MAX)[0]
        if far.size:
            magnitude = np.abs(part[far]).astype(np.float64) - 0.5 * lam * model.tail_bits
            best[far] = np.sign(part[far]) * np.maximum(np.rint(magnitude), TABLE_MAX)
        found[begin : begin + _BLOCK] = best
    return found.reshape(scaled.shape)


def centroid_shifts(weights: FloatArray, levels: IntArray, step: float) -> tuple[int, int, int]:
    """Shifts that minimise the squared error, in 256ths of a step, within -127..127.

    Parameters
    ----------
    weights : ndarray of float32
    levels : ndarray of int, same shape
    step : float

    Returns
    -------
    tuple of int
        For ``|level|`` = 1, 2 and 3 or more; 0 where no level is in the class. Rounded to nearest.
    """
    if weights.shape != levels.shape:
        raise QuantizationError(f"{weights.shape} weights but {levels.shape} levels")
    flat = levels.ravel()
    sign = np.sign(flat)
    magnitude = np.abs(flat)
    kind = np.minimum(magnitude, _CLASSES)
    excess = magnitude - sign * weights.ravel().astype(np.float64) / float(np.float32(step))
    count = np.bincount(kind, minlength=_CLASSES + 1)
    total = np.bincount(kind, weights=excess, minlength=_CLASSES + 1)
    mean = total[1:] / np.maximum(count[1:], 1)
    shift = np.clip(np.rint(SHIFT_UNITS * mean), -_MAX_SHIFT, _MAX_SHIFT).astype(int).tolist()
    return shift[0], shift[1], shift[2]
