"""Rate curves: measures of quality, the rate at a given quality, and BD-rates."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise
from math import inf, isfinite, log, nan, sqrt
from typing import Final

import numpy as np

from weightvid.compare.rows import Row
from weightvid.errors import QuantizationError

#: rate in bits per weight, and a level that falls with the quality.
Pair = tuple[float, float]
#: points so many bits per weight around a crossing take part in its straight line.
_FIT_HALF_WIDTH: Final = 1.0
_FIT_POINTS: Final = 4


@dataclass(frozen=True, slots=True)
class Measure:
    """A measure of quality; if ``is_log``, plots have a logarithmic axis.

    ``value`` is that of a row, None where it has none; ``level`` is a value as something that falls
    with the quality, about straight over bits per weight.
    """

    name: str
    title: str
    value: Callable[[Row], float | None]
    level: Callable[[float], float]
    is_log: bool = False

    def points(self, rows: Sequence[Row]) -> list[Pair]:
        """Rates and values of the rows that can be compared: perfect ones have no level."""
        pairs = [(row.bits_per_weight, self.value(row)) for row in rows]
        return [(x, y) for x, y in pairs if y is not None and isfinite(self.level(y))]

    def levels(self, rows: Sequence[Row]) -> list[Pair]:
        """The same with levels."""
        return [(rate, self.level(value)) for rate, value in self.points(rows)]


def _log(value: float) -> float:
    return log(value) if value > 0 else -inf


def measures(lower_is_better: bool = False, title: str = "metric") -> dict[str, Measure]:
    """Every measure, by name; the ones that say most come first.

    ``lower_is_better`` and ``title`` are about the metric.
    """
    kl, cosine = "KL divergence to the original (nats)", "cosine to the original"
    sign = 1 if lower_is_better else -1
    found = (
        Measure("kl", kl, lambda row: row.kl, _log, is_log=True),
        Measure("cosine", cosine, lambda row: row.cosine, lambda value: _log(1 - value)),
        Measure("metric", title, lambda row: row.metric, lambda value: sign * value),
        Measure("sqnr", "SQNR (dB)", lambda row: row.sqnr_db, lambda value: -value * log(10) / 10),
    )
    return {measure.name: measure for measure in found}


@dataclass(frozen=True, slots=True)
class Goal:
    """A quality at which rates are told: the name of a measure, and its value."""

    measure: str
    value: float

    def __str__(self) -> str:
        return f"{self.measure}={self.value:g}"


def parse_goal(text: str) -> Goal:
    """A goal such as ``kl=0.02``, ``cosine=0.98``, ``metric=91.0`` or ``sqnr=22``.

    Raises
    ------
    QuantizationError

    Examples
    --------
    >>> parse_goal("kl=0.02")
    Goal(measure='kl', value=0.02)
    """
    name, equals, amount = text.partition("=")
    try:
        value = float(amount)
    except ValueError:
        value = nan
    measure = measures().get(name)
    if measure is None or not equals or not isfinite(value):
        raise QuantizationError(
            f"{text!r} is no goal such as kl=0.02, cosine=0.98, metric=91.0 or sqnr=22"
        )
    if not isfinite(measure.level(value)):
        raise QuantizationError(f"no rate reaches {text}: choose a quality short of perfect")
    return Goal(name, value)


@dataclass(frozen=True, slots=True)
class Crossing:
    """Rate at which a curve reaches a level, in bits per weight.

    ``interpolated`` lies between the two neighbouring points; None: never reached. ``fitted`` is by
    a straight line through the levels within 1 bit around, ``fitted_se`` its standard error: one
    draw of a quantizer is noisy, and a line through many averages that out. None: too few points.
    """

    interpolated: float | None = None
    fitted: float | None = None
    fitted_se: float | None = None


def crossing(curve: Sequence[Pair], level: float) -> Crossing:
    """Rate of a curve of (bits per weight, level) at a level; levels fall with the quality.

    Examples
    --------
    >>> found = crossing([(2, 4), (2.5, 3), (3, 2), (3.5, 1), (4, 0)], 1)
    >>> found.interpolated, round(found.fitted, 6)
    (3.5, 3.5)
    """
    points = sorted(curve)
    between = (
        r0 + (r1 - r0) * (l0 - level) / (l0 - l1)
        for (r0, l0), (r1, l1) in pairwise(_falling(points))
        if l1 <= level <= l0
    )
    interpolated = at = next(between, None)
    error = None
    for _ in range(10):
        near = [p for p in points if at is not None and abs(p[0] - at) <= _FIT_HALF_WIDTH]
        if at is None or len(near) < _FIT_POINTS:
            return Crossing(interpolated)
        before, (at, error) = at, _line(near, level)
        if at is not None and abs(at - before) < 1e-9:
            break
    return Crossing(interpolated, at, error)


def _falling(points: Sequence[Pair]) -> list[Pair]:
    """Pool neighbours until the level falls with the rate: a lucky draw counts for no more."""
    pools: list[tuple[float, float, int]] = []
    for rate, loss in points:
        pools.append((rate, loss, 1))
        while len(pools) > 1 and pools[-1][1] >= pools[-2][1]:
            (r1, l1, n1), (r0, l0, n0) = pools.pop(), pools.pop()
            n = n0 + n1
            pools.append(((r0 * n0 + r1 * n1) / n, (l0 * n0 + l1 * n1) / n, n))
    return [(rate, loss) for rate, loss, _ in pools]


def _line(points: Sequence[Pair], level: float) -> tuple[float | None, float | None]:
    x, y = np.array(points).T
    slope, offset = np.polyfit(x, y, 1)
    if slope >= 0:
        return None, None
    at = float((level - offset) / slope)
    spread = float(np.square(y - slope * x - offset).sum() / max(1, len(x) - 2))
    lever = 1 / len(x) + (at - x.mean()) ** 2 / np.square(x - x.mean()).sum()
    return at, float(sqrt(spread * lever) / -slope)


def ending(measure: Measure, rows: Sequence[Row], level: float) -> str:
    """Why a curve has no rate at a level: which of its ends lies before it."""
    points = sorted(measure.points(rows))
    if not points:
        return "no such measure"
    falls_short = all(found > level for _, found in measure.levels(rows))
    rate, value = points[-1] if falls_short else points[0]
    return f"{'above' if falls_short else 'below'} {rate:.2f} (ends at {value:.4g})"


def bd_rate(anchor: Sequence[Pair], test: Sequence[Pair]) -> float | None:
    """Mean rate difference at equal quality in percent: PCHIP over log rate, by ``bjontegaard``.

    Returns
    -------
    float or None
        Negative: the tested curve is smaller. None: of the points of a curve that no cheaper one
        beats, fewer than three lie in the common range, or the package is not installed.
    """
    falling = [front(curve) for curve in (anchor, test)]
    if not all(falling) or find_spec("bjontegaard") is None:
        return None
    low, high = max(c[-1][1] for c in falling), min(c[0][1] for c in falling)
    if min(sum(low <= level <= high for _, level in curve) for curve in falling) < 3:
        return None
    import bjontegaard

    (rate_a, level_a), (rate_t, level_t) = (np.array(curve).T for curve in falling)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about small common ranges
        percent = bjontegaard.bd_rate(
            rate_a, -level_a, rate_t, -level_t, method="pchip", require_matching_points=False
        )
    return float(percent)


def front(curve: Sequence[Pair]) -> list[Pair]:
    """Points by rate, without those that a cheaper one beats.

    Examples
    --------
    >>> front([(3, 2.0), (1, 10.0), (2, 11.0)])
    [(1, 10.0), (3, 2.0)]
    """
    found: list[Pair] = []
    for rate, level in sorted(curve):
        if not found or level < found[-1][1]:
            found.append((rate, level))
    return found
