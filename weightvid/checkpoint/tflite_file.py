"""LiteRT (TensorFlow Lite) models: constants of the graph are the tensors, by their names.

The rest of the file travels as a template. Schema:
https://github.com/google-ai-edge/LiteRT/blob/main/tflite/converter/schema/schema.fbs. Reading needs
the ``tflite`` package (extra ``tflite``), writing needs none.
"""

from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any, Final

import numpy as np

from weightvid.checkpoint import base, template
from weightvid.loader import MAX_AXES, MAX_NAME_BYTES, PACKABLE, Array, TensorSpec
from weightvid.spec import stored_dtype

GRAPH_ROLE: Final = "tflite-graph"
#: ``TensorType`` -> our dtype, of what both have in whole bytes.
_DTYPES: Final = {
    0: "F32", 1: "F16", 2: "I32", 3: "U8", 4: "I64", 6: "BOOL", 7: "I16", 8: "C64", 9: "I8",
    10: "F64", 11: "C128", 12: "U64", 15: "U32", 16: "U16", 18: "BF16",
}  # fmt: skip
#: operator -> axes of its filters (input 1) as outputs x inputs x height x width.
_FILTERS: Final = {"CONV_2D": (0, 3, 1, 2), "TRANSPOSE_CONV": (0, 3, 1, 2),
                   "DEPTHWISE_CONV_2D": (3, 0, 1, 2)}  # fmt: skip
#: ``QuantizationDetails``: scales of blocks of integers are a tensor, which the first field names.
_BLOCKWISE, _SCALES_FIELD = 2, 4
#: operators, tensors and graphs of a model; a file may claim many with few bytes.
_MOST_PARTS: Final = 1 << 17


class Reader(base.ArrayReader):
    """A LiteRT model, memory-mapped.

    Filters of convolutions come as outputs x inputs x height x width, as everywhere in weightvid.
    Sparse tensors, scales of blocks, and types that weightvid lacks (strings, 4-bit integers) stay
    in the graph.
    """

    def __init__(self, path: Path) -> None:
        library: Any = base.need("tflite", "tflite")
        whole: Array = np.memmap(path, np.uint8, "r")
        with base.explained(f"{path} is no valid LiteRT model, or it is damaged"):
            model = library.Model.GetRootAs(whole.data)
            kept, rest = template.cut(whole, dict(_places(library, model, whole)))
        files, skipped = base.as_side_file("graph.tflite", rest, GRAPH_ROLE)
        arrays = {name: place.shown for name, place in kept.items()}
        dtypes = {name: place.dtype for name, place in kept.items()}
        super().__init__(arrays, dtypes, skipped=skipped, files=files)


class Writer(template.Writer):
    """A LiteRT model as it was, with these weights."""

    role = GRAPH_ROLE
    label = "LiteRT"


def _places(library: Any, model: Any, whole: Array) -> Iterator[tuple[str, template.Place]]:
    """Constants of all graphs, in the order of the file."""
    taken: dict[str, int] = {}
    name_bytes, parts = len(whole), _MOST_PARTS
    for graph in map(model.Subgraphs, range(model.SubgraphsLength())):
        parts -= 1 + graph.TensorsLength() + graph.OperatorsLength()
        if parts < 0:
            raise ValueError(f"it has more than {_MOST_PARTS} tensors and operators")
        axes_of, scales = _filters(library, model, graph), _scales(graph)
        for number in range(graph.TensorsLength()):
            tensor = graph.Tensors(number)
            buffer = model.Buffers(tensor.Buffer())
            dtype, size = _DTYPES.get(tensor.Type()), buffer.DataLength() or buffer.Size()
            if dtype is None or not size or tensor.Sparsity() is not None or number in scales:
                continue
            text = tensor.Name() or b"tensor"
            name_bytes -= len(text)
            if name_bytes < 0 or tensor.ShapeLength() > MAX_AXES:
                raise ValueError("names or shapes are longer than a file of this size can hold")
            shape = tuple(map(int, tensor.ShapeAsNumpy())) if tensor.ShapeLength() else ()
            name = text[:MAX_NAME_BYTES].decode(errors="replace")
            spec = TensorSpec(name, dtype, shape)
            if spec.stored_bytes != size:
                raise ValueError(f"tensor {name[:80]!r} has a wrong number of bytes")
            if dtype not in PACKABLE and prod(shape) < 16:  # shapes, paddings, axes
                continue
            # Beyond 2 GB, the data lies behind the flatbuffer.
            data = buffer.DataAsNumpy() if buffer.DataLength() else whole[buffer.Offset() :][:size]
            stored = data.view(stored_dtype(dtype)).reshape(shape)
            axes = axes_of.get(number, ()) if len(shape) == 4 else ()
            yield base.unique(name, taken), template.Place(stored, dtype, axes)


def _scales(graph: Any) -> set[int]:
    """Numbers of tensors that say how to read the integers of others."""
    found = set()
    for tensor in map(graph.Tensors, range(graph.TensorsLength())):
        quantization = tensor.Quantization()
        if quantization is not None and quantization.DetailsType() == _BLOCKWISE:
            details = quantization.Details()
            if at := details.Offset(_SCALES_FIELD):
                found.add(int.from_bytes(details.Bytes[details.Pos + at :][:4], "little"))
    return found


def _filters(library: Any, model: Any, graph: Any) -> dict[int, tuple[int, ...]]:
    """Order of the axes of those tensors that are filters."""
    known = {getattr(library.BuiltinOperator, name): axes for name, axes in _FILTERS.items()}
    made_from: dict[int, int] = {}
    found: dict[int, tuple[int, ...]] = {}
    for operator in map(graph.Operators, range(graph.OperatorsLength())):
        code = model.OperatorCodes(operator.OpcodeIndex())
        kind = max(code.BuiltinCode(), code.DeprecatedBuiltinCode())
        if kind in known and operator.InputsLength() > 1:
            found[operator.Inputs(1)] = known[kind]
        elif kind == library.BuiltinOperator.DEQUANTIZE and operator.OutputsLength():
            made_from[operator.Outputs(0)] = operator.Inputs(0)
    return found | {made_from[number]: found[number] for number in found if number in made_from}
