"""Rate curves: equal fidelity, BD-rate, and the Gaussian bound."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from weightvid.compare import bd

Floats = npt.NDArray[np.float64]
Pair = tuple[float, float]

#: points this many bits per weight around a crossing take part in its straight-line fit.
FIT_HALF_WIDTH_BPW: Final = 1.0
FIT_LEAST_POINTS: Final = 4


@dataclass(frozen=True, slots=True)
class Crossing:
    """Rate at which a curve's loss reaches a target.

    Attributes
    ----------
    interpolated : float or None
        Bits per weight between the two neighbouring points, in log loss; None: never reached.
    fitted : float or None
        By a straight line through log loss over bits per weight, within 1 bpw around: one draw of
        a quantizer is noisy, and a line through many averages that out.
    fitted_se : float or None
        Standard error of ``fitted`` from the scatter about the line.
    points : int
        Points in the fit.
    """

    interpolated: float | None
    fitted: float | None
    fitted_se: float | None
    points: int


def crossing(curve: Sequence[Pair], target: float) -> Crossing:
    """Bits per weight of a curve of (bits per weight, loss) at a loss.

    Examples
    --------
    >>> found = crossing([(2, 0.16), (2.5, 0.08), (3, 0.04), (3.5, 0.02), (4, 0.01)], 0.02)
    >>> found.interpolated, round(found.fitted, 6)
    (3.5, 3.5)
    """
    points = sorted((bpw, math.log(loss)) for bpw, loss in curve if loss > 0)
    goal = math.log(target)
    interpolated = _interpolate(_monotone(points), goal)
    at = interpolated
    for _ in range(10):
        near = [p for p in points if at is not None and abs(p[0] - at) <= FIT_HALF_WIDTH_BPW]
        if at is None or len(near) < FIT_LEAST_POINTS:
            break
        before, (at, error) = at, _line(near, goal)
        if at is not None and abs(at - before) < 1e-9:
            return Crossing(interpolated, at, error, len(near))
    else:
        # The set of points may alternate between two; either is a fair choice.
        return Crossing(interpolated, at, error, len(near))
    return Crossing(interpolated, None, None, 0)


def _monotone(points: Sequence[Pair]) -> list[Pair]:
    """Pool neighbours until the loss falls with the rate: a lucky draw counts for no more."""
    pools: list[tuple[float, float, int]] = []
    for bpw, loss in points:
        pools.append((bpw, loss, 1))
        while len(pools) > 1 and pools[-1][1] >= pools[-2][1]:
            (b1, l1, n1), (b0, l0, n0) = pools.pop(), pools.pop()
            n = n0 + n1
            pools.append(((b0 * n0 + b1 * n1) / n, (l0 * n0 + l1 * n1) / n, n))
    return [(bpw, loss) for bpw, loss, _ in pools]


def _interpolate(points: Sequence[Pair], goal: float) -> float | None:
    for (b0, l0), (b1, l1) in pairwise(points):
        if l1 <= goal <= l0:
            return b0 + (b1 - b0) * (l0 - goal) / (l0 - l1)
    return None


def _line(points: Sequence[Pair], goal: float) -> tuple[float | None, float | None]:
    x, y = np.array(points).T
    slope, offset = np.polyfit(x, y, 1)
    if slope >= 0:
        return None, None
    at = float((goal - offset) / slope)
    spread = float(np.square(y - slope * x - offset).sum() / max(1, len(x) - 2))
    lever = 1 / len(x) + (at - x.mean()) ** 2 / np.square(x - x.mean()).sum()
    return at, float(math.sqrt(spread * lever) / -slope)


def bd_rate(anchor: Sequence[Pair], test: Sequence[Pair]) -> dict[str, Any] | None:
    """Mean rate difference in percent at equal quality (:mod:`weightvid.compare.bd`).

    Parameters
    ----------
    anchor, test : sequence of (bits per weight, quality)
        More quality is better.

    Returns
    -------
    dict or None
        ``percent`` (negative: ``test`` is smaller), the range of quality ``from``, ``to``, and
        ``points``, how many of the anchor's and the test's lie in it. None where the curves share
        no range.
    """
    found = bd.bd_rate(anchor, test)
    if found.percent is None:
        return None
    points = list(found.points)
    return {"percent": found.percent, "from": found.low, "to": found.high, "points": points}


class GaussianBound:
    """Least rate of independent Gaussians with the variances of some tensors.

    Reverse water-filling (Cover and Thomas, Elements of Information Theory, 10.3.3): every tensor
    gets distortion ``min(theta, variance)`` and ``log2(variance / distortion) / 2`` bits a weight.
    No code does better on such a source; real weights are not Gaussian, and may cost less.

    Examples
    --------
    >>> x = np.random.default_rng(0).standard_normal(10_000).astype(np.float32)
    >>> round(GaussianBound([x]).bits(20 * math.log10(2)) / x.size, 2)
    1.0
    """

    def __init__(self, tensors: Iterable[npt.NDArray[np.float32]]) -> None:
        held = [x for x in tensors if x.size]
        self._counts = np.array([x.size for x in held], np.float64)
        self._variances = np.array([x.var(dtype=np.float64) for x in held])
        self._power = sum(float(np.square(x, dtype=np.float64).sum()) for x in held)

    def bits(self, sqnr_db: float) -> float:
        """Bits of all tensors at a total SQNR."""
        noise = self._power / 10 ** (sqnr_db / 10)
        low, high = 0.0, float(self._variances.max())
        for _ in range(100):
            theta = (low + high) / 2
            if float((self._counts * np.minimum(theta, self._variances)).sum()) < noise:
                low = theta
            else:
                high = theta
        ratio = np.maximum(self._variances, 1e-300) / max(high, 1e-300)
        return float((self._counts * np.maximum(0, np.log2(ratio) / 2)).sum())
