"""Integer ONNX graphs from archives: near the float graph, and the same bits folded or not."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from weightvid.cli.app import app
from weightvid.errors import CheckpointError
from weightvid.int8 import export_int8
from weightvid.loader import open_archive
from weightvid.numpy import save_file
from weightvid.pack import PackOptions, pack_checkpoint

SHAPE = (64, 3, 12, 12)


@pytest.fixture(scope="module")
def onnx() -> Any:
    pytest.importorskip("onnxruntime", reason="needs the extra: weightvid[onnxruntime]")
    return pytest.importorskip("onnx", reason="needs the extra: weightvid[onnx]")


def examples(seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(0.4, 1, SHAPE).astype(np.float32)


def save(onnx: Any, path: Path) -> Path:
    """Two convolutions without a ReLU between, so that zero points are not at the end; a third."""
    chance = np.random.default_rng(1)
    helper = onnx.helper
    arrays = {
        "w1": chance.normal(0, 0.2, (16, 3, 3, 3)), "w2": chance.normal(0, 0.1, (24, 16, 3, 3)),
        "w3": chance.normal(0, 0.3, (24, 1, 3, 3)), "fc": chance.normal(0, 0.1, (10, 24)),
        "b1": chance.normal(0, 0.1, 16), "bfc": chance.normal(0, 0.1, 10),
        "gamma": chance.normal(0, 1, 24), "beta": chance.normal(0, 0.3, 24),
        "mean": chance.normal(0, 0.3, 24), "variance": chance.uniform(0.5, 2, 24),
    }  # fmt: skip
    arrays["gamma"][3] = 0
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["c1"], pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["c1", "w2"], ["c2"], pads=[0, 1, 2, 1], strides=[2, 2]),
        helper.make_node(
            "BatchNormalization", ["c2", "gamma", "beta", "mean", "variance"], ["n2"], epsilon=1e-3
        ),
        helper.make_node("Relu", ["n2"], ["r2"]),
        helper.make_node("Conv", ["r2", "w3"], ["c3"], group=24, pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["c3", "r2"], ["a"]),
        helper.make_node("GlobalAveragePool", ["a"], ["g"]),
        helper.make_node("Flatten", ["g"], ["f"]),
        helper.make_node("Gemm", ["f", "fc", "bfc"], ["y"], transB=1),
    ]
    floats = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info("x", floats, ["n", *SHAPE[1:]])],
        [helper.make_tensor_value_info("y", floats, ["n", 10])],
        [onnx.numpy_helper.from_array(a.astype(np.float32), n) for n, a in arrays.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    onnx.save(model, path)
    return path


def run(path: Path, inputs: Any) -> Any:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": inputs})[0]


@pytest.fixture(scope="module")
def graphs(onnx: Any, tmp_path_factory: Any) -> Path:
    folder: Path = tmp_path_factory.mktemp("int8")
    save(onnx, folder / "float.onnx")
    options = PackOptions(step_factor=0.13, fidelity="integers")
    pack_checkpoint(folder / "float.onnx", folder / "model.mp4", options)
    return folder


def test_integers_compute_what_floats_do(onnx: Any, graphs: Path) -> None:
    given = graphs / "model.mp4", graphs / "float.onnx", {"x": examples()}
    made = export_int8(*given, graphs / "folded.onnx")
    export_int8(*given, graphs / "unfolded.onnx", fold=False)
    # Those of fewer than 256 weights have no levels in an archive.
    assert made.own == ("w1", "w2")
    assert made.requantized == ("w3", "fc")
    wanted = run(graphs / "float.onnx", examples(5))
    folded, unfolded = (
        run(graphs / f"{name}.onnx", examples(5)) for name in ("folded", "unfolded")
    )
    assert np.array_equal(folded, unfolded)
    assert np.square(folded - wanted).sum() < 0.03 * np.square(wanted - wanted.mean(0)).sum()
    model = onnx.load(graphs / "folded.onnx")
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("QLinearConv") == 3
    assert kinds.count("MatMulInteger") == 1
    # Inputs behind a ReLU have the zero point 0, and need no border of their own.
    assert kinds.count("Pad") == 2
    slots = {slot.name: onnx.numpy_helper.to_array(slot) for slot in model.graph.initializer}
    with open_archive(graphs / "model.mp4") as archive:
        assert np.array_equal(slots["c1_weight"], archive.levels("w1").values)
    assert slots["c1_input_zero"] == 0


def test_borders_of_zero_are_wrong(onnx: Any, graphs: Path) -> None:
    export_int8(
        graphs / "model.mp4",
        graphs / "float.onnx",
        {"x": examples()},
        graphs / "f.onnx",
        force=True,
    )
    model = onnx.load(graphs / "f.onnx")
    for slot in model.graph.initializer:
        if slot.name.endswith("_border"):
            slot.CopyFrom(onnx.numpy_helper.from_array(np.asarray(np.uint8(0)), slot.name))
    onnx.save(model, graphs / "trap.onnx")
    wanted = run(graphs / "f.onnx", examples(5))
    assert np.abs(run(graphs / "trap.onnx", examples(5)) - wanted).max() > 0.01


def test_examples_must_fit(onnx: Any, graphs: Path, tmp_path: Path) -> None:
    given = graphs / "model.mp4", graphs / "float.onnx"
    with pytest.raises(CheckpointError, match="lack the input 'x'"):
        export_int8(*given, {"y": examples(), "z": examples()}, tmp_path / "a.onnx")
    with pytest.raises(CheckpointError, match="does not run"):
        export_int8(*given, {"x": examples()[:, :2]}, tmp_path / "a.onnx")
    for wrong, said in (
        (np.ones((), np.float32), "the shape []"), (examples()[:0], "the shape [0,"),
        (0 * examples(), "are all 0"),
    ):  # fmt: skip
        with pytest.raises(CheckpointError, match=re.escape(said)):
            export_int8(*given, {"x": wrong}, tmp_path / "a.onnx")
    np.save(tmp_path / "x.npy", examples())
    with pytest.raises(CheckpointError, match="one array without a name"):
        export_int8(*given, tmp_path / "x.npy", tmp_path / "a.onnx")
    np.savez(tmp_path / "x.npz", any_name=examples())
    assert export_int8(*given, tmp_path / "x.npz", tmp_path / "a.onnx").file_bytes > 1000
    with pytest.raises(CheckpointError, match="no example inputs"):
        export_int8(*given, tmp_path / "none.npz", tmp_path / "b.onnx")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_examples_are_finite(onnx: Any, graphs: Path, tmp_path: Path, value: float) -> None:
    given, inputs = (graphs / "model.mp4", graphs / "float.onnx"), examples()
    inputs[3, 2, 1, 0] = value
    np.savez(tmp_path / "x.npz", x=inputs)
    with pytest.raises(CheckpointError, match="the input 'x' hold NaN or infinity"):
        export_int8(*given, tmp_path / "x.npz", tmp_path / "a.onnx")
    assert not (tmp_path / "a.onnx").exists()


def test_what_examples_make_is_finite(onnx: Any, graphs: Path, tmp_path: Path) -> None:
    given = graphs / "model.mp4", graphs / "float.onnx"
    with pytest.raises(CheckpointError, match=r"make '.*' NaN or infinite"):
        export_int8(*given, {"x": np.full(SHAPE, 3e38, np.float32)}, tmp_path / "a.onnx")


def test_what_is_no_graph_is_refused(onnx: Any, graphs: Path, tmp_path: Path) -> None:
    path, inputs, target = tmp_path / "g.onnx", {"x": examples()}, tmp_path / "a.onnx"
    model = onnx.load(graphs / "float.onnx")
    nodes = list(model.graph.node)[::-1]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    for data in (b"", b"\x20\0\0\0\0\0\0\0{no graph}", model.SerializeToString()):
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=r"g\.onnx is no valid ONNX model: ."):
            export_int8(graphs / "model.mp4", path, inputs, target)
    with pytest.raises(FileNotFoundError):
        export_int8(graphs / "model.mp4", tmp_path / "absent.onnx", inputs, target)


def test_weights_that_do_not_fit_the_graph(onnx: Any, graphs: Path, tmp_path: Path) -> None:
    save_file({"fc": np.ones((10, 12, 2), np.float32)}, tmp_path / "other.mp4")
    with pytest.raises(CheckpointError, match="does not run with the weights of the archive"):
        export_int8(
            tmp_path / "other.mp4", graphs / "float.onnx", {"x": examples()}, tmp_path / "a.onnx"
        )
    save_file({"other": np.ones((10, 12), np.float32)}, tmp_path / "other.mp4")
    with pytest.raises(CheckpointError, match="none of the graph's initializers"):
        export_int8(
            tmp_path / "other.mp4", graphs / "float.onnx", {"x": examples()}, tmp_path / "a.onnx"
        )


@pytest.mark.parametrize("kind", ["FLOAT", "FLOAT16"])
def test_one_layer(onnx: Any, tmp_path: Path, kind: str) -> None:
    dtype = np.float32 if kind == "FLOAT" else np.float16
    weights = np.random.default_rng(2).normal(0, 0.1, (64, 32)).astype(dtype)
    info = onnx.helper.make_tensor_value_info
    ends = [
        info(name, onnx.TensorProto.DataType.Value(kind), ["n", size])
        for name, size in (("x", 64), ("y", 32))
    ]
    nodes = [onnx.helper.make_node("MatMul", ["x", "w"], ["y"])]
    slots = [onnx.numpy_helper.from_array(weights, "w")]
    graph = onnx.helper.make_graph(nodes, "g", ends[:1], ends[1:], slots)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)])
    model.ir_version = 8
    onnx.save(model, tmp_path / "g.onnx")
    pack_checkpoint(tmp_path / "g.onnx", tmp_path / "g.mp4", PackOptions(fidelity="integers"))
    inputs = np.random.default_rng(3).normal(0, 1, (50, 64)).astype(dtype)
    given = tmp_path / "g.mp4", tmp_path / "g.onnx", {"x": inputs}, tmp_path / "a.onnx"
    if kind == "FLOAT16":
        with pytest.raises(CheckpointError, match="constant float32 weights"):
            export_int8(*given)
        return
    assert export_int8(*given).own == ("w",)
    assert np.abs(run(tmp_path / "a.onnx", inputs) - inputs @ weights).max() < 0.1


@pytest.mark.parametrize("name", ["model.mp4", "float.onnx", "x.npz"])
def test_sources_are_not_overwritten(onnx: Any, graphs: Path, tmp_path: Path, name: str) -> None:
    for each in ("model.mp4", "float.onnx"):
        (tmp_path / each).write_bytes((graphs / each).read_bytes())
    np.savez(tmp_path / "x.npz", x=examples())
    (tmp_path / "link").symlink_to(name)
    given = tmp_path / "model.mp4", tmp_path / "float.onnx", tmp_path / "x.npz"
    before = [path.read_bytes() for path in given]
    with pytest.raises(CheckpointError, match="itself"):
        export_int8(*given, tmp_path / "link", force=True)
    arguments = [
        "export-int8", str(given[0]), "-g", str(given[1]), "--calibration", str(given[2]),
        "-o", str(tmp_path / name), "-f",
    ]  # fmt: skip
    assert CliRunner().invoke(app, arguments).exit_code == 2
    assert [path.read_bytes() for path in given] == before


def test_a_graph_without_layers_is_refused(onnx: Any, graphs: Path, tmp_path: Path) -> None:
    helper, floats = onnx.helper, onnx.TensorProto.FLOAT
    values = [helper.make_tensor_value_info(name, floats, [1]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", values[:1], values[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    onnx.save(model, tmp_path / "relu.onnx")
    with pytest.raises(CheckpointError, match="no convolution"):
        export_int8(
            graphs / "model.mp4", tmp_path / "relu.onnx", {"x": np.ones(1)}, tmp_path / "a.onnx"
        )


def test_command_line(onnx: Any, graphs: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=examples())
    arguments = [
        "export-int8", str(graphs / "model.mp4"), "-g", str(graphs / "float.onnx"),
        "--calibration", str(tmp_path / "x.npz"), "-o", str(tmp_path / "int8.onnx"), "--json",
    ]  # fmt: skip
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    made = json.loads(result.stdout)
    assert made["own"] == ["w1", "w2"]
    assert made["file_bytes"] == (tmp_path / "int8.onnx").stat().st_size
    for graph, status in (("x.npz", 1), ("absent.onnx", 4)):
        arguments[3] = str(tmp_path / graph)
        assert CliRunner().invoke(app, arguments).exit_code == status
