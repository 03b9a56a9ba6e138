"""Every codec of the registry: round trips, options, and what is said where one is missing."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest

from weightvid.codec import pictures, program
from weightvid.codec.registry import CODECS, Coding, bit_depth, codec
from weightvid.errors import CodecError

#: encoders of a machine's own hardware: tested where it has them, by their row in a comparison.
HARDWARE = ("nvenc", "videotoolbox")
PYAV = [name for name, row in CODECS.items() if row.backend == "pyav" and name not in HARDWARE]
FFMPEG = [name for name, row in CODECS.items() if row.backend == "ffmpeg"]


def frames(bits: int, count: int = 3) -> list[np.ndarray]:
    """Frames of samples around the middle of the range."""
    draw = np.random.default_rng(bits)
    middle, dtype = 1 << (bits - 1), np.uint8 if bits == 8 else np.uint16
    samples = draw.standard_normal((count, 256, 320)) * 6 * (1 << (bits - 8)) + middle
    return list(samples.clip(0, (1 << bits) - 1).astype(dtype))


def cases(names: list[str]) -> list[Coding]:
    """Every mode and pixel format of these codecs, and inter coding."""
    found = []
    for name in names:
        row = CODECS[name]
        for mode, about in row.modes.items():
            value = about.values[1] if about.values else None
            found += [Coding(row, mode, value, pixel_format=f) for f in about.formats]
            if row.predicts:
                found.append(Coding(row, mode, value, inter=True))
    return found


def judge(coding: Coding, given: list[np.ndarray], got: list[np.ndarray]) -> None:
    assert len(got) == len(given)
    for before, after in zip(given, got, strict=True):
        assert after.dtype == before.dtype
        error = float(np.square(after.astype(np.float64) - before).mean())
        if coding.mode == "lossless":
            assert error == 0
        else:
            assert 0 < error < (24 << (bit_depth(coding.pixel_format) - 8)) ** 2


@pytest.mark.parametrize("coding", cases(PYAV), ids=lambda c: f"{c.label} {c.pixel_format}")
def test_pyav_round_trip(coding: Coding) -> None:
    given = frames(coding.bits)
    stream = pictures.encode(given, coding)
    assert len(stream.packets) == len(given)
    judge(coding, given, pictures.decode(stream, coding, given[0].shape))


@pytest.mark.parametrize("coding", cases(FFMPEG), ids=lambda c: f"{c.label} {c.pixel_format}")
def test_ffmpeg_round_trip(coding: Coding) -> None:
    chosen = program.choose(coding.codec, program.programs())
    if isinstance(chosen, str):
        pytest.skip(chosen)
    given = frames(coding.bits)
    stream, peak = program.encode(given, coding, chosen)
    assert peak is None or peak > 1 << 20
    if coding.codec.muxer == "nut":
        got = pictures.decode(stream, coding, given[0].shape)
    else:
        got, _ = program.decode(stream, coding, chosen, given[0].shape)
    judge(coding, given, got)


def test_lossless_intra_packets_do_not_depend_on_their_neighbours() -> None:
    coding = Coding(CODECS["x265"])
    given = frames(8)
    together = pictures.encode(given, coding).packets
    alone = [pictures.encode([frame], coding).packets[0] for frame in given]
    assert [len(p) for p in together] == [len(p) for p in alone]


def test_options_are_joined_and_filled() -> None:
    coding = Coding(codec("kvazaar"), "qp", 22, "fast")
    text = coding.options["kvazaar-params"]
    assert "qp=22" in text
    assert "preset=fast" in text
    assert "{" not in text
    assert text.count("period=") == 1


def test_profile_and_label() -> None:
    coding = Coding(codec("x265"), "qp", 20, "medium", "yuv420p10le", inter=True)
    assert coding.profile == "HEVC Main 10"
    assert coding.label == "x265 medium qp yuv420p10le inter"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("crf2", 1.0), "no mode 'crf2'"),
        (("qp", None), "a value belongs"),
        (("lossless", 3.0), "a value belongs"),
        (("qp", 99.0), "qp goes from 0 to 51"),
        (("qp", 9.0, "ultrafats"), "did you mean ultrafast"),
        (("qp", 9.0, "medium", "rgb24"), "not rgb24"),
    ],
)
def test_wrong_settings_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(CodecError, match=message):
        Coding(codec("x265"), *arguments)


def test_codecs_without_prediction_refuse_inter() -> None:
    with pytest.raises(CodecError, match="no inter mode"):
        Coding(codec("png"), inter=True)


def test_unknown_codec_suggests_the_nearest() -> None:
    with pytest.raises(CodecError, match="did you mean x265"):
        codec("x256")


def test_a_missing_encoder_is_told() -> None:
    row = CODECS["videotoolbox"]
    reason = pictures.missing(row)
    assert reason is None or "hevc_videotoolbox" in reason


@pytest.mark.parametrize("name", HARDWARE)
def test_hardware_encoders_run_or_say_what_they_need(name: str) -> None:
    row = CODECS[name]
    reason = pictures.missing(row)
    if reason is not None:
        assert row.encoder in reason
        return
    given = frames(8)
    coding = Coding(row, "qp", row.modes["qp"].values[1])
    judge(coding, given, pictures.decode(pictures.encode(given, coding), coding, given[0].shape))


def test_a_program_that_is_no_ffmpeg(tmp_path: Path) -> None:
    with pytest.raises(CodecError, match="cannot be run"):
        program.programs(str(tmp_path / "absent"))
    other = tmp_path / "other"
    other.write_text("#!/bin/sh\necho hello\n")
    other.chmod(0o755)
    with pytest.raises(CodecError, match="is no ffmpeg"):
        program.programs(str(other))


def test_a_program_without_the_encoder_says_so(tmp_path: Path) -> None:
    lean = program.Program("lean", "1", frozenset())
    reason = program.choose(CODECS["vvenc"], [lean])
    assert isinstance(reason, str)
    assert "libvvenc" in reason
    assert "compare" in str(program.choose(CODECS["vvenc"], []))


def test_errors_carry_the_programs_message() -> None:
    row = CODECS["aom"]
    chosen = program.choose(row, program.programs())
    if isinstance(chosen, str):
        pytest.skip(chosen)
    # Frames of another size than declared to the encoder end within a frame.
    with pytest.raises(CodecError, match="ffmpeg failed"):
        program.decode(pictures.Stream((b"no stream",)), Coding(row), chosen, (256, 256))


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere SVT-AV1 leaves threads alone")
def test_svtav1_gets_no_real_time_threads() -> None:
    """As root it would take them for itself, and for all that its caller starts later."""
    before = os.sched_getscheduler(0)
    encoder = pictures._encoder(Coding(CODECS["svtav1"]), 256, 256)
    tasks = [int(path.name) for path in Path("/proc/self/task").iterdir()]
    assert {os.sched_getscheduler(task) for task in (0, *tasks)} == {before}
    del encoder
