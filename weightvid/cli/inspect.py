"""``weightvid inspect``: what is in an archive."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from weightvid.cli import output
from weightvid.cli.options import ArchivePath, Json

if TYPE_CHECKING:
    from weightvid.summary import ArchiveSummary, TensorSummary, VideoSummary

#: what the parts of the byte account are, in words.
_PARTS = {
    "ftyp": "file type",
    "moov": "track description",
    "header": "model header",
    "side_files": "side files",
    "sidecars": "frame sidecars: quantizers, hashes",
    "orders": "orders of rows and columns, and folds",
    "digits": "digits stored beside the frames",
    "fragment_boxes": "boxes around the packets",
    "packets": "video packets",
    "exact_tensors": "exact tensors",
    "plain_tensors": "levels stored without video",
    "index": "index",
    "mfra": "MP4's own index",
    "other": "other",
    "sidecar_boxes": "frame sidecars with orders and digits",
    "fragments": "HEVC packets and the boxes around them",
    "exact_boxes": "tensors without video",
}
#: title, and whether a narrow terminal shows it too.
_COLUMNS = (
    ("tensor", True),
    ("dtype", True),
    ("shape", True),
    ("coding", True),
    (">step", False),
    (">bits/w", True),
    (">SQNR dB", True),
    (">slope", False),
    (">escapes", False),
    (">frames", True),
)
_WIDE = 100


def inspect(
    archive: ArchivePath,
    tensors: Annotated[
        bool, typer.Option("--tensors", "-t", help="List every tensor, too.")
    ] = False,
    json: Json = False,
) -> None:
    """Show what is in an archive, without decoding it.

    Of an address, the index alone is read; with --tensors, what is said of each tensor, too.

    [bold]weightvid inspect model.mp4[/bold]
    [bold]weightvid inspect model.mp4 --tensors[/bold]
    [bold]weightvid inspect model.mp4 --json | jq '.tensors[] | select(.coding == "video")'[/bold]
    """
    from weightvid.summary import summarize_archive

    summary = summarize_archive(archive, details=tensors)
    if json:
        output.emit_json(
            summary,
            archive=archive,
            bits_per_weight=summary.bits_per_weight,
            stream_bits_per_weight=summary.stream_bits_per_weight,
        )
        return
    if tensors:
        _list(summary)
    _account(summary)
    _facts(summary, archive)
    if not summary.complete:
        missing = [tensor.name for tensor in summary.tensors if tensor.coding == "missing"]
        output.warn(f"the archive is cut short; missing: {output.some(missing) or 'its index'}")


def _facts(summary: ArchiveSummary, path: str) -> None:
    video = summary.video
    kinds: dict[str, int] = {}
    for tensor in summary.tensors:
        kind = "tied" if tensor.alias_of else tensor.coding
        kinds[kind] = kinds.get(kind, 0) + 1
    rows = [
        ("archive", f"{path}, format {summary.format_version}"),
        ("size", f"{output.size(summary.file_bytes)} ({output.count(summary.file_bytes)} bytes)"),
        ("weights", f"{output.count(summary.weights)}, of which "
                    f"{output.count(summary.coded_weights)} as video"),
        ("bits per weight", f"{summary.bits_per_weight:.3f} (whole file)"),
        *_stream(summary),
        ("tensors", ", ".join(f"{number} {kind}" for kind, number in kinds.items())),
        ("video", _track(video)),
        ("frames", f"{video.frames} of {video.width} x {video.height}"),
    ]  # fmt: skip
    if summary.sqnr_db is not None:
        rows.append(("SQNR", output.db(summary.sqnr_db)))
    if summary.files:
        rows.append(
            ("side files", ", ".join(f"{f.path} ({output.size(f.size)})" for f in summary.files))
        )
    rows += [(f"{key}", str(value)) for key, value in summary.about.items()]
    rows += [(f"metadata {key}", _cut(value)) for key, value in summary.metadata.items()]
    output.facts(rows)


def _stream(summary: ArchiveSummary) -> list[tuple[str, str]]:
    rate = summary.stream_bits_per_weight
    return [] if rate is None else [("", f"{rate:.3f} (the video's weights in its stream)")]


def _track(video: VideoSummary) -> str:
    """Codec, and what it claims of itself, as far as it has such things."""
    parts = [video.codec]
    if video.profile:
        named = video.profile.startswith("Profile")
        parts.append(video.profile if named else f"{video.profile} profile")
    parts += [f"{video.tier} tier"] if video.tier else []
    parts += [f"level {video.level}"] if video.level else []
    return ", ".join([*parts, f"{video.bit_depth} bits"])


def _cut(text: str, limit: int = 200) -> str:
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text)} characters)"


def _account(summary: ArchiveSummary) -> None:
    rows = [
        (_PARTS[part], output.count(number), f"{100 * number / summary.file_bytes:.2f} %")
        for part, number in summary.account.items()
        if number
    ]
    rows.append(("whole file", output.count(summary.file_bytes), "100.00 %"))
    output.table(("part", ">bytes", ">share"), rows)


def _list(summary: ArchiveSummary) -> None:
    wide = output.console().width >= _WIDE
    columns = tuple(title for title, always in _COLUMNS if wide or always)
    rows = [
        tuple(
            cell for cell, (_, always) in zip(_row(tensor), _COLUMNS, strict=True) if wide or always
        )
        for tensor in summary.tensors
    ]
    output.table(columns, rows)


def _row(tensor: TensorSummary) -> tuple[str, ...]:
    """Cells of all of ``_COLUMNS``."""
    frames = ""
    if tensor.frames is not None:
        first, last = tensor.frames
        frames = str(first) if first == last else f"{first}-{last}"
    coding = tensor.coding
    if tensor.quantizer is not None:
        coding = tensor.quantizer if coding == "video" else f"{coding} {tensor.quantizer}"
    return (
        f"{tensor.name} = {tensor.alias_of}" if tensor.alias_of else tensor.name,
        tensor.dtype,
        " x ".join(map(str, tensor.shape)) or "scalar",
        "tied" if tensor.alias_of else coding,
        output.number(tensor.step, 4),
        "" if tensor.bits_per_weight is None else f"{tensor.bits_per_weight:.2f}",
        "" if tensor.sqnr_db is None else f"{tensor.sqnr_db:.2f}",
        "" if tensor.slope is None else f"{tensor.slope:.2g}",
        output.count(tensor.escapes) if tensor.escapes else "",
        frames,
    )
