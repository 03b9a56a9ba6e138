"""Boxes of exact tensors: byte planes, each coded by the best of raw, deflate and LZMA.

Tensors that are not worth a video lie here bit for bit: 1-D, tiny, integer, bool, NaN or Inf. So do
**plain** tensors: quantized ones whose levels take fewer bytes this way than as video.

The elements of neighbouring tensors of one element size are split into byte planes (all first
bytes, then all second bytes, ...): the exponents of floats compress, their mantissas do not.
"""

from __future__ import annotations

import lzma
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from weightvid.container.boxes import LIMITS, deflate, from_json, inflate, seal, to_json, unseal
from weightvid.container.fields import bad, integer, items, mapping, parse_params
from weightvid.container.records import SQNR_PLACES, TENSOR_HASH_BYTES
from weightvid.dtypes import stored_dtype
from weightvid.errors import FormatError
from weightvid.quantize.params import Params
from weightvid.spec import TensorSpec

Bytes = npt.NDArray[np.uint8]

#: element types that the levels of a plain tensor may have.
LEVEL_DTYPES: Final[dict[str, np.dtype[np.integer]]] = {
    "I8": np.dtype("i1"),
    "I16": np.dtype("<i2"),
    "I32": np.dtype("<i4"),
}
#: elements of one tensor beyond this many bytes go to a further box.
PART_BYTES: Final = 16 << 20


@dataclass(frozen=True, slots=True)
class PlainLevels:
    """How a plain tensor's levels are stored and dequantized.

    Attributes
    ----------
    dtype : str
        Element type of the levels: I8, I16 or I32.
    params : Params
        The tensor's quantizer.
    sha256 : bytes
        Of the dequantized elements, as in :class:`~weightvid.container.records.TensorEnd`.
    sqnr_db : float or None
    video_bytes : int
        What the tensor would have taken as video, by the packer's estimate; for people.
    """

    dtype: str
    params: Params
    sha256: bytes
    sqnr_db: float | None
    video_bytes: int = 0


@dataclass(frozen=True, slots=True)
class ExactItem:
    """Consecutive elements of one tensor.

    Attributes
    ----------
    tensor : int
        Id.
    first, count : int
        Elements ``first .. first + count`` in row-major order.
    data : ndarray of uint8
        Their bytes, little-endian.
    plain : PlainLevels or None
        None: the elements are the tensor's own; else they are its levels.
    """

    tensor: int
    first: int
    count: int
    data: Bytes
    plain: PlainLevels | None = None


def dictionary_bytes(size: int) -> int:
    """Dictionary of LZMA2, no larger than the data needs (4 KiB..64 MiB, a power of two)."""
    return min(max(4096, 1 << max(size - 1, 1).bit_length()), 64 << 20)


def _filters(size: int) -> list[dict[str, int]]:
    return [
        {
            "id": lzma.FILTER_LZMA2,
            "preset": 9 | lzma.PRESET_EXTREME,
            "dict_size": dictionary_bytes(size),
            "lc": 0,
            "pb": 0,
        }
    ]


def deflate_raw(data: bytes, strategy: int = zlib.Z_DEFAULT_STRATEGY, level: int = 9) -> bytes:
    """Raw deflate (RFC 1951)."""
    packer = zlib.compressobj(level, zlib.DEFLATED, -15, 9, strategy)
    return packer.compress(data) + packer.flush()


def compress(data: bytes) -> tuple[str, bytes]:
    """Smallest of raw bytes, raw deflate and raw LZMA2, with its name."""
    choices = [
        ("raw", data),
        ("deflate", deflate_raw(data)),
        ("deflate", deflate_raw(data, zlib.Z_HUFFMAN_ONLY)),
        ("lzma2", lzma.compress(data, lzma.FORMAT_RAW, filters=_filters(len(data)))),
    ]
    return min(choices, key=lambda choice: len(choice[1]))


def decompress(codec: str, data: bytes, size: int) -> bytes:
    """Undo :func:`compress`; ``size`` is the exact size that must come out.

    Raises
    ------
    FormatError
        ``stream``: the data do not decode to exactly that many bytes.
    """
    try:
        if codec == "raw":
            out, done = data, True
        elif codec == "deflate":
            inflater = zlib.decompressobj(-15)
            out = inflater.decompress(data, size + 1)
            done = inflater.eof and not inflater.unused_data
        elif codec == "lzma2":
            unpacker = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=_filters(size))
            out = unpacker.decompress(data, size + 1)
            done = unpacker.eof and not unpacker.unused_data
        else:
            raise FormatError(f"unknown compression {codec[:20]!r}", code="stream")
    except (zlib.error, lzma.LZMAError, EOFError) as error:
        raise FormatError(f"exact tensors are damaged: {error}", code="stream") from None
    if not done or len(out) != size:
        raise FormatError("exact tensors decode to a wrong size", code="stream")
    return out


#: specs of tensors, by id.
Tensors = Sequence[TensorSpec] | Mapping[int, TensorSpec]


def _itemsize(item: ExactItem, tensors: Tensors) -> int:
    if item.plain is not None:
        return LEVEL_DTYPES[item.plain.dtype].itemsize
    return stored_dtype(tensors[item.tensor].dtype).itemsize


def _groups(sizes: Sequence[int]) -> list[tuple[int, int, int]]:
    """Runs of equal element size: (first item, end, element size)."""
    runs: list[tuple[int, int, int]] = []
    for place, size in enumerate(sizes):
        if runs and runs[-1][2] == size:
            runs[-1] = (runs[-1][0], place + 1, size)
        else:
            runs.append((place, place + 1, size))
    return runs


def _planes(itemsize: int) -> int:
    return itemsize if itemsize in (2, 4, 8, 16) else 1


def exact_payload(boxed: Sequence[ExactItem], tensors: Tensors) -> bytes:
    """Payload of a box that holds these items, in this order."""
    streams: list[tuple[str, bytes]] = []
    for begin, end, itemsize in _groups([_itemsize(item, tensors) for item in boxed]):
        data = np.concatenate([item.data for item in boxed[begin:end]])
        planes = _planes(itemsize)
        streams += [compress(plane.tobytes()) for plane in data.reshape(-1, planes).T]
    record = {
        "items": [_item_record(item, tensors) for item in boxed],
        "streams": [[codec, len(data)] for codec, data in streams],
    }
    text = deflate(to_json(record))
    return seal(b"".join((len(text).to_bytes(4, "big"), text, *(data for _, data in streams))))


def _item_record(item: ExactItem, tensors: Tensors) -> dict[str, Any]:
    record: dict[str, Any] = {"id": item.tensor}
    if item.first or item.count != tensors[item.tensor].size:
        record |= {"first": item.first, "count": item.count}
    if item.plain is not None:
        record |= {"levels": item.plain.dtype, **item.plain.params.to_dict()}
        record["sha256"] = item.plain.sha256.hex()
        if item.plain.sqnr_db is not None:
            record["sqnr_db"] = round(item.plain.sqnr_db, SQNR_PLACES)
        if item.plain.video_bytes:
            record["video_bytes"] = item.plain.video_bytes
    return record


def parse_exact(payload: bytes, tensors: Sequence[TensorSpec]) -> list[ExactItem]:
    """Items of a box, decompressed.

    Raises
    ------
    FormatError
        ``digest``, ``json``, ``schema``, ``limit``, ``stream``, ``quantizer``: damage.
    """
    what = "a box of exact tensors"
    body = unseal(payload, what)
    length = int.from_bytes(body[:4], "big")
    if length > len(body) - 4:
        raise bad(what, "its text is longer than itself")
    text = inflate(body[4 : 4 + length], LIMITS.json_bytes, what)
    record = mapping(from_json(text, what), what)
    heads = [_parse_item(e, tensors) for e in items(record.get("items"), LIMITS.tensors, what)]
    sizes = [_itemsize(head, tensors) for head in heads]
    total = sum(head.count * size for head, size in zip(heads, sizes, strict=True))
    if total > LIMITS.box_bytes:
        raise FormatError(f"{what} holds more than {LIMITS.box_bytes} bytes", code="limit")
    streams = items(record.get("streams"), 1 << 20, what)
    return _unpack(heads, sizes, _StreamReader(body, 4 + length, streams))


class _StreamReader:
    """Hands out the streams of a box in order."""

    def __init__(self, body: bytes, at: int, streams: list[Any]) -> None:
        self._body, self._at, self._streams = body, at, iter(streams)

    def take(self, size: int) -> bytes:
        what = "a box of exact tensors"
        entry = next(self._streams, None)
        if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[0], str):
            raise bad(what, "a stream must be [codec, bytes]")
        length = integer(entry[1], 0, len(self._body) - self._at, what)
        begin, self._at = self._at, self._at + length
        return decompress(entry[0], self._body[begin : self._at], size)

    def finish(self) -> None:
        if self._at != len(self._body) or next(self._streams, None) is not None:
            raise bad("a box of exact tensors", "its size does not match its streams")


def _unpack(heads: list[ExactItem], sizes: list[int], streams: _StreamReader) -> list[ExactItem]:
    found = []
    for begin, end, itemsize in _groups(sizes):
        elements = sum(head.count for head in heads[begin:end])
        planes = _planes(itemsize)
        data = np.empty((elements * itemsize // planes, planes), np.uint8)
        for plane in range(planes):
            data[:, plane] = np.frombuffer(streams.take(len(data)), np.uint8)
        flat, at = data.reshape(-1), 0
        for head in heads[begin:end]:
            size = head.count * itemsize
            piece = flat[at : at + size]
            found.append(ExactItem(head.tensor, head.first, head.count, piece, head.plain))
            at += size
    streams.finish()
    return found


def _parse_item(entry: object, tensors: Sequence[TensorSpec]) -> ExactItem:
    what = "a box of exact tensors"
    record = mapping(entry, what)
    tensor = integer(record.get("id"), 0, len(tensors) - 1, what)
    size = tensors[tensor].size
    first = integer(record.get("first", 0), 0, size, what)
    count = integer(record.get("count", size), 0, size - first, what)
    plain = None
    if "levels" in record:
        levels, sha256, sqnr = record["levels"], record.get("sha256"), record.get("sqnr_db")
        if (
            not isinstance(levels, str)
            or levels not in LEVEL_DTYPES
            or (sqnr is not None and type(sqnr) not in (int, float))
        ):
            raise bad(what, "levels must be I8, I16 or I32, and sqnr_db a number")
        if not isinstance(sha256, str) or len(sha256) != 2 * TENSOR_HASH_BYTES:
            raise bad(what, "sha256 must be 32 hex digits")
        try:
            digest = bytes.fromhex(sha256)
        except ValueError:
            raise bad(what, "sha256 must be 32 hex digits") from None
        video = integer(record.get("video_bytes", 0), 0, 1 << 62, what)
        plain = PlainLevels(levels, parse_params(record, what), digest, sqnr, video)
    return ExactItem(tensor, first, count, np.empty(0, np.uint8), plain)
