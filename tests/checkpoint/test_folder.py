"""Hugging Face folders: one file or shards, and the side files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import save

from weightvid.checkpoint import Contents, create_checkpoint, from_mapping, open_checkpoint
from weightvid.errors import CheckpointError, OutputError
from weightvid.spec import SideFile

CONFIG = b'{"model_type": "tiny"}'


def tensors(count: int = 5) -> dict[str, np.ndarray[Any, Any]]:
    return {f"layer.{i}.weight": np.full((4, 8), i, np.float32) for i in range(count)}


def write(path: Path, arrays: dict[str, Any], files: dict[str, bytes] | None = None) -> Path:
    source = from_mapping(arrays)
    given = tuple(SideFile(name, data) for name, data in (files or {}).items())
    source.contents = replace(source.contents, files=given)
    save(path, source)
    return path


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Five tensors in three shards."""
    monkeypatch.setattr("weightvid.checkpoint.folder.SHARD_BYTES", 300)
    return write(tmp_path / "m", tensors(), {"config.json": CONFIG, "1_Pooling/config.json": b"{}"})


def test_shards_and_back(folder: Path) -> None:
    assert sorted(p.name for p in folder.iterdir()) == [
        "1_Pooling",
        "config.json",
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
        "model.safetensors.index.json",
    ]
    assert [p.name for p in folder.parent.iterdir()] == ["m"]
    with open_checkpoint(folder) as reader:
        assert {file.path: file.data for file in reader.contents.files} == {
            "config.json": CONFIG,
            "1_Pooling/config.json": b"{}",
        }
        assert reader.contents.skipped == ()
        assert reader.contents.metadata == {"format": "pt"}
        for name, array in reversed(tensors().items()):
            assert np.array_equal(reader.read(name), array)
            assert reader.read_range(name, 3, 4).tolist() == array.reshape(-1)[3:7].tolist()
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 5 * 128


def test_torch_shards_and_tied(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    tied = np.ones(3)
    names = {}
    for number, part in enumerate(({"a": tied, "t": tied}, {"b": np.zeros((2, 2))}), 1):
        shard = f"pytorch_model-0000{number}-of-00002.bin"
        write(tmp_path / shard, part)
        names |= dict.fromkeys(part, shard)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))
    write(tmp_path / "unet", tensors(1), {"config.json": b'{"_diffusers_version": "0.30"}'})
    assert (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").is_file()
    with open_checkpoint(tmp_path) as reader:
        assert [spec.name for spec in reader.contents.tensors] == ["a", "b"]
        assert reader.contents.aliases == {"t": "a"}
        assert reader.read("t").tolist() == [1, 1, 1]


def test_which_files_belong_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "m", tensors(1))
    taken = {
        "config.json": CONFIG,
        "modules.json": b'[{"path": ""}, {"path": "2_Dense"}]',
        "2_Dense/model.safetensors": b"\x02" + bytes(7) + b"{}",
        "tokenizer.model": b"\0\1",
        "empty.txt": b"",
    }
    left = {
        "pytorch_model.bin": "other weights",
        "onnx/model.onnx": "other weights",
        "optimizer.pt": "training state",
        "bad:name.txt": "not safe",
        "large.txt": "larger than",
    }
    silent = (".gitattributes", ".git/config", "__pycache__/a.pyc", "flax_model.msgpack.index.json")
    monkeypatch.setattr("weightvid.checkpoint.folder.SIDE_FILE_BYTES", 64)
    for name in (*taken, *left, *silent):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(taken.get(name, b"x"))
    (folder / "large.txt").write_bytes(bytes(65))
    with open_checkpoint(folder) as reader:
        assert {file.path: file.data for file in reader.contents.files} == taken
        skipped = dict(entry.split(" (", 1) for entry in reader.contents.skipped)
    assert skipped.keys() == left.keys()
    assert all(reason in skipped[name] for name, reason in left.items())


@pytest.mark.parametrize(
    ("shard", "said"),
    [
        ("model-00003-of-00003.safetensors", r"places layer\.1\.weight in model-00003"),
        ("gone.safetensors", r"lacks gone\.safetensors"),
        *((name, "which is no file") for name in ("../x", "a/b", "..", "", 7, "a\\b")),
    ],
)
def test_an_index_that_lies(folder: Path, shard: object, said: str) -> None:
    path = folder / "model.safetensors.index.json"
    record = json.loads(path.read_text())
    del record["weight_map"]["layer.1.weight"]
    path.write_text(json.dumps(record))
    with open_checkpoint(folder) as reader:
        assert reader.contents.skipped == (
            "layer.1.weight (in model-00001-of-00003.safetensors, but not in the index)",
        )
    record["weight_map"]["layer.1.weight"] = shard
    path.write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=said):
        open_checkpoint(folder)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', "\xff"])
def test_no_index(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_bytes(text.encode("latin1"))
    with pytest.raises(CheckpointError, match="no index of shards"):
        open_checkpoint(tmp_path)


def test_folders_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no weights"):
        open_checkpoint(tmp_path)
    for name in ("a.safetensors", "b.safetensors"):
        write(tmp_path / name, tensors(1))
    with pytest.raises(CheckpointError, match="name one"):
        open_checkpoint(tmp_path)


def test_what_is_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    write(folder, tensors(1))  # empty: taken
    (folder / "notes.txt").write_text("mine")
    (folder / "model-00001-of-00002.safetensors").write_text("old")
    save(folder, from_mapping(tensors(2)), force=True)
    assert sorted(p.name for p in folder.iterdir()) == ["model.safetensors", "notes.txt"]
    (tmp_path / "file").write_text("")
    for path, contents, said in (
        (tmp_path / "x", Contents((), files=(SideFile("../x", b""),)), "leave its folder"),
        (tmp_path / "none" / "m", Contents(()), "No such file"),
        (tmp_path / "file", Contents(()), "a file has that name"),
        (Path("s3://bucket/m"), Contents(()), "it is an address"),
    ):
        with pytest.raises((CheckpointError, OutputError), match=said):
            create_checkpoint(path, contents, kind="folder")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "m"]
