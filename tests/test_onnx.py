"""A session of onnxruntime straight from an archive."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from weightvid.errors import CheckpointError
from weightvid.numpy import save_file
from weightvid.onnx import session
from weightvid.pack import PackOptions, pack_checkpoint
from weightvid.unpack import unpack_archive

onnxruntime = pytest.importorskip("onnxruntime")


def network() -> onnx.ModelProto:
    """Convolution, flattened product in half precision, an integer constant, an empty one."""
    draw = np.random.default_rng(0).standard_normal
    weights = {
        "kernels": draw((24, 3, 3, 3), np.float32) / 5,
        "bias": draw(24, np.float32),
        "half": (draw((24 * 36, 10)) / 30).astype(np.float16),
        "shape": np.array([1, -1], np.int64),
        "unused": draw((40, 40), np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["x", "kernels", "bias"], ["a"]),
        helper.make_node("Reshape", ["a", "shape"], ["b"]),
        helper.make_node("Cast", ["b"], ["c"], to=TensorProto.FLOAT16),
        helper.make_node("MatMul", ["c", "half"], ["d"]),
        helper.make_node("Cast", ["d"], ["y"], to=TensorProto.FLOAT),
    ]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in (("x", [1, 3, 8, 8]), ("y", [1, 10]))
    ]
    initializers = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "net", ends[:1], ends[1:], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_session_computes_what_the_unpacked_model_does(tmp_path: Path) -> None:
    onnx.save(network(), tmp_path / "m.onnx")
    pack_checkpoint(tmp_path / "m.onnx", tmp_path / "m.mp4", PackOptions(jobs=1))
    unpack_archive(tmp_path / "m.mp4", tmp_path / "back.onnx")
    x = {"x": np.random.default_rng(1).standard_normal((1, 3, 8, 8)).astype(np.float32)}
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    found = session(tmp_path / "m.mp4", options, providers=["CPUExecutionProvider"]).run(None, x)
    restored = onnxruntime.InferenceSession(tmp_path / "back.onnx").run(None, x)
    original = onnxruntime.InferenceSession(tmp_path / "m.onnx").run(None, x)
    assert found[0].tobytes() == restored[0].tobytes() != original[0].tobytes()
    assert np.abs(found[0] - original[0]).max() < 0.2 * np.abs(original[0]).max()


def test_an_archive_without_a_graph(tmp_path: Path) -> None:
    save_file({"w": np.ones((20, 20), np.float32)}, tmp_path / "a.mp4")
    with pytest.raises(CheckpointError, match="no ONNX graph"):
        session(tmp_path / "a.mp4")
