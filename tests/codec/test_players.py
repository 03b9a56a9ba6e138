"""Other programs open the archive as a video: ffprobe, the ffmpeg command, libde265."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
from functools import cache
from pathlib import Path

import av
import numpy as np
import pytest
from archives import packed, sample_arrays, small_frames

from weightvid.codec.hevc import describe
from weightvid.loader import open_archive

WIDTH, HEIGHT = 320, 256


@cache
def archive() -> bytes:
    with small_frames(WIDTH, HEIGHT):
        return packed(sample_arrays())


@cache
def luma() -> tuple[bytes, ...]:
    """Samples of every frame, by PyAV's demuxer and decoder."""
    found = []
    with av.open(io.BytesIO(archive())) as media:
        for frame in media.decode(video=0):
            plane = frame.planes[0]
            rows = np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)
            found.append(rows[:, : plane.width].tobytes())
    return tuple(found)


def program(*names: str) -> str:
    for name in names:
        if path := shutil.which(name):
            return path
    pytest.skip(f"{names[0]} is not installed")


def run(*command: str) -> bytes:
    return subprocess.run(command, check=True, capture_output=True, timeout=120).stdout


@pytest.fixture
def path(tmp_path: Path) -> str:
    file = tmp_path / "model.mp4"
    file.write_bytes(archive())
    return str(file)


def split_yuv(data: bytes) -> tuple[bytes, ...]:
    """Luma planes of raw 4:2:0 frames; the chroma must be neutral."""
    size = WIDTH * HEIGHT
    each = size + size // 2
    assert len(data) % each == 0
    frames = [data[at : at + each] for at in range(0, len(data), each)]
    assert all(set(frame[size:]) == {128} for frame in frames)
    return tuple(frame[:size] for frame in frames)


def test_the_track_is_what_the_loader_decodes() -> None:
    with open_archive(io.BytesIO(archive()), check_tensors=True) as found:
        assert len(dict(found)) == len(sample_arrays())
        assert len(luma()) == len(found.index.frames) >= 2


def test_ffprobe(path: str) -> None:
    shown = json.loads(
        run(program("ffprobe"), "-v", "error", "-show_streams", "-of", "json", path)
    )["streams"]
    assert len(shown) == 1
    stream = shown[0]
    with open_archive(path) as found:
        level = describe(found.track.record).level
    expected = {
        "codec_name": "hevc",
        "profile": "Main",
        "pix_fmt": "yuv420p",
        "codec_tag_string": "hvc1",
        "width": WIDTH,
        "height": HEIGHT,
        "level": round(30 * float(level)),
    }
    assert {key: stream[key] for key in expected} == expected


def test_ffprobe_sees_key_frames_in_order(path: str) -> None:
    packets = json.loads(
        run(program("ffprobe"), "-v", "error", "-show_packets", "-of", "json", path)
    )["packets"]
    assert [packet["pts"] for packet in packets] == list(range(len(luma())))
    assert [packet["dts"] for packet in packets] == list(range(len(luma())))
    assert all(packet["flags"].startswith("K") for packet in packets)


def test_every_player_can_seek(path: str) -> None:
    """The random-access box leads to each frame."""
    last = len(luma()) - 1
    with av.open(path) as media:
        stream = media.streams.video[0]
        media.seek(last, stream=stream)
        frame = next(media.decode(stream))
        assert frame.pts == last
        plane = frame.planes[0]
        rows = np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)
        assert rows[:, :WIDTH].tobytes() == luma()[last]


def test_the_ffmpeg_command_decodes_the_same(path: str) -> None:
    raw = run(
        program("ffmpeg"), "-v", "error", "-xerror", "-i", path, "-f", "rawvideo",
        "-fps_mode", "passthrough", "-",
    )  # fmt: skip
    assert split_yuv(raw) == luma()


def test_libde265_decodes_the_same(path: str, tmp_path: Path) -> None:
    decoder = program("libde265-dec265", "dec265")
    stream, raw = tmp_path / "track.hevc", tmp_path / "track.yuv"
    run(
        program("ffmpeg"), "-v", "error", "-i", path, "-c", "copy",
        "-bsf:v", "hevc_mp4toannexb", "-f", "hevc", str(stream),
    )  # fmt: skip
    run(decoder, "-q", "-0", "-o", str(raw), str(stream))
    assert split_yuv(raw.read_bytes()) == luma()
