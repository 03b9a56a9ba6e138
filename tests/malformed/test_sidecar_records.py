"""Sidecars whose digests are right and whose records are not: the error code of each.

Boxes, headers, exact boxes and the index are in ``tests/container/test_corpus.py``.
"""

from __future__ import annotations

import hashlib
import io
import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
from independent import cases, container, video

from weightvid.errors import FormatError
from weightvid.loader import open_archive

FRAME = b"weightvid-frame\0"
#: in the blobs of the first sidecar of ``cases.layout``: one tensor hash, then tensor ``order``
#: with one escape, 30 row energies, 20 column energies and its folds.
HASH, ESCAPE, LEVEL, ROWS, COLUMNS, FOLDS = 0, 16, 24, 28, 58, 78


@dataclass
class Parts:
    """A sidecar taken apart; ``text`` replaces the record if it is set."""

    record: dict[str, Any]
    blob: bytearray
    streams: bytes
    text: bytes | None = None
    head: bytes | None = None

    @property
    def start(self) -> dict[str, Any]:
        found: dict[str, Any] = self.record["starts"][0]
        return found

    def body(self) -> bytes:
        text = json.dumps(self.record).encode() if self.text is None else self.text
        head = zlib.compress(len(text).to_bytes(4, "big") + text + self.blob)
        head = head if self.head is None else self.head
        return len(head).to_bytes(4, "big") + head + self.streams


@cache
def good() -> tuple[bytes, bytes]:
    """An archive and the luma of its first frame."""
    data = cases.layout()
    places = {kind: (b, e) for kind, b, e in reversed(list(container.boxes(data)))}
    track = container.read_track(data, *places[b"moov"])
    begin, end = places[b"mdat"]
    return data, video.by_pyav(track, [data[begin:end]])[0]


def changed(change: Callable[[Parts], Any]) -> bytes:
    """The archive with another first sidecar, its digest made right."""
    data, luma = good()
    begin, end = next((b, e) for kind, b, e in container.boxes(data) if kind == FRAME)
    body = data[begin + 32 : end]
    size = int.from_bytes(body[:4], "big")
    head = container.inflate(body[4 : 4 + size])
    length = int.from_bytes(head[:4], "big")
    record = json.loads(head[4 : 4 + length])
    parts = Parts(record, bytearray(head[4 + length :]), body[4 + size :])
    change(parts)
    new = parts.body()
    payload = FRAME + hashlib.sha256(new + luma).digest() + new
    whole = (8 + len(payload)).to_bytes(4, "big") + b"uuid" + payload
    return data[: begin - 24] + whole + data[end:]


def start(**keys: Any) -> Callable[[Parts], None]:
    """Set keys of the first start; None takes one away."""

    def change(parts: Parts) -> None:
        for key, value in keys.items():
            parts.start.pop(key, None)
            if value is not None:
                parts.start[key] = value

    return change


def record(**keys: Any) -> Callable[[Parts], None]:
    """Set keys of the record."""
    return lambda parts: parts.record.update(keys)


def blob(at: int, data: bytes) -> Callable[[Parts], None]:
    """Overwrite bytes behind the text."""

    def change(parts: Parts) -> None:
        parts.blob[at : at + len(data)] = data

    return change


def attribute(**values: Any) -> Callable[[Parts], None]:
    """Set attributes of the parts."""

    def change(parts: Parts) -> None:
        for key, value in values.items():
            setattr(parts, key, value)

    return change


def stream(kind: str, data: Callable[[bytes], bytes]) -> Callable[[Parts], None]:
    """Replace the first stream of a kind."""

    def change(parts: Parts) -> None:
        at = sum(entry[1] for entry in parts.record["core"]) if kind == "tail" else 0
        entry = parts.record[kind][0]
        new = data(parts.streams[at : at + entry[1]])
        parts.streams = parts.streams[:at] + new + parts.streams[at + entry[1] :]
        entry[1] = len(new)

    return change


def entry(kind: str, place: int, value: Any) -> Callable[[Parts], None]:
    """Set a field of the first entry of ``core`` or ``tail``."""

    def change(parts: Parts) -> None:
        parts.record[kind][0][place] = value

    return change


def raw_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return packer.compress(data) + packer.flush()


CORPUS: dict[str, tuple[Callable[[Parts], Any], str]] = {
    "name twice": (attribute(text=b'{"frame":0,"frame":0}'), "json"),
    "not UTF-8": (attribute(text=b'{"frame":0,"x":"\xed\xa0\x80"}'), "json"),
    "a list": (attribute(text=b"[]"), "schema"),
    "no frame": (attribute(text=b"{}"), "schema"),
    "another frame": (record(frame=1), "order"),
    "frame a float": (record(frame=0.0), "schema"),
    "head not zlib": (attribute(head=b"{}"), "deflate"),
    "head bomb": (attribute(head=zlib.compress(bytes((64 << 20) + 1))), "limit"),
    "one byte too many": (lambda parts: parts.blob.append(0), "schema"),
    "one byte too few": (lambda parts: parts.blob.pop(), "schema"),
    "streams too long": (lambda parts: setattr(parts, "streams", parts.streams + b"x"), "schema"),
    "starts an object": (record(starts={}), "schema"),
    "start unknown": (start(id=99), "schema"),
    "start negative": (start(id=-1), "schema"),
    "start twice": (
        lambda parts: parts.record["starts"].append({"id": 0, "step": "0x1p0"}),
        "order",
    ),
    "end without start": (lambda parts: parts.record["ends"][0].update(id=3), "order"),
    "end too early": (lambda parts: parts.record["ends"][0].update(id=1), "order"),
    "no end": (
        lambda parts: (parts.record.pop("ends"), attribute(blob=parts.blob[16:])(parts)),
        "order",
    ),
    "sqnr text": (lambda parts: parts.record["ends"][0].update(sqnr_db="20"), "schema"),
    "no step": (start(step=None), "quantizer"),
    "step a number": (start(step=0.5), "quantizer"),
    "step decimal": (start(step="0.5"), "quantizer"),
    "step in capitals": (start(step="0X1P0"), "quantizer"),
    "step with a blank": (start(step=" 0x1p0"), "quantizer"),
    "step with a sign": (start(step="+0x1p0"), "quantizer"),
    "step not normal": (start(step="0x2p0"), "quantizer"),
    "step zero": (start(step="0x0p0"), "quantizer"),
    "step negative": (start(step="-0x1p0"), "quantizer"),
    "step not finite": (start(step="nan"), "quantizer"),
    "step tiny": (start(step="0x1p-112"), "quantizer"),
    "step huge": (start(step="0x1p120"), "quantizer"),
    "step not binary32": (start(step="0x1.0000001p0"), "quantizer"),
    "shifts too few": (start(shifts=[1, 2]), "quantizer"),
    "shifts too large": (start(shifts=[1, 2, 128]), "quantizer"),
    "shifts floats": (start(shifts=[1, 2, 3.0]), "quantizer"),
    "states 5": (start(states=5), "quantizer"),
    "states true": (start(states=True), "quantizer"),
    "axis 2": (start(states=8, axis=2), "quantizer"),
    "trellis with shifts": (start(states=8, shifts=[0, 0, 0]), "quantizer"),
    "numbering 2": (start(states=8, numbering=2), "quantizer"),
    "more escapes than elements": (start(escapes=601), "schema"),
    "more escapes than bytes": (start(escapes=500), "schema"),
    "escape beyond the tensor": (blob(ESCAPE, (600).to_bytes(8, "little")), "schema"),
    "escape far beyond": (blob(ESCAPE, b"\xff" * 8), "schema"),
    "escape level too large": (blob(LEVEL, ((1 << 22) + 1).to_bytes(4, "little")), "schema"),
    "energies do not divide": (start(energies=19), "schema"),
    "energies beyond the columns": (start(energies=21), "schema"),
    "row energy 64": (blob(ROWS, b"\x40"), "schema"),
    "column energy 64": (blob(COLUMNS, b"\x40"), "schema"),
    "fold of core 16": (blob(FOLDS, b"\x40"), "schema"),
    "core 0": (entry("core", 0, 0), "schema"),
    "core 16": (entry("core", 0, 16), "schema"),
    "core given twice": (lambda parts: parts.record["core"][1].__setitem__(0, 1), "schema"),
    "tail 1": (entry("tail", 0, 1), "schema"),
    "tail descending": (lambda parts: parts.record["tail"].reverse(), "schema"),
    "stream beyond the box": (entry("core", 1, 1 << 20), "schema"),
    "carried negative": (entry("core", 2, -1), "schema"),
    "carried into the first frame": (entry("core", 2, 100), "digits"),
    "carried a text": (entry("core", 2, "0"), "schema"),
    "digits missing": (stream("core", lambda _: raw_deflate(b"")), "digits"),
    "digits damaged": (stream("core", lambda _: b"\xff\xff"), "digits"),
    "digits cut": (stream("core", lambda data: data[:-2]), "digits"),
    "digits with more behind": (stream("core", lambda data: data + b"x"), "digits"),
    "too many digits": (stream("core", lambda _: raw_deflate(bytes(4097))), "digits"),
    "tail digits missing": (stream("tail", lambda _: raw_deflate(b"")), "digits"),
    "no streams": (
        lambda parts: (record(core=[], tail=[])(parts), attribute(streams=b"")(parts)),
        "digits",
    ),
    "tensor hash": (blob(HASH, bytes(16)), "tensor-digest"),
    "another step": (start(step="0x1p-1"), "tensor-digest"),
    "another escape": (blob(LEVEL, b"\xe9\x03\0\0"), "tensor-digest"),
}  # fmt: skip


def read(data: bytes) -> None:
    with open_archive(io.BytesIO(data), threads=1, check_tensors=True) as archive:
        for _ in archive.iter_stored():
            pass


def test_the_good_one_is_good() -> None:
    with pytest.raises(FormatError) as caught:
        read(changed(lambda parts: None))
    assert caught.value.code == "index"  # the last thing that is checked: a sidecar's size changed
    data, _ = good()
    begin, end = next((b, e) for kind, b, e in container.boxes(data) if kind == FRAME)
    specs = [
        container.Spec(n, "F32", s) for n, s in (("order", (30, 20)), ("long", (70, 10, 3, 3)))
    ]
    card = container.read_sidecar(data[begin:end], specs)
    assert card.starts[0].escapes == {7 * 20 + 8: 1000}
    assert [entry[0] for entry in card.ends] == [0]
    assert {kind for kind, _ in card.streams} == {"core", "tail"}


@pytest.mark.parametrize("name", CORPUS)
def test_malformed_sidecar(name: str) -> None:
    change, code = CORPUS[name]
    with pytest.raises(FormatError) as caught:
        read(changed(change))
    assert caught.value.code == code
