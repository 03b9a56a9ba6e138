"""A file's content says what it is; messages help when it is nothing we read."""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightvid.checkpoint import create_checkpoint, from_mapping, open_checkpoint
from weightvid.checkpoint.kinds import KINDS, kind_of_file
from weightvid.errors import CheckpointError


def zipped(*names: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(name, b"")
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        ((2).to_bytes(8, "little") + b"{}", "safetensors"),
        (zipped("m/data.pkl", "m/version"), "torch"),
        (zipped("data.pkl", "a.npy"), "torch"),
        (zipped("a.npy"), "npz"),
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "torch"),
        (b"\x80\x04N.", "torch"),
    ],
)
@pytest.mark.parametrize("suffix", [".bin", ".npz", ".safetensors", ".anything", ""])
def test_content_decides(tmp_path: Path, content: bytes, kind: str, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(content)
    assert kind_of_file(path).name == kind


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("m.pt", b"", "empty"),
        ("m.bin", b"GGUF\x01\0\0\0" + bytes(50), "GGUF versions 2 and 3"),
        ("m.gguf", b"garbage and more garbage", "named like a GGUF file"),
        ("m.h5", b"\x89HDF\r\n\x1a\n" + bytes(50), "HDF5.*not supported"),
        ("m.onnx", b"garbage and more garbage", "named like an? ONNX file"),
        ("m.tflite", b"\x1c\0\0\0TFL3", "TensorFlow Lite"),
        ("m.pt", zipped("m/data.pkl", "m/constants.pkl"), "TorchScript.*state_dict"),
        ("m.npy", b"\x93NUMPY\x01\0", "single NumPy array"),
        ("m.mp4", b"\0\0\0\x20ftypisom", "MP4"),
        ("m.bin", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("m.bin", b"<!DOCTYPE html>", "web page"),
        ("m.pt.gz", b"\x1f\x8b\x08", "gzip"),
        ("m.tar", bytes(257) + b"ustar", "tar"),
        ("m.zip", zipped("readme.txt"), "zip archive with neither"),
        ("m.zip", zipped(), "zip archive with neither"),
        ("m.npz", zipped("a.npy")[:-10], "cut short"),
        ("m.safetensors", b"\x08\0\0", "named like a safetensors file"),
        ("m.safetensors", b"garbage and more garbage", "named like a safetensors file"),
        ("m.txt", b"hello", r"no checkpoint of a known kind.*\.safetensors"),
        ("m.txt", b"x", "no checkpoint of a known kind"),
        ("m.safetensors", b"\xff" * 7 + b"\x7f{", "no valid safetensors file.*header too large"),
    ],
)
def test_what_it_is_not(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=said) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file"):
        open_checkpoint(tmp_path / "missing.pt")
    with pytest.raises(CheckpointError, match="folder"):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="null"):
        open_checkpoint("a\0b")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="regular file"):
        open_checkpoint(tmp_path / "pipe")


def test_strings_and_suffixes_in_capitals(tmp_path: Path) -> None:
    source = from_mapping({"w": np.ones(3, np.float32)})
    path = str(tmp_path / "MODEL.NPZ")
    with create_checkpoint(path, source.contents) as writer:
        writer.write("w", source.read("w"))
    with open_checkpoint(path) as reader:
        assert reader.read("w").tolist() == [1, 1, 1]


def test_suffixes_are_unambiguous() -> None:
    suffixes = [suffix for kind in KINDS for suffix in kind.suffixes]
    assert len(suffixes) == len(set(suffixes))
    assert all(suffix.startswith(".") and suffix == suffix.lower() for suffix in suffixes)


@given(content=st.binary(max_size=600), suffix=st.sampled_from([".safetensors", ".npz", ".x"]))
def test_any_bytes(tmp_path_factory: pytest.TempPathFactory, content: bytes, suffix: str) -> None:
    if content[:1] == b"\x80":
        content = b"?" + content
    path = tmp_path_factory.getbasetemp() / f"fuzz{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError):
        open_checkpoint(path)
