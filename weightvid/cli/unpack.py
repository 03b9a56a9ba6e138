"""``weightvid unpack``: archive to checkpoint."""

import os
import sys
from pathlib import Path

import typer

from weightvid.cli import output
from weightvid.cli.output import ARCHIVE_OR_PIPE, DAMAGED, FORCE, JSON, option, usage_error


def unpack(
    archive: str = ARCHIVE_OR_PIPE,
    destination: str = output.output_option(
        ..., "The suffix decides the kind: .safetensors, .pt/.pth/.bin, .npz, .gguf, .onnx, "
        ".tflite, .mlpackage; none, or a slash at the end: a folder.",
        "MODEL",
    ),
    tensor: list[str] = option([], "Only these tensors. May be repeated.", metavar="GLOB"),
    dtype: str = option("", "Convert floating-point tensors: F32, F16, BF16, F64.", metavar="TYPE"),
    kind: str = option("", "Kind of MODEL whatever its suffix: folder, gguf-q8_0.", metavar="KIND"),
    no_side_files: bool = option(False, "Restore the weights alone.", "--no-side-files"),
    partial: bool = option(
        False, "Write what is whole of a broken archive; say what is missing; exit 3.", "--partial"
    ),
    base: list[str] = output.BASE,
    layer: int | None = option(
        None, "Read the first N layers of an archive of several.", min=1, max=16, metavar="N"
    ),
    key: str | None = output.KEY,
    signature: str | None = output.SIGNATURE,
    force: bool = FORCE,
    json: bool = JSON,
) -> None:  # fmt: skip
    """Unpack an archive into a checkpoint, checking every hash.

    [bold]weightvid unpack model.mp4 -o model.safetensors[/bold]
    [bold]weightvid unpack minilm.mp4 -o minilm/[/bold]
    [bold]weightvid unpack model.mp4 -o head.npz --tensor "head.*" --dtype F16[/bold]
    [bold]weightvid unpack v1-v2.mp4 --base v1.mp4 -o v2.safetensors[/bold]
    [bold]weightvid unpack https://example.org/model.mp4 -o model.pt[/bold]
    """
    from weightvid.checkpoint import kind_for_output
    from weightvid.errors import CheckpointError
    from weightvid.unpack import OUTPUT_DTYPES, UnpackOptions, unpack_archive

    if dtype and dtype.upper() not in OUTPUT_DTYPES:
        usage_error(f"{dtype!r} is none of {', '.join(OUTPUT_DTYPES)}", "--dtype")
    own = {"the archive": archive, "the key": key or "", "the signature": signature or ""}
    output.check_output(destination, own | {f"the base {each}": each for each in base})
    if destination.endswith(("/", os.sep)) and not (kind or ".mlpackage" in destination[-12:]):
        kind = "folder"
    try:
        kind_for_output(Path(destination), kind or None)
    except CheckpointError as error:
        usage_error(str(error), "--kind" if kind else "--output")
    options = UnpackOptions(
        tensors=tuple(tensor),
        dtype=dtype.upper() or None,
        kind=kind or None,
        force=force,
        partial=partial,
        side_files=not no_side_files,
        base=tuple(base),
        layers=layer,
    )
    source = sys.stdin.buffer if archive == "-" else archive
    with output.progress_bars() as report, output.checked(source, key, signature) as file:
        made = unpack_archive(file, destination, options, report)
    for note in made.notes:
        output.warn(note)
    output.tell(json, made, [
        ("checkpoint", f"{destination}, {output.size(made.file_bytes)}"),
        ("tensors", f"{made.tensors:,}, {made.weights:,} weights"),
        ("tied", output.some(made.aliases)),
        ("side files", output.some(made.side_files)),
        ("converted", f"{len(made.converted)} tensors" if made.converted else ""),
        ("time", f"{made.seconds:.1f} s"),
    ], ok=made.defect is None, archive=archive, output=destination)  # fmt: skip
    if made.missing:
        output.error(f"{len(made.missing)} tensors are missing: {output.some(made.missing)}")
    if made.coarse:
        output.error(f"{len(made.coarse)} tensors are coarse: {output.some(made.coarse)}")
    for name, spans in made.lost.items():
        rows = ", ".join(f"{first} to {first + count - 1}" for first, count in spans)
        output.error(f"{name}: rows {rows} are lost, and zero")
    if made.defect is not None:
        output.error(made.defect.message)
        raise typer.Exit(DAMAGED)
