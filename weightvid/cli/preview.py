"""``weightvid preview``: frames as pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from weightvid.cli import output
from weightvid.cli.options import ArchivePath, Force, Json, named_after, usage_error


def preview(
    archive: ArchivePath,
    folder: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FOLDER", help="Default: ARCHIVE's name with -preview."
        ),
    ] = None,
    frames: Annotated[
        str | None,
        typer.Option(metavar="A-B", help="Frames, from 0: 3 or 0-3. Default: the first."),
    ] = None,
    tensor: Annotated[
        str | None, typer.Option(metavar="GLOB", help="The frames on which these tensors lie.")
    ] = None,
    scale: Annotated[
        int, typer.Option(min=0, max=16, help="Pixels per sample; 0: as small frames need.")
    ] = 0,
    force: Force = False,
    json: Json = False,
) -> None:
    r"""Draw frames as PNG: levels in colour, tile borders and tensor names.

    Needs the extra: pip install 'weightvid\[preview]'

    [bold]weightvid preview model.mp4[/bold]
    [bold]weightvid preview model.mp4 --tensor "*.conv1.weight" -o pictures[/bold]
    """
    from weightvid.preview import PreviewOptions, preview_archive

    numbers = None
    if frames is not None:
        first, _, last = frames.partition("-")
        if not first.isdecimal() or (last and not last.isdecimal()):
            usage_error(f"{frames!r} is neither a number nor a range such as 0-3", "--frames")
        numbers = range(int(first), int(last or first) + 1)
        if not numbers:
            usage_error(f"the range {frames!r} is empty", "--frames")
        if tensor is not None:
            usage_error("give --frames or --tensor, not both", "--frames")
    options = PreviewOptions(numbers, tensor, scale, force)
    target = folder or named_after(archive, "-preview")
    report = preview_archive(archive, target, options)
    if json:
        output.emit_json({"archive": archive, "pictures": list(report.pictures)})
        return
    for picture in report.pictures:
        typer.echo(picture)
