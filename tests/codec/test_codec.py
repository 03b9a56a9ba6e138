"""Encoding and decoding: bit-exact, whole IDR pictures, the same packet whoever makes it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import Any

import av
import numpy as np
import pytest

from weightvid.codec import hevc, nal
from weightvid.codec.decode import Decoder, DecoderSettings
from weightvid.codec.encode import EncoderSettings, Video, open_encoder
from weightvid.codec.form import Form
from weightvid.codec.registry import X265_PRESETS
from weightvid.errors import CodecError

Luma = np.ndarray[Any, Any]


def noise(seed: int, width: int, height: int) -> Luma:
    return np.random.default_rng(seed).integers(0, 256, (height, width), dtype=np.uint8)


def weights(seed: int, width: int, height: int, sigma: float = 3.0) -> Luma:
    levels = np.rint(np.random.default_rng(seed).standard_normal((height, width)) * sigma)
    return (levels + 128).clip(1, 255).astype(np.uint8)


def decode(
    settings: EncoderSettings, packets: Iterable[bytes], threads: int = 1
) -> dict[int, Luma]:
    record = open_encoder(settings).record
    decoder = Decoder(DecoderSettings(record, settings.form, threads=threads))
    return {number: luma.copy() for number, luma in decoder.decode(enumerate(packets))}


@pytest.mark.parametrize(
    ("width", "height"), [(256, 256), (256, 320), (448, 256), (832, 448), (1024, 1024)]
)
def test_bit_exact(width: int, height: int) -> None:
    settings = EncoderSettings(width, height)
    encoder = open_encoder(settings)
    frames = [
        weights(0, width, height),
        noise(1, width, height),
        np.zeros((height, width), np.uint8),
        np.full((height, width), 255, np.uint8),
        np.tile(np.array([[0, 255], [255, 0]], np.uint8), (height // 2, width // 2)),
    ]
    found = decode(settings, [encoder.encode(frame) for frame in frames])
    assert list(found) == list(range(len(frames)))
    for number, frame in enumerate(frames):
        assert np.array_equal(found[number], frame)


@pytest.mark.parametrize("preset", X265_PRESETS)
def test_every_preset_is_lossless_idr_main(preset: str) -> None:
    settings = EncoderSettings(256, 256, Video(preset=preset))
    encoder = open_encoder(settings)
    frames = [weights(seed, 256, 256) for seed in range(3)]
    packets = [encoder.encode(frame) for frame in frames]
    assert packets == [open_encoder(settings).encode(frame) for frame in frames]
    found = decode(settings, packets)
    assert all(np.array_equal(found[i], frame) for i, frame in enumerate(frames))
    assert hevc.describe(encoder.record).profile == "Main"


def test_every_packet_is_one_idr_picture() -> None:
    encoder = open_encoder(EncoderSettings(320, 256))
    for number in range(9):
        packet, kinds, firsts, at = encoder.encode(weights(number, 320, 256)), set(), 0, 0
        while at < len(packet):
            size = int.from_bytes(packet[at : at + 4], "big")
            unit = packet[at + 4 : at + 4 + size]
            kinds.add(hevc.nal_type(unit))
            firsts += unit[2] >> 7  # first_slice_segment_in_pic_flag
            at += 4 + size
        assert at == len(packet)
        assert firsts == 1
        assert kinds <= {19, 20}


def test_a_packet_depends_on_its_frame_alone() -> None:
    settings = EncoderSettings(256, 256)
    frame = weights(7, 256, 256)
    alone = open_encoder(settings).encode(frame)
    encoder = open_encoder(settings)
    for number in range(6):
        encoder.encode(noise(number, 256, 256) if number % 2 else weights(number, 256, 256))
        assert encoder.encode(frame) == alone


def test_decoder_threads_keep_the_order() -> None:
    settings = EncoderSettings(256, 256)
    encoder = open_encoder(settings)
    frames = [weights(seed, 256, 256) for seed in range(10)]
    found = decode(settings, [encoder.encode(frame) for frame in frames], threads=4)
    assert list(found) == list(range(10))
    assert all(np.array_equal(found[i], frame) for i, frame in enumerate(frames))


@pytest.mark.parametrize(("width", "height"), [(256, 256), (512, 448), (1024, 1024)])
def test_noise_meets_the_level(width: int, height: int) -> None:
    """At one frame a second, the bits of a frame are the bit rate, and fill the CPB once."""
    settings = EncoderSettings(width, height)
    kbits = hevc.LEVELS[hevc.choose_level(width, height)][3]
    encoder = open_encoder(settings)
    ends = np.random.default_rng(3).choice(np.array([0, 1, 254, 255], np.uint8), (height, width))
    for frame in (noise(0, width, height), ends):
        bits = 8 * len(encoder.encode(frame))
        assert bits <= 1000 * kbits


def test_unknown_preset_is_refused() -> None:
    with pytest.raises(CodecError, match="x265 has no preset 'warp'"):
        Video(preset="warp")


def test_slices_of_another_size_give_no_other_size() -> None:
    """Slices do not carry the size; what comes out is refused, or of the declared size."""
    packet = open_encoder(EncoderSettings(320, 256)).encode(weights(0, 320, 256))
    try:
        found = decode(EncoderSettings(256, 256), [packet])
    except CodecError:
        return
    assert found[0].shape == (256, 256)


@pytest.mark.parametrize(("width", "height"), [(256, 256), (512, 512), (320, 320)])
def test_stream_of_another_size_is_refused(width: int, height: int) -> None:
    """The parameter sets say 320 x 256, the archive something else."""
    settings = EncoderSettings(320, 256)
    encoder = open_encoder(settings)
    decoder = Decoder(DecoderSettings(encoder.record, Form(width, height), threads=1))
    with pytest.raises(CodecError):
        list(decoder.decode([(0, encoder.encode(weights(0, 320, 256)))]))


@pytest.mark.parametrize("pix_fmt", ["yuv444p", "yuv420p10le", "gray"])
def test_stream_of_another_format_is_refused(pix_fmt: str) -> None:
    context: Any = av.CodecContext.create("libx265", "w")
    context.width = context.height = 256
    context.pix_fmt = pix_fmt
    context.time_base = Fraction(1, 1)
    context.options = {"x265-params": "lossless=1:keyint=1:bframes=0:log-level=none"}
    context.flags |= av.codec.context.Flags.global_header
    context.open()
    frame = av.VideoFrame(256, 256, pix_fmt)
    for plane in frame.planes:
        plane.update(bytes(plane.buffer_size))
    frame.pts = 0
    packets = [*context.encode(frame), *context.encode(None)]
    units = nal.split_nal_units(bytes(packets[0]))
    sample = b"".join(len(unit).to_bytes(4, "big") + unit for unit in units)
    record = hevc.hvcc(hevc.parameter_sets(context.extradata, "4"))
    decoder = Decoder(DecoderSettings(record, Form(256, 256), threads=1))
    with pytest.raises(CodecError):
        list(decoder.decode([(0, sample)]))


@pytest.mark.parametrize(
    "garbage",
    [b"", b"\x00", b"\x00\x00\x00\x00", b"\xff" * 64, bytes(64), b"\x00\x00\x00\x02\x26\x01"],
)
@pytest.mark.parametrize("threads", [1, 2])
def test_garbage_packets_are_refused(garbage: bytes, threads: int) -> None:
    settings = EncoderSettings(256, 256)
    good = open_encoder(settings).encode(weights(0, 256, 256))
    for packets in ([garbage], [good, garbage], [garbage, good], [good, garbage, good]):
        with pytest.raises(CodecError):
            decode(settings, packets, threads)


def test_broken_hvcc_is_refused() -> None:
    settings = EncoderSettings(256, 256)
    good = open_encoder(settings).encode(weights(0, 256, 256))
    for record in (b"", b"\x01", bytes(40), b"\xff" * 100):
        with pytest.raises(CodecError):
            list(Decoder(DecoderSettings(record, Form(256, 256))).decode([(0, good)]))


def test_mutated_packets_never_crash() -> None:
    settings = EncoderSettings(256, 256)
    frame = weights(0, 256, 256, 1.0)
    good = open_encoder(settings).encode(frame)
    rng = np.random.default_rng(5)
    for _ in range(60):
        bad = bytearray(good)
        for place in rng.integers(0, len(bad), rng.integers(1, 8)):
            bad[place] = rng.integers(256)
        try:
            found = decode(settings, [bytes(bad)])
        except CodecError:
            continue
        assert found[0].shape == frame.shape


def test_a_dropped_decoder_does_not_wait_for_its_threads() -> None:
    """A decoder with frames on their way is dropped: by an error, or by who loses interest."""
    settings = EncoderSettings(256, 256)
    encoder = open_encoder(settings)
    packets = [encoder.encode(noise(seed, 256, 256)) for seed in range(4)]
    for _ in range(50):
        decoder = Decoder(DecoderSettings(encoder.record, Form(256, 256), threads=4))
        next(decoder.decode(enumerate(packets)))
        del decoder


@pytest.mark.parametrize("slow", [False, True])
def test_how_far_the_decoder_runs_ahead(slow: bool) -> None:
    """Some packets before the frame that is taken, and no more; of a slow source, next to none."""
    settings, threads = EncoderSettings(512, 512), 2
    encoder = open_encoder(settings)
    frames = [noise(seed, 512, 512) for seed in range(12)]
    packets = [encoder.encode(frame) for frame in frames]
    asked = 0

    def source() -> Iterator[tuple[int, bytes]]:
        nonlocal asked
        for number, packet in enumerate(packets):
            if slow:
                time.sleep(0.2)
            asked = number
            yield number, packet

    ahead = []
    decoder = Decoder(DecoderSettings(encoder.record, settings.form, threads=threads))
    for number, luma in decoder.decode(source()):
        ahead.append(asked - number)
        assert np.array_equal(luma, frames[number])
    own = threads - 1  # FFmpeg gives a frame when so many packets more have come
    assert ahead[0] == own, "the first frame is not held back"
    assert max(ahead) <= own + (1 if slow else 5)
    assert slow or max(ahead) > own + 1
