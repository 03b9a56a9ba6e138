"""Every encoder that fits an archive: its packets, its record, and who can read them."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightvid.codec import av1, avc, hevc, pictures, stills, vp9
from weightvid.codec.decode import Decoder, DecoderSettings
from weightvid.codec.encode import EncoderSettings, Lossy, Video, find_program, open_encoder
from weightvid.codec.form import Claim, Form
from weightvid.codec.registry import CODECS
from weightvid.codec.tracks import TRACKS
from weightvid.errors import CodecError

Luma = np.ndarray[Any, Any]
WIDTH, HEIGHT = 320, 256
FIT = [name for name, row in CODECS.items() if row.track]
LOSSLESS = [name for name in FIT if "lossless" in CODECS[name].modes]
#: encoder, a QP, bits of a sample.
LOSSY = [
    ("x265", 14, 8), ("x265", 14, 10), ("x264", 14, 8), ("x264", 20, 10), ("svtav1", 13, 8),
    ("svtav1", 20, 10), ("vp9", 12, 8), ("aom", 12, 10), ("kvazaar", 14, 8), ("rav1e", 40, 10),
    ("vvenc", 14, 10),
]  # fmt: skip


def settings_of(
    name: str, lossy: Lossy | None = None, bits: int = 8, size: tuple[int, int] = (WIDTH, HEIGHT)
) -> EncoderSettings:
    try:
        program = find_program(name)
    except CodecError as error:
        pytest.skip(str(error))
    return EncoderSettings(*size, replace(Video(name, "", lossy, bits), program=program))


def frames(bits: int = 8) -> list[Luma]:
    """Usual samples, all there are, blank ones, and the ends of the range."""
    random, middle = np.random.default_rng(bits), 1 << (bits - 1)
    dtype, top = np.uint8 if bits == 8 else np.uint16, (1 << bits) - 1
    usual = np.rint(random.standard_normal((2, HEIGHT, WIDTH)) * (3 << (bits - 8))) + middle
    any_ = random.integers(0, top + 1, (HEIGHT, WIDTH))
    ends = np.where(np.indices((HEIGHT, WIDTH)).sum(axis=0) % 2, 0, top)
    found = [*usual, any_, np.full((HEIGHT, WIDTH), middle), ends]
    return [frame.clip(0, top).astype(dtype) for frame in found]


@cache
def coded(settings: EncoderSettings) -> tuple[bytes, tuple[bytes, ...]]:
    """Record, and the packet of each frame."""
    encoder = open_encoder(settings)
    return encoder.record, tuple(encoder.encode(frame) for frame in frames(settings.video.bits))


def decode(
    settings: EncoderSettings, packets: dict[int, bytes], threads: int = 1
) -> dict[int, Luma]:
    told = DecoderSettings(
        coded(settings)[0], settings.form, settings.video.track.name, threads=threads
    )
    return {number: luma.copy() for number, luma in Decoder(told).decode(packets.items())}


@pytest.mark.parametrize("name", LOSSLESS)
@pytest.mark.parametrize("threads", [1, 3])
def test_lossless_comes_back(name: str, threads: int) -> None:
    settings = settings_of(name)
    found = decode(settings, dict(enumerate(coded(settings)[1])), threads)
    assert list(found) == list(range(len(frames())))
    assert all(np.array_equal(found[n], frame) for n, frame in enumerate(frames()))


@pytest.mark.parametrize(("name", "qp", "bits"), LOSSY)
def test_lossy_is_near_and_the_same_everywhere(name: str, qp: int, bits: int) -> None:
    settings = settings_of(name, Lossy("qp", qp), bits)
    packets = coded(settings)[1]
    together = decode(settings, dict(enumerate(packets)), threads=2)
    for number, frame in enumerate(frames(bits)):
        (alone,) = decode(settings, {number: packets[number]}).values()
        assert alone.dtype == frame.dtype
        assert np.array_equal(alone, together[number])
    error = together[0].astype(np.float64) - frames(bits)[0]
    assert 0 < np.square(error).mean() < (8 << (bits - 8)) ** 2


@pytest.mark.parametrize("name", LOSSLESS)
def test_a_frame_needs_no_other(name: str) -> None:
    settings = settings_of(name)
    packets = coded(settings)[1]
    for number in (4, 1):
        (alone,) = decode(settings, {number: packets[number]}).values()
        assert np.array_equal(alone, frames()[number])
    backwards = decode(settings, dict(reversed(list(enumerate(packets)))))
    assert all(np.array_equal(backwards[n], frame) for n, frame in enumerate(frames()))


@pytest.mark.parametrize("name", LOSSLESS)
def test_a_packet_depends_on_its_frame_alone(name: str) -> None:
    settings = settings_of(name)
    record, packets = coded(settings)
    encoder = open_encoder(settings)
    for number in (4, 0, 2, 0):
        assert encoder.encode(frames()[number]) == packets[number]
    assert encoder.record == record


@pytest.mark.parametrize("name", LOSSLESS)
def test_the_record_is_of_the_track(name: str) -> None:
    settings = settings_of(name)
    record, track = coded(settings)[0], settings.video.track
    track.check(record, settings.form)
    track.describe(record)
    told = DecoderSettings(record, settings.form, track.name, threads=1)
    for broken in (b"", record[:2], bytes(40), b"\xff" * 60):
        with pytest.raises(CodecError):
            track.check(broken, settings.form)
            # Those of HEVC and FFV1 are the decoder's to judge.
            list(Decoder(replace(told, record=broken)).decode([(0, coded(settings)[1][0])]))


@pytest.mark.parametrize("name", ["x264", "svtav1"])
@pytest.mark.parametrize("form", [Form(256, 256), Form(320, 320), Form(WIDTH, HEIGHT, 10)])
def test_a_record_of_another_form_is_refused(name: str, form: Form) -> None:
    settings = settings_of(name)
    with pytest.raises(CodecError):
        settings.video.track.check(coded(settings)[0], form)


def test_what_the_records_claim() -> None:
    expected = {
        "x265": Claim("Main", "Main", "2"),
        "x264": Claim("High 4:4:4 Intra", "", "2"),
        "svtav1": Claim("Main", "Main", "2.0"),
        "vp9": Claim("Profile 0", "", "2"),
        "png": Claim(""),
    }
    for name, claim in expected.items():
        settings = settings_of(name)
        assert settings.video.track.describe(coded(settings)[0]) == claim, name
    deep = settings_of("x265", Lossy("qp", 14), 10)
    assert hevc.describe(coded(deep)[0]) == Claim("Main 10", "Main", "2")
    deep = settings_of("x264", Lossy("qp", 20), 10)
    assert avc.describe(coded(deep)[0]).profile == "High 10 Intra"
    usual = settings_of("x264", Lossy("qp", 14))
    assert avc.describe(coded(usual)[0]).profile == "High"


@pytest.mark.parametrize("size", [(256, 256), (512, 448), (1024, 1024)])
@pytest.mark.parametrize("name", ["x264", "vp9", "svtav1"])
def test_noise_meets_the_level(name: str, size: tuple[int, int]) -> None:
    """At one frame a second, the bits of a frame are the bit rate."""
    settings = settings_of(name, size=size)
    random = np.random.default_rng(1)
    noise = random.integers(0, 256, size[::-1], dtype=np.uint8)
    ends = random.choice(np.array([0, 1, 254, 255], np.uint8), size[::-1])
    encoder = open_encoder(settings)
    most = {
        "x264": lambda record: 4 * avc.LEVELS[record[3]][2],
        "vp9": lambda record: vp9.LEVELS[record[5]][1],
        "svtav1": lambda record: av1.LEVELS[record[1] & 31][3],
    }[name](encoder.record)
    for luma in (noise, ends):
        bits = 8 * len(encoder.encode(luma))
        assert bits <= 1000 * most
        assert bits <= 14 * luma.size


def test_av1_samples_are_a_header_and_a_frame() -> None:
    settings = settings_of("svtav1")
    record, packets = coded(settings)
    for packet in packets:
        kinds = [kind for kind, _ in av1.units(packet)]
        assert kinds[0] == 1
        assert set(kinds[1:]) <= {3, 4, 6}
        header = next(data for kind, data in av1.units(packet) if kind == 1)
        assert record[4:] == av1.unit(1, header)


@given(st.sampled_from([0, 1, 5, 8, 9, 14]))
def test_av1_levels_are_replaced(level: int) -> None:
    record = coded(settings_of("svtav1"))[0]
    header = next(data for kind, data in av1.units(record[4:]) if kind == 1)
    before, changed = av1.parse_sequence(header), av1.with_level(header, level)
    assert av1.parse_sequence(changed) == replace(before, level=level)
    assert av1.with_level(changed, before.level) == header


def test_pictures_of_another_size_do_not_fit() -> None:
    luma = np.full((256, 256), 128, np.uint8)
    for name in ("svtav1", "vp9", "png", "jpeg2000"):
        video = settings_of(name).video
        made = pictures.encode([luma], video.coding)
        with pytest.raises(CodecError):
            video.track.wrap(made.extradata, made.packets[0], Form(320, 256))


def test_predicted_pictures_do_not_fit() -> None:
    for name in ("x264", "svtav1", "vp9"):
        video = settings_of(name).video
        made = pictures.encode(frames()[:2], replace(video.coding, inter=True))
        with pytest.raises(CodecError):
            video.track.wrap(made.extradata, made.packets[1], Form(WIDTH, HEIGHT))


@given(st.binary(max_size=60), st.sampled_from(sorted(TRACKS)))
def test_any_record_is_checked_without_a_crash(record: bytes, name: str) -> None:
    track = TRACKS[name]
    for start in (b"", b"\x81\x00\x0c\x00\x0a\x0b", b"\x01\xf4\x10\x14\xff\xe1\x00\x20"):
        try:
            track.check(start + record, Form(256, 256))
        except CodecError:
            continue
        track.describe(start + record)


@given(st.binary(max_size=80), st.sampled_from(sorted(TRACKS)))
def test_any_packet_is_wrapped_or_refused(packet: bytes, name: str) -> None:
    for start in (b"", b"\x00\x00\x01\x67\xf4\x10", b"\x12\x00\x0a\x0b\x00\x00\x00\x0c", b"\x82"):
        try:
            TRACKS[name].wrap(b"", start + packet, Form(256, 256))
        except CodecError:
            continue


@pytest.mark.parametrize("name", ["x264", "svtav1", "vp9", "ffv1", "png", "jpeg2000"])
def test_mutated_packets_never_crash(name: str) -> None:
    settings = settings_of(name)
    good, random = coded(settings)[1][0], np.random.default_rng(5)
    for _ in range(25):
        bad = bytearray(good)
        for place in random.integers(0, len(bad), random.integers(1, 8)):
            bad[place] = random.integers(256)
        try:
            found = decode(settings, {0: bytes(bad)})
        except CodecError:
            continue
        assert found[0].shape == (HEIGHT, WIDTH)


@pytest.mark.parametrize("name", ["x264", "svtav1", "vp9", "ffv1", "png", "jpeg2000"])
@pytest.mark.parametrize("garbage", [b"", b"\0", bytes(64), b"\xff" * 64])
def test_garbage_packets_are_refused(name: str, garbage: bytes) -> None:
    settings = settings_of(name)
    good = coded(settings)[1][0]
    for packets in ([garbage], [good, garbage], [garbage, good]):
        with pytest.raises(CodecError):
            decode(settings, dict(enumerate(packets)), threads=2)


@pytest.mark.parametrize("name", ["x264", "svtav1", "vp9", "png", "jpeg2000"])
def test_a_packet_of_another_size_is_refused(name: str) -> None:
    """The record is right, and a packet brings pictures of its own."""
    small = settings_of(name)
    for size in ((256, 256), (512, 512)):
        other = open_encoder(settings_of(name, size=size))
        luma = np.full(size[::-1], 128, np.uint8)
        packet = other.encode(luma)
        try:
            found = decode(small, {0: packet})
        except CodecError:
            continue
        # Slices of H.264 carry no size: the decoder goes by the record.
        assert name == "x264"
        assert found[0].shape == (HEIGHT, WIDTH)


def test_a_decoder_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_of("svtav1")
    packets = dict(enumerate(coded(settings)[1]))
    lean = {"av1": replace(TRACKS["av1"], decoder="libnone")}
    monkeypatch.setattr("weightvid.codec.decode.TRACKS", lean)
    with pytest.raises(CodecError, match=r"the track is AV1, and this PyAV .* has no libnone"):
        decode(settings, packets)


def test_still_descriptors_name_one_codec() -> None:
    png = coded(settings_of("png"))[0]
    with pytest.raises(CodecError, match="another codec"):
        stills.check_jpeg2000(png, Form(WIDTH, HEIGHT))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("x256",), "did you mean x265"),
        (("jxl",), "is no codec of archives"),
        (("rav1e",), "no lossless mode"),
        (("x264", "8"), "x264 has no preset '8'"),
        (("svtav1", "ultrafast"), "svtav1 has no preset 'ultrafast'"),
        (("vp9", "", Lossy("crf", 20)), "vp9 has no CRF"),
        (("vp9", "", Lossy("qp", 20), 10), "samples of 8 bits, not of 10"),
        (("x265", "", None, 10), "deeper ones need a QP"),
        (("svtav1", "", Lossy("qp", 64)), "goes from 1 to 63, not 64"),
    ],
)
def test_wishes_that_cannot_be(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(CodecError, match=message):
        Video(*arguments)


def test_a_missing_encoder_or_program_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CodecError, match="aom cannot be used here: no ffmpeg program found"):
        monkeypatch.setattr("weightvid.codec.program.programs", lambda wanted=None: ())
        find_program("aom")
    monkeypatch.setattr(pictures, "missing", lambda row: f"this PyAV has no {row.encoder}")
    with pytest.raises(CodecError, match="x264 cannot be used here: this PyAV has no libx264"):
        find_program("x264")


def test_an_encoder_that_changes_its_headers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = open_encoder(settings_of("x264"))
    monkeypatch.setattr(type(encoder), "record", b"another")
    with pytest.raises(CodecError, match="headers of its own"):
        encoder.encode(frames()[0])
