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
    from weightvid.atomic import atomic_output, real_destination

    folder = Path(target)
    sources = [one for one in files("weightvid").joinpath("device").iterdir() if one.is_file()]
    written = {str(folder / one.name): one for one in sorted(sources, key=lambda one: one.name)}
    for path in written:
        real_destination(path, force)
    folder.mkdir(parents=True, exist_ok=True)
    for path, source in written.items():
        with atomic_output(path, force=force) as file:
            file.write(source.read_bytes())
    output.tell_paths(json, list(written), {"files": list(written)})
