"""Pareto fronts, BD-rates, and the best setting at a point."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from weightvid.compare.analysis import (
    At,
    bd_rates,
    best_at,
    pareto,
    parse_at,
    qualities,
)
from weightvid.compare.bd import bd_rate
from weightvid.compare.row import ERROR, Row
from weightvid.errors import WeightvidError


def row(series: str, size: int, sqnr: float | None, **more: Any) -> Row:
    method = series.split(maxsplit=1)[0]
    return Row(
        f"{series} {size}", series, more.pop("kind", "lossy"), {"method": method},
        file_bytes=size, bits_per_weight=size / 100, sqnr_db=sqnr, weights=800, **more,
    )  # fmt: skip


ANCHOR = [(2.0, 10.0), (3.0, 16.0), (4.0, 22.0), (5.0, 28.0)]


def test_bd_rate_is_bjontegaards() -> None:
    import bjontegaard

    test = [(1.9, 11.0), (2.7, 17.0), (3.5, 21.0), (4.9, 29.0)]
    found = bd_rate(ANCHOR, test)
    by_hand = bjontegaard.bd_rate(
        [r for r, _ in ANCHOR], [q for _, q in ANCHOR],
        [r for r, _ in test], [q for _, q in test],
        method="pchip", require_matching_points=False,
    )  # fmt: skip
    assert found.percent == pytest.approx(float(by_hand), abs=1e-9)
    assert (found.low, found.high) == (11.0, 28.0)


def test_bd_rate_of_a_scaled_curve() -> None:
    assert bd_rate(ANCHOR, [(r * 0.9, q) for r, q in ANCHOR]).percent == pytest.approx(-10)
    assert bd_rate(ANCHOR, ANCHOR).percent == pytest.approx(0)


def test_bd_rate_says_why_there_is_none() -> None:
    far = [(rate, quality + 100) for rate, quality in ANCHOR]
    assert "do not overlap" in bd_rate(ANCHOR, far).reason
    short = bd_rate(ANCHOR, ANCHOR[:2]).reason
    assert "rises with the rate over 2 of its points; 3 are needed" in short
    falling = [(rate, -quality) for rate, quality in ANCHOR]
    assert "over 1 of its points" in bd_rate(ANCHOR, falling).reason


def test_pareto_front() -> None:
    rows = [
        row("a", 100, 10), row("a", 200, 20), row("b", 150, 9), row("b", 200, 19),
        row("c", 300, None, exact=True), row("d", 50, 99, status=ERROR),
        row("original", 3200, None, kind="original", exact=True),
    ]  # fmt: skip
    quality = qualities(rows)[0]
    assert quality.name == "sqnr"
    assert pareto(rows, quality) == {"a 100", "a 200", "c 300"}


def test_metrics_that_fall() -> None:
    rows = [
        row("a", 100, 10, metric=5.0),
        row("a", 200, 20, metric=3.0),
        row("b", 150, 1, metric=6),
    ]
    falls, rises = qualities(rows, lower_is_better=True)[0], qualities(rows)[0]
    assert pareto(rows, falls) == {"a 100", "a 200"}
    assert pareto(rows, rises) == {"a 100", "b 150"}


def test_bd_rates_of_rows() -> None:
    rows = [row("a", int(100 * r), q, kl=1 / q) for r, q in ANCHOR]
    rows += [row("b", int(90 * r), q, kl=1 / q) for r, q in ANCHOR] + [row("single", 7, 7)]
    found = bd_rates(rows, "a", qualities(rows))
    assert set(found) == {"b"}
    assert found["b"]["sqnr"].percent == pytest.approx(-10)
    assert found["b"]["kl"].percent == pytest.approx(-10)
    with pytest.raises(WeightvidError, match="no curve 'z'"):
        bd_rates(rows, "z", [])


def test_best_at() -> None:
    rows = [
        row("a", 100, 10, metric=80.0), row("a", 200, 20, metric=90.0),
        row("b", 150, 21, metric=91.0), row("weightvid", 170, 20, metric=90.0, kind="pack"),
        row("zip", 400, None, metric=91.0, kind="baseline"),
    ]  # fmt: skip
    at = [r.label for r in best_at(rows, At("sqnr", 20))]
    assert at == ["b 150", "weightvid 170", "a 200", "zip 400"]
    assert [r.label for r in best_at(rows, At("size", 180))] == ["b 150", "weightvid 170", "a 100"]
    assert [r.label for r in best_at(rows, At("metric", 90.5))] == ["b 150", "zip 400"]
    assert best_at(rows, At("kl", 0.1)) == []
    assert [r.label for r in best_at(rows, At("bpw", 1.2))] == ["a 100"]


@pytest.mark.parametrize("text", ["sqnr", "sqnr=", "size=many", "psnr=3", "metric=nan", "=3"])
def test_points_that_are_none(text: str) -> None:
    with pytest.raises(WeightvidError, match="is no point such as"):
        parse_at(text)


def test_parse_at() -> None:
    assert parse_at("sqnr=22") == At("sqnr", 22.0)
    assert parse_at("size=1.5MiB") == At("size", 1.5 * 2**20)
    assert np.isclose(parse_at("metric=-3.5").value, -3.5)
