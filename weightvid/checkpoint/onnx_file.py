"""ONNX models: initializers are the tensors; the graph without them travels as a side file.

Specification: https://github.com/onnx/onnx/blob/main/docs/IR.md and docs/ExternalData.md. Needs the
``onnx`` package (extra ``onnx``), and memory for all weights inside the file; external data is read
one tensor at a time.
"""

import warnings
from collections import Counter
from collections.abc import Iterator
from io import BytesIO
from math import prod
from pathlib import Path
from typing import Any, Final

import numpy as np

from weightvid.atomic import AtomicFile
from weightvid.checkpoint import base
from weightvid.errors import CheckpointError
from weightvid.loader import Array, TensorSpec
from weightvid.spec import is_safe_path, stored_dtype

GRAPH_ROLE: Final = "onnx-graph"
#: our dtype -> ``TensorProto.DataType``, of what both have in whole bytes.
DTYPES: Final = {
    "F32": 1, "U8": 2, "I8": 3, "U16": 4, "I16": 5, "I32": 6, "I64": 7, "BOOL": 9, "F16": 10,
    "F64": 11, "U32": 12, "U64": 13, "C64": 14, "C128": 15, "BF16": 16, "F8_E4M3": 17,
    "F8_E4M3FNUZ": 18, "F8_E5M2": 19, "F8_E5M2FNUZ": 20, "F8_E8M0": 24,
}  # fmt: skip
_NAMES: Final = {number: name for name, number in DTYPES.items()}
_FLOATS: Final = frozenset(DTYPES[name] for name in ("F64", "F32", "F16", "BF16"))
#: smaller constants stay in the graph.
_LEAST_CONSTANT: Final = 16
#: larger models keep their weights in a file of their own: protobuf ends at 2 GB.
INLINE_BYTES: Final = 1 << 30
_ALIGNMENT: Final = 4096


class Reader(base.ArrayReader):
    """An ONNX model; its external data is memory-mapped.

    Initializers of types that weightvid lacks (strings, 4-bit integers, ...) stay in the graph.
    Weights that an exporter wrote as ``Constant`` nodes become initializers, which means the same;
    but in functions, which have none.
    """

    def __init__(self, path: Path) -> None:
        model = _load(path, str(path))
        if model.ir_version >= 4:  # since then, an initializer need not be an input of the graph
            for graph in _graphs(model.graph):
                _constants_to_initializers(graph)
        arrays: dict[str, Array] = {}
        dtypes: dict[str, str] = {}
        outside: dict[str, Array] = {}
        for name, tensor in places(model):
            if tensor.data_type not in _NAMES:
                continue
            spec = TensorSpec(name, _NAMES[tensor.data_type], tuple(tensor.dims))
            dtypes[name] = spec.dtype
            with base.explained(f"tensor {name!r} of {path} cannot be read"):
                arrays[name] = _elements(path, spec, tensor, outside)
            own = tensor.name
            tensor.Clear()
            tensor.name, tensor.data_type = own, DTYPES[spec.dtype]
            tensor.dims.extend(spec.shape)
        helper = _library().external_data_helper
        if any(map(helper.uses_external_data, helper._get_all_tensors(model))):
            raise CheckpointError(
                f"{path} keeps tensors in external files that are no initializers of its graph, or "
                "of a type that weightvid lacks; save it with all its data inside"
            )
        text = model.SerializeToString(deterministic=True)
        files, skipped = base.as_side_file("graph.onnx", text, GRAPH_ROLE)
        super().__init__(arrays, dtypes, skipped=skipped, files=files)


class Writer(base.FileWriter):
    """An ONNX model; the contents must hold its graph and every weight of it.

    The weights of a large model go to ``NAME.data``.
    """

    _data: AtomicFile | None = None

    def _plan(self) -> bytes:
        graph = self._side_file(GRAPH_ROLE)
        if graph is None:
            raise CheckpointError(
                "the source holds no ONNX graph: only what was packed from a .onnx model (with its "
                "side files) can be written as one; write .safetensors instead"
            )
        self._model = _load(BytesIO(graph), "the ONNX graph of the source")
        self._slots = _slots(self._model, self.contents)
        self._data_name = ""
        if sum(spec.stored_bytes for spec in self.contents.tensors) > INLINE_BYTES:
            self._data_name = f"{self._path.name}.data"
            self.notes = (f"the weights are in {self._data_name}: keep it with the model",)
        return b""

    def _write(self, spec: TensorSpec, array: Array) -> None:
        for name in self._names_of[spec.name]:
            self._slots[name].raw_data = base.raw_bytes(array).tobytes()

    def _finish(self) -> None:
        if self._data_name:
            self._data = AtomicFile(self._path.with_name(self._data_name), force=self._force)
            file, move_out = self._data.file, _library().external_data_helper.set_external_data
            # Branches and functions keep theirs: not every runtime finds them elsewhere.
            for slot in map(self._slots.get, [t.name for t in self._model.graph.initializer]):
                if slot is None or not slot.raw_data:
                    continue
                at = file.seek(-(-file.tell() // _ALIGNMENT) * _ALIGNMENT)
                file.write(slot.raw_data)
                move_out(slot, self._data_name, at, len(slot.raw_data))
                slot.ClearField("raw_data")
            file.flush()
        self._output.file.write(self._model.SerializeToString())
        self._output.file.flush()

    def _publish(self) -> None:
        if self._data is not None:
            self._data.commit()
        super()._publish()

    def abort(self) -> None:
        """Remove what has been written; does nothing after :meth:`commit`."""
        super().abort()
        if self._data is not None:
            self._data.abort()


def _library() -> Any:
    return base.need("onnx", "onnx")


def _load(source: Path | BytesIO, what: str) -> Any:
    """A model without its external data."""
    library = _library()
    with base.explained(f"{what} is no valid ONNX model"):
        model = library.load_model(source, "protobuf", load_external_data=False)
    if not model.HasField("graph"):
        raise CheckpointError(f"{what} is no valid ONNX model: it has no graph")
    return model


def places(model: Any) -> Iterator[tuple[str, Any]]:
    """Where tensors are, in the order of the file: in graphs, their branches, and functions.

    Names are those of the initializers; a name that another graph has, too, gets a number;
    two of one graph are a CheckpointError.
    """
    taken: dict[str, int] = {}
    bodies = [model.graph, *model.functions]
    for graph in (graph for body in bodies for graph in _graphs(body)):
        own = [tensor.name for tensor in getattr(graph, "initializer", ())]
        if twice := [name for name, count in Counter(own).items() if name and count > 1]:
            raise CheckpointError(f"two tensors are named {twice[0]!r} in one graph of the model")
        for tensor in getattr(graph, "initializer", ()):
            if tensor.name:
                yield base.unique(tensor.name, taken), tensor
    for function in model.functions:
        for node in filter(_is_weight, function.node):
            name = f"{function.name}.{node.output[0]}"
            yield base.unique(name, taken), node.attribute[0].t


def _graphs(body: Any) -> Iterator[Any]:
    """A graph or function, and the graphs in its nodes: branches and bodies of loops."""
    yield body
    for attribute in (attribute for node in body.node for attribute in node.attribute):
        for graph in (attribute.g,) if attribute.HasField("g") else attribute.graphs:
            yield from _graphs(graph)


def _elements(path: Path, spec: TensorSpec, tensor: Any, outside: dict[str, Array]) -> Array:
    """Elements of an initializer; ``outside`` are the other files that are mapped already."""
    library = _library()
    stored = stored_dtype(spec.dtype)
    if tensor.HasField("raw_data"):
        return np.frombuffer(tensor.raw_data, stored).reshape(spec.shape)
    if not library.external_data_helper.uses_external_data(tensor):
        flat = np.ascontiguousarray(library.numpy_helper.to_array(tensor)).reshape(-1)
        return flat.view(stored).reshape(spec.shape)
    info, location = _outside(tensor)
    if not is_safe_path(location):
        raise ValueError(f"{location[:80]!r} does not lie in the model's folder")
    if (info.length or spec.stored_bytes) != spec.stored_bytes:
        raise ValueError(f"it needs {spec.stored_bytes} bytes; the model places {info.length}")
    if not spec.size:
        return np.empty(spec.shape, stored)
    beside = path.parent / location
    if not base.is_inside(beside, path.parent):
        raise ValueError(f"{location[:80]!r} is a link that leads out of the model's folder")
    if not beside.is_file():
        raise ValueError(f"its data is missing: there is no file {beside}")
    if location not in outside:
        outside[location] = np.memmap(beside, np.uint8, "r")
    at = info.offset or 0
    found = outside[location][max(at, 0) : at + spec.stored_bytes]
    if at < 0 or len(found) != spec.stored_bytes:
        raise ValueError(f"{beside} ends before it: the file is cut short")
    return found.view(stored).reshape(spec.shape)


def _outside(tensor: Any) -> tuple[Any, str]:
    """Where the data of a tensor lies, and the file that it is in."""
    with warnings.catch_warnings(action="ignore"):  # of keys that it does not know
        info = _library().external_data_helper.ExternalDataInfo(tensor)
    location: str = info.location
    while location.startswith("./"):
        location = location[2:]
    return info, location


def files_beside(path: Path) -> list[str]:
    """Names of the files that hold a model's data."""
    helper, model = _library().external_data_helper, _load(path, str(path))
    outside = filter(helper.uses_external_data, helper._get_all_tensors(model))
    return sorted({_outside(tensor)[1] for tensor in outside})


def _constants_to_initializers(graph: Any) -> None:
    """Move weights out of nodes, where some exporters write them, behind the initializers."""
    others = []
    for node in graph.node:
        if _is_weight(node):
            graph.initializer.add().CopyFrom(node.attribute[0].t)
            graph.initializer[-1].name = node.output[0]
        else:
            others.append(node)
    if len(others) < len(graph.node):
        del graph.node[:]
        graph.node.extend(others)


def _is_weight(node: Any) -> bool:
    if node.op_type != "Constant" or node.domain not in ("", "ai.onnx"):
        return False
    if [attribute.name for attribute in node.attribute] != ["value"] or not any(node.output):
        return False
    tensor = node.attribute[0].t
    return prod(tensor.dims) >= _LEAST_CONSTANT and tensor.data_type in _FLOATS


def _slots(model: Any, contents: base.Contents) -> dict[str, Any]:
    """Initializers that wait for the tensors."""
    slots, wanted = dict(places(model)), dict(contents.rows())
    for name, spec in wanted.items():
        slot = slots.get(name)
        if slot is None:
            raise CheckpointError(f"the ONNX graph has no initializer {name!r}")
        if (slot.data_type, tuple(slot.dims)) != (DTYPES.get(spec.dtype), spec.shape):
            raise CheckpointError(
                f"the ONNX graph wants another type or shape of {name!r} than {spec.dtype} "
                f"{list(spec.shape)}: unpack it without converting"
            )
    if absent := [name for name in slots if name not in wanted and _is_bare(slots[name])]:
        missing = base.shorten(absent)
        raise CheckpointError(f"an ONNX model needs all its weights; missing: {missing}")
    return {name: slots[name] for name in wanted}


def _is_bare(slot: Any) -> bool:
    """Whether an initializer lacks data; what stayed in the graph has it, and empties need none."""
    fields = {field.name for field, _ in slot.ListFields()}
    return 0 not in slot.dims and fields <= {"name", "dims", "data_type"}
