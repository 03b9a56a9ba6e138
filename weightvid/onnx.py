"""An onnxruntime session straight from an archive of an ONNX model: no temporary file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from weightvid.archives import Location, open_anywhere
from weightvid.checkpoint.base import need, raw_bytes
from weightvid.checkpoint.onnx_file import DTYPES, GRAPH_ROLE, places
from weightvid.errors import CheckpointError
from weightvid.loader import Array

if TYPE_CHECKING:
    import onnxruntime


def session(
    location: Location, options: onnxruntime.SessionOptions | None = None, **arguments: Any
) -> onnxruntime.InferenceSession:
    """Open an inference session with the graph and the weights of an archive.

    The graph's initializers are marked as external and handed to onnxruntime as they arrive from
    the video (``add_external_initializers``). Needs the extra ``onnxruntime``.

    Parameters
    ----------
    location : path, address or binary file object
        An archive of a ``.onnx`` model, packed with its side files.
    options : onnxruntime.SessionOptions, optional
        The initializers are added to it.
    arguments
        Passed to ``onnxruntime.InferenceSession``, such as ``providers``.

    Raises
    ------
    CheckpointError
        The archive holds no ONNX graph, or a package is missing.
    FormatError
        The archive is damaged or cut short.
    """
    runtime, library = need("onnxruntime", "onnxruntime"), need("onnx", "onnxruntime")
    with open_anywhere(location) as archive:
        graphs = [file.path for file in archive.header.files if file.role == GRAPH_ROLE]
        if not graphs:
            raise CheckpointError(
                "the archive holds no ONNX graph: only an archive of a .onnx model has one"
            )
        model = library.ModelProto.FromString(archive.read_file(graphs[0]))
        arrays = {spec.name: array for spec, array in archive.stored_items()}
        arrays |= {alias: arrays[archive.spec(alias).name] for alias in archive.header.aliases}
    values: dict[str, Any] = {}
    used = {name for node in model.graph.node for name in node.input}
    in_graph = len(model.graph.initializer)
    for number, (name, slot) in enumerate(places(model)):
        array = arrays.get(name)
        if array is None or slot.raw_data:
            continue
        # onnxruntime reads shapes and axes before; it takes none of branches, or that nothing uses.
        if array.size < 1024 or number >= in_graph or slot.name not in used:
            slot.raw_data = raw_bytes(array).tobytes()
            continue
        values[slot.name] = _value(runtime, array, slot.data_type)
        slot.data_location = library.TensorProto.EXTERNAL
        slot.external_data.add(key="location", value="archive")
    opened = options or runtime.SessionOptions()
    opened.add_external_initializers(list(values), list(values.values()))
    made = runtime.InferenceSession(model.SerializeToString(), opened, **arguments)
    made.weightvid_arrays = arrays, values  # onnxruntime may read from them as long as it lives
    return made


def _value(runtime: Any, array: Array, number: int) -> Any:
    if array.dtype.str[1:] in ("u2", "u1") and number not in (DTYPES["U16"], DTYPES["U8"]):
        # Raw bits of types that numpy lacks.
        return runtime.OrtValue.ortvalue_from_numpy_with_onnx_type(array, number)
    return runtime.OrtValue.ortvalue_from_numpy(array)
