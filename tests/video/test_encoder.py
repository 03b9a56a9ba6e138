"""Encoders: exact round trips, packets that depend on their frame alone, the device profile."""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import av
import av.logging
import numpy as np
import pytest
from av.bitstream import BitStreamFilterContext

from weightvid.errors import CodecError
from weightvid.loader import TRACKS, Bytes, Track, annex_b
from weightvid.video import CODECS, Encoder, Video, open_encoder

SETTINGS = [
    *(Video("x265", preset) for preset in CODECS["x265"].presets),
    *(Video("x264", preset) for preset in CODECS["x264"].presets),
    *(Video("svt-av1", preset) for preset in ("12", "8", "4")),
]
LOSSY = [Video("x265", qp=22), Video("x264", qp=22), Video("svt-av1", qp=22)]
SIZES = [(256, 192), (320, 256), (192, 2176)]
DEC265 = shutil.which("libde265-dec265") or shutil.which("dec265")


def frames(width: int, height: int) -> list[Bytes]:
    """Levels of falling spread, uniform noise, samples at both ends of the range, and none."""
    rng = np.random.default_rng(width * height)
    spread = np.linspace(4, 0.2, height)[:, None]
    levels = np.clip(np.rint(rng.laplace(0, spread, (height, width))), -127, 127) + 128
    noise = rng.integers(0, 256, (height, width), dtype=np.uint8)
    ends = np.where(noise < 128, 0, 255)
    return [levels.astype(np.uint8), noise, ends.astype(np.uint8), np.full_like(noise, 128)]


def decode(encoder: Encoder, video: Video, samples: list[bytes]) -> list[Bytes]:
    entry = CODECS[video.codec].entry
    context: Any = av.CodecContext.create(TRACKS[entry][1], "r")
    context.extradata, context.thread_count = encoder.record, 1
    pictures = [picture for sample in samples for picture in context.decode(av.Packet(sample))]
    pictures += context.decode(None)
    # to_ndarray() stacks the planes, luma first; it keeps the samples as they are.
    return [picture.to_ndarray()[: picture.height] for picture in pictures]


def headers(encoder: Encoder, video: Video, sample: bytes) -> list[tuple[str, int]]:
    """Syntax elements of the headers, by FFmpeg's trace_headers."""
    entry = CODECS[video.codec].entry
    stream = sample
    if entry == b"hvc1":
        stream = annex_b(Track(0, 0, entry, encoder.record), sample)
    elif entry == b"avc1":
        record, at = encoder.record, 8 + int.from_bytes(encoder.record[6:8], "big")
        pps = record[at + 3 : at + 3 + int.from_bytes(record[at + 1 : at + 3], "big")]
        stream = b"".join(b"\0\0\1" + unit for unit in (record[8:at], pps, sample[4:]))
    before = av.logging.get_level()
    av.logging.set_level(av.logging.TRACE)
    try:
        with av.logging.Capture() as lines:
            trace = BitStreamFilterContext("trace_headers", TRACKS[entry][1])
            trace.filter(av.Packet(stream))
            trace.filter(None)
    finally:
        av.logging.set_level(before)
    words = [line.split() for _, name, line in lines if name == "trace_headers"]
    return [(w[1], int(w[-1])) for w in words if len(w) >= 5 and w[-2] == "="]


@pytest.mark.parametrize("video", SETTINGS, ids=lambda v: f"{v.codec}-{v.preset}")
@pytest.mark.parametrize(("width", "height"), SIZES)
def test_lossless_is_exact(video: Video, width: int, height: int) -> None:
    encoder, given = open_encoder(video, width, height), frames(width, height)
    found = decode(encoder, video, [encoder.encode(frame) for frame in given])
    assert len(found) == len(given)
    for frame, picture in zip(given, found, strict=True):
        np.testing.assert_array_equal(picture, frame)


@pytest.mark.parametrize("video", [*map(Video, CODECS), *LOSSY], ids=str)
def test_packets_depend_on_the_frame_alone(video: Video) -> None:
    given = frames(192, 256)
    first, second = open_encoder(video, 192, 256), open_encoder(video, 192, 256)
    expected = [first.encode(frame) for frame in given]
    assert first.record == second.record
    assert [second.encode(frame) for frame in reversed(given)][::-1] == expected
    assert first.encode(np.asfortranarray(given[0])) == expected[0]

    def fresh(frame: Bytes) -> bytes:
        return open_encoder(video, 192, 256).encode(frame)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(fresh, given * 3)) == expected * 3


X265 = [v for v in SETTINGS if v.codec == "x265"] + [Video("x265", p, 30) for p in ("slower", "")]
#: the device profile as syntax elements of H.265 7.3 that must be there, once.
DEVICE = {
    "general_profile_idc": 1, "general_tier_flag": 0, "sps_max_sub_layers_minus1": 0,
    "conformance_window_flag": 0, "bit_depth_luma_minus8": 0, "chroma_format_idc": 1,
    "scaling_list_enabled_flag": 0, "amp_enabled_flag": 0, "pcm_enabled_flag": 0,
    "sample_adaptive_offset_enabled_flag": 0, "num_short_term_ref_pic_sets": 0,
    "long_term_ref_pics_present_flag": 0, "sps_temporal_mvp_enabled_flag": 0,
    "strong_intra_smoothing_enabled_flag": 0, "video_full_range_flag": 1,
    "vui_hrd_parameters_present_flag": 0, "sps_extension_present_flag": 0,
    "dependent_slice_segments_enabled_flag": 0, "sign_data_hiding_enabled_flag": 0,
    "constrained_intra_pred_flag": 0, "transform_skip_enabled_flag": 0,
    "cu_qp_delta_enabled_flag": 0, "tiles_enabled_flag": 0, "entropy_coding_sync_enabled_flag": 0,
    "pps_deblocking_filter_disabled_flag": 1, "deblocking_filter_override_enabled_flag": 0,
    "pps_scaling_list_data_present_flag": 0, "pps_extension_present_flag": 0,
    "first_slice_segment_in_pic_flag": 1, "slice_type": 2,
}  # fmt: skip


@pytest.mark.parametrize("video", X265, ids=str)
@pytest.mark.parametrize(("width", "height"), SIZES)
def test_hevc_keeps_to_the_device_profile(video: Video, width: int, height: int) -> None:
    encoder = open_encoder(video, width, height)
    sample = encoder.encode(frames(width, height)[0])
    assert int.from_bytes(sample[:4], "big") == len(sample) - 4
    found = headers(encoder, video, sample)
    # VPS, SPS, PPS and one slice of an IDR picture: no SEI.
    kinds = [value for name, value in found if name == "nal_unit_type"]
    assert kinds[:3] == [32, 33, 34] and kinds[3:] in ([19], [20])
    assert [v for name, v in found if name == "transquant_bypass_enabled_flag"] == [
        video.qp is None
    ]
    for name, value in DEVICE.items():
        assert {v for n, v in found if n == name} == {value}, name
    size = {n: v for n, v in found if n.startswith("pic_")}
    assert size == {"pic_width_in_luma_samples": width, "pic_height_in_luma_samples": height}


def test_h264_and_av1_headers() -> None:
    video = Video("x264")
    encoder = open_encoder(video, 256, 192)
    found = headers(encoder, video, encoder.encode(frames(256, 192)[0]))
    assert [v for n, v in found if n == "nal_unit_type"] == [7, 8, 5]
    assert dict(found)["video_full_range_flag"] == 1
    assert dict(found)["level_idc"] == encoder.record[3]
    video = Video("svt-av1")
    encoder = open_encoder(video, 256, 192)
    sample = encoder.encode(frames(256, 192)[0])
    # A key frame's sample holds the sequence header again (binding of AV1 to MP4, 2.4).
    assert sample.startswith(encoder.record[4:])
    found = headers(encoder, video, sample)
    assert [v for n, v in found if n == "obu_type"] == [1, 6]
    expected = {"seq_profile": 0, "color_range": 1, "chroma_sample_position": 0, "high_bitdepth": 0,
                "mono_chrome": 0, "frame_type": 0, "base_q_idx": 0}  # fmt: skip
    assert {name: dict(found)[name] for name in expected} == expected
    assert dict(found)["seq_level_idx[0]"] == encoder.record[1]


@pytest.mark.skipif(DEC265 is None, reason="libde265's dec265 is not installed")
@pytest.mark.parametrize("video", X265[:4], ids=str)
def test_libde265_decodes_exactly(video: Video, tmp_path: Path) -> None:
    encoder, given = open_encoder(video, 320, 256), frames(320, 256)
    track = Track(320, 256, b"hvc1", encoder.record)
    source, target = tmp_path / "in.hevc", tmp_path / "out.yuv"
    source.write_bytes(b"".join(annex_b(track, encoder.encode(frame)) for frame in given))
    subprocess.run([str(DEC265), "-q", "-o", target, source], check=True, capture_output=True)
    pictures = np.fromfile(target, np.uint8).reshape(len(given), 384, 320)
    np.testing.assert_array_equal(pictures[:, :256], np.stack(given))
    assert (pictures[:, 256:] == 128).all()


@pytest.mark.parametrize("name", CODECS)
def test_qp_trades_bytes_for_error(name: str) -> None:
    low, high = CODECS[name].lossy
    frame = frames(256, 192)[0]
    sizes, errors = [], []
    for qp in (low, (low + high) // 2, high):
        video = Video(name, qp=qp)
        encoder = open_encoder(video, 256, 192)
        sample = encoder.encode(frame)
        (picture,) = decode(encoder, video, [sample])
        sizes.append(len(sample))
        errors.append(float(np.square(picture.astype(float) - frame).mean()))
    assert sizes == sorted(sizes, reverse=True) and errors == sorted(errors)
    assert errors[0] < 0.5 < errors[2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("h265",), "unknown codec 'h265'; choose one of x265, svt-av1, x264"),
        (("x265", "fastest"), "x265 has no preset 'fastest'; choose one of ultrafast"),
        (("x264", "", 52), "x264 takes an integer QP from 1 to 51, not 52"),
        (("svt-av1", "", 2.5), "svt-av1 takes an integer QP from 1 to 63, not 2.5"),
    ],
)
def test_bad_settings_are_refused(settings: tuple[Any, ...], message: str) -> None:
    with pytest.raises(CodecError, match=message):
        Video(*settings)


@pytest.mark.parametrize(("width", "height"), [(136, 256), (256, 2184), (252, 256), (2048, 1096)])
def test_bad_sizes_are_refused(width: int, height: int) -> None:
    with pytest.raises(CodecError, match=f"frames of {width} x {height} cannot be coded"):
        open_encoder(Video(), width, height)


def test_other_frames_are_refused() -> None:
    encoder = open_encoder(Video(), 256, 192)
    wrong: list[Any] = [np.zeros((256, 192), np.uint8), np.zeros((192, 256), np.int8)]
    for luma in wrong:
        with pytest.raises(CodecError, match=r"opened for uint8 of shape \(192, 256\)"):
            encoder.encode(luma)


@pytest.mark.skipif(not hasattr(os, "sched_getscheduler"), reason="scheduling is not asked for")
def test_no_thread_becomes_a_real_time_one() -> None:
    before = os.sched_getscheduler(0)
    open_encoder(Video("svt-av1"), 256, 192)
    assert os.sched_getscheduler(0) == before
