"""Estimated code length of levels, for encoders that weigh bits against squared error.

The entropy coder behind a video track sees levels as plain samples and does not know the trellis
state, so the model is the marginal one: a static code, one price for each level. It is symmetric
because HEVC codes signs in bypass mode: one bit, however skewed they are. A search that believed in
cheaper signs would give away up to 3 % of the stream.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from weightvid.errors import QuantizationError
from weightvid.quantize.params import MAX_LEVEL

TABLE_MAX = 127
"""Levels beyond -127..127 are priced by a straight line; they are escapes of an 8-bit sample."""

_PRIOR_WEIGHT = 16.0
_MIN_TAIL_BITS = 0.02

IntArray = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True, slots=True)
class RateModel:
    """Bits that a level costs.

    Attributes
    ----------
    bits : ndarray of float64, shape (2 * TABLE_MAX + 1,)
        Price of level q at ``q + TABLE_MAX``.
    tail_bits : float
        Added bits per unit of magnitude beyond the table.
    """

    bits: npt.NDArray[np.float64]
    tail_bits: float

    @classmethod
    def laplacian(cls, mean_magnitude: float) -> RateModel:
        """Model of geometric magnitudes of the given mean (in levels, >= 0) and random sign.

        >>> model = RateModel.laplacian(1.0)
        >>> model.of(np.array([0, 1, -1, 200])).round(3).tolist()
        [1.0, 3.0, 3.0, 202.0]
        """
        mean = max(float(mean_magnitude), 1e-6)
        ratio = mean / (1.0 + mean)
        slope = -float(np.log2(ratio))
        magnitudes = np.abs(np.arange(-TABLE_MAX, TABLE_MAX + 1))
        bits = -np.log2(1.0 - ratio) + slope * magnitudes + (magnitudes > 0)
        return cls(bits=bits, tail_bits=max(slope, _MIN_TAIL_BITS))

    @classmethod
    def from_levels(cls, levels: IntArray) -> RateModel:
        """Adaptive model: histogram of the levels and their negatives, a Laplacian prior of 16.

        Parameters
        ----------
        levels : ndarray of int, any shape
            May be empty.
        """
        flat = levels.astype(np.int32, copy=False).ravel()
        mean = float(np.abs(flat).mean()) if flat.size else 0.0
        prior = cls.laplacian(mean)
        clipped = np.clip(flat, -TABLE_MAX, TABLE_MAX) + TABLE_MAX
        counts = np.bincount(clipped, minlength=2 * TABLE_MAX + 1)
        folded = 0.5 * (counts + counts[::-1])
        share = (folded + _PRIOR_WEIGHT * np.exp2(-prior.bits)) / (flat.size + _PRIOR_WEIGHT)
        bits = -np.log2(np.maximum(share, 1e-300))
        return cls(bits=bits, tail_bits=prior.tail_bits)

    def of(self, levels: IntArray) -> npt.NDArray[np.float64]:
        """Bits of each level, same shape."""
        wide = levels.astype(np.int64)
        inside = np.clip(wide, -TABLE_MAX, TABLE_MAX)
        bits: npt.NDArray[np.float64] = self.bits[inside + TABLE_MAX]
        bits += self.tail_bits * np.abs(wide - inside)
        return bits


def sign_coded_bits(levels: IntArray) -> float:
    """Entropy of the magnitudes plus one bit for each sign, in bits per level.

    What a coder with bypass signs, such as HEVC, can reach at best.

    >>> sign_coded_bits(np.array([0, 1, 0, 1]))
    1.5
    """
    return entropy_bits(np.abs(levels)) + float(np.count_nonzero(levels)) / max(levels.size, 1)


def lower_envelope(
    points: list[float], prices: list[float]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.intp]]:
    """Which point is cheapest where, by ``(x - point)^2 + price``.

    Parameters
    ----------
    points : list of float
        Ascending, at least one.
    prices : list of float
        Same length.

    Returns
    -------
    threshold : ndarray of float64, shape (n - 1,)
        Places where the cheapest point changes, ascending.
    winner : ndarray of intp, shape (n,)
        Positions in ``points``; ``winner[i]`` is cheapest between ``threshold[i - 1]`` and
        ``threshold[i]``. Points too dear to be ever cheapest are left out.

    >>> [part.tolist() for part in lower_envelope([0.0, 1.0, 2.0], [0.0, 9.0, 1.0])]
    [[1.25], [0, 2]]
    """
    # Less x^2, each cost is a line in x, so the envelope can be built from left to right.
    winner = [0]
    threshold: list[float] = []
    for k in range(1, len(points)):
        while True:
            j = winner[-1]
            slope = (prices[k] - prices[j]) / (points[k] - points[j])
            meet = 0.5 * (points[k] + points[j] + slope)
            if not threshold or meet > threshold[-1]:
                break
            winner.pop()
            threshold.pop()
        winner.append(k)
        threshold.append(meet)
    return np.array(threshold, np.float64), np.array(winner, np.intp)


def entropy_bits(levels: IntArray) -> float:
    """Zero-order entropy of levels in bits per level (0 for an empty array).

    >>> entropy_bits(np.array([0, 1, 0, 1]))
    1.0
    """
    if levels.size == 0:
        return 0.0
    low = int(levels.min())
    if int(levels.max()) - low < 1 << 20:
        counts = np.bincount(levels.ravel().astype(np.int64) - low)
    else:
        counts = np.unique(levels, return_counts=True)[1]
    share = counts[counts > 0] / levels.size
    return max(0.0, -float((share * np.log2(share)).sum()))


def check_range(weights: npt.NDArray[np.float32], step: float, limit: float) -> None:
    """Refuse weights that a step cannot take.

    Parameters
    ----------
    weights : ndarray of float32
    step : float
        Finite and above zero.
    limit : float
        Largest ``|weight| / step`` allowed.

    Raises
    ------
    QuantizationError
        For a bad step, non-finite weights, or weights beyond ``limit`` steps.
    """
    if not (np.isfinite(step) and step > 0.0):
        raise QuantizationError(f"step must be finite and above 0, not {step!r}")
    if weights.size == 0:
        return
    low, high = float(weights.min()), float(weights.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise QuantizationError("weights hold NaN or infinity; store this tensor exactly instead")
    peak = max(-low, high)
    if peak / step > limit:
        raise QuantizationError(
            f"step {step:g} is too small for weights up to {peak:g}: "
            f"levels would exceed {MAX_LEVEL}; use a step of at least {peak / limit:g}"
        )
