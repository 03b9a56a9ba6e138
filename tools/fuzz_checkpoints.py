"""Checkpoints for `fuzz.py`: one of each kind, changed so that checksums and lengths stay right."""

from __future__ import annotations

import io
import json
import re
import struct
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from random import Random
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np

from weightvid import container, loader
from weightvid.checkpoint import coreml, create_checkpoint, from_mapping, open_checkpoint
from weightvid.errors import CheckpointError, WeightvidError
from weightvid.pack import PackOptions, pack_checkpoint

NUMBERS = 0, 1, 2, 3, 63, 64, 127, 128, 255, 1024, 1 << 16, 1 << 20, 1 << 24, 1 << 38, (1 << 64) - 1
TOKENS = (
    b"0", b"-1", b"1e400", b"18446744073709551616", b"9" * 5000, b"null", b"{}", b"[]", b"[" * 5000,
    b'"../x"', b'"\\ud800"', b'"' + b"n" * 9000 + b'"', b"true", b'"F32"', b'"I64"', b'"BOOL"',
)  # fmt: skip


def mutate_bytes(data: bytes, random: Random) -> bytes:
    """Bytes changed, taken out, put in, cut off, or numbers written over them."""
    at = random.randrange(min(len(data) + 1, random.choice((16, 64, len(data) + 1))))
    number = random.choice(NUMBERS)
    size = random.choice((0, 0, 4, 8))
    new = (number % (1 << 8 * size)).to_bytes(size, "little") if size else container.uint(number)
    if random.random() < 0.5:
        new = random.randbytes(random.randrange(9))
    elif random.random() < 0.5 and at < len(data):
        new = bytes(((data[at] + random.choice((-1, 1, 64, 128))) % 256,))
    ends = at, at + len(new), at + len(new), at + random.randrange(9), len(data)
    return data[:at] + new + data[random.choice(ends) :]


def mutate_word(data: bytes, random: Random) -> bytes:
    """Another number in the place of one of 4 bytes: an offset, a length, a code."""
    at = 4 * random.randrange(len(data) // 4 + 1)
    old = int.from_bytes(data[at : at + 4], "little")
    new = random.choice((*NUMBERS, *(old + step for step in (-8, -4, -1, 1, 4, 8, 256, 1 << 16))))
    return data[:at] + (new % (1 << 32)).to_bytes(4, "little") + data[at + 4 :]


def count_results(calls: Iterable[Callable[[], Any]]) -> int:
    """How many calls end in something else than an error of ours."""
    results = 0
    for call in calls:
        with suppress(WeightvidError):
            call()
            results += 1
    return results


class Checkpoint(NamedTuple):
    """A checkpoint: its name, and its files by their paths in it."""

    kind: str
    files: dict[str, bytes]


def checkpoint_seeds() -> list[Checkpoint]:
    """One of each kind whose package is there."""
    random = np.random.default_rng(1)
    weight = random.standard_normal((5, 32)).astype("f4")
    arrays = {
        "a.weight": weight, "b": np.arange(6, dtype="f2"), "c": np.array(3), "tied": weight,
        "d": np.zeros((0, 4), "f4"), "e": np.array([True, False]),
    }  # fmt: skip
    found: dict[str, dict[str, bytes]] = {}
    with tempfile.TemporaryDirectory() as folder, from_mapping(arrays) as reader:
        for name in ("m.safetensors", "m.npz", "m.pt", "m.gguf", "folder"):
            if name == "m.gguf":
                reader = from_mapping({"w": weight, "b": arrays["b"]})  # noqa: PLW2901
            path = Path(folder, name)
            shards = patch("weightvid.checkpoint.folder.SHARD_BYTES", 600)
            with shards, create_checkpoint(path, reader.contents) as writer:
                for spec in reader.contents.tensors:
                    writer.write(spec.name, reader.read(spec.name))
            files = {"": path} if path.is_file() else {each.name: each for each in path.iterdir()}
            found[name] = {file: files[file].read_bytes() for file in sorted(files)}
    found |= {"old.bin": {"": legacy_torch(weight)}, "m.onnx": {"": onnx_model(weight)}}
    with suppress(ImportError):
        found["m.tflite"] = {"": tflite_model(weight)}
    with suppress(CheckpointError):
        found["m.mlpackage"] = coreml_package(weight)
    return [Checkpoint(*named) for named in found.items()]


def onnx_model(weight: Any) -> bytes:
    import onnx
    from onnx import helper, numpy_helper

    value = helper.make_tensor_value_info
    then = helper.make_graph(
        [helper.make_node("Add", ["x", "inner"], ["y"])], "then", [],
        [value("y", 1, [5, 32])], [numpy_helper.from_array(weight, "inner")],
    )  # fmt: skip
    choice = helper.make_node("If", ["c"], ["z"], then_branch=then, else_branch=then)
    inputs = [value("x", 1, [5, 32]), value("c", 9, [])]
    outside = helper.make_tensor("far", 1, [4], np.zeros(4, "f4").tobytes(), raw=True)
    onnx.external_data_helper.set_external_data(outside, "w.bin", 0, 16)
    outside.ClearField("raw_data")
    first = [numpy_helper.from_array(weight, "w"), helper.make_tensor("f", 1, [2], [1.0, 2.0])]
    graph = helper.make_graph([choice], "g", inputs, [value("z", 1, [5, 32])], [*first, outside])
    made: bytes = helper.make_model(graph, ir_version=8).SerializeToString()
    return made


def legacy_torch(weight: Any) -> bytes:
    import torch

    made = io.BytesIO()
    state = {"model": {"w": torch.from_numpy(weight)}, "epoch": 3}
    torch.save(state, made, _use_new_zipfile_serialization=False, pickle_protocol=4)
    return made.getvalue()


def tflite_model(weight: Any) -> bytes:
    """Filters of both kinds, one of them made from float16, and integers with scales of blocks."""
    flatbuffers: Any = import_module("flatbuffers")
    schema: Any = import_module("ai_edge_litert.schema_py_generated")
    blocks = schema.BlockwiseQuantizationT(scales=3, blockSize=32)
    quantized = schema.QuantizationParametersT(detailsType=2, details=blocks)
    buffers, tensors = [schema.BufferT()], []
    for name, shape, kind, dtype in (
        ("filters", (5, 2, 4, 4), 0, "f4"), ("half", (1, 2, 8, 10), 1, "f2"),
        ("integers", (5, 32), 9, "i1"), ("scales", (5,), 0, "f4"), ("shape", (2,), 2, "i4"),
        ("wide", (1, 2, 8, 10), 0, ""), ("x", (1, 6, 6, 4), 0, ""),
    ):  # fmt: skip
        made = schema.TensorT(shape=list(shape), type=kind, name=name, buffer=0)
        if dtype:
            made.buffer, count = len(buffers), int(np.prod(shape))
            data = (weight.reshape(-1)[:count] * 9).astype(dtype)
            buffers.append(schema.BufferT(data=data.view(np.uint8)))
        tensors.append(made)
    tensors[2].quantization = quantized
    codes = [schema.OperatorCodeT(code, None, 1, code) for code in (3, 4, 6)]
    steps = [
        schema.OperatorT(opcodeIndex=2, inputs=[1], outputs=[5]),
        schema.OperatorT(opcodeIndex=1, inputs=[6, 5, -1], outputs=[6]),
        schema.OperatorT(opcodeIndex=0, inputs=[6, 0, 3], outputs=[6]),
    ]
    graph = schema.SubGraphT(tensors=tensors, inputs=[6], outputs=[6], operators=steps)
    model = schema.ModelT(version=3, operatorCodes=codes, subgraphs=[graph], buffers=buffers)
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def coreml_package(weight: Any) -> dict[str, bytes]:
    """An ML program with floats, a block within an operation, and integers with their scales."""
    model, blobs = coreml._messages().Model(specificationVersion=6), b""
    block = model.mlProgram.functions["main"].block_specializations["CoreML5"]
    rows = (
        ("w", "val", 11, weight), ("half", "val", 10, weight.astype("f2")),
        ("q", "quantized_data", 21, weight.astype("i1")), ("q", "scale", 11, weight[:, 0]),
    )  # fmt: skip
    for number, (name, key, code, array) in enumerate(rows):
        if number == 1:
            block = block.operations.add(type="cond").blocks.add()
        operation = block.operations.add(type="const" if number < 2 else "constexpr_dequantize")
        operation.outputs.add(name=name)
        value = operation.attributes[key]
        value.blobFileValue.fileName = "@model_path/weights/weight.bin"
        value.blobFileValue.offset = len(blobs)
        value.type.tensorType.dataType = code
        for size in array.shape:
            value.type.tensorType.dimensions.add().constant.size = size
        head = struct.pack("<IIQQ", 0xDEADBEEF, code, array.nbytes, len(blobs) + 64)
        blobs += head.ljust(64, b"\0") + array.tobytes() + bytes(-array.nbytes % 64)
    item = {"m": {"path": "com.apple.CoreML/m.mlmodel"}}
    manifest = json.dumps({"rootModelIdentifier": "m", "itemInfoEntries": item}).encode()
    place = "Data/com.apple.CoreML"
    return {
        "Manifest.json": manifest, f"{place}/m.mlmodel": model.SerializeToString(),
        f"{place}/weights/weight.bin": blobs,
    }  # fmt: skip


def mutate_checkpoint(seed: Checkpoint, random: Random) -> Checkpoint:
    """Change one file; members of zip archives and headers keep right checksums and lengths."""
    file = random.choice(list(seed.files))
    data, suffix = seed.files[file], Path(seed.kind, file).suffix
    for _ in range(random.choice((1, 1, 2, 4))):
        if data.startswith(b"PK") and random.random() < 0.8:
            data = change_zip(data, random)
        elif suffix == ".safetensors" and random.random() < 0.8:
            length = int.from_bytes(data[:8], "little")
            header = mutate_text(data[8 : 8 + length], random)
            data = len(header).to_bytes(8, "little") + header + data[8 + length :]
        elif suffix == ".json":
            data = mutate_text(data, random)
        elif suffix in (".onnx", ".mlmodel") and random.random() < 0.8:
            data = mutate_message(data, random)
        elif suffix in (".gguf", ".tflite") and random.random() < 0.8:
            data = mutate_word(data, random)
        else:
            data = mutate_bytes(data, random)
    return Checkpoint(seed.kind, seed.files | {file: data})


def mutate_message(data: bytes, random: Random) -> bytes:
    """Change one field of a protobuf message, or of one within it; lengths stay right."""
    fields, at = loader.Fields(data, "a message"), []
    with suppress(WeightvidError):
        while fields.at < len(data):
            start, key = fields.at, fields.uint(1 << 29)
            if key & 7 == 2:
                size = fields.uint()
                at.append((start, key, fields.at, fields.at + size))
                fields.take(size)
            else:
                fields.take((0, 8, 0, 0, 0, 4, 0, 0)[key & 7])
                _ = fields.uint((1 << 64) - 1) if key & 7 == 0 else 0
        if at and random.random() < 0.9:
            start, key, first, end = random.choice(at)
            new = mutate_message(data[first:end], random)
            made = container.uint(key) + container.uint(len(new)) + new
            return data[:start] + made * random.choice((0, 1, 1, 1, 1, 2)) + data[end:]
    return mutate_bytes(data, random)


def change_zip(data: bytes, random: Random) -> bytes:
    made = io.BytesIO()
    with suppress(Exception), zipfile.ZipFile(io.BytesIO(data)) as source:
        members = [(info.filename, source.read(info)) for info in source.infolist()]
        at = random.randrange(len(members))
        # The head tells what the rest means.
        change = random.choice((mutate_bytes, mutate_text))
        members[at] = members[at][0], change(members[at][1], random)
        method = random.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
        with zipfile.ZipFile(made, "w", method) as archive, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name, content in members:
                archive.writestr(name, content)
        return made.getvalue()
    return mutate_bytes(data, random)


def mutate_text(text: bytes, random: Random) -> bytes:
    """Put one token, or some bytes, in the place of another."""
    if random.random() < 0.3:
        return mutate_bytes(text, random)
    tokens = re.findall(rb'"[^"]*"|[\w.-]+|.', text)
    new = random.choice((*TOKENS, random.choice(tokens or [b"0"])))
    if tokens:
        tokens[random.randrange(len(tokens))] = new
    return b"".join(tokens)


def write_checkpoint(path: Path, files: dict[str, bytes]) -> None:
    for file, data in files.items():
        (path / file).parent.mkdir(parents=True, exist_ok=True)
        (path / file).write_bytes(data)
    path.with_name("w.bin").write_bytes(bytes(16))


def read_checkpoint(made: Checkpoint, random: Random, folder: Path) -> int:
    """Read every tensor of a checkpoint, and seldom pack it; how many of both had a result."""
    path = folder / made.kind
    write_checkpoint(path, made.files)

    def read() -> None:
        with open_checkpoint(path) as reader:
            for tensor, spec in reader.contents.rows():
                reader.read(tensor)
                reader.read_range(tensor, spec.size // 2, spec.size - spec.size // 2)

    pack = partial(pack_checkpoint, path, folder / "made.mp4", PackOptions(jobs=1, force=True))
    return count_results([read, pack] if random.random() < 0.03 else [read])
