"""The container: writes what :mod:`weightvid.loader` reads, each function the inverse of one there.

Boxes are written here and not by FFmpeg's muxer, so that the bytes and the offsets in ``mfra`` do
not depend on FFmpeg's version and our own boxes can stand between the fragments.

Sources: ISO/IEC 14496-12 (boxes); FORMAT.md (ours).
"""

from __future__ import annotations

import hashlib
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from math import prod
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
_BLOCK: Final = 1 << 15
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


def tail_box(kind: bytes, payload: bytes, before: int = 0) -> bytes:
    """A box between index and mfra: it ends with the distance of its end from the index' start.

    ``before`` is the size of the index box and of what follows it, up to this box.
    """
    distance = before + 24 + len(payload) + 4
    return box(kind, payload, distance.to_bytes(4, "little"))


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
    return _seal(form, size, data)


def stored_body(*records: bytes) -> bytes:
    """Payload of a box whose records are not worth deflating."""
    data = b"".join(records)
    return _seal(loader.STORED, len(data), data)


def _seal(form: int, size: int, data: bytes) -> bytes:
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
    layers = []
    if header.layers is not None:
        total, base, masks = header.layers
        layers = [record(loader.LAYERS, uint(total), uint(len(base)), base, *map(uint, masks))]
    return [
        record(loader.TENSORS, tensor_fields(header.tensors)),
        record_list(loader.ALIASES, aliases),
        record_list(loader.METADATA, metadata),
        record_list(loader.FILES, listed),
        record_list(loader.BASES, bases),
        *layers,
        record_list(loader.ABOUT, about),
    ]


def tensor_fields(tensors: Sequence[TensorSpec]) -> bytes:
    """Names, types and shapes: the data of the record of tensors."""
    return uint(len(tensors)) + b"".join(map(_spec_fields, tensors))


def root_of(tensors: Sequence[TensorSpec], heads: Mapping[int, bytes]) -> bytes:
    """Root of an archive: SHA-256 of names, types, shapes, and heads of the tensors' SHA-256.

    So archives of the same tensors have the same root, however they came to be.
    """
    every = b"".join(heads[number] for number in range(len(tensors)))
    return hashlib.sha256(tensor_fields(tensors) + every).digest()


def difference(below: Array, array: Array) -> Array:
    """Zigzag numbers that `weightvid.loader.add_bits` adds to elements to get others.

    Examples
    --------
    >>> difference(np.array([5, 7], np.int16), np.array([4, 9], np.int16)).tolist()
    [1, 4]
    """
    signed = np.dtype(f"<i{below.itemsize}")
    change = array.view(signed) - below.view(signed)
    found: Array = (change << 1) ^ (change >> (8 * below.itemsize - 1))
    return found.view(below.dtype)


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


def float_records(
    items: Sequence[tuple[int, int, Array]], specs: Sequence[TensorSpec]
) -> list[bytes]:
    """Records of a box of bit-exact floats of one type; see `weightvid.loader.parse_floats`.

    A row has a scale, in quarter octaves, and a number of zeros that all its mantissas end with.
    Rows alike lie side by side, so that a Huffman code fits the exponents of many: the rest of a
    float is next to random.
    """
    dtype = specs[items[0][0]].dtype
    mantissa, size = loader.MANTISSAS[dtype], stored_dtype(dtype).itemsize
    wide, width = np.dtype(f"u{size}").type, 8 * size
    bits = np.concatenate([np.ascontiguousarray(part).reshape(-1).view(wide) for *_, part in items])
    shapes = [specs[number].shape[1:] or (part.size,) for number, _, part in items]
    lengths = [max(1, prod(shape)) for shape in shapes]
    scales, zeros, at = [np.empty(0, np.uint16)], [np.empty(0, np.uint8)], 0
    runs = loader.float_rows([part.size for *_, part in items], lengths)
    tops = (bits & wide((1 << width - 1) - 1)) >> wide(mantissa - 2)
    for rows, length in runs:
        here = slice(at, at + rows * length)
        top, at = tops[here].reshape(rows, length), here.stop
        total = top.sum(axis=1, dtype=np.int64)
        scales.append((total // np.maximum(np.count_nonzero(top, axis=1), 1)).astype(np.uint16))
        some = np.bitwise_or.reduce(bits[here].reshape(rows, length), axis=1).astype(np.int64)
        some |= 1 << mantissa
        lowest = np.log2((some & -some).astype(np.float64)).astype(np.uint8)
        zeros.append(np.where(lowest < 4, 0, lowest).astype(np.uint8))
    scale, zero = np.concatenate(scales), np.concatenate(zeros)
    keys = zero.astype(np.int32) * 4 + (scale & 3)
    order = np.argsort(keys, kind="stable")
    each = loader.float_lengths(runs)[order]
    found = np.empty_like(bits)
    for run, shape, numbers, place in loader.float_places(runs, keys):
        found[place].reshape(-1, shape[1])[:] = bits[run].reshape(shape)[numbers]
    offsets = np.repeat(((scale[order] >> 2 << 2).astype(np.int32) - 128).astype(wide), each)
    shifts = range(0, mantissa - 7, 8)
    top8, middle, *lows = np.empty((2 + len(shifts), found.size), np.uint8)
    for first in range(0, found.size, _BLOCK):  # what a cache holds
        here = slice(first, first + _BLOCK)
        block = found[here]
        top = ((block & wide((1 << width - 1) - 1)) >> wide(mantissa - 2)) - offsets[here]
        top &= wide((1 << width + 1 - mantissa) - 1)
        top8[here] = top.astype(np.uint8)
        top >>= wide(8)
        top <<= wide(6)
        top |= block >> wide(width - 1) << wide(5)
        top |= block >> wide(mantissa - 7) & wide(31)
        middle[here] = top.astype(np.uint8)
        for low, shift in zip(lows, shifts, strict=True):
            mask = wide((1 << min(8, mantissa - 7 - shift)) - 1)
            low[here] = (block >> wide(shift) & mask).astype(np.uint8)
    steps, planes = np.diff(scale.astype(np.uint8), prepend=np.uint8(0)), list[bytes]()
    planes.append(_plane(np.stack((steps, (scale >> 8).astype(np.uint8), zero)), zlib.Z_FILTERED))
    planes += [_plane(plane, zlib.Z_HUFFMAN_ONLY) for plane in (top8, middle)]
    for low, shift in zip(lows, shifts, strict=True):
        some = low[: int(each[zero[order] < shift + 8].sum())]
        whole = shift + 8 <= mantissa - 7 and not ((zero > shift) & (zero < shift + 8)).any()
        planes.append(_plane(some, None if whole else zlib.Z_HUFFMAN_ONLY))
    fields = [uint(number) + uint(first) + uint(part.size) for number, first, part in items]
    data = record(loader.FLOATS, *map(uint, lengths), *planes)
    return [record(loader.ITEMS, uint(len(items)), *fields), data]


def _plane(values: Array, strategy: int | None) -> bytes:
    """A plane, deflated if that is smaller; None: it is not."""
    data = values.tobytes()
    if strategy is not None:
        packer = zlib.compressobj(1, zlib.DEFLATED, -15, 9, strategy)
        packed = packer.compress(data) + packer.flush()
        if len(packed) < len(data):
            return uint(len(packed)) + packed
    return uint(0) + data


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
    heads : dict of int to bytes
        First bytes of the SHA-256 of each tensor. Whoever adds to a base says what exact tensors
        become, and those that stay as they are.
    """

    def __init__(
        self, file: BinaryIO, track: Track, header: Header, files: Sequence[SideFile] = ()
    ) -> None:
        self._file, self._track, self._header = file, track, header
        self._at = 0
        self._frames: list[int] = []
        self._moofs: list[int] = []
        self._firsts: dict[int, int] = {}
        self._spans: list[tuple[int, range]] = []
        self._stages: list[tuple[int, int]] = []
        self.heads: dict[int, bytes] = {}
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
            first = self._firsts.pop(end.tensor)
            self._spans.append((end.tensor, range(first, sidecar.frame + 1)))
            self.heads[end.tensor] = end.sha256
        if not sidecar.frame:
            self.first_packet = len(packet)
        self.packet_bytes += len(packet)
        self.largest_packet = max(self.largest_packet, len(packet))

    def add_exact(self, tensors: Iterable[tuple[int, Array]], lossless: bool = False) -> None:
        """Write exact tensors, each as its stored elements, into as many boxes as they need.

        Parameters
        ----------
        tensors : iterable of (int, ndarray)
            Numbers and elements.
        lossless : bool
            Code F32, F16 and BF16 ones as `float_records` does.
        """

        def make(items: Sequence[tuple[int, int, Array]]) -> bytes:
            specs = self._header.tensors
            if lossless and specs[items[0][0]].dtype in loader.MANTISSAS:
                return box(loader.EXACT_UUID, stored_body(*float_records(items, specs)))
            return box(loader.EXACT_UUID, close_body(*exact_records(items, specs)))

        waiting = deque[tuple[tuple[int, ...], Future[bytes]]]()

        def write() -> None:
            numbers, made = waiting.popleft()
            self._boxes.append((self._write(made.result()), numbers))

        with ThreadPoolExecutor(2) as pool:  # deflating needs no Python lock
            for items in self._batches(tensors, lossless):
                numbers = tuple(dict.fromkeys(number for number, _, _ in items))
                waiting.append((numbers, pool.submit(make, items)))
                if len(waiting) > 2:
                    write()
            while waiting:
                write()

    def _batches(
        self, tensors: Iterable[tuple[int, Array]], lossless: bool
    ) -> Iterator[list[tuple[int, int, Array]]]:
        """Items of a box each; of bit-exact floats, those of a box have one type."""
        items: list[tuple[int, int, Array]] = []
        room, kind = EXACT_BOX_BYTES, ""
        for number, array in tensors:
            flat, first = np.ascontiguousarray(array).reshape(-1), 0
            self.heads[number] = loader.tensor_sha256(flat)[: loader.TENSOR_SHA_BYTES]
            dtype = self._header.tensors[number].dtype
            now = dtype if lossless and dtype in loader.MANTISSAS else ""
            if items and now != kind:
                yield items
                items, room = [], EXACT_BOX_BYTES
            kind = now
            while first < flat.size or not flat.size:
                count = max(1, min(flat.size - first, room // max(1, flat.itemsize)))
                piece = flat[first : first + count]
                items.append((number, first, piece))
                room -= piece.nbytes
                first += count
                if room < 16:
                    yield items
                    items, room = [], EXACT_BOX_BYTES
                if not flat.size:
                    break
        if items:
            yield items

    def end_layer(self) -> None:
        """What follows belongs to the next layer."""
        frames, boxes = (sum(counts) for counts in zip((0, 0), *self._stages, strict=True))
        self._stages.append((len(self._frames) - frames, len(self._boxes) - boxes))

    def finish(self) -> int:
        """Write the index; returns the size of the file."""
        spans, before = [], 0
        for number, frames in sorted(self._spans, key=lambda entry: entry[1].start):
            spans.append(uint(number) + uint(frames.start - before) + uint(len(frames)))
            before = frames.start
        boxes = [
            uint(size) + uint(len(numbers)) + b"".join(map(uint, numbers))
            for size, numbers in self._boxes
        ]
        stages = []
        if self._header.layers is not None and self._header.layers.total > 1:
            self.end_layer()
            stages = [uint(frames) + uint(count) for frames, count in self._stages]
        roots = []
        if len(self.heads) == len(self._header.tensors):
            roots = [record(loader.ROOT, root_of(self._header.tensors, self.heads))]
        body = close_body(
            record_list(loader.FRAMES, list(map(uint, self._frames))),
            record_list(loader.SPANS, spans),
            record_list(loader.BOXES, boxes),
            record_list(loader.STAGES, stages),
            *roots,
        )
        self._write(tail_box(loader.INDEX_UUID, body), mfra(self._moofs))
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
