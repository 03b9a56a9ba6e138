"""The model header and the index: their bytes.

FORMAT.md is the specification.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import Any, Final

from weightvid.codec.tracks import DEFAULT_CODEC, TRACKS
from weightvid.container.boxes import LIMITS, deflate, from_json, inflate, seal, to_json, unseal
from weightvid.container.fields import bad, exactly, integer, items, mapping
from weightvid.container.files import file_record, parse_files
from weightvid.container.records import (
    MAJOR_VERSIONS,
    ExactEntry,
    FrameEntry,
    Header,
    Index,
)
from weightvid.errors import CheckpointError, FormatError
from weightvid.spec import TensorSpec
from weightvid.tile import BAND, FrameGeometry

#: names that a file may list under ``must_understand``: keys of the header whose values change how
#: frames are read. Ordinary archives list none.
_CODEC: Final = "track.codec"
_BIT_DEPTH: Final = "track.bit_depth"
UNDERSTOOD: Final[frozenset[str]] = frozenset({_CODEC, _BIT_DEPTH})
_USUAL_DEPTH: Final = 8
_MAX_DIMS: Final = 32


def header_payload(header: Header) -> bytes:
    """Payload of the header box."""
    needed = []
    if header.codec != DEFAULT_CODEC:
        needed.append(_CODEC)
    if header.bit_depth != _USUAL_DEPTH:
        needed.append(_BIT_DEPTH)
    track: dict[str, Any] = {
        "codec": header.codec,
        "width": header.geometry.width,
        "height": header.geometry.height,
    }
    if header.bit_depth != _USUAL_DEPTH:
        track["bit_depth"] = header.bit_depth
    record: dict[str, Any] = {
        "weightvid": list(header.version),
        **({"must_understand": needed} if needed else {}),
        "track": track,
        "tensors": [[t.name, t.dtype, list(t.shape)] for t in header.tensors],
    }
    for key in ("aliases", "metadata", "about"):
        if value := getattr(header, key):
            record[key] = dict(value)
    if header.files:
        record["files"] = [file_record(entry) for entry in header.files]
    return seal(deflate(to_json(record)))


def parse_header(payload: bytes) -> Header:
    """Header from its box's payload.

    Raises
    ------
    FormatError
        ``version`` or ``must_understand``: the file needs a newer reader; ``track``: frames that
        this reader cannot take; ``digest``, ``deflate``, ``json``, ``schema``, ``limit``: damage.
    """
    what = "the model header"
    body = unseal(payload, what)
    record = mapping(from_json(inflate(body, LIMITS.json_bytes, what), what), what)
    version = items(record.get("weightvid"), 2, what)
    if len(version) != 2:
        raise bad(what, "the format version must be [major, minor]")
    major, minor = (integer(v, 0, 1 << 16, what) for v in version)
    if major not in MAJOR_VERSIONS:
        raise FormatError(
            f"the archive has format version {major}.{minor}; this reader knows "
            f"{' and '.join(f'{known}.x' for known in MAJOR_VERSIONS)}: update weightvid",
            code="version",
        )
    needed = [str(name) for name in items(record.get("must_understand", []), 256, what)]
    unknown = [name for name in needed if name not in UNDERSTOOD]
    if unknown:
        raise FormatError(
            f"the archive needs a reader that knows {', '.join(unknown)}: update weightvid",
            code="must_understand",
        )
    tensors = tuple(
        _parse_spec(entry) for entry in items(record.get("tensors"), LIMITS.tensors, what)
    )
    if len({t.name for t in tensors}) != len(tensors):
        raise bad(what, "tensor names are not unique")
    aliases = _parse_aliases(mapping(record.get("aliases", {}), what), tensors)
    metadata = mapping(record.get("metadata", {}), what)
    if any(not isinstance(value, str) for value in metadata.values()):
        raise bad(what, "metadata values must be text")
    about = mapping(record.get("about", {}), what)
    codec, depth, geometry = _parse_track(mapping(record.get("track"), what))
    files = parse_files(record.get("files", []))
    return Header(geometry, tensors, aliases, metadata, about, (major, minor), files, codec, depth)


def _parse_aliases(aliases: dict[str, Any], tensors: Sequence[TensorSpec]) -> dict[str, str]:
    what = "the list of aliases"
    names = {spec.name for spec in tensors}
    if len(aliases) > LIMITS.tensors:
        raise FormatError("too many aliases", code="limit")
    for alias, target in aliases.items():
        _check_name(alias)
        if not isinstance(target, str) or target not in names or alias in names:
            raise bad(what, "an alias leads nowhere, or has the name of a tensor")
    return aliases


def _check_name(name: str) -> None:
    if len(name.encode("utf-8", "surrogatepass")) > LIMITS.name_bytes:
        raise FormatError("a tensor name is too long", code="limit")


def _parse_track(track: dict[str, Any]) -> tuple[str, int, FrameGeometry]:
    name = track.get("codec")
    known = TRACKS.get(name) if isinstance(name, str) else None
    if known is None:
        raise FormatError(
            f"unknown codec {str(name)[:40]!r}; this reader knows {', '.join(TRACKS)}", code="track"
        )
    depth = integer(track.get("bit_depth", _USUAL_DEPTH), 1, 16, "the track")
    if depth not in known.depths:
        raise FormatError(f"{known.standard} tracks of {depth} bits are unknown", code="track")
    sides = [integer(track.get(k), BAND, LIMITS.frame_px, "the track") for k in ("width", "height")]
    if any(side % BAND for side in sides):
        raise FormatError(f"frame sides must be multiples of {BAND}", code="track")
    return known.name, depth, FrameGeometry(*sides)


def _parse_spec(entry: object) -> TensorSpec:
    what = "the tensor list"
    fields = items(entry, 3, what)
    if len(fields) != 3 or not isinstance(fields[0], str) or not isinstance(fields[1], str):
        raise bad(what, "an entry must be [name, dtype, shape]")
    name, dtype, shape = fields
    _check_name(name)
    dims = tuple(integer(d, 0, LIMITS.tensor_elements, what) for d in items(shape, _MAX_DIMS, what))
    spec = TensorSpec(name, dtype, dims)
    try:
        stored = spec.stored_bytes
    except CheckpointError as error:
        raise FormatError(str(error), code="dtype", tensor=name) from None
    if max(spec.size, stored // 8) > LIMITS.tensor_elements:
        raise FormatError(f"tensor {name!r} is larger than any allowed", code="limit", tensor=name)
    return spec


def index_payload(index: Index) -> bytes:
    """Payload of the index box: sealed JSON, then the size of the whole box (4 bytes)."""
    frames, end = [], 0
    for entry in index.frames:
        frames.append([entry.offset - end, entry.sidecar_bytes, entry.fragment_bytes])
        end = entry.end
    exact = [[e.offset, e.box_bytes, list(e.tensors)] for e in index.exact]
    record: dict[str, Any] = {"ribbon": list(index.ribbon), "frames": frames, "exact": exact}
    if index.sqnr_db is not None:
        record["sqnr_db"] = round(index.sqnr_db, 2)
    sealed = seal(deflate(to_json(record)))
    return sealed + (24 + len(sealed) + 4).to_bytes(4, "big")


def parse_index(payload: bytes, tensors: int) -> Index:
    """Index from its box's payload."""
    what = "the index"
    body = unseal(payload[:-4], what)
    record = mapping(from_json(inflate(body, LIMITS.json_bytes, what), what), what)
    top = 1 << 62
    ids = [integer(i, 0, tensors - 1, what) for i in items(record.get("ribbon"), tensors, what)]
    if len(set(ids)) != len(ids):
        raise bad(what, "a tensor is listed twice")
    frames, end = [], 0
    for entry in items(record.get("frames"), 1 << 31, what):
        gap, sidecar_bytes, fragment_bytes = (
            integer(v, 0, top, what) for v in exactly(entry, 3, what)
        )
        frames.append(FrameEntry(end + gap, sidecar_bytes, fragment_bytes))
        end += gap + sidecar_bytes + fragment_bytes
        if max(sidecar_bytes, fragment_bytes) > LIMITS.box_bytes:
            raise FormatError("a frame is larger than any allowed", code="limit")
    exact = []
    for entry in items(record.get("exact"), 1 << 31, what):
        offset, size, members = exactly(entry, 3, what)
        found = tuple(integer(i, 0, tensors - 1, what) for i in items(members, tensors, what))
        entry_bytes = integer(size, 0, LIMITS.box_bytes, what)
        exact.append(ExactEntry(integer(offset, 0, top, what), entry_bytes, found))
    sqnr = record.get("sqnr_db")
    if sqnr is not None and (type(sqnr) not in (int, float) or not isfinite(sqnr)):
        raise bad(what, "sqnr_db must be a number")
    return Index(tuple(ids), tuple(frames), tuple(exact), sqnr)
