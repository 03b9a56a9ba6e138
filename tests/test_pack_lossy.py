"""Lossy archives: the codec quantizes, and every reader gets the same weights."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import small_models

from weightvid.checkpoint import from_mapping
from weightvid.codec.encode import Lossy, Video
from weightvid.codec.x265 import x265_params
from weightvid.errors import CodecError, QuantizationError
from weightvid.loader import open_archive
from weightvid.pack import PackOptions, PackReport, Target, pack_checkpoint
from weightvid.summary import summarize_archive
from weightvid.verify import verify_archive


def packed(arrays: small_models.Arrays, path: Path, lossy: Lossy, jobs: int = 1) -> PackReport:
    options = PackOptions(lossy=lossy, jobs=jobs, force=True)
    return pack_checkpoint(from_mapping(arrays), path, options)


def sqnr_db(before: np.ndarray, after: np.ndarray) -> float:
    error = np.square(before.astype(np.float64) - after).sum()
    return float(10 * np.log10(np.square(before.astype(np.float64)).sum() / error))


@pytest.mark.parametrize("lossy", [Lossy("qp", 4), Lossy("qp", 20), Lossy("crf", 18.5)])
def test_round_trip(lossy: Lossy, tmp_path: Path) -> None:
    arrays = small_models.small()
    made = packed(arrays, tmp_path / "a.mp4", lossy)
    assert made.sqnr_db is not None
    with open_archive(tmp_path / "a.mp4", check_tensors=True) as archive:
        assert archive.header.about["recipe"] == f"lossy video, {lossy}"
        found = dict(archive)
        infos = [archive.info(name) for name in archive.names]
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        if array.ndim < 2 or not array.size:
            assert np.array_equal(found[name], array) or name == "conv.bias"
    told = [i for i in infos if i.coding == "video" and not i.alias_of]
    assert {i.name for i in told} == {"conv.weight", "embed.weight", "half.weight"}
    for info in told:
        reached = sqnr_db(arrays[info.name], found[info.name])
        assert info.sqnr_db == pytest.approx(reached, abs=0.06)
    everything = [(arrays[i.name], found[i.name]) for i in told]
    power = sum(np.square(x.astype(np.float64)).sum() for x, _ in everything)
    noise = sum(np.square(x.astype(np.float64) - y).sum() for x, y in everything)
    assert made.sqnr_db == pytest.approx(10 * np.log10(power / noise), abs=0.01)
    assert verify_archive(tmp_path / "a.mp4").ok
    video = summarize_archive(tmp_path / "a.mp4").video
    assert (video.profile, video.tier) == ("Main", "Main")


def test_a_coarser_qp_is_smaller_and_worse(tmp_path: Path) -> None:
    arrays = small_models.several_frames()
    made = [packed(arrays, tmp_path / "a.mp4", Lossy("qp", qp)) for qp in (8, 20, 32)]
    sizes = [m.file_bytes for m in made]
    errors = [m.sqnr_db or 0 for m in made]
    assert sizes == sorted(sizes, reverse=True)
    assert errors == sorted(errors, reverse=True)
    assert made[0].frames > 1
    # A QP of 6 more is a step twice as large: 6 dB, where the codec's own losses are small.
    assert 9 < errors[0] - errors[1] < 14


def test_far_outliers_are_listed(tmp_path: Path) -> None:
    weights = small_models.weights(0, 128, 128)
    weights[3, 5], weights[100, 7] = 9.0, -7.5
    packed({"w": weights}, tmp_path / "a.mp4", Lossy("qp", 24))
    with open_archive(tmp_path / "a.mp4") as archive:
        info, found = archive.info("w"), archive["w"]
    assert info.escapes >= 2
    assert info.params is not None
    assert np.abs(found[[3, 100], [5, 7]] - weights[[3, 100], [5, 7]]).max() <= info.params.step / 2


@pytest.mark.parametrize("lossy", [Lossy("qp", 20), Lossy("crf", 20)])
def test_jobs_do_not_change_the_bytes(lossy: Lossy, tmp_path: Path) -> None:
    arrays = small_models.several_frames()
    for jobs in (1, 3):
        packed(arrays, tmp_path / f"{jobs}.mp4", lossy, jobs)
    assert (tmp_path / "1.mp4").read_bytes() == (tmp_path / "3.mp4").read_bytes()


def test_a_frame_at_a_time_is_the_same(tmp_path: Path) -> None:
    arrays = small_models.several_frames()
    packed(arrays, tmp_path / "a.mp4", Lossy("qp", 20))
    data = (tmp_path / "a.mp4").read_bytes()
    with open_archive(io.BytesIO(data)) as whole, open_archive(io.BytesIO(data)) as single:
        for name, array in whole:
            assert np.array_equal(array, single[name])


def test_repetitive_levels_are_video_too(tmp_path: Path) -> None:
    """What would be stored without video in a lossless archive."""
    tile = small_models.weights(0, 8, 16)
    packed({"w": np.tile(tile, (40, 20))}, tmp_path / "a.mp4", Lossy("qp", 20))
    assert verify_archive(tmp_path / "a.mp4").ok


@pytest.mark.parametrize(
    ("mode", "value", "message"),
    [("qp", 52, "from 0 to 51"), ("qp", 2.5, "an integer"), ("crf", -1, "from 0 to 51"),
     ("abr", 3, "unknown lossy mode"), ("crf", float("nan"), "a number")],
)  # fmt: skip
def test_values_that_are_none(mode: str, value: float, message: str) -> None:
    with pytest.raises(CodecError, match=message):
        Video(lossy=Lossy(mode, value))


def test_what_does_not_go_together() -> None:
    with pytest.raises(QuantizationError, match="takes no target"):
        PackOptions(lossy=Lossy("qp", 20), target=Target("bpw", 3.0)).check()


def test_lossless_settings_are_what_they_were() -> None:
    assert "lossless=1" in x265_params(Video().coding)
    assert "lossless" not in x265_params(Video(lossy=Lossy("qp", 3)).coding)
