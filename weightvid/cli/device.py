"""``weightvid device``: the C loader's sources."""

from importlib.resources import files
from pathlib import Path

from weightvid.cli import output
from weightvid.cli.output import FORCE, JSON, output_option


def device(
    target: str = output_option(..., "Where the sources go; made where it is not there.", "FOLDER"),
    force: bool = FORCE,
    json: bool = JSON,
) -> None:
    """Write the C loader: sources, an example, adapters for decoders, and the browser's module.

    [bold]weightvid device -o loader[/bold]
    [bold]cd loader && cc -O2 -ffp-contract=off weightvid.c hevc.c example.c -o example[/bold]
    """
    from weightvid.atomic import atomic_output

    output.check_output(target, {})  # Path would take an empty one for the current folder
    folder = Path(target)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for source in sorted(files("weightvid").joinpath("device").iterdir(), key=lambda one: one.name):
        if source.is_file():
            with atomic_output(folder / source.name, force=force) as file:
                file.write(source.read_bytes())
            written.append(str(folder / source.name))
    output.tell_paths(json, written, {"files": written})
