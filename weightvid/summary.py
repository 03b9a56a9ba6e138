"""What is in an archive, told from its boxes and sidecars: nothing is decoded."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import e, log2, pi
from pathlib import Path
from typing import Any, BinaryIO, Final, cast

from weightvid.codec.tracks import TRACKS
from weightvid.container import boxes
from weightvid.container.boxes import BOX_HEADER_BYTES, DIGEST_BYTES, LIMITS, UUID_HEADER_BYTES
from weightvid.container.exact import LEVEL_DTYPES
from weightvid.container.fields import integer, items, mapping, parse_params
from weightvid.container.records import Header, Sidecar, StoredFile, TensorEnd, TensorStart
from weightvid.container.sidecar import order_bytes, parse_sidecar
from weightvid.dtypes import PACKABLE, stored_dtype
from weightvid.errors import FormatError
from weightvid.loader import Archive, open_archive
from weightvid.quantize import Params, TrellisParams
from weightvid.remote import is_url, open_remote
from weightvid.spec import TensorSpec

#: parts of the byte account, in file order; ``other`` is what no reader of this version knows.
ACCOUNT: Final = (
    "ftyp", "moov", "header", "side_files", "sidecars", "orders", "digits", "fragment_boxes",
    "packets", "exact_tensors", "plain_tensors", "index", "mfra", "other",
)  # fmt: skip
#: what the levels of the tensors on frames cost.
STREAM: Final = ("packets", "digits")
#: bits per weight where the SQNR is not known, and at least.
_USUAL_RATE: Final = 4.0
_LEAST_RATE: Final = 0.01
_BOXES: Final = {b"ftyp": "ftyp", b"moov": "moov", b"moof": "fragment_boxes", b"mfra": "mfra"}
_UUIDS: Final = {
    boxes.HEADER_UUID: "header",
    boxes.INDEX_UUID: "index",
    boxes.FILE_UUID: "side_files",
}


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
        Bytes by :data:`ACCOUNT`; they sum to ``file_bytes``.
    about : mapping
        What the packer says of itself: generator, recipe.
    metadata : mapping of str to str
        The source checkpoint's own.
    files : tuple of StoredFile
        Small other files of the model.
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
    sqnr_db: float | None = None

    @property
    def bits_per_weight(self) -> float:
        """8 x whole file / weights; 0 without weights."""
        return 8 * self.file_bytes / self.weights if self.weights else 0.0

    @property
    def stream_bits_per_weight(self) -> float:
        """8 x (packets and digits) / weights on frames; 0 without any."""
        stream = sum(self.account[part] for part in STREAM)
        return 8 * stream / self.coded_weights if self.coded_weights else 0.0


@dataclass(frozen=True, slots=True)
class _Place:
    """A top-level box: uuid or four characters, and where it lies."""

    kind: bytes
    offset: int
    size: int
    head: int


@dataclass(slots=True)
class _Found:
    """What has been gathered from the boxes so far, by tensor id or frame number."""

    account: dict[str, int] = field(default_factory=lambda: dict.fromkeys(ACCOUNT, 0))
    starts: dict[int, TensorStart] = field(default_factory=dict)
    ends: dict[int, TensorEnd] = field(default_factory=dict)
    stream_bytes: list[int] = field(default_factory=list)
    boxed_bytes: dict[int, float] = field(default_factory=dict)
    boxed_count: dict[int, int] = field(default_factory=dict)
    plain: dict[int, tuple[Params, float | None]] = field(default_factory=dict)


def summarize_archive(archive: str | os.PathLike[str]) -> ArchiveSummary:
    """Summarize an archive; reads its boxes' headers and sidecars, and no packet of a whole file.

    Parameters
    ----------
    archive : path or address
        From an address everything is read, but nothing kept: a request for each sidecar would take
        longer.

    Raises
    ------
    FormatError
        The file is no archive, or its boxes or sidecars are damaged.
    OSError
        It cannot be read.
    """
    if not is_url(archive):
        with Path(archive).open("rb") as stream:
            return _summarize(stream)
    with open_remote(archive) as stream:
        if stream.seekable():
            return _summarize(stream)
        with tempfile.TemporaryFile() as spool:
            shutil.copyfileobj(stream, spool)
            return _summarize(cast(BinaryIO, spool))


def _summarize(stream: BinaryIO) -> ArchiveSummary:
    with open_archive(stream) as opened:
        found = _Found()
        file_bytes = stream.seek(0, os.SEEK_END)
        _gather(stream, file_bytes, opened.header.tensors, found)
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
                frames=len(found.stream_bytes),
            ),
            tensors=tensors,
            account=found.account,
            sqnr_db=opened.sqnr_db,
            about={key: value for key, value in header.about.items() if key != "slopes"},
            metadata=dict(header.metadata),
            files=header.files,
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


def _walk(stream: BinaryIO, file_bytes: int) -> Iterator[_Place]:
    """Top-level boxes that are whole."""
    at = 0
    while at + BOX_HEADER_BYTES <= file_bytes:
        stream.seek(at)
        data = stream.read(UUID_HEADER_BYTES + 8)
        size, kind, head = int.from_bytes(data[:4], "big"), data[4:8], BOX_HEADER_BYTES
        if size == 1:
            size, head = int.from_bytes(data[8:16], "big"), 16
        if kind == b"uuid":
            kind, head = data[head : head + 16], head + 16
        if size < head or at + size > file_bytes:
            return
        yield _Place(kind, at, size, head)
        at += size


def _gather(
    stream: BinaryIO, file_bytes: int, tensors: tuple[TensorSpec, ...], found: _Found
) -> None:
    account = found.account
    sidecar: Sidecar | None = None
    stream.seek(0)
    if (hint := getattr(stream, "read_on", None)) is not None:
        hint(skipping=True)
    for place in _walk(stream, file_bytes):
        if place.kind == b"mdat":
            account["fragment_boxes"] += place.head
            account["packets"] += place.size - place.head
            if sidecar is not None:
                digits = sum(map(len, sidecar.digits.values()))
                found.stream_bytes.append(place.size - place.head + digits)
                found.ends |= {end.tensor: end for end in sidecar.ends}
            sidecar = None
        elif place.kind == boxes.SIDECAR_UUID:
            sidecar = parse_sidecar(_payload(stream, place), tensors)
            found.starts |= {start.tensor: start for start in sidecar.starts}
            digits = sum(map(len, sidecar.digits.values()))
            account["digits"] += digits
            orders = order_bytes(sidecar)
            account["orders"] += orders
            account["sidecars"] += place.size - digits - orders
        elif place.kind == boxes.EXACT_UUID:
            _gather_exact(stream, place, tensors, found)
        else:
            account[_BOXES.get(place.kind) or _UUIDS.get(place.kind) or "other"] += place.size
    account["other"] += file_bytes - sum(account.values())


def _payload(stream: BinaryIO, place: _Place) -> bytes:
    if place.size > LIMITS.box_bytes:
        raise FormatError(f"a box claims {place.size} bytes", code="limit", offset=place.offset)
    stream.seek(place.offset + place.head)
    return stream.read(place.size - place.head)


def _gather_exact(
    stream: BinaryIO, place: _Place, tensors: tuple[TensorSpec, ...], found: _Found
) -> None:
    what = "a box of exact tensors"
    payload = _payload(stream, place)
    begin = DIGEST_BYTES + 4
    text = boxes.inflate(
        payload[begin : begin + int.from_bytes(payload[DIGEST_BYTES:begin], "big")],
        LIMITS.json_bytes,
        what,
    )
    record = mapping(boxes.from_json(text, what), what)
    heads = [mapping(item, what) for item in items(record.get("items"), LIMITS.tensors, what)]
    sizes = [integer(stream_[1], 0, place.size, what) for stream_ in record.get("streams", [])]
    plain_bytes = 0.0
    for group, bytes_ in _stream_groups(heads, sizes, tensors):
        elements = sum(count for _, count, _ in group)
        for tensor, count, plain in group:
            share = bytes_ * count / elements if elements else 0.0
            found.boxed_bytes[tensor] = found.boxed_bytes.get(tensor, 0.0) + share
            found.boxed_count[tensor] = found.boxed_count.get(tensor, 0) + count
            plain_bytes += share if plain else 0.0
    for head in heads:
        if "levels" in head:
            found.plain[integer(head.get("id"), 0, len(tensors) - 1, what)] = (
                parse_params(head, what),
                head.get("sqnr_db"),
            )
    found.account["plain_tensors"] += round(plain_bytes)
    found.account["exact_tensors"] += place.size - round(plain_bytes)


def _stream_groups(
    heads: list[dict[str, Any]], sizes: list[int], tensors: tuple[TensorSpec, ...]
) -> Iterator[tuple[list[tuple[int, int, bool]], int]]:
    """Items whose bytes are compressed together: (tensor, elements, plain?), and their bytes."""
    what = "a box of exact tensors"
    group: list[tuple[int, int, bool]] = []
    group_size = 0
    at = 0

    def closed() -> tuple[list[tuple[int, int, bool]], int]:
        nonlocal at
        planes = group_size if group_size in (2, 4, 8, 16) else 1
        taken = sum(sizes[at : at + planes])
        at += planes
        return group, taken

    for head in heads:
        tensor = integer(head.get("id"), 0, len(tensors) - 1, what)
        levels = LEVEL_DTYPES.get(head.get("levels", ""))
        itemsize = (levels or stored_dtype(tensors[tensor].dtype)).itemsize
        if group and itemsize != group_size:
            yield closed()
            group = []
        group_size = itemsize
        count = integer(head.get("count", tensors[tensor].size), 0, 1 << 62, what)
        group.append((tensor, count, levels is not None))
    if group:
        yield closed()


def _tensors(archive: Archive, found: _Found) -> Iterator[TensorSummary]:
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
