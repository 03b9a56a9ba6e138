"""The records of an archive (the manifest and its sidecars), and their bytes.

FORMAT.md is the specification; names here are those of its JSON keys.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from weightvid.container.boxes import (
    DIGEST_BYTES,
    LIMITS,
    deflate,
    from_json,
    inflate,
    seal,
    to_json,
    unseal,
)
from weightvid.errors import CheckpointError, FormatError, QuantizationError
from weightvid.quantize.params import MAX_LEVEL, Params, params_from_dict
from weightvid.spec import TensorSpec
from weightvid.tile import BAND, FrameGeometry

VERSION: Final = (1, 0)
#: names that a file may list under ``must_understand``; none is needed by version 1.0.
UNDERSTOOD: Final[frozenset[str]] = frozenset()
_MAX_DIMS: Final = 32


@dataclass(frozen=True, slots=True)
class Header:
    """The model header: everything that is known before the first frame.

    Attributes
    ----------
    geometry : FrameGeometry
        Frame size.
    tensors : tuple of TensorSpec
        All distinct tensors; a tensor's **id** is its place here.
    aliases : mapping of str to str
        Further names of tensors (tied weights).
    metadata : mapping of str to str
        The source checkpoint's own text pairs.
    about : mapping
        Free information for people: generator, recipe, source kind.
    """

    geometry: FrameGeometry
    tensors: tuple[TensorSpec, ...]
    aliases: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)
    version: tuple[int, int] = VERSION


@dataclass(frozen=True, slots=True)
class Escapes:
    """Levels outside the sample range, listed exactly.

    Attributes
    ----------
    index : ndarray of int64
        Ascending positions in the row-major tensor.
    level : ndarray of int32
        The true levels there.
    """

    index: npt.NDArray[np.int64]
    level: npt.NDArray[np.int32]


NO_ESCAPES: Final = Escapes(np.empty(0, np.int64), np.empty(0, np.int32))


@dataclass(frozen=True, slots=True)
class TensorStart:
    """A tensor whose first ribbon column lies in this frame."""

    tensor: int
    params: Params
    escapes: Escapes = NO_ESCAPES


@dataclass(frozen=True, slots=True)
class TensorEnd:
    """A tensor whose last ribbon column lies in this frame.

    Attributes
    ----------
    tensor : int
        Id.
    sha256 : bytes
        Of the dequantized elements, little-endian, in the tensor's own dtype, row-major.
    sqnr_db : float or None
        Signal-to-quantization-noise ratio; None when there is no noise.
    """

    tensor: int
    sha256: bytes
    sqnr_db: float | None


@dataclass(frozen=True, slots=True)
class Sidecar:
    """What precedes a frame: which tensors start and end in it."""

    frame: int
    starts: tuple[TensorStart, ...] = ()
    ends: tuple[TensorEnd, ...] = ()


@dataclass(frozen=True, slots=True)
class FrameEntry:
    """Where a frame lies: offset of its sidecar box, sizes of that box and of moof + mdat."""

    offset: int
    sidecar_bytes: int
    fragment_bytes: int

    @property
    def end(self) -> int:
        """Offset of what follows."""
        return self.offset + self.sidecar_bytes + self.fragment_bytes


@dataclass(frozen=True, slots=True)
class ExactEntry:
    """Where a box of exact tensors lies, and the ids of the tensors that have a part in it."""

    offset: int
    box_bytes: int
    tensors: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Index:
    """Where everything lies.

    Attributes
    ----------
    ribbon : tuple of int
        Ids of the tensors on the ribbon, in its order.
    frames : tuple of FrameEntry
    exact : tuple of ExactEntry
    """

    ribbon: tuple[int, ...]
    frames: tuple[FrameEntry, ...]
    exact: tuple[ExactEntry, ...]


def bad(what: str, why: str) -> FormatError:
    """A FormatError about a record that parses as JSON but not as what it should be."""
    return FormatError(f"{what} is malformed: {why}", code="schema")


def integer(value: object, low: int, high: int, what: str) -> int:
    """``value`` if it is an int in low..high."""
    if type(value) is not int or not low <= value <= high:
        raise bad(what, f"expected an integer in {low}..{high}, found {str(value)[:40]!r}")
    return value


def items(value: object, limit: int, what: str) -> list[Any]:
    """``value`` if it is a list of at most ``limit`` items."""
    if not isinstance(value, list) or len(value) > limit:
        raise bad(what, f"expected a list of at most {limit} items")
    return value


def mapping(value: object, what: str) -> dict[str, Any]:
    """``value`` if it is a JSON object."""
    if not isinstance(value, dict):
        raise bad(what, "expected a JSON object")
    return value


def header_payload(header: Header) -> bytes:
    """Payload of the header box."""
    record: dict[str, Any] = {
        "weightvid": list(header.version),
        "must_understand": [],
        "track": {
            "codec": "hevc",
            "width": header.geometry.width,
            "height": header.geometry.height,
        },
        "tensors": [[t.name, t.dtype, list(t.shape)] for t in header.tensors],
    }
    for key in ("aliases", "metadata", "about"):
        if value := getattr(header, key):
            record[key] = dict(value)
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
    if major != VERSION[0]:
        raise FormatError(
            f"the archive has format version {major}.{minor}; this reader knows {VERSION[0]}.x: "
            "update weightvid",
            code="version",
        )
    unknown = [
        n for n in items(record.get("must_understand", []), 256, what) if n not in UNDERSTOOD
    ]
    if unknown:
        raise FormatError(
            f"the archive needs a reader that knows {', '.join(map(str, unknown))}: "
            "update weightvid",
            code="must_understand",
        )
    tensors = tuple(
        _parse_spec(entry) for entry in items(record.get("tensors"), LIMITS.tensors, what)
    )
    names = {t.name for t in tensors}
    aliases = mapping(record.get("aliases", {}), what)
    if len(names) != len(tensors) or any(
        target not in names or alias in names for alias, target in aliases.items()
    ):
        raise bad(what, "tensor names are not unique, or an alias leads nowhere")
    metadata = mapping(record.get("metadata", {}), what)
    if any(not isinstance(value, str) for value in metadata.values()):
        raise bad(what, "metadata values must be text")
    about = mapping(record.get("about", {}), what)
    geometry = _parse_track(mapping(record.get("track"), what))
    return Header(geometry, tensors, aliases, metadata, about, (major, minor))


def _parse_track(track: dict[str, Any]) -> FrameGeometry:
    if track.get("codec") != "hevc":
        raise FormatError(f"unknown codec {str(track.get('codec'))[:40]!r}", code="track")
    sides = [integer(track.get(k), BAND, LIMITS.frame_px, "the track") for k in ("width", "height")]
    if any(side % BAND for side in sides):
        raise FormatError(f"frame sides must be multiples of {BAND}", code="track")
    return FrameGeometry(*sides)


def _parse_spec(entry: object) -> TensorSpec:
    what = "the tensor list"
    fields = items(entry, 3, what)
    if len(fields) != 3 or not isinstance(fields[0], str) or not isinstance(fields[1], str):
        raise bad(what, "an entry must be [name, dtype, shape]")
    name, dtype, shape = fields
    if len(name.encode("utf-8", "surrogatepass")) > LIMITS.name_bytes:
        raise FormatError("a tensor name is too long", code="limit")
    dims = tuple(integer(d, 0, LIMITS.tensor_elements, what) for d in items(shape, _MAX_DIMS, what))
    spec = TensorSpec(name, dtype, dims)
    try:
        stored = spec.stored_bytes
    except CheckpointError as error:
        raise FormatError(str(error), code="dtype", tensor=name) from None
    if max(spec.size, stored // 8) > LIMITS.tensor_elements:
        raise FormatError(f"tensor {name!r} is larger than any allowed", code="limit", tensor=name)
    return spec


def sidecar_payload(sidecar: Sidecar, luma: npt.NDArray[np.uint8]) -> bytes:
    """Payload of the sidecar box of a frame with these samples, shape (height, width)."""
    starts, blobs = [], []
    for start in sidecar.starts:
        entry: dict[str, Any] = {"id": start.tensor, **start.params.to_dict()}
        count = len(start.escapes.index)
        if count:
            entry["escapes"] = count
            blobs.append(np.diff(start.escapes.index, prepend=0).astype("<u8").tobytes())
            blobs.append(start.escapes.level.astype("<i4").tobytes())
        starts.append(entry)
    ends: list[dict[str, Any]] = []
    for end in sidecar.ends:
        ends.append({"id": end.tensor})
        if end.sqnr_db is not None:
            ends[-1]["sqnr_db"] = round(end.sqnr_db, 2)
    record: dict[str, Any] = {"frame": sidecar.frame}
    if starts:
        record["starts"] = starts
    if ends:
        record["ends"] = ends
    text = to_json(record)
    hashes = b"".join(end.sha256 for end in sidecar.ends)
    body = deflate(b"".join((len(text).to_bytes(4, "big"), text, hashes, *blobs)))
    return frame_digest(body, luma) + body


def frame_digest(body: bytes, luma: npt.NDArray[np.uint8]) -> bytes:
    """SHA-256 over a sidecar's deflated body and then the frame's luma, row by row."""
    digest = hashlib.sha256(body)
    digest.update(np.ascontiguousarray(luma).data)
    return digest.digest()


def check_frame(payload: bytes, luma: npt.NDArray[np.uint8], number: int) -> None:
    """Compare a decoded frame, and its sidecar, with the digest in the sidecar's payload."""
    if frame_digest(payload[DIGEST_BYTES:], luma) != payload[:DIGEST_BYTES]:
        raise FormatError(f"frame {number} or its sidecar is damaged", code="digest")


def parse_sidecar(payload: bytes, tensors: Sequence[TensorSpec]) -> Sidecar:
    """Sidecar from its box's payload; its digest can be checked only with the decoded frame."""
    what = "a frame sidecar"
    data = inflate(payload[DIGEST_BYTES:], LIMITS.box_bytes, what)
    length = int.from_bytes(data[:4], "big")
    if len(data) < 4 + length:
        raise bad(what, "its text is longer than itself")
    record = mapping(from_json(data[4 : 4 + length], what), what)
    frame = integer(record.get("frame"), 0, (1 << 32) - 2, what)
    entries = items(record.get("ends", []), LIMITS.tensors, what)
    at = 4 + length
    ends = []
    for entry in entries:
        end = mapping(entry, what)
        tensor = integer(end.get("id"), 0, len(tensors) - 1, what)
        sqnr = end.get("sqnr_db")
        if sqnr is not None and type(sqnr) not in (int, float):
            raise bad(what, "sqnr_db must be a number")
        ends.append(TensorEnd(tensor, data[at : at + 32], sqnr))
        at += 32
    starts = []
    for entry in items(record.get("starts", []), LIMITS.tensors, what):
        start = mapping(entry, what)
        tensor = integer(start.get("id"), 0, len(tensors) - 1, what)
        size = tensors[tensor].size
        count = integer(start.get("escapes", 0), 0, size, what)
        starts.append(
            TensorStart(tensor, parse_params(start, what), _parse_escapes(data, at, count, size))
        )
        at += 12 * count
    if at != len(data):
        raise bad(what, "its size does not match its records")
    return Sidecar(frame, tuple(starts), tuple(ends))


def parse_params(record: Mapping[str, Any], what: str) -> Params:
    """Quantizer parameters among the keys of a record."""
    try:
        return params_from_dict(record)
    except QuantizationError as error:
        raise FormatError(f"{what} is malformed: {error}", code="quantizer") from None


def _parse_escapes(data: bytes, at: int, count: int, size: int) -> Escapes:
    if not count:
        return NO_ESCAPES
    if len(data) - at < 12 * count:
        raise bad("a frame sidecar", "its outlier list is cut short")
    deltas = np.frombuffer(data, "<u8", count, at)
    if int(deltas.max()) >= size:
        raise bad("a frame sidecar", "an outlier lies outside its tensor")
    index = np.cumsum(deltas.astype(np.int64))
    level = np.frombuffer(data, "<i4", count, at + 8 * count).astype(np.int32)
    ascending = not np.any(deltas[1:] == 0)
    if not ascending or index[-1] >= size or index[-1] < 0 or np.abs(level).max() > MAX_LEVEL:
        raise bad("a frame sidecar", "an outlier lies outside its tensor or its range")
    return Escapes(index, level)


def index_payload(index: Index) -> bytes:
    """Payload of the index box: sealed JSON, then the size of the whole box (4 bytes)."""
    frames, end = [], 0
    for entry in index.frames:
        frames.append([entry.offset - end, entry.sidecar_bytes, entry.fragment_bytes])
        end = entry.end
    exact = [[e.offset, e.box_bytes, list(e.tensors)] for e in index.exact]
    record = {"ribbon": list(index.ribbon), "frames": frames, "exact": exact}
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
            integer(v, 0, top, what) for v in _exactly(entry, 3, what)
        )
        frames.append(FrameEntry(end + gap, sidecar_bytes, fragment_bytes))
        end += gap + sidecar_bytes + fragment_bytes
        if max(sidecar_bytes, fragment_bytes) > LIMITS.box_bytes:
            raise FormatError("a frame is larger than any allowed", code="limit")
    exact = []
    for entry in items(record.get("exact"), 1 << 31, what):
        offset, size, members = _exactly(entry, 3, what)
        found = tuple(integer(i, 0, tensors - 1, what) for i in items(members, tensors, what))
        entry_bytes = integer(size, 0, LIMITS.box_bytes, what)
        exact.append(ExactEntry(integer(offset, 0, top, what), entry_bytes, found))
    return Index(tuple(ids), tuple(frames), tuple(exact))


def _exactly(value: object, count: int, what: str) -> list[Any]:
    found = items(value, count, what)
    if len(found) != count:
        raise bad(what, f"expected {count} items")
    return found
