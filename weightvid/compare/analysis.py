"""What rows say together: the Pareto front, BD-rates, the best settings at a point."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from weightvid.compare.bd import BdRate, Pair, bd_rate
from weightvid.compare.row import Row
from weightvid.errors import QuantizationError
from weightvid.planning.target import parse_size


@dataclass(frozen=True, slots=True)
class Quality:
    """A measure of how good a restored model is.

    Attributes
    ----------
    name, title : str
    value : callable
        Of a row; None where it has none.
    rises : callable
        The value as something that rises with the quality, for BD-rates.
    """

    name: str
    title: str
    value: Callable[[Row], float | None]
    rises: Callable[[float], float]


def _sqnr(row: Row) -> float | None:
    return row.sqnr_db


def _metric(row: Row) -> float | None:
    return row.metric


def _kl(row: Row) -> float | None:
    return row.kl


def _cosine(row: Row) -> float | None:
    return row.cosine_loss


def _minus_log(value: float) -> float:
    return -10 * math.log10(value) if value > 0 else math.inf


def qualities(rows: Sequence[Row], lower_is_better: bool = False) -> list[Quality]:
    """Measures that these rows have; the one that tells most comes first."""
    sign = -1.0 if lower_is_better else 1.0
    known = [
        Quality("kl", "KL divergence (nats)", _kl, _minus_log),
        Quality("cosine", "1 - cosine of the outputs", _cosine, _minus_log),
        Quality("metric", "metric", _metric, lambda value: sign * value),
        Quality("sqnr", "SQNR (dB)", _sqnr, float),
    ]
    return [q for q in known if any(q.value(row) is not None for row in rows if row.ok)]


def pareto(rows: Sequence[Row], quality: Quality) -> frozenset[str]:
    """Labels of the points that no other is both smaller than and better than.

    Bit-exact points count as endlessly good in SQNR.
    """
    points = []
    for row in rows:
        if not row.ok or row.file_bytes is None or row.kind == "original":
            continue
        value = quality.value(row)
        if value is None and quality.name == "sqnr":
            points.append((row.file_bytes, math.inf, row.label))
        elif value is not None:
            points.append((row.file_bytes, quality.rises(value), row.label))
    points.sort(key=lambda point: (point[0], -point[1]))
    best, front = -math.inf, set()
    for _, value, label in points:
        if value > best:
            best = value
            front.add(label)
    return frozenset(front)


def series(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Measured points of each curve, by rate."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row.ok and row.kind != "original":
            found.setdefault(row.series, []).append(row)
    return {
        name: sorted(points, key=lambda row: row.file_bytes or 0) for name, points in found.items()
    }


def curve(points: Sequence[Row], quality: Quality) -> list[Pair]:
    """Rates and rising qualities."""
    return [
        (row.bits_per_weight, quality.rises(value))
        for row in points
        if row.bits_per_weight is not None and (value := quality.value(row)) is not None
    ]


def check_anchor(name: str, known: Sequence[str]) -> None:
    """Refuse an anchor that is no curve.

    Raises
    ------
    QuantizationError
    """
    if name not in known:
        raise QuantizationError(f"no curve {name!r} to measure against; known: {', '.join(known)}")


def bd_rates(
    rows: Sequence[Row], anchor: str, measures: Sequence[Quality]
) -> dict[str, dict[str, BdRate]]:
    """BD-rate of each curve against the anchor, over each measure; single points are left out."""
    curves = series(rows)
    check_anchor(anchor, tuple(curves))
    return {
        name: {q.name: bd_rate(curve(curves[anchor], q), curve(points, q)) for q in measures}
        for name, points in curves.items()
        if name != anchor and len(points) > 1
    }


#: what ``--at`` takes.
POINTS: Final = ("sqnr", "metric", "kl", "cosine", "size", "bpw")


@dataclass(frozen=True, slots=True)
class At:
    """A point to look at: a quality to be reached, or a size to be kept.

    Attributes
    ----------
    kind : str
        One of :data:`POINTS`.
    value : float
    """

    kind: str
    value: float


def parse_at(text: str) -> At:
    """A point such as ``sqnr=22``, ``metric=91.0``, ``kl=0.02``, ``size=110kB`` or ``bpw=3.5``.

    Raises
    ------
    QuantizationError

    Examples
    --------
    >>> parse_at("size=110kB")
    At(kind='size', value=110000.0)
    """
    kind, equals, amount = text.partition("=")
    try:
        if kind not in POINTS or not equals:
            raise ValueError
        value = parse_size(amount) if kind == "size" else float(amount)
        if not math.isfinite(value):
            raise ValueError
    except ValueError:
        raise QuantizationError(
            f"{text!r} is no point such as sqnr=22, metric=91.0, kl=0.02, size=110kB or bpw=3.5"
        ) from None
    return At(kind, value)


def best_at(rows: Sequence[Row], at: At, lower_is_better: bool = False) -> list[Row]:
    """The best point of each codec: the smallest that is good enough, or the best that fits.

    Parameters
    ----------
    rows : sequence of Row
    at : At
    lower_is_better : bool
        Of the metric.

    Returns
    -------
    list of Row
        At most one of each codec or baseline, smallest (or best) first.
    """
    measures: Mapping[str, Quality] = MappingProxyType(
        {q.name: q for q in qualities(rows, lower_is_better)}
    )
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row.ok and row.kind != "original":
            name = str(row.setting["method"])
            groups.setdefault(f"{row.kind} {name}", []).append(row)
    found: list[Row] = []
    if at.kind in ("size", "bpw"):
        quality = next(iter(measures.values()))

        def goodness(row: Row) -> float:
            value = quality.value(row)
            return math.inf if value is None else quality.rises(value)

        for points in groups.values():
            fitting = [row for row in points if _size(row, at.kind) <= at.value]
            found += [max(fitting, key=goodness)] if fitting else []
        return sorted(found, key=goodness, reverse=True)
    wanted = measures.get(at.kind)
    if wanted is None:
        return []
    for points in groups.values():
        good = [row for row in points if _reaches(row, wanted, at.value)]
        found += [min(good, key=lambda row: row.file_bytes or 0)] if good else []
    return sorted(found, key=lambda row: row.file_bytes or 0)


def _size(row: Row, kind: str) -> float:
    size = row.file_bytes if kind == "size" else row.bits_per_weight
    return math.inf if size is None else size


def _reaches(row: Row, quality: Quality, goal: float) -> bool:
    value = quality.value(row)
    if value is None:
        return quality.name == "sqnr"
    return quality.rises(value) >= quality.rises(goal)
