"""``weightvid cache``: what lies on this machine, and where."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from weightvid.cli import output
from weightvid.cli.output import JSON, option, usage_error

#: what has not been touched for so long belongs to no run that is still going.
_IDLE_S = 3600


def cache(
    clear: bool = option(
        False, "Remove what runs that were killed have left in the temporary folder.", "--clear"
    ),
    forget: list[str] = option(
        [], "Remove a model from the hub's cache. May be repeated.", metavar="ORG/MODEL"
    ),
    json: bool = JSON,
) -> None:
    """Show what is kept on this machine: models of a hub, and what killed runs have left.

    Points of [bold]weightvid compare[/bold] lie in its output folder: delete it to be rid of them.

    [bold]weightvid cache[/bold]
    [bold]weightvid cache --clear --forget org/model[/bold]
    """
    hub, models = _hub()
    for name in forget:
        if name not in models:
            usage_error(f"the hub's cache holds no model {name!r}", "--forget")
    left, removed = list(_left_behind()), []
    for path in left if clear else ():
        with suppress(OSError):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
            removed.append(str(path))
    for name in forget:
        hashes = [revision.commit_hash for revision in models.pop(name).revisions]
        hub.delete_revisions(*hashes).execute()
        removed.append(name)
    sizes = {name: ("model of a hub", model.size_on_disk) for name, model in models.items()}
    sizes |= {str(path): ("left by a run", _size(path)) for path in left if path.exists()}
    entries = [{"what": what, "name": name, "bytes": n} for name, (what, n) in sizes.items()]
    places = {"hub": _hub_folder(), "temporary": tempfile.gettempdir()}
    if json:
        output.emit_json({"places": places, "entries": entries, "removed": removed})
        return
    rows = [(what, name, output.size(number)) for name, (what, number) in sizes.items()]
    output.table(("what", "name", ">size"), rows)
    output.facts([
        ("models of hubs", f"{places['hub']} (HF_HUB_CACHE moves it)" if places["hub"] else ""),
        ("temporary", f"{places['temporary']} (TMPDIR moves it)"),
        ("removed", output.some(removed)),
    ])  # fmt: skip


def _hub() -> tuple[Any, dict[str, Any]]:
    """The cache of huggingface_hub, and its models by name."""
    if find_spec("huggingface_hub") is not None:
        from huggingface_hub import CacheNotFound, scan_cache_dir

        with suppress(CacheNotFound):
            found = scan_cache_dir()
            return found, {repo.repo_id: repo for repo in found.repos if repo.repo_type == "model"}
    return None, {}


def _hub_folder() -> str | None:
    if find_spec("huggingface_hub") is None:
        return None
    from huggingface_hub.constants import HF_HUB_CACHE

    return str(HF_HUB_CACHE)


def _left_behind() -> Iterator[Path]:
    """Our own entries of the temporary folder that nobody has touched for an hour."""
    for path in sorted(Path(tempfile.gettempdir()).glob("*weightvid-*")):
        with suppress(OSError):
            whole = (path, *path.rglob("*")) if path.is_dir() else (path,)
            newest = max(item.lstat().st_mtime for item in whole)
            own = not hasattr(os, "getuid") or path.lstat().st_uid == os.getuid()
            if own and not path.is_symlink() and time.time() - newest > _IDLE_S:
                yield path


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else (path,)
    return sum(file.lstat().st_size for file in files if file.is_file())
