"""The MP4 boxes byte by byte, and their way back."""

from __future__ import annotations

import hashlib
import io
import zlib
from typing import Any

import av
import pytest
from archives import child, first, normal, packed, small_frames, spans
from hypothesis import given
from hypothesis import strategies as st

from weightvid.codec.encode import EncoderSettings, open_encoder
from weightvid.container import boxes, mp4
from weightvid.container.dictionary import DICTIONARY
from weightvid.errors import FormatError
from weightvid.loader import open_archive

HVCC = b"\x01" + bytes(22)


def test_ftyp() -> None:
    assert mp4.ftyp().hex(" ", 4) == bytes.fromhex(
        "0000001c 66747970 69736f36 00000000 69736f36 6d703431 77766432".replace(" ", "")
    ).hex(" ", 4)


def test_moof() -> None:
    expected = (
        "00000058 6d6f6f66"  # moof, 88 bytes
        "00000010 6d666864 00000000 00000003"  # mfhd: sequence number 3
        "00000040 74726166"  # traf
        "00000010 74666864 00020000 00000001"  # tfhd: track 1, default-base-is-moof
        "00000010 74666474 00000000 00000002"  # tfdt: decode time 2
        "00000018 7472756e 00000201 00000001 00000060 00000bb8"  # trun: one sample, 3000 bytes
    )
    found = mp4.moof(2, 3000)
    assert found == bytes.fromhex(expected.replace(" ", ""))
    assert len(found) == mp4.MOOF_BYTES
    assert mp4.parse_moof(found[8:]) == 2


def test_mfra() -> None:
    found = mp4.mfra([1000, 70000])
    assert found[:8] == len(found).to_bytes(4, "big") + b"mfra"
    tfra = child(found, [b"mfra", b"tfra"])
    body = found[tfra.payload : tfra.end]
    assert body[:16].hex() == "00000000000000010000000000000002"
    assert body[16:].hex() == (
        "00000000" "000003e8" "010101" "00000001" "00011170" "010101"
    )  # fmt: skip
    mfro = child(found, [b"mfra", b"mfro"])
    assert mfro.end == len(found)
    assert int.from_bytes(found[-4:], "big") == len(found)


def test_mfra_beyond_4_gb() -> None:
    offset = 5 << 30
    found = mp4.mfra([64, offset])
    tfra = child(found, [b"mfra", b"tfra"])
    body = found[tfra.payload : tfra.end]
    assert body[0] == 1
    assert int.from_bytes(body[16 + 19 + 8 : 16 + 19 + 16], "big") == offset


def test_mfra_without_frames() -> None:
    found = mp4.mfra([])
    assert len(found) == 8 + 24 + 16
    assert int.from_bytes(found[-4:], "big") == len(found)


@given(st.integers(1, 64).map(lambda n: 64 * n), st.integers(1, 64).map(lambda n: 64 * n))
def test_moov_round_trip(width: int, height: int) -> None:
    track = mp4.Track(width, height, HVCC)
    moov = mp4.moov(track)
    assert mp4.parse_moov(moov[8:]) == track
    tkhd = child(moov, [b"moov", b"trak", b"tkhd"])
    assert int.from_bytes(moov[tkhd.end - 8 : tkhd.end - 4], "big") == width << 16
    assert int.from_bytes(moov[tkhd.end - 4 : tkhd.end], "big") == height << 16


def test_moov_holds_what_a_fragmented_file_must() -> None:
    moov = mp4.moov(mp4.Track(256, 320, HVCC))
    stbl = [b"moov", b"trak", b"mdia", b"minf", b"stbl"]
    for table in (b"stts", b"stsc", b"stco"):
        span = child(moov, [*stbl, table])
        assert moov[span.payload : span.end] == bytes(8)
    trex = child(moov, [b"moov", b"mvex", b"trex"])
    assert moov[trex.payload : trex.end].hex() == (
        "00000000" "00000001" "00000001" "00000001" "00000000" "02000000"
    )  # fmt: skip
    hvcc = child(moov, [*stbl, b"stsd", b"hvc1", b"hvcC"])
    assert moov[hvcc.payload : hvcc.end] == HVCC


@pytest.mark.parametrize("cut", range(0, 500, 7))
def test_a_cut_moov_is_refused(cut: int) -> None:
    moov = mp4.moov(mp4.Track(256, 256, HVCC))[8:]
    with pytest.raises(FormatError) as caught:
        mp4.parse_moov(moov[:cut])
    assert caught.value.code in ("moov", "box-size")


@given(st.binary(max_size=200))
def test_any_moov_is_refused_or_a_track(payload: bytes) -> None:
    try:
        mp4.parse_moov(payload)
        raise AssertionError("random bytes hold no track")
    except FormatError:
        pass


@pytest.mark.parametrize("payload", [b"", bytes(8), mp4.moof(1, 5)[8:20]])
def test_bad_moofs_are_refused(payload: bytes) -> None:
    with pytest.raises(FormatError):
        mp4.parse_moof(payload)


def test_ffmpeg_reads_the_boxes_back() -> None:
    with small_frames(320, 256):
        data = packed({f"w{i}": normal(i, 200, 257) for i in range(4)})
    with open_archive(io.BytesIO(data)) as archive:
        entries = archive.index.frames
    moofs = [span.begin for span in spans(data) if span.kind == b"moof"]
    assert moofs == [entry.offset + entry.sidecar_bytes for entry in entries]
    with av.open(io.BytesIO(data)) as media:
        stream: Any = media.streams.video[0]
        assert (stream.width, stream.height) == (320, 256)
        assert stream.codec_context.name == "hevc"
        assert stream.time_base == 1
        packets = [packet for packet in media.demux(stream) if packet.size]
        mdats = [data[s.payload : s.end] for s in spans(data) if s.kind == b"mdat"]
        assert [bytes(packet) for packet in packets] == mdats
        assert [packet.pts for packet in packets] == list(range(len(mdats)))
        assert all(packet.is_keyframe for packet in packets)
        record = open_encoder(EncoderSettings(320, 256)).record
        assert bytes(stream.codec_context.extradata) == record
    mfra = first(data, b"mfra")
    assert data[mfra.begin :] == mp4.mfra(moofs)


def test_box_sizes() -> None:
    assert boxes.box(b"free").hex() == "0000000866726565"
    assert boxes.full_box(b"abcd", 1, 0x020304, b"x").hex() == "0000000d616263640102030478"
    made = boxes.uuid_box(boxes.INDEX_UUID, b"12")
    assert made == b"\0\0\0\x1auuid" + boxes.INDEX_UUID + b"12"
    assert all(len(kind) == 16 for kind in boxes.OUR_UUIDS)


@given(st.binary(max_size=300))
def test_deflate_round_trip(data: bytes) -> None:
    packed_data = boxes.deflate(data)
    assert zlib.decompressobj(zdict=DICTIONARY).decompress(packed_data) == data
    assert boxes.inflate(zlib.compress(data), len(data), "x") == data
    assert boxes.inflate(packed_data, len(data), "x") == data
    if data:
        with pytest.raises(FormatError) as caught:
            boxes.inflate(packed_data, len(data) - 1, "x")
        assert caught.value.code == "limit"


def test_the_dictionary_never_changes() -> None:
    """It is a part of format 2."""
    digest = hashlib.sha256(DICTIONARY).hexdigest()
    assert digest == "2b2b8a9115ec2e8d90fca2a5b8e3c0659ac6907504bb4ee736345b21726bc976"
    assert len(boxes.deflate(b'"core":[[1,434,0],[2,447,0]')) < 20


@given(st.binary(max_size=100), st.integers(0, 131), st.integers(1, 255))
def test_seal(data: bytes, place: int, flip: int) -> None:
    whole = boxes.seal(data)
    assert boxes.unseal(whole, "x") == data
    damaged = bytearray(whole)
    damaged[place % len(whole)] ^= flip
    with pytest.raises(FormatError) as caught:
        boxes.unseal(bytes(damaged), "x")
    assert caught.value.code == "digest"


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False,
                                                                      allow_infinity=False),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=10,
    )
)  # fmt: skip
def test_json_round_trip(value: Any) -> None:
    assert boxes.from_json(boxes.to_json(value), "x") == value


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_json_has_no_infinity(value: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        boxes.to_json([value])
    for text in (b"NaN", b"Infinity", b"-Infinity", b"", b"[1,]", b"{'a':1}", b"\xff"):
        with pytest.raises(FormatError) as caught:
            boxes.from_json(text, "x")
        assert caught.value.code == "json"
