"""Writing an ONNX model: the archive's graph, with weights put back into it or beside it."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from weightvid.atomic import AtomicFile
from weightvid.checkpoint.base import Array, Contents, check_contents, raw_bytes, shorten
from weightvid.checkpoint.onnx_wire import GRAPH, INITIALIZER, RAW_DATA, lead
from weightvid.checkpoint.writer import CheckpointWriter, FileWriter
from weightvid.errors import CheckpointError, OutputError
from weightvid.spec import TensorSpec

GRAPH_ROLE: Final = "onnx-graph"
GRAPH_PATH: Final = "graph.onnx"
#: our dtype -> ``TensorProto.DataType``, of what both have in whole bytes.
DTYPES: Final = {
    "F32": 1, "U8": 2, "I8": 3, "U16": 4, "I16": 5, "I32": 6, "I64": 7, "BOOL": 9, "F16": 10,
    "F64": 11, "U32": 12, "U64": 13, "C64": 14, "C128": 15, "BF16": 16, "F8_E4M3": 17,
    "F8_E4M3FNUZ": 18, "F8_E5M2": 19, "F8_E5M2FNUZ": 20, "F8_E8M0": 24,
}  # fmt: skip
#: larger models keep their weights in a file beside them: protobuf ends at 2 GB.
INLINE_BYTES: Final = 1 << 30
_ALIGNMENT: Final = 4096


def import_onnx() -> ModuleType:
    """Import onnx, or say how to get it.

    Raises
    ------
    CheckpointError
        It is not installed.
    """
    try:
        import onnx
        import onnx.numpy_helper
    except ImportError as error:
        raise CheckpointError(
            f"the onnx package is needed for this ({error}): pip install 'weightvid[onnx]'"
        ) from None
    module: ModuleType = onnx
    return module


def open_writer(path: Path, contents: Contents, *, force: bool = False) -> CheckpointWriter:
    """Start an ONNX model; the contents must hold its graph and every weight of it."""
    return _OnnxWriter(path, contents, force=force)


class _OnnxWriter(FileWriter):
    """Leaves room for the weights and fills it as they come; of a large model in ``NAME.data``."""

    def __init__(self, path: Path, contents: Contents, *, force: bool) -> None:
        check_contents(contents)
        self._model = _graph(contents)
        self._slots = _slots(self._model, contents)
        self._offsets: dict[str, int] = {}
        self._data: AtomicFile | None = None
        self._data_path = path.with_name(f"{path.name}.data")
        total = sum(spec.stored_bytes for spec in contents.tensors)
        if total > INLINE_BYTES:
            self._place(contents)
            self.notes = (f"the weights are in {self._data_path.name}: keep it beside the model",)
        super().__init__(path, contents, force=force)
        try:
            if self._offsets:
                self._data = AtomicFile(self._data_path, force=force)
            self._begin()
        except BaseException:
            self.abort()
            raise

    def _begin(self) -> None:
        """Write everything but the weights."""
        file = self._output.file
        try:
            if self._data is not None:
                file.write(self._model.SerializeToString())
                return
            initializers = list(self._model.graph.initializer)
            self._model.graph.ClearField("initializer")
            parts = [self._model.graph.SerializeToString()]
            sizes = {spec.name: spec.stored_bytes for spec in self.contents.tensors}
            lengths = [len(parts[0])]
            for tensor in initializers:
                part = tensor.SerializeToString()
                room = sizes.get(tensor.name, 0)
                if tensor.name in sizes:
                    part += lead(RAW_DATA, room)
                parts.append(lead(INITIALIZER, len(part) + room) + part)
                lengths.append(len(parts[-1]) + room)
            self._model.ClearField("graph")
            head = self._model.SerializeToString() + lead(GRAPH, sum(lengths))
            file.write(head + parts[0])
            at = len(head) + lengths[0]
            for tensor, part, length in zip(initializers, parts[1:], lengths[1:], strict=True):
                file.seek(at)
                file.write(part)
                self._offsets[tensor.name] = at + len(part)
                at += length
        except OutputError:
            raise
        except Exception as error:
            raise CheckpointError(f"the ONNX model cannot be written: {error}") from None
        finally:
            self._slots = {}

    def _place(self, contents: Contents) -> None:
        at = 0
        for spec in contents.tensors:
            self._offsets[spec.name] = at
            slot = self._slots[spec.name]
            slot.data_location = import_onnx().TensorProto.EXTERNAL
            for key, value in (
                ("location", self._data_path.name),
                ("offset", at),
                ("length", spec.stored_bytes),
            ):
                entry = slot.external_data.add()
                entry.key, entry.value = key, str(value)
            at += -(-spec.stored_bytes // _ALIGNMENT) * _ALIGNMENT

    def _write(self, spec: TensorSpec, array: Array) -> None:
        self._write_part(spec, 0, array)

    def _write_part(self, spec: TensorSpec, first: int, part: Array) -> None:
        file = self._output.file if self._data is None else self._data.file
        file.seek(self._offsets[spec.name] + first * part.itemsize)
        file.write(raw_bytes(part).data)

    def _finish(self) -> None:
        return

    def _publish(self) -> None:
        if self._data is None:
            super()._publish()
            return
        self._data.commit()
        try:
            super()._publish()
        except BaseException:
            with suppress(OSError):
                self._data_path.unlink()
            raise

    def abort(self) -> None:
        """Remove the temporary files; does nothing after :meth:`commit`."""
        super().abort()
        if self._data is not None:
            self._data.abort()


def _graph(contents: Contents) -> Any:
    onnx = import_onnx()
    graph = next((file.data for file in contents.files if file.role == GRAPH_ROLE), None)
    if graph is None:
        raise CheckpointError(
            "the archive holds no ONNX graph: only what was packed from a .onnx model (with its "
            "side files) can be written as one; write .safetensors instead"
        )
    try:
        return onnx.load_model_from_string(graph)
    except Exception as error:
        raise CheckpointError(f"the archive's ONNX graph is damaged: {error}") from None


def _slots(model: Any, contents: Contents) -> dict[str, Any]:
    """Initializers that wait for the tensors."""
    slots = {tensor.name: tensor for tensor in model.graph.initializer}
    for spec in contents.tensors:
        slot = slots.get(spec.name)
        if slot is None:
            raise CheckpointError(f"the ONNX graph has no initializer {spec.name!r}")
        if (slot.data_type, tuple(slot.dims)) != (DTYPES.get(spec.dtype), spec.shape):
            raise CheckpointError(
                f"the ONNX graph wants another type or shape of {spec.name!r} than {spec.dtype} "
                f"{list(spec.shape)}: unpack it without converting"
            )
    names = {spec.name for spec in contents.tensors}
    # What had been left in the graph has data; an empty tensor needs none.
    absent = [n for n, slot in slots.items() if n not in names and slot.ByteSize() and _bare(slot)]
    if absent or contents.aliases:
        raise CheckpointError(
            f"an ONNX model needs all its weights; missing: {shorten(absent or contents.aliases)}"
        )
    return slots


def _bare(slot: Any) -> bool:
    fields = {field.name for field, _ in slot.ListFields()}
    return 0 not in slot.dims and fields <= {"name", "dims", "data_type"}
