"""Damaged and dishonest archives of other codecs and depths: the error code of each."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import textwrap
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from archives import Pipe, first, normal, packed, same, small_frames, spans
from independent import cases, container
from independent.video import Video as Track
from independent.video import by_pyav

from weightvid.codec.encode import EncoderSettings, Lossy, Video, open_encoder
from weightvid.container.boxes import deflate, from_json, inflate, seal, to_json, unseal
from weightvid.errors import FormatError, WeightvidError
from weightvid.loader import open_archive
from weightvid.pack import PackOptions

CODECS = ("x264", "svtav1", "vp9", "ffv1", "png", "jpeg2000")
HEADER, FRAME = b"weightvid-header", b"weightvid-frame\0"
Change = Callable[[bytes], bytes]


@cache
def good(codec: str, deep: bool = False) -> bytes:
    options = PackOptions(
        codec=codec, step_factor=1.0, lossy=Lossy("qp", 24) if deep else None,
        bit_depth=10 if deep else 8,
    )  # fmt: skip
    rows = np.exp2(np.arange(260) % 4).astype(np.float32)[:, None]
    with small_frames():
        return packed({"a.w": normal(1, 260, 600) * rows, "a.b": normal(2, 260)}, options)


@cache
def tensors(codec: str, deep: bool = False) -> dict[str, Any]:
    with open_archive(io.BytesIO(good(codec, deep))) as archive:
        return dict(archive)


def read(data: bytes, codec: str, seekable: bool = True, deep: bool = False) -> None:
    """All of it; what arrives must be right."""
    stream: Any = io.BytesIO(data) if seekable else Pipe(data)
    with open_archive(stream, threads=1) as archive:
        for name, array in archive:
            assert same(array, tensors(codec, deep)[name])


def replaced(data: bytes, kind: bytes, payload: bytes) -> bytes:
    span = first(data, kind)
    head = data[span.begin + 4 : span.payload]
    size = (4 + len(head) + len(payload)).to_bytes(4, "big")
    return data[: span.begin] + size + head + payload + data[span.end :]


def track(**values: Any) -> Change:
    """Other values of the header's track, sealed again."""

    def change(data: bytes) -> bytes:
        span = first(data, HEADER)
        text = inflate(unseal(data[span.payload : span.end], ""), 1 << 20, "")
        record = from_json(text, "")
        record["track"].update(values)
        return replaced(data, HEADER, seal(deflate(to_json(record))))

    return change


def needs(*names: str) -> Change:
    def change(data: bytes) -> bytes:
        span = first(data, HEADER)
        text = inflate(unseal(data[span.payload : span.end], ""), 1 << 20, "")
        record = {**from_json(text, ""), "must_understand": list(names)}
        return replaced(data, HEADER, seal(deflate(to_json(record))))

    return change


def swapped(old: bytes, new: bytes) -> Change:
    """Another type of a box within moov."""

    def change(data: bytes) -> bytes:
        span = first(data, b"moov")
        moov = data[span.begin : span.end]
        assert moov.count(old) == 1
        return data[: span.begin] + moov.replace(old, new) + data[span.end :]

    return change


def record_byte(box: bytes, at: int, value: int) -> Change:
    def change(data: bytes) -> bytes:
        place = data.index(box) + 4 + at
        return data[:place] + bytes((value,)) + data[place + 1 :]

    return change


CORPUS: dict[str, tuple[str, Change, str]] = {
    "unknown codec": ("svtav1", track(codec="av2"), "track"),
    "codec of another type": ("svtav1", track(codec=["av1"]), "track"),
    "codec of another entry": ("svtav1", track(codec="vp9"), "track"),
    "codec that the entry may be": ("png", track(codec="jpeg2000"), "track"),
    "hevc said, avc there": ("x264", track(codec="hevc"), "track"),
    "depth that the codec lacks": ("vp9", track(bit_depth=10), "track"),
    "depth that none has": ("svtav1", track(bit_depth=9), "track"),
    "depth that is text": ("svtav1", track(bit_depth="10"), "schema"),
    "depth that the record denies": ("svtav1", track(bit_depth=10), "track"),
    "another depth of H.264": ("x264", track(bit_depth=10), "track"),
    "unknown feature": ("svtav1", needs("track.codec", "track.codec2"), "must_understand"),
    "unknown entry": ("svtav1", swapped(b"av01", b"av02"), "moov"),
    "entry of another codec": ("svtav1", swapped(b"av01", b"vp09"), "moov"),
    "no record": ("svtav1", swapped(b"av1C", b"free"), "moov"),
    "av1C version": ("svtav1", record_byte(b"av1C", 0, 0x82), "track"),
    "av1C level": ("svtav1", record_byte(b"av1C", 1, 0x05), "track"),
    "av1C depth": ("svtav1", record_byte(b"av1C", 2, 0x4C), "track"),
    "av1C size": ("svtav1", record_byte(b"av1C", 11, 0x7F), "track"),
    "avcC version": ("x264", record_byte(b"avcC", 0, 9), "track"),
    "avcC lengths": ("x264", record_byte(b"avcC", 4, 0xFC), "track"),
    "vpcC version": ("vp9", record_byte(b"vpcC", 0, 0), "track"),
    "vpcC profile": ("vp9", record_byte(b"vpcC", 4, 1), "track"),
    "vpcC depth": ("vp9", record_byte(b"vpcC", 6, 0xA2), "track"),
    "esds of another codec": ("png", record_byte(b"esds", 11, 0x6E), "track"),
    "FFV1 record": ("ffv1", record_byte(b"glbl", 3, 0x55), "packet"),
}


@pytest.mark.parametrize("name", CORPUS)
@pytest.mark.parametrize("seekable", [True, False])
def test_malformed(name: str, seekable: bool) -> None:
    codec, change, code = CORPUS[name]
    data = change(good(codec))
    assert data != good(codec)
    with pytest.raises(FormatError) as caught:
        read(data, codec, seekable)
    assert caught.value.code == code


def test_a_deep_track_that_says_eight_bits_is_refused() -> None:
    for codec, code in (("x265", "packet"), ("x264", "track"), ("svtav1", "track")):
        with pytest.raises(FormatError) as caught:
            read(track(bit_depth=8)(good(codec, deep=True)), codec, deep=True)
        assert caught.value.code == code


@pytest.mark.parametrize("codec", [c for c in CODECS if c not in ("x264", "ffv1")])
@pytest.mark.parametrize("size", [(512, 512), (64, 64), (256, 320)])
def test_a_packet_that_changes_the_frame_size(codec: str, size: tuple[int, int]) -> None:
    """The record is right, the digest too, and the packet brings pictures of another size."""
    luma = np.full(size[::-1], 128, np.uint8)
    packet = open_encoder(EncoderSettings(*size, Video(codec))).encode(luma)
    data = replaced(good(codec), b"mdat", packet)
    for seekable in (True, False):
        with pytest.raises(FormatError) as caught:
            read(data, codec, seekable)
        assert caught.value.code in ("packet", "index", "digest")
    with pytest.raises(FormatError) as caught, open_archive(Pipe(data)) as archive:  # type: ignore[arg-type]
        next(iter(archive))
    assert caught.value.code == "packet"


def test_folds_of_deep_samples_are_refused() -> None:
    """A well-sealed sidecar that folds levels into samples of ten bits."""
    data = good("x265", deep=True)
    specs = [container.Spec("a.w", "F32", (260, 600)), container.Spec("a.b", "F32", (260,))]
    span, mdat = first(data, FRAME), first(data, b"mdat")
    body = data[span.payload + 32 : span.end]
    size = int.from_bytes(body[:4], "big")
    head = inflate(body[4 : 4 + size], 1 << 20, "")
    length = int.from_bytes(head[:4], "big")
    card = container.read_sidecar(data[span.payload : span.end], specs)
    classes = len(card.starts[0].folds)
    changed = head[: len(head) - classes] + bytes([9]) * classes
    assert changed[: 4 + length] == head[: 4 + length]
    text = deflate(changed)
    new = len(text).to_bytes(4, "big") + text + body[4 + size :]
    begin, end = next((b, e) for k, b, e in container.boxes(data) if k == b"moov")
    said = {"codec": "hevc", "bit_depth": 10, "width": 256, "height": 256}
    seen: Track = container.read_track(data, begin, end, said)
    (luma,) = by_pyav(seen, [data[mdat.payload : mdat.end]])
    made = replaced(data, FRAME, hashlib.sha256(new + luma).digest() + new)
    with pytest.raises(FormatError) as caught:
        read(made, "x265", seekable=False, deep=True)
    assert caught.value.code == "schema"


def header_places(data: bytes) -> list[int]:
    found: list[int] = []
    for span in spans(data):
        named = span.kind in (b"ftyp", b"moov", HEADER, b"moof", b"mfra")
        found += range(span.begin, span.end if named else span.payload)
    return found


@pytest.mark.parametrize("codec", CODECS)
def test_every_header_byte_flipped(codec: str) -> None:
    """Right tensors or a WeightvidError; each codec takes a third of the bytes."""
    places = header_places(good(codec))
    for number, place in enumerate(places[CODECS.index(codec) % 3 :: 3]):
        data = bytearray(good(codec))
        data[place] ^= (0xFF, 0x01)[number % 2]
        try:
            read(bytes(data), codec, seekable=number % 3 > 0)
        except WeightvidError:
            continue


@pytest.mark.parametrize(("codec", "deep"), [*((c, False) for c in CODECS), ("x265", True)])
def test_random_mutations(codec: str, deep: bool) -> None:
    random = np.random.default_rng(3)
    for number in range(30):
        data = bytearray(good(codec, deep))
        for place in random.integers(0, len(data), random.integers(1, 20)):
            data[place] = random.integers(256)
        try:
            read(bytes(data), codec, seekable=bool(number % 2), deep=deep)
        except WeightvidError:
            continue


@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_AS as Linux keeps it")
@pytest.mark.parametrize("codec", ["x264", "svtav1", "vp9", "png", "jpeg2000"])
def test_giant_pictures_allocate_little(codec: str, tmp_path: Path) -> None:
    """A packet of 8192 x 8192 samples, read with 700 MB of address space beyond import."""
    data = good(codec)
    if codec == "png":
        span = first(data, b"mdat")
        at = span.payload + 16
        data = data[:at] + (8192).to_bytes(4, "big") * 2 + data[at + 8 :]
    elif codec == "jpeg2000":
        at = first(data, b"mdat").payload + 8
        data = data[:at] + (8192).to_bytes(4, "big") * 2 + data[at + 8 :]
    else:
        settings = EncoderSettings(2048, 2048, Video(codec))
        packet = open_encoder(settings).encode(np.full((2048, 2048), 128, np.uint8))
        data = replaced(data, b"mdat", packet)
    path = tmp_path / "a.mp4"
    path.write_bytes(data)
    code = """
        import resource, sys
        from weightvid.errors import WeightvidError
        from weightvid.loader import open_archive
        pages = int(open("/proc/self/statm").read().split()[0])
        limit = pages * resource.getpagesize() + 700_000_000
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        try:
            with open_archive(open(sys.argv[1], "rb"), threads=1) as archive:
                for name, array in archive:
                    del array
        except WeightvidError:
            print("refused")
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.stdout.strip() == "refused", done.stderr


def test_the_cases_of_the_independent_reader_cover_every_track() -> None:
    seen = set()
    for make in cases.CASES.values():
        data = make()
        begin, end = next((b, e) for k, b, e in container.boxes(data) if k == HEADER)
        said = container.read_header(data[begin:end])["track"]
        seen.add((said["codec"], said.get("bit_depth", 8)))
    assert seen >= {(codec, 8) for codec in container.TRACKS if codec != "vvc"} | {("hevc", 10)}
