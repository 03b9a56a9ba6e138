"""Reading an archive: box by box from a stream, or by the index from a file that can seek."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from weightvid.codec.tracks import TRACKS
from weightvid.container import boxes, mp4
from weightvid.container.boxes import BOX_HEADER_BYTES, LIMITS, UUID_HEADER_BYTES
from weightvid.container.exact import parse_exact
from weightvid.container.files import open_file
from weightvid.container.manifest import parse_header, parse_index
from weightvid.container.records import (
    ExactEntry,
    FrameEntry,
    Header,
    Index,
    Sidecar,
    StoredFile,
)
from weightvid.container.sidecar import parse_sidecar
from weightvid.container.source import Source
from weightvid.errors import CodecError, FormatError, TruncatedError
from weightvid.spec import TensorSpec

_CHUNK: Final = 1 << 20
_MFRO_BYTES: Final = 16
#: first guesses of how much to read at either end; large files have large headers.
_GUESS_BYTES: Final = 4 << 10
_GUESS_SHARE: Final = 2000
_GUESS_LIMIT_BYTES: Final = 32 << 10
#: frames that lie together are fetched together, up to this many bytes.
WINDOW_BYTES: Final = 32 << 20


@dataclass(frozen=True, slots=True)
class Box:
    """A top-level box.

    Attributes
    ----------
    kind : bytes
        Four characters, or the 16 bytes of an extended type.
    offset : int
        Of the whole box in the file.
    size : int
        Of the whole box.
    payload : bytes
        Without box header and extended type; empty for boxes that are skipped.
    """

    kind: bytes
    offset: int
    size: int
    payload: bytes


@dataclass(frozen=True, slots=True)
class Head:
    """What comes before the first frame."""

    track: mp4.Track
    header: Header
    size: int


@dataclass(frozen=True, slots=True)
class Fragment:
    """One frame as it lies in the file.

    Attributes
    ----------
    entry : FrameEntry
    sidecar : Sidecar
    payload : bytes
        The sidecar box's payload, for the digest.
    packet : bytes
    """

    entry: FrameEntry
    sidecar: Sidecar
    payload: bytes
    packet: bytes


@dataclass(frozen=True, slots=True)
class ExactPayload:
    """A box of exact tensors, not yet decompressed."""

    box: Box

    def entry(self, tensors: Sequence[TensorSpec]) -> ExactEntry:
        """What the index says of this box."""
        ids = tuple(item.tensor for item in parse_exact(self.box.payload, tensors))
        return ExactEntry(self.box.offset, self.box.size, ids)


def _wanted(kind: bytes) -> bool:
    return kind in boxes.OUR_UUIDS or kind in (b"moov", b"moof", b"mdat", b"ftyp")


def read_box(source: Source, expected: bytes | None = None, *, files: bool = False) -> Box | None:
    """Next top-level box of a stream; None at a clean end.

    Parameters
    ----------
    source : Source
    expected : bytes or None
        The only kind that the first box of an archive may have.
    files : bool
        Read the boxes of side files, which are skipped otherwise.

    Raises
    ------
    TruncatedError
        The file ends inside the box.
    FormatError
        ``box-size``: an impossible size; ``limit``: larger than any that is read;
        ``not-an-archive``: another kind than expected.
    """
    offset = source.position
    head = source.read(BOX_HEADER_BYTES)
    if not head:
        return None
    if len(head) < BOX_HEADER_BYTES:
        raise TruncatedError("the file ends inside a box", offset=offset)
    size, kind, taken = int.from_bytes(head[:4], "big"), head[4:8], BOX_HEADER_BYTES
    if expected is not None and kind != expected:
        raise FormatError("this is not a weightvid archive: no ftyp box", code="not-an-archive")
    if size == 1:
        large = source.read(8)
        if len(large) < 8:
            raise TruncatedError("the file ends inside a box", offset=offset)
        size, taken = int.from_bytes(large, "big"), taken + 8
    if kind == b"uuid":
        kind, taken = source.read(16), taken + 16
        if len(kind) < 16:
            raise TruncatedError("the file ends inside a box", offset=offset)
    if size < taken:
        raise FormatError(f"a box claims a size of {size} bytes", code="box-size", offset=offset)
    payload = b""
    if _wanted(kind) or (files and kind == boxes.FILE_UUID):
        if size > LIMITS.box_bytes:
            raise FormatError(f"a box claims {size} bytes", code="limit", offset=offset)
        payload = source.read(size - taken)
        whole = len(payload) == size - taken
    else:
        whole = _skip(source, size - taken)
    if not whole:
        raise TruncatedError("the file ends inside a box", offset=offset)
    return Box(kind, offset, size, payload)


def _skip(source: Source, size: int) -> bool:
    while size:
        step = len(source.read(min(size, _CHUNK)))
        if not step:
            return False
        size -= step
    return True


def read_head(source: Source) -> Head:
    """Read ftyp, moov and the model header.

    Raises
    ------
    FormatError
        ``not-an-archive``: the file is something else; ``truncated``; and all of
        :func:`~weightvid.container.records.parse_header` and ``moov``.
    """
    first = read_box(source, b"ftyp")
    if first is None:
        raise FormatError("this is not a weightvid archive: it is empty", code="not-an-archive")
    brands = [first.payload[i : i + 4] for i in (0, *range(8, len(first.payload), 4))]
    if not any(brand in brands for brand in mp4.KNOWN_BRANDS):
        raise FormatError(
            "this MP4 is not a weightvid archive that this reader knows: its ftyp has neither the "
            "brand wvd2 nor wvd1",
            code="not-an-archive",
        )
    track = None
    while (box := read_box(source)) is not None:
        if box.kind == b"moov":
            track = mp4.parse_moov(box.payload)
        elif box.kind == boxes.HEADER_UUID:
            return _head(track, parse_header(box.payload), source.position)
        elif box.kind in (b"moof", b"mdat"):
            break
    if box is None:
        raise TruncatedError("the file ends before its header", offset=source.position)
    raise FormatError("frames come before the header", code="order", offset=box.offset)


def _head(track: mp4.Track | None, header: Header, size: int) -> Head:
    if track is None:
        raise FormatError("the header comes before moov", code="order")
    if (track.width, track.height) != (header.geometry.width, header.geometry.height):
        raise FormatError("moov and the header disagree about the frame size", code="track")
    codec = TRACKS[header.codec]
    if codec.entry != track.entry:
        raise FormatError("moov and the header disagree about the codec", code="track")
    try:
        codec.check(track.record, header.form)
    except CodecError as error:
        raise FormatError(f"the track's configuration is wrong: {error}", code="track") from None
    return Head(track, header, size)


def read_events(source: Source, head: Head) -> Iterator[Fragment | ExactPayload | Index]:
    """Everything after the head, as it arrives.

    Ends cleanly only after the index has been read; a file without one is truncated.
    """
    pending: Box | None = None
    number = -1
    tensors = head.header.tensors
    at = source.position
    while True:
        # Whoever iterates may read single tensors in between, from the same file.
        source.seek(at)
        box = read_box(source)
        at = source.position
        if box is None:
            break
        if box.kind == boxes.SIDECAR_UUID:
            pending, number = box, -1
        elif box.kind == b"moof":
            number = mp4.parse_moof(box.payload)
        elif box.kind == b"mdat":
            yield _fragment(pending, number, box, head)
            pending = None
        elif box.kind == boxes.EXACT_UUID:
            yield ExactPayload(box)
        elif box.kind == boxes.INDEX_UUID:
            yield parse_index(box.payload, len(tensors))
            return
    raise TruncatedError("the archive ends before its index", offset=source.position)


def _fragment(sidecar: Box | None, number: int, mdat: Box, head: Head) -> Fragment:
    if sidecar is None:
        raise FormatError("a frame has no sidecar", code="order", offset=mdat.offset)
    parsed = parse_sidecar(sidecar.payload, head.header.tensors)
    if parsed.frame != number:
        raise FormatError(
            f"the sidecar of frame {parsed.frame} stands before frame {number}",
            code="order",
            offset=sidecar.offset,
        )
    end = mdat.offset + mdat.size
    fragment = end - sidecar.offset - sidecar.size
    entry = FrameEntry(sidecar.offset, sidecar.size, fragment)
    return Fragment(entry, parsed, sidecar.payload, mdat.payload)


def read_fragment(source: Source, entry: FrameEntry, head: Head) -> Fragment:
    """Read one frame where the index says it lies."""
    source.seek(entry.offset)
    events = read_events(source, head)
    found = next(events)
    if not isinstance(found, Fragment) or source.position != entry.end:
        raise FormatError("the index points to no frame", code="index", offset=entry.offset)
    return found


def read_exact(source: Source, entry: ExactEntry) -> ExactPayload:
    """Read one box of exact tensors where the index says it lies."""
    source.seek(entry.offset)
    source.prefetch(entry.box_bytes)
    box = read_box(source)
    if box is None or box.kind != boxes.EXACT_UUID or box.size != entry.box_bytes:
        raise FormatError("the index points to no exact box", code="index", offset=entry.offset)
    return ExactPayload(box)


def read_file(source: Source, entry: StoredFile) -> bytes:
    """Read the side file whose box begins here.

    Raises
    ------
    FormatError
        ``order``: the box is not that of the file; ``digest``, ``stream``, ``truncated``.
    """
    source.prefetch(entry.box_bytes)
    offset = source.position
    box = read_box(source, files=True)
    if box is None:
        raise TruncatedError("the archive ends before its side files", offset=offset)
    if box.kind != boxes.FILE_UUID or box.size != entry.box_bytes:
        raise FormatError(
            f"side file {entry.path!r} is not where it should be", code="order", offset=offset
        )
    return open_file(entry, box.payload)


def read_tail_index(source: Source, head: Head, file_bytes: int) -> Index | None:
    """Index at the end of a file that can seek; None when the file does not end in one.

    Takes one read, or two if the index is longer than the header.
    """
    guess = min(file_bytes - head.size, max(_GUESS_BYTES, head.size))
    source.seek(file_bytes - guess)
    source.prefetch(guess)
    tail = source.read(guess)
    if len(tail) < _MFRO_BYTES or tail[-12:-8] != b"mfro":
        return None
    end = file_bytes - int.from_bytes(tail[-4:], "big")
    if not head.size + 4 <= end <= file_bytes - _MFRO_BYTES:
        return None
    source.seek(end - 4)
    size = int.from_bytes(source.read(4), "big")
    if not UUID_HEADER_BYTES < size <= min(end - head.size, LIMITS.box_bytes):
        return None
    source.seek(end - size)
    source.prefetch(size)
    box = read_box(source)
    if box is None or box.kind != boxes.INDEX_UUID or box.size != size:
        return None
    return parse_index(box.payload, len(head.header.tensors))


def prefetch_head(source: Source, file_bytes: int) -> None:
    """Read about as much of a file that can seek as its head is long."""
    source.seek(0)
    guess = max(_GUESS_BYTES, min(file_bytes // _GUESS_SHARE, _GUESS_LIMIT_BYTES))
    source.prefetch(min(file_bytes, guess))
