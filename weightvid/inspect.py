"""What is in an archive, as its boxes and sidecars tell: nothing is decoded."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import e, log2, pi
from typing import Final, NamedTuple

from weightvid import archives, loader
from weightvid.archives import Location
from weightvid.checkpoint import is_url
from weightvid.loader import Archive, End, Part, Sidecar, StoredFile
from weightvid.repair import PARITY_UUID
from weightvid.sign import SIGN_UUID, fingerprint, signatures_in
from weightvid.spec import weight_count
from weightvid.video import CODECS, describe

_KINDS: Final = {
    b"ftyp": "ftyp", b"moov": "moov", loader.HEADER_UUID: "header", loader.FILE_UUID: "side_files",
    loader.FRAME_UUID: "sidecars", b"moof": "fragment_boxes", b"mdat": "packets",
    loader.EXACT_UUID: "boxes", loader.INDEX_UUID: "index", SIGN_UUID: "signatures",
    PARITY_UUID: "parity", b"mfra": "mfra",
}  # fmt: skip
#: parts of the byte account, in file order.
ACCOUNT: Final = (*_KINDS.values(), "other")
_STANDARDS: Final = {row.entry: row.standard for row in CODECS.values()}
#: bits per weight where the SQNR is not known, and at least.
_USUAL_RATE, _LEAST_RATE = 4.0, 0.01


class TensorSummary(NamedTuple):
    """One name of an archive.

    ``coding`` is ``video``, ``boxed`` (beside the pictures), ``unchanged`` (in the base alone), or
    ``missing`` (the file is cut short). Nothing else is said of a name that shares the storage of
    another (``alias_of``), and only of video: ``method`` (``uniform`` or ``trellis``), ``step`` of
    the first part, sizes of the transformed ``kernel`` axes, listed levels (``escapes``; outliers
    are among them), first and last of the ``frames``, and a share of the packets in
    ``bits_per_weight``. Where tensors share a packet, it is shared out by estimate: a Gaussian
    tensor of this SQNR takes ``log2(1 + SQNR * pi * e / 6) / 2``.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    weights: int
    coding: str
    alias_of: str | None = None
    method: str | None = None
    step: float | None = None
    kernel: tuple[int, ...] = ()
    escapes: int = 0
    frames: tuple[int, int] | None = None
    sqnr_db: float | None = None
    bits_per_weight: float | None = None


class VideoSummary(NamedTuple):
    """The video track: its standard, what it claims of itself, frames, and bytes of packets.

    Of packets, 0 if the index alone has been read.
    """

    codec: str
    profile: str
    tier: str
    level: str
    full_range: bool | None
    width: int
    height: int
    frames: int
    first_packet: int
    largest_packet: int


class LayerSummary(NamedTuple):
    """Layers of a file: bytes up to the end of each, root of the tensors, and what is updated.

    Of an update: root of its base, and how many tensors are added to the base's, replace them or
    are new, and stay as they are. Roots are empty where there is none.
    """

    ends: tuple[int, ...]
    root: str
    base: str
    added: int
    fresh: int
    unchanged: int


@dataclass(frozen=True, slots=True)
class ArchiveSummary:
    """An archive at a glance.

    Attributes
    ----------
    file_bytes : int
    complete : bool
        False: the file ends before its index.
    detailed : bool
        False: the index alone has been read. Then all bytes of frames count as packets, and all
        but signatures and parity as ``other``; quantizers, SQNR and bits of tensors are not known.
    weights, coded_weights : int
        Elements of all floats and of what is quantized to a byte or less already; and of those in
        the pictures.
    video : VideoSummary
    tensors : tuple of TensorSummary
        In the order of the source; aliases last.
    account : mapping of str to int
        Bytes by :data:`ACCOUNT`; they sum to ``file_bytes``.
    about, metadata : mapping of str to str
        What the packer says of itself, and the source checkpoint's own.
    files : tuple of StoredFile
        Small other files of the model.
    layers : LayerSummary
    signed_by : tuple of str
        Fingerprints of the keys whose signatures the archive holds, unchecked.
    """

    file_bytes: int
    complete: bool
    detailed: bool
    weights: int
    coded_weights: int
    video: VideoSummary
    tensors: tuple[TensorSummary, ...]
    account: Mapping[str, int]
    about: Mapping[str, str]
    metadata: Mapping[str, str]
    files: tuple[StoredFile, ...]
    layers: LayerSummary
    signed_by: tuple[str, ...]

    @property
    def bits_per_weight(self) -> float:
        """8 x whole file / weights; 0 without weights."""
        return 8 * self.file_bytes / self.weights if self.weights else 0.0

    @property
    def packet_share(self) -> float:
        """Share of the file, 0..1, that is video."""
        return self.account["packets"] / self.file_bytes


def summarize_archive(location: Location, *, details: bool | None = None) -> ArchiveSummary:
    """Say what is in an archive, without decoding it.

    Parameters
    ----------
    location : path, address or binary file object
        A pipe is first copied to a temporary file.
    details : bool, optional
        Read the sidecar of each frame. None: of a file, but not of an address, where that may
        take as long as a download; an archive without index is always read in detail.

    Raises
    ------
    FormatError, OSError, RemoteError
    """
    with archives.seekable(location) as there, archives.open_anywhere(there) as archive:
        index, track, file = archive.index, archive.track, archive.source.file
        size = file.seek(0, os.SEEK_END)
        detailed = index is None or (not is_url(location) if details is None else details)
        frames = list(archives.walk_frames(archive)) if detailed else []
        packets = [packet_bytes for _, packet_bytes in frames] or [0]
        account = dict.fromkeys(ACCOUNT, 0)
        signatures = () if index is None else signatures_in(file)
        boxes = archives.walk_boxes(file) if detailed else archives.find_tail(file).boxes
        for kind, _, box_bytes in boxes:
            account[_KINDS.get(kind, "other")] += box_bytes
        # The head of an mdat box belongs to no packet.
        account["fragment_boxes"] += 8 * len(frames)
        account["packets"] = sum(packets)
        if index is not None and not detailed:
            account["packets"] = sum(frame_bytes for _, frame_bytes in index.frames)
        account["other"] += size - sum(account.values())
        tensors = tuple(_tensors(archive, frames))
        return ArchiveSummary(
            file_bytes=size,
            complete=index is not None,
            detailed=detailed,
            weights=weight_count(archive.header.tensors),
            coded_weights=sum(t.weights for t in tensors if t.coding == "video" and not t.alias_of),
            video=VideoSummary(
                _STANDARDS[track.entry], *describe(track.entry, track.record), track.width,
                track.height, len(frames if index is None else index.frames), packets[0],
                max(packets),
            ),
            tensors=tensors,
            account=account,
            about=archive.header.about,
            metadata=archive.header.metadata,
            files=archive.header.files,
            layers=_layers(archive, size),
            signed_by=tuple(fingerprint(signature.key) for signature in signatures),
        )  # fmt: skip


def _layers(archive: Archive, size: int) -> LayerSummary:
    header, index = archive.header, archive.index
    masks = [header.mask(number) for number in range(len(header.tensors))]
    base = header.layers.base.hex() if header.layers else ""
    added = sum(mask & 1 and mask > 1 for mask in masks)
    fresh = sum(not mask & 1 for mask in masks)
    counts = added, fresh, masks.count(1)
    if index is None:
        return LayerSummary((), "", base, *counts)
    ends, frames, boxes = [], 0, 0
    for frame_count, box_count in index.stages:
        frames, boxes = frames + frame_count, boxes + box_count
        following = [at for at, _ in index.frames[frames : frames + 1]]
        following += [at for at, _ in index.boxes[boxes : boxes + 1]]
        ends.append(min(following, default=size))
    return LayerSummary(tuple(ends), index.root.hex(), base, *counts)


def _tensors(archive: Archive, frames: Sequence[tuple[Sidecar, int]]) -> Iterator[TensorSummary]:
    parts: dict[int, list[Part]] = {}
    for part in (part for sidecar, _ in frames for part in sidecar.parts):
        parts.setdefault(part.tensor, []).append(part)
    ends = {end.tensor: end for sidecar, _ in frames for end in sidecar.ends}
    shares, spans = _shares(archive, frames, ends)
    exact = _boxed(archive)
    if archive.index is not None:
        spans = {n: (own[0].start, own[-1].stop - 1) for n, own in archive.index.spans.items()}
    made = []
    for number, spec in enumerate(archive.header.tensors):
        own, end = parts.get(number), ends.get(number)
        if own is not None and end is not None and number in shares and number in spans:
            summary = TensorSummary(
                *spec, spec.size, "video", None,
                "trellis" if own[0].method == loader.TRELLIS else "uniform", own[0].step,
                tuple(len(archive.header.bases[basis]) for basis in own[0].bases),
                sum(len(part.escapes[0]) for part in own if part.escapes is not None),
                spans[number], end.sqnr_db, 8 * shares[number] / spec.size,
            )  # fmt: skip
        elif number in spans and not frames:
            summary = TensorSummary(*spec, spec.size, "video", frames=spans[number])
        else:
            coding = "unchanged" if archive.header.mask(number) == 1 else "missing"
            summary = TensorSummary(*spec, spec.size, "boxed" if number in exact else coding)
        made.append(summary)
    yield from made
    for alias, number in archive.header.aliases.items():
        of = made[number]
        yield TensorSummary(alias, of.dtype, of.shape, of.weights, of.coding, alias_of=of.name)


def _boxed(archive: Archive) -> set[int]:
    """Numbers of the tensors in boxes whose elements are all there."""
    if archive.index is not None:
        return {number for _, numbers in archive.index.boxes for number in numbers}
    counts: dict[int, int] = {}
    for kind, offset, _ in archives.walk_boxes(archive.source.file):
        if kind == loader.EXACT_UUID:
            payload = archive.source.box(offset)[1]
            for number, _, elements in loader.parse_exact(payload, archive.header):
                counts[number] = counts.get(number, 0) + elements.size
    return {n for n, count in counts.items() if count == archive.header.tensors[n].size}


def _shares(
    archive: Archive, frames: Sequence[tuple[Sidecar, int]], ends: Mapping[int, End]
) -> tuple[dict[int, float], dict[int, tuple[int, int]]]:
    """Bytes of packets, and first and last frame, by tensor."""
    shares: dict[int, float] = {}
    spans: dict[int, tuple[int, int]] = {}
    placed = archives.place_parts((sidecar for sidecar, _ in frames), archive)
    for number, ((_, packet_bytes), pieces) in enumerate(zip(frames, placed, strict=True)):
        costs = [(tensor, _rate(ends.get(tensor)) * columns) for tensor, _, columns in pieces]
        total = sum(cost for _, cost in costs)
        for tensor, cost in costs:
            shares[tensor] = shares.get(tensor, 0.0) + packet_bytes * cost / total
            spans[tensor] = spans.get(tensor, (number, 0))[0], number
    return shares, spans


def _rate(end: End | None) -> float:
    """Bits per weight, as `TensorSummary` estimates it; a usual rate if there is no SQNR."""
    if end is None or end.sqnr_db is None:
        return _USUAL_RATE
    return max(0.5 * log2(1 + 10 ** (end.sqnr_db / 10) * pi * e / 6), _LEAST_RATE)
