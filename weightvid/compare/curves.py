"""Rate curves: measures of quality, the rate at a given quality, and BD-rates."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise
from math import inf, isfinite, log, nan

import numpy as np

from weightvid.compare.rows import Row
from weightvid.errors import QuantizationError

#: rate in bits per weight, and a level that falls with the quality.
Pair = tuple[float, float]


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
    name, _, amount = text.partition("=")
    try:
        value = float(amount)
    except ValueError:
        value = nan
    measure = measures().get(name)
    if measure is None or not isfinite(value):
        raise QuantizationError(
            f"{text!r} is no goal such as kl=0.02, cosine=0.98, metric=91.0 or sqnr=22"
        )
    if not isfinite(measure.level(value)):
        raise QuantizationError(f"no rate reaches {text}: choose a quality short of perfect")
    return Goal(name, value)


def crossing(curve: Sequence[Pair], level: float) -> float | None:
    """Rate at which a curve of (bits per weight, level) reaches a level; None: it never does.

    It lies between the two neighbouring points. Levels fall with the quality.

    Examples
    --------
    >>> crossing([(2, 4), (2.5, 3), (3, 2), (3.5, 1), (4, 0)], 1)
    3.5
    """
    between = (
        r0 + (r1 - r0) * (l0 - level) / (l0 - l1)
        for (r0, l0), (r1, l1) in pairwise(_falling(sorted(curve)))
        if l1 <= level <= l0
    )
    return next(between, None)


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
    with warnings.catch_warnings(action="ignore"):  # about small common ranges
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
