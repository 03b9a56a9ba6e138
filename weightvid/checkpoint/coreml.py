"""Core ML packages (.mlpackage) of ML programs: the blobs of ``weight.bin`` are the tensors.

Blobs are found by the program, which names them and tells their shapes. The blob files travel as
templates, the program and the manifest as they are. Reading needs the ``coremltools`` package
(extra ``coreml``), on any system; writing needs none.
"""

import struct
import sys
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import numpy as np

from weightvid.checkpoint import base, folder, template
from weightvid.errors import CheckpointError
from weightvid.loader import PACKABLE, Array, TensorSpec
from weightvid.spec import SIDE_FILE_BYTES, SideFile, is_safe_path, stored_dtype

FILE_ROLE: Final = "coreml-file"
WEIGHTS_ROLE: Final = "coreml-weights"
#: ``MILSpec.DataType`` -> our dtype, of what both have in whole bytes.
_DTYPES: Final = {
    1: "BOOL", 10: "F16", 11: "F32", 12: "F64", 13: "BF16", 21: "I8", 22: "I16", 23: "I32",
    24: "I64", 31: "U8", 32: "U16", 33: "U32", 34: "U64", 40: "F8_E4M3", 41: "F8_E5M2",
}  # fmt: skip
#: of a blob: a mark, its type, the number of its bytes, and where they begin.
_BLOB: Final = struct.Struct("<IIQQ")
_HERE: Final = "@model_path/"


class Reader(base.ArrayReader):
    """A package, its blob files memory-mapped.

    Where they are stay blobs of less than 8 bits, and scales and palettes of compressed weights.
    """

    def __init__(self, path: Path) -> None:
        places: dict[str, dict[str, template.Place]] = {}
        mapped: dict[str, Array] = {}
        taken: dict[str, int] = {}
        model, program = _program(path)
        functions = sorted(program.functions.items())
        blocks = (sorted(each.block_specializations.items()) for _, each in functions)
        for name, value in _values(block for _, block in chain.from_iterable(blocks)):
            file = _blob_file(path, model, value.blobFileValue.fileName)
            if file not in mapped:
                mapped[file], places[file] = np.memmap(path / file, np.uint8, "r"), {}
            if place := _place(mapped[file], name, value):
                places[file][base.unique(name, taken)] = place
        kept: dict[str, template.Place] = {}
        files, skipped = folder.gather(path, lambda name: "blobs" if str(name) in mapped else "")
        made = [SideFile(file.path, file.data, FILE_ROLE) for file in files]
        left_out = [entry for entry in skipped if not entry.endswith(" (blobs)")]
        for file, whole in mapped.items():
            inside, rest = template.cut(whole, places[file])
            kept |= inside
            added, too_large = base.as_side_file(file, rest, WEIGHTS_ROLE)
            made += added
            left_out += too_large
        arrays = {name: place.stored for name, place in kept.items()}
        dtypes = {name: place.dtype for name, place in kept.items()}
        super().__init__(arrays, dtypes, skipped=left_out, files=tuple(made))


class _BlobFile(template.Writer):
    role = WEIGHTS_ROLE
    label = "Core ML"


class Writer(folder.Writer):
    """A package as it was, with these weights."""

    weights_writer = _BlobFile

    def _side_files(self) -> dict[str, bytes]:
        files = {file.path: file.data for file in self.contents.files if file.role == FILE_ROLE}
        self._templates = [file for file in self.contents.files if file.role == WEIGHTS_ROLE]
        if not files or not self._templates:
            raise CheckpointError(
                "the source holds no Core ML program: only what was packed from a .mlpackage (with "
                "its side files) can be written as one; write .safetensors instead"
            )
        for name in (*files, *(file.path for file in self._templates)):
            if not is_safe_path(name) or name.startswith(".") or "/." in name:
                raise CheckpointError(f"the file {name!r} has no place in a package")
        return files

    def _plan_shards(self) -> dict[str, base.Contents]:
        shards, left = {}, dict(self._todo)
        for file in self._templates:
            names = {spec.name for spec, _, _ in template.tensors_of(file.data)}
            inside = [name for name in left if not names.isdisjoint(self._names_of[name])]
            tied = {alias: name for name in inside for alias in self._names_of[name][1:]}
            specs = tuple(map(left.pop, inside))
            shards[file.path] = base.Contents(specs, tied, files=(file,))
        if left:
            said = base.shorten(map(repr, left))
            raise CheckpointError(f"the Core ML program has no tensor {said}")
        return shards

    def _index(self) -> dict[str, bytes]:
        return {}


def _program(package: Path) -> tuple[Path, Any]:
    """Path of the model in its package, and its ML program."""
    manifest = folder.read_json(package / "Manifest.json")
    item = manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"]
    path = package / "Data" / item
    if not is_safe_path(item) or not base.is_inside(path, package):
        raise ValueError(f"its manifest names {item[:80]!r}, which is not in the package")
    if path.stat().st_size > SIDE_FILE_BYTES:
        raise ValueError(f"{path.name} is larger than {SIDE_FILE_BYTES >> 20} MiB")
    model = _messages().Model()
    with base.explained(f"{path} is no Core ML model, or it is damaged"):
        model.ParseFromString(path.read_bytes())
    kind = model.WhichOneof("Type")
    if kind != "mlProgram":
        raise ValueError(
            f"it holds a {kind}, and only ML programs have their weights in files of their own; "
            'convert with convert_to="mlprogram"'
        )
    return path, model.mlProgram


def _messages() -> Any:
    """The messages of coremltools without the rest of it, which imports torch and more."""
    spec = find_spec("coremltools")
    if spec is None or spec.origin is None:
        return base.need("coremltools", "coreml")
    name, path = "_coremltools_proto", Path(spec.origin).with_name("proto")
    if name not in sys.modules:
        package = ModuleType(name)
        package.__path__ = [str(path)]
        sys.modules[name] = package
    return base.need(f"{name}.Model_pb2", "coreml")


def _values(blocks: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    """Values that lie in blob files, by the names of what they are for."""
    for operation in chain.from_iterable(block.operations for block in blocks):
        name = operation.outputs[0].name if operation.outputs else operation.type
        # Weights that are compressed already: scales, palettes, what is not zero.
        compressed = operation.type.startswith("constexpr_")
        found = dict(operation.attributes)
        for key, argument in operation.inputs.items():
            for number, binding in enumerate(argument.arguments):
                if binding.HasField("value"):
                    found[f"{key}.{number}" if number else key] = binding.value
        for key, value in sorted(found.items()):
            kept = compressed and _DTYPES.get(value.type.tensorType.dataType) in PACKABLE
            if value.HasField("blobFileValue") and not kept:
                yield name if key == "val" else f"{name}.{key}", value
        yield from _values(operation.blocks)


def _blob_file(package: Path, model: Path, name: str) -> str:
    path = model.parent / name.removeprefix(_HERE)
    if not name.startswith(_HERE) or not is_safe_path(name.removeprefix(_HERE)):
        raise ValueError(f"it has weights in {name[:80]!r}, which is not in the package")
    if not base.is_inside(path, package):
        raise ValueError(f"{name[:80]!r} is a link that leads out of the package")
    if not path.is_file() or not path.stat().st_size:
        raise ValueError(f"its weights are missing: there is no file {path}")
    return path.relative_to(package).as_posix()


def _place(whole: Array, name: str, value: Any) -> template.Place | None:
    """Where a tensor lies in a blob file; None if weightvid lacks its type."""
    kind, at = value.type.tensorType, value.blobFileValue.offset
    dtype = _DTYPES.get(kind.dataType)
    if dtype is None:
        return None
    shape = tuple(dimension.constant.size for dimension in kind.dimensions)
    size = TensorSpec(name, dtype, shape).stored_bytes
    head = whole[at : at + _BLOB.size].tobytes()
    mark, _, stated, start = _BLOB.unpack(head) if len(head) == _BLOB.size else (0, 0, 0, 0)
    if mark != 0xDEADBEEF or stated != size or start + size > len(whole):
        raise ValueError(f"tensor {name[:80]!r} is not where the program says: cut short?")
    stored = whole[start : start + size].view(stored_dtype(dtype)).reshape(shape)
    return template.Place(stored, dtype)
