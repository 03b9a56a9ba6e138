"""Checkpoints at addresses: downloaded before they are read.

Those of the hub go to huggingface_hub's cache, where they stay; others to a temporary folder (of
``TMPDIR``).
"""

import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import Any, Final

from weightvid.atomic import ScratchFolder
from weightvid.checkpoint import open_checkpoint
from weightvid.checkpoint.base import CheckpointReader, shorten
from weightvid.checkpoint.folder import WEIGHTS, advice, find_weights, is_index
from weightvid.errors import CheckpointError, RemoteError
from weightvid.progress import Progress, Report
from weightvid.remote import Answer, explain, file_name, find_driver, is_web, reach, scheme, shown
from weightvid.spec import SIDE_FILE_BYTES, is_safe_path

_HUB: Final = re.compile(
    r"(?P<repo>[\w.-]+(?:/[\w.-]+)?)"
    r"(?:@(?P<revision>refs/(?:pr|convert)/[^/]+|[^/]+))?"
    r"(?:/(?P<path>.*))?"
)
#: sub-folders of sentence-transformers, which may hold small weights of their own.
_MODULE: Final = re.compile(r"\d+_[^/]+/[^/]+$")
#: what a file may have whose size nobody says.
_UNSAID_BYTES: Final = 1 << 30
_UNREACHABLE: Final = re.compile("ConnectionError|ConnectError|TransportError|Timeout|Offline")
#: what brings a file, named relative to some root, to a path; and says how many bytes came.
_Fetch = Callable[[str, Callable[[int], None]], Path]


def open_downloaded(url: str, progress: Report) -> CheckpointReader:
    """Download a file, a folder of an object store or a model of the hub, and open it."""
    folder = ScratchFolder()
    path = Path(folder.name)
    try:
        path = _bring(url, path, progress)
        reader = open_checkpoint(path)
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

    def tell(value: int) -> None:
        progress(Progress("download", done + value, max(total, done + value), unit="bytes"))

    for name in names:
        tell(0)
        local = fetch(name, tell)
        done += local.stat().st_size
        if name == path and name.endswith(".onnx"):
            from weightvid.checkpoint.onnx_file import files_beside

            beside = (str(PurePosixPath(name).parent / other) for other in files_beside(local))
            names += [other for other in beside if other in sizes]
    # All lie below one folder.
    return local.parents[name.count("/")] / path


def _hub(url: str) -> tuple[Mapping[str, int], str, _Fetch | None]:
    """Files of a model with their sizes, the path that is meant; without a way: all is cached."""
    match = _HUB.fullmatch(url.partition("://")[2].rstrip("/"))
    if match is None:
        raise RemoteError(f"{url} names no model: write hf://org/model[@revision][/file]")
    repo, revision, path = match["repo"], match["revision"], match["path"] or ""
    hub: Any = import_module("huggingface_hub")

    def ask() -> Any:
        try:
            api = hub.HfApi()
            return api.model_info(repo, revision=revision, timeout=14.0, files_metadata=True)
        except Exception as error:
            if _UNREACHABLE.search(" ".join(cls.__name__ for cls in type(error).__mro__)):
                with suppress(Exception):
                    return hub.snapshot_download(repo, revision=revision, local_files_only=True)
            raise

    def fetch(name: str, _: Callable[[int], None]) -> Path:
        # By the name of the revision, so that the cache learns what it stands for.
        size = sizes[name] or _UNSAID_BYTES
        return Path(reach(url, hub.hf_hub_download, repo, name, size=size, revision=revision))

    found = reach(url, ask)
    if isinstance(found, str):
        return {}, str(Path(found, path)), None
    sizes = {entry.rfilename: entry.size or 0 for entry in found.siblings or ()}
    return sizes, path, fetch


def _store(url: str, folder: Path) -> tuple[Mapping[str, int], str, _Fetch]:
    """The same of a folder in an object store, or of a file; of a web server, of one file."""
    files, place = find_driver(url)
    callback = import_module("fsspec.callbacks").Callback
    name, root, web = "", place.rstrip("/"), is_web(url)
    if web or not reach(url, files.isdir, place):
        name, root = file_name(url), place.rpartition("/")[0]
        if not name or url.endswith("/") or not is_safe_path(name):
            raise RemoteError(f"{shown(url)} names no file, and its folder cannot be listed")
    if web or (name and not name.endswith(".onnx")):
        sizes = {name: 0 if web else reach(url, files.size, place) or 0}
    else:
        listed = reach(url, files.ls if name else files.find, root, detail=True)
        entries = listed if name else listed.values()
        sizes = {each["name"].removeprefix(f"{root}/"): each.get("size") or 0 for each in entries}

    def fetch(wanted: str, tell: Callable[[int], None]) -> Path:
        local = folder / wanted
        local.parent.mkdir(parents=True, exist_ok=True)
        if web:
            with Answer(url) as answer, local.open("wb") as file:
                answer.save(file, tell)
            return local
        source = place if wanted == name else f"{root}/{wanted}"
        told = callback(hooks={"progress": lambda _, value, **__: tell(value)})
        whole = sizes[wanted] or _UNSAID_BYTES
        reach(url, files.get_file, source, os.fspath(local), size=whole, callback=told)
        return local

    return sizes, name, fetch


def _wanted(url: str, path: str, sizes: Mapping[str, int]) -> list[str]:
    """Files of a listing that a path in it means: one, those of a folder, or of all."""
    if path in sizes:
        return [path]
    prefix = f"{path}/" if path else ""
    inside = {n.removeprefix(prefix): s for n, s in sizes.items() if n.startswith(prefix)}
    if not inside:
        raise RemoteError(f"there is no {url}; the model has {shorten(sizes)}")
    if "Manifest.json" in inside and any(name.startswith("Data/") for name in inside):
        return [prefix + name for name in inside if is_safe_path(name)]
    weights = find_weights([name for name in inside if "/" not in name])
    if not weights:
        raise CheckpointError(advice(shown(url).rstrip("/"), inside))
    if is_index(weights[0]):
        start, end = weights[0].split(".index.")[0].rsplit(".", 1)
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
