"""The container: writes what :mod:`weightvid.loader` reads, each function the inverse of one there.

Boxes are written here and not by FFmpeg's muxer, so that the bytes and the offsets in ``mfra`` do
not depend on FFmpeg's version and our own boxes can stand between the fragments.

Sources: ISO/IEC 14496-12 (boxes); FORMAT.md (ours).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import BinaryIO, Final

import numpy as np

from weightvid import loader
from weightvid.errors import FormatError, QuantizationError
from weightvid.loader import Array, End, Floats, Header, Part, Sidecar, TensorSpec, Track
from weightvid.spec import SideFile, stored_dtype

#: one frame lasts one second: slow enough for the level's bit rate whatever the samples.
TIMESCALE: Final = 1
TRACK_ID: Final = 1
_MATRIX: Final = b"".join(
    n.to_bytes(4, "big") for n in (0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000)
)
_SYNC_SAMPLE: Final = 0x02000000
#: elements of exact tensors that one box holds, in bytes.
EXACT_BOX_BYTES: Final = 16 << 20


# --- boxes ----------------------------------------------------------------------------------------


def _int(value: int, size: int) -> bytes:
    return value.to_bytes(size, "big")


def box(kind: bytes, *parts: bytes) -> bytes:
    """A box with a 32-bit size; a type of 16 bytes makes a ``uuid`` box.

    Examples
    --------
    >>> box(b"free", b"ab").hex()
    '0000000a667265656162'
    """
    head = kind if len(kind) == 4 else b"uuid" + kind
    return b"".join((_int(4 + len(head) + sum(map(len, parts)), 4), head, *parts))


def full_box(kind: bytes, version: int, flags: int, *parts: bytes) -> bytes:
    """A box that starts with a version and flags."""
    return box(kind, bytes((version,)), _int(flags, 3), *parts)


def ftyp() -> bytes:
    """File type box."""
    return box(b"ftyp", b"iso6", _int(0, 4), b"iso6", b"mp41", loader.BRAND)


def moov(track: Track) -> bytes:
    """Movie box of one fragmented track."""
    mvhd = full_box(
        b"mvhd", 0, 0, bytes(8), _int(TIMESCALE, 4), bytes(4), _int(0x10000, 4), _int(0x100, 2),
        bytes(10), _MATRIX, bytes(24), _int(TRACK_ID + 1, 4),
    )  # fmt: skip
    tkhd = full_box(
        b"tkhd", 0, 3, bytes(8), _int(TRACK_ID, 4), bytes(4 + 4 + 8 + 2 + 2 + 2 + 2), _MATRIX,
        _int(track.width << 16, 4), _int(track.height << 16, 4),
    )  # fmt: skip
    entry = box(
        track.entry, bytes(6), _int(1, 2), bytes(16), _int(track.width, 2), _int(track.height, 2),
        _int(72 << 16, 4), _int(72 << 16, 4), bytes(4), _int(1, 2), bytes(32), _int(24, 2),
        b"\xff\xff", box(loader.TRACKS[track.entry][0], track.record),
    )  # fmt: skip
    stbl = box(
        b"stbl",
        full_box(b"stsd", 0, 0, _int(1, 4), entry),
        full_box(b"stts", 0, 0, bytes(4)),
        full_box(b"stsc", 0, 0, bytes(4)),
        full_box(b"stsz", 0, 0, bytes(8)),
        full_box(b"stco", 0, 0, bytes(4)),
    )
    dinf = box(b"dinf", full_box(b"dref", 0, 0, _int(1, 4), full_box(b"url ", 0, 1)))
    minf = box(b"minf", full_box(b"vmhd", 0, 1, bytes(8)), dinf, stbl)
    mdhd = full_box(b"mdhd", 0, 0, bytes(8), _int(TIMESCALE, 4), bytes(4), b"\x55\xc4", bytes(2))
    hdlr = full_box(b"hdlr", 0, 0, bytes(4), b"vide", bytes(12), b"\0")
    trak = box(b"trak", tkhd, box(b"mdia", mdhd, hdlr, minf))
    trex = full_box(
        b"trex", 0, 0, _int(TRACK_ID, 4), _int(1, 4), _int(1, 4), bytes(4), _int(_SYNC_SAMPLE, 4)
    )
    return box(b"moov", mvhd, trak, box(b"mvex", trex))


def moof(number: int, packet_bytes: int) -> bytes:
    """Movie fragment of frame ``number`` (from 0), whose mdat follows at once."""

    def build(offset: int) -> bytes:
        tfhd = full_box(b"tfhd", 0, 0x020000, _int(TRACK_ID, 4))
        tfdt = full_box(b"tfdt", 0, 0, _int(number, 4))
        trun = full_box(b"trun", 0, 0x201, _int(1, 4), _int(offset, 4), _int(packet_bytes, 4))
        mfhd = full_box(b"mfhd", 0, 0, _int(number + 1, 4))
        return box(b"moof", mfhd, box(b"traf", tfhd, tfdt, trun))

    return build(len(build(0)) + 8)


def mfra(moof_offsets: Sequence[int]) -> bytes:
    """Movie fragment random access box: each frame's time and the offset of its ``moof``."""
    wide = bool(moof_offsets) and moof_offsets[-1] >= 1 << 32
    size = 8 if wide else 4
    entries = b"".join(
        _int(number, size) + _int(offset, size) + b"\x01\x01\x01"
        for number, offset in enumerate(moof_offsets)
    )
    count = _int(len(moof_offsets), 4)
    tfra = full_box(b"tfra", int(wide), 0, _int(TRACK_ID, 4), bytes(4), count, entries)
    return box(b"mfra", tfra, full_box(b"mfro", 0, 0, _int(8 + len(tfra) + 16, 4)))


# --- records --------------------------------------------------------------------------------------


def uint(value: int) -> bytes:
    """LEB128.

    Examples
    --------
    >>> uint(5).hex(), uint(300).hex()
    ('05', 'ac02')
    """
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def text(value: str) -> bytes:
    """UTF-8 behind its length; lone surrogates are kept."""
    data = value.encode("utf-8", "surrogatepass")
    return uint(len(data)) + data


def record(kind: int, *parts: bytes) -> bytes:
    """A record: type, length, data."""
    data = b"".join(parts)
    return uint(kind) + uint(len(data)) + data


def record_list(kind: int, items: Sequence[bytes]) -> bytes:
    """A record of counted items; nothing if there are none."""
    return record(kind, uint(len(items)), *items) if items else b""


def close_body(*records: bytes) -> bytes:
    """Payload of a box of ours: CRC-32, form, size, and the records, deflated if that is smaller.

    The deflate stream starts a block for each record, as names, hashes and numbers share no code.

    Raises
    ------
    FormatError
        ``limit``: the records are larger than a box may be.
    """
    size = sum(map(len, records))
    if size > loader.MAX_BOX_BYTES:
        raise FormatError(
            f"a box would hold {size} bytes; the format allows {loader.MAX_BOX_BYTES}", code="limit"
        )
    form, data = loader.STORED, b"".join(records)
    for memory in (9, 5, 3):
        packer = zlib.compressobj(9, zlib.DEFLATED, -15, memory)
        packed = b"".join(packer.compress(part) + packer.flush(zlib.Z_BLOCK) for part in records)
        packed += packer.flush()
        if len(packed) < len(data):
            form, data = loader.DEFLATED, packed
        if size > 1 << 16:
            break
    sealed = bytes((form,)) + size.to_bytes(4, "little") + data
    return zlib.crc32(sealed).to_bytes(4, "little") + sealed


def header_records(header: Header, files: Sequence[tuple[SideFile, int]]) -> list[bytes]:
    """Records of the model header; of each side file the bytes of its box are known."""
    aliases = [text(alias) + uint(number) for alias, number in header.aliases.items()]
    about, metadata = (
        [text(key) + text(value) for key, value in pairs.items()]
        for pairs in (header.about, header.metadata)
    )
    listed = [
        text(file.path) + text(file.role) + uint(len(file.data)) + uint(size)
        for file, size in files
    ]
    bases = [uint(len(basis)) + basis.astype("<f4").tobytes() for basis in header.bases]
    return [
        record(loader.TENSORS, uint(len(header.tensors)), *map(_spec_fields, header.tensors)),
        record_list(loader.ALIASES, aliases),
        record_list(loader.METADATA, metadata),
        record_list(loader.FILES, listed),
        record_list(loader.BASES, bases),
        record_list(loader.ABOUT, about),
    ]


def _spec_fields(spec: TensorSpec) -> bytes:
    if len(spec.name.encode("utf-8", "surrogatepass")) > loader.MAX_NAME_BYTES:
        raise FormatError(
            f"the tensor name {spec.name[:40]!r}... is longer than {loader.MAX_NAME_BYTES} bytes",
            code="limit",
        )
    shape = uint(len(spec.shape)) + b"".join(map(uint, spec.shape))
    return text(spec.name) + uint(list(loader.DTYPES).index(spec.dtype)) + shape


def part_record(part: Part) -> bytes:
    """Record of a part."""
    has, fields = 0, [bytes((part.shift,))] if part.bases else []
    if part.frequency_steps is not None:
        has |= loader.HAS_FREQUENCY_STEPS
        fields.append(part.frequency_steps.tobytes())
    if part.row_steps is not None:
        has |= loader.HAS_ROW_STEPS
        fields.append(part.row_steps.tobytes())
    if part.energies is not None:
        has |= loader.HAS_ENERGIES
        fields += [energies.tobytes() for energies in part.energies]
    if part.escapes is not None:
        has |= loader.HAS_ESCAPES
        places, numbers = part.escapes
        gaps = np.diff(places, prepend=-1) - 1
        fields += [uint(len(places)), *map(uint, gaps.tolist()), numbers.astype("<f4").tobytes()]
    return record(
        loader.PART,
        uint(part.tensor), uint(part.column // loader.ALIGN), uint(part.first_row),
        uint(part.rows), uint(part.columns), bytes((part.method, has)),
        np.float32(part.step).tobytes(), uint(len(part.bases)), *map(uint, part.bases), *fields,
    )  # fmt: skip


def sidecar_records(sidecar: Sidecar) -> list[bytes]:
    """Records of a sidecar."""
    frame = record(loader.FRAME, uint(sidecar.frame), sidecar.sha256)
    ends = [record(loader.END, *_end_fields(end)) for end in sidecar.ends]
    return [frame, *map(part_record, sidecar.parts), *ends]


def _end_fields(end: End) -> tuple[bytes, ...]:
    hundredths = loader.NO_SQNR
    if end.sqnr_db is not None:
        hundredths = min(max(round(100 * end.sqnr_db), -32768), loader.NO_SQNR - 1)
    return uint(end.tensor), end.sha256, hundredths.to_bytes(2, "little", signed=True)


def exact_records(
    items: Sequence[tuple[int, int, Array]], specs: Sequence[TensorSpec]
) -> list[bytes]:
    """Records of a box of exact tensors: number of the tensor, first element, elements.

    Neighbours of one element size share byte planes: exponents of floats compress, mantissas don't.
    """
    fields = [uint(number) + uint(first) + uint(part.size) for number, first, part in items]
    planes: list[bytes] = []
    group: list[Array] = []
    for place, (number, _, part) in enumerate(items):
        size = stored_dtype(specs[number].dtype).itemsize
        group.append(np.ascontiguousarray(part).reshape(-1).view(np.uint8).reshape(-1, size))
        following = items[place + 1][0] if place + 1 < len(items) else None
        if following is None or stored_dtype(specs[following].dtype).itemsize != size:
            planes += [plane.tobytes() for plane in np.concatenate(group).T]
            group = []
    data = uint(loader.DATA) + uint(sum(map(len, planes)))
    return [record(loader.ITEMS, uint(len(items)), *fields), data, *planes]


# --- the writer -----------------------------------------------------------------------------------


class ArchiveWriter:
    """Writes an archive front to back, in constant memory.

    Parameters
    ----------
    file : binary file object
    track : Track
    header : Header
        Its ``files`` are not looked at.
    files : sequence of SideFile

    Attributes
    ----------
    packet_bytes, largest_packet, first_packet : int
        Of the frames written so far.
    """

    def __init__(
        self, file: BinaryIO, track: Track, header: Header, files: Sequence[SideFile] = ()
    ) -> None:
        self._file, self._track, self._header = file, track, header
        self._at = 0
        self._frames: list[int] = []
        self._moofs: list[int] = []
        self._firsts: dict[int, int] = {}
        self._spans: dict[int, range] = {}
        self._boxes: list[tuple[int, tuple[int, ...]]] = []
        self.packet_bytes = self.largest_packet = self.first_packet = 0
        made = [box(loader.FILE_UUID, close_body(entry.data)) for entry in files]
        self._write(ftyp(), moov(track))
        sizes = [(entry, len(data)) for entry, data in zip(files, made, strict=True)]
        self._write(box(loader.HEADER_UUID, close_body(*header_records(header, sizes))), *made)

    def _write(self, *parts: bytes) -> int:
        size = sum(map(len, parts))
        for part in parts:
            self._file.write(part)
        self._at += size
        return size

    def add_frame(self, sidecar: Sidecar, packet: bytes) -> None:
        """Write one frame and what is said before it."""
        side = box(loader.FRAME_UUID, close_body(*sidecar_records(sidecar)))
        self._moofs.append(self._at + len(side))
        head = moof(sidecar.frame, len(packet))
        self._frames.append(self._write(side, head, box(b"mdat", packet)))
        for part in sidecar.parts:
            self._firsts.setdefault(part.tensor, sidecar.frame)
        for end in sidecar.ends:
            first = self._firsts[end.tensor]
            self._spans[end.tensor] = range(first, sidecar.frame + 1)
        if not sidecar.frame:
            self.first_packet = len(packet)
        self.packet_bytes += len(packet)
        self.largest_packet = max(self.largest_packet, len(packet))

    def add_exact(self, tensors: Iterable[tuple[int, Array]]) -> None:
        """Write exact tensors, each as its stored elements, into as many boxes as they need."""
        items: list[tuple[int, int, Array]] = []
        room = EXACT_BOX_BYTES
        for number, array in tensors:
            flat, first = np.ascontiguousarray(array).reshape(-1), 0
            while first < flat.size or not flat.size:
                count = max(1, min(flat.size - first, room // max(1, flat.itemsize)))
                piece = flat[first : first + count]
                items.append((number, first, piece))
                room -= piece.nbytes
                first += count
                if room < 16:
                    self._add_box(items)
                    items, room = [], EXACT_BOX_BYTES
                if not flat.size:
                    break
        if items:
            self._add_box(items)

    def _add_box(self, items: Sequence[tuple[int, int, Array]]) -> None:
        data = close_body(*exact_records(items, self._header.tensors))
        size = self._write(box(loader.EXACT_UUID, data))
        self._boxes.append((size, tuple(dict.fromkeys(number for number, _, _ in items))))

    def finish(self) -> int:
        """Write the index; returns the size of the file."""
        spans, before = [], 0
        ordered: Mapping[int, range] = dict(sorted(self._spans.items(), key=lambda s: s[1].start))
        for number, frames in ordered.items():
            spans.append(uint(number) + uint(frames.start - before) + uint(len(frames)))
            before = frames.start
        boxes = [
            uint(size) + uint(len(numbers)) + b"".join(map(uint, numbers))
            for size, numbers in self._boxes
        ]
        body = close_body(
            record_list(loader.FRAMES, list(map(uint, self._frames))),
            record_list(loader.SPANS, spans),
            record_list(loader.BOXES, boxes),
        )
        size = 24 + len(body) + 4
        self._write(box(loader.INDEX_UUID, body, size.to_bytes(4, "little")), mfra(self._moofs))
        return self._at

    def replace_record(self, record: bytes) -> None:
        """Put another configuration record of the same size into ``moov`` of a seekable file."""
        place = (ftyp() + moov(self._track)).index(self._track.record)
        if len(record) != len(self._track.record):
            raise FormatError("a configuration record of another size does not fit", code="moov")
        self._file.seek(place)
        self._file.write(record)
        self._file.seek(self._at)


#: stored mantissa bits of float32.
FULL_BITS: Final = 23


def round_mantissa(values: Floats, bits: int) -> Floats:
    """Round to ``bits`` stored mantissa bits, to nearest, ties to even.

    Parameters
    ----------
    values : ndarray of float32
    bits : int
        1..23; the relative error is at most 2**-(bits + 1).

    Returns
    -------
    ndarray of float32, same shape
        NaN and infinity stay; so does what would round to infinity.

    Raises
    ------
    QuantizationError
        ``bits`` out of range.

    Examples
    --------
    >>> round_mantissa(np.array([1.2345678], np.float32), 11).tolist()
    [1.234375]
    """
    if not 1 <= bits <= FULL_BITS:
        raise QuantizationError(f"mantissas have 1..{FULL_BITS} bits, not {bits}")
    drop = np.uint32(FULL_BITS - bits)
    if not drop:
        return values
    raw = np.ascontiguousarray(values).view(np.uint32)
    half = np.uint32((1 << (FULL_BITS - bits - 1)) - 1)
    rounded = ((raw + half + ((raw >> drop) & np.uint32(1))) >> drop) << drop
    found = rounded.view(np.float32)
    return np.where(np.isfinite(values) & np.isfinite(found), found, values)


def rounds_mantissas(spec: TensorSpec) -> bool:
    """Whether a tensor is a 1-D float32 one: a bias, norm or statistic."""
    return spec.dtype == "F32" and sum(size > 1 for size in spec.shape) <= 1 and spec.size > 0


def likeness(spec: TensorSpec) -> tuple[int, str, str]:
    """Sorting key that brings tensors of one kind together: their bytes resemble each other.

    Examples
    --------
    >>> likeness(TensorSpec("layer3.bn1.bias", "F32", (64,)))
    (4, 'bias', 'bn')
    """
    owner, _, kind = spec.name.rpartition(".")
    family = "".join(c for c in owner.rpartition(".")[2] if not c.isdigit())
    return stored_dtype(spec.dtype).itemsize, kind, family


def exact_elements(array: Array, spec: TensorSpec, mantissa_bits: int) -> Array:
    """Elements as they are kept."""
    if mantissa_bits < FULL_BITS and rounds_mantissas(spec):
        return round_mantissa(array.view(np.float32), mantissa_bits)
    return array
