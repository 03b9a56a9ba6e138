"""BD-rate: how much less one curve takes than another at equal quality."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

Pair = tuple[float, float]
#: points that a curve needs.
LEAST_POINTS: Final = 3


@dataclass(frozen=True, slots=True)
class BdRate:
    """A mean rate difference, or why there is none.

    Attributes
    ----------
    percent : float or None
        Negative: the tested curve is smaller.
    low, high : float or None
        Range of quality that it is taken over.
    points : tuple of int
        How many of the anchor's and the test's points lie in it.
    reason : str
        Why there is no percentage.
    """

    percent: float | None = None
    low: float | None = None
    high: float | None = None
    points: tuple[int, int] = (0, 0)
    reason: str = ""


def bd_rate(anchor: Sequence[Pair], test: Sequence[Pair]) -> BdRate:
    """Mean rate difference at equal quality: PCHIP over log rate, by the ``bjontegaard`` package.

    Parameters
    ----------
    anchor, test : sequence of (bits per weight, quality)
        More quality is better. Points that a cheaper one of the same curve beats are left out:
        the method needs curves that rise.
    """
    rising = [rise(curve) for curve in (anchor, test)]
    for name, curve in zip(("anchor", "curve"), rising, strict=True):
        if len(curve) < LEAST_POINTS:
            return BdRate(
                reason=f"the {name}'s quality rises with the rate over {len(curve)} of its points; "
                f"{LEAST_POINTS} are needed"
            )
    low = max(curve[0][1] for curve in rising)
    high = min(curve[-1][1] for curve in rising)
    if low >= high:
        return BdRate(reason=f"the curves do not overlap: {high:.4g} is below {low:.4g}")
    try:
        import bjontegaard
    except ImportError:
        return BdRate(reason="needs bjontegaard: pip install 'weightvid[compare]'")
    (rate_a, quality_a), (rate_t, quality_t) = (np.array(curve).T for curve in rising)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # small overlaps are told by the range
        percent = bjontegaard.bd_rate(
            rate_a, quality_a, rate_t, quality_t, method="pchip", require_matching_points=False
        )
    inside = [sum(low <= quality <= high for _, quality in curve) for curve in rising]
    return BdRate(float(percent), low, high, (inside[0], inside[1]))


def rise(curve: Sequence[Pair]) -> list[Pair]:
    """Points of a curve, by rate, without those that a cheaper one beats.

    Examples
    --------
    >>> rise([(3, 20.0), (1, 10.0), (2, 9.0), (4, math.inf)])
    [(1, 10.0), (3, 20.0)]
    """
    found: list[Pair] = []
    for rate, quality in sorted(curve):
        if math.isfinite(quality) and (not found or quality > found[-1][1]):
            found.append((rate, quality))
    return found
