"""Shorter mantissas: float32 values with fewer significant bits, which compress better."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from weightvid.errors import QuantizationError

#: stored mantissa bits of float32.
FULL_BITS: Final = 23


def round_mantissa(values: npt.NDArray[np.float32], bits: int) -> npt.NDArray[np.float32]:
    """Round to ``bits`` stored mantissa bits, to nearest, ties to even.

    Parameters
    ----------
    values : ndarray of float32
    bits : int
        1..23; the relative error is at most 2**-(bits + 1).

    Returns
    -------
    ndarray of float32, same shape
        NaN and infinity stay; so does what would round to infinity.

    Raises
    ------
    QuantizationError
        ``bits`` out of range.

    Examples
    --------
    >>> round_mantissa(np.array([1.2345678], np.float32), 11).tolist()
    [1.234375]
    """
    if not 1 <= bits <= FULL_BITS:
        raise QuantizationError(f"mantissas have 1..{FULL_BITS} bits, not {bits}")
    drop = np.uint32(FULL_BITS - bits)
    if not drop:
        return values
    raw = np.ascontiguousarray(values).view(np.uint32)
    half = np.uint32((1 << (FULL_BITS - bits - 1)) - 1)
    rounded = ((raw + half + ((raw >> drop) & np.uint32(1))) >> drop) << drop
    found = rounded.view(np.float32)
    return np.where(np.isfinite(values) & np.isfinite(found), found, values)
