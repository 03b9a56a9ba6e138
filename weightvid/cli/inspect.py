"""``weightvid inspect``: what is in an archive."""

from __future__ import annotations

import sys
from collections import Counter
from typing import TYPE_CHECKING, Final

from weightvid.cli import output
from weightvid.cli.output import ARCHIVE_OR_PIPE, JSON, option

if TYPE_CHECKING:
    from weightvid.inspect import ArchiveSummary, TensorSummary

#: what the parts of the byte account are, in words.
_PARTS: Final = {
    "ftyp": "file type",
    "moov": "track description",
    "header": "header: names, shapes",
    "side_files": "side files",
    "sidecars": "sidecars: quantizers, orders, hashes",
    "fragment_boxes": "boxes around the packets",
    "packets": "video packets",
    "boxes": "boxed tensors",
    "index": "index",
    "signatures": "signatures",
    "parity": "parity",
    "mfra": "MP4's own index",
    "other": "other",
}
_COLUMNS: Final = (
    *("tensor", "dtype", "shape", "coding", ">bits/w", ">SQNR dB"),
    *(">frames", ">step", ">escapes"),
)
#: so many of them fit where the terminal is narrower than that.
_NARROW, _WIDE = 7, 100


def inspect(
    archive: str = ARCHIVE_OR_PIPE,
    tensors: bool = option(False, "List every tensor, too.", "--tensors", "-t"),
    device: bool = option(False, "Say what a decoder needs, too.", "--device", "-d"),
    json: bool = JSON,
) -> None:
    """Show what is in an archive, without decoding it.

    Of an address, the index alone is read; with --tensors or --device, the sidecars, too.

    [bold]weightvid inspect model.mp4[/bold]
    [bold]weightvid inspect model.mp4 --tensors --device[/bold]
    [bold]weightvid inspect model.mp4 --json | jq '.tensors[] | select(.coding == "video")'[/bold]
    """
    from weightvid.inspect import summarize_archive

    source = sys.stdin.buffer if archive == "-" else archive
    summary = summarize_archive(source, details=True if tensors or device else None)
    if json:
        output.emit_json(
            summary,
            archive=archive,
            bits_per_weight=summary.bits_per_weight,
            packet_share=summary.packet_share,
        )
    else:
        if tensors:
            shown = len(_COLUMNS) if output.console().width >= _WIDE else _NARROW
            output.table(_COLUMNS[:shown], [_row(tensor)[:shown] for tensor in summary.tensors])
        _account(summary)
        _facts(summary, archive)
        if device:
            _device(summary)
    if not summary.complete:
        missing = [tensor.name for tensor in summary.tensors if tensor.coding == "missing"]
        output.warn(f"the archive is cut short; missing: {output.some(missing) or 'its index'}")


def _facts(summary: ArchiveSummary, path: str) -> None:
    video = summary.video
    kinds = Counter("tied" if tensor.alias_of else tensor.coding for tensor in summary.tensors)
    rows = [
        ("archive", path),
        ("size", f"{output.size(summary.file_bytes)} ({summary.file_bytes:,} bytes)"),
        ("weights", f"{summary.weights:,}, of which {summary.coded_weights:,} as video"),
        ("bits per weight", f"{summary.bits_per_weight:.3f} (whole file)"),
        ("tensors", ", ".join(f"{number} {kind}" for kind, number in kinds.items())),
        ("video", f"{video.codec} {video.profile}, {video.frames} frames of {video.width} x "
                  f"{video.height}"),
    ]  # fmt: skip
    layers = summary.layers
    if layers.base:
        rows += [
            ("update to", layers.base),
            ("changes", f"{layers.added} tensors changed, {layers.fresh} new, "
                        f"{layers.unchanged} unchanged"),
        ]  # fmt: skip
    ends = ", ".join(f"{end:,}" for end in layers.ends) if len(layers.ends) > 1 else ""
    rows += [("layers end at", ends), ("root", layers.root)]
    listed = sum(tensor.escapes for tensor in summary.tensors)
    rows.append(("escapes", f"{listed:,} levels that no sample holds" if listed else ""))
    if summary.complete:
        signed, parity = ", ".join(summary.signed_by), summary.account["parity"]
        rows += [
            ("signed by", f"{signed} (unchecked: verify --key)" if signed else "nobody"),
            ("parity", output.size(parity) if parity else "none"),
        ]
    files = [f"{file.path} ({output.size(file.size)})" for file in summary.files]
    rows += [("side files", output.some(files)), *summary.about.items()]
    for key, value in summary.metadata.items():
        more = f"... ({len(value)} characters)" if len(value) > 200 else ""
        rows.append((f"metadata {key}", value[:200] + more))
    output.facts(rows)


def _account(summary: ArchiveSummary) -> None:
    rows = [
        (_PARTS[part], f"{number:,}", f"{100 * number / summary.file_bytes:.2f} %")
        for part, number in summary.account.items()
        if number
    ]
    rows.append(("whole file", f"{summary.file_bytes:,}", "100.00 %"))
    output.table(("part", ">bytes", ">share"), rows)


def _device(summary: ArchiveSummary) -> None:
    video = summary.video
    ranges = {True: "full (0 to 255)", False: "limited: some decoders rescale it", None: "not said"}
    rows = [
        ("decoder", f"{video.codec} {video.profile}, level {video.level}, {video.tier} tier"),
        ("pictures", f"{video.width} x {video.height}, each decodable alone"),
        ("sample range", ranges[video.full_range]),
    ]
    for name, packet in (("first", video.first_packet), ("largest", video.largest_packet)):
        bits = 8 * packet / (video.width * video.height)
        rows.append((f"{name} packet", f"{output.size(packet)}, {bits:.2f} bits per sample"))
    largest = max((t.weights for t in summary.tensors if t.coding == "video"), default=0)
    rows.append(("largest tensor", f"{largest:,} weights"))
    output.facts(rows)


def _row(tensor: TensorSummary) -> tuple[str, ...]:
    """Cells of all of ``_COLUMNS``."""
    frames = "-".join(dict.fromkeys(map(str, tensor.frames or ())))
    coding = "tied" if tensor.alias_of else tensor.method or tensor.coding
    if tensor.kernel:
        coding += f" {'x'.join(map(str, tensor.kernel))}"
    bits, sqnr = tensor.bits_per_weight, tensor.sqnr_db
    return (
        f"{tensor.name} = {tensor.alias_of}" if tensor.alias_of else tensor.name,
        tensor.dtype,
        " x ".join(map(str, tensor.shape)) or "scalar",
        coding,
        "" if bits is None else f"{bits:.2f}",
        "" if sqnr is None else f"{sqnr:.2f}",
        frames,
        output.number(tensor.step, 4),
        f"{tensor.escapes:,}" if tensor.escapes else "",
    )
