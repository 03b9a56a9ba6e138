"""Writing GGUF: matrices as F16, Q8_0 or F32, vectors as F32, the source's metadata kept."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from weightvid.checkpoint.base import Array, Contents, check_contents, raw_bytes, tied_note
from weightvid.checkpoint.gguf_format import (
    DEFAULT_ALIGNMENT,
    MAGIC,
    VERSION,
    Metadata,
    TensorInfo,
    parse_metadata,
    tensor_info,
)
from weightvid.checkpoint.writer import CheckpointWriter, FileWriter
from weightvid.dtypes import PACKABLE, stored_dtype, to_float32
from weightvid.errors import CheckpointError
from weightvid.spec import TensorSpec

#: our dtype -> ggml type, of what both have.
GGML_TYPES: Final = {
    "F32": 0, "F16": 1, "I8": 24, "I16": 25, "I32": 26, "I64": 27, "F64": 28, "BF16": 30,
}  # fmt: skip
F32: Final = 0
F16: Final = 1
Q8_0: Final = 8
#: elements of a block of Q8_0: one float16 scale, then one byte each.
BLOCK: Final = 32
_MAX_DIMS: Final = 4
_MAX_NAME_BYTES: Final = 63
#: type of the matrices -> ``general.file_type``.
_FILE_TYPES: Final = {F32: 0, F16: 1, Q8_0: 7}
_VARIANTS: Final = {"": F16, "f32": F32, "q8_0": Q8_0}
_LARGEST_F16: Final = 65504.0


def open_writer(
    path: Path, contents: Contents, *, force: bool = False, variant: str = ""
) -> CheckpointWriter:
    """Start a GGUF file; ``variant`` says how matrices are stored (F16, ``f32``, ``q8_0``)."""
    return _GgufWriter(path, contents, force=force, matrices=_VARIANTS[variant])


class _GgufWriter(FileWriter):
    """Header first, then each tensor at its offset, in whatever order they come."""

    def __init__(self, path: Path, contents: Contents, *, force: bool, matrices: int) -> None:
        check_contents(contents)
        metadata, self.notes = _metadata(contents)
        metadata = metadata.with_integer("general.file_type", _FILE_TYPES[matrices])
        alignment = metadata.integer("general.alignment", DEFAULT_ALIGNMENT)
        header, self._places = _layout(contents, metadata, matrices, alignment)
        self._begun: Array = np.empty(0, np.float32)
        super().__init__(path, contents, force=force)
        try:
            self._output.file.write(header)
        except BaseException:
            self.abort()
            raise

    def _write(self, spec: TensorSpec, array: Array) -> None:
        self._write_part(spec, 0, array.reshape(-1))

    def _write_part(self, spec: TensorSpec, first: int, part: Array) -> None:
        if self._places[spec.name][0] == Q8_0:
            # What begins a block waits for the rest of it.
            joined = part if first == 0 else np.concatenate([self._begun, part])
            first -= joined.size - part.size
            whole = joined.size - joined.size % BLOCK
            part, self._begun = joined[:whole], joined[whole:].copy()
        for name in (spec.name, *self._aliases_of.get(spec.name, ())):
            kind, offset, end = self._places[name]
            data = raw_bytes(_encode(spec, part, kind))
            before = first * data.size // part.size if part.size else 0
            self._output.file.seek(offset + before)
            self._output.file.write(data.data)
            if first + part.size == spec.size:
                self._output.file.write(bytes(end - self._output.file.tell()))

    def _finish(self) -> None:
        return


def _metadata(contents: Contents) -> tuple[Metadata, tuple[str, ...]]:
    """The source's metadata, and notes."""
    tied = tied_note(contents)
    for file in contents.files:
        if file.role == "gguf-metadata":
            return parse_metadata(file.data), tied
    return parse_metadata(b""), (
        "the archive was not packed from GGUF: the file gets no architecture and no tokenizer, "
        "and llama.cpp will not load it",
        *tied,
    )


def _layout(
    contents: Contents, metadata: Metadata, matrices: int, alignment: int
) -> tuple[bytes, dict[str, tuple[int, int, int]]]:
    """Header, and name -> type, offset in the file and end of its padding."""
    by_name = {spec.name: spec for spec in contents.tensors}
    rows = [(spec.name, spec) for spec in contents.tensors]
    rows += [(alias, by_name[name]) for alias, name in contents.aliases.items()]
    infos: list[TensorInfo] = []
    ends: list[int] = []
    at = 0
    for name, spec in rows:
        info = TensorInfo(name, spec.shape or (1,), _type(name, spec, matrices), at)
        infos.append(info)
        at = -(-(at + _stored_bytes(info)) // alignment) * alignment
        ends.append(at)
    counts = len(infos).to_bytes(8, "little") + len(metadata.values).to_bytes(8, "little")
    head = MAGIC + VERSION.to_bytes(4, "little") + counts + metadata.raw
    head += b"".join(map(tensor_info, infos))
    head += bytes(-len(head) % alignment)
    begin = len(head)
    return head, {
        info.name: (info.type, begin + info.offset, begin + end)
        for info, end in zip(infos, ends, strict=True)
    }


def _type(name: str, spec: TensorSpec, matrices: int) -> int:
    try:
        long = len(name.encode()) > _MAX_NAME_BYTES
    except UnicodeEncodeError:
        raise CheckpointError(f"the tensor name {name!r} is not valid Unicode") from None
    if long or len(spec.shape) > _MAX_DIMS:
        raise CheckpointError(
            f"GGUF holds names of {_MAX_NAME_BYTES} bytes and {_MAX_DIMS} dimensions at most; "
            f"{name[:80]!r} {list(spec.shape)} is beyond that"
        )
    if spec.dtype not in PACKABLE:
        if spec.dtype not in GGML_TYPES:
            raise CheckpointError(f"GGUF has no element type {spec.dtype}, which {name!r} has")
        return GGML_TYPES[spec.dtype]
    if len(spec.shape) < 2:
        return F32
    if matrices == Q8_0 and (not spec.size or spec.shape[-1] % BLOCK):
        return F16
    return matrices


def _stored_bytes(info: TensorInfo) -> int:
    size = prod(info.shape)
    if info.type == Q8_0:
        return size // BLOCK * (BLOCK + 2)
    name = next(name for name, number in GGML_TYPES.items() if number == info.type)
    return size * stored_dtype(name).itemsize


def _encode(spec: TensorSpec, array: Array, kind: int) -> Array:
    if spec.dtype not in PACKABLE:
        return array
    with np.errstate(over="ignore", invalid="ignore"):
        values = to_float32(array, spec.dtype)
    if kind == F32:
        return values
    peak = float(np.max(np.abs(values), initial=0.0))
    if kind == Q8_0:
        if not peak <= 127 * _LARGEST_F16:
            raise CheckpointError(f"tensor {spec.name!r} does not fit Q8_0; use --kind gguf-f32")
        return quantize_q8_0(values)
    if not peak <= _LARGEST_F16 and bool(np.isfinite(values).all()):
        raise CheckpointError(f"tensor {spec.name!r} does not fit F16; use --kind gguf-f32")
    return values.astype("<f2")


def quantize_q8_0(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Blocks of 32 weights: a float16 scale (largest magnitude / 127) and signed bytes.

    Parameters
    ----------
    values : ndarray of float32
        A multiple of 32 elements, finite. Levels are rounded to nearest, halves away from zero,
        as ggml does.

    Returns
    -------
    ndarray of uint8, shape (blocks, 34)
    """
    blocks = values.reshape(-1, BLOCK)
    scale = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    with np.errstate(divide="ignore"):
        inverse = np.where(scale == 0, np.float32(0), np.float32(1) / scale)
    scaled = blocks * inverse
    levels = np.trunc(scaled + np.copysign(np.float32(0.5), scaled)).astype(np.int8)
    made: npt.NDArray[Any] = np.empty((len(blocks), BLOCK + 2), np.uint8)
    made[:, :2] = scale.astype("<f2").view(np.uint8)
    made[:, 2:] = levels.view(np.uint8)
    return made
