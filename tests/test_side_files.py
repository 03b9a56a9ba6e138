"""Side files: in the archive, out of it, and archives that lie about them."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from archives import Pipe, first, normal, packed
from hypothesis import given
from hypothesis import strategies as st

from weightvid.checkpoint import from_mapping
from weightvid.container import boxes
from weightvid.container.files import store_files
from weightvid.errors import CheckpointError, FormatError, TensorNotFoundError
from weightvid.loader import open_archive
from weightvid.pack import PackOptions, pack_checkpoint
from weightvid.spec import SideFile, is_safe_path
from weightvid.unpack import UnpackOptions, unpack_archive

ARRAYS = {"w": normal(1, 64, 65), "b": normal(2, 5)}
FILES = (
    SideFile("config.json", b'{"hidden": 64}'),
    SideFile("sub/empty.txt", b""),
    SideFile("graph.onnx", b"graph", "onnx-graph"),
    SideFile("text.txt", b"all work and no play " * 4000),
)


def archive_of(files: tuple[SideFile, ...] = FILES, **options: Any) -> bytes:
    reader = from_mapping(ARRAYS)
    reader.contents = replace(reader.contents, files=files)
    stream = io.BytesIO()
    path = Path(stream.name) if hasattr(stream, "name") else None
    assert path is None
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "m.mp4"
        pack_checkpoint(reader, made, PackOptions(**options))
        return made.read_bytes()


@pytest.fixture(scope="module")
def data() -> bytes:
    return archive_of()


def test_random_access(data: bytes) -> None:
    with open_archive(io.BytesIO(data)) as archive:
        assert [f.path for f in archive.files] == [f.path for f in FILES]
        for file in reversed(FILES):
            assert archive.read_file(file.path) == file.data
        with pytest.raises(TensorNotFoundError, match="no side file"):
            archive.read_file("missing")
        assert archive.header.version == (2, 0)
        assert archive["b"].tolist() == ARRAYS["b"].tolist()
        assert len(list(archive)) == 2
        assert [name for name, _ in archive] == [name for name, _ in archive]


@pytest.mark.parametrize("files_first", [True, False])
def test_a_pipe(data: bytes, files_first: bool) -> None:
    archive = open_archive(Pipe(data))
    if files_first:
        assert [d for _, d in archive.read_files()] == [f.data for f in FILES]
    assert {name for name, _ in archive} == {"w", "b"}
    with pytest.raises(FormatError, match="not-seekable"):
        list(archive.read_files())
    with pytest.raises(FormatError, match="not-seekable"):
        archive.read_file("config.json")


def test_without(data: bytes) -> None:
    bare = archive_of(side_files=False)
    assert bare == packed(ARRAYS)
    assert len(bare) < len(data)
    with open_archive(io.BytesIO(bare)) as archive:
        assert archive.files == ()
        assert archive.header.version == (2, 0)


@pytest.mark.parametrize("opened", [io.BytesIO, Pipe])
def test_unpacked_into_a_folder(data: bytes, tmp_path: Path, opened: Callable[..., Any]) -> None:
    report = unpack_archive(opened(data), tmp_path / "m")
    assert report.side_files == ("config.json", "sub/empty.txt", "text.txt")
    assert (tmp_path / "m" / "config.json").read_bytes() == FILES[0].data
    assert not (tmp_path / "m" / "graph.onnx").exists()
    size = sum(p.stat().st_size for p in (tmp_path / "m").rglob("*") if p.is_file())
    assert report.file_bytes == size
    report = unpack_archive(opened(data), tmp_path / "n", UnpackOptions(side_files=False))
    assert [p.name for p in (tmp_path / "n").iterdir()] == ["model.safetensors"]
    report = unpack_archive(opened(data), tmp_path / "m.npz")
    assert any("left out: config.json" in note for note in report.notes)
    assert report.side_files == ()


def test_damage(data: bytes, tmp_path: Path) -> None:
    box = first(data, boxes.FILE_UUID)
    broken = bytearray(data)
    broken[box.end - 1] ^= 1
    with pytest.raises(FormatError) as caught:
        unpack_archive(io.BytesIO(broken), tmp_path / "m")
    assert caught.value.code == "digest"
    report = unpack_archive(io.BytesIO(broken), tmp_path / "m", UnpackOptions(partial=True))
    assert "side files are damaged" in report.notes[-1]
    assert report.missing == ()


def with_files(data: bytes, change: Callable[[list[dict[str, Any]]], None]) -> bytes:
    """The archive with another list of files in its header."""
    box = first(data, boxes.HEADER_UUID)
    record = json.loads(boxes.inflate(data[box.payload + 32 : box.end], 1 << 20, "header"))
    change(record["files"])
    made = boxes.uuid_box(boxes.HEADER_UUID, boxes.seal(boxes.deflate(boxes.to_json(record))))
    return data[: box.begin] + made + data[box.end :]


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"path": "../config.json"}, "path"),
        ({"path": "/etc/passwd"}, "path"),
        ({"path": "SUB"}, "path"),
        ({"path": "Text.txt"}, "path"),
        ({"path": "con.txt"}, "path"),
        ({"path": ""}, "path"),
        ({"path": "\ud800"}, "path"),
        ({"path": 3}, "schema"),
        ({"codec": None}, "schema"),
        ({"role": 3}, "schema"),
        ({"role": "x" * 65}, "schema"),
        ({"bytes": -1}, "schema"),
        ({"bytes": 1 << 40}, "schema"),
        ({"box_bytes": 55}, "schema"),
    ],
)
def test_lists_that_are_refused(data: bytes, change: dict[str, Any], code: str) -> None:
    with pytest.raises(FormatError) as caught:
        open_archive(io.BytesIO(with_files(data, lambda files: files[0].update(change))))
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"bytes": 13}, "stream"),
        ({"bytes": 15}, "stream"),
        ({"codec": "zip"}, "stream"),
        ({"box_bytes": 100}, "order"),
    ],
)
def test_lies_about_a_file(data: bytes, change: dict[str, Any], code: str) -> None:
    lying = with_files(data, lambda files: files[0].update(change))
    with open_archive(io.BytesIO(lying)) as archive, pytest.raises(FormatError) as caught:
        archive.read_file("config.json")
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ((SideFile("a", b""), SideFile("A", b"")), "comes twice"),
        ((SideFile("a", b""), SideFile("a/b", b"")), "below a file"),
        ((SideFile("a/../b", b""),), "safe on every system"),
        (tuple(SideFile(str(i), b"") for i in range(4097)), "more than 4096"),
    ],
)
def test_files_that_are_not_stored(files: tuple[SideFile, ...], said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        store_files(files)


@given(path=st.text(max_size=20))
def test_safe_paths_stay_inside(path: str) -> None:
    if is_safe_path(path):
        assert not Path(path).is_absolute()
        assert ".." not in Path(path).parts
        assert np.all([part == part.rstrip(". ") for part in path.split("/")])
