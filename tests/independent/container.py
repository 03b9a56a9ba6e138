"""Boxes and records of an archive, as sections 2 to 7 of FORMAT.md have them.

Standard library only; part of the independent reader.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

from independent.video import Video

ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1,
    "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1, "C64": 8, "C128": 16, "C32": 4,
    "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1,
    "F6_E2M3": 1, "F6_E3M2": 1, "F4": 1,
}  # fmt: skip
#: sample entry and configuration box of each codec (section 10.1).
TRACKS = {
    "hevc": (b"hvc1", b"hvcC"), "avc": (b"avc1", b"avcC"), "av1": (b"av01", b"av1C"),
    "vp9": (b"vp09", b"vpcC"), "vvc": (b"vvc1", b"vvcC"), "ffv1": (b"FFV1", b"glbl"),
    "png": (b"mp4v", b"esds"), "jpeg2000": (b"mp4v", b"esds"),
}  # fmt: skip
LEVEL_FORMAT = {"I8": ("<b", 1), "I16": ("<h", 2), "I32": ("<i", 4)}


class Bad(Exception):
    """The file breaks the format; ``code`` as in section 13.3."""

    def __init__(self, code: str, why: str = "") -> None:
        super().__init__(f"{code}: {why}")
        self.code = code


@dataclass(frozen=True)
class Spec:
    """An entry of ``tensors``."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def matrix(self) -> tuple[int, int]:
        """R and C (section 1)."""
        if len(self.shape) < 2:
            return 1, self.size
        return self.shape[0], prod(self.shape[1:])

    @property
    def item_bytes(self) -> int:
        """Bytes of an element (section 4.1)."""
        if self.dtype in ITEM_BYTES:
            return ITEM_BYTES[self.dtype]
        found = re.fullmatch(r"npy:[<>|]([biufcSUmMV])([0-9]{1,5})(\[\w{1,16}\])?", self.dtype)
        if not found:
            raise Bad("dtype", self.dtype)
        return int(found[2]) * (4 if found[1] == "U" else 1)


@dataclass
class Tensor:
    """A tensor as it came out: stored bytes, and levels if it has any."""

    spec: Spec
    data: bytes
    levels: list[int] | None = None


@dataclass
class Start:
    """An entry of ``starts`` with its blobs."""

    record: dict[str, Any]
    escapes: dict[int, int]
    row_energy: bytes | None
    column_energy: bytes | None
    folds: list[tuple[int, int]]


@dataclass
class Card:
    """A sidecar."""

    frame: int
    payload: bytes
    starts: list[Start]
    ends: list[tuple[int, bytes]]
    streams: dict[tuple[str, int], bytes]
    carried: dict[tuple[str, int], int]


# Boxes: sections 2 and 3.


def boxes(data: bytes, begin: int = 0, end: int | None = None) -> Iterator[tuple[bytes, int, int]]:
    """Type (16 bytes for ``uuid``), begin of the payload, end; stops at a box cut short."""
    stop = len(data) if end is None else end
    while begin + 8 <= stop:
        size, kind, inner = (
            int.from_bytes(data[begin : begin + 4], "big"),
            data[begin + 4 : begin + 8],
            8,
        )
        if size == 1:
            size, inner = int.from_bytes(data[begin + 8 : begin + 16], "big"), 16
        if kind == b"uuid":
            kind, inner = data[begin + inner : begin + inner + 16], inner + 16
        if size < inner:
            raise Bad("box-size")
        if begin + size > stop:
            return
        yield kind, begin + inner, begin + size
        begin += size


def find(data: bytes, path: list[bytes], begin: int, end: int) -> tuple[int, int]:
    """Payload of the box at a path."""
    for kind in path:
        for name, inner, stop in boxes(data, begin, end):
            if name == kind:
                begin, end = inner, stop
                break
        else:
            raise Bad("moov", kind.decode())
    return begin, end


def read_track(data: bytes, begin: int, end: int, track: dict[str, Any] | None = None) -> Video:
    """Frame size and decoder configuration record; ``track`` is what the header says of it."""
    said = track or {"codec": "hevc"}
    entry, record = TRACKS[said["codec"]]
    path = [b"trak", b"mdia", b"minf", b"stbl", b"stsd"]
    begin, end = find(data, path, begin, end)
    begin, end = find(data, [entry], begin + 8, end)
    width, height = struct.unpack_from(">HH", data, begin + 24)
    first, last = find(data, [record], begin + 78, end)
    if track and (width, height) != (track["width"], track["height"]):
        raise Bad("track")
    return Video(data[first:last], width, height, said["codec"], said.get("bit_depth", 8))


def parse_json(text: bytes) -> dict[str, Any]:
    """JSON with unique names."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({name for name, _ in pairs}) != len(pairs):
            raise Bad("json")
        return dict(pairs)

    found = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    if not isinstance(found, dict):
        raise Bad("schema")
    return found


@cache
def dictionary() -> bytes:
    """The preset dictionary, as the document itself lists it (section 18)."""
    document = Path(__file__).resolve().parents[2] / "FORMAT.md"
    _, _, section = document.read_text(encoding="utf-8").partition("## 18. The preset dictionary")
    _, _, listing = section.partition("```text\n")
    return listing.partition("\n```")[0].replace("\n", "").encode("ascii")


def inflate(data: bytes, wbits: int = 15, code: str = "deflate") -> bytes:
    """Exactly one whole stream; zlib's may refer to the dictionary."""
    unpacker = zlib.decompressobj(wbits, dictionary()) if wbits > 0 else zlib.decompressobj(wbits)
    try:
        found = unpacker.decompress(data, 64 << 20)
    except zlib.error:
        raise Bad(code) from None
    if not unpacker.eof or unpacker.unused_data:
        raise Bad(code)
    return found


def unseal(payload: bytes) -> bytes:
    """What follows the SHA-256 at the start, checked."""
    if hashlib.sha256(payload[32:]).digest() != payload[:32]:
        raise Bad("digest")
    return payload[32:]


def read_header(payload: bytes) -> dict[str, Any]:
    """Section 4."""
    header = parse_json(inflate(unseal(payload)))
    if header["weightvid"][0] not in (1, 2):
        raise Bad("version")
    if not {*header.get("must_understand", [])} <= {"track.codec", "track.bit_depth"}:
        raise Bad("must_understand")
    track = header["track"]
    if track["codec"] not in TRACKS or track["width"] % 64 or track["height"] % 64:
        raise Bad("track")
    if track.get("bit_depth", 8) not in (8, 10):
        raise Bad("track")
    return header


# Sidecars: section 5.


class Bytes:
    """Bytes taken in order."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, count: int) -> bytes:
        found = self.data[self.at : self.at + count]
        if len(found) != count:
            raise Bad("schema")
        self.at += count
        return found

    def done(self) -> None:
        if self.at != len(self.data):
            raise Bad("schema")


def read_sidecar(payload: bytes, specs: list[Spec]) -> Card:
    """Payload of a sidecar box; its digest is still unchecked."""
    body = Bytes(payload[32:])
    head = Bytes(inflate(body.take(int.from_bytes(body.take(4), "big"))))
    record = parse_json(head.take(int.from_bytes(head.take(4), "big")))
    ends = [(entry["id"], head.take(16)) for entry in record.get("ends", [])]
    starts = [read_start(entry, head, specs) for entry in record.get("starts", [])]
    head.done()
    streams, carried = {}, {}
    for kind in ("core", "tail"):
        for number, size, count in record.get(kind, []):
            if (kind, number) in streams:
                raise Bad("schema")
            streams[kind, number], carried[kind, number] = body.take(size), count
    body.done()
    return Card(record["frame"], payload, starts, ends, streams, carried)


def read_start(record: dict[str, Any], head: Bytes, specs: list[Spec]) -> Start:
    """An entry of ``starts`` with its escapes and its layout."""
    spec = specs[record["id"]]
    count = record.get("escapes", 0)
    steps = struct.unpack(f"<{count}Q", head.take(8 * count))
    levels = struct.unpack(f"<{count}i", head.take(4 * count))
    escapes, place = {}, 0
    for step, level in zip(steps, levels, strict=True):
        place += step
        if place >= spec.size or place in escapes:
            raise Bad("schema")
        escapes[place] = level
    if "energies" not in record:
        return Start(record, escapes, None, None, [(0, 1)])
    energies, (rows, columns) = record["energies"], spec.matrix
    row_energy = column_energy = None
    classes = 1
    if energies:
        if columns % energies:
            raise Bad("schema")
        row_energy, column_energy = head.take(rows), head.take(energies)
        classes = 1 + max(row_energy) + max(column_energy)
    folds = [(code // 4, code % 4 + 1) for code in head.take(classes)]
    if any(core > 15 for core, _ in folds):
        raise Bad("schema")
    return Start(record, escapes, row_energy, column_energy, folds)


# Exact boxes: section 6.


def read_exact(payload: bytes, specs: list[Spec]) -> list[tuple[dict[str, Any], bytes]]:
    """Items with their bytes."""
    body = Bytes(unseal(payload))
    record = parse_json(inflate(body.take(int.from_bytes(body.take(4), "big"))))
    items, streams = record["items"], iter(record["streams"])
    sizes = [
        LEVEL_FORMAT[i["levels"]][1] if "levels" in i else specs[i["id"]].item_bytes for i in items
    ]
    found, at = [], 0
    while at < len(items):
        end = at
        while end < len(items) and sizes[end] == sizes[at]:
            end += 1
        counts = [item.get("count", specs[item["id"]].size) for item in items[at:end]]
        total = sum(counts) * sizes[at]
        planes = sizes[at] if sizes[at] in (2, 4, 8, 16) else 1
        joined = bytearray(total)
        for plane in range(planes):
            code, length = next(streams)
            joined[plane::planes] = decompress(code, body.take(length), total // planes)
        place = 0
        for item, count in zip(items[at:end], counts, strict=True):
            size = count * sizes[at]
            found.append((item, bytes(joined[place : place + size])))
            place += size
        at = end
    body.done()
    if next(streams, None) is not None:
        raise Bad("schema")
    return found


def decompress(code: str, data: bytes, size: int) -> bytes:
    """A plane."""
    if code == "raw":
        found = data
    elif code == "deflate":
        found = inflate(data, -15, "stream")
    elif code == "lzma2":
        dictionary = 4096
        while dictionary < size:
            dictionary *= 2
        filters = [{"id": lzma.FILTER_LZMA2, "dict_size": dictionary}]
        unpacker = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=filters)
        found = unpacker.decompress(data)
        if not unpacker.eof or unpacker.unused_data:
            raise Bad("stream")
    else:
        raise Bad("stream", code)
    if len(found) != size:
        raise Bad("stream")
    return found


def read_index(data: bytes) -> dict[str, Any]:
    """Section 7, from the end of the file."""
    end = len(data) - int.from_bytes(data[-4:], "big")
    size = int.from_bytes(data[end - 4 : end], "big")
    ((kind, begin, stop),) = boxes(data, end - size, end)
    if kind != b"weightvid-index\0":
        raise Bad("index")
    return parse_json(inflate(unseal(data[begin : stop - 4])))
