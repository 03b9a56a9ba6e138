"""ONNX models: initializers are the tensors; the graph without them travels as a side file.

Specification: https://github.com/onnx/onnx/blob/main/docs/IR.md and docs/ExternalData.md. Needs the
``onnx`` package (extra ``onnx``). Weights are read one at a time, whether they lie inside the file
or in external ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import BufferedReader
from math import prod
from pathlib import Path
from typing import Any, Final

import numpy as np

from weightvid.checkpoint.base import Array, CheckpointReader, Contents, check_contents
from weightvid.checkpoint.onnx_wire import scan
from weightvid.checkpoint.onnx_writer import (
    DTYPES,
    GRAPH_PATH,
    GRAPH_ROLE,
    import_onnx,
    open_writer,
)
from weightvid.dtypes import stored_dtype
from weightvid.errors import CheckpointError
from weightvid.spec import SIDE_FILE_BYTES, SideFile, TensorSpec, is_safe_path

__all__ = ["open_reader", "open_writer"]

_NAMES: Final = {number: name for name, number in DTYPES.items()}
_OPEN_FILES: Final = 4
_FLOATS: Final = frozenset(DTYPES[name] for name in ("F64", "F32", "F16", "BF16"))
#: smaller constants stay in the graph.
_LEAST_CONSTANT: Final = 16
#: from this version of the format on, an initializer need not be an input of the graph.
_FREE_INITIALIZERS: Final = 4


def open_reader(path: Path) -> CheckpointReader:
    """Open an ONNX model.

    Initializers of types that weightvid lacks (strings, 4-bit integers, ...) stay in the graph.
    Weights that an exporter wrote as ``Constant`` nodes become initializers, which means the same.

    Raises
    ------
    CheckpointError
        The ``onnx`` package is missing; the model is damaged; external data are missing, cut
        short, or lie outside the model's folder.
    """
    model, places = _load(path)
    return _OnnxReader(path, model, places)


def external_files(path: Path) -> list[str]:
    """Files beside a model that hold data of it; names that lead elsewhere are left out.

    Raises
    ------
    CheckpointError
        The ``onnx`` package is missing; the model is damaged.
    """
    tensors = filter(_is_external, _tensors_of(_load(path)[0]))
    found = {e.value for t in tensors for e in t.external_data if e.key == "location"}
    return sorted(filter(is_safe_path, found))


def _load(path: Path) -> tuple[Any, dict[int, tuple[int, int]]]:
    """A model without its weights, and where those that lie inside the file are."""
    onnx = import_onnx()
    try:
        with path.open("rb") as file:
            scanned = scan(file)
        model = onnx.load_model_from_string(scanned.model)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from None
    except Exception as error:
        # protobuf's exceptions have no common base that is public.
        raise CheckpointError(f"{path} is no valid ONNX model: {error}") from None
    if not model.HasField("graph"):
        raise CheckpointError(f"{path} is no valid ONNX model: it has no graph")
    return model, scanned.places


@dataclass(frozen=True, slots=True)
class _Place:
    """Where bytes lie."""

    path: Path
    offset: int


class _OnnxReader(CheckpointReader):
    def __init__(self, path: Path, model: Any, inside: dict[int, tuple[int, int]]) -> None:
        self._path = path
        self._inline: dict[str, Any] = {}
        self._places: dict[str, _Place] = {}
        self._files: dict[Path, BufferedReader] = {}
        specs: list[TensorSpec] = []
        _constants_to_initializers(model)
        for number, tensor in enumerate(model.graph.initializer):
            dtype = _NAMES.get(tensor.data_type)
            if dtype is None or not tensor.name:
                if number in inside:
                    tensor.raw_data = _slice(path, *inside[number])
                continue
            spec = TensorSpec(tensor.name, dtype, tuple(tensor.dims))
            specs.append(spec)
            if _is_external(tensor):
                self._places[spec.name] = self._place(spec, tensor)
            elif number in inside:
                self._places[spec.name] = self._inside(spec, *inside[number])
            else:
                self._inline[spec.name] = _copy(tensor)
            _empty(tensor)
        if any(map(_is_external, _tensors_of(model))):
            raise CheckpointError(
                f"{path} keeps tensors in external files that are no initializers of its graph, or "
                "of a type that weightvid lacks; save it with all its data inside"
            )
        skipped: tuple[str, ...] = ()
        files: tuple[SideFile, ...] = ()
        graph = model.SerializeToString(deterministic=True)
        if len(graph) <= SIDE_FILE_BYTES:
            files = (SideFile(GRAPH_PATH, graph, GRAPH_ROLE),)
        else:
            skipped = (f"the graph (larger than {SIDE_FILE_BYTES >> 20} MiB without its weights)",)
        contents = Contents(tuple(specs), skipped=skipped, files=files)
        check_contents(contents)
        super().__init__(contents)

    def _place(self, spec: TensorSpec, tensor: Any) -> _Place:
        fields = {entry.key: entry.value for entry in tensor.external_data}
        location = fields.get("location", "")
        if not is_safe_path(location):
            raise CheckpointError(
                f"{self._path} keeps tensor {spec.name!r} in {location[:80]!r}, which does not lie "
                "in its folder"
            )
        path = self._path.parent / location
        try:
            offset = int(fields.get("offset", 0))
            length = int(fields.get("length", spec.stored_bytes))
            size = path.stat().st_size
        except ValueError:
            raise CheckpointError(f"{self._path} misplaces tensor {spec.name!r}") from None
        except OSError:
            raise CheckpointError(
                f"{self._path} keeps tensor {spec.name!r} in {location}, which is missing; put it "
                "beside the model"
            ) from None
        if length != spec.stored_bytes or offset < 0:
            raise CheckpointError(
                f"tensor {spec.name!r} in {self._path} should have {spec.stored_bytes} bytes and "
                f"has {length}"
            )
        if offset + length > size:
            raise CheckpointError(f"{path} is cut short: tensor {spec.name!r} lies beyond its end")
        return _Place(path, offset)

    def _inside(self, spec: TensorSpec, offset: int, length: int) -> _Place:
        if length != spec.stored_bytes:
            raise CheckpointError(
                f"tensor {spec.name!r} in {self._path} should have {spec.stored_bytes} bytes and "
                f"has {length}"
            )
        return _Place(self._path, offset)

    def _read(self, spec: TensorSpec) -> Array:
        place = self._places.get(spec.name)
        if place is None:
            return self._decode(spec)
        return self._elements(place, spec, 0, spec.size).reshape(spec.shape)

    def _read_range(self, spec: TensorSpec, first: int, count: int) -> Array:
        place = self._places.get(spec.name)
        if place is None:
            return super()._read_range(spec, first, count)
        return self._elements(place, spec, first, count)

    def _elements(self, place: _Place, spec: TensorSpec, first: int, count: int) -> Array:
        dtype = stored_dtype(spec.dtype)
        data = np.empty(count * dtype.itemsize, np.uint8)
        try:
            file = self._file(place.path)
            file.seek(place.offset + first * dtype.itemsize)
            got = file.readinto(data.data)
        except OSError as error:
            raise CheckpointError(f"cannot read {place.path}: {error}") from None
        if got != data.size:
            raise CheckpointError(f"{place.path} was cut short while it was open")
        return data.view(dtype)

    def _decode(self, spec: TensorSpec) -> Array:
        tensor = self._inline[spec.name]
        stored = stored_dtype(spec.dtype)
        try:
            if tensor.HasField("raw_data"):
                flat: Array = np.frombuffer(tensor.raw_data, stored)
            else:
                made = import_onnx().numpy_helper.to_array(tensor)
                flat = np.ascontiguousarray(made).reshape(-1).view(stored)
            return flat.reshape(spec.shape)
        except (ValueError, TypeError) as error:
            raise CheckpointError(
                f"tensor {spec.name!r} in {self._path} is damaged: {error}"
            ) from None

    def _file(self, path: Path) -> BufferedReader:
        file = self._files.pop(path, None)
        if file is None:
            while len(self._files) >= _OPEN_FILES:
                self._files.pop(next(iter(self._files))).close()
            file = path.open("rb")
        self._files[path] = file
        return file

    def close(self) -> None:
        super().close()
        for file in self._files.values():
            file.close()
        self._files = {}
        self._inline = {}


def _constants_to_initializers(model: Any) -> None:
    """Weights in nodes, as some exporters write them, behind the other initializers."""
    if model.ir_version < _FREE_INITIALIZERS:
        return
    graph = model.graph
    nodes = list(graph.node)
    kept = []
    for node in nodes:
        tensor = _constant(node)
        if tensor is None:
            kept.append(node)
        else:
            graph.initializer.add().CopyFrom(tensor)
            graph.initializer[-1].name = node.output[0]
    if len(kept) < len(nodes):
        del graph.node[:]
        graph.node.extend(kept)


def _constant(node: Any) -> Any | None:
    """Weights that a node stands for."""
    if node.op_type != "Constant" or node.domain not in ("", "ai.onnx") or len(node.output) != 1:
        return None
    if len(node.attribute) != 1 or node.attribute[0].name != "value" or not node.output[0]:
        return None
    tensor = node.attribute[0].t
    small = prod(tensor.dims) < _LEAST_CONSTANT
    return None if small or tensor.data_type not in _FLOATS else tensor


def _slice(path: Path, offset: int, length: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(length)


def _is_external(tensor: Any) -> bool:
    """Whether a tensor's data lie in another file."""
    return bool(tensor.data_location == import_onnx().TensorProto.EXTERNAL)


def _tensors_of(model: Any) -> Iterator[Any]:
    """Every tensor of a model, wherever it stands."""
    yield from _tensors_of_graph(model.graph)
    for function in model.functions:
        for node in function.node:
            yield from _tensors_of_attributes(node.attribute)


def _tensors_of_graph(graph: Any) -> Iterator[Any]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        yield from _tensors_of_attributes(node.attribute)


def _tensors_of_attributes(attributes: Iterable[Any]) -> Iterator[Any]:
    for attribute in attributes:
        if attribute.HasField("t"):
            yield attribute.t
        yield from attribute.tensors
        graphs = [attribute.g] if attribute.HasField("g") else []
        for graph in (*graphs, *attribute.graphs):
            yield from _tensors_of_graph(graph)


def _copy(tensor: Any) -> Any:
    made = import_onnx().TensorProto()
    made.CopyFrom(tensor)
    return made


def _empty(tensor: Any) -> None:
    """Leave name, type and shape of an initializer."""
    name, data_type, dims = tensor.name, tensor.data_type, list(tensor.dims)
    tensor.Clear()
    tensor.name, tensor.data_type = name, data_type
    tensor.dims.extend(dims)
