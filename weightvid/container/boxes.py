"""ISO base media file format boxes: building blocks, and the limits a reader keeps.

Source: ISO/IEC 14496-12 clause 4.2. All integers of boxes are big-endian.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from dataclasses import dataclass
from typing import Any, Final

from weightvid.container.dictionary import DICTIONARY
from weightvid.errors import FormatError

#: extended types of our own top-level boxes.
HEADER_UUID: Final = b"weightvid-header"
SIDECAR_UUID: Final = b"weightvid-frame\x00"
EXACT_UUID: Final = b"weightvid-exact\x00"
INDEX_UUID: Final = b"weightvid-index\x00"
FILE_UUID: Final = b"weightvid-files\x00"
OUR_UUIDS: Final = frozenset({HEADER_UUID, SIDECAR_UUID, EXACT_UUID, INDEX_UUID})

BOX_HEADER_BYTES: Final = 8
UUID_HEADER_BYTES: Final = 24
DIGEST_BYTES: Final = 32


@dataclass(frozen=True, slots=True)
class Limits:
    """Sizes above which a file is refused before anything is allocated for it.

    Attributes
    ----------
    box_bytes : int
        Largest single box that is read whole.
    json_bytes : int
        Largest inflated JSON text.
    tensors : int
        Most tensors (aliases included).
    tensor_elements : int
        Most elements of one tensor.
    name_bytes : int
        Longest tensor name, in UTF-8.
    frame_px : int
        Longest side of a frame.
    """

    box_bytes: int = 64 << 20
    json_bytes: int = 64 << 20
    tensors: int = 1 << 20
    tensor_elements: int = 1 << 38
    name_bytes: int = 4096
    frame_px: int = 4096


LIMITS: Final = Limits()


def box(kind: bytes, *parts: bytes) -> bytes:
    """A box with a 32-bit size.

    Examples
    --------
    >>> box(b"free", b"ab").hex()
    '0000000a667265656162'
    """
    size = BOX_HEADER_BYTES + sum(map(len, parts))
    return b"".join((size.to_bytes(4, "big"), kind, *parts))


def full_box(kind: bytes, version: int, flags: int, *parts: bytes) -> bytes:
    """A box that starts with a version and flags."""
    return box(kind, bytes((version,)), flags.to_bytes(3, "big"), *parts)


def uuid_box(kind: bytes, *parts: bytes) -> bytes:
    """A box with an extended type of 16 bytes."""
    return box(b"uuid", kind, *parts)


#: less memory means a new code after fewer symbols, which some texts are smaller for.
_MEMORY_LEVELS: Final = (9, 5, 4, 3)
#: of longer texts, all of them take seconds for less than 0.001 % of the file.
_LONG_TEXT: Final = 1 << 14


def deflate(*parts: bytes) -> bytes:
    """Deflate in the zlib format (RFC 1950) with the preset dictionary, best effort: one stream.

    Each part gets a code of its own: text, hashes and numbers share no statistics, and one code for
    all takes a tenth more.
    """
    levels = _MEMORY_LEVELS if sum(map(len, parts)) <= _LONG_TEXT else _MEMORY_LEVELS[:1]
    return min((_deflated(parts, memory) for memory in levels), key=len)


def _deflated(parts: tuple[bytes, ...], memory: int) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, 15, memory, zdict=DICTIONARY)
    packed = bytearray()
    for part in parts[:-1]:
        packed += packer.compress(part) + packer.flush(zlib.Z_BLOCK)
    packed += packer.compress(parts[-1]) + packer.flush()
    return bytes(packed)


def inflate(data: bytes, limit: int, what: str) -> bytes:
    """Undo :func:`deflate`, never giving more than ``limit`` bytes.

    Streams without the dictionary, as those of format 1, are inflated too.

    Raises
    ------
    FormatError
        ``deflate``: not one whole zlib stream; ``limit``: larger than allowed.
    """
    unpacker = zlib.decompressobj(zdict=DICTIONARY)
    try:
        text = unpacker.decompress(data, limit + 1)
    except zlib.error as error:
        raise FormatError(f"{what} is damaged: {error}", code="deflate") from None
    if len(text) > limit:
        raise FormatError(f"{what} inflates to more than {limit} bytes", code="limit")
    if not unpacker.eof or unpacker.unused_data:
        raise FormatError(f"{what} is not one whole zlib stream", code="deflate")
    return text


def seal(body: bytes) -> bytes:
    """Payload of a box of ours: SHA-256 of the body, then the body."""
    return hashlib.sha256(body).digest() + body


def unseal(payload: bytes, what: str) -> bytes:
    """Body of a sealed payload.

    Raises
    ------
    FormatError
        ``digest``: the body does not match its SHA-256.
    """
    body = payload[DIGEST_BYTES:]
    if hashlib.sha256(body).digest() != payload[:DIGEST_BYTES]:
        raise FormatError(f"{what} is damaged: its SHA-256 does not match", code="digest")
    return body


def to_json(record: Any) -> bytes:
    r"""Compact JSON (RFC 8259), UTF-8, keys in the order given, no NaN or Infinity.

    Lone surrogates have no UTF-8; a text that holds one is written with escapes throughout.

    Examples
    --------
    >>> to_json({"\u00e9": 1}), to_json({"\ud800": 1})
    (b'{"\xc3\xa9":1}', b'{"\\ud800":1}')
    """
    compact = (",", ":")
    text = json.dumps(record, separators=compact, ensure_ascii=False, allow_nan=False)
    try:
        return text.encode()
    except UnicodeEncodeError:
        return json.dumps(record, separators=compact, allow_nan=False).encode()


def from_json(text: bytes, what: str) -> Any:
    """Parse JSON; any defect, a name given twice included, is a FormatError with code ``json``."""

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is not JSON")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a name is given twice in one object")
        return found

    try:
        return json.loads(text.decode(), parse_constant=refuse, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{what} is not valid JSON: {error}", code="json") from None
