"""The sidecar of a frame: its bytes.

FORMAT.md is the specification.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from weightvid.container.boxes import DIGEST_BYTES, LIMITS, deflate, from_json, inflate, to_json
from weightvid.container.digits import Kind
from weightvid.container.fields import bad, exactly, integer, items, mapping, parse_params
from weightvid.container.records import (
    NO_ESCAPES,
    SQNR_PLACES,
    TENSOR_HASH_BYTES,
    Escapes,
    Sidecar,
    TensorEnd,
    TensorStart,
)
from weightvid.errors import FormatError, QuantizationError
from weightvid.quantize.params import MAX_LEVEL
from weightvid.spec import TensorSpec
from weightvid.tile import PLAIN_LAYOUT, EnergyOrder, Fold, Layout, Samples, matrix_shape
from weightvid.tile.fold import MAX_CORE, MAX_WIDTH


def sidecar_payload(sidecar: Sidecar, luma: Samples) -> bytes:
    """Payload of the sidecar box of a frame with these samples, shape (height, width)."""
    head = _head(sidecar)
    digits = [sidecar.digits[k] for key in ("core", "tail") for k in sidecar.digits if k[0] == key]
    body = b"".join((len(head).to_bytes(4, "big"), head, *digits))
    return frame_digest(body, luma) + body


def order_bytes(sidecar: Sidecar) -> int:
    """What the orders and folds of tensors take in a sidecar: its size, less that without them."""
    bare = replace(
        sidecar, starts=tuple(replace(start, layout=PLAIN_LAYOUT) for start in sidecar.starts)
    )
    return len(_head(sidecar)) - len(_head(bare))


def _head(sidecar: Sidecar) -> bytes:
    """Text, hashes and numbers, deflated."""
    starts, blobs = [], []
    for start in sidecar.starts:
        entry: dict[str, Any] = {"id": start.tensor, **start.params.to_dict()}
        if count := len(start.escapes.index):
            entry["escapes"] = count
            blobs.append(np.diff(start.escapes.index, prepend=0).astype("<u8").tobytes())
            blobs.append(start.escapes.level.astype("<i4").tobytes())
        if start.layout != PLAIN_LAYOUT:
            order = start.layout.order
            entry["energies"] = 0 if order is None else len(order.columns)
            if order is not None:
                blobs += [order.rows.tobytes(), order.columns.tobytes()]
            blobs.append(bytes(fold.to_byte() for fold in start.layout.folds))
        starts.append(entry)
    ends: list[dict[str, Any]] = []
    for end in sidecar.ends:
        ends.append({"id": end.tensor})
        if end.sqnr_db is not None:
            ends[-1]["sqnr_db"] = round(end.sqnr_db, SQNR_PLACES)
    record: dict[str, Any] = {"frame": sidecar.frame}
    for key, value in (("starts", starts), ("ends", ends)):
        if value:
            record[key] = value
    for key in ("core", "tail"):
        streams = [(k, data) for k, data in sidecar.digits.items() if k[0] == key]
        if streams:
            record[key] = [[k[1], len(data), sidecar.carried.get(k, 0)] for k, data in streams]
    text = to_json(record)
    hashes = b"".join(end.sha256 for end in sidecar.ends)
    pieces = (len(text).to_bytes(4, "big") + text, hashes, b"".join(blobs))
    return deflate(*(piece for piece in pieces if piece))


def frame_digest(body: bytes, luma: Samples) -> bytes:
    """SHA-256 over a sidecar's body and then the frame's luma, row by row, little-endian."""
    digest = hashlib.sha256(body)
    stored = luma.astype(luma.dtype.newbyteorder("<"), copy=False)
    digest.update(np.ascontiguousarray(stored).data)
    return digest.digest()


def check_frame(payload: bytes, luma: Samples, number: int) -> None:
    """Compare a decoded frame, and its sidecar, with the digest in the sidecar's payload."""
    if frame_digest(payload[DIGEST_BYTES:], luma) != payload[:DIGEST_BYTES]:
        raise FormatError(f"frame {number} or its sidecar is damaged", code="digest")


class _Blob:
    """The bytes behind a sidecar's text, taken in order."""

    def __init__(self, data: bytes, at: int) -> None:
        self._data, self._at = data, at

    def take(self, count: int) -> bytes:
        found = self._data[self._at : self._at + count]
        self._at += count
        if len(found) != count:
            raise bad("a frame sidecar", "its size does not match its records")
        return found

    def finish(self) -> None:
        if self._at != len(self._data):
            raise bad("a frame sidecar", "its size does not match its records")


def parse_sidecar(payload: bytes, tensors: Sequence[TensorSpec]) -> Sidecar:
    """Sidecar from its box's payload; its digest can be checked only with the decoded frame."""
    what = "a frame sidecar"
    split = DIGEST_BYTES + 4
    size = int.from_bytes(payload[DIGEST_BYTES:split], "big")
    if size > len(payload) - split:
        raise bad(what, "its text is longer than itself")
    data = inflate(payload[split : split + size], LIMITS.box_bytes, what)
    length = int.from_bytes(data[:4], "big")
    record = mapping(from_json(data[4 : 4 + length], what), what)
    frame = integer(record.get("frame"), 0, (1 << 32) - 2, what)
    blob = _Blob(data, 4 + length)
    ends = tuple(
        _parse_end(mapping(entry, what), blob, tensors)
        for entry in items(record.get("ends", []), LIMITS.tensors, what)
    )
    starts = tuple(
        _parse_start(mapping(entry, what), blob, tensors)
        for entry in items(record.get("starts", []), LIMITS.tensors, what)
    )
    blob.finish()
    digits: dict[Kind, bytes] = {}
    carried: dict[Kind, int] = {}
    streams = _Blob(payload, split + size)
    for key, most in (("core", MAX_CORE), ("tail", MAX_WIDTH)):
        least = 1 if key == "core" else 2
        for entry in items(record.get(key, []), most, what):
            number, stream_bytes, count = exactly(entry, 3, what)
            kind = (key, integer(number, least, most, what))
            least = kind[1] + 1
            digits[kind] = streams.take(integer(stream_bytes, 0, LIMITS.box_bytes, what))
            carried[kind] = integer(count, 0, LIMITS.frame_px**2, what)
    streams.finish()
    return Sidecar(frame, starts, ends, digits, carried)


def _parse_end(record: dict[str, Any], blob: _Blob, tensors: Sequence[TensorSpec]) -> TensorEnd:
    what = "a frame sidecar"
    tensor = integer(record.get("id"), 0, len(tensors) - 1, what)
    sqnr = record.get("sqnr_db")
    if sqnr is not None and type(sqnr) not in (int, float):
        raise bad(what, "sqnr_db must be a number")
    return TensorEnd(tensor, blob.take(TENSOR_HASH_BYTES), sqnr)


def _parse_start(record: dict[str, Any], blob: _Blob, tensors: Sequence[TensorSpec]) -> TensorStart:
    what = "a frame sidecar"
    tensor = integer(record.get("id"), 0, len(tensors) - 1, what)
    spec = tensors[tensor]
    count = integer(record.get("escapes", 0), 0, spec.size, what)
    params = parse_params(record, what)
    escapes = _parse_escapes(blob, count, spec.size)
    if "energies" not in record:
        return TensorStart(tensor, params, escapes)
    rows, columns = matrix_shape(spec.shape)
    energies = integer(record["energies"], 0, columns, what)
    try:
        order = None
        if energies:
            if columns % energies:
                raise bad(what, "column energies do not divide the columns")
            order = EnergyOrder(_energies(blob, rows), _energies(blob, energies))
        classes = 1 if order is None else order.classes
        folds = tuple(Fold.from_byte(code) for code in blob.take(classes))
        return TensorStart(tensor, params, escapes, Layout(order, folds))
    except QuantizationError as error:
        raise bad(what, str(error)) from None


def _energies(blob: _Blob, count: int) -> npt.NDArray[np.uint8]:
    return np.frombuffer(blob.take(count), np.uint8)


def _parse_escapes(blob: _Blob, count: int, size: int) -> Escapes:
    if not count:
        return NO_ESCAPES
    deltas = np.frombuffer(blob.take(8 * count), "<u8")
    level = np.frombuffer(blob.take(4 * count), "<i4").astype(np.int32)
    if int(deltas.max()) >= size:
        raise bad("a frame sidecar", "an outlier lies outside its tensor")
    index = np.cumsum(deltas.astype(np.int64))
    ascending = not np.any(deltas[1:] == 0)
    in_range = 0 <= index[-1] < size and np.abs(level.astype(np.int64)).max() <= MAX_LEVEL
    if not ascending or not in_range:
        raise bad("a frame sidecar", "an outlier lies outside its tensor or its range")
    return Escapes(index, level)
