"""Estimated code length of levels, for encoders that weigh bits against squared error.

The entropy coder behind a video track sees levels as plain samples and does not know the trellis
state, so the model is the marginal one: a static code, one price for each level. It is symmetric
because HEVC codes signs in bypass mode: one bit, however skewed they are. To believe in cheaper
signs would give away up to 3 % of the stream.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

#: levels beyond -127..127 are priced by a straight line; they are escapes of an 8-bit sample.
TABLE_MAX: Final = 127
_PRIOR_WEIGHT: Final = 16.0
_MIN_TAIL_BITS: Final = 0.02

Integers = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True, slots=True, eq=False)
class RateModel:
    """Bits that a level costs.

    Attributes
    ----------
    bits : ndarray of float64, shape (255,)
        Of the levels -127 .. 127.
    tail_bits : float
        Added bits per unit of magnitude beyond them.
    """

    bits: npt.NDArray[np.float64]
    tail_bits: float

    @classmethod
    def laplacian(cls, mean_magnitude: float) -> RateModel:
        """Model of geometric magnitudes of the given mean (in levels, >= 0) and random sign.

        Examples
        --------
        >>> RateModel.laplacian(1.0).of(np.array([0, 1, -1, 200])).round(3).tolist()
        [1.0, 3.0, 3.0, 202.0]
        """
        mean = max(float(mean_magnitude), 1e-6)
        ratio = mean / (1.0 + mean)
        slope = -float(np.log2(ratio))
        magnitudes = np.abs(np.arange(-TABLE_MAX, TABLE_MAX + 1))
        bits = -np.log2(1.0 - ratio) + slope * magnitudes + (magnitudes > 0)
        return cls(bits, max(slope, _MIN_TAIL_BITS))

    @classmethod
    def from_levels(cls, levels: Integers) -> RateModel:
        """Model of the histogram of some levels (or none) and their negatives, with a prior."""
        flat = levels.astype(np.int32, copy=False).ravel()
        prior = cls.laplacian(float(np.abs(flat).mean()) if flat.size else 0.0)
        clipped = np.clip(flat, -TABLE_MAX, TABLE_MAX) + TABLE_MAX
        counts = np.bincount(clipped, minlength=2 * TABLE_MAX + 1)
        folded = 0.5 * (counts + counts[::-1])
        share = (folded + _PRIOR_WEIGHT * np.exp2(-prior.bits)) / (flat.size + _PRIOR_WEIGHT)
        return cls(-np.log2(np.maximum(share, 1e-300)), prior.tail_bits)

    def of(self, levels: Integers) -> npt.NDArray[np.float64]:
        """Bits of each level, same shape."""
        wide = levels.astype(np.int64)
        inside = np.clip(wide, -TABLE_MAX, TABLE_MAX)
        bits: npt.NDArray[np.float64] = self.bits[inside + TABLE_MAX]
        bits += self.tail_bits * np.abs(wide - inside)
        return bits


def entropy_bits(levels: Integers) -> float:
    """Zero-order entropy of levels in bits per level (0 for an empty array).

    Examples
    --------
    >>> entropy_bits(np.array([0, 1, 0, 1]))
    1.0
    """
    if levels.size == 0:
        return 0.0
    counts = np.bincount(levels.ravel().astype(np.int64) - int(levels.min()))
    share = counts[counts > 0] / levels.size
    return max(0.0, -float((share * np.log2(share)).sum()))


def sign_coded_bits(levels: Integers) -> float:
    """Entropy of the magnitudes plus one bit for each sign, in bits per level.

    What a coder with bypass signs, such as HEVC, can reach at best.

    Examples
    --------
    >>> sign_coded_bits(np.array([0, 1, 0, 1]))
    1.5
    """
    return entropy_bits(np.abs(levels)) + float(np.count_nonzero(levels)) / max(levels.size, 1)
