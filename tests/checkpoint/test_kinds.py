"""A file's content says what it is; messages help when it is nothing we read."""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from checkpoints import save

from weightvid.checkpoint import (
    KINDS,
    create_checkpoint,
    from_mapping,
    kind_for_output,
    kind_of_file,
    open_checkpoint,
)
from weightvid.errors import CheckpointError, OutputError


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
        (b"GGUF\x03\0\0\0", "gguf"),
        (b"\x08\x07\x12\x07pytorch", "onnx"),
        (b"\x1c\0\0\0TFL3", "tflite"),
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
        ("m.pt", zipped("m/data.pkl", "m/constants.pkl"), "TorchScript.*state_dict"),
        ("m.npy", b"\x93NUMPY\x01\0", "single NumPy array"),
        ("m.mp4", b"\0\0\0\x20ftypisom", "MP4"),
        ("m.bin", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("m.bin", b"<!DOCTYPE html>", "web page"),
        ("m.pt.gz", b"\x1f\x8b\x08", "gzip"),
        ("m.tar", bytes(257) + b"ustar", "tar"),
        ("m.zip", zipped("readme.txt"), "zip archive with neither"),
        ("m.task", zipped("hand.tflite"), r"bundle of LiteRT models; extract.* hand\.tflite"),
        ("m.npz", zipped("a.npy")[:-10], "cut short"),
        ("m.safetensors", b"\x08\0\0", "named like a safetensors file"),
        ("__0_0.distcp", zipped("a/data.pkl"), "torch.distributed; name its folder"),
        (".metadata", b"\x80\x02", "torch.distributed; name its folder"),
        ("m.txt", b"hello", r"no checkpoint of a known kind.*\.safetensors"),
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


def test_places_that_are_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    contents = from_mapping({"w": np.ones(3, np.float32)}).contents
    for path in ("-", "pipe", "/dev/null"):
        with pytest.raises(OutputError, match="cannot go into a pipe"):
            create_checkpoint(path, contents)
    with pytest.raises(CheckpointError, match="from a file, not from a pipe"):
        open_checkpoint("-")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(OutputError, match=r"cannot write .*sub: Permission denied"):
        create_checkpoint(tmp_path / "sub", contents)
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, said in (
        (tmp_path / "missing.pt", "No such file"),
        (tmp_path, "the folder has nothing"),
        ("a\0b", "null"),
        (tmp_path / "pipe", "regular file"),
    ):
        with pytest.raises(CheckpointError, match=said):
            open_checkpoint(path)


def test_output_kinds(tmp_path: Path) -> None:
    source = from_mapping({"w": np.ones(3, np.float32)})
    save(tmp_path / "MODEL.NPZ", source)
    with open_checkpoint(str(tmp_path / "MODEL.NPZ")) as reader:
        assert reader.read("w").tolist() == [1, 1, 1]
    with pytest.raises(CheckpointError, match="onnxx"):
        create_checkpoint(tmp_path / "x.npz", source.contents, kind="onnxx")
    with pytest.raises(CheckpointError, match=r"what kind.*\.safetensors"):
        create_checkpoint(tmp_path / "x.tar", source.contents)
    for name in ("Qwen2.5-0.5B", "model.v1.5", "plain"):
        assert kind_for_output(tmp_path / name).name == "folder"
    suffixes = [suffix for kind in KINDS for suffix in kind.suffixes]
    assert len(suffixes) == len(set(suffixes))
