"""Step factors for a size, a rate or a quality."""

from __future__ import annotations

from math import log2
from pathlib import Path

import numpy as np
import pytest
import small_models
from hypothesis import given
from hypothesis import strategies as st

from weightvid.checkpoint import from_mapping
from weightvid.errors import QuantizationError, TargetError
from weightvid.loader import open_archive
from weightvid.pack import PackOptions, PackReport, pack_checkpoint
from weightvid.targets import Target, Trial, parse_size, search

WEIGHTS = 100_000


def curve(overhead: int, shift: float, slope: float, factor: float) -> Trial:
    """A file of so many bytes and levels, whose rate falls by ``slope`` bits an octave to 0."""
    rate = log2(1 + 2 ** (shift - slope * log2(factor)))
    return Trial(factor, overhead + round(rate * WEIGHTS / 8), 6.02 * (shift - log2(factor)))


curves = st.tuples(st.integers(500, 40_000), st.floats(0.0, 3.0), st.floats(0.7, 1.1))


@given(curves, st.floats(1.2, 6.0), st.floats(0.05, 1.0))
def test_sizes_and_rates_are_met_from_below(
    made: tuple[int, float, float], rate: float, first: float
) -> None:
    least = made[0] + rate * WEIGHTS / 8
    for kind, value in (("size", least), ("bpw", 8 * least / WEIGHTS)):
        found, count = search(WEIGHTS, first, Target(kind, value), lambda f: curve(*made, f))
        reached = found.file_bytes if kind == "size" else 8 * found.file_bytes / WEIGHTS
        assert 0.99 * value <= reached <= value
        assert count <= 8


@given(curves, st.floats(3.0, 45.0), st.floats(0.05, 1.0))
def test_qualities_are_met(made: tuple[int, float, float], decibels: float, first: float) -> None:
    found, count = search(
        WEIGHTS, first, Target("sqnr", decibels), lambda factor: curve(*made, factor)
    )
    assert found.sqnr_db == pytest.approx(decibels, abs=0.1)
    assert count <= 4


@pytest.mark.parametrize(
    ("target", "nearest"), [(Target("size", 100), "7,812 bytes"), (Target("bpw", 90), "13.04")]
)
def test_what_cannot_be_reached_names_the_nearest(target: Target, nearest: str) -> None:
    def encode(factor: float) -> Trial:
        return curve(500, 2.0, 1.0, min(max(factor, 1 / 2048), 8.0))

    with pytest.raises(TargetError, match=rf"cannot be reached.*{nearest}"):
        search(WEIGHTS, 0.2, target, encode)


@pytest.mark.parametrize(("kind", "value"), [("size", 26_000), ("bpw", 3.2), ("sqnr", 21.5)])
def test_archives_meet_their_targets(tmp_path: Path, kind: str, value: float) -> None:
    path = tmp_path / "m.mp4"
    options = PackOptions(target=Target(kind, value), jobs=1)
    report: PackReport = pack_checkpoint(from_mapping(small_models.several_frames()), path, options)
    reached = {
        "size": path.stat().st_size, "bpw": report.bits_per_weight, "sqnr": report.sqnr_db,
    }[kind]  # fmt: skip
    assert reached is not None
    if kind == "sqnr":
        assert reached == pytest.approx(value, abs=0.1)
    else:
        assert 0.99 * value <= reached <= value
    assert report.file_bytes == path.stat().st_size
    assert 1 < report.encodings <= 8
    with open_archive(path) as archive:
        assert archive.header.about["recipe"] == f"target {Target(kind, value)}"


@pytest.mark.parametrize("target", [Target("size", 1200), Target("sqnr", 150)])
def test_out_of_reach_leaves_nothing(tmp_path: Path, target: Target) -> None:
    with pytest.raises(TargetError, match="nearest"):
        pack_checkpoint(
            from_mapping({"w": small_models.weights(1, 90, 90)}), tmp_path / "m.mp4",
            PackOptions(target=target, jobs=1),
        )  # fmt: skip
    assert not list(tmp_path.iterdir())


def test_nothing_to_quantize_meets_no_sqnr(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="nothing of the model is packed as video"):
        pack_checkpoint(
            from_mapping({"b": np.ones(9, np.float32)}), tmp_path / "m.mp4",
            PackOptions(target=Target("sqnr", 20), jobs=1),
        )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "size"),
    [("700", 700), ("900kB", 9e5), ("1.5 MB", 1.5e6), ("2gb", 2e9), ("4KiB", 4096)],
)
def test_sizes_in_words(text: str, size: float) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MB", "0", "-3", "1e6", "5 apples", "nan"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(QuantizationError, match="12MB"):
        parse_size(text)


@pytest.mark.parametrize(("kind", "value"), [("weight", 3.0), ("size", 0), ("bpw", float("nan"))])
def test_no_targets(kind: str, value: float) -> None:
    with pytest.raises(QuantizationError):
        Target(kind, value)
