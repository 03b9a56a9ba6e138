"""npz: numpy reads what we write, we read what numpy writes, one member at a time."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest

from weightvid.checkpoint import (
    Contents,
    TensorSpec,
    create_checkpoint,
    from_mapping,
    open_checkpoint,
)
from weightvid.errors import CheckpointError


def npy(header: str, data: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    text = header.encode("latin1")
    return b"\x93NUMPY" + version + len(text).to_bytes(2, "little") + text + data


def zipped(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_we_read_what_numpy_writes(tmp_path: Path, save: object) -> None:
    arrays = {
        "c": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
        "f": np.asfortranarray(np.arange(24, dtype=np.int16).reshape(2, 3, 4)),
        "f_empty": np.asfortranarray(np.empty((0, 3, 2), np.float64)),
        "big": np.arange(5, dtype=">f4"),
        "text": np.array(["a", "bcd"]),
        "bytes": np.array([b"xy", b"z"]),
        "day": np.array(["2020-01-01"], "M8[D]"),
        "scalar": np.array(3.5),
        "flag": np.array([True, False]),
        "complex": np.array([1 + 2j]),
        "dir/name": np.ones(1),
    }
    save(tmp_path / "x.npz", **arrays)  # type: ignore[operator]
    with open_checkpoint(tmp_path / "x.npz") as reader:
        assert [spec.name for spec in reader.contents.tensors] == list(arrays)
        assert reader.spec("big").dtype == "npy:>f4"
        assert reader.spec("text").dtype == "npy:<U3"
        for name, array in arrays.items():
            got = reader.read(name)
            assert got.flags.c_contiguous
            assert (got.dtype, got.shape) == (array.dtype, array.shape)
            assert got.tobytes() == array.tobytes()


def test_numpy_reads_what_we_write(tmp_path: Path) -> None:
    arrays = {"w": np.arange(6.0).reshape(2, 3), "s": np.array(7, np.uint8), "": np.ones(2)}
    source = from_mapping(arrays, metadata={"k": "v"})
    with create_checkpoint(tmp_path / "x.npz", source.contents) as writer:
        assert writer.notes == ("npz has no metadata; dropped: k",)
        for spec in source.contents.tensors:
            writer.write(spec.name, source.read(spec.name))
    with np.load(tmp_path / "x.npz") as back:
        assert set(back.files) == set(arrays)
        for name, array in arrays.items():
            assert back[name].tobytes() == array.tobytes()
            assert back[name].dtype == array.dtype
    with zipfile.ZipFile(tmp_path / "x.npz") as archive:
        assert archive.testzip() is None


def test_types_numpy_lacks_are_noted(tmp_path: Path) -> None:
    contents = Contents(
        (
            TensorSpec("b", "BF16", ()),
            TensorSpec("e", "F8_E4M3", (2,)),
            TensorSpec("f", "F32", ()),
        )
    )
    with create_checkpoint(tmp_path / "x.npz", contents) as writer:
        bf16, float8 = writer.notes
        assert "float32" in bf16
        assert bf16.endswith(": b")
        assert "F8_E4M3" in float8
        assert float8.endswith("uint8: e")
        writer.write("b", np.array(0x3FC0, np.uint16))
        writer.write("e", np.array([1, 255], np.uint8))
        writer.write("f", np.array(2, np.float32))
    with np.load(tmp_path / "x.npz") as back:
        assert (back["b"].dtype, float(back["b"])) == (np.float32, 1.5)
        assert back["e"].tolist() == [1, 255]


def test_entries_that_are_no_plain_arrays_are_reported(tmp_path: Path) -> None:
    records = np.zeros(2, [("ключ", "f4")])
    with pytest.warns(UserWarning, match="format 3.0"):
        np.savez(
            tmp_path / "x.npz",
            ok=np.ones(2),
            objects=np.array([{}, None]),
            records=np.zeros(2, "f4,i4"),
            odd=records,
        )
    with zipfile.ZipFile(tmp_path / "x.npz", "a") as archive:
        archive.writestr("readme.txt", "hello")
    with open_checkpoint(tmp_path / "x.npz") as reader:
        assert [spec.name for spec in reader.contents.tensors] == ["ok"]
        said = {item.split(" ")[0] for item in reader.contents.skipped}
        assert said == {"objects", "records", "odd", "readme.txt"}
        with pytest.raises(CheckpointError, match="'objects' is an array of Python objects"):
            reader.read("objects")


@pytest.mark.parametrize(
    "name", ["", "a/b", "/abs", "../up", "ä\u2603", "a.npy", "a\nb", "x" * 300]
)
def test_odd_names(tmp_path: Path, name: str) -> None:
    source = from_mapping({name: np.ones(2, np.float32)})
    with create_checkpoint(tmp_path / "x.npz", source.contents) as writer:
        writer.write(name, source.read(name))
    with open_checkpoint(tmp_path / "x.npz") as reader:
        assert reader.read(name).tolist() == [1, 1]


@pytest.mark.parametrize("name", ["nul\0nul", "\ud800", "x" * 70_000])
def test_names_it_cannot_hold(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="tensor name"):
        create_checkpoint(tmp_path / "x.npz", Contents((TensorSpec(name, "F32", ()),)))
    assert list(tmp_path.iterdir()) == []


GOOD = "{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "damaged"),
        (b"not an array", "damaged"),
        (npy(GOOD), "should have 8 bytes"),
        (npy(GOOD, bytes(9)), "should have 8 bytes"),
        (npy(GOOD, bytes(8), b"\x09\x00"), "version"),
        (npy("{'descr': '<f4'}"), "no array description"),
        (npy("[" * 5000), "damaged"),
        (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-2,), }"), "impossible"),
        (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (True,), }"), "impossible"),
        (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (2**70,), }"), "damaged"),
        (npy(f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({2**70},), }}"), "impossible"),
        (npy(f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({2**60},), }}"), "bytes"),
        (npy("{'descr': '<q9', 'fortran_order': False, 'shape': (2,), }"), "damaged"),
        (npy("{'descr': 7, 'fortran_order': False, 'shape': (2,), }"), "."),
        (npy("__import__('os').abort()"), "damaged"),
        (b"\x93NUMPY\x02\x00\xff\xff\xff\xff{}", "damaged"),
    ],
)
def test_bad_members(tmp_path: Path, content: bytes, said: str) -> None:
    zipped(tmp_path / "x.npz", {"layer.w.npy": content})
    with pytest.raises(CheckpointError, match=said) as caught:
        open_checkpoint(tmp_path / "x.npz")
    assert "layer.w" in str(caught.value)


def test_python_2_headers(tmp_path: Path) -> None:
    header = "{'descr': '<f4', 'fortran_order': False, 'shape': (1L, 2L), }"
    zipped(tmp_path / "x.npz", {"w.npy": npy(header, np.float32([1, 2]).tobytes())})
    with open_checkpoint(tmp_path / "x.npz") as reader:
        assert reader.read("w").tolist() == [[1, 2]]


def test_the_same_name_twice(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("a.npy", npy(GOOD, bytes(8)))
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("a.npy", npy(GOOD, bytes(8)))
    with pytest.raises(CheckpointError, match="two arrays named 'a'"):
        open_checkpoint(tmp_path / "x.npz")


def test_a_member_that_claims_too_much(tmp_path: Path) -> None:
    """The directory says that a few bytes inflate to 8 GB: refused before anything is allocated."""
    header = npy(f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({1 << 31},), }}")
    path = zipped(tmp_path / "x.npz", {"bomb.npy": header}, zipfile.ZIP_DEFLATED)
    blob = bytearray(path.read_bytes())
    at = blob.rindex(b"PK\x01\x02") + 24
    blob[at : at + 4] = (len(header) + (1 << 31)).to_bytes(4, "little")
    path.write_bytes(blob)
    with pytest.raises(CheckpointError, match="impossible size"):
        open_checkpoint(path)


def test_an_unknown_compression(tmp_path: Path) -> None:
    path = zipped(tmp_path / "x.npz", {"w.npy": npy(GOOD, bytes(8))}, zipfile.ZIP_LZMA)
    with pytest.raises(CheckpointError, match="compression"):
        open_checkpoint(path)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_every_truncation_and_many_flips(tmp_path: Path, save: object) -> None:
    buffer = io.BytesIO()
    arrays = {"a": np.arange(4, dtype=np.float32), "b": np.ones((3, 3), np.int8)}
    save(buffer, **arrays)  # type: ignore[operator]
    blob = buffer.getvalue()
    path = tmp_path / "x.npz"
    for end in range(0, len(blob), 7):
        path.write_bytes(blob[:end])
        with pytest.raises(CheckpointError):
            open_checkpoint(path)
    for at in range(0, len(blob), 2):
        path.write_bytes(blob[:at] + bytes([blob[at] ^ 1 << at // 2 % 8]) + blob[at + 1 :])
        try:
            with open_checkpoint(path) as reader:
                for spec in reader.contents.tensors:
                    # A checksum guards the data, so what comes out is what went in.
                    got = reader.read(spec.name)
                    assert got.tobytes() == arrays.get(spec.name, got).tobytes()
        except CheckpointError:
            pass
