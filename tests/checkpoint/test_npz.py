"""npz: numpy reads what we write, we read what numpy writes, one member at a time."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import save

from weightvid.checkpoint import (
    Contents,
    TensorSpec,
    create_checkpoint,
    from_mapping,
    open_checkpoint,
)
from weightvid.errors import CheckpointError

GOOD = "{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }"


def npy(header: str, data: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    text = header.encode("latin1")
    return b"\x93NUMPY" + version + len(text).to_bytes(2, "little") + text + data


def shaped(shape: str, descr: str = "'<f4'") -> bytes:
    return npy(f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}")


def zipped(path: Path, content: bytes, compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("layer.w.npy", content)
    return path


@pytest.mark.parametrize("writer", [np.savez, np.savez_compressed])
def test_we_read_what_numpy_writes(tmp_path: Path, writer: Any) -> None:
    arrays = {
        "c": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
        "f": np.asfortranarray(np.arange(24, dtype=np.int16).reshape(2, 3, 4)),
        "f_empty": np.asfortranarray(np.empty((0, 3, 2), np.float64)),
        "big": np.arange(5, dtype=">f4"),
        "scalar": np.array(3.5),
        "flag": np.array([True, False]),
        "dir/name": np.array([1 + 2j]),
    }
    others = {"text": np.array(["a"]), "objects": np.array([{}]), "records": np.zeros(2, "f4,i4")}
    writer(tmp_path / "x.npz", **arrays, **others)
    with zipfile.ZipFile(tmp_path / "x.npz", "a") as archive:
        archive.writestr("readme.txt", "hello")
    with open_checkpoint(tmp_path / "x.npz") as reader:
        assert [spec.name for spec in reader.contents.tensors] == list(arrays)
        assert {item.split(" ")[0] for item in reader.contents.skipped} == {*others, "readme.txt"}
        for name, array in arrays.items():
            got = reader.read(name)
            assert got.flags.c_contiguous
            assert got.dtype == array.dtype.newbyteorder("<")
            assert got.shape == array.shape
            assert np.array_equal(got, array)


def test_numpy_reads_what_we_write(tmp_path: Path) -> None:
    arrays = {"w": np.arange(6.0).reshape(2, 3), "s": np.array(7, np.uint8), "": np.ones(2)}
    bits = {"b": np.array(0x3FC0, np.uint16), "e": np.array([1, 255], np.uint8)}
    dtypes = {"b": "BF16", "e": "F8_E4M3"}
    notes = save(
        tmp_path / "x.npz", from_mapping(arrays | bits, dtypes=dtypes, metadata={"k": "v"})
    )
    assert notes == (
        "npz has no bfloat16; written as float32, which holds it exactly: b",
        "npz has no F8_E4M3; its bits are written as uint8: e",
        "npz has no metadata; dropped: k",
    )
    with np.load(tmp_path / "x.npz") as back:
        assert set(back.files) == {*arrays, *bits}
        for name, array in arrays.items():
            assert back[name].dtype == array.dtype
            assert np.array_equal(back[name], array)
        assert (back["b"].dtype, float(back["b"]), back["e"].tolist()) == (
            np.float32,
            1.5,
            [1, 255],
        )


@pytest.mark.parametrize("name", ["nul\0nul", "\ud800", "x" * 70_000])
def test_names_it_cannot_hold(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="tensor name"):
        create_checkpoint(tmp_path / "x.npz", Contents((TensorSpec(name, "F32", ()),)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "damaged"),
        (npy(GOOD), "should have 8 bytes"),
        (npy(GOOD, bytes(9)), "should have 8 bytes"),
        (npy(GOOD, bytes(8), b"\x09\x00"), "version"),
        (npy("[" * 5000), "damaged"),
        (shaped("(-2,)"), "impossible"),
        (shaped("(True,)"), "impossible"),
        (shaped(f"({2**70},)"), "should have"),
        (shaped(f"(0, {2**70})"), "impossible"),
        (shaped("(2,)", "'<q9'"), "damaged"),
        (npy("__import__('os').abort()"), "damaged"),
        (b"\x93NUMPY\x02\x00\xff\xff\xff\xff{}", "damaged"),
    ],
)
def test_bad_members(tmp_path: Path, content: bytes, said: str) -> None:
    with pytest.raises(CheckpointError, match=said) as caught:
        open_checkpoint(zipped(tmp_path / "x.npz", content))
    assert "layer.w" in str(caught.value)


def test_python_2_headers_and_names_twice(tmp_path: Path) -> None:
    header = "{'descr': '<f4', 'fortran_order': False, 'shape': (1L, 2L), }"
    path = zipped(tmp_path / "x.npz", npy(header, np.float32([1, 2]).tobytes()))
    with open_checkpoint(path) as reader:
        assert reader.read("layer.w").tolist() == [[1, 2]]
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("layer.w.npy", npy(GOOD, bytes(8)))
    with pytest.raises(CheckpointError, match=r"two tensors are named 'layer\.w'"):
        open_checkpoint(path)


def test_bombs(tmp_path: Path) -> None:
    """The directory says that a few bytes inflate to 8 GB: refused before anything is allocated."""
    header = shaped(f"({1 << 31},)", "'|u1'")
    path = zipped(tmp_path / "x.npz", header, zipfile.ZIP_DEFLATED)
    blob = bytearray(path.read_bytes())
    at = blob.rindex(b"PK\x01\x02") + 24
    blob[at : at + 4] = (len(header) + (1 << 31)).to_bytes(4, "little")
    path.write_bytes(blob)
    with pytest.raises(CheckpointError, match="impossible size"):
        open_checkpoint(path)
    with pytest.raises(CheckpointError, match="compression"):
        open_checkpoint(zipped(path, npy(GOOD, bytes(8)), zipfile.ZIP_LZMA))
