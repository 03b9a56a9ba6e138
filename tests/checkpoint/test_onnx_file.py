"""ONNX in and out: initializers inside the file and outside, the graph as a side file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import normal, save

from weightvid.checkpoint import Contents, create_checkpoint, open_checkpoint
from weightvid.errors import CheckpointError
from weightvid.spec import TensorSpec

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

ARRAYS = {"fc.weight": normal(1, 30, 64), "fc.bias": normal(2, 30)}


def model_of(nodes: list[Any], tensors: list[Any], ir_version: int = 8) -> Any:
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 30])],
        tensors,
    )
    opset = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=opset, ir_version=ir_version)


def linear(constants: bool = False, ir_version: int = 8) -> Any:
    """A network of one layer, its weights in initializers or in nodes."""
    tensors = [numpy_helper.from_array(array, name) for name, array in ARRAYS.items()]
    nodes = [helper.make_node("Gemm", ["x", *ARRAYS], ["y"], transB=1)]
    if constants:
        few = helper.make_node("Constant", [], ["few"], value_floats=[1.0, 2.0])
        made = [helper.make_node("Constant", [], [t.name], value=t) for t in tensors]
        nodes, tensors = [*made, few, *nodes], []
    return model_of(nodes, tensors, ir_version)


def outputs(path: Path) -> Any:
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": normal(3, 5, 64)})[0]


@pytest.mark.parametrize("constants", [False, True])
@pytest.mark.parametrize("external", [False, True])
def test_a_network_there_and_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, constants: bool, external: bool
) -> None:
    path, out = tmp_path / "m.onnx", tmp_path / "n.onnx"
    where = {"location": "w.data", "size_threshold": 100} if external and not constants else {}
    onnx.save(linear(constants), path, save_as_external_data=bool(where), **where)
    before = outputs(path)
    monkeypatch.setattr("weightvid.checkpoint.onnx_file.INLINE_BYTES", 100 if external else 1e9)
    with open_checkpoint(path) as reader:
        assert {spec.name for spec in reader.contents.tensors} == set(ARRAYS)
        for name, array in ARRAYS.items():
            assert np.array_equal(reader.read(name), array)
        assert (
            reader.read_range("fc.weight", 65, 3).tolist() == ARRAYS["fc.weight"][1, 1:4].tolist()
        )
        notes = save(out, reader)
    assert ("n.onnx.data" in "".join(notes)) == (tmp_path / "n.onnx.data").is_file() == external
    onnx.checker.check_model(str(out), full_check=True)
    assert np.array_equal(outputs(out), before)
    assert len(list(tmp_path.iterdir())) == 2 + bool(where) + external


def test_fields_and_types(tmp_path: Path) -> None:
    tensors = [
        helper.make_tensor("floats", TensorProto.FLOAT, [2, 1], [1.5, 2.5]),
        helper.make_tensor("halves", TensorProto.FLOAT16, [2], [0.5, 2.0]),
        helper.make_tensor("bf16", TensorProto.BFLOAT16, [2], [1.5, -2.0]),
        helper.make_tensor("longs", TensorProto.INT64, [], [7]),
        helper.make_tensor("flags", TensorProto.BOOL, [2], [True, False]),
        helper.make_tensor("text", TensorProto.STRING, [1], ["a"]),
        helper.make_tensor("empty", TensorProto.FLOAT, [0, 3], []),
    ]
    onnx.save(model_of([], tensors), tmp_path / "m.onnx")
    with open_checkpoint(tmp_path / "m.onnx") as reader:
        assert {spec.name: spec.dtype for spec in reader.contents.tensors} == {
            "floats": "F32", "halves": "F16", "bf16": "BF16", "longs": "I64", "flags": "BOOL",
            "empty": "F32",
        }  # fmt: skip
        assert reader.read("floats").tolist() == [[1.5], [2.5]]
        assert reader.read("bf16").tolist() == [0x3FC0, 0xC000]
        assert reader.read("longs").tolist() == 7
        save(tmp_path / "n.onnx", reader)
    made = {t.name: t for t in onnx.load(tmp_path / "n.onnx").graph.initializer}
    assert made.keys() == {t.name for t in tensors}
    for tensor in tensors:
        before, after = map(numpy_helper.to_array, (tensor, made[tensor.name]))
        assert before.shape == after.shape
        assert np.array_equal(before, after)


def test_bad_external_data(tmp_path: Path) -> None:
    path, data = tmp_path / "m.onnx", tmp_path / "w.data"
    onnx.save(linear(), path, save_as_external_data=True, location="w.data", size_threshold=0)
    sound, content = path.read_bytes(), data.read_bytes()
    for new, said in ((content[:-50], "cannot be read: mmap length"), (None, "No such file")):
        data.unlink()
        if new is not None:
            data.write_bytes(new)
        with pytest.raises(CheckpointError, match=said):
            open_checkpoint(path)
        data.touch()
    for key, value, said in (
        ("location", "../w.data", "does not lie in the model's folder"),
        ("length", "7", "the model places 7"),
        ("offset", "-5", "cannot be read"),
        ("offset", "many", "cannot be read"),
    ):
        stray = onnx.load_model_from_string(sound)
        for entry in stray.graph.initializer[0].external_data:
            entry.value = value if entry.key == key else entry.value
        path.write_bytes(stray.SerializeToString())
        with pytest.raises(CheckpointError, match=said):
            open_checkpoint(path)


def test_external_data_elsewhere_in_the_graph(tmp_path: Path) -> None:
    node = helper.make_node("Constant", [], ["y"], value=numpy_helper.from_array(normal(4, 3), "c"))
    value = node.attribute[0].t
    onnx.external_data_helper.set_external_data(value, "c.data")
    value.ClearField("raw_data")
    (tmp_path / "m.onnx").write_bytes(model_of([node], []).SerializeToString())
    with pytest.raises(CheckpointError, match="no initializers of its graph"):
        open_checkpoint(tmp_path / "m.onnx")
    # In an old format initializers had to be inputs of the graph: it is left as it is.
    onnx.save(linear(constants=True, ir_version=3), tmp_path / "old.onnx")
    with open_checkpoint(tmp_path / "old.onnx") as reader:
        assert not reader.contents.tensors


@pytest.mark.parametrize("content", [b"\x08", b"\x08\x07\x12\x07pytorch", b"\x08" + b"\xff" * 40])
def test_no_model(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(CheckpointError, match="no valid ONNX model"):
        open_checkpoint(tmp_path / "m.onnx")


def test_what_cannot_be_written(tmp_path: Path) -> None:
    onnx.save(linear(), tmp_path / "m.onnx")
    with open_checkpoint(tmp_path / "m.onnx") as reader:
        weight, bias = reader.contents.tensors
        files = reader.contents.files
    for contents, said in (
        (Contents((weight, bias)), "holds no ONNX graph"),
        (Contents((weight,), files=files), r"needs all its weights; missing: fc\.bias"),
        (Contents((TensorSpec(weight.name, "F16", weight.shape),), files=files), "converting"),
        (Contents((TensorSpec("other", "F32", (3,)),), files=files), "no initializer 'other'"),
    ):
        with pytest.raises(CheckpointError, match=said):
            create_checkpoint(tmp_path / "n.onnx", contents)
    twice = [numpy_helper.from_array(normal(i, 3), "w") for i in range(2)]
    onnx.save(model_of([], twice), tmp_path / "m.onnx")
    with pytest.raises(CheckpointError, match="two tensors are named 'w'"):
        open_checkpoint(tmp_path / "m.onnx")
