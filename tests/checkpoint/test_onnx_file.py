"""ONNX in and out: initializers inside the file and outside, the graph as a side file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import normal, save

from weightvid.checkpoint import Contents, create_checkpoint, open_checkpoint
from weightvid.errors import CheckpointError, OutputError
from weightvid.loader import TensorSpec

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


def test_a_model_that_cannot_be_written_keeps_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weightvid.checkpoint.onnx_file.INLINE_BYTES", 100)
    onnx.save(linear(), tmp_path / "m.onnx")
    with open_checkpoint(tmp_path / "m.onnx") as reader:
        save(tmp_path / "n.onnx", reader)
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        with monkeypatch.context() as patch, pytest.raises(OutputError):

            def full(*_: object) -> None:
                raise OSError(28, "No space left on device")

            patch.setattr("weightvid.checkpoint.onnx_file.Writer._publish", full)
            save(tmp_path / "n.onnx", reader, force=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


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
    for new, said in ((content[:-50], "the file is cut short"), (None, "there is no file")):
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


def test_names_of_external_data(tmp_path: Path) -> None:
    """``./w.bin`` is ``w.bin``; two tensors at one place are one; links don't lead out."""
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "w.bin").write_bytes(np.arange(6, dtype="f4").tobytes() + b"more than is needed")
    tensors = [helper.make_tensor(name, 1, [2, 3], bytes(24), raw=True) for name in "ab"]
    for tensor in tensors:
        onnx.external_data_helper.set_external_data(tensor, "./w.bin", 0, 24)
        tensor.ClearField("raw_data")
    model = model_of([], tensors)
    (folder / "m.onnx").write_bytes(model.SerializeToString())
    with open_checkpoint(folder / "m.onnx") as reader:
        assert reader.contents.aliases == {"b": "a"}
        assert reader.read("b").tolist() == [[0, 1, 2], [3, 4, 5]]
        save(tmp_path / "n.onnx", reader)
    made = {
        t.name: numpy_helper.to_array(t) for t in onnx.load(tmp_path / "n.onnx").graph.initializer
    }
    assert made["a"].tolist() == made["b"].tolist() == [[0, 1, 2], [3, 4, 5]]
    (folder / "w.bin").rename(tmp_path / "w.bin")
    (folder / "w.bin").symlink_to(tmp_path / "w.bin")
    with pytest.raises(CheckpointError, match="a link that leads out of the model's folder"):
        open_checkpoint(folder / "m.onnx")


def test_many_external_tensors_need_few_descriptors(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    (tmp_path / "w.bin").write_bytes(bytes(400))
    tensors = []
    for number in range(100):
        tensors.append(helper.make_tensor(f"t{number}", 1, [1], bytes(4), raw=True))
        onnx.external_data_helper.set_external_data(tensors[-1], "w.bin", 4 * number, 4)
        tensors[-1].ClearField("raw_data")
    (tmp_path / "m.onnx").write_bytes(model_of([], tensors).SerializeToString())
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len([*Path("/dev/fd").iterdir()]) + 40, limits[1]))
    try:
        with open_checkpoint(tmp_path / "m.onnx") as reader:
            assert len(reader.contents.tensors) == 100
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def branching() -> Any:
    """Weights in both branches of an If, under one name, and in a function."""
    value = helper.make_tensor_value_info
    branches = []
    for number in (1, 2):
        weights = numpy_helper.from_array(normal(number, 4, 8), "w")
        constant = helper.make_node(
            "Constant", [], ["c"], value=numpy_helper.from_array(normal(number + 2, 4, 8), "")
        )
        add = [
            helper.make_node("Add", ["x", "w"], ["s"]),
            helper.make_node("Mul", ["s", "c"], ["y"]),
        ]
        branches.append(
            helper.make_graph(
                [constant, *add], f"b{number}", [], [value("y", 1, [4, 8])], [weights]
            )
        )
    inside = helper.make_node(
        "Constant", [], ["k"], value=numpy_helper.from_array(normal(5, 4, 8), "k")
    )
    opset = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]
    function = helper.make_function(
        "own",
        "Shift",
        ["a"],
        ["b"],
        [inside, helper.make_node("Add", ["a", "k"], ["b"])],
        opset[:1],
    )
    nodes = [
        helper.make_node("If", ["flag"], ["i"], then_branch=branches[0], else_branch=branches[1]),
        helper.make_node("Shift", ["i"], ["z"], domain="own"),
    ]
    graph = helper.make_graph(
        nodes, "g", [value("x", 1, [4, 8]), value("flag", 9, [])], [value("z", 1, [4, 8])]
    )
    return helper.make_model(graph, functions=[function], opset_imports=opset, ir_version=9)


def test_weights_in_branches_and_functions(tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    onnx.save(branching(), tmp_path / "m.onnx")
    with open_checkpoint(tmp_path / "m.onnx") as reader:
        found = {spec.name: reader.read(spec.name) for spec in reader.contents.tensors}
        assert sorted(found) == ["Shift.k", "c", "c.1", "w", "w.1"]
        for name, seed in (("w", 2), ("w.1", 1), ("c", 4), ("c.1", 3), ("Shift.k", 5)):
            assert np.array_equal(found[name], normal(seed, 4, 8))
        assert len(reader.contents.files[0].data) < 1000, "the weights are not in the graph, too"
        save(tmp_path / "n.onnx", reader)
    for flag in (True, False):
        feeds = {"x": normal(9, 4, 8), "flag": np.array(flag)}
        before, after = (
            runtime.InferenceSession(tmp_path / name).run(None, feeds)[0]
            for name in ("m.onnx", "n.onnx")
        )
        assert np.array_equal(before, after)


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
