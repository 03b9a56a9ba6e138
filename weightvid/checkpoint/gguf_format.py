"""The header of a GGUF file: metadata that is kept as bytes, and where the tensors lie.

Specification: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3; all
integers little-endian; dimensions are listed with the fastest first).
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from weightvid.errors import CheckpointError

MAGIC: Final = b"GGUF"
VERSION: Final = 3
DEFAULT_ALIGNMENT: Final = 32
#: value type -> bytes; 8 is a string and 9 an array.
_FIXED: Final = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING: Final = 8
_ARRAY: Final = 9
_UINT32: Final = 4
_UINTS: Final = {0, 2, 4, 10}
_MAX_NESTING: Final = 4
_MAX_PAIRS: Final = 1 << 20
_MAX_TENSORS: Final = 1 << 20
_MAX_DIMS: Final = 8
_MAX_ALIGNMENT: Final = 1 << 16


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Name, shape (slowest dimension first), ggml type and offset in the data of one tensor."""

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int


@dataclass(frozen=True, slots=True)
class Value:
    """One pair of the metadata: its type, and where its value lies in the bytes."""

    type: int
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Metadata:
    """The key-value part of a file.

    Attributes
    ----------
    raw : bytes
        As it stands in the file.
    values : mapping of str to Value
    """

    raw: bytes
    values: dict[str, Value]

    def integer(self, key: str, default: int) -> int:
        """Value of an unsigned integer; ``default`` if there is none of that name."""
        value = self.values.get(key)
        if value is None or value.type not in _UINTS:
            return default
        return int.from_bytes(self.raw[value.begin : value.end], "little")

    def with_integer(self, key: str, number: int) -> Metadata:
        """The same with a 32-bit unsigned integer changed or added."""
        value = self.values.get(key)
        if value is not None and value.type in _UINTS:
            width = value.end - value.begin
            data = number.to_bytes(width, "little")
            return parse_metadata(self.raw[: value.begin] + data + self.raw[value.end :])
        if value is not None:
            return self
        name = key.encode()
        pair = struct.pack("<Q", len(name)) + name + struct.pack("<II", _UINT32, number)
        return parse_metadata(self.raw + pair)


class Cursor:
    """Reads little-endian fields; ``more(end)`` makes bytes up to there available or fails."""

    def __init__(self, more: Callable[[int], bytes], at: int = 0) -> None:
        self._more = more
        self._data = b""
        self.at = at

    def take(self, size: int) -> bytes:
        """Next bytes."""
        end = self.at + size
        if end > len(self._data):
            self._data = self._more(end)
            if end > len(self._data):
                raise CheckpointError("the GGUF header is cut short")
        found = self._data[self.at : end]
        self.at = end
        return found

    def skip(self, size: int) -> None:
        """Leave bytes out, but see that they are there."""
        if size:
            self.at += size - 1
            self.take(1)

    def integer(self, size: int) -> int:
        """Next unsigned integer."""
        return int.from_bytes(self.take(size), "little")

    def text(self) -> str:
        """Next string."""
        try:
            return self.take(self.integer(8)).decode()
        except UnicodeDecodeError:
            raise CheckpointError("a name in the GGUF header is not UTF-8") from None


def read_pairs(cursor: Cursor, count: int) -> dict[str, tuple[int, int, int]]:
    """Names of pairs -> type, begin and end of the value."""
    found: dict[str, tuple[int, int, int]] = {}
    for _ in range(count):
        key, kind = cursor.text(), cursor.integer(4)
        if key in found:
            raise CheckpointError(f"the GGUF metadata has {key[:80]!r} twice")
        begin = cursor.at
        _skip_value(cursor, kind, _MAX_NESTING)
        found[key] = (kind, begin, cursor.at)
    return found


def _skip_value(cursor: Cursor, kind: int, nesting: int) -> None:
    if kind in _FIXED:
        cursor.skip(_FIXED[kind])
    elif kind == _STRING:
        cursor.skip(cursor.integer(8))
    elif kind == _ARRAY and nesting:
        inner, count = cursor.integer(4), cursor.integer(8)
        if inner in _FIXED:
            cursor.skip(_FIXED[inner] * count)
            return
        for _ in range(count):
            _skip_value(cursor, inner, nesting - 1)
    else:
        raise CheckpointError(f"the GGUF metadata has a value of unknown type {kind}")


def parse_metadata(raw: bytes) -> Metadata:
    """Metadata from the bytes of its pairs.

    Raises
    ------
    CheckpointError
        They are no pairs.
    """
    cursor = Cursor(lambda _: raw)
    values: dict[str, Value] = {}
    while cursor.at < len(raw):
        for key, value in read_pairs(cursor, 1).items():
            if key in values:
                raise CheckpointError(f"the GGUF metadata has {key[:80]!r} twice")
            values[key] = Value(*value)
    return Metadata(raw, values)


@dataclass(frozen=True, slots=True)
class FileHeader:
    """Everything before the tensors' bytes, and where these begin."""

    metadata: Metadata
    tensors: tuple[TensorInfo, ...]
    data_offset: int


def parse_header(more: Callable[[int], bytes]) -> FileHeader:
    """Header of a file.

    Parameters
    ----------
    more : callable
        Gives all bytes of the file up to an offset, or to its end.

    Raises
    ------
    CheckpointError
        No GGUF of a known version, or a damaged one.
    """
    cursor = Cursor(more)
    if cursor.take(4) != MAGIC:
        raise CheckpointError("it is no GGUF file")
    version = cursor.integer(4)
    if version not in (2, 3):
        big = int.from_bytes(version.to_bytes(4, "big"), "little") in (2, 3)
        what = "a big-endian file" if big else f"version {version}"
        raise CheckpointError(f"GGUF versions 2 and 3 are read, not {what}")
    tensor_count, pair_count = cursor.integer(8), cursor.integer(8)
    if tensor_count > _MAX_TENSORS or pair_count > _MAX_PAIRS:
        raise CheckpointError("the GGUF header counts more than any file holds")
    begin = cursor.at
    values = read_pairs(cursor, pair_count)
    raw = more(cursor.at)[begin : cursor.at]
    placed = {key: Value(kind, b - begin, e - begin) for key, (kind, b, e) in values.items()}
    metadata = Metadata(raw, placed)
    tensors = tuple(_read_info(cursor) for _ in range(tensor_count))
    alignment = metadata.integer("general.alignment", DEFAULT_ALIGNMENT)
    if not 0 < alignment <= _MAX_ALIGNMENT:
        raise CheckpointError(f"the GGUF header asks for an alignment of {alignment}")
    return FileHeader(metadata, tensors, -(-cursor.at // alignment) * alignment)


def _read_info(cursor: Cursor) -> TensorInfo:
    name, dims = cursor.text(), cursor.integer(4)
    if dims > _MAX_DIMS:
        raise CheckpointError(f"GGUF tensor {name[:80]!r} has {dims} dimensions")
    shape = tuple(cursor.integer(8) for _ in range(dims))[::-1]
    return TensorInfo(name, shape, cursor.integer(4), cursor.integer(8))


def tensor_info(info: TensorInfo) -> bytes:
    """Bytes of one entry of the tensor list."""
    name = info.name.encode()
    return b"".join(
        (
            struct.pack("<Q", len(name)),
            name,
            struct.pack("<I", len(info.shape)),
            *(struct.pack("<Q", n) for n in info.shape[::-1]),
            struct.pack("<IQ", info.type, info.offset),
        )
    )
