"""LiteRT in and out: constants by their names, the rest of the file as a template."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import normal, save

from weightvid.checkpoint import Contents, create_checkpoint, open_checkpoint
from weightvid.checkpoint.tflite_file import GRAPH_ROLE
from weightvid.errors import CheckpointError
from weightvid.loader import TensorSpec
from weightvid.spec import SideFile

pytest.importorskip("tflite")
schema = pytest.importorskip("ai_edge_litert.schema_py_generated")
Op, Type = schema.BuiltinOperator, schema.TensorType

CONV = normal(1, 6, 3, 5, 4)
DEPTHWISE = normal(2, 1, 3, 3, 6).astype("f2")
DENSE = normal(3, 7, 6)


class Graph:
    """A graph under construction; tensors are numbers."""

    def __init__(self) -> None:
        self.graph = schema.SubGraphT()
        self.graph.tensors, self.graph.operators = [], []
        self.model = schema.ModelT()
        self.model.version, self.model.subgraphs = 3, [self.graph]
        self.model.operatorCodes, self.model.buffers = [], [schema.BufferT()]

    def tensor(self, name: str, shape: Any, data: Any = None, kind: Any = Type.FLOAT32) -> int:
        made = schema.TensorT()
        made.name, made.shape, made.type, made.buffer = name, list(shape), kind, 0
        if data is not None:
            buffer = schema.BufferT()
            buffer.data = np.frombuffer(data.tobytes(), np.uint8)
            self.model.buffers.append(buffer)
            made.buffer = len(self.model.buffers) - 1
        self.graph.tensors.append(made)
        return len(self.graph.tensors) - 1

    def add(self, code: int, inputs: list[int], output: int, options: str = "", **more: Any) -> int:
        known, operator = schema.OperatorCodeT(), schema.OperatorT()
        known.builtinCode, known.deprecatedBuiltinCode = code, min(code, 127)
        self.model.operatorCodes.append(known)
        operator.opcodeIndex, operator.inputs = len(self.model.operatorCodes) - 1, inputs
        operator.outputs = [output]
        if options:
            operator.builtinOptionsType = getattr(schema.BuiltinOptions, options)
            operator.builtinOptions = getattr(schema, f"{options}T")()
            for key, value in more.items():
                setattr(operator.builtinOptions, key, value)
        self.graph.operators.append(operator)
        return output

    def save(self, path: Path, inputs: list[int], outputs: list[int]) -> bytes:
        flatbuffers = pytest.importorskip("flatbuffers")
        self.graph.inputs, self.graph.outputs = inputs, outputs
        builder = flatbuffers.Builder(1024)
        builder.Finish(self.model.Pack(builder), b"TFL3")
        path.write_bytes(bytes(builder.Output()))
        return path.read_bytes()


def network(path: Path) -> bytes:
    """Two convolutions, one of float16 weights, and a layer behind them."""
    net = Graph()
    image = net.tensor("image", (1, 9, 9, 4))
    shared = net.tensor("bias", (6,), normal(4, 6))
    steps = {"strideH": 1, "strideW": 1}
    filters = net.tensor("conv", CONV.shape, CONV)
    seen = net.add(
        Op.CONV_2D, [image, filters, shared], net.tensor("seen", (1, 9, 9, 6)), "Conv2DOptions",
        **steps,
    )  # fmt: skip
    half = net.tensor("depthwise", DEPTHWISE.shape, DEPTHWISE, Type.FLOAT16)
    wide = net.add(Op.DEQUANTIZE, [half], net.tensor("wide", DEPTHWISE.shape), "DequantizeOptions")
    spread = net.add(
        Op.DEPTHWISE_CONV_2D, [seen, wide, shared], net.tensor("spread", (1, 9, 9, 6)),
        "DepthwiseConv2DOptions", depthMultiplier=1, **steps,
    )  # fmt: skip
    shape = net.tensor("shape", (2,), np.array([81, 6], "i4"), Type.INT32)
    rows = net.add(
        Op.RESHAPE, [spread, shape], net.tensor("rows", (81, 6)), "ReshapeOptions",
        newShape=[81, 6],
    )  # fmt: skip
    weights = net.tensor("dense", DENSE.shape, DENSE)
    out = net.add(
        Op.FULLY_CONNECTED, [rows, weights, -1], net.tensor("out", (81, 7)), "FullyConnectedOptions"
    )
    return net.save(path, [image], [out])


def outputs(path: Path) -> Any:
    runtime = pytest.importorskip("ai_edge_litert.interpreter").Interpreter(str(path))
    runtime.allocate_tensors()
    runtime.set_tensor(runtime.get_input_details()[0]["index"], normal(9, 1, 9, 9, 4))
    runtime.invoke()
    return runtime.get_tensor(runtime.get_output_details()[0]["index"])


def test_a_network_there_and_back(tmp_path: Path) -> None:
    before = network(tmp_path / "m.tflite")
    with open_checkpoint(tmp_path / "m.tflite") as reader:
        found = {spec.name: reader.read(spec.name) for spec in reader.contents.tensors}
        # The shape of two integers stays in the graph.
        assert list(found) == ["bias", "conv", "depthwise", "dense"]
        assert np.array_equal(found["conv"], CONV.transpose(0, 3, 1, 2))
        assert np.array_equal(found["depthwise"], DEPTHWISE.transpose(3, 0, 1, 2))
        assert np.array_equal(found["dense"], DENSE)
        assert len(reader.contents.files[0].data) < len(before) - CONV.nbytes
        save(tmp_path / "n.tflite", reader)
    assert (tmp_path / "n.tflite").read_bytes() == before
    with (
        open_checkpoint(tmp_path / "m.tflite") as reader,
        create_checkpoint(tmp_path / "half.tflite", reader.contents) as writer,
    ):
        for name, array in found.items():
            writer.write(name, array / 2 if name == "conv" else array * (name != "bias"))
    # Without biases the network is linear in its filters.
    network_of_zeros = outputs(tmp_path / "half.tflite") * 2
    with create_checkpoint(tmp_path / "whole.tflite", reader.contents) as writer:
        for name, array in found.items():
            writer.write(name, array * (name != "bias"))
    assert np.allclose(network_of_zeros, outputs(tmp_path / "whole.tflite"), atol=1e-5)


def test_types_and_shared_buffers(tmp_path: Path) -> None:
    net = Graph()
    bytes_of = np.arange(20, dtype="i1")
    first = net.tensor("q", (4, 5), bytes_of, Type.INT8)
    net.graph.tensors[net.tensor("tied", (4, 5), kind=Type.INT8)].buffer = first + 1
    net.graph.tensors[net.tensor("other shape", (20,), kind=Type.INT8)].buffer = first + 1
    net.tensor("q", (3, 2), normal(1, 3, 2))
    net.tensor("four bits", (4,), np.zeros(2, "u1"), Type.INT4)
    net.tensor("few", (2,), np.array([1, 2], "i4"), Type.INT32)
    sparse = net.graph.tensors[net.tensor("sparse", (8, 8), normal(2, 3))]
    sparse.sparsity = schema.SparsityParametersT()
    net.tensor("scalar", (), normal(3))
    scales = net.tensor("scales", (2, 2), normal(4, 2, 2))
    blocks = net.graph.tensors[net.tensor("blocks", (2, 16), np.zeros(16, "u1"), Type.INT4)]
    blocks.quantization = schema.QuantizationParametersT()
    blocks.quantization.detailsType = schema.QuantizationDetails.BlockwiseQuantization
    blocks.quantization.details = schema.BlockwiseQuantizationT()
    blocks.quantization.details.scales = scales
    before = net.save(tmp_path / "m.tflite", [], [])
    with open_checkpoint(tmp_path / "m.tflite") as reader:
        assert reader.contents.aliases == {"tied": "q"}
        assert [(s.name, s.dtype, s.shape) for s in reader.contents.tensors] == [
            ("q", "I8", (4, 5)), ("q.1", "F32", (3, 2)), ("scalar", "F32", ()),
        ]  # fmt: skip
        assert np.array_equal(reader.read("tied").reshape(-1), bytes_of)
        save(tmp_path / "n.tflite", reader)
    assert (tmp_path / "n.tflite").read_bytes() == before


def test_data_behind_the_flatbuffer(tmp_path: Path) -> None:
    """As in files above 2 GB."""
    weights, path = normal(1, 30, 4), tmp_path / "m.tflite"
    size = 1000
    for _ in range(2):
        net = Graph()
        net.tensor("w", weights.shape, weights)
        buffer = net.model.buffers[-1]
        buffer.data, buffer.offset, buffer.size = None, size, weights.nbytes
        size = len(net.save(path, [], []))
    path.write_bytes(path.read_bytes() + weights.tobytes() + b"more")
    with open_checkpoint(path) as reader:
        assert np.array_equal(reader.read("w"), weights)
        save(tmp_path / "n.tflite", reader)
    assert (tmp_path / "n.tflite").read_bytes() == path.read_bytes()
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="damaged"):
        open_checkpoint(path)


def test_hostile_files(tmp_path: Path) -> None:
    """Each cut and flip gives a model or an error of ours."""
    sound = network(tmp_path / "m.tflite")
    chance = random.Random(1)
    broken = [sound[: len(sound) * n // 40] for n in range(40)]
    for _ in range(600):
        flipped = bytearray(sound)
        for _ in range(chance.randint(1, 3)):
            # Most of the structure lies at the end.
            at = chance.choice([chance.randrange(len(sound)), -chance.randrange(1, 2000)])
            flipped[at] = chance.choice([0, 255, chance.randrange(256)])
        broken.append(bytes(flipped[:4]) + b"TFL3" + bytes(flipped[8:]))
    refused = 0
    for content in broken:
        (tmp_path / "m.tflite").write_bytes(content)
        try:
            with open_checkpoint(tmp_path / "m.tflite") as reader:
                for spec in reader.contents.tensors:
                    reader.read(spec.name)
        except CheckpointError as error:
            refused += 1
            assert len(str(error)) < 400
    assert 100 < refused < len(broken)


def test_hostile_counts(tmp_path: Path) -> None:
    net = Graph()
    net.model.subgraphs = [net.graph] * 3
    net.tensor("w", (3,), normal(1, 2))
    net.save(tmp_path / "m.tflite", [], [])
    with pytest.raises(CheckpointError, match="tensor 'w' has a wrong number of bytes"):
        open_checkpoint(tmp_path / "m.tflite")
    net = Graph()
    net.tensor("w" * 5000, (2,), normal(1, 2))
    net.save(tmp_path / "m.tflite", [], [])
    with open_checkpoint(tmp_path / "m.tflite") as reader:
        assert [spec.name for spec in reader.contents.tensors] == ["w" * 4096]
    # One graph, listed 400 times.
    builder = pytest.importorskip("flatbuffers").Builder(1024)
    graph = net.graph.Pack(builder)
    vectors = []
    for offset in (graph, net.model.buffers[-1].Pack(builder)):
        builder.StartVector(4, 400, 4)
        for _ in range(400):
            builder.PrependUOffsetTRelative(offset)
        vectors.append(builder.EndVector())
    schema.ModelStart(builder)
    schema.ModelAddSubgraphs(builder, vectors[0])
    schema.ModelAddBuffers(builder, vectors[1])
    builder.Finish(schema.ModelEnd(builder), b"TFL3")
    (tmp_path / "m.tflite").write_bytes(bytes(builder.Output()))
    with pytest.raises(CheckpointError, match="longer than a file of this size can hold"):
        open_checkpoint(tmp_path / "m.tflite")


def test_what_cannot_be_written(tmp_path: Path) -> None:
    network(tmp_path / "m.tflite")
    with open_checkpoint(tmp_path / "m.tflite") as reader:
        specs, files = reader.contents.tensors, reader.contents.files
    row, rest = files[0].data.split(b"\n", 1)
    table = json.loads(row)

    def graph(**changes: Any) -> tuple[SideFile, ...]:
        text = json.dumps(table | changes).encode() + b"\n" + rest
        return (SideFile("graph.tflite", text, GRAPH_ROLE),)

    def moved(name: str, at: Any = None, axes: Any = None) -> tuple[SideFile, ...]:
        row = list(table[name])
        row[0], row[3] = row[0] if at is None else at, row[3] if axes is None else axes
        return graph(**{name: row})

    bias, *others = specs
    halves = TensorSpec("bias", "F16", bias.shape)
    garbage = (SideFile("graph.tflite", b"[" * 100_000, GRAPH_ROLE),)
    for contents, said in (
        (Contents(specs), "holds no LiteRT graph"),
        (Contents(tuple(others), files=files), "needs all its weights; missing: bias"),
        (Contents((halves, *others), files=files), "unpack it without converting"),
        (Contents((*specs, TensorSpec("new", "F32", (3,))), files=files), "no tensor 'new'"),
        (Contents(specs, files=garbage), "is damaged"),
        (Contents(specs, files=graph(bias=[1])), "is damaged"),
        (Contents(specs, files=moved("bias", axes=[[0]])), "is damaged"),
        (Contents(specs, files=moved("bias", axes=[float("inf")])), "is damaged"),
        (Contents(specs, files=moved("bias", 1 << 60)), "no room for 'bias'"),
        (Contents(specs, files=moved("bias", -4)), "no room for 'bias'"),
        (Contents(specs, files=moved("bias", 4.5)), "no room for 'bias'"),
        (Contents(specs, files=moved("conv", axes=[0, 1, 1, 2])), "no room for 'conv'"),
        (Contents(specs, files=moved("conv", axes=[0, 1, 2, 3, 3])), "no room for 'conv'"),
    ):
        with pytest.raises(CheckpointError, match=said):
            create_checkpoint(tmp_path / "n.tflite", contents)
    assert not (tmp_path / "n.tflite").exists()
