"""``weightvid preview``: frames as pictures."""

from pathlib import Path

from weightvid.cli import output
from weightvid.cli.output import ARCHIVE, FORCE, JSON, option, output_option, usage_error


def preview(
    archive: str = ARCHIVE,
    folder: str | None = output_option(None, "Default: ARCHIVE's name with -preview.", "FOLDER"),
    frames: str = option("", "Frames, from 0: 3 or 0-3. Default: the first.", metavar="A-B"),
    tensor: str | None = option(None, "The frames on which these tensors lie.", metavar="GLOB"),
    kernels: bool = option(
        False, "A picture of each layer's kernels instead; --tensor chooses layers.", "--kernels"
    ),
    scale: int = option(0, "Pixels per sample; 0: as small frames need.", min=0, max=16),
    force: bool = FORCE,
    json: bool = JSON,
) -> None:
    r"""Draw frames as PNG: levels in colour, borders and names of tensors.

    Needs the extra: pip install 'weightvid\[preview]'

    [bold]weightvid preview model.mp4[/bold]
    [bold]weightvid preview model.mp4 --tensor "*.conv1.weight" -o pictures[/bold]
    [bold]weightvid preview model.mp4 --kernels --tensor "*.conv1.weight"[/bold]
    """
    from weightvid.preview import preview_archive, preview_kernels

    numbers = None
    if frames:
        first, _, last = frames.partition("-")
        if not first.isdecimal() or (last and not last.isdecimal()):
            usage_error(f"{frames!r} is neither a number nor a range such as 0-3", "--frames")
        numbers = range(int(first), int(last or first) + 1)
        if not numbers:
            usage_error(f"the range {frames!r} is empty", "--frames")
        if tensor is not None or kernels:
            usage_error("give --frames alone, without --tensor and --kernels", "--frames")
    target = Path(folder or output.named_after(archive, "-preview"))
    if kernels:
        pictures = preview_kernels(archive, target, tensor=tensor or "*", scale=scale, force=force)
    else:
        pictures = preview_archive(
            archive, target, frames=numbers, tensor=tensor, scale=scale, force=force
        )
    output.tell_paths(json, pictures, {"archive": archive, "pictures": pictures})
