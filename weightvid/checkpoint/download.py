"""Checkpoints at addresses: downloaded to this machine, read, and removed again.

Files of the Hugging Face hub go to huggingface_hub's cache and stay there; others go to a temporary
folder (of ``TMPDIR``).
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import Any, Final

from weightvid.checkpoint.base import CheckpointReader
from weightvid.checkpoint.common import shorten
from weightvid.checkpoint.folder import INDEX, WEIGHTS, find_weights
from weightvid.checkpoint.kinds import open_local
from weightvid.checkpoint.remote import WEB, explain, file_name, find_driver, scheme, shown
from weightvid.errors import CheckpointError, RemoteError
from weightvid.progress import Progress, Report
from weightvid.spec import SIDE_FILE_BYTES, is_safe_path

_HUB: Final = re.compile(
    r"(?P<repo>[\w.-]+(?:/[\w.-]+)?)"
    r"(?:@(?P<revision>refs/(?:pr|convert)/[^/]+|[^/]+))?"
    r"(?:/(?P<path>.*))?"
)
#: sub-folders of sentence-transformers, which may hold small weights of their own.
_MODULE: Final = re.compile(r"\d+_[^/]+/[^/]+$")
_UNREACHABLE: Final = re.compile("ConnectionError|ConnectError|TransportError|Timeout|Offline")
#: what brings a file, named relative to some root, to a path; and says how many bytes came.
_Fetch = Callable[[str, Callable[..., None]], Path]


def open_downloaded(url: str, progress: Report) -> CheckpointReader:
    """Download a file, a folder of an object store or a model of the hub, and open it.

    Raises
    ------
    RemoteError, CheckpointError
        It cannot be reached or read, or is no checkpoint.
    """
    folder = tempfile.TemporaryDirectory(prefix="weightvid-", ignore_cleanup_errors=True)
    path = Path(folder.name)
    try:
        path = _bring(url, path, progress)
        reader = open_local(path)
    except BaseException as error:
        folder.cleanup()
        if isinstance(error, CheckpointError):
            # The temporary name means nothing to anybody.
            raise CheckpointError(str(error).replace(os.fspath(path), shown(url))) from None
        raise explain(url, error) if isinstance(error, Exception) else error from None
    reader.temporary = folder
    return reader


def _bring(url: str, folder: Path, progress: Report) -> Path:
    """Download what an address means; where it lies now."""
    sizes, path, fetch = _hub(url) if scheme(url) == "hf" else _store(url, folder)
    if fetch is None:
        return Path(path)
    names = _wanted(url, path, sizes)
    done, total = 0, sum(sizes[name] for name in names)

    def tell(_: int | None, value: int, **__: object) -> None:
        progress(Progress("download", done + value, max(total, done + value), unit="bytes"))

    for name in names:
        tell(None, 0)
        local = fetch(name, tell)
        done += local.stat().st_size
    # All lie below one folder.
    return local.parents[name.count("/")] / path


def _hub(url: str) -> tuple[Mapping[str, int], str, _Fetch | None]:
    """Files of a model with their sizes, the path that is meant; without a way: all is cached."""
    match = _HUB.fullmatch(url.partition("://")[2].rstrip("/"))
    if match is None:
        raise RemoteError(f"{url} names no model: write hf://org/model[@revision][/file]")
    repo, revision, path = match["repo"], match["revision"], match["path"] or ""
    hub: Any = import_module("huggingface_hub")
    try:
        info = hub.HfApi().model_info(repo, revision=revision, files_metadata=True)
    except Exception as error:
        if _UNREACHABLE.search(" ".join(cls.__name__ for cls in type(error).__mro__)):
            with suppress(Exception):
                root = hub.snapshot_download(repo, revision=revision, local_files_only=True)
                return {}, str(Path(root, path)), None
        raise

    def fetch(name: str, _: Callable[..., None]) -> Path:
        # By the name of the revision, so that the cache learns what it stands for.
        return Path(hub.hf_hub_download(repo, name, revision=revision))

    return {entry.rfilename: entry.size or 0 for entry in info.siblings or ()}, path, fetch


def _store(url: str, folder: Path) -> tuple[Mapping[str, int], str, _Fetch]:
    """The same of a folder in an object store, or of a file; of a web server, of one file."""
    files, place = find_driver(url)
    callback = import_module("fsspec.callbacks").Callback
    name, root = "", place.rstrip("/")
    if scheme(url) in WEB or not files.isdir(place):
        name, root = file_name(url), place.rpartition("/")[0]
        if not name or url.endswith("/") or not is_safe_path(name):
            raise RemoteError(f"{shown(url)} names no file, and its folder cannot be listed")
    sizes = {name: 0} if name else {}
    if not name or (name.endswith(".onnx") and scheme(url) not in WEB):
        listed = files.ls(root) if name else files.find(root, detail=True).values()
        for about in listed:
            sizes[about["name"].removeprefix(f"{root}/")] = int(about.get("size") or 0)

    def fetch(wanted: str, tell: Callable[..., None]) -> Path:
        local = folder / wanted
        local.parent.mkdir(parents=True, exist_ok=True)
        source = place if wanted == name else f"{root}/{wanted}"
        files.get_file(source, os.fspath(local), callback=callback(hooks={"progress": tell}))
        return local

    return sizes, name, fetch


def _wanted(url: str, path: str, sizes: Mapping[str, int]) -> list[str]:
    """Files of a listing that a path in it means: one, those of a folder, or of all."""
    if path in sizes:
        data = (".data", ".onnx_data") if path.endswith(".onnx") else ()
        folder = PurePosixPath(path).parent
        return [path, *(n for n in sizes if n.endswith(data) and PurePosixPath(n).parent == folder)]
    prefix = f"{path}/" if path else ""
    inside = {n.removeprefix(prefix): s for n, s in sizes.items() if n.startswith(prefix)}
    if not inside:
        raise RemoteError(f"there is no {url}; the model has {shorten(sizes)}")
    weights = find_weights([name for name in inside if "/" not in name])
    if not weights:
        raise CheckpointError(
            f"{shown(url)} holds no weights that weightvid looks for; name one of {shorten(inside)}"
        )
    if weights[0].endswith(INDEX):
        start, _, end = weights[0].removesuffix(INDEX).rpartition(".")
        weights += [n for n in inside if n.startswith(start) and n.endswith(end) and "/" not in n]
    small = [
        name
        for name, size in inside.items()
        if size <= SIDE_FILE_BYTES
        and (PurePosixPath(name).suffix.lower() not in WEIGHTS or _MODULE.match(name))
        and is_safe_path(name)
        and not any(part.startswith(".") for part in name.split("/"))
    ]
    return [prefix + name for name in sorted({*weights, *small})]
