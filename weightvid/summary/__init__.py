"""What is in an archive, told from its boxes and sidecars: nothing is decoded."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import e, log2, pi
from pathlib import Path
from typing import Any, BinaryIO, Final, cast

from weightvid.codec.tracks import TRACKS
from weightvid.container.records import Header, StoredFile, TensorEnd
from weightvid.dtypes import PACKABLE
from weightvid.loader import Archive, open_archive
from weightvid.quantize import Params, TrellisParams
from weightvid.remote import is_url, open_remote
from weightvid.summary.gather import (
    ACCOUNT,
    OUTLINE,
    STREAM,
    Found,
    gather_boxes,
    gather_by_index,
    outline,
)

__all__ = [
    "ACCOUNT",
    "MOST_RANGES",
    "OUTLINE",
    "ArchiveSummary",
    "TensorSummary",
    "VideoSummary",
    "summarize_archive",
]

#: boxes whose texts are worth a request each.
MOST_RANGES: Final = 256
#: bits per weight where the SQNR is not known, and at least.
_USUAL_RATE: Final = 4.0
_LEAST_RATE: Final = 0.01


@dataclass(frozen=True, slots=True)
class TensorSummary:
    """One name of an archive.

    Attributes
    ----------
    name, dtype : str
    shape : tuple of int
    weights : int
        Number of elements.
    coding : str
        ``video``, ``plain`` (levels in a box), ``exact``, or ``missing`` (the file is cut short).
        Of an archive of which the index alone has been read: ``video`` or ``boxed``.
    alias_of : str or None
        The tensor whose storage this name shares; then nothing is counted here.
    quantizer : str or None
        ``uniform`` or ``trellis-8``, ...; None for exact tensors.
    step : float or None
        Quantizer step size.
    escapes : int
        Levels listed exactly in a sidecar.
    frames : tuple of two int, or None
        First and last frame.
    sqnr_db : float or None
    bits_per_weight : float or None
        Its share of packets and digits, or of the compressed streams of its box; boxes and sidecar
        records are not counted. Where tensors share a frame, its bytes are shared out by estimate:
        a Gaussian tensor of this SQNR takes ``log2(1 + SQNR * pi * e / 6) / 2`` bits per weight.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    weights: int
    coding: str
    alias_of: str | None = None
    quantizer: str | None = None
    step: float | None = None
    escapes: int = 0
    frames: tuple[int, int] | None = None
    sqnr_db: float | None = None
    bits_per_weight: float | None = None
    slope: float | None = None


@dataclass(frozen=True, slots=True)
class VideoSummary:
    """The video track.

    Attributes
    ----------
    codec, profile, tier, level : str
        As the track claims them; empty where the codec has no such thing.
    bit_depth : int
        Of a sample.
    width, height : int
        Of a frame, in samples.
    frames : int
    """

    codec: str
    profile: str
    tier: str
    level: str
    bit_depth: int
    width: int
    height: int
    frames: int


@dataclass(frozen=True, slots=True)
class ArchiveSummary:
    """An archive at a glance.

    Attributes
    ----------
    file_bytes : int
    complete : bool
        False: the file ends before its index.
    format_version : str
    weights : int
        Elements of all floating-point tensors.
    coded_weights : int
        Those on frames.
    video : VideoSummary
    tensors : tuple of TensorSummary
        In the order of the source; aliases last.
    account : mapping of str to int
        Bytes by :data:`ACCOUNT`, or by :data:`OUTLINE`; they sum to ``file_bytes``.
    about : mapping
        What the packer says of itself: generator, recipe.
    metadata : mapping of str to str
        The source checkpoint's own.
    files : tuple of StoredFile
        Small other files of the model.
    detailed : bool
        False: the index alone has been read. Then nothing is known of quantizers, SQNR and the
        bits of each tensor.
    sqnr_db : float or None
        Over all quantized tensors, where the archive says it.
    """

    file_bytes: int
    complete: bool
    format_version: str
    weights: int
    coded_weights: int
    video: VideoSummary
    tensors: tuple[TensorSummary, ...]
    account: Mapping[str, int]
    about: Mapping[str, Any]
    metadata: Mapping[str, str]
    files: tuple[StoredFile, ...] = ()
    detailed: bool = True
    sqnr_db: float | None = None

    @property
    def bits_per_weight(self) -> float:
        """8 x whole file / weights; 0 without weights."""
        return 8 * self.file_bytes / self.weights if self.weights else 0.0

    @property
    def stream_bits_per_weight(self) -> float | None:
        """8 x (packets and digits) / weights on frames; 0 without any, None without details."""
        if not self.detailed:
            return None
        stream = sum(self.account[part] for part in STREAM)
        return 8 * stream / self.coded_weights if self.coded_weights else 0.0


def summarize_archive(archive: str | os.PathLike[str], details: bool = True) -> ArchiveSummary:
    """Summarize an archive; reads its boxes' headers and sidecars, and no packet of a whole file.

    Parameters
    ----------
    archive : path or address
        From a server without ranges everything is read, but nothing kept.
    details : bool
        False: of an address, read the index alone, in two to four requests. With details, the text
        of each sidecar and box takes one or two requests; of archives of more than
        :data:`MOST_RANGES` of them, one request reads everything, and keeps nothing.

    Raises
    ------
    FormatError
        The file is no archive, or its boxes or sidecars are damaged.
    OSError
        It cannot be read.
    """
    if not is_url(archive):
        with Path(archive).open("rb") as stream:
            return _summarize(stream, _walked)
    with open_remote(archive) as stream:
        if stream.seekable():
            return _summarize(stream, _indexed if details else _outlined)
        with tempfile.TemporaryFile() as spool:
            shutil.copyfileobj(stream, spool)
            return _summarize(cast(BinaryIO, spool), _walked)


_Gather = Callable[[Archive, BinaryIO, int], Found]


def _walked(archive: Archive, stream: BinaryIO, file_bytes: int) -> Found:
    return gather_boxes(stream, file_bytes, archive.header.tensors)


def _indexed(archive: Archive, stream: BinaryIO, file_bytes: int) -> Found:
    index = archive.index
    if not archive.complete or len(index.frames) + len(index.exact) > MOST_RANGES:
        return _walked(archive, stream, file_bytes)
    return gather_by_index(archive, stream, file_bytes)


def _outlined(archive: Archive, stream: BinaryIO, file_bytes: int) -> Found:
    if not archive.complete:
        return _walked(archive, stream, file_bytes)
    return outline(archive, file_bytes)


def _summarize(stream: BinaryIO, how: _Gather) -> ArchiveSummary:
    with open_archive(stream) as opened:
        file_bytes = stream.seek(0, os.SEEK_END)
        found = how(opened, stream, file_bytes)
        tensors = _with_slopes(_tensors(opened, found), opened.header)
        header = opened.header
        claim = TRACKS[header.codec].describe(opened.track.record)
        return ArchiveSummary(
            file_bytes=file_bytes,
            complete=bool(opened.complete),
            format_version=".".join(map(str, header.version)),
            weights=sum(spec.size for spec in header.tensors if spec.dtype in PACKABLE),
            coded_weights=sum(t.weights for t in tensors if t.coding == "video" and not t.alias_of),
            video=VideoSummary(
                codec=header.codec,
                profile=claim.profile,
                tier=claim.tier,
                level=claim.level,
                bit_depth=header.bit_depth,
                width=header.geometry.width,
                height=header.geometry.height,
                frames=found.frames,
            ),
            tensors=tensors,
            account=found.account,
            sqnr_db=opened.sqnr_db,
            about={key: value for key, value in header.about.items() if key != "slopes"},
            metadata=dict(header.metadata),
            files=header.files,
            detailed="sidecars" in found.account,
        )


def _with_slopes(tensors: Iterable[TensorSummary], header: Header) -> tuple[TensorSummary, ...]:
    """Summaries with what the header says of slopes: by id, and 1 where it is silent."""
    slopes = header.about.get("slopes")
    if not isinstance(slopes, Mapping):
        return tuple(tensors)
    found = []
    for number, tensor in enumerate(tensors):
        slope = None if tensor.quantizer is None else slopes.get(str(number), 1.0)
        found.append(replace(tensor, slope=slope) if type(slope) in (int, float) else tensor)
    return tuple(found)


def _tensors(archive: Archive, found: Found) -> Iterator[TensorSummary]:
    used = [0.0] * len(found.stream_bytes)
    tiles = [archive.tiles_of(spec.name) for spec in archive.header.tensors]
    rates = [_rate(found.ends.get(number)) for number in range(len(tiles))]
    for each, rate in zip(tiles, rates, strict=True):
        for tile in each:
            if tile.frame < len(used):
                used[tile.frame] += rate * tile.width
    made: dict[str, TensorSummary] = {}
    for number, spec in enumerate(archive.header.tensors):
        common = (spec.name, spec.dtype, spec.shape, spec.size)
        start, end = found.starts.get(number), found.ends.get(number)
        if start is not None and end is not None:
            stream = sum(
                found.stream_bytes[tile.frame] * rates[number] * tile.width / used[tile.frame]
                for tile in tiles[number]
            )
            summary = TensorSummary(
                *common, "video", None, _quantizer(start.params), start.params.step,
                len(start.escapes.index), (tiles[number][0].frame, tiles[number][-1].frame),
                end.sqnr_db, 8 * stream / spec.size,
            )  # fmt: skip
        elif found.boxed_count.get(number, -1) == spec.size:
            bits = 8 * found.boxed_bytes[number] / spec.size if spec.size else None
            if number in found.plain:
                params, sqnr_db = found.plain[number]
                summary = TensorSummary(
                    *common, "plain", None, _quantizer(params), params.step, 0, None, sqnr_db, bits
                )
            else:
                summary = TensorSummary(*common, "exact", bits_per_weight=bits)
        elif number in found.outlined:
            frames = (tiles[number][0].frame, tiles[number][-1].frame) if tiles[number] else None
            summary = TensorSummary(*common, found.outlined[number], frames=frames)
        else:
            summary = TensorSummary(*common, "missing")
        made[spec.name] = summary
        yield summary
    for alias, target in archive.header.aliases.items():
        first = made[target]
        yield TensorSummary(
            alias, first.dtype, first.shape, first.weights, first.coding, alias_of=target
        )


def _rate(end: TensorEnd | None) -> float:
    """Bits per weight of a Gaussian tensor that ends like this; a mean rate if that is unknown."""
    if end is None or end.sqnr_db is None:
        return _USUAL_RATE
    return max(0.5 * log2(1 + 10 ** (end.sqnr_db / 10) * pi * e / 6), _LEAST_RATE)


def _quantizer(params: Params) -> str:
    return f"trellis-{params.states}" if isinstance(params, TrellisParams) else "uniform"
