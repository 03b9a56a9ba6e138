"""safetensors: what the library accepts, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from weightvid.checkpoint import (
    Contents,
    TensorSpec,
    create_checkpoint,
    open_checkpoint,
)
from weightvid.checkpoint.safetensors import HELD
from weightvid.errors import CheckpointError
from weightvid.spec import SUB_BYTE, stored_dtype


def raw_file(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def row(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_the_library_opens_what_we_write(tmp_path: Path) -> None:
    """Every dtype, 0-d and empty included, aligned as the library aligns."""
    shapes: dict[str, tuple[int, ...]] = {"m": (3, 8), "empty": (0, 8), "scalar": ()}
    specs = tuple(
        TensorSpec(f"{dtype}.{label}", dtype, shape)
        for dtype in sorted(HELD)
        for label, shape in shapes.items()
        if not (label == "scalar" and dtype in SUB_BYTE)
    )
    contents = Contents(specs, {"tied": "F32.m"}, {"format": "pt", "ключ": "значение"})
    path = tmp_path / "x.safetensors"
    with create_checkpoint(path, contents) as writer:
        for spec in specs:
            writer.write(spec.name, np.ones(spec.shape, stored_dtype(spec.dtype)))
    with safe_open(path, framework="numpy") as library:
        assert library.metadata() == dict(contents.metadata)
        assert set(library.keys()) == {spec.name for spec in specs} | {"tied"}
        for spec in specs:
            entry = library.get_slice(spec.name)
            assert (entry.get_dtype(), tuple(entry.get_shape())) == (spec.dtype, spec.shape)
    blob = path.read_bytes()
    length = int.from_bytes(blob[:8], "little")
    assert length % 8 == 0
    for name, entry in json.loads(blob[8 : 8 + length]).items():
        if name != "__metadata__":
            assert entry["data_offsets"][0] % stored_dtype(entry["dtype"]).itemsize == 0


def test_sub_byte_elements_are_packed(tmp_path: Path) -> None:
    rows = {"four": row("F4", [2, 2], 0, 2), "six": row("F6_E2M3", [4], 2, 5)}
    path = raw_file(tmp_path / "x.safetensors", rows, bytes([0x21, 0x43, 0xFF, 0x0F, 0x00]))
    with open_checkpoint(path) as reader:
        assert reader.read("four").tolist() == [[1, 2], [3, 4]]
        assert reader.read_range("six", 1, 2).tolist() == [63, 0]


@pytest.mark.parametrize(
    ("name", "dtype", "shape", "said"),
    [
        ("__metadata__", "F32", (2,), "__metadata__"),
        ("\ud800", "F32", (2,), "Unicode"),
        ("w", "C128", (2,), r"'w' of dtype C128; write \.npz or \.pt"),
        ("w", "F4", (3,), "whole bytes"),
        ("w", "F4", (), "whole bytes"),
    ],
)
def test_what_it_cannot_hold(
    tmp_path: Path, name: str, dtype: str, shape: tuple[int, ...], said: str
) -> None:
    with pytest.raises(CheckpointError, match=said):
        create_checkpoint(tmp_path / "x.safetensors", Contents((TensorSpec(name, dtype, shape),)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("header", "data", "said"),
    [
        ({"a": row("F32", [1], 0, 4)}, b"", "incomplete metadata"),
        ({"a": row("F32", [1], 0, 4)}, b"12345", "incomplete metadata"),
        ({"a": row("F32", [2], 0, 4)}, b"1234", "invalid shape"),
        ({"a": row("F99", [1], 0, 4)}, b"1234", "F99"),
        ({"a": row("F32", [1], 4, 8)}, b"12345678", "no valid safetensors"),
        ({"a": row("F32", [1] * 70, 0, 4)}, b"1234", "impossible shape"),
        ({"a": row("F32", [2**40, 2**40, 0], 0, 0)}, b"", "overflow"),
        ({"a": row("F32", [2**63, 0], 0, 0)}, b"", "impossible shape"),
        (b'{"a":', b"", "no valid safetensors"),
        (b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},'
         b'"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}', b"", "same name twice"),
        (b'{"\\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}', b"", "hex escape"),
        (b"{" + b'"a":{' * 3000, b"", "no valid safetensors"),
    ],
)  # fmt: skip
def test_bad_headers(tmp_path: Path, header: object, data: bytes, said: str) -> None:
    with pytest.raises(CheckpointError, match=said) as caught:
        open_checkpoint(raw_file(tmp_path / "x.safetensors", header, data))
    assert "\n" not in str(caught.value)


def test_a_file_that_shrinks_while_open(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": np.ones(30_000, np.float32)}, path)
    with open_checkpoint(path) as reader:
        assert reader.shareable
        path.write_bytes(path.read_bytes()[:500])
        with pytest.raises(CheckpointError, match="cut short"):
            reader.read("a")


def test_files_of_a_wrong_size(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"w": np.ones((3, 4), np.float32)}, path)
    whole = path.read_bytes()
    for content, said in (
        (whole + b"12345", "5 bytes longer than its header says"),
        (whole[:-7], f"cut short: 7 of {len(whole)} bytes are missing"),
        (whole[:30], "damaged, or cut short"),
    ):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=said):
            open_checkpoint(path)
