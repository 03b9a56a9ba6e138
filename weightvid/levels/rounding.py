"""Rounding to levels: to the nearest, or so that the errors of a row cancel in the mean.

The second is for layers whose inputs have a mean: behind a rectifier all inputs of a convolution
have a positive one, so the errors of a row of weights add up in its output. Without any data, each
row is rounded so as to make

    e' (I + b J) e,    e = weight / step - level

small, J being all ones over the channels of frequency 0 (the sums of kernels). Coordinate descent
from plain rounding, all rows at once; only the choice of levels changes.

The idea is that of noise shaping in converters; for weights see Nagel et al., "Up or down? Adaptive
rounding for post-training quantization", 2020.
"""

from typing import Final

import numpy as np
import numpy.typing as npt

from weightvid.errors import QuantizationError
from weightvid.loader import MAX_LEVEL, Floats


def uniform(scaled: Floats) -> npt.NDArray[np.int32]:
    """Nearest integers of weights in steps, of any shape; ties to even.

    Where a level would be beyond 2**22, or a weight is NaN or infinite: a QuantizationError.

    Examples
    --------
    >>> uniform(np.array([-1.04, 0.4, 1.5, 2.5], np.float32))
    array([-1,  0,  2,  2], dtype=int32)
    """
    check_range(scaled, MAX_LEVEL)
    return np.rint(scaled).astype(np.int32)


def check_range(scaled: Floats, limit: int) -> float:
    """Return the largest magnitude; raise `QuantizationError` if it is NaN or beyond ``limit``."""
    peak = float(max(np.max(scaled, initial=0.0), -np.min(scaled, initial=0.0)))
    if not np.isfinite(peak):
        raise QuantizationError("weights hold NaN or infinity; keep this tensor exact")
    if peak > limit:
        raise QuantizationError(
            f"a weight lies {peak:.4g} steps from zero, and at most {limit} are allowed; "
            "choose a coarser step or keep this tensor exact"
        )
    return peak


#: b: what the squared sum of a row's errors counts beside their squares.
MEAN_COUPLING: Final = 0.2
_SWEEPS: Final = 2


def balanced(scaled: Floats, channels: int) -> npt.NDArray[np.int32]:
    """Levels of weights in steps, shape (R, C); the errors of the first columns nearly cancel.

    Those are the columns 0 .. channels - 1, of frequency 0. A level out of range is a
    QuantizationError.
    """
    levels = uniform(scaled)
    if channels < 2:
        return levels
    error = np.ascontiguousarray((scaled[:, :channels] - levels[:, :channels]).T)
    change = np.zeros_like(error)
    total = error.sum(axis=0)
    b, gain = np.float32(MEAN_COUPLING), np.float32(1 / (1 + MEAN_COUPLING))
    for _ in range(_SWEEPS):
        for column in range(channels):
            moved = np.rint((error[column] + b * total) * gain)
            error[column] -= moved
            change[column] += moved
            total -= moved
    levels[:, :channels] += change.T.astype(np.int32)
    return levels
