"""ONNX in and out: initializers inside the file and beside it, the graph as a side file."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from weightvid.checkpoint import Contents, create_checkpoint, open_checkpoint
from weightvid.errors import CheckpointError
from weightvid.pack import PackOptions, pack_checkpoint
from weightvid.unpack import UnpackOptions, unpack_archive

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402


def digits_model(tensors: dict[str, np.ndarray]) -> Any:
    """The demo's CNN as an ONNX graph."""
    nodes = []

    def block(name: str, inputs: str, **more: Any) -> str:
        nodes.append(
            helper.make_node("Conv", [inputs, f"{name}.0.weight"], [f"{name}.conv"], **more)
        )
        scale, bias = f"{name}.1.weight", f"{name}.1.bias"
        mean, var = f"{name}.1.running_mean", f"{name}.1.running_var"
        nodes.append(
            helper.make_node(
                "BatchNormalization", [f"{name}.conv", scale, bias, mean, var], [f"{name}.bn"]
            )
        )
        nodes.append(helper.make_node("Relu", [f"{name}.bn"], [f"{name}.out"]))
        return f"{name}.out"

    at = block("stem", "x", pads=[1, 1, 1, 1])
    at = block("depthwise", at, pads=[1, 1, 1, 1], group=32)
    at = block("pointwise", at)
    nodes.append(helper.make_node("MaxPool", [at], ["p1"], kernel_shape=[2, 2], strides=[2, 2]))
    at = block("conv", "p1", pads=[1, 1, 1, 1])
    nodes.append(helper.make_node("MaxPool", [at], ["p2"], kernel_shape=[2, 2], strides=[2, 2]))
    nodes.append(helper.make_node("Flatten", ["p2"], ["flat"]))
    nodes.append(helper.make_node("Gemm", ["flat", "fc1.weight", "fc1.bias"], ["h"], transB=1))
    nodes.append(helper.make_node("Relu", ["h"], ["hr"]))
    nodes.append(helper.make_node("Gemm", ["hr", "fc2.weight", "fc2.bias"], ["y"], transB=1))
    floats = {n: a for n, a in tensors.items() if "num_batches" not in n}
    graph = helper.make_graph(
        nodes,
        "digits",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 1, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 10])],
        [numpy_helper.from_array(array, name) for name, array in floats.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.fixture(scope="module")
def model() -> Any:
    root = Path(__file__).resolve().parent.parent.parent
    return digits_model(load_file(root / "data" / "digits" / "digits_cnn.safetensors"))


@pytest.fixture
def path(model: Any, tmp_path: Path) -> Path:
    onnx.save(model, tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


def predictions(path: Path, images: np.ndarray) -> np.ndarray:
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (scores,) = session.run(None, {"x": images})
    return np.asarray(scores.argmax(axis=1))


def test_a_network_there_and_back(path: Path, tmp_path: Path, digits_dir: Path) -> None:
    with np.load(digits_dir / "digits_holdout.npz") as stored:
        holdout = dict(stored)
    images = (holdout["images"][:, None] / np.float32(16)).astype(np.float32)
    before = predictions(path, images)
    assert np.mean(before == holdout["labels"]) > 0.9
    pack_checkpoint(path, tmp_path / "m.mp4")
    restored = tmp_path / "restored.onnx"
    unpack_archive(tmp_path / "m.mp4", restored)
    onnx.checker.check_model(str(restored), full_check=True)
    after = predictions(restored, images)
    assert np.mean(before == after) > 0.97
    # The same weights come out as safetensors.
    unpack_archive(tmp_path / "m.mp4", tmp_path / "m.safetensors")
    weights = load_file(tmp_path / "m.safetensors")
    for tensor in onnx.load(restored).graph.initializer:
        assert np.array_equal(numpy_helper.to_array(tensor), weights[tensor.name])


def test_weights_in_constant_nodes(
    model: Any, path: Path, tmp_path: Path, digits_dir: Path
) -> None:
    """Some exporters write no initializers at all."""
    other = onnx.ModelProto()
    other.CopyFrom(model)
    del other.graph.initializer[:]
    constants = [
        helper.make_node("Constant", [], [tensor.name], value=tensor)
        for tensor in model.graph.initializer
    ]
    small = helper.make_node("Constant", [], ["few"], value_floats=[1.0, 2.0])
    nodes = list(other.graph.node)
    del other.graph.node[:]
    other.graph.node.extend([*constants, small, *nodes])
    onnx.save(other, tmp_path / "constants.onnx")
    report = pack_checkpoint(tmp_path / "constants.onnx", tmp_path / "c.mp4")
    sizes = [int(np.prod(t.dims)) for t in model.graph.initializer]
    assert report.weights == sum(size for size in sizes if size >= 16)  # the others stay
    unpack_archive(tmp_path / "c.mp4", tmp_path / "back.onnx", UnpackOptions())
    onnx.checker.check_model(str(tmp_path / "back.onnx"), full_check=True)
    pack_checkpoint(path, tmp_path / "i.mp4")
    unpack_archive(tmp_path / "i.mp4", tmp_path / "same.onnx", UnpackOptions())
    with np.load(digits_dir / "digits_holdout.npz") as stored:
        images = stored["images"]
    shown = (images.astype(np.float32) / 16).reshape(-1, 1, 8, 8)
    found = predictions(tmp_path / "back.onnx", shown)
    assert np.array_equal(found, predictions(tmp_path / "same.onnx", shown))
    # A format in which initializers must be inputs is left as it is.
    other.ir_version = 3
    onnx.save(other, tmp_path / "old.onnx")
    with open_checkpoint(tmp_path / "old.onnx") as reader:
        assert not reader.contents.tensors


def test_inline_fields_and_types(tmp_path: Path) -> None:
    bf16 = helper.make_tensor("bf16", TensorProto.BFLOAT16, [2], [1.5, -2.0])
    tensors = [
        helper.make_tensor("floats", TensorProto.FLOAT, [2, 1], [1.5, 2.5]),
        helper.make_tensor("halves", TensorProto.FLOAT16, [2], [0.5, 2.0]),
        bf16,
        helper.make_tensor("longs", TensorProto.INT64, [], [7]),
        helper.make_tensor("flags", TensorProto.BOOL, [2], [True, False]),
        helper.make_tensor("text", TensorProto.STRING, [1], ["a"]),
        helper.make_tensor("empty", TensorProto.FLOAT, [0, 3], []),
    ]
    graph = helper.make_graph([], "g", [], [], tensors)
    onnx.save(helper.make_model(graph), tmp_path / "m.onnx")
    with open_checkpoint(tmp_path / "m.onnx") as reader:
        found = {spec.name: spec.dtype for spec in reader.contents.tensors}
        assert found == {
            "floats": "F32", "halves": "F16", "bf16": "BF16", "longs": "I64", "flags": "BOOL",
            "empty": "F32",
        }  # fmt: skip
        assert reader.read("floats").tolist() == [[1.5], [2.5]]
        assert reader.read("bf16").tolist() == [0x3FC0, 0xC000]
        assert reader.read("longs").tolist() == 7
        contents, arrays = reader.contents, {name: reader.read(name) for name in found}
    write(tmp_path / "n.onnx", contents, arrays)
    made = {
        t.name: numpy_helper.to_array(t) for t in onnx.load(tmp_path / "n.onnx").graph.initializer
    }
    before = {t.name: numpy_helper.to_array(t) for t in tensors}
    assert made.keys() == before.keys()
    for name, array in before.items():
        assert np.array_equal(made[name], array)
        assert made[name].shape == array.shape


def write(path: Path, contents: Contents, arrays: dict[str, Any]) -> tuple[str, ...]:
    with create_checkpoint(path, contents) as writer:
        for name, array in arrays.items():
            writer.write(name, array)
        return writer.notes


def external(path: Path, model: Any) -> Path:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    onnx.save(copy, path, save_as_external_data=True, location="weights.data", size_threshold=100)
    return path


def test_external_data(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = external(tmp_path / "m.onnx", model)
    expected = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    with open_checkpoint(path) as reader:
        for name, array in expected.items():
            assert np.array_equal(reader.read(name), array)
        contents = reader.contents
    monkeypatch.setattr("weightvid.checkpoint.onnx_writer.INLINE_BYTES", 1000)
    out = tmp_path / "out" / "n.onnx"
    out.parent.mkdir()
    notes = write(out, contents, expected)
    assert "n.onnx.data" in notes[0]
    assert sorted(p.name for p in out.parent.iterdir()) == ["n.onnx", "n.onnx.data"]
    onnx.checker.check_model(str(out))
    for tensor in onnx.load(out).graph.initializer:
        assert np.array_equal(numpy_helper.to_array(tensor), expected[tensor.name])


def test_bad_external_data(model: Any, tmp_path: Path) -> None:
    path = external(tmp_path / "m.onnx", model)
    data = tmp_path / "weights.data"
    whole = data.read_bytes()
    data.write_bytes(whole[:-5000])
    with pytest.raises(CheckpointError, match="cut short"):
        open_checkpoint(path)
    data.unlink()
    with pytest.raises(CheckpointError, match=r"weights\.data, which is missing"):
        open_checkpoint(path)
    stray = onnx.load(path, load_external_data=False)
    for tensor in stray.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../weights.data"
    path.write_bytes(stray.SerializeToString())
    with pytest.raises(CheckpointError, match="does not lie in its folder"):
        open_checkpoint(path)


@pytest.mark.parametrize("content", [b"\x08", b"\x08\x07\x12\x07pytorch", b"\x08" + b"\xff" * 40])
def test_no_model(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(CheckpointError, match="no valid ONNX model"):
        open_checkpoint(tmp_path / "m.onnx")


def test_what_cannot_be_written(path: Path, tmp_path: Path) -> None:
    pack_checkpoint(path, tmp_path / "m.mp4")
    pack_checkpoint(path, tmp_path / "bare.mp4", PackOptions(side_files=False))
    out = tmp_path / "n.onnx"
    with pytest.raises(CheckpointError, match="holds no ONNX graph"):
        unpack_archive(tmp_path / "bare.mp4", out)
    with pytest.raises(CheckpointError, match="without converting"):
        unpack_archive(tmp_path / "m.mp4", out, UnpackOptions(dtype="F16"))
    with pytest.raises(CheckpointError, match="needs all its weights"):
        unpack_archive(tmp_path / "m.mp4", out, UnpackOptions(tensors=("conv.*",)))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bare.mp4", "m.mp4", "m.onnx"]


@given(cut=st.integers(1, 3000), flips=st.lists(st.integers(0, 1 << 14), max_size=3))
@settings(max_examples=60)
def test_damage_is_an_error_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, cut: int, flips: list[int]
) -> None:
    tensors = [numpy_helper.from_array(np.ones((4, 5 + i), np.float32), f"w{i}") for i in range(4)]
    node = helper.make_node("Relu", ["w0"], ["y"])
    graph = helper.make_graph([node], "g", [], [], tensors)
    data = bytearray(helper.make_model(graph).SerializeToString())
    for flip in flips:
        data[flip // 8 % len(data)] ^= 1 << flip % 8
    path = tmp_path_factory.getbasetemp() / "fuzz.onnx"
    path.write_bytes(data[:cut] if not flips else data)
    try:
        with open_checkpoint(path) as reader:
            for spec in reader.contents.tensors:
                reader.read(spec.name)
    except CheckpointError:
        pass


def test_weights_do_not_pass_through_memory_together(tmp_path: Path) -> None:
    """Neither when a model is opened nor when one is written."""
    names = [f"w{i}" for i in range(8)]
    big = np.ones((1 << 20,), np.float32)
    graph = helper.make_graph([], "g", [], [], [numpy_helper.from_array(big, n) for n in names])
    onnx.save(helper.make_model(graph), tmp_path / "m.onnx")
    del graph
    tracemalloc.start()
    with (
        open_checkpoint(tmp_path / "m.onnx") as reader,
        create_checkpoint(tmp_path / "n.onnx", reader.contents) as writer,
    ):
        for name in reversed(names):
            writer.write(name, reader.read(name))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * big.nbytes
    restored = onnx.load(tmp_path / "n.onnx")
    assert [t.name for t in restored.graph.initializer] == names
    assert all(np.array_equal(numpy_helper.to_array(t), big) for t in restored.graph.initializer)


def test_parts_and_ranges(model: Any, path: Path, tmp_path: Path) -> None:
    expected = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    with (
        open_checkpoint(path) as reader,
        create_checkpoint(tmp_path / "n.onnx", reader.contents) as writer,
    ):
        for name, array in expected.items():
            flat = array.reshape(-1)
            middle = flat.size // 3
            assert np.array_equal(reader.read_range(name, middle, 5), flat[middle : middle + 5])
            ranges = ((at, min(100, flat.size - at)) for at in range(0, flat.size, 100))
            writer.write_parts(name, (reader.read_range(name, *one) for one in ranges))
    for tensor in onnx.load(tmp_path / "n.onnx").graph.initializer:
        assert np.array_equal(numpy_helper.to_array(tensor), expected[tensor.name])


def constant(path: Path, location: str) -> None:
    """A model with a constant whose data lie in another file, and not as an initializer."""
    tensor = numpy_helper.from_array(np.ones((3, 3), np.float32), "c")
    node = helper.make_node("Constant", [], ["y"], value=tensor)
    value = node.attribute[0].t
    value.ClearField("raw_data")
    value.data_location = TensorProto.EXTERNAL
    entry = value.external_data.add()
    entry.key, entry.value = "location", location
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [3, 3])]
    graph = helper.make_graph([node], "g", [], outputs)
    path.write_bytes(helper.make_model(graph).SerializeToString())


def test_external_data_elsewhere_in_the_graph(tmp_path: Path) -> None:
    constant(tmp_path / "m.onnx", "c.data")
    with pytest.raises(CheckpointError, match="no initializers of its graph"):
        open_checkpoint(tmp_path / "m.onnx")


def test_a_name_twice(tmp_path: Path) -> None:
    tensors = [numpy_helper.from_array(np.full(3, i, np.float32), "w") for i in range(2)]
    model = helper.make_model(helper.make_graph([], "g", [], [], tensors))
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(CheckpointError, match="two tensors are named 'w'"):
        open_checkpoint(tmp_path / "m.onnx")
