"""``weightvid unpack``: archive to checkpoint."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from weightvid.cli import output
from weightvid.cli.options import Force, Json, Threads, usage_error

if TYPE_CHECKING:
    from weightvid.unpack import UnpackReport


def unpack(
    archive: Annotated[
        str,
        typer.Argument(
            metavar="ARCHIVE", help="The archive (.mp4): a file, an address, or - for a pipe."
        ),
    ],
    destination: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="MODEL",
            help="The suffix decides the kind: .safetensors, .pt/.pth/.bin, .npz, .gguf, .onnx; "
            "none: a folder.",
        ),
    ],
    tensor: Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB", help="Only these tensors. May be repeated."),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(metavar="TYPE", help="Convert floating-point tensors: F32, F16, BF16, F64."),
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(metavar="KIND", help="Kind of MODEL whatever its suffix: folder, gguf-q8_0."),
    ] = None,
    no_side_files: Annotated[
        bool,
        typer.Option("--no-side-files", help="Restore the weights alone."),
    ] = False,
    partial: Annotated[
        bool,
        typer.Option(
            "--partial",
            help="Write what is whole of a broken archive; say what is missing; exit 1.",
        ),
    ] = False,
    force: Force = False,
    threads: Threads = 0,
    json: Json = False,
) -> None:
    """Unpack an archive into a checkpoint, checking every hash.

    [bold]weightvid unpack model.mp4 -o model.safetensors[/bold]
    [bold]weightvid unpack minilm.mp4 -o minilm/[/bold]
    [bold]weightvid unpack model.mp4 -o head.npz --tensor "head.*" --dtype F16[/bold]
    [bold]weightvid unpack https://example.org/model.mp4 -o model.pt[/bold]
    """
    from weightvid.checkpoint.kinds import kind_for_output
    from weightvid.errors import CheckpointError
    from weightvid.unpack import OUTPUT_DTYPES, UnpackOptions, unpack_archive

    if dtype is not None and dtype.upper() not in OUTPUT_DTYPES:
        usage_error(f"{dtype!r} is none of {', '.join(OUTPUT_DTYPES)}", "--dtype")
    try:
        kind_for_output(destination, kind)
    except CheckpointError as error:
        usage_error(str(error), "--output" if kind is None else "--kind")
    options = UnpackOptions(
        tensors=tuple(tensor or ()),
        dtype=dtype and dtype.upper(),
        force=force,
        threads=threads,
        partial=partial,
        kind=kind,
        side_files=not no_side_files,
    )
    source = sys.stdin.buffer if archive == "-" else archive
    with output.progress_bars() as report:
        made = unpack_archive(source, destination, options, report)
    for note in made.notes:
        output.warn(note)
    if json:
        output.emit_json(made, ok=not made.missing, archive=archive, output=str(destination))
    else:
        _show(made, destination)
    if made.missing:
        _complain(made)
        raise typer.Exit(1)


def _show(made: UnpackReport, destination: Path) -> None:
    rows = [
        ("checkpoint", str(destination)),
        ("size", output.size(made.file_bytes)),
        ("tensors", output.count(made.tensors)),
        ("weights", output.count(made.weights)),
    ]
    if made.aliases:
        rows.append(("tied", output.some(made.aliases)))
    if made.side_files:
        rows.append(("side files", output.some(made.side_files)))
    if made.converted:
        rows.append(("converted", f"{len(made.converted)} tensors"))
    rows.append(("time", f"{made.seconds:.1f} s"))
    output.facts(rows)


def _complain(made: UnpackReport) -> None:
    number = len(made.missing)
    output.error(
        f"{number} tensor{'s are' if number > 1 else ' is'} missing: {output.some(made.missing)}"
    )
    if made.defect is not None:
        output.error(output.cause(made.defect))
