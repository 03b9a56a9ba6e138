"""The uniform quantizer: one step per tensor, round to nearest, ties to even."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from weightvid.errors import QuantizationError
from weightvid.quantize.params import MAX_LEVEL, SHIFT_UNITS, UniformParams

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.integer]


def quantize(weights: FloatArray, step: float) -> npt.NDArray[np.int32]:
    """Levels nearest to ``weights / step``.

    Parameters
    ----------
    weights : ndarray of float32, any shape
        Finite.
    step : float
        Quantizer step size, > 0.

    Returns
    -------
    ndarray of int32
        round(w / step), ties to even, of the same shape.

    Raises
    ------
    QuantizationError
        A weight is NaN or infinite, or a level would exceed 2**22.

    Examples
    --------
    >>> quantize(np.array([-0.26, 0.1, 0.5], np.float32), 0.25)
    array([-1,  0,  2], dtype=int32)
    """
    with np.errstate(over="ignore", invalid="ignore"):
        scaled: npt.NDArray[np.float32] = np.rint(
            np.asarray(weights, np.float32) * np.float32(1.0 / step)
        )
    peak = float(np.max(np.abs(scaled), initial=0.0))
    if not peak <= MAX_LEVEL:
        raise QuantizationError(
            f"a weight is not finite or lies {peak:.3g} steps from zero (limit {MAX_LEVEL}); "
            "keep this tensor exact or choose a coarser step"
        )
    return scaled.astype(np.int32)


def reconstruction_index(levels: IntArray, params: UniformParams) -> npt.NDArray[np.int32]:
    """Integers n with value = float32(n) * params.unit, of the shape of ``levels``."""
    wide = levels.astype(np.int32)
    if params.shifts is None:
        return wide
    table = np.array((0, *params.shifts), np.int32)
    shift = table[np.minimum(np.abs(wide), 3)]
    index = wide * np.int32(SHIFT_UNITS) - np.sign(wide) * shift
    return index.astype(np.int32, copy=False)


def dequantize(
    levels: IntArray, params: UniformParams, out: FloatArray | None = None
) -> FloatArray:
    """Values of levels: exact float32 arithmetic, one multiplication per weight.

    Parameters
    ----------
    levels : ndarray of integers
    params : UniformParams
    out : ndarray of float32, of the shape of ``levels``, optional
        Takes the values.

    Examples
    --------
    >>> dequantize(np.array([-1, 0, 2]), UniformParams(0.25)).tolist()
    [-0.25, 0.0, 0.5]
    """
    if params.shifts is None:
        index = levels
    elif levels.dtype == np.int8:
        # Eight-bit levels have few values: a table is one pass instead of five.
        every = np.arange(-128, 128, dtype=np.int32)
        table = dequantize(every.astype(np.int32), params)
        places = levels.view(np.uint8) ^ np.uint8(128)
        found: FloatArray = np.take(table, places, out=out, mode="clip")
        return found
    else:
        index = reconstruction_index(levels, params)
    return np.multiply(index, params.unit, out=out, dtype=np.float32, casting="unsafe")
