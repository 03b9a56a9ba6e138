"""Checkpoints for `fuzz.py`: one of each kind, changed so that checksums and lengths stay right."""

from __future__ import annotations

import io
import re
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import patch

import numpy as np

from weightvid import container, loader
from weightvid.checkpoint import create_checkpoint, from_mapping, open_checkpoint
from weightvid.errors import WeightvidError

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


def count_results(calls: Iterable[Callable[[], Any]]) -> int:
    """How many calls end in something else than an error of ours."""
    results = 0
    for call in calls:
        with suppress(WeightvidError):
            call()
            results += 1
    return results


def checkpoint_seeds() -> list[tuple[str, dict[str, bytes]]]:
    """One checkpoint of each kind: its name, and its files."""
    random = np.random.default_rng(1)
    arrays = {
        "a.weight": random.standard_normal((5, 32)).astype("f4"), "b": np.arange(6, dtype="f2"),
        "c": np.array(3), "d": np.zeros((0, 4), "f4"), "e": np.array([True, False]),
    }  # fmt: skip
    arrays["tied"] = arrays["a.weight"]
    found = []
    with tempfile.TemporaryDirectory() as named, from_mapping(arrays) as reader:
        for name in ("m.safetensors", "m.npz", "m.pt", "m.gguf", "folder"):
            if name == "m.gguf":
                reader = from_mapping({"w": arrays["a.weight"], "b": arrays["b"]})  # noqa: PLW2901
            path = Path(named, name)
            shards = patch("weightvid.checkpoint.folder.SHARD_BYTES", 600)
            with shards, create_checkpoint(path, reader.contents) as writer:
                for spec in reader.contents.tensors:
                    writer.write(spec.name, reader.read(spec.name))
        Path(named, "m.onnx").write_bytes(onnx_model(arrays["a.weight"]))
        Path(named, "old.bin").write_bytes(legacy_torch(arrays["a.weight"]))
        for path in sorted(Path(named).iterdir()):
            files = [path] if path.is_file() else sorted(path.iterdir())
            found.append((path.name, {file.name: file.read_bytes() for file in files}))
    return found


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


def mutate_checkpoint(files: dict[str, bytes], random: Random) -> dict[str, bytes]:
    """Change one file; members of zip archives and headers keep right checksums and lengths."""
    name = random.choice(list(files))
    data = files[name]
    for _ in range(random.choice((1, 1, 2, 4))):
        if data.startswith(b"PK") and random.random() < 0.8:
            data = change_zip(data, random)
        elif name.endswith(".safetensors") and random.random() < 0.8:
            length = int.from_bytes(data[:8], "little")
            header = mutate_text(data[8 : 8 + length], random)
            data = len(header).to_bytes(8, "little") + header + data[8 + length :]
        elif name.endswith(".json"):
            data = mutate_text(data, random)
        elif name.endswith(".onnx") and random.random() < 0.8:
            data = mutate_message(data, random)
        else:
            data = mutate_bytes(data, random)
    return files | {name: data}


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


def read_checkpoint(name: str, files: dict[str, bytes], folder: Path) -> int:
    """Read every tensor of a checkpoint; 1 if that ends in a result."""
    target = folder / name
    if name == "folder":
        target.mkdir(exist_ok=True)
    for file, data in files.items():
        (target / file if name == "folder" else target).write_bytes(data)
    (folder / "w.bin").write_bytes(bytes(16))

    def read() -> None:
        with open_checkpoint(target) as reader:
            for tensor, spec in reader.contents.rows():
                reader.read(tensor)
                reader.read_range(tensor, spec.size // 2, spec.size - spec.size // 2)

    return count_results([read])
