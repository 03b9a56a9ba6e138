"""Checkpoints that lie elsewhere: brought to this machine, read, and removed again.

Files of the Hugging Face hub go to huggingface_hub's cache and stay there. Others go to a temporary
folder (of ``TMPDIR``): safetensors tensor by tensor as they are read (see
:mod:`weightvid.checkpoint.mirror`), other kinds as whole files.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Final

from weightvid.checkpoint import folder, safetensors
from weightvid.checkpoint.base import Array, CheckpointReader, shorten
from weightvid.checkpoint.mirror import Handle, MirrorFile
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
    local = _from_hub(url, progress) if scheme(url) == "hf" else _to_temporary(url, progress)
    try:
        with _named(local, url):
            return _FetchedReader(local.open(), local, url)
    except BaseException:
        local.remove()
        raise


class _Local:
    """Where a checkpoint lies now, and what to remove afterwards.

    Parameters
    ----------
    path : Path
        What is opened.
    folder : Path or None
        What is removed.
    mirrors : mapping of Path to str
        Files that are read from an address, through a sparse file of that name.
    """

    def __init__(
        self, path: Path, folder: Path | None = None, mirrors: Mapping[Path, str] | None = None
    ) -> None:
        self.path = path
        self._folder = folder
        self._addresses = dict(mirrors or {})
        self._mirrors: dict[Path, MirrorFile] = {}

    def open(self) -> CheckpointReader:
        """Open what was brought here."""
        if self._addresses and self.path.is_dir():
            return folder.open_reader(self.path, self._open_shard)
        return self._open_shard(self.path)

    def _open_shard(self, path: Path) -> CheckpointReader:
        if path not in self._addresses:
            return folder.open_shard(path)
        if path not in self._mirrors:
            self._mirrors[path] = self._mirror(path)
        return safetensors.open_reader(path, Handle(self._mirrors[path]))

    def _mirror(self, path: Path) -> MirrorFile:
        stream = open_remote(self._addresses[path])
        try:
            if not stream.seekable():
                raise CheckpointError(f"the server of {stream.name} has ranges no longer")
            keep = _room(path.parent) > stream.seek(0, os.SEEK_END)
            return MirrorFile(stream, path, keep=keep)
        except BaseException:
            stream.close()
            raise

    def stop(self) -> None:
        """End what another thread reads."""
        for mirror in tuple(self._mirrors.values()):
            mirror.stop()

    def remove(self) -> None:
        """Close and remove everything."""
        for mirror in self._mirrors.values():
            mirror.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def _room(folder: Path) -> int:
    """Bytes that may be written there."""
    return shutil.disk_usage(folder).free - _SPARE_BYTES


@contextmanager
def _named(local: _Local, url: str) -> Iterator[None]:
    """Errors name the address: the temporary name means nothing to anybody."""
    try:
        yield
    except CheckpointError as error:
        said = str(error).replace(os.fspath(local.path), shown(url))
        raise CheckpointError(said) from None


class _FetchedReader(CheckpointReader):
    def __init__(self, inner: CheckpointReader, local: _Local, url: str) -> None:
        super().__init__(inner.contents)
        self._inner = inner
        self._local = local
        self._url = url
        self.location = url
        self._cleanup = weakref.finalize(self, _Local.remove, local)

    def _read(self, spec: TensorSpec) -> Array:
        with _named(self._local, self._url):
            return self._inner.read(spec.name)

    def _read_range(self, spec: TensorSpec, first: int, count: int) -> Array:
        with _named(self._local, self._url):
            return self._inner.read_range(spec.name, first, count)

    def stop(self) -> None:
        self._local.stop()

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
    here = Path(tempfile.mkdtemp(prefix="weightvid-"))
    try:
        return _bring(url, _Download(here, progress))
    except BaseException:
        shutil.rmtree(here, ignore_errors=True)
        raise


def _bring(url: str, download: _Download) -> _Local:
    """Bring what an address names, but for what can be read from there."""
    here = download.folder
    mirrors: dict[Path, str] = {}
    if scheme(url) not in _WEB and (listed := _list_folder(url)):
        names = choose(listed, url)
        sizes = dict(listed)
        whole = [name for name in names if not _is_mirrored(name)]
        download.expect(sum(sizes[name] for name in whole))
        for name in names:
            address = f"{url.rstrip('/')}/{name}"
            if name in whole:
                download.file(address, name)
            else:
                mirrors[download.placeholder(name)] = address
        return _Local(here, here, mirrors)
    name = file_name(url)
    if not name or not is_safe_path(name) or url.endswith("/"):
        raise RemoteError(f"{shown(url)} names no file, and a web server cannot list its folders")
    if _is_mirrored(name) and _has_ranges(url):
        return _Local(here / name, here, {download.placeholder(name): url})
    path = download.file(url, name)
    if name.endswith(_INDEX):
        shards = _shards(path, url)
        # Under the name that transformers looks for.
        kind = "model.safetensors" if _is_mirrored(shards[0]) else "pytorch_model.bin"
        path.rename(here / f"{kind}{_INDEX}")
        for shard in shards:
            address = _beside(url, shard)
            if _is_mirrored(shard) and _has_ranges(address):
                mirrors[download.placeholder(shard)] = address
            else:
                download.file(address, shard)
        return _Local(here, here, mirrors)
    if name.lower().endswith(".onnx"):
        from weightvid.checkpoint.onnx_file import external_files

        for location in external_files(path):
            download.file(_beside(url, location), location)
    return _Local(path, here)


def _is_mirrored(name: str) -> bool:
    return name.lower().endswith(".safetensors") and "/" not in name


def _has_ranges(url: str) -> bool:
    with open_remote(url) as stream:
        return stream.seekable()


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
        if shards and all(is_safe_path(shard) and "/" not in shard for shard in shards):
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
    """

    def __init__(self, folder: Path, progress: Report) -> None:
        self.folder = folder
        self._progress = progress
        self._total = 0
        self._done = 0

    def expect(self, size: int) -> None:
        """Say how many bytes are coming.

        Raises
        ------
        CheckpointError
            There is no room for them.
        """
        room = _room(self.folder)
        if size > room:
            raise CheckpointError(
                f"the checkpoint has {size} bytes, but {self.folder.parent} has room for "
                f"{max(0, room)}; set TMPDIR to a folder on a larger disk"
            )
        self._total = max(self._total, self._done + size)

    def placeholder(self, name: str) -> Path:
        """An empty file that stands for one that is not brought here."""
        path = self.folder / name
        path.touch(exist_ok=False)
        return path

    def file(self, url: str, name: str) -> Path:
        """Bring one file; what comes is written as it comes."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with open_remote(url) as stream, path.open("xb") as file:
            if stream.seekable():
                size = stream.seek(0, os.SEEK_END)
                if self._done + size > self._total:
                    self.expect(size)
                stream.seek(0)
                stream.read_on()  # type: ignore[attr-defined]
            while data := stream.read(_BLOCK_BYTES):
                file.write(data)
                self._done += len(data)
                self._progress(Progress("download", self._done, max(self._total, self._done)))
        return path
