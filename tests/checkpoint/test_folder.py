"""Hugging Face folders: one file or shards, and the side files."""

from __future__ import annotations

import errno
import json
import os
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
        assert reader.contents.skipped == ()
        assert reader.read("layer.1.weight")[0, 0] == 1, "what the index misses is loaded, too"
    record["weight_map"]["layer.1.weight"] = shard
    path.write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=said):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {}}', "\xff"]
)
def test_no_index(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_bytes(text.encode("latin1"))
    with pytest.raises(CheckpointError, match="no index of shards"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("name", "made"),
    [
        ("open_clip_model.safetensors", "open_clip_model.safetensors"),
        ("diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.fp16.safetensors"),
        ("model.safetensors", "model.safetensors"),
        ("adapter_model.bin", "adapter_model.safetensors"),
        ("pytorch_model.bin", "model.safetensors"),
    ],
)
def test_files_keep_their_names(tmp_path: Path, name: str, made: str) -> None:
    (tmp_path / "in").mkdir()
    save(tmp_path / "in" / name, from_mapping(tensors(2)))
    with open_checkpoint(tmp_path / "in") as reader:
        save(tmp_path / "out", reader)
    assert [p.name for p in (tmp_path / "out").iterdir()] == [made]


def test_shards_of_a_variant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``model.safetensors.index.fp16.json``, as transformers and diffusers write it, with a BOM."""
    names = {}
    for number, array in enumerate(tensors(2).items(), 1):
        shard = f"model.fp16-{number:05d}-of-00002.safetensors"
        write(tmp_path / shard, dict([array]))
        names[array[0]] = shard
    index = tmp_path / "model.safetensors.index.fp16.json"
    index.write_text(json.dumps({"weight_map": names}), "utf-8-sig")
    monkeypatch.setattr("weightvid.checkpoint.folder.SHARD_BYTES", 100)
    with open_checkpoint(tmp_path) as reader:
        assert {spec.name for spec in reader.contents.tensors} == set(tensors(2))
        save(tmp_path / "out", reader)
    (tmp_path / "out" / "config.json").write_text("{}")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "config.json", *sorted({*names.values(), index.name})
    ]  # fmt: skip
    with open_checkpoint(tmp_path / "out") as reader:
        assert {spec.name for spec in reader.contents.tensors} == set(tensors(2))


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ((), "no weights that weightvid looks for"),
        (("m-q4.gguf", "readme.md"), r"one by one: .*/m-q4\.gguf$"),
        (("onnx/model.onnx", "m.mlpackage/Manifest.json"),
         r"one by one: .*/m.mlpackage, .*/onnx/model\.onnx$"),
        (("model_index.json", "unet/model.safetensors", "vae/model.safetensors"),
         r"pack them one by one: .*/unet, .*/vae$"),
        ((".metadata", "__0_0.distcp"), r"torch\.distributed.*dcp_to_torch"),
    ],
)  # fmt: skip
def test_folders_of_something_else(tmp_path: Path, files: tuple[str, ...], said: str) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(CheckpointError, match=said):
        open_checkpoint(tmp_path)


def test_files_that_never_end(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", tensors(1))
    os.mkfifo(folder / "modules.json")
    with open_checkpoint(folder) as reader:
        assert reader.contents.files == ()
    (folder / "modules.json").unlink()
    (folder / "modules.json").symlink_to("/dev/zero")
    with open_checkpoint(folder) as reader:
        assert reader.contents.files == ()


def test_links_do_not_lead_out(tmp_path: Path) -> None:
    """But in the hub's cache, where all files are links to blobs."""
    (tmp_path / "secret").write_text("secret")
    folder = write(tmp_path / "m", tensors(1), {"config.json": CONFIG})
    (folder / "vocab.txt").symlink_to(tmp_path / "secret")
    (folder / "same.json").symlink_to(folder / "config.json")
    with open_checkpoint(folder) as reader:
        assert [file.path for file in reader.contents.files] == ["config.json", "same.json"]
        assert reader.contents.skipped == ("vocab.txt (a link that leads out of the folder)",)
    cache = tmp_path / "models--org--m"
    (cache / "snapshots").mkdir(parents=True)
    (cache / "blobs").mkdir()
    folder = folder.rename(cache / "snapshots" / "rev")
    (folder / "config.json").rename(cache / "blobs" / "abc")
    (folder / "config.json").symlink_to("../../blobs/abc")
    with open_checkpoint(folder) as reader:
        assert "config.json" in {file.path for file in reader.contents.files}


def test_what_is_not_restored(tmp_path: Path) -> None:
    bad = (".bashrc", ".git/hooks/post-checkout", "model-00001-of-00002.safetensors", "x/w.bin",
           "pytorch_model.bin.index.json", "sitecustomize.py", "lib/__pycache__/a.pyc")  # fmt: skip
    good = ("config.json", "1_Pooling/config.json", "tokenizer.model", "modeling.py")
    source = from_mapping(tensors(1))
    files = tuple(SideFile(name, b"x") for name in (*bad, *good))
    source.contents = replace(source.contents, files=files)
    notes = save(tmp_path / "m", source)
    made = {p.relative_to(tmp_path / "m").as_posix() for p in (tmp_path / "m").rglob("*")}
    assert made == {*good, "1_Pooling", "model.safetensors"}
    assert all(name in "".join(notes) for name in bad)


def test_links_in_the_destination_are_not_followed(tmp_path: Path) -> None:
    outside, folder = tmp_path / "outside", tmp_path / "m"
    outside.mkdir()
    write(folder, tensors(1))
    (folder / "1_Pooling").symlink_to(outside)
    (folder / "config.json").symlink_to(outside / "config.json")
    source = from_mapping(tensors(2))
    files = {"config.json": CONFIG, "1_Pooling/config.json": b"{}"}
    source.contents = replace(
        source.contents, files=tuple(SideFile(name, data) for name, data in files.items())
    )
    before = {p.name: p.lstat().st_mtime_ns for p in folder.iterdir()}
    with pytest.raises(OutputError, match=r"1_Pooling is a link, which is not followed"):
        save(folder, source, force=True)
    assert {p.name: p.lstat().st_mtime_ns for p in folder.iterdir()} == before
    (folder / "1_Pooling").unlink()
    save(folder, source, force=True)
    assert list(outside.iterdir()) == []
    assert not (folder / "config.json").is_symlink()


@pytest.mark.parametrize("fails_at", range(3))
def test_nothing_is_lost_when_a_step_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    """New files come into place before old weights go; those that did not are kept."""
    folder = write(tmp_path / "m", tensors(1), {"config.json": b"old"})
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    source = from_mapping(tensors(2))
    source.contents = replace(source.contents, files=(SideFile("config.json", CONFIG),))
    real, moved = Path.replace, []

    def replace_or_fail(self: Path, target: Path) -> Path:
        if self.parent.parent == tmp_path:
            if len(moved) == fails_at:
                raise OSError(errno.EIO, "Input/output error")
            moved.append(target.name)
        return real(self, target)

    monkeypatch.setattr(Path, "replace", replace_or_fail)
    if fails_at == 2:
        save(folder, source, force=True)
        assert {p.name for p in folder.iterdir()} == {"config.json", "model.safetensors"}
        return
    with pytest.raises(OutputError, match="Input/output error; the new files that have not"):
        save(folder, source, force=True)
    assert (folder / "model-00001-of-00001.safetensors").is_file()
    (kept,) = [p for p in tmp_path.iterdir() if p != folder]
    new = {p.name: p.read_bytes() for p in (*kept.iterdir(), *(folder / name for name in moved))}
    assert new.keys() == {"config.json", "model.safetensors"}
    assert new["config.json"] == CONFIG


def test_folders_that_cannot_be_read(tmp_path: Path) -> None:
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
