"""What an archive's boxes and sidecars say of it: from front to back, or by its index.

From front to back, every box is accounted for, also those that no index knows of. By the index,
boxes are taken to be as weightvid writes them, and what is read is the text of each at most.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Final

from weightvid.container import boxes, mp4
from weightvid.container.boxes import BOX_HEADER_BYTES, DIGEST_BYTES, LIMITS, UUID_HEADER_BYTES
from weightvid.container.exact import LEVEL_DTYPES
from weightvid.container.fields import integer, items, mapping, parse_params
from weightvid.container.records import Sidecar, TensorEnd, TensorStart
from weightvid.container.sidecar import order_bytes, parse_sidecar
from weightvid.dtypes import stored_dtype
from weightvid.errors import FormatError
from weightvid.loader import Archive
from weightvid.quantize import Params
from weightvid.spec import TensorSpec

#: parts of the byte account, in file order; ``other`` is what no reader of this version knows.
ACCOUNT: Final = (
    "ftyp", "moov", "header", "side_files", "sidecars", "orders", "digits", "fragment_boxes",
    "packets", "exact_tensors", "plain_tensors", "index", "mfra", "other",
)  # fmt: skip
#: the same as far as the index tells.
OUTLINE: Final = (
    "ftyp", "moov", "header", "side_files", "sidecar_boxes", "fragments", "exact_boxes", "index",
    "mfra", "other",
)  # fmt: skip
#: what the levels of the tensors on frames cost.
STREAM: Final = ("packets", "digits")
#: so much of a box is asked for at first where its text is wanted alone.
_TEXT_BYTES: Final = 8 << 10
_FRAGMENT_OVERHEAD: Final = mp4.MOOF_BYTES + BOX_HEADER_BYTES
_BOXES: Final = {b"ftyp": "ftyp", b"moov": "moov", b"moof": "fragment_boxes", b"mfra": "mfra"}
_UUIDS: Final = {
    boxes.HEADER_UUID: "header",
    boxes.INDEX_UUID: "index",
    boxes.FILE_UUID: "side_files",
}


@dataclass(frozen=True, slots=True)
class _Place:
    """A top-level box: uuid or four characters, and where it lies."""

    kind: bytes
    offset: int
    size: int
    head: int


@dataclass(slots=True)
class Found:
    """What has been gathered from the boxes so far, by tensor id or frame number.

    Attributes
    ----------
    account : dict
        Bytes by :data:`ACCOUNT`, or by :data:`OUTLINE`.
    frames : int
    starts, ends : dict
        Records of tensors on frames.
    stream_bytes : list of int
        Of each frame, packet and digits.
    boxed_bytes, boxed_count : dict
        Share of compressed streams, and elements, of tensors in boxes.
    plain : dict
        Quantizer and SQNR of plain ones.
    outlined : dict
        ``video`` or ``boxed``, of tensors of which the index alone has been read.
    """

    account: dict[str, int] = field(default_factory=lambda: dict.fromkeys(ACCOUNT, 0))
    frames: int = 0
    starts: dict[int, TensorStart] = field(default_factory=dict)
    ends: dict[int, TensorEnd] = field(default_factory=dict)
    stream_bytes: list[int] = field(default_factory=list)
    boxed_bytes: dict[int, float] = field(default_factory=dict)
    boxed_count: dict[int, int] = field(default_factory=dict)
    plain: dict[int, tuple[Params, float | None]] = field(default_factory=dict)
    outlined: dict[int, str] = field(default_factory=dict)


def _walk(stream: BinaryIO, file_bytes: int) -> Iterator[_Place]:
    """Top-level boxes that are whole."""
    at = 0
    while at + BOX_HEADER_BYTES <= file_bytes:
        stream.seek(at)
        # No more than the header: a file elsewhere that is read on does not go back.
        data = stream.read(UUID_HEADER_BYTES)
        size, kind, head = int.from_bytes(data[:4], "big"), data[4:8], BOX_HEADER_BYTES
        if size == 1:
            size, head = int.from_bytes(data[8:16], "big"), 16
            data += stream.read(8)
        if kind == b"uuid":
            kind, head = data[head : head + 16], head + 16
        if size < head or at + size > file_bytes:
            return
        yield _Place(kind, at, size, head)
        at += size


def outline(archive: Archive, file_bytes: int) -> Found:
    """What head and index say; asks for nothing more."""
    found = Found(account=_account_of_ends(archive, file_bytes, OUTLINE))
    index, account = archive.index, found.account
    found.frames = len(index.frames)
    account["sidecar_boxes"] = sum(entry.sidecar_bytes for entry in index.frames)
    account["fragments"] = sum(entry.fragment_bytes for entry in index.frames)
    account["exact_boxes"] = sum(entry.box_bytes for entry in index.exact)
    account["other"] = file_bytes - sum(account.values())
    found.outlined = dict.fromkeys((n for entry in index.exact for n in entry.tensors), "boxed")
    found.outlined |= dict.fromkeys(index.ribbon, "video")
    return found


def gather_by_index(archive: Archive, stream: BinaryIO, file_bytes: int) -> Found:
    """The same as :func:`gather_boxes`, from the beginning of each box: a read or two for each."""
    found = Found(account=_account_of_ends(archive, file_bytes, ACCOUNT))
    tensors = archive.header.tensors
    for frame in archive.index.frames:
        place = _Place(boxes.SIDECAR_UUID, frame.offset, frame.sidecar_bytes, UUID_HEADER_BYTES)
        sidecar = _gather_sidecar(_text(stream, place), place.size, tensors, found)
        packet = frame.fragment_bytes - _FRAGMENT_OVERHEAD
        found.account["fragment_boxes"] += _FRAGMENT_OVERHEAD
        _gather_packet(sidecar, packet, found)
    for box in archive.index.exact:
        place = _Place(boxes.EXACT_UUID, box.offset, box.box_bytes, UUID_HEADER_BYTES)
        _gather_exact(_text(stream, place), place.size, tensors, found)
    found.account["other"] = file_bytes - sum(found.account.values())
    return found


def _account_of_ends(archive: Archive, file_bytes: int, parts: tuple[str, ...]) -> dict[str, int]:
    """What comes before the first frame, and after the last."""
    index, header = archive.index, archive.header
    account = dict.fromkeys(parts, 0)
    account["ftyp"] = len(mp4.ftyp())
    account["moov"] = len(mp4.moov(archive.track))
    account["side_files"] = sum(entry.box_bytes for entry in header.files)
    account["header"] = archive.head_bytes - account["ftyp"] - account["moov"]
    account["mfra"] = len(mp4.mfra([entry.offset + entry.sidecar_bytes for entry in index.frames]))
    ends = [archive.head_bytes + account["side_files"]]
    ends += [entry.end for entry in index.frames]
    ends += [entry.offset + entry.box_bytes for entry in index.exact]
    account["index"] = file_bytes - account["mfra"] - max(ends)
    return account


def gather_boxes(stream: BinaryIO, file_bytes: int, tensors: tuple[TensorSpec, ...]) -> Found:
    """Walk over all boxes; read sidecars, and boxes of exact tensors."""
    found = Found()
    account = found.account
    sidecar: Sidecar | None = None
    stream.seek(0)
    if (hint := getattr(stream, "read_on", None)) is not None:
        hint(skipping=True)
    for place in _walk(stream, file_bytes):
        if place.kind == b"mdat":
            account["fragment_boxes"] += place.head
            _gather_packet(sidecar, place.size - place.head, found)
            sidecar = None
        elif place.kind == boxes.SIDECAR_UUID:
            sidecar = _gather_sidecar(_payload(stream, place), place.size, tensors, found)
        elif place.kind == boxes.EXACT_UUID:
            _gather_exact(_payload(stream, place), place.size, tensors, found)
        else:
            account[_BOXES.get(place.kind) or _UUIDS.get(place.kind) or "other"] += place.size
    account["other"] += file_bytes - sum(account.values())
    return found


def _payload(stream: BinaryIO, place: _Place) -> bytes:
    if place.size > LIMITS.box_bytes:
        raise FormatError(f"a box claims {place.size} bytes", code="limit", offset=place.offset)
    stream.seek(place.offset + place.head)
    return stream.read(place.size - place.head)


def _text(stream: BinaryIO, place: _Place) -> bytes:
    """Payload of a sidecar or box as far as its text goes; zeros stand for its streams."""
    if place.size > LIMITS.box_bytes:
        raise FormatError(f"a box claims {place.size} bytes", code="limit", offset=place.offset)
    size = place.size - place.head
    stream.seek(place.offset + place.head)
    data = stream.read(min(size, _TEXT_BYTES))
    begin = DIGEST_BYTES + 4
    wanted = min(size, begin + int.from_bytes(data[DIGEST_BYTES:begin], "big"))
    if wanted > len(data):
        data += stream.read(wanted - len(data))
    return data.ljust(size, b"\0")


def _gather_sidecar(
    payload: bytes, box_bytes: int, tensors: tuple[TensorSpec, ...], found: Found
) -> Sidecar:
    sidecar = parse_sidecar(payload, tensors)
    found.starts |= {start.tensor: start for start in sidecar.starts}
    digits = sum(map(len, sidecar.digits.values()))
    found.account["digits"] += digits
    orders = order_bytes(sidecar)
    found.account["orders"] += orders
    found.account["sidecars"] += box_bytes - digits - orders
    return sidecar


def _gather_packet(sidecar: Sidecar | None, packet_bytes: int, found: Found) -> None:
    found.account["packets"] += packet_bytes
    if sidecar is not None:
        digits = sum(map(len, sidecar.digits.values()))
        found.stream_bytes.append(packet_bytes + digits)
        found.ends |= {end.tensor: end for end in sidecar.ends}
        found.frames += 1


def _gather_exact(
    payload: bytes, box_bytes: int, tensors: tuple[TensorSpec, ...], found: Found
) -> None:
    what = "a box of exact tensors"
    begin = DIGEST_BYTES + 4
    text = boxes.inflate(
        payload[begin : begin + int.from_bytes(payload[DIGEST_BYTES:begin], "big")],
        LIMITS.json_bytes,
        what,
    )
    record = mapping(boxes.from_json(text, what), what)
    heads = [mapping(item, what) for item in items(record.get("items"), LIMITS.tensors, what)]
    sizes = [integer(stream_[1], 0, box_bytes, what) for stream_ in record.get("streams", [])]
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
    found.account["exact_tensors"] += box_bytes - round(plain_bytes)


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
