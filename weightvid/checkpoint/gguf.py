"""GGUF files: plain tensors as they are, quantized ones dequantized to float32.

Q8_0 needs no library; other quantizations need the ``gguf`` package (extra ``gguf``).
"""

from __future__ import annotations

import warnings
from io import BufferedReader
from pathlib import Path
from typing import Any, Final

import numpy as np

from weightvid.checkpoint.base import Array, CheckpointReader, Contents, check_contents, shorten
from weightvid.checkpoint.gguf_format import FileHeader, TensorInfo, parse_header
from weightvid.checkpoint.gguf_writer import BLOCK, GGML_TYPES, Q8_0, open_writer
from weightvid.dtypes import stored_dtype
from weightvid.errors import CheckpointError
from weightvid.spec import SIDE_FILE_BYTES, SideFile, TensorSpec

__all__ = ["METADATA_PATH", "METADATA_ROLE", "open_reader", "open_writer"]

METADATA_ROLE: Final = "gguf-metadata"
METADATA_PATH: Final = "gguf-metadata.bin"
#: a header may hold a vocabulary, but not this much.
_HEADER_LIMIT_BYTES: Final = 1 << 28
_FIRST_READ_BYTES: Final = 1 << 20
#: elements that are dequantized at once.
_ROWS_AT_ONCE: Final = 1 << 24
_NAMES: Final = {number: name for name, number in GGML_TYPES.items()}


def open_reader(path: Path) -> CheckpointReader:
    """Open a GGUF file.

    Raises
    ------
    CheckpointError
        Damaged, of an unknown version, one part of several, or quantized in a way that needs the
        ``gguf`` package, which is missing.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from None
    try:
        return _GgufReader(path, file)
    except (OSError, CheckpointError) as error:
        file.close()
        raise CheckpointError(f"cannot read {path}: {error}") from None
    except BaseException:
        file.close()
        raise


class _GgufReader(CheckpointReader):
    def __init__(self, path: Path, file: BufferedReader) -> None:
        self._path = path
        self._file = file
        header = parse_header(_Head(file).up_to)
        parts = header.metadata.integer("split.count", 1)
        if parts > 1:
            raise CheckpointError(
                f"it is one part of {parts}; join them first: llama-gguf-split --merge"
            )
        size = file.seek(0, 2)
        self._info = {info.name: info for info in header.tensors}
        self._begin = header.data_offset
        specs = []
        for info in header.tensors:
            specs.append(TensorSpec(info.name, _dtype(info), info.shape))
            if self._begin + info.offset + _stored_bytes(info) > size:
                raise CheckpointError(f"it is cut short: tensor {info.name!r} lies beyond its end")
        files, skipped = _metadata_file(header)
        contents = Contents(tuple(specs), skipped=skipped, files=files)
        check_contents(contents)
        super().__init__(contents)

    def _read(self, spec: TensorSpec) -> Array:
        return self._elements(spec, 0, spec.size).reshape(spec.shape)

    def _read_range(self, spec: TensorSpec, first: int, count: int) -> Array:
        return self._elements(spec, first, count)

    def _elements(self, spec: TensorSpec, first: int, count: int) -> Array:
        info = self._info[spec.name]
        if info.type in _NAMES:
            dtype = stored_dtype(spec.dtype)
            data = self._bytes(info, first * dtype.itemsize, count * dtype.itemsize)
            return data.view(dtype)
        block, block_bytes = _block(info)
        begin, end = first // block, -(-(first + count) // block)
        data = self._bytes(info, begin * block_bytes, (end - begin) * block_bytes)
        start = first - begin * block
        return _dequantize(data, info).reshape(-1)[start : start + count]

    def _bytes(
        self, info: TensorInfo, offset: int, size: int
    ) -> np.ndarray[Any, np.dtype[np.uint8]]:
        data = np.empty(size, np.uint8)
        try:
            self._file.seek(self._begin + info.offset + offset)
            got = self._file.readinto(data.data)
        except OSError as error:
            raise CheckpointError(f"cannot read {self._path}: {error}") from None
        if got != data.size:
            raise CheckpointError(f"{self._path} was cut short while it was open")
        return data

    def close(self) -> None:
        super().close()
        self._file.close()


class _Head:
    """The beginning of a file, read in growing pieces."""

    def __init__(self, file: BufferedReader) -> None:
        self._file = file
        self._data = b""

    def up_to(self, end: int) -> bytes:
        if end > _HEADER_LIMIT_BYTES:
            raise CheckpointError("its header is larger than any")
        if end > len(self._data):
            wanted = min(max(end, 2 * len(self._data), _FIRST_READ_BYTES), _HEADER_LIMIT_BYTES)
            self._data += self._file.read(wanted - len(self._data))
        return self._data


def _metadata_file(header: FileHeader) -> tuple[tuple[SideFile, ...], tuple[str, ...]]:
    raw = header.metadata.raw
    if len(raw) > SIDE_FILE_BYTES:
        return (), (f"metadata ({len(raw)} bytes, more than {SIDE_FILE_BYTES >> 20} MiB)",)
    return (SideFile(METADATA_PATH, raw, METADATA_ROLE),), ()


def _dtype(info: TensorInfo) -> str:
    return _NAMES.get(info.type, "F32")


def _stored_bytes(info: TensorInfo) -> int:
    size = TensorSpec(info.name, "U8", info.shape).size
    if info.type in _NAMES:
        return size * stored_dtype(_NAMES[info.type]).itemsize
    block, block_bytes = _block(info)
    if not info.shape or info.shape[-1] % block:
        raise CheckpointError(
            f"quantized tensor {info.name!r} has rows that are no multiple of {block}"
        )
    return size // block * block_bytes


def _block(info: TensorInfo) -> tuple[int, int]:
    """Elements and bytes of one block of a quantized type."""
    if info.type == Q8_0:
        return BLOCK, BLOCK + 2
    library = _library(info)
    try:
        block, block_bytes = library.GGML_QUANT_SIZES[library.GGMLQuantizationType(info.type)]
    except (ValueError, KeyError):
        raise CheckpointError(f"tensor {info.name!r} has the unknown type {info.type}") from None
    return int(block), int(block_bytes)


def _library(info: TensorInfo) -> Any:
    try:
        import gguf
    except ImportError as error:
        raise CheckpointError(
            f"tensor {info.name!r} is quantized, and reading it needs the gguf package ({error}): "
            "pip install 'weightvid[gguf]'"
        ) from None
    return gguf


def _dequantize(data: np.ndarray[Any, np.dtype[np.uint8]], info: TensorInfo) -> Array:
    block, block_bytes = _block(info)
    blocks = data.reshape(-1, block_bytes)
    out = np.empty((len(blocks), block), np.float32)
    step = max(1, _ROWS_AT_ONCE // block)
    for begin in range(0, len(blocks), step):
        piece = blocks[begin : begin + step]
        if info.type == Q8_0:
            scale = piece[:, :2].copy().view("<f2").astype(np.float32)
            out[begin : begin + step] = piece[:, 2:].view(np.int8) * scale
            continue
        library = _library(info)
        kind = library.GGMLQuantizationType(info.type)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                made = library.quants.dequantize(piece.reshape(-1), kind)
        except (NotImplementedError, ValueError) as error:
            raise CheckpointError(
                f"the gguf package cannot dequantize {kind.name} of tensor {info.name!r}: "
                f"{shorten([error])}"
            ) from None
        out[begin : begin + step] = made.reshape(-1, block)
    return out
