"""What the choice of a step needs to know of a tensor's weights."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import numpy as np
import numpy.typing as npt

from weightvid.dtypes import PACKABLE, to_float32
from weightvid.spec import TensorSpec

#: weights looked at in one go.
_BLOCK = 1 << 20


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


def tensor_stats(array: npt.NDArray[np.generic], spec: TensorSpec) -> TensorStats:
    """Statistics of the stored elements of a packable tensor, in blocks, in float64.

    Parameters
    ----------
    array : ndarray
        Stored elements (BF16 as uint16 bits).
    spec : TensorSpec
        With a dtype in :data:`weightvid.dtypes.PACKABLE`; others have statistics of zero.
    """
    if spec.dtype not in PACKABLE or not spec.size:
        return TensorStats(spec, 0.0, 0.0, 0.0, spec.dtype in PACKABLE)
    flat = array.reshape(-1)
    total = squares = peak = 0.0
    # float64 beyond the range of float32 becomes infinite here, and the tensor is kept exact.
    with np.errstate(over="ignore", invalid="ignore"):
        for begin in range(0, flat.size, _BLOCK):
            block = to_float32(flat[begin : begin + _BLOCK], spec.dtype).astype(np.float64)
            total += float(block.sum())
            squares += float(np.dot(block, block))
            peak = max(peak, float(np.abs(block).max()))
    finite = bool(np.isfinite(squares)) and bool(np.isfinite(peak))
    if not finite:
        return TensorStats(spec, 0.0, 0.0, 0.0, finite=False)
    mean = total / flat.size
    variance = max(0.0, squares / flat.size - mean * mean)
    return TensorStats(spec, sqrt(variance), sqrt(squares / flat.size), peak, finite=True)
