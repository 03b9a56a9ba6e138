"""Hugging Face folders: one file or shards, and what is kept beside them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from weightvid.checkpoint import Contents, create_checkpoint, from_mapping, open_checkpoint
from weightvid.errors import CheckpointError, OutputError
from weightvid.spec import SideFile, TensorSpec

CONFIG = b'{"model_type": "tiny"}'


def tensors(count: int = 5) -> dict[str, np.ndarray]:
    return {f"layer.{i}.weight": np.full((4, 8), i, np.float32) for i in range(count)}


def write(path: Path, arrays: dict[str, np.ndarray], **more: object) -> None:
    source = from_mapping(arrays)
    contents = source.contents
    contents = Contents(contents.tensors, contents.aliases, contents.metadata, (), **more)  # type: ignore[arg-type]
    with create_checkpoint(path, contents) as writer:
        for spec in contents.tensors:
            writer.write(spec.name, source.read(spec.name))


def shards(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("weightvid.checkpoint.folder_writer.SHARD_BYTES", 300)
    files = (SideFile("config.json", CONFIG), SideFile("1_Pooling/config.json", b"{}"))
    write(folder, tensors(), files=files)
    return folder


def test_shards_and_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shards(tmp_path / "model", monkeypatch)
    names = sorted(p.name for p in folder.iterdir())
    assert names == [
        "1_Pooling",
        "config.json",
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
        "model.safetensors.index.json",
    ]
    assert not list(tmp_path.glob(".weightvid-*"))
    with open_checkpoint(folder) as reader:
        assert {f.path: f.data for f in reader.contents.files} == {
            "config.json": CONFIG,
            "1_Pooling/config.json": b"{}",
        }
        assert reader.contents.skipped == ()
        assert reader.contents.metadata == {"format": "pt"}
        for name, array in reversed(tensors().items()):
            assert np.array_equal(reader.read(name), array)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 5 * 128


def test_one_file_and_tied(tmp_path: Path) -> None:
    array = np.arange(6, dtype=np.float32)
    source = from_mapping({"a": array, "b": array})
    with create_checkpoint(tmp_path / "m", source.contents) as writer:
        writer.write("a", array)
        assert any("tied" in note for note in writer.notes)
    with open_checkpoint(tmp_path / "m") as reader:
        assert reader.read("b").tolist() == array.tolist()


def test_torch_shards(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    for number, part in enumerate(({"a": np.ones(3)}, {"b": np.zeros((2, 2))}), 1):
        write(tmp_path / f"pytorch_model-0000{number}-of-00002.bin", part)
    index = {"weight_map": {"a": "pytorch_model-00001-of-00002.bin",
                            "b": "pytorch_model-00002-of-00002.bin"}}  # fmt: skip
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with open_checkpoint(tmp_path) as reader:
        assert [spec.name for spec in reader.contents.tensors] == ["a", "b"]
        assert reader.read("a").tolist() == [1, 1, 1]


def test_a_diffusers_name(tmp_path: Path) -> None:
    files = (SideFile("config.json", b'{"_diffusers_version": "0.30"}'),)
    write(tmp_path / "unet", tensors(1), files=files)
    assert (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").is_file()
    with open_checkpoint(tmp_path / "unet") as reader:
        assert len(reader.contents.tensors) == 1


def test_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "m", tensors(1))
    folder = tmp_path / "m"
    keep = {
        "config.json": CONFIG,
        "modules.json": b'[{"path": ""}, {"path": "2_Dense"}]',
        "2_Dense/model.safetensors": b"\x02" + bytes(7) + b"{}",
        "tokenizer.model": b"\0\1",
        "empty.txt": b"",
    }
    leave = {
        "pytorch_model.bin": "other weights",
        "onnx/model.onnx": "other weights",
        "optimizer.pt": "training state",
        "bad:name.txt": "not safe",
        "large.txt": "larger than",
    }
    silent = (".gitattributes", ".git/config", "__pycache__/a.pyc", "flax_model.msgpack.index.json")
    monkeypatch.setattr("weightvid.checkpoint.side_files.SIDE_FILE_BYTES", 64)
    for name in (*keep, *leave, *silent):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(keep.get(name, b"x"))
    (folder / "large.txt").write_bytes(bytes(65))
    with open_checkpoint(folder) as reader:
        assert {f.path: f.data for f in reader.contents.files} == keep
        skipped = dict(entry.split(" (", 1) for entry in reader.contents.skipped)
    assert skipped.keys() == leave.keys()
    for name, reason in leave.items():
        assert reason in skipped[name]


def test_missing_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shards(tmp_path / "m", monkeypatch)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks model-00002-of-00003.safetensors"):
        open_checkpoint(folder)


def edit_index(folder: Path, tensor: str, shard: object) -> None:
    path = folder / "model.safetensors.index.json"
    record = json.loads(path.read_text())
    if shard is None:
        del record["weight_map"][tensor]
    else:
        record["weight_map"][tensor] = shard
    path.write_text(json.dumps(record))


def test_an_index_that_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shards(tmp_path / "m", monkeypatch)
    edit_index(folder, "layer.0.weight", "model-00003-of-00003.safetensors")
    with pytest.raises(CheckpointError, match=r"places layer\.0\.weight in model-00003"):
        open_checkpoint(folder)


def test_tensors_the_index_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shards(tmp_path / "m", monkeypatch)
    edit_index(folder, "layer.1.weight", None)
    with open_checkpoint(folder) as reader:
        assert len(reader.contents.tensors) == 4
        assert reader.contents.skipped == (
            "layer.1.weight (in model-00001-of-00003.safetensors, but not in the index)",
        )


@pytest.mark.parametrize("shard", ["../secret.safetensors", "a/b", "..", "", 7, "a\\b"])
def test_an_index_that_leads_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard: object
) -> None:
    folder = shards(tmp_path / "m", monkeypatch)
    edit_index(folder, "layer.1.weight", shard)
    with pytest.raises(CheckpointError, match="which is no file"):
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
    with pytest.raises(CheckpointError, match="name one of them"):
        open_checkpoint(tmp_path)


def test_a_full_folder_needs_force(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    write(folder, tensors(1))  # empty: taken
    with pytest.raises(OutputError, match="not empty"):
        write(folder, tensors(1))
    (folder / "notes.txt").write_text("mine")
    (folder / "model-00001-of-00002.safetensors").write_text("old")
    source = from_mapping(tensors(2))
    with create_checkpoint(folder, source.contents, force=True) as writer:
        for spec in source.contents.tensors:
            writer.write(spec.name, source.read(spec.name))
    assert sorted(p.name for p in folder.iterdir()) == ["model.safetensors", "notes.txt"]
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_nothing_is_left_after_a_failure(tmp_path: Path) -> None:
    contents = Contents((TensorSpec("a", "F32", (3,)),))
    with (
        pytest.raises(CheckpointError, match="never written"),
        create_checkpoint(tmp_path / "m", contents),
    ):
        pass
    with pytest.raises(KeyboardInterrupt), create_checkpoint(tmp_path / "m", contents):
        raise KeyboardInterrupt
    bad = Contents((), files=(SideFile("../x", b""),))
    with pytest.raises(CheckpointError, match="leave its folder"):
        create_checkpoint(tmp_path / "m", bad)
    with pytest.raises(OutputError, match="No such file"):
        create_checkpoint(tmp_path / "none" / "m", contents)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="a file has that name"):
        create_checkpoint(tmp_path / "file", contents, kind="folder")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
