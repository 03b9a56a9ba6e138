"""What the choice of a step needs to know of a tensor's weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import isfinite, sqrt

import numpy as np
import numpy.typing as npt

from weightvid.dtypes import PACKABLE, to_float32
from weightvid.spec import TensorSpec

#: weights of one sum.
BLOCK = 1 << 20
#: weights looked at in one go; their float64 stays in the cache.
_PIECE = 1 << 15


@dataclass(frozen=True, slots=True)
class TensorStats:
    """Statistics of one tensor, taken as float32.

    Attributes
    ----------
    spec : TensorSpec
    sigma : float
        Standard deviation about the mean; 0 for a constant tensor.
    rms : float
        Root of the mean square.
    absmax : float
        Largest magnitude.
    finite : bool
        Whether there is no NaN and no infinity, also as float32.
    """

    spec: TensorSpec
    sigma: float
    rms: float
    absmax: float
    finite: bool


#: sum, sum of squares and largest magnitude of some weights.
Sums = tuple[float, float, float]


def block_sums(array: npt.NDArray[np.generic], dtype: str) -> list[Sums]:
    """Sums of each block of 2**20 stored elements, in float64.

    Parameters
    ----------
    array : ndarray
        Stored elements (BF16 as uint16 bits).
    dtype : str
        One of :data:`weightvid.dtypes.PACKABLE`.
    """
    flat = array.reshape(-1)
    found = []
    # float64 beyond the range of float32 becomes infinite here, and the tensor is kept exact.
    with np.errstate(over="ignore", invalid="ignore"):
        for begin in range(0, flat.size, BLOCK):
            block = to_float32(flat[begin : begin + BLOCK], dtype)
            total = squares = 0.0
            for first in range(0, block.size, _PIECE):
                piece = block[first : first + _PIECE].astype(np.float64)
                total += float(piece.sum())
                # No product of vectors: its last bits depend on how many threads it runs on.
                squares += float(np.square(piece, out=piece).sum())
            found.append((total, squares, max(float(block.max()), -float(block.min()))))
    return found


def stats_of(spec: TensorSpec, sums: Iterable[Sums]) -> TensorStats:
    """Statistics of a tensor from the sums of its blocks, in order."""
    total = squares = peak = 0.0
    with np.errstate(over="ignore", invalid="ignore"):
        for each, square, largest in sums:
            total += each
            squares += square
            peak = max(peak, largest)
    finite = isfinite(squares) and isfinite(peak)
    if not finite:
        return TensorStats(spec, 0.0, 0.0, 0.0, finite=False)
    mean = total / spec.size
    variance = max(0.0, squares / spec.size - mean * mean)
    return TensorStats(spec, sqrt(variance), sqrt(squares / spec.size), peak, finite=True)


def tensor_stats(array: npt.NDArray[np.generic], spec: TensorSpec) -> TensorStats:
    """Statistics of the stored elements of a packable tensor.

    Parameters
    ----------
    array : ndarray
        Stored elements (BF16 as uint16 bits).
    spec : TensorSpec
        With a dtype in :data:`weightvid.dtypes.PACKABLE`; others have statistics of zero.
    """
    if spec.dtype not in PACKABLE or not spec.size:
        return TensorStats(spec, 0.0, 0.0, 0.0, spec.dtype in PACKABLE)
    return stats_of(spec, block_sums(array, spec.dtype))
