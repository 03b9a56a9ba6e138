"""Checkpoints that lie elsewhere: brought to this machine, read, and removed again.

Files of the Hugging Face hub go to huggingface_hub's cache and stay there. All others go to a
temporary folder (of ``TMPDIR``), because packing reads every tensor at least twice.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import Final, cast

from weightvid.checkpoint.base import Array, CheckpointReader, shorten
from weightvid.checkpoint.kinds import kind_of_file
from weightvid.checkpoint.side_files import WEIGHTS
from weightvid.errors import CheckpointError, RemoteError
from weightvid.progress import Progress, Report
from weightvid.remote import file_name, open_remote, shown
from weightvid.remote.address import parse_hub, scheme
from weightvid.spec import SIDE_FILE_BYTES, TensorSpec, is_safe_path

_INDEX: Final = ".index.json"
_WEB: Final = ("http", "https")
#: sub-folders of sentence-transformers, which may hold small weights of their own.
_MODULE: Final = re.compile(r"\d+_[^/]+/[^/]+$")
_BLOCK_BYTES: Final = 1 << 20
#: left free on the disk that a checkpoint is brought to.
_SPARE_BYTES: Final = 64 << 20


def open_fetched(url: str, progress: Report) -> CheckpointReader:
    """Bring a checkpoint here and open it.

    Parameters
    ----------
    url : str
        A file; a folder in an object store; a model on the hub; an index of shards.
    progress : callable
        Told about the stage ``download``, in bytes.

    Raises
    ------
    RemoteError
        It cannot be reached or read.
    CheckpointError
        What is there is no checkpoint, or there is no room for it.
    """
    fetch = _from_hub if scheme(url) == "hf" else _to_temporary
    local = fetch(url, progress)
    try:
        kind = kind_of_file(local.path)
        reader = cast(CheckpointReader, import_module(kind.module).open_reader(local.path))
    except CheckpointError as error:
        local.remove()
        # The temporary name means nothing to anybody.
        said = str(error).replace(os.fspath(local.path), shown(url))
        raise CheckpointError(said) from None
    except BaseException:
        local.remove()
        raise
    return _FetchedReader(reader, local)


@dataclass(frozen=True, slots=True)
class _Local:
    """Where a checkpoint lies now, and what to remove afterwards."""

    path: Path
    folder: Path | None = None

    def remove(self) -> None:
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


class _FetchedReader(CheckpointReader):
    def __init__(self, inner: CheckpointReader, local: _Local) -> None:
        super().__init__(inner.contents)
        self._inner = inner
        self._cleanup = weakref.finalize(self, _Local.remove, local)

    def _read(self, spec: TensorSpec) -> Array:
        return self._inner.read(spec.name)

    def close(self) -> None:
        super().close()
        self._inner.close()
        self._cleanup()


def _from_hub(url: str, progress: Report) -> _Local:
    from weightvid.remote import hub

    place = parse_hub(url)
    listing = hub.list_files(url)
    names = _wanted(url, place.path, dict(listing.files))
    sizes = dict(listing.files)
    total, done = sum(sizes[name] for name in names), 0
    for name in names:
        progress(Progress("download", done, total))
        path = hub.download(url, listing.commit, name)
        done += sizes[name]
    progress(Progress("download", done, total))
    # All lie below one folder, named after the commit.
    root = path.parents[name.count("/")]
    return _Local(root / place.path)


def _wanted(url: str, path: str, sizes: Mapping[str, int]) -> list[str]:
    """Files of a model on the hub that an address means: one, those of a folder, or of all."""
    if path in sizes:
        return [name for name in sizes if _belongs(name, path)]
    prefix = f"{path}/" if path else ""
    inside = [(n.removeprefix(prefix), s) for n, s in sizes.items() if n.startswith(prefix)]
    if not inside:
        raise RemoteError(f"there is no {url}; the model has {shorten(sizes)}")
    return [prefix + name for name in choose(inside, url)]


def _belongs(name: str, wanted: str) -> bool:
    """Whether a file is the one wanted, or data of an ONNX model beside it."""
    if name == wanted:
        return True
    folder = wanted.rpartition("/")[0]
    data = PurePosixPath(name).suffix in (".data", ".onnx_data")
    return wanted.endswith(".onnx") and data and name.rpartition("/")[0] == folder


def choose(listed: Iterable[tuple[str, int]], url: str) -> list[str]:
    """Files of a folder that are worth bringing: one set of weights, and what is small beside it.

    Parameters
    ----------
    listed : iterable of (str, int)
        Relative paths and sizes.
    url : str
        For messages.

    Raises
    ------
    CheckpointError
        No weights among them.
    """
    sizes = {name: size for name, size in listed if not _hidden(name)}
    top = [name for name in sizes if "/" not in name]
    weights = _preferred(top)
    if not weights:
        others = [name for name in sizes if name.lower().endswith((".gguf", ".onnx", ".npz"))]
        what = f"name one of {shorten(others)}" if others else f"it has {shorten(sizes)}"
        raise CheckpointError(f"{shown(url)} holds no weights that weightvid looks for; {what}")
    small = [
        name
        for name, size in sizes.items()
        if size <= SIDE_FILE_BYTES
        and (PurePosixPath(name).suffix.lower() not in WEIGHTS or _MODULE.match(name))
        and is_safe_path(name)
    ]
    return sorted({*weights, *small})


def _hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _preferred(names: Sequence[str]) -> list[str]:
    """The weights among the files of a folder, as its reader will look for them."""
    for suffix, stems in (
        (".safetensors", ("model", "diffusion_pytorch_model")),
        (".bin", ("pytorch_model", "diffusion_pytorch_model")),
    ):
        for stem in stems:
            whole = f"{stem}{suffix}"
            if whole in names:
                return [whole]
            if whole + _INDEX in names:
                return [n for n in names if n.startswith(stem) and n.endswith((suffix, _INDEX))]
    for suffixes in ((".safetensors",), (".bin", ".pt", ".pth")):
        found = [name for name in names if name.lower().endswith(suffixes)]
        if found:
            return found
    return []


def _to_temporary(url: str, progress: Report) -> _Local:
    folder = Path(tempfile.mkdtemp(prefix="weightvid-"))
    local = _Local(folder, folder)
    try:
        path = _bring(url, folder, progress)
    except BaseException:
        local.remove()
        raise
    return _Local(path, folder)


def _bring(url: str, folder: Path, progress: Report) -> Path:
    """Download what an address names; the path to open."""
    if scheme(url) not in _WEB and (listed := _list_folder(url)):
        base = url.rstrip("/")
        names = choose(listed, url)
        sizes = dict(listed)
        download = _Download(folder, progress, sum(sizes[name] for name in names))
        for name in names:
            download.file(f"{base}/{name}", name)
        return folder
    name = file_name(url)
    if not name or not is_safe_path(name) or url.endswith("/"):
        raise RemoteError(f"{shown(url)} names no file, and a web server cannot list its folders")
    download = _Download(folder, progress, 0)
    path = download.file(url, name)
    if name.endswith(_INDEX):
        for shard in _shards(path, url):
            download.file(_beside(url, shard), shard)
        return folder
    if name.lower().endswith(".onnx"):
        from weightvid.checkpoint.onnx_file import external_files

        for location in external_files(path):
            download.file(_beside(url, location), location)
    return path


def _list_folder(url: str) -> list[tuple[str, int]]:
    from weightvid.remote.driver import list_folder

    return list_folder(url)


def _beside(url: str, name: str) -> str:
    """Address of a file in the same folder."""
    from urllib.parse import quote, urlsplit, urlunsplit

    if scheme(url) not in _WEB:
        return f"{url.rpartition('/')[0]}/{name}"
    parts = urlsplit(url)
    return urlunsplit(parts._replace(path=f"{parts.path.rpartition('/')[0]}/{quote(name)}"))


def _shards(index: Path, url: str) -> list[str]:
    try:
        shards = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        if all(is_safe_path(shard) and "/" not in shard for shard in shards):
            return shards
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        pass
    raise CheckpointError(f"{shown(url)} is no index of shards")


class _Download:
    """Brings files into a folder.

    Parameters
    ----------
    folder : Path
    progress : callable
    total_bytes : int
        Of all files; 0 if unknown.
    """

    def __init__(self, folder: Path, progress: Report, total_bytes: int) -> None:
        self._folder = folder
        self._progress = progress
        self._total = total_bytes
        self._done = 0
        self._check_room(total_bytes)

    def _check_room(self, size: int) -> None:
        free = shutil.disk_usage(self._folder).free
        if size + _SPARE_BYTES > free:
            raise CheckpointError(
                f"the checkpoint has {size} bytes, but {self._folder.parent} has only {free} free; "
                "set TMPDIR to a folder on a larger disk"
            )

    def file(self, url: str, name: str) -> Path:
        """Bring one file; what comes is written as it comes."""
        path = self._folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with open_remote(url) as stream, path.open("xb") as file:
            size = stream.seek(0, os.SEEK_END) if stream.seekable() else 0
            if stream.seekable():
                stream.seek(0)
                stream.read_on()  # type: ignore[attr-defined]
            if size > self._total:
                self._check_room(size)
            total = max(self._total, self._done + size)
            while data := stream.read(_BLOCK_BYTES):
                file.write(data)
                self._done += len(data)
                self._progress(Progress("download", self._done, max(total, self._done)))
        return path
