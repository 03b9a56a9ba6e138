"""GGUF in and out: plain and quantized tensors, metadata kept as bytes."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightvid.checkpoint import Contents, create_checkpoint, from_mapping, open_checkpoint
from weightvid.checkpoint.gguf_format import parse_metadata
from weightvid.checkpoint.gguf_writer import quantize_q8_0
from weightvid.errors import CheckpointError
from weightvid.pack import pack_checkpoint
from weightvid.spec import TensorSpec
from weightvid.unpack import UnpackOptions, unpack_archive


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


PAIRS = (
    pair("general.architecture", 8, text("llama")),
    pair("general.file_type", 4, struct.pack("<I", 2)),
    pair("tokens", 9, struct.pack("<IQ", 8, 2) + text("a") + text("bc")),
    pair("nested", 9, struct.pack("<IQ", 9, 1) + struct.pack("<IQ", 5, 2) + bytes(8)),
    pair("scores", 9, struct.pack("<IQ", 6, 3) + bytes(12)),
    pair("flag", 7, b"\1"),
)


def gguf_file(pairs: tuple[bytes, ...] = PAIRS, version: int = 3) -> bytes:
    """One matrix of Q8_0, one of F32; made by hand."""
    weights = np.arange(128, dtype=np.float32).reshape(2, 64) - 60
    blocks = quantize_q8_0(weights).tobytes()
    infos = text("q") + struct.pack("<IQQIQ", 2, 64, 2, 8, 0)
    infos += text("f") + struct.pack("<IQIQ", 1, 3, 0, 160)
    head = b"GGUF" + struct.pack("<IQQ", version, 2, len(pairs)) + b"".join(pairs) + infos
    head += bytes(-len(head) % 32)
    return head + blocks.ljust(160, b"\0") + np.array([1, 2, 3], "<f4").tobytes()


def test_read(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_file())
    with open_checkpoint(path) as reader:
        assert reader.contents.tensors == (
            TensorSpec("q", "F32", (2, 64)),
            TensorSpec("f", "F32", (3,)),
        )
        assert reader.read("f").tolist() == [1, 2, 3]
        expected = np.arange(128).reshape(2, 64) - 60
        assert np.abs(reader.read("q") - expected).max() <= 68 / 127 / 2 + 0.03
        (file,) = reader.contents.files
        assert (file.role, file.data) == ("gguf-metadata", b"".join(PAIRS))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (gguf_file(version=1), "versions 2 and 3"),
        (gguf_file(version=3 << 24), "big-endian"),
        (gguf_file()[:-1], "cut short: tensor 'f'"),
        (gguf_file()[:100], "cut short"),
        (gguf_file((*PAIRS, PAIRS[0])), "twice"),
        (gguf_file((pair("x", 77, b""),)), "unknown type 77"),
        (gguf_file((pair("x", 9, struct.pack("<IQ", 6, 1 << 60)),)), "larger than any"),
        (gguf_file((pair("x", 8, struct.pack("<Q", 1 << 62)),)), "larger than any"),
        (gguf_file((pair("general.alignment", 4, bytes(4)),)), "alignment of 0"),
        (gguf_file((pair("split.count", 2, struct.pack("<H", 3)),)), "one part of 3"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 40, 0), "more than any"),
    ],
)
def test_refused(tmp_path: Path, data: bytes, said: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=said) as caught:
        open_checkpoint(path)
    assert "m.gguf" in str(caught.value)


@given(cut=st.integers(0, 500), flip=st.integers(0, 400), bit=st.integers(0, 7))
def test_damage_is_an_error_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, cut: int, flip: int, bit: int
) -> None:
    data = bytearray(gguf_file())
    data[flip % len(data)] ^= 1 << bit
    path = tmp_path_factory.getbasetemp() / "fuzz.gguf"
    path.write_bytes(data[: len(data) - cut % 50])
    try:
        with open_checkpoint(path) as reader:
            for spec in reader.contents.tensors:
                reader.read(spec.name)
    except CheckpointError:
        pass


def convert(tmp_path: Path, kind: str | None) -> dict[str, Any]:
    gguf = pytest.importorskip("gguf")
    (tmp_path / "m.gguf").write_bytes(gguf_file())
    pack_checkpoint(tmp_path / "m.gguf", tmp_path / "m.mp4")
    out = tmp_path / f"{kind}.gguf"
    unpack_archive(tmp_path / "m.mp4", out, UnpackOptions(kind=kind))
    reader = gguf.GGUFReader(out)
    assert reader.get_field("general.architecture").contents() == "llama"
    assert reader.get_field("tokens").contents() == ["a", "bc"]
    return {
        "file_type": reader.get_field("general.file_type").contents(),
        **{t.name: (t.tensor_type.name, tuple(t.shape)) for t in reader.tensors},
    }


@pytest.mark.parametrize(
    ("kind", "matrix", "file_type"),
    [(None, "F16", 1), ("gguf-f32", "F32", 0), ("gguf-q8_0", "Q8_0", 7)],
)
def test_there_and_back(tmp_path: Path, kind: str | None, matrix: str, file_type: int) -> None:
    found = convert(tmp_path, kind)
    assert found == {"file_type": file_type, "q": (matrix, (64, 2)), "f": ("F32", (3,))}
    with (
        open_checkpoint(tmp_path / "m.gguf") as before,
        open_checkpoint(tmp_path / f"{kind}.gguf") as after,
    ):
        assert np.abs(before.read("q") - after.read("q")).max() < 0.6
        assert after.read("f").tolist() == [1, 2, 3]


def test_other_sources(tmp_path: Path) -> None:
    arrays = {
        "big": np.full((2, 2), 1e30, np.float32),
        "row": np.ones((2, 33), np.float32),
        "scalar": np.array(2.5, np.float64),
        "ids": np.arange(3),
    }
    source = from_mapping(arrays)
    with pytest.raises(CheckpointError, match="does not fit F16"):
        write(tmp_path / "m.gguf", source, None)
    assert not list(tmp_path.iterdir())
    notes = write(tmp_path / "m.gguf", source, "gguf-f32")
    assert "not packed from GGUF" in notes[0]
    with open_checkpoint(tmp_path / "m.gguf") as reader:
        assert reader.spec("scalar").shape == (1,)
        assert reader.read("ids").tolist() == [0, 1, 2]
        assert reader.read("big").max() == np.float32(1e30)


def write(path: Path, source: Any, kind: str | None) -> tuple[str, ...]:
    with create_checkpoint(path, source.contents, kind=kind) as writer:
        for spec in source.contents.tensors:
            writer.write(spec.name, source.read(spec.name))
        return writer.notes


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


def test_metadata_integers() -> None:
    metadata = parse_metadata(b"".join(PAIRS))
    assert metadata.with_integer("general.file_type", 7).integer("general.file_type", 0) == 7
    assert metadata.with_integer("new", 9).integer("new", 0) == 9
    assert metadata.with_integer("flag", 9).integer("flag", 3) == 3


def test_against_the_library(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((8, 256)).astype(np.float32)
    weights[0, :32] = 0
    expected = gguf.quants.quantize(weights, gguf.GGMLQuantizationType.Q8_0)
    assert quantize_q8_0(weights).tobytes() == expected.tobytes()
    made = gguf.GGUFWriter(tmp_path / "k.gguf", "llama")
    for name in ("Q4_0", "Q5_1", "Q8_0", "BF16"):
        kind = gguf.GGMLQuantizationType[name]
        made.add_tensor(name, gguf.quants.quantize(weights, kind), raw_dtype=kind)
    made.write_header_to_file()
    made.write_kv_data_to_file()
    made.write_tensors_to_file()
    made.close()
    with open_checkpoint(tmp_path / "k.gguf") as reader:
        for name in ("Q4_0", "Q5_1", "Q8_0"):
            kind = gguf.GGMLQuantizationType[name]
            again = gguf.quants.dequantize(gguf.quants.quantize(weights, kind), kind)
            assert np.array_equal(reader.read(name), again.reshape(8, 256))
        assert reader.spec("BF16").dtype == "BF16"


@pytest.mark.parametrize("name", ["Q2_K", "Q4_K", "Q6_K", "IQ4_NL", "IQ3_S", "MXFP4"])
def test_types_that_the_library_dequantizes(tmp_path: Path, name: str) -> None:
    gguf = pytest.importorskip("gguf")
    kind = gguf.GGMLQuantizationType[name]
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    data = np.random.default_rng(2).integers(0, 120, (6, 2 * block_bytes), np.uint8)
    made = gguf.GGUFWriter(tmp_path / "k.gguf", "llama")
    made.add_tensor("w", data, raw_dtype=kind)
    made.write_header_to_file()
    made.write_kv_data_to_file()
    made.write_tensors_to_file()
    made.close()
    with np.errstate(all="ignore"), open_checkpoint(tmp_path / "k.gguf") as reader:
        assert reader.contents.tensors == (TensorSpec("w", "F32", (6, 2 * block)),)
        found = reader.read("w")
        expected = gguf.quants.dequantize(data, kind)
    assert np.array_equal(found, expected.reshape(6, 2 * block), equal_nan=True)


def test_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytearray(gguf_file())
    at = data.index(text("q")) + 9 + 4 + 16
    assert data[at] == 8
    data[at] = 12
    (tmp_path / "m.gguf").write_bytes(data)
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(CheckpointError, match=r"needs the gguf package .*weightvid\[gguf\]"):
        open_checkpoint(tmp_path / "m.gguf")


@pytest.mark.parametrize("kind", ["gguf", "gguf-q8_0", "gguf-f32"])
@pytest.mark.parametrize("size", [1, 11, 32, 50, 64, 1000])
def test_parts_give_the_same_file(tmp_path: Path, kind: str, size: int) -> None:
    rng = np.random.default_rng(3)
    tied = rng.standard_normal((4, 96)).astype(np.float16)
    source = from_mapping(
        {
            "a": rng.standard_normal((9, 64)).astype(np.float32),
            "odd": rng.standard_normal((5, 33)).astype(np.float32),
            "tied": tied,
            "again": tied,
            "row": rng.standard_normal(77).astype(np.float32),
            "ids": np.arange(50),
            "empty": np.empty((0, 64), np.float32),
        }
    )
    write(tmp_path / "whole.gguf", source, kind)
    with create_checkpoint(tmp_path / "parts.gguf", source.contents, kind=kind) as writer:
        for spec in source.contents.tensors:
            flat = source.read(spec.name).reshape(-1)
            parts = (flat[at : at + size] for at in range(0, flat.size, size))
            writer.write_parts(spec.name, parts)
    assert (tmp_path / "parts.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    with open_checkpoint(tmp_path / "parts.gguf") as reader:
        for spec in reader.contents.tensors:
            flat = reader.read(spec.name).reshape(-1)
            for first, count in ((0, flat.size), (flat.size // 3, flat.size // 2), (flat.size, 0)):
                found = reader.read_range(spec.name, first, count)
                assert np.array_equal(found, flat[first : first + count])
