"""``weightvid cache``: what lies on this machine, and where."""

import tempfile
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from weightvid.cli import output
from weightvid.cli.output import JSON, option, usage_error


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
    from weightvid.atomic import remains, remove_remains

    place, hub, models = _hub()
    unwanted = list(dict.fromkeys(forget))
    for name in unwanted:
        if name not in models:
            usage_error(f"the hub's cache holds no model {name!r}", "--forget")
    temporary = Path(tempfile.gettempdir())
    removed = [str(path) for path in remove_remains(temporary)] if clear else []
    for name in unwanted:
        hashes = [revision.commit_hash for revision in models.pop(name).revisions]
        hub.delete_revisions(*hashes).execute()
        removed.append(name)
    sizes = {name: ("model of a hub", model.size_on_disk) for name, model in models.items()}
    sizes |= {str(path): ("left by a run", _size(path)) for path in remains(temporary)}
    entries = [{"what": what, "name": name, "bytes": n} for name, (what, n) in sizes.items()]
    places = {"hub": place, "temporary": str(temporary)}
    if json:
        output.emit_json({"places": places, "entries": entries, "removed": removed})
        return
    rows = [(what, name, output.size(number)) for name, (what, number) in sizes.items()]
    output.table(("what", "name", ">size"), rows)
    output.facts([
        ("models of hubs", f"{place} (HF_HUB_CACHE moves it)" if place else ""),
        ("temporary", f"{temporary} (TMPDIR moves it)"),
        ("removed", output.some(removed)),
    ])  # fmt: skip


def _hub() -> tuple[str | None, Any, dict[str, Any]]:
    """Where huggingface_hub has its cache, what is in it, and its models by name."""
    if find_spec("huggingface_hub") is None:
        return None, None, {}
    from huggingface_hub import CacheNotFound, constants, scan_cache_dir

    found, models = None, {}
    with suppress(CacheNotFound):
        found = scan_cache_dir(constants.HF_HUB_CACHE)
        models = {repo.repo_id: repo for repo in found.repos if repo.repo_type == "model"}
    return str(constants.HF_HUB_CACHE), found, models


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else (path,)
    return sum(file.lstat().st_size for file in files if file.is_file())
