"""safetensors files, read and written one tensor at a time.

The safetensors library judges whether a file is valid; the bytes are then read from their offsets,
because the library hands bfloat16 and float8 to frameworks that have such types only.
Format: https://github.com/huggingface/safetensors (8 bytes of little-endian header length, a JSON
header padded with spaces, the tensors' bytes without holes).
"""

from __future__ import annotations

import json
import os
from io import BufferedReader, RawIOBase
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from weightvid.checkpoint.base import (
    Array,
    CheckpointReader,
    Contents,
    check_contents,
    raw_bytes,
    tied_note,
)
from weightvid.checkpoint.writer import CheckpointWriter, FileWriter
from weightvid.dtypes import STORED, SUB_BYTE, pack_bits, stored_dtype, unpack_bits
from weightvid.errors import CheckpointError, RemoteError, WeightvidError
from weightvid.spec import TensorSpec

#: dtype names the format has (library version 0.8).
HELD: Final = frozenset(STORED) - {"C128", "C32"}
_HEADER_LIMIT_BYTES: Final = 100_000_000
_METADATA: Final = "__metadata__"


def open_reader(path: Path, source: RawIOBase | None = None) -> CheckpointReader:
    """Open a safetensors file.

    Parameters
    ----------
    path : Path
    source : RawIOBase or None
        Where the weights are read from, if not from the file itself, which then holds a whole
        header and is as long. Closed with the reader.

    Raises
    ------
    CheckpointError
        The library refuses it, or it holds a dtype unknown to weightvid.
    """
    file: RawIOBase | BufferedReader
    try:
        with safe_open(os.fspath(path), framework="numpy"):
            pass
        file = source or path.open("rb")
    except (SafetensorError, OSError, ValueError) as error:
        raise _invalid(path, error) from None
    try:
        return _SafetensorsReader(path, file)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        file.close()
        if isinstance(error, WeightvidError):
            raise
        raise _invalid(path, error) from None
    except BaseException:
        file.close()
        raise


def open_writer(path: Path, contents: Contents, *, force: bool = False) -> CheckpointWriter:
    """Start a safetensors file (see :func:`weightvid.checkpoint.create_checkpoint`)."""
    return _SafetensorsWriter(path, contents, force=force)


class _SafetensorsReader(CheckpointReader):
    shareable = True

    def __init__(self, path: Path, file: RawIOBase | BufferedReader) -> None:
        self._path = path
        self._file = file
        length = int.from_bytes(file.read(8) or b"", "little")
        entries = json.loads(file.read(length) or b"", object_pairs_hook=_unique)
        metadata = entries.pop(_METADATA, None) or {}
        rows = sorted(entries.items(), key=lambda item: tuple(item[1]["data_offsets"]))
        self._offsets = {name: 8 + length + row["data_offsets"][0] for name, row in rows}
        specs = [TensorSpec(name, row["dtype"], tuple(row["shape"])) for name, row in rows]
        for spec, (_, row) in zip(specs, rows, strict=True):
            begin, end = row["data_offsets"]
            if file_bytes(spec) != end - begin:
                raise CheckpointError(f"tensor {spec.name!r} has a wrong number of bytes")
        contents = Contents(tuple(specs), metadata=metadata)
        check_contents(contents)
        super().__init__(contents)

    def _read(self, spec: TensorSpec) -> Array:
        data = self._bytes(self._offsets[spec.name], file_bytes(spec))
        if spec.dtype in SUB_BYTE:
            data = unpack_bits(data, spec.dtype, spec.size)
        return data.view(stored_dtype(spec.dtype)).reshape(spec.shape)

    def _read_range(self, spec: TensorSpec, first: int, count: int) -> Array:
        if spec.dtype in SUB_BYTE:
            return super()._read_range(spec, first, count)
        dtype = stored_dtype(spec.dtype)
        begin = self._offsets[spec.name] + first * dtype.itemsize
        return self._bytes(begin, count * dtype.itemsize).view(dtype)

    def _bytes(self, offset: int, size: int) -> npt.NDArray[np.uint8]:
        data = np.empty(size, np.uint8)
        try:
            self._file.seek(offset)
            got = self._file.readinto(data.data)
        except OSError as error:
            raise _invalid(self._path, error) from None
        if got != data.size:
            raise CheckpointError(f"{self._path} was cut short while it was open")
        return data

    def close(self) -> None:
        super().close()
        self._file.close()


class _SafetensorsWriter(FileWriter):
    """Header first, then each tensor at its offset, in whatever order they come."""

    def __init__(self, path: Path, contents: Contents, *, force: bool) -> None:
        check_contents(contents)
        header, self._offsets = _layout(contents)
        super().__init__(path, contents, force=force)
        self.notes = tied_note(contents)
        try:
            self._output.file.write(header)
        except BaseException:
            self.abort()
            raise

    def _write(self, spec: TensorSpec, array: Array) -> None:
        data = pack_bits(array, spec.dtype) if spec.dtype in SUB_BYTE else raw_bytes(array)
        for name in (spec.name, *self._aliases_of.get(spec.name, ())):
            self._output.file.seek(self._offsets[name])
            self._output.file.write(data.data)

    def _write_part(self, spec: TensorSpec, first: int, part: Array) -> None:
        if spec.dtype in SUB_BYTE:
            super()._write_part(spec, first, part)
            return
        data = raw_bytes(part)
        for name in (spec.name, *self._aliases_of.get(spec.name, ())):
            self._output.file.seek(self._offsets[name] + first * part.itemsize)
            self._output.file.write(data.data)

    def _finish(self) -> None:
        return


def file_bytes(spec: TensorSpec) -> int:
    """Bytes of a tensor in the file (sub-byte types are packed).

    Examples
    --------
    >>> file_bytes(TensorSpec("w", "BF16", (3, 5))), file_bytes(TensorSpec("w", "F4", (3, 6)))
    (30, 9)
    """
    bits = SUB_BYTE.get(spec.dtype, 8 * stored_dtype(spec.dtype).itemsize)
    return (spec.size * bits + 7) // 8


def _layout(contents: Contents) -> tuple[bytes, dict[str, int]]:
    """Header, and name -> offset in the file, with every tensor aligned to its element size."""
    by_name = {spec.name: spec for spec in contents.tensors}
    rows = [(spec.name, spec) for spec in contents.tensors]
    rows += [(alias, by_name[name]) for alias, name in contents.aliases.items()]
    for name, spec in rows:
        _check_held(name, spec)
    # Large elements first: then each offset is a multiple of its own element size.
    rows.sort(key=lambda row: (row[1].dtype in SUB_BYTE, -stored_dtype(row[1].dtype).itemsize))
    entries: dict[str, Any] = {}
    if contents.metadata:
        entries[_METADATA] = dict(contents.metadata)
    offsets: dict[str, int] = {}
    end = 0
    for name, spec in rows:
        begin, end = end, end + file_bytes(spec)
        offsets[name] = begin
        entries[name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [begin, end],
        }
    try:
        text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        raise CheckpointError(
            f"a name or metadata text is not valid Unicode: {error.object[:80]!r}"
        ) from None
    text += b" " * (-len(text) % 8)
    if len(text) > _HEADER_LIMIT_BYTES:
        raise CheckpointError(
            f"a safetensors header of {len(text)} bytes would be above the format's limit "
            f"of {_HEADER_LIMIT_BYTES}"
        )
    start = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {n: start + at for n, at in offsets.items()}


def _check_held(name: str, spec: TensorSpec) -> None:
    if name == _METADATA:
        raise CheckpointError(f"a safetensors file cannot hold a tensor named {_METADATA!r}")
    if spec.dtype not in HELD:
        raise CheckpointError(
            f"a safetensors file cannot hold tensor {name!r} of dtype {spec.dtype}; "
            "write .npz or .pt instead"
        )
    if spec.dtype in SUB_BYTE and spec.size * SUB_BYTE[spec.dtype] % 8:
        raise CheckpointError(f"{spec.dtype} tensor {name!r} does not fill whole bytes")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise CheckpointError("the safetensors header has the same name twice")
    return made


def _invalid(path: Path, error: Exception) -> WeightvidError:
    if isinstance(error, RemoteError):
        return error
    reason = str(error).removeprefix("Error while deserializing header: ").splitlines()
    said = reason[0] if reason else type(error).__name__
    return CheckpointError(
        f"{path} is no valid safetensors file (damaged, or cut short while downloading): {said}"
    )
