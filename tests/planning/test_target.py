"""Targets, and the search of the step factor that meets them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from archives import normal
from hypothesis import given
from hypothesis import strategies as st

from weightvid.calibration import CalibrationStats, TensorMoments, model_hash
from weightvid.checkpoint import from_mapping
from weightvid.errors import QuantizationError, TargetError
from weightvid.loader import open_archive
from weightvid.pack import PackOptions, PackReport, Target, pack_checkpoint
from weightvid.packing.source import ReaderSource, TensorRead
from weightvid.planning.caution import cautions
from weightvid.planning.curve import RateCurve, sample_tensor
from weightvid.planning.target import parse_share, parse_size
from weightvid.spec import TensorSpec

Arrays = dict[str, np.ndarray[Any, Any]]


def model() -> Arrays:
    """Tensors of different sizes and scales, and some exact ones."""
    return {
        "a.weight": normal(1, 128, 160, scale=0.02),
        "b.weight": normal(2, 64, 48, 3, 3, scale=0.3),
        "c.weight": normal(3, 40, 25, scale=0.1),
        "c.bias": normal(4, 40),
        "d.weight": normal(5, 96, 64).astype(np.float16),
        "count": np.array(3, np.int64),
    }


def pack(path: Path, target: Target, arrays: Arrays | None = None, **more: Any) -> PackReport:
    options = PackOptions(target=target, jobs=1, **more)
    return pack_checkpoint(from_mapping(model() if arrays is None else arrays), path, options)


@pytest.mark.parametrize("rule", ["fidelity", "sqnr"])
@pytest.mark.parametrize("value", [20_000, 30_000, 44_000])
def test_size(tmp_path: Path, rule: str, value: int) -> None:
    report = pack(tmp_path / "m.mp4", Target("size", value), rule=rule)
    assert 0.99 * value <= (tmp_path / "m.mp4").stat().st_size <= value
    assert report.file_bytes == (tmp_path / "m.mp4").stat().st_size
    assert report.encodings <= 8
    with open_archive(tmp_path / "m.mp4", check_tensors=True) as archive:
        assert archive.header.about["recipe"] == f"target {value:,} bytes"
        assert {name for name, _ in archive} == set(model())


@pytest.mark.parametrize("value", [2.5, 4.0])
def test_bits_per_weight(tmp_path: Path, value: float) -> None:
    report = pack(tmp_path / "m.mp4", Target("bpw", value))
    assert 0.99 * value <= report.bits_per_weight <= value


@pytest.mark.parametrize("states", [0, 8])
@pytest.mark.parametrize("rule", ["fidelity", "sqnr"])
@pytest.mark.parametrize("value", [12.0, 22.0])
def test_sqnr(tmp_path: Path, value: float, rule: str, states: int) -> None:
    report = pack(tmp_path / "m.mp4", Target("sqnr", value), rule=rule, states=states)
    assert report.sqnr_db is not None
    assert abs(report.sqnr_db - value) <= 0.1


@pytest.mark.parametrize(
    ("target", "nearest"),
    [
        (Target("size", 200), "bytes"),
        (Target("size", 10**8), "bytes"),
        (Target("bpw", 0.01), "bits per weight"),
        (Target("bpw", 20), "bits per weight"),
        (Target("sqnr", 0.1), "dB"),
        (Target("sqnr", 90), "dB"),
    ],
)
def test_out_of_reach(tmp_path: Path, target: Target, nearest: str) -> None:
    with pytest.raises(TargetError, match=rf"cannot be reached.*the nearest is [\d,.]+ {nearest}"):
        pack(tmp_path / "m.mp4", target)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("target", [Target("size", 25_000), Target("sqnr", 15.0)])
def test_with_calibration(tmp_path: Path, target: Target) -> None:
    """Error feedback changes rate and noise at a step; the search sees files, and minds not."""
    arrays = model()
    inputs = np.abs(normal(8, 300, 160, scale=1.0)) + 0.5
    moment = (inputs.T @ inputs / len(inputs))[None].astype(np.float32)
    tensors = {"a.weight": TensorMoments(moment, None, rows=300)}
    source = from_mapping(arrays)
    stats = CalibrationStats(model_hash(source, tensors), 300, tensors)
    report = pack(tmp_path / "m.mp4", target, calibration=stats)
    if target.kind == "size":
        assert 0.99 * target.value <= report.file_bytes <= target.value
    else:
        assert report.sqnr_db is not None
        assert abs(report.sqnr_db - target.value) <= 0.1
    with open_archive(tmp_path / "m.mp4") as archive:
        assert archive.header.about["calibration"] == "1 tensors, 300 samples"


def test_nothing_to_quantize(tmp_path: Path) -> None:
    for value in (100, 10_000):
        with pytest.raises(TargetError, match=r"the nearest is 1,\d\d\d bytes"):
            pack(tmp_path / "m.mp4", Target("size", value), {"count": np.arange(9)})


def test_the_same_target_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.mp4", "b.mp4"):
        pack(tmp_path / name, Target("size", 25_000))
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


@pytest.mark.parametrize(
    "options",
    [
        {"target": Target("size", 1e5), "step_factor": 0.2},
        {"target": Target("kl", 0.1)},
        {"target": Target("drop", 0.1)},
        {"rule": "magic"},
    ],
)
def test_contradictions_are_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(QuantizationError):
        pack_checkpoint(from_mapping(model()), tmp_path / "m.mp4", PackOptions(**options))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_target_is_positive(value: float) -> None:
    with pytest.raises(QuantizationError):
        Target("size", value)


def test_an_unknown_kind() -> None:
    with pytest.raises(QuantizationError, match="known: size"):
        Target("speed", 1.0)


@given(st.text(max_size=12))
def test_any_text_is_a_size_or_refused(text: str) -> None:
    for parse in (parse_size, parse_share):
        try:
            assert parse(text) > 0
        except QuantizationError as error:
            assert repr(text) in str(error)


@pytest.mark.parametrize("text", ["", "MB", "12XB", "-1MB", "1e3", "0", "1 2MB", "0kB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(QuantizationError):
        parse_size(text)


@pytest.mark.parametrize("text", ["", "%", "150%", "1", "-1%", "0", "0.5 percent"])
def test_what_is_no_share(text: str) -> None:
    with pytest.raises(QuantizationError):
        parse_share(text)


def test_curves_follow_the_theory() -> None:
    """Fine quantization of Gaussian weights: step**2 / 12 a weight, one bit for half the step."""
    array = normal(0, 200, 500, scale=1.0)
    source = from_mapping({"w": array})
    read = TensorRead(ReaderSource(source), source.spec("w"))
    curve = RateCurve(sample_tensor(read), array.size)
    assert curve.noise(0.25) / array.size == pytest.approx(0.25**2 / 12, rel=0.02)
    assert curve.bits(0.25) / array.size == pytest.approx(4.047, abs=0.03)
    assert curve.bits(0.25) - curve.bits(0.5) == pytest.approx(array.size, rel=0.02)
    assert curve.power == pytest.approx(array.size, rel=0.05)


def spec(name: str, *shape: int) -> TensorSpec:
    return TensorSpec(name, "F32", shape)


def test_sensitive_models_are_named_in_advance() -> None:
    depthwise = [spec(f"dw{i}", 64, 1, 3, 3) for i in range(4)]
    pointwise = [spec(f"pw{i}", 256, 512) for i in range(4)]
    found = cautions([*depthwise, *pointwise], range(8), 0.18)
    assert len(found) == 1
    assert "4 of 8" in found[0]
    assert "dw0" in found[0]
    assert not cautions(pointwise, range(4), 0.18)
    assert not cautions([*depthwise, *pointwise], range(8), 0.05)
    assert "no floating-point weights" in cautions([], [], 0.18)[0]
    assert "5,000 weights" in cautions([spec("w", 50, 100)], [0], 0.18)[0]
