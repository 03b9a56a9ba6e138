"""Rates at a quality, BD-rates, goals."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightvid.compare.curves import bd_rate, crossing, front, measures, parse_goal
from weightvid.compare.rows import Row
from weightvid.errors import QuantizationError


@given(slope=st.floats(0.5, 3), offset=st.floats(-2, 4), rate=st.floats(2.3, 4.7))
def test_straight_lines_are_crossed_exactly(slope: float, offset: float, rate: float) -> None:
    measure = pytest.importorskip("measure", reason="the tool needs torch")
    curve = [(x / 4, offset - slope * x / 4) for x in range(8, 20)]
    found = measure.fitted_crossing(curve[::-1], offset - slope * rate)
    assert found.interpolated == pytest.approx(rate)
    assert found.fitted == pytest.approx(rate)
    assert found.fitted_se == pytest.approx(0, abs=1e-6)


def test_lucky_points_are_pooled() -> None:
    """Of a curve that rises for a moment both points count half."""
    found = crossing([(1, 4.0), (2, 1.0), (3, 2.0), (4, 0.0)], 1.5)
    assert found == pytest.approx(2.5)


@pytest.mark.parametrize("level", [9.0, -1.0])
def test_a_level_that_is_not_reached(level: float) -> None:
    assert crossing([(1, 3.0), (2, 2.0), (3, 1.0)], level) is None


def test_bd_rate() -> None:
    pytest.importorskip("bjontegaard")
    anchor = [(rate, -math.log(rate)) for rate in (1.0, 2.0, 3.0, 4.0)]
    test = [(0.9 * rate, level) for rate, level in anchor]
    assert bd_rate(anchor, test) == pytest.approx(-10, abs=1e-6)
    assert bd_rate(test, anchor) == pytest.approx(100 / 0.9 - 100, abs=1e-6)
    assert bd_rate(anchor, test[:2]) is None
    # Five points each, of which two lie where both curves are.
    apart = [(rate, -math.log(rate)) for rate in (3.5, 3.8, 5.0, 6.0, 7.0)]
    assert bd_rate([*anchor, (3.9, -1.37)], apart) is None
    assert bd_rate(anchor, [(rate, level - 9) for rate, level in test]) is None


def test_front_leaves_out_what_is_beaten() -> None:
    assert front([(2.0, 1.0), (1.0, 2.0), (1.5, 3.0), (2.5, 1.0)]) == [(1.0, 2.0), (2.0, 1.0)]


def test_measures_fall_with_the_quality() -> None:
    good, bad = (
        Row("a", "a", "plain", bits_per_weight=2.0, kl=k, cosine=c, metric=m, sqnr_db=s)
        for k, c, m, s in ((0.01, 0.99, 0.92, 30.0), (0.1, 0.9, 0.85, 20.0))
    )
    for measure in measures().values():
        (_, low), (_, high) = measure.levels([good, bad])
        assert low < high
    (_, low), (_, high) = measures(lower_is_better=True)["metric"].levels([good, bad])
    assert low > high
    perfect = Row("a", "a", "plain", kl=0.0, cosine=1.0)
    assert measures()["kl"].points([perfect]) == measures()["cosine"].points([perfect]) == []


@pytest.mark.parametrize(
    "text", ["kl", "kl=", "kl=x", "kl=nan", "psnr=3", "=1", "kl=0", "cosine=1"]
)
def test_goals_that_are_none(text: str) -> None:
    with pytest.raises(QuantizationError, match=r"goal|perfect"):
        parse_goal(text)


@pytest.mark.parametrize("text", ["kl=0.02", "cosine=0.98", "metric=91.25", "sqnr=22"])
def test_goals_in_words(text: str) -> None:
    assert str(parse_goal(text)) == text
