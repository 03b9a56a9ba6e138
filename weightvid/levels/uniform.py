"""The uniform quantizer: the nearest integer, ties to even."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from weightvid.errors import QuantizationError
from weightvid.loader import MAX_LEVEL, Floats


def uniform(scaled: Floats) -> npt.NDArray[np.int32]:
    """Nearest integers of weights in steps.

    Parameters
    ----------
    scaled : ndarray of float32, any shape
        Weights divided by their steps.

    Returns
    -------
    ndarray of int32, same shape
        Rounded to nearest, ties to even; ``|level|`` at most 2**22.

    Raises
    ------
    QuantizationError
        A weight is NaN or infinite, or a level would exceed 2**22.

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
