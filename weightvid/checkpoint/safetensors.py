"""safetensors files, read and written one tensor at a time.

The safetensors library judges whether a file is valid; the bytes are then read from their offsets,
because the library hands bfloat16 and float8 to frameworks that have such types only.
Format: https://github.com/huggingface/safetensors (8 bytes of little-endian header length, a JSON
header padded with spaces, the tensors' bytes without holes).
"""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import numpy as np
from safetensors import safe_open

from weightvid.checkpoint.base import CheckpointReader, Contents, FileWriter, first_line, tied_note
from weightvid.errors import CheckpointError
from weightvid.loader import DTYPES, Array, TensorSpec
from weightvid.spec import SUB_BYTE, pack_bits, stored_dtype, unpack_bits

#: dtype names the format has (library version 0.8).
HELD: Final = frozenset(DTYPES) - {"C128", "C32"}
_HEADER_LIMIT_BYTES: Final = 100_000_000
_METADATA: Final = "__metadata__"


class Reader(CheckpointReader):
    """A safetensors file, of which ranges are read."""

    shareable = True

    def __init__(self, path: Path) -> None:
        self._offsets: dict[str, int] = {}
        try:
            with safe_open(os.fspath(path), framework="numpy"):
                self._file = path.open("rb")
            super().__init__(self._look())
        except Exception as error:
            if hasattr(self, "_file"):
                self._file.close()
            if isinstance(error, CheckpointError):
                raise
            said = first_line(error).removeprefix("Error while deserializing header: ")
            raise CheckpointError(
                f"{path} is no valid safetensors file ({_wrong_size(path)}): {said}"
            ) from None

    def _look(self) -> Contents:
        length = int.from_bytes(self._file.read(8), "little")
        entries = json.loads(self._file.read(length), object_pairs_hook=_unique)
        metadata = entries.pop(_METADATA, None) or {}
        specs: list[TensorSpec] = []
        for name, row in sorted(entries.items(), key=lambda item: tuple(item[1]["data_offsets"])):
            specs.append(TensorSpec(name, row["dtype"], tuple(row["shape"])))
            self._offsets[name] = 8 + length + row["data_offsets"][0]
        return Contents(tuple(specs), metadata=metadata)

    def _read(self, spec: TensorSpec) -> Array:
        if spec.dtype not in SUB_BYTE:
            return self._read_range(spec, 0, spec.size).reshape(spec.shape)
        packed = self._elements(self._offsets[spec.name], np.dtype(np.uint8), file_bytes(spec))
        return unpack_bits(packed.view(np.uint8), spec.dtype, spec.size).reshape(spec.shape)

    def _read_range(self, spec: TensorSpec, first: int, count: int) -> Array:
        if spec.dtype in SUB_BYTE:
            return super()._read_range(spec, first, count)
        dtype = stored_dtype(spec.dtype)
        return self._elements(self._offsets[spec.name] + first * dtype.itemsize, dtype, count)

    def _elements(self, offset: int, dtype: np.dtype[np.generic], count: int) -> Array:
        self._file.seek(offset)
        data: Array = np.fromfile(self._file, dtype, count)
        if data.size != count:
            raise CheckpointError(f"{self._file.name} was cut short while it was open")
        return data

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()


class Writer(FileWriter):
    """A safetensors file: the header first, then each tensor at its offset, in any order."""

    def _plan(self) -> bytes:
        """Header; every tensor is aligned to its element size."""
        self.notes = tied_note(self.contents.aliases)
        rows = self.contents.rows()
        for name, spec in rows:
            _check_held(name, spec)
        # Large elements first: then each offset is a multiple of its own element size.
        rows.sort(key=lambda row: (row[1].dtype in SUB_BYTE, -stored_dtype(row[1].dtype).itemsize))
        metadata = dict(self.contents.metadata)
        entries: dict[str, Any] = {_METADATA: metadata} if metadata else {}
        places: dict[str, int] = {}
        end = 0
        for name, spec in rows:
            places[name], end = end, end + file_bytes(spec)
            place = [places[name], end]
            entries[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": place}
        try:
            text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
        except UnicodeEncodeError as error:
            said = f"a name or metadata text is not valid Unicode: {error.object[:80]!r}"
            raise CheckpointError(said) from None
        text += b" " * (-len(text) % 8)
        if len(text) > _HEADER_LIMIT_BYTES:
            said = f"a safetensors header has at most {_HEADER_LIMIT_BYTES} bytes, not {len(text)}"
            raise CheckpointError(said)
        self._offsets = {name: 8 + len(text) + at for name, at in places.items()}
        return len(text).to_bytes(8, "little") + text

    def _write(self, spec: TensorSpec, array: Array) -> None:
        data = pack_bits(array, spec.dtype) if spec.dtype in SUB_BYTE else array
        for name in self._names_of[spec.name]:
            self._write_at(self._offsets[name], data)

    def _write_part(self, spec: TensorSpec, first: int, part: Array) -> None:
        if spec.dtype in SUB_BYTE:
            super()._write_part(spec, first, part)
            return
        for name in self._names_of[spec.name]:
            self._write_at(self._offsets[name] + first * part.itemsize, part)


def file_bytes(spec: TensorSpec) -> int:
    """Bytes of a tensor in the file (sub-byte types are packed).

    Examples
    --------
    >>> file_bytes(TensorSpec("w", "BF16", (3, 5))), file_bytes(TensorSpec("w", "F4", (3, 6)))
    (30, 9)
    """
    bits = SUB_BYTE.get(spec.dtype, 8 * stored_dtype(spec.dtype).itemsize)
    return (spec.size * bits + 7) // 8


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


def _wrong_size(path: Path) -> str:
    """How a file's size differs from what its header says, if that can be told."""
    wrong = OSError, ValueError, TypeError, LookupError, RecursionError
    with suppress(*wrong), path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        size = path.stat().st_size
        if length <= min(size, _HEADER_LIMIT_BYTES):
            rows = json.loads(file.read(length))
            ends = [rows[name]["data_offsets"][1] for name in rows if name != _METADATA]
            wanted = 8 + length + max(ends, default=0)
            if size > wanted:
                return f"{size - wanted} bytes longer than its header says: a download too many"
            if size < wanted:
                return f"cut short: {wanted - size} of {wanted} bytes are missing"
    return "damaged, or cut short while downloading"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise CheckpointError("the safetensors header has the same name twice")
    return made
