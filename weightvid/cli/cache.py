"""``weightvid cache``: what lies on this machine, and where."""

import os
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path

from weightvid.cli import output
from weightvid.cli.output import JSON, option, usage_error


def cache(
    clear: bool = option(False, "Remove what killed runs left in the temporary folder.", "--clear"),
    forget: list[str] = option([], "Remove a model. May be repeated.", metavar="ORG/MODEL"),
    json: bool = JSON,
) -> None:
    """Show what is kept on this machine: models of a hub, and what killed runs have left.

    Points of [bold]weightvid compare[/bold] lie in its output folder: delete it to be rid of them.

    [bold]weightvid cache[/bold]
    [bold]weightvid cache --clear --forget org/model[/bold]
    """
    from weightvid.atomic import remains, remove_remains

    place, models = _hub()
    for name in forget:
        if name not in models:
            usage_error(f"the hub's cache holds no model {name!r}", "--forget")
    temporary = Path(tempfile.gettempdir())
    removed = [str(path) for path in remove_remains(temporary)] if clear else []
    for name in dict.fromkeys(forget):
        folder = models.pop(name)  # which has all its files, those that snapshots link to included
        shutil.rmtree(folder, ignore_errors=True)
        if folder.exists():
            raise OSError(f"{folder} could not be removed: look at its permissions")
        removed.append(name)
    kept = [(_state(folder), name, _size(folder)) for name, folder in models.items()]
    kept += [("left by a run", str(path), _size(path)) for path in remains(temporary)]
    if json:
        entries = [{"what": what, "name": name, "bytes": number} for what, name, number in kept]
        places = {"hub": place, "temporary": str(temporary)}
        output.emit_json({"places": places, "entries": entries, "removed": removed})
        return
    rows = [(what, name, output.size(number)) for what, name, number in kept]
    output.table(("what", "name", ">size"), rows)
    output.facts([
        ("models of hubs", f"{place} (HF_HUB_CACHE moves it)" if place else ""),
        ("temporary", f"{temporary} (TMPDIR moves it)"),
        ("removed", output.some(removed)),
    ])  # fmt: skip


def _hub() -> tuple[str | None, dict[str, Path]]:
    """Where huggingface_hub has its cache, and the folders of its models by name."""
    if find_spec("huggingface_hub") is None:
        return None, {}
    from huggingface_hub import constants

    place = Path(constants.HF_HUB_CACHE)
    names = [p.name for p in place.iterdir()] if place.exists() else []
    models = {n[8:].replace("--", "/"): place / n for n in sorted(names) if n[:8] == "models--"}
    return str(place), models


def _state(folder: Path) -> str:
    whole = min(map(os.path.exists, folder.glob("snapshots/*/**/*")), default=False)
    return "model of a hub" if whole else "broken model of a hub"


def _size(path: Path) -> int:
    files = set(map(os.path.realpath, (path, *path.rglob("*"))))
    return sum(map(os.path.getsize, filter(os.path.isfile, files)))
