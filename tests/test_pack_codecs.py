"""Archives by every codec that fits: the same weights, whoever coded the levels."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from archives import first, packed, same, small_frames
from small_models import several_frames

from weightvid.codec.encode import Lossy, find_program
from weightvid.codec.registry import CODECS
from weightvid.codec.tracks import TRACKS
from weightvid.container.boxes import from_json, inflate, unseal
from weightvid.errors import CodecError
from weightvid.loader import open_archive
from weightvid.pack import PackOptions
from weightvid.summary import summarize_archive
from weightvid.verify import verify_archive

LOSSLESS = [n for n, row in CODECS.items() if row.track and "lossless" in row.modes]
#: what ffprobe calls each codec, and its sample entry.
PROBED = {
    "hevc": ("hevc", "hvc1"), "avc": ("h264", "avc1"), "av1": ("av1", "av01"),
    "vp9": ("vp9", "vp09"), "ffv1": ("ffv1", "FFV1"), "png": ("png", "mp4v"),
    "jpeg2000": ("jpeg2000", "mp4v"),
}  # fmt: skip
WIDTH, HEIGHT = 320, 256


def available(codec: str) -> None:
    try:
        find_program(codec)
    except CodecError as error:
        pytest.skip(str(error))


@cache
def archive(codec: str, jobs: int = 1, lossy: Lossy | None = None, bits: int = 8) -> bytes:
    options = PackOptions(codec=codec, jobs=jobs, lossy=lossy, bit_depth=bits)
    with small_frames(WIDTH, HEIGHT):
        return packed(several_frames(), options)


def header(data: bytes) -> dict[str, Any]:
    span = first(data, b"weightvid-header")
    found: dict[str, Any] = from_json(
        inflate(unseal(data[span.payload : span.end], ""), 1 << 20, ""), ""
    )
    return found


@cache
def tensors(data: bytes) -> dict[str, Any]:
    with open_archive(io.BytesIO(data), check_tensors=True) as found:
        return dict(found)


@pytest.mark.parametrize("codec", LOSSLESS)
def test_the_weights_are_those_of_the_default(codec: str) -> None:
    available(codec)
    usual = tensors(archive("x265"))
    with open_archive(io.BytesIO(archive(codec)), check_tensors=True) as found:
        assert len(found.index.frames) >= 2
        for name in reversed(found.names):
            assert same(found[name], usual[name])
    assert {name: array.tobytes() for name, array in tensors(archive(codec)).items()} == {
        name: array.tobytes() for name, array in usual.items()
    }
    assert verify_archive(io.BytesIO(archive(codec))).ok


@pytest.mark.parametrize("codec", LOSSLESS)
def test_jobs_and_repetition_do_not_change_the_bytes(codec: str) -> None:
    available(codec)
    assert archive(codec, 3) == archive(codec)


@pytest.mark.parametrize("codec", LOSSLESS)
def test_the_header_says_what_a_reader_must_know(codec: str) -> None:
    available(codec)
    record = header(archive(codec))
    track = CODECS[codec].track
    assert record["track"] == {"codec": track, "width": WIDTH, "height": HEIGHT}
    assert record["weightvid"] == [2, 0]
    if track == "hevc":
        assert "must_understand" not in record
    else:
        assert record["must_understand"] == ["track.codec"]
    assert record["about"].get("encoder") == (None if codec == "x265" else codec)


def run(*command: str) -> bytes:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    return subprocess.run(command, check=True, capture_output=True, timeout=300).stdout


@cache
def luma(data: bytes) -> bytes:
    """All samples, by PyAV's demuxer and decoder."""
    found = []
    with av.open(io.BytesIO(data)) as media:
        for frame in media.decode(video=0):
            plane = frame.planes[0]
            rows = np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)
            size = (frame.format.components[0].bits + 7) // 8
            found.append(rows[:, : plane.width * size].tobytes())
    return b"".join(found)


@pytest.mark.parametrize("codec", LOSSLESS)
def test_ffprobe_and_inspect_agree(codec: str, tmp_path: Path) -> None:
    available(codec)
    path = tmp_path / "a.mp4"
    path.write_bytes(archive(codec))
    shown = json.loads(run("ffprobe", "-v", "error", "-show_streams", "-of", "json", str(path)))
    ((stream,), video) = shown["streams"], summarize_archive(path).video
    track = CODECS[codec].track
    assert (stream["codec_name"], stream["codec_tag_string"]) == PROBED[track]
    assert (stream["width"], stream["height"]) == (video.width, video.height) == (WIDTH, HEIGHT)
    assert video.codec == track
    if video.profile:
        assert stream["profile"] == video.profile
    # ffprobe counts HEVC's levels in thirtieths, H.264's in tenths, AV1's by index, VP9's not.
    level = float(video.level or 0)
    told = {
        "hevc": 30 * level,
        "avc": 10 * level,
        "av1": round(4 * (int(level) - 2) + 10 * (level % 1)),
    }
    if track in told:
        assert stream["level"] == round(told[track])


@pytest.mark.parametrize("codec", LOSSLESS)
def test_players_decode_the_samples_of_the_loader(codec: str, tmp_path: Path) -> None:
    available(codec)
    path = tmp_path / "a.mp4"
    path.write_bytes(archive(codec))
    with open_archive(path) as found:
        count = len(found.index.frames)
        ours = b"".join(shown.tobytes() for _, shown in found.frames(range(count)))
    assert luma(archive(codec)) == ours
    raw = run(
        "ffmpeg", "-v", "error", "-xerror", "-i", str(path), "-f", "rawvideo",
        "-fps_mode", "passthrough", "-",
    )  # fmt: skip
    size, each = WIDTH * HEIGHT, len(raw) // count
    assert each in (size, size * 3 // 2)
    frames = [raw[at : at + each] for at in range(0, len(raw), each)]
    assert b"".join(frame[:size] for frame in frames) == ours
    assert all(set(frame[size:]) <= {128} for frame in frames)


@pytest.mark.parametrize("codec", LOSSLESS)
def test_every_player_can_seek(codec: str) -> None:
    available(codec)
    data = archive(codec)
    with av.open(io.BytesIO(data)) as media:
        stream = media.streams.video[0]
        packets = [packet for packet in media.demux(stream) if packet.size]
        assert [packet.pts for packet in packets] == list(range(len(packets)))
        assert all(packet.is_keyframe for packet in packets)
        last = len(packets) - 1
        media.seek(last, stream=stream)
        frame = next(media.decode(stream))
        assert frame.pts == last
        plane = frame.planes[0]
        rows = np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)
        assert rows[:, :WIDTH].tobytes() == luma(data)[-WIDTH * HEIGHT :]


DEEP = [("x265", 12), ("x264", 18), ("svtav1", 20), ("aom", 12), ("rav1e", 40), ("vvenc", 26)]


@pytest.mark.parametrize(("codec", "qp"), DEEP)
def test_ten_bits(codec: str, qp: int, tmp_path: Path) -> None:
    available(codec)
    lossy = Lossy("qp", qp)
    data, track = archive(codec, 1, lossy, 10), CODECS[codec].track
    assert archive(codec, 3, lossy, 10) == data
    record = header(data)
    assert record["weightvid"] == [2, 0]
    needed = ["track.bit_depth"] if track == "hevc" else ["track.codec", "track.bit_depth"]
    assert record["must_understand"] == needed
    assert record["track"]["bit_depth"] == 10
    path = tmp_path / "a.mp4"
    path.write_bytes(data)
    assert verify_archive(path).ok
    summary = summarize_archive(path)
    assert summary.video.bit_depth == 10
    with open_archive(path, check_tensors=True) as found:
        for name, array in found:
            assert same(array, found[name])
        levels = [found.levels(name).levels for name in found.names
                  if found.info(name).coding == "video"]  # fmt: skip
        frames = list(found.frames(range(1)))
        assert frames[0][1].dtype == np.uint16
    assert max(np.abs(part).max() for part in levels) > 127
    if track == "vvc":
        return  # many an ffmpeg program has no decoder yet
    raw = run("ffmpeg", "-v", "error", "-i", str(path), "-f", "rawvideo", "-pix_fmt",
              "yuv420p10le", "-fps_mode", "passthrough", "-")  # fmt: skip
    assert raw[: 2 * WIDTH * HEIGHT] == luma(data)[: 2 * WIDTH * HEIGHT]


@pytest.mark.parametrize(("codec", "bits"), [("x265", 8), ("x265", 10), ("x264", 8), ("vp9", 8)])
def test_the_reached_sqnr_is_in_the_index(codec: str, bits: int, tmp_path: Path) -> None:
    arrays = several_frames()
    data = archive(codec, 1, Lossy("qp", 20), bits)
    power = noise = 0.0
    with open_archive(io.BytesIO(data)) as found:
        told = found.sqnr_db
        for name in found.names:
            if found.info(name).coding == "video":
                x = arrays[name].astype(np.float64)
                power += float(np.square(x).sum())
                noise += float(np.square(x - found[name]).sum())
    assert told == pytest.approx(10 * np.log10(power / noise), abs=0.006)
    path = tmp_path / "a.mp4"
    path.write_bytes(data)
    assert summarize_archive(path).sqnr_db == told
    # What is cut short has no index to say it.
    assert open_archive(io.BytesIO(data[: len(data) // 2])).sqnr_db is None


def test_lossless_archives_say_no_total() -> None:
    assert open_archive(io.BytesIO(archive("x265"))).sqnr_db is None


def test_large_tensors_of_deep_samples_come_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    data = archive("x265", 1, Lossy("qp", 12), 10)
    whole = tensors(data)
    monkeypatch.setattr("weightvid.loader.assemble.STREAMED_ELEMENTS", 1 << 10)
    with open_archive(io.BytesIO(data), check_tensors=True) as found:
        for spec, parts in found.iter_parts():
            joined = np.concatenate([part.reshape(-1) for part in parts])
            assert same(joined.reshape(spec.shape), whole[spec.name])


def test_far_outliers_of_deep_samples_are_listed() -> None:
    weights = several_frames()
    name = next(n for n, a in weights.items() if a.ndim > 1)
    weights[name][3, 5] = 40 * np.abs(weights[name]).max()
    with small_frames(WIDTH, HEIGHT):
        data = packed(weights, PackOptions(lossy=Lossy("qp", 20), bit_depth=10))
    with open_archive(io.BytesIO(data), check_tensors=True) as found:
        info, levels = found.info(name), found.levels(name)
        assert info.escapes >= 1
        assert np.abs(levels.levels).max() > 511
        assert info.params is not None
        assert abs(found[name][3, 5] - weights[name][3, 5]) <= info.params.step / 2


def test_every_track_has_an_encoder() -> None:
    assert {row.track for row in CODECS.values() if row.track} == set(TRACKS)
    assert all(bool(row.track) != bool(row.unfit) for row in CODECS.values())
