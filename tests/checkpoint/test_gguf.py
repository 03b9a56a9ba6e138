"""GGUF in and out: plain and quantized tensors, and the metadata of the source."""

from __future__ import annotations

import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import normal, save

from weightvid.checkpoint import Contents, create_checkpoint, from_mapping, open_checkpoint
from weightvid.errors import CheckpointError
from weightvid.loader import TensorSpec

gguf = pytest.importorskip("gguf")


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


PAIRS = (
    pair("general.architecture", 8, text("llama")),
    pair("general.file_type", 4, struct.pack("<I", 2)),
    pair("general.alignment", 4, struct.pack("<I", 64)),
    pair("tokens", 9, struct.pack("<IQ", 8, 2) + text("a") + text("bc")),
    pair("scores", 9, struct.pack("<IQ", 6, 3) + bytes(12)),
    pair("none", 9, struct.pack("<IQ", 6, 0)),
    pair("flag", 7, b"\1"),
)
MATRIX = np.arange(128, dtype=np.float32).reshape(2, 64) - 60


def gguf_file(pairs: tuple[bytes, ...] = PAIRS, version: int = 3) -> bytes:
    """One matrix of Q8_0, one vector of F32; made by hand."""
    blocks = gguf.quants.quantize(MATRIX, gguf.GGMLQuantizationType.Q8_0).tobytes()
    infos = text("q") + struct.pack("<IQQIQ", 2, 64, 2, 8, 0)
    infos += text("f") + struct.pack("<IQIQ", 1, 3, 0, 192)
    head = b"GGUF" + struct.pack("<IQQ", version, 2, len(pairs)) + b"".join(pairs) + infos
    head += bytes(-len(head) % 64)
    return head + blocks.ljust(192, b"\0") + np.array([1, 2, 3], "<f4").tobytes()


@pytest.mark.parametrize(
    ("kind", "matrix", "file_type"),
    [("gguf", "F16", 1), ("gguf-f32", "F32", 0), ("gguf-q8_0", "Q8_0", 7)],
)
def test_there_and_back(tmp_path: Path, kind: str, matrix: str, file_type: int) -> None:
    (tmp_path / "m.gguf").write_bytes(gguf_file())
    with open_checkpoint(tmp_path / "m.gguf") as reader:
        assert reader.contents.tensors == (
            TensorSpec("q", "F32", (2, 64)),
            TensorSpec("f", "F32", (3,)),
        )
        assert np.abs(reader.read("q") - MATRIX).max() <= 68 / 127 / 2 + 0.03
        assert save(tmp_path / "n.gguf", reader, kind) == ()
    made = gguf.GGUFReader(tmp_path / "n.gguf")
    fields = {name: field.contents() for name, field in made.fields.items()}
    assert (fields["general.architecture"], fields["flag"]) == ("llama", True)
    assert (fields["tokens"], fields["scores"]) == (["a", "bc"], [0, 0, 0])
    assert (fields["general.file_type"], fields["general.alignment"]) == (file_type, 64)
    found = {tensor.name: tensor for tensor in made.tensors}
    assert (found["q"].tensor_type.name, found["q"].shape.tolist()) == (matrix, [64, 2])
    assert found["f"].data.tolist() == [1, 2, 3]
    assert all(tensor.data_offset % 64 == 0 for tensor in made.tensors)
    with open_checkpoint(tmp_path / "n.gguf") as reader:
        assert np.abs(reader.read("q") - MATRIX).max() < 0.6


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (gguf_file(version=3 << 24), "versions 2 and 3 are read, little-endian"),
        (gguf_file()[:-1], "cut short"),
        (gguf_file((*PAIRS, PAIRS[0])), "Duplicate"),
        (gguf_file((pair("x", 77, b""),)), "77"),
        (gguf_file((pair("x", 9, struct.pack("<IQ", 0, 1 << 60)),)), "cut short"),
        (gguf_file((pair("general.alignment", 4, bytes(4)),)), "alignment"),
        (gguf_file((pair("split.count", 2, struct.pack("<H", 3)),)), "one part of 3"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 40, 0), "cut short"),
    ],
)
def test_refused(tmp_path: Path, data: bytes, said: str) -> None:
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"m\.gguf: .*{said}"):
        open_checkpoint(tmp_path / "m.gguf")


def test_metadata_that_is_no_unicode(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(gguf_file().replace(b"bc", b"b\xff"))
    with (
        open_checkpoint(tmp_path / "m.gguf") as reader,
        pytest.raises(CheckpointError, match="GGUF metadata of the source cannot be written"),
    ):
        save(tmp_path / "n.gguf", reader)
    assert not (tmp_path / "n.gguf").exists()


def test_a_header_that_eats_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weightvid.checkpoint.gguf._MAX_FIELDS", 1000)
    many = pair("x", 9, struct.pack("<IQ", 0, 2000) + bytes(2000))
    (tmp_path / "m.gguf").write_bytes(gguf_file((many,)))
    with pytest.raises(CheckpointError, match="more fields than any file"):
        open_checkpoint(tmp_path / "m.gguf")


def test_other_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tied = normal(1, 4, 96).astype(np.float16)
    arrays = {
        "row": np.ones((2, 33), np.float32),
        "scalar": np.array(2.5, np.float64),
        "ids": np.arange(3),
        "tied": tied,
        "again": tied,
        "empty": np.empty((0, 64), np.float32),
        "big": np.full((2, 2), 1e30, np.float32),
    }
    source = from_mapping(arrays)
    with pytest.raises(CheckpointError, match="'big' does not fit F16"):
        save(tmp_path / "m.gguf", source)
    assert not list(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match="'wide' does not fit F32"):
        save(tmp_path / "m.gguf", from_mapping({"wide": np.full((2, 2), 1e300)}), "gguf-f32")
    notes = save(tmp_path / "m.gguf", source, "gguf-f32")
    assert "full copies" in notes[0]
    assert "no GGUF file" in notes[1]
    assert "no scalars" in notes[2]
    with open_checkpoint(tmp_path / "m.gguf") as reader:
        assert reader.spec("scalar").shape == (1,)
        for name, array in arrays.items():
            assert np.array_equal(
                reader.read(name).reshape(array.shape), array.astype(reader.read(name).dtype)
            )
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(CheckpointError, match=r"pip install 'weightvid\[gguf\]'"):
        open_checkpoint(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (TensorSpec("m", "BOOL", (3,)), "no element type BOOL"),
        (TensorSpec("m", "F32", (1, 1, 1, 1, 2)), "beyond that"),
        (TensorSpec("m" * 64, "F32", (2, 2)), "beyond that"),
        (TensorSpec("\ud800", "F32", (2, 2)), "not valid Unicode"),
    ],
)
def test_what_it_cannot_hold(tmp_path: Path, spec: TensorSpec, said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        create_checkpoint(tmp_path / "m.gguf", Contents((spec,)))


@pytest.mark.parametrize("name", ["Q4_0", "Q5_1", "Q2_K", "Q6_K", "IQ4_NL", "MXFP4", "BF16"])
def test_types_of_the_library(tmp_path: Path, name: str) -> None:
    kind = gguf.GGMLQuantizationType[name]
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    data = np.random.default_rng(2).integers(0, 120, (6, 32 * block_bytes), np.uint8)
    made: Any = gguf.GGUFWriter(tmp_path / "k.gguf", "llama")
    made.add_tensor("w", data, raw_dtype=kind)
    made.write_header_to_file()
    made.write_kv_data_to_file()
    made.write_tensors_to_file()
    made.close()
    with np.errstate(all="ignore"), open_checkpoint(tmp_path / "k.gguf") as reader:
        found, spec = reader.read("w"), reader.spec("w")
        expected = gguf.quants.dequantize(data, kind)
    assert spec == TensorSpec("w", "BF16" if name == "BF16" else "F32", (6, 32 * block))
    if name == "BF16":
        assert found.tobytes() == data.tobytes()
    else:
        assert np.array_equal(found, expected, equal_nan=True)
