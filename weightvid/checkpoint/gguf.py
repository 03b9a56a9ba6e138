"""GGUF files, through the ``gguf`` package: quantized tensors are dequantized to float32.

Written are matrices as F16, F32 or Q8_0 and vectors as F32, with the metadata of the source, which
travels as a side file: a GGUF file without tensors.
"""

import warnings
from pathlib import Path
from typing import Any, Final

import numpy as np

from weightvid.atomic import ScratchFolder
from weightvid.checkpoint import base
from weightvid.errors import CheckpointError
from weightvid.loader import PACKABLE, Array, TensorSpec, to_float32
from weightvid.spec import stored_dtype

METADATA_ROLE: Final = "gguf-metadata"
METADATA_PATH: Final = "metadata.gguf"
#: ggml types that are elements as they stand; their names are ours too.
_PLAIN: Final = frozenset({"F32", "F16", "BF16", "F64", "I8", "I16", "I32", "I64"})
#: fields of a header; each costs the library a few hundred bytes.
_MAX_FIELDS: Final = 1 << 22
_MAX_DIMS, _MAX_NAME_BYTES, _BLOCK = 4, 63, 32
#: type of the matrices -> ``general.file_type``, and the largest weight.
_MATRICES: Final = {"F32": (0, np.inf), "F16": (1, 65504.0), "Q8_0": (7, 127 * 65504.0)}


class Reader(base.CheckpointReader):
    """A GGUF file, memory-mapped; one part of several is refused."""

    def __init__(self, path: Path) -> None:
        source = _parse(path)
        parts = source.get_field("split.count")
        if parts is not None and parts.contents() > 1:
            raise CheckpointError(
                f"cannot read {path}: it is one part of {parts.contents()}; join them first: "
                "llama-gguf-split --merge"
            )
        self._tensors = {tensor.name: tensor for tensor in source.tensors}
        end = max((int(t.data_offset) + int(t.n_bytes) for t in source.tensors), default=None)
        if end is not None and path.stat().st_size >= end + source.alignment:
            raise CheckpointError(f"{path} is longer than its tensors, which end at byte {end}")
        specs = []
        for name, tensor in self._tensors.items():
            kind = tensor.tensor_type.name
            shape = tuple(int(n) for n in reversed(tensor.shape))
            specs.append(TensorSpec(name, kind if kind in _PLAIN else "F32", shape))
        files, skipped = base.as_side_file(METADATA_PATH, _head(source), METADATA_ROLE)
        super().__init__(base.Contents(tuple(specs), skipped=skipped, files=files))

    def _read(self, spec: TensorSpec) -> Array:
        tensor = self._tensors[spec.name]
        if tensor.tensor_type.name in _PLAIN:
            flat: Array = np.asarray(tensor.data).reshape(-1).view(stored_dtype(spec.dtype))
            return flat.reshape(spec.shape)
        failed = f"gguf cannot dequantize {tensor.tensor_type.name} of tensor {spec.name!r}"
        with base.explained(failed), warnings.catch_warnings(action="ignore"):
            made: Array = _library().quants.dequantize(tensor.data, tensor.tensor_type)
        return made.reshape(spec.shape)

    def close(self) -> None:
        """Let the file go."""
        self._tensors = {}
        super().close()


class Writer(base.FileWriter):
    """A GGUF file: the header first, then each tensor at its offset, in any order.

    ``variant`` is the type of the matrices: ``F16`` (by default), ``F32`` or ``Q8_0``.
    """

    def _plan(self) -> bytes:
        matrices = self._variant or "F16"
        self.notes = base.tied_note(self.contents.aliases)
        data = self._side_file(METADATA_ROLE)
        if data is None:
            self.notes += (
                "the source was no GGUF file: the output gets no architecture and no tokenizer, "
                "and llama.cpp will not load it",
            )
        if any(not spec.shape for spec in self.contents.tensors):
            self.notes += ("GGUF has no scalars: tensors of the shape [] have the shape [1] there",)
        self._types: dict[str, Any] = {}
        self._offsets: dict[str, int] = {}
        with ScratchFolder() as folder:
            path = Path(folder, METADATA_PATH)
            if data is not None:
                path.write_bytes(data)
            with base.explained("the GGUF metadata of the source cannot be written"):
                maker = _maker(None if data is None else _parse(path))
            maker.add_file_type(_MATRICES[matrices][0])
            end = 0
            for name, spec in self.contents.rows():
                self._types[name] = kind = _type(name, spec, matrices)
                block, block_bytes = _library().GGML_QUANT_SIZES[kind]
                size = spec.size // block * block_bytes
                self._offsets[name], end = end, maker.ggml_pad(end + size, maker.data_alignment)
                shape = spec.shape or (1,)
                maker.add_tensor_info(name, shape, np.dtype(np.float32), size, raw_dtype=kind)
            maker.write_header_to_file(path.with_name("header"))
            maker.write_kv_data_to_file()
            maker.write_ti_data_to_file()
            maker.close()
            header = path.with_name("header").read_bytes()
        header += bytes(-len(header) % maker.data_alignment)
        self._offsets = {name: len(header) + at for name, at in self._offsets.items()}
        self._end = len(header) + end
        return header

    def _write(self, spec: TensorSpec, array: Array) -> None:
        kind = self._types[spec.name]
        if spec.dtype in PACKABLE and spec.size:
            with np.errstate(over="ignore", invalid="ignore"):
                values = to_float32(array, spec.dtype)
            if kind.name != "F32" and not np.max(np.abs(values)) <= _MATRICES[kind.name][1]:
                raise CheckpointError(f"{spec.name!r} does not fit {kind.name}: --kind gguf-f32")
            if spec.dtype == "F64" and (np.isinf(values) & np.isfinite(array)).any():
                raise CheckpointError(f"{spec.name!r} does not fit F32, GGUF's largest type")
            array = _library().quants.quantize(values, kind)
        for name in self._names_of[spec.name]:
            self._write_at(self._offsets[name], array)

    def _finish(self) -> None:
        # Where the last tensor is padded.
        self._output.file.truncate(self._end)


def _library() -> Any:
    return base.need("gguf.quants", "gguf") and base.need("gguf", "gguf")


def _parse(path: Path) -> Any:
    """The library's reader, which is stopped where a damaged header would lead it astray."""
    library: Any = _library()

    class Bounded(library.GGUFReader):  # type: ignore[misc]
        fields_read = 0

        def _get(self, offset: Any, dtype: Any, count: Any = 1, *more: Any, **named: Any) -> Any:
            self.fields_read += 1
            if self.fields_read > _MAX_FIELDS:
                raise ValueError("its header has more fields than any file")
            if int(offset) + int(count) * np.dtype(dtype).itemsize > self.data.size:
                raise ValueError("it is cut short, or its header is damaged")
            return super()._get(offset, dtype, count, *more, **named)

    with base.explained(f"cannot read {path}"), path.open("rb") as file:
        if file.read(8) not in (b"GGUF\x02\0\0\0", b"GGUF\x03\0\0\0"):
            raise ValueError("GGUF versions 2 and 3 are read, little-endian")
        return Bounded(path)


def _head(source: Any) -> bytes:
    """A file up to its tensors, of which it counts none: magic, version, two counts, pairs."""
    last = list(source.fields.values())[-1]
    end = max(24, last.offset + sum(int(part.nbytes) for part in last.parts))
    head: bytes = source.data[:end].tobytes()
    return head[:8] + bytes(8) + head[16:]


def _maker(source: Any | None) -> Any:
    """The library's writer, with the metadata of the source."""
    fields = {} if source is None else source.fields
    named = fields.get("general.architecture")
    maker = _library().GGUFWriter(None, "unknown" if named is None else named.contents())
    for name, field in fields.items():
        value = field.contents()
        # The library cannot write empty arrays, which say as much as absent ones.
        if not name.startswith(("GGUF.", "general.architecture")) and value != []:
            inner = field.types[-1] if len(field.types) > 1 else None
            maker.add_key_value(name, value, field.types[0], sub_type=inner)
    if "general.alignment" in fields:
        maker.data_alignment = int(fields["general.alignment"].contents())
    maker.kv_data[0].pop("general.file_type", None)
    return maker


def _type(name: str, spec: TensorSpec, matrices: str) -> Any:
    if len(base.encode_name(name)) > _MAX_NAME_BYTES or len(spec.shape) > _MAX_DIMS:
        raise CheckpointError(
            f"GGUF holds names of {_MAX_NAME_BYTES} bytes and {_MAX_DIMS} dimensions at most; "
            f"{name[:80]!r} {list(spec.shape)} is beyond that"
        )
    if spec.dtype not in PACKABLE | _PLAIN:
        raise CheckpointError(f"GGUF has no element type {spec.dtype}, which {name!r} has")
    kind = matrices
    if spec.dtype not in PACKABLE:
        kind = spec.dtype
    elif len(spec.shape) < 2:
        kind = "F32"
    elif matrices == "Q8_0" and (not spec.size or spec.shape[-1] % _BLOCK):
        kind = "F16"
    return _library().GGMLQuantizationType[kind]
