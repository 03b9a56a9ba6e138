"""The loader: reads weightvid archives with numpy and PyAV, from one file that may be copied alone.

This file is also the definition of the format: every formula of FORMAT.md (order of levels,
trellis, steps, transform, hashes) is written here once, and the packer imports it.
"""

# ruff: noqa: UP014 - records of a line each

from __future__ import annotations

import hashlib
import io
import os
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate, chain, groupby
from math import prod
from typing import Any, BinaryIO, Final, NamedTuple, Union, cast

import av
import numpy as np
import numpy.typing as npt
from av.codec.hwaccel import HWAccel, hwdevices_available

Array = npt.NDArray[Any]
Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
PacketDecoder = Callable[[bytes], Array]
Base = Union[str, os.PathLike[str], BinaryIO, bytes, "Archive"]
Sink = Callable[["Part", Array], object]  # takes a part and its matrix of levels, int8
Packets = Iterator[tuple["Sidecar", bytes]]
Decode = Callable[[int, bytes | None], list[tuple[int, Array]]]


class WeightvidError(Exception):
    """Base of all errors raised on purpose by weightvid."""


class FormatError(WeightvidError, ValueError):
    """An archive breaks the format; ``code`` is the stable name of the defect (see FORMAT.md)."""

    def __init__(self, why: str, code: str, offset: int | None = None, tensor: str = "") -> None:
        super().__init__(why, code, offset, tensor)
        self.code, self.offset, self.tensor = code, offset, tensor

    def __str__(self) -> str:
        place = "" if self.offset is None else f" (at byte {self.offset})"
        return f"{self.args[0]}{place} [{self.code}]"


class TruncatedError(FormatError):
    """The archive ends too early: ``missing`` tensors did not come, ``coarse`` ones lack layers."""

    def __init__(self, why: str, offset: Any = None, missing: Any = (), coarse: Any = ()) -> None:
        super().__init__(why, "truncated", offset)
        self.missing, self.coarse = tuple(missing), tuple(coarse)
        self.args = why, offset, self.missing, self.coarse


class TensorNotFoundError(WeightvidError, KeyError):
    """The archive or checkpoint has no tensor of that name."""

    __str__ = Exception.__str__  # a KeyError would show its message in quotes


class CodecError(WeightvidError, RuntimeError):
    """The video encoder or decoder failed."""


BRAND, HEADER_UUID, FILE_UUID = b"wvid", b"weightvid-header", b"weightvid-file\0\0"
FRAME_UUID, EXACT_UUID = b"weightvid-frame\0", b"weightvid-exact\0"
INDEX_UUID = b"weightvid-index\0"
#: record types: an odd one may be skipped by a reader that does not know it.
TENSORS, ALIASES, METADATA, FILES, BASES, LAYERS, ABOUT = 2, 4, 6, 8, 10, 12, 13
FRAME, PART, END, ITEMS, DATA, FLOATS = 32, 34, 36, 48, 50, 54
FRAMES, SPANS, BOXES, STAGES, ROOT = 64, 66, 68, 70, 73
STORED, DEFLATED, UNIFORM, TRELLIS = 0, 1, 0, 1
#: fields that a part has, in this order.
HAS_FREQUENCY_STEPS, HAS_ROW_STEPS, HAS_ENERGIES, HAS_ESCAPES = 1, 2, 4, 8
#: height of the ribbon in samples; parts start at multiples of so many of its columns.
BAND, ALIGN, ZERO_SAMPLE = 64, 4, 128
MIN_SIDE, MAX_SIDE, MAX_SAMPLES = 192, 2176, 2_228_224
MAX_ENERGY, MAX_PART, MAX_KERNEL, MAX_LEVEL = 63, 1 << 24, 1024, 1 << 22
#: largest sum of a kernel matrix' column: times the largest number, 512, it is exact in float32.
MAX_SHIFT, MAX_GAIN = 24, 32767
#: largest box of ours, and largest inflated body, is the last.
MAX_TENSORS, MAX_NAME_BYTES, MAX_ELEMENTS, MAX_BOX_BYTES = 1 << 20, 4096, 1 << 38, 64 << 20
MAX_AXES = 32
TENSOR_SHA_BYTES, NO_SQNR, MAX_LAYERS = 8, 0x7FFF, 16
#: 2 ** (i / 4) as float32.
QUARTER_OCTAVES = np.array([1.0, 1.1892071, 1.4142135, 1.6817929], np.float32)
#: name -> numpy type (of raw bits where numpy has none) of the element types; codes are places.
DTYPES: Final[dict[str, np.dtype[Any]]] = {
    entry.split("=")[0]: np.dtype(entry.split("=")[1])
    for entry in (
        "F64=<f8 F32=<f4 F16=<f2 BF16=<u2 F8_E4M3=u1 F8_E5M2=u1 F8_E8M0=u1 F8_E4M3FNUZ=u1 "
        "F8_E5M2FNUZ=u1 F6_E2M3=u1 F6_E3M2=u1 F4=u1 C64=<c8 C128=<c16 C32=<u4 I64=<i8 I32=<i4 "
        "I16=<i2 I8=i1 U64=<u8 U32=<u4 U16=<u2 U8=u1 BOOL=?"
    ).split()
}
#: types of bit-exact floats -> stored bits of the mantissa.
MANTISSAS: Final = {"F32": 23, "F16": 10, "BF16": 7}
PACKABLE = frozenset({"F64", "F32", "F16", "BF16"})
#: sample entry -> (box of the configuration record, FFmpeg's decoder in software, in hardware).
TRACKS: Final = {
    b"hvc1": (b"hvcC", "hevc", "hevc"),
    b"av01": (b"av1C", "libdav1d", "av1"),
    b"avc1": (b"avcC", "h264", "h264"),
}


class TensorSpec(NamedTuple):
    """Name, element type and shape of one tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements (1 for a 0-d tensor)."""
        return prod(self.shape)

    @property
    def stored_bytes(self) -> int:
        """Bytes of the elements in their own type."""
        return self.size * DTYPES[self.dtype].itemsize


def _defect(spec: TensorSpec, why: str, code: str = "order") -> FormatError:
    return FormatError(f"tensor {spec.name!r} {why}", code, tensor=spec.name)


#: A small file that travels with the model; its box starts at ``offset``.
StoredFile = NamedTuple(
    "StoredFile", [("path", str), ("role", str), ("size", int), ("offset", int)]
)


class Layers(NamedTuple):
    """Layers of a file, whose sum a tensor is, and root of the archive that they are added to.

    ``base`` is empty where there is none. ``masks``, of each tensor: bit 0: it begins as the tensor
    of that name in the base; bit 1 + l: it has a part in layer l.
    """

    total: int
    base: bytes
    masks: tuple[int, ...]


class Header(NamedTuple):
    """What an archive holds: tensors in the order of the source, and what belongs to them."""

    tensors: tuple[TensorSpec, ...]
    aliases: Mapping[str, int]
    metadata: Mapping[str, str]
    files: tuple[StoredFile, ...]
    bases: tuple[Floats, ...]
    about: Mapping[str, str]
    layers: Layers | None = None

    def mask(self, number: int) -> int:
        """Where a tensor is: bit 0: in the base; bit 1 + l: in layer l of the file."""
        return 2 if self.layers is None else self.layers.masks[number]


#: The video track: size of a frame, type of the sample entry, configuration record.
Track = NamedTuple("Track", [("width", int), ("height", int), ("entry", bytes), ("record", bytes)])


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Consecutive rows of a tensor's matrix: the unit that is laid on the ribbon.

    Number of the tensor; first ribbon column, in the frame whose sidecar lists the part; rows of
    the matrix, and its width (frequencies x channels); `UNIFORM` or `TRELLIS`; step, a float32;
    basis of each kernel axis, as a place in ``Header.bases`` (none: no transform), and precision of
    the kernel matrix in bits; quarter octaves by which the step of a frequency, and of a row, is
    larger; energies of rows, channels and frequencies (None: the levels lie row by row); ascending
    places in the matrix, row by row, of escapes, and the numbers n there, float32.
    """

    tensor: int
    column: int
    first_row: int
    rows: int
    columns: int
    method: int
    step: float
    bases: tuple[int, ...] = ()
    shift: int = 0
    frequency_steps: npt.NDArray[np.int8] | None = None
    row_steps: npt.NDArray[np.int8] | None = None
    energies: tuple[Bytes, Bytes, Bytes] | None = None
    escapes: tuple[Array, Array] | None = None

    @property
    def size(self) -> int:
        """Number of levels."""
        return self.rows * self.columns


#: The end of a tensor: its number, the head of its SHA-256, and its SQNR in dB if known.
End = NamedTuple("End", [("tensor", int), ("sha256", bytes), ("sqnr_db", float | None)])
#: What is said before a frame: its number, SHA-256 of its luma, parts, ends of tensors.
Sidecar = NamedTuple(
    "Sidecar",
    [("frame", int), ("sha256", bytes), ("parts", tuple[Part, ...]), ("ends", tuple[End, ...])],
)


class Index(NamedTuple):
    """Where things lie: frames (offset, bytes), frames of tensors, boxes of exact tensors.

    A tensor has a range of frames for each of its layers. Stages: frames and boxes of each layer of
    the file. The root is the SHA-256 of all tensors.
    """

    frames: Sequence[tuple[int, int]]
    spans: Mapping[int, tuple[range, ...]]
    boxes: Sequence[tuple[int, tuple[int, ...]]]
    stages: Sequence[tuple[int, int]]
    root: bytes


class TensorInfo(NamedTuple):
    """What the archive says of one tensor; ``parts`` is empty and ``end`` None if it is exact.

    Parts are those of all its layers, the end and the kernel those of the last one.
    """

    spec: TensorSpec
    parts: tuple[Part, ...]
    end: End | None
    frames: Sequence[int]
    kernel: tuple[int, ...]


class Arrival(NamedTuple):
    """A tensor as far as it has arrived: its first ``layer`` layers; ``left`` are to come.

    It is read-only until the last one. ``complete`` layers have arrived for all tensors.
    """

    spec: TensorSpec
    array: Array
    layer: int
    left: int
    complete: int


class Levels(NamedTuple):
    """Integers of a uniform quantizer: weight = level x step."""

    values: npt.NDArray[np.int32]
    step: float


class Fields:
    """Reads fields of a record one after the other, within its bounds."""

    def __init__(self, data: bytes, what: str) -> None:
        self.data, self.at, self._what = data, 0, what

    def bad(self, why: str, code: str = "record") -> FormatError:
        """An error that names what is being read."""
        return FormatError(f"{self._what}: {why}", code)

    def take(self, size: int) -> bytes:
        """The next bytes."""
        start, self.at = self.at, self.at + size
        if self.at > len(self.data):
            raise self.bad(f"{size} bytes wanted where {len(self.data) - start} are left")
        return self.data[start : self.at]

    def uint(self, limit: int = MAX_BOX_BYTES) -> int:
        """A LEB128 number from 0 to ``limit``."""
        at, value, shift = self.at, 0, 0
        try:
            while (byte := self.data[at]) > 0x7F and shift < 63:
                value, shift, at = value | (byte & 0x7F) << shift, shift + 7, at + 1
        except IndexError:
            raise self.bad("a number has no end") from None
        value, self.at = value | byte << shift, at + 1
        if value > limit:
            raise self.bad(f"a number is above {limit}", "limit")
        return value

    def text(self, limit: int = MAX_BOX_BYTES) -> str:
        """UTF-8 behind its length."""
        try:
            return self.take(self.uint(limit)).decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            raise self.bad("a text is not UTF-8") from None

    def array(self, kind: str, count: int) -> Array:
        """Consecutive numbers."""
        return np.frombuffer(self.take(count * np.dtype(kind).itemsize), kind)

    def items(self, limit: int = MAX_TENSORS) -> Iterator[int]:
        """Numbers of the items whose count comes next; the last one must end the record."""
        yield from range(self.uint(limit))
        self.end()

    def end(self) -> None:
        """Refuse a record that goes on."""
        if self.at != len(self.data):
            raise self.bad("there are bytes behind the last field")


def read_records(body: bytes, what: str, known: Sequence[int]) -> list[list[Fields]]:
    """Records of a body by type; unknown ones of odd type are skipped, others refused."""
    found: dict[int, list[Fields]] = {kind: [] for kind in known}
    fields = Fields(body, what)
    while fields.at < len(body):
        kind, data = fields.uint(1 << 32), fields.take(fields.uint())
        if kind in found:
            found[kind].append(Fields(data, what))
        elif not kind & 1:
            raise fields.bad(f"record {kind} needs a newer reader", "version")
    for kind, records in found.items():
        required = kind == known[0] and kind < FRAMES
        if len(records) < required or (len(records) > 1 and kind not in (PART, END)):
            raise fields.bad(f"there are {len(records)} records of type {kind}, not one")
    return list(found.values())


def _inflated(data: bytes, size: int, what: str) -> bytes:
    inflater = zlib.decompressobj(-15)
    with suppress(zlib.error):
        data = inflater.decompress(data, size + 1)
    if not inflater.eof or inflater.unused_data or len(data) != size:
        raise FormatError(f"{what} is not one deflate stream of {size} bytes", "deflate")
    return data


def open_body(payload: bytes, what: str) -> bytes:
    """Records in a box of ours, behind their CRC-32, form and size."""
    if zlib.crc32(payload[4:]) != int.from_bytes(payload[:4], "little") or len(payload) < 9:
        raise FormatError(f"{what} is damaged: its CRC-32 does not match", "digest")
    form, size, data = payload[4], int.from_bytes(payload[5:9], "little"), payload[9:]
    if size > MAX_BOX_BYTES or form not in (STORED, DEFLATED):
        raise FormatError(f"{what} has {size} bytes in form {form}, which is not allowed", "limit")
    if form == DEFLATED:
        data = _inflated(data, size, what)
    if len(data) != size:
        raise FormatError(f"{what} has another size than it says", "record")
    return data


def parse_header(body: bytes, offset: int) -> Header:
    """Model header; ``offset`` is where the first box after it starts."""
    kinds = TENSORS, ALIASES, METADATA, FILES, BASES, ABOUT, LAYERS
    found = read_records(body, "the header", kinds)
    listed, named, metadata, stored, matrices, about, layered = found
    tensors, types, fields = [], list(DTYPES), listed[0]
    for _ in fields.items():
        name, code = fields.text(MAX_NAME_BYTES), fields.uint(len(types) - 1)
        shape = tuple(fields.uint(MAX_ELEMENTS) for _ in range(fields.uint(MAX_AXES)))
        if prod(size for size in shape if size) > MAX_ELEMENTS:  # numpy minds it of empty ones too
            raise fields.bad(f"tensor {name!r} is too large", "limit")
        tensors.append(TensorSpec(name, types[code], shape))
    aliases = [(f.text(MAX_NAME_BYTES), f.uint(len(tensors) - 1)) for f in named for _ in f.items()]
    if len({name for name, *_ in (*aliases, *tensors)}) != len(aliases) + len(tensors):
        raise fields.bad("two tensors have the same name")
    entries = [
        (f.text(1024), f.text(64), f.uint(), f.uint()) for f in stored for _ in f.items(4096)
    ]
    starts = accumulate((entry[3] for entry in entries), initial=offset)
    files = tuple(StoredFile(*entry[:3], at) for entry, at in zip(entries, starts, strict=False))
    sizes = ((f, f.uint(MAX_KERNEL)) for f in matrices for _ in f.items(256))
    bases = tuple(fields.array("<f4", n * n).reshape(n, n) for fields, n in sizes)
    texts = [{f.text(): f.text() for f in pairs for _ in f.items()} for pairs in (metadata, about)]
    layers = parse_layers(layered[0], len(tensors)) if layered else None
    return Header(tuple(tensors), dict(aliases), texts[0], files, bases, texts[1], layers)


def parse_layers(fields: Fields, tensors: int) -> Layers:
    """Layers of a header of so many tensors."""
    count, base = fields.uint(MAX_LAYERS), fields.take(fields.uint(32))
    masks = tuple(fields.uint((2 << count) - 1) for _ in range(tensors))
    fields.end()
    if not count or len(base) not in (0, 32) or any(not m or m & 1 > len(base) for m in masks):
        raise fields.bad(f"{count} layers and a base of {len(base)} bytes do not give all tensors")
    return Layers(count, base, masks)


def parse_part(fields: Fields, header: Header) -> Part:
    """One part of a tensor."""
    tensor, column = fields.uint(len(header.tensors) - 1), ALIGN * fields.uint(MAX_SAMPLES)
    first, rows, columns = fields.uint(MAX_ELEMENTS), fields.uint(MAX_PART), fields.uint(MAX_PART)
    method, has = fields.take(2)
    step = float(fields.array("<f4", 1)[0])
    bases = tuple(fields.uint(len(header.bases) - 1) for _ in range(fields.uint(4)))
    kernel, spec = prod(len(header.bases[basis]) for basis in bases), header.tensors[tensor]
    shift = fields.take(1)[0] if bases else 0
    if not 0 < rows * columns <= MAX_PART or not 0 < kernel <= MAX_KERNEL or columns % kernel:
        raise fields.bad(f"{rows} x {columns} levels with kernels of {kernel} are no part")
    if (first + rows) * columns > spec.size or spec.size % columns or spec.dtype not in PACKABLE:
        raise fields.bad(f"a part does not fit tensor {spec.name!r}")
    if method not in (UNIFORM, TRELLIS) or has > 15:
        raise fields.bad(f"method {method} or fields {has} need a newer reader", "version")
    if shift > MAX_SHIFT or (has & HAS_FREQUENCY_STEPS and not bases):
        raise fields.bad(f"{shift} bits of precision, or steps by frequency without frequencies")
    if not 2.0**-110 <= step <= 2.0**110:
        raise fields.bad(f"the step {step} is out of range")
    frequency = fields.array("i1", kernel) if has & HAS_FREQUENCY_STEPS else None
    row_steps = fields.array("i1", rows) if has & HAS_ROW_STEPS else None
    energies = escapes = None
    if has & HAS_ENERGIES:
        every = fields.array("u1", rows + columns // kernel + kernel)
        if every.max() > MAX_ENERGY:
            raise fields.bad(f"an energy is above {MAX_ENERGY}")
        energies = every[:rows], every[rows:-kernel], every[-kernel:]
    if has & HAS_ESCAPES:
        count = fields.uint((len(fields.data) - fields.at) // 5)
        places = np.cumsum([fields.uint(MAX_PART) + 1 for _ in range(count)], dtype=np.int64) - 1
        if not count or places[-1] >= rows * columns:
            raise fields.bad("an escape lies outside its part")
        escapes = places, fields.array("u1", 4 * count).reshape(4, -1).T.copy().view("<f4")[:, 0]
    fields.end()
    place = tensor, column, first, rows, columns
    return Part(*place, method, step, bases, shift, frequency, row_steps, energies, escapes)


def parse_sidecar(body: bytes, header: Header) -> Sidecar:
    """What comes before a frame."""
    (frame, *_), parts, ended = read_records(body, "a sidecar", (FRAME, PART, END))
    ends = []
    for end in ended:
        tensor, head = end.uint(len(header.tensors) - 1), end.take(TENSOR_SHA_BYTES)
        sqnr = int(end.array("<i2", 1)[0])
        ends.append(End(tensor, head, None if sqnr == NO_SQNR else sqnr / 100))
    number, sha256 = frame.uint(1 << 32), frame.take(32)
    for fields in (frame, *ended):
        fields.end()
    return Sidecar(number, sha256, tuple(parse_part(p, header) for p in parts), tuple(ends))


def parse_exact(payload: bytes, header: Header) -> Iterator[tuple[int, int, Array]]:
    """Elements of exact tensors in a box: number of the tensor, first element, elements."""
    what = "a box of exact tensors"
    body = cast(bytes, memoryview(open_body(payload, what)))  # of which parts are no copies
    lists, contents, floats = read_records(body, what, (ITEMS, DATA, FLOATS))
    fields, items = lists[0], []
    for _ in fields.items():
        tensor = fields.uint(len(header.tensors) - 1)
        first, count = fields.uint(MAX_ELEMENTS), fields.uint(MAX_ELEMENTS)
        if first + count > header.tensors[tensor].size:
            raise fields.bad("an item leaves its tensor")
        items.append((tensor, first, count, DTYPES[header.tensors[tensor].dtype]))
    if floats:
        names = {header.tensors[item[0]].dtype for item in items}
        if len(names) != 1 or not names <= MANTISSAS.keys() or contents:
            raise fields.bad(f"floats of {sorted(names)} cannot share a record")
        yield from parse_floats(floats[0], names.pop(), [item[:3] for item in items])
        return
    for size, group in groupby(items, lambda item: item[3].itemsize):
        same = list(group)
        planes = (contents or lists)[0].array("u1", size * sum(item[2] for item in same))
        elements, at = np.ascontiguousarray(planes.reshape(size, -1).T), 0
        for tensor, first, count, dtype in same:
            yield tensor, first, elements[at : at + count].reshape(-1).view(dtype)
            at += count
    for data in contents:
        data.end()


def float_rows(counts: Sequence[int], lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Rows of items of bit-exact floats: how many, of how many elements; the rest is a short row.

    >>> float_rows([10, 2], [4, 4])
    [(2, 4), (1, 2), (1, 2)]
    """
    runs = []
    for count, length in zip(counts, lengths, strict=True):
        runs += [(count // length, length), (1, count % length)]
    return [(rows, length) for rows, length in runs if rows and length]


def float_lengths(runs: Sequence[tuple[int, int]]) -> Array:
    """Elements of each row."""
    each = np.array(runs, np.int64).reshape(-1, 2)
    return np.repeat(each[:, 1], each[:, 0])


def float_places(
    runs: Sequence[tuple[int, int]], keys: Array
) -> Iterator[tuple[slice, tuple[int, int], Array, slice]]:
    """Where rows of one key lie: their run, its shape, their numbers in it, their sorted place.

    In the sorted sequence rows come by key, those of one key in their order.
    """
    lengths, order = float_lengths(runs), np.argsort(keys, kind="stable")
    ends, starts = np.cumsum(lengths[order]), np.empty(len(keys), np.int64)
    starts[order], first, at = ends - lengths[order], 0, 0
    for rows, length in runs:
        here, run = keys[first : first + rows], slice(at, at + rows * length)
        for key in np.unique(here):
            found = np.flatnonzero(here == key)
            begin = int(starts[first + found[0]])
            yield run, (rows, length), found, slice(begin, begin + len(found) * length)
        first, at = first + rows, run.stop


def parse_floats(
    fields: Fields, dtype: str, items: Sequence[tuple[int, int, int]]
) -> Iterator[tuple[int, int, Array]]:
    """Bit-exact floats: numbers of tensors, first elements, elements."""
    counts, mantissa, kind = [item[2] for item in items], MANTISSAS[dtype], DTYPES[dtype]
    width, total, wide = 8 * kind.itemsize, sum(counts), np.dtype(f"u{kind.itemsize}").type
    if total * kind.itemsize > MAX_BOX_BYTES:
        raise fields.bad(f"a box claims {total} floats", "limit")
    lengths = [fields.uint(MAX_BOX_BYTES) or 1 for _ in items]
    runs = float_rows(counts, lengths)
    rows = sum(count for count, _ in runs)

    def plane(size: int) -> Bytes:
        coded = fields.uint()
        data = fields.take(coded or size)
        return np.frombuffer(_inflated(data, size, "a plane of floats") if coded else data, "u1")

    low, high, zeros = plane(3 * rows).reshape(3, rows)
    if rows and zeros.max() > mantissa:
        raise fields.bad("a row of floats has more zero bits than a mantissa")
    scale = np.cumsum(low, dtype=np.uint8) | high.astype(np.uint16) << 8
    keys = zeros.astype(np.int32) * 4 + (scale & 3)
    order = np.argsort(keys, kind="stable")
    each = float_lengths(runs)[order]
    tops, middles = plane(total), plane(total)
    offsets = np.repeat(((scale[order] >> 2 << 2).astype(np.int32) - 128).astype(wide), each)
    lows, found = [], np.empty(total, wide)
    for shift in range(0, mantissa - 7, 8):
        low = plane(int(each[zeros[order] < shift + 8].sum()))  # the others end with zeros
        lows.append((wide(shift), low & np.uint8(min(255, (1 << mantissa - 7 - shift) - 1))))
    fields.end()
    for begin in range(0, total, 1 << 15):  # what a cache holds
        here = slice(begin, begin + (1 << 15))
        middle, block = middles[here].astype(wide), tops[here].astype(wide)
        block |= middle >> wide(6) << wide(8)
        block += offsets[here]
        block &= wide((1 << width + 1 - mantissa) - 1)
        block <<= wide(mantissa - 2)
        block |= (middle >> wide(5) & wide(1)) << wide(width - 1)
        block |= (middle & wide(31)) << wide(mantissa - 7)
        for place, low in lows:
            block[: max(0, len(low) - begin)] |= low[here].astype(wide) << place
        found[here] = block
    flat = np.empty(total, wide)
    for run, shape, numbers, place in float_places(runs, keys):
        flat[run].reshape(shape)[numbers] = found[place].reshape(-1, shape[1])
    for (tensor, first, count), end in zip(items, accumulate(counts), strict=True):
        yield tensor, first, flat[end - count : end].view(kind)


def parse_index(body: bytes, header: Header, offset: int) -> Index:
    """Index; ``offset`` is where the first sidecar starts."""
    kinds = FRAMES, SPANS, BOXES, STAGES, ROOT
    listed, spanned, boxed, staged, rooted = read_records(body, "the index", kinds)
    sizes = [f.uint(3 * MAX_BOX_BYTES) for f in listed for _ in f.items(1 << 24)]
    spans, first, last = dict[int, tuple[range, ...]](), 0, len(header.tensors) - 1
    for fields in (f for f in spanned for _ in f.items(MAX_LAYERS * MAX_TENSORS)):
        tensor, first = fields.uint(last), first + fields.uint(len(sizes))
        span = range(first, first + fields.uint(len(sizes) - first))
        spans[tensor] = (*spans.get(tensor, ())[:MAX_LAYERS], span)
    boxes = []
    for fields in (f for f in boxed for _ in f.items()):
        size, count = fields.uint(2 * MAX_BOX_BYTES), fields.uint(MAX_TENSORS)
        boxes.append((size, tuple(fields.uint(last) for _ in range(count))))
    stages = [(f.uint(), f.uint()) for f in staged for _ in f.items(MAX_LAYERS)]
    stages = stages or [(len(sizes), len(boxes))]
    frames, places = list[tuple[int, int]](), list[tuple[int, tuple[int, ...]]]()
    for frame_count, box_count in stages:
        for size in sizes[len(frames) : len(frames) + frame_count]:
            frames.append((offset, size))
            offset += size
        for size, numbers in boxes[len(places) : len(places) + box_count]:
            places.append((offset, numbers))
            offset += size
    if len(frames) < len(sizes) or len(places) < len(boxes):
        raise FormatError("the index has frames or boxes of no layer", "record")
    root = b"".join(fields.take(32) for fields in rooted)
    for fields in rooted:
        fields.end()
    return Index(frames, spans, places, stages, root)


def rectangles(row_energies: Bytes, column_energies: Bytes) -> list[tuple[int, int, int, int]]:
    """Rectangles of the sorted matrix in coding order: first and end row, first and end column.

    Rows and columns are sorted by falling energy. The sum of a row's and a column's energy is
    their class; classes come in falling order, and within a class the row energies do.
    """
    edges = []
    for energies in (row_energies, column_energies):
        counts = np.bincount(energies).tolist()
        ends = list(accumulate(reversed(counts)))[::-1]
        edges.append([(-e, end - n, end) for e, (n, end) in enumerate(zip(counts, ends)) if n])  # noqa: B905
    pairs = sorted((row[0] + column[0], row, column) for row in edges[0] for column in edges[1])
    return [(*row[1:], *column[1:]) for _, row, column in pairs]


def sorted_places(energies: Bytes) -> npt.NDArray[np.intp]:
    """Rows (or columns) by falling energy; those of equal energy in their own order."""
    return np.argsort(-energies.astype(np.int16), kind="stable")


def column_energies(part: Part) -> Bytes:
    """Energy of each column: the sum of its channel's and its frequency's."""
    _, channels, frequencies = cast("tuple[Bytes, Bytes, Bytes]", part.energies)
    return (frequencies[:, None] + channels).reshape(-1)


def from_sequence(sequence: Array, part: Part) -> Array:
    """Matrix of a part, shape (rows, columns), from its elements in coding order."""
    if part.energies is None:
        return sequence.reshape(part.rows, part.columns)
    rows, columns, at = part.energies[0], column_energies(part), 0
    matrix = np.empty((part.rows, part.columns), sequence.dtype)
    for top, bottom, left, right in rectangles(rows, columns):
        size = (bottom - top) * (right - left)
        matrix[top:bottom, left:right] = sequence[at : at + size].reshape(bottom - top, -1)
        at += size
    found, places = np.empty_like(matrix), sorted_places(rows)
    back = np.argsort(sorted_places(columns))
    step = max(1, (1 << 18) // part.columns)
    for begin in range(0, part.rows, step):
        here = slice(begin, begin + step)
        found[places[here]] = np.take(matrix[here], back, axis=1, mode="clip")
    return found


def trellis_index(levels: Array) -> Array:
    """Numbers n of trellis-coded levels k: ``4 k``, or ``4 k + 2`` of the second quantizer.

    The bit w that each level puts into the state is its parity and that of every fifth level before
    it: w = p / (1 + D^5) over GF(2), D being a delay by one level: p (1 + D^5) (1 + D^10) ....
    The second quantizer is that of levels before which an odd number of three w are 1. Each row of
    the levels, int8 (numbers: int16) or int32, of shape (R, C), is a run that starts in state 0.

    >>> trellis_index(np.array([[1, 1, -2, 0, 3]], np.int8)).tolist()
    [[4, 6, -8, 0, 14]]
    """
    state = levels.astype(np.uint8) & 1
    delay = 5
    while delay < state.shape[1]:
        state[:, delay:] ^= state[:, :-delay]
        delay *= 2
    index: Array = levels.astype(np.int16 if levels.itemsize == 1 else np.int32)
    index <<= 1
    for delay in (1, 2, 3):
        index[:, delay:] ^= state[:, :-delay]
    index <<= 1
    return index


def quarter_octaves(exponents: npt.NDArray[np.int8]) -> Floats:
    """``2 ** (e / 4)`` as float32: an entry of `QUARTER_OCTAVES` times an exact power of two."""
    wide = exponents.astype(np.int32)
    return cast(Floats, np.ldexp(QUARTER_OCTAVES[wide & 3], wide >> 2).astype(np.float32))


def kernel_matrix(part: Part, bases: Sequence[Floats]) -> Floats:
    """Integers M, float32, shape (K, K): a level of frequency f adds row f to the K positions.

    In steps of ``2 ** -shift`` of the part's step. Sums of numbers times M are exact in float32, in
    any order, so that every machine has the same weights.
    """
    matrix = np.ones((1, 1), np.float32)
    with np.errstate(all="ignore"):
        for basis in bases:
            matrix = matrix[:, None, :, None] * basis[:, None, :]
            matrix = matrix.reshape(len(matrix) * len(basis), -1)
        if part.frequency_steps is not None:
            matrix *= quarter_octaves(part.frequency_steps)[:, None]
        matrix = np.rint(np.ldexp(matrix, part.shift))
        if not np.abs(matrix).sum(axis=0).max() <= MAX_GAIN:
            raise FormatError(f"a kernel matrix has a column above {MAX_GAIN}", "limit")
    return matrix


def dequantize(
    levels: Array, part: Part, bases: Sequence[Floats], first: int = 0, out: Floats | None = None
) -> Floats:
    """Weights, float32, of R rows of a part from ``first`` on; levels: int8, shape (R, columns).

    ``value = n * unit`` for a matrix. For kernels, n times the kernel matrix is summed over the
    frequencies, exactly; escapes are added one by one; then comes the unit. Last, ``value * row
    factor`` where rows have steps of their own. Each product and sum is rounded to float32.
    """
    trellis, begin = part.method == TRELLIS, first * part.columns
    index = (trellis_index(levels) if trellis else levels).astype(np.float32)
    unit = np.float32(part.step / (4 if trellis else 1) / (1 << part.shift))
    places, numbers = part.escapes or (np.empty(0, np.int64), np.empty(0, np.float32))
    some = slice(*places.searchsorted((begin, begin + levels.size)))
    places, numbers = places[some] - begin, numbers[some]
    index.reshape(-1)[places] = 0 if part.bases else numbers
    with np.errstate(all="ignore"):
        if part.bases:
            matrix = kernel_matrix(part, bases)
            cut = index.reshape(len(levels), len(matrix), -1)
            kernels = None if out is None else out.reshape(len(levels), -1, len(matrix))
            kernels = np.matmul(cut.swapaxes(1, 2), matrix, out=kernels)  # (R, C, K)
            row, frequency, channel = np.unravel_index(places, cut.shape)
            starts = (row * kernels.shape[1] + channel) * len(matrix)
            positions = starts[:, None] + np.arange(len(matrix))
            added = numbers[:, None] * matrix[frequency]  # of a channel by rising frequency
            np.add.at(kernels.reshape(-1), positions.reshape(-1), added.reshape(-1))
            index = kernels.reshape(levels.shape)
        values: Floats = np.multiply(index, unit, out=index if out is None else out)
        if part.row_steps is not None:
            values *= quarter_octaves(part.row_steps[first : first + len(levels)])[:, None]
    return values


def to_float32(array: Array, name: str) -> Floats:
    """Values of stored F64, F32, F16 or BF16 elements as float32 (F64 rounds to nearest even)."""
    if name == "BF16":
        return cast(Floats, (array.astype(np.uint32) << np.uint32(16)).view(np.float32))
    return array.astype(np.float32, copy=False)


def from_float32(values: Floats, name: str) -> Array:
    """Stored F64, F32, F16 or BF16 elements nearest to float32 values (ties to even).

    >>> hex(from_float32(np.array([1.0], np.float32), "BF16")[0])
    '0x3f80'
    """
    if name != "BF16":
        with np.errstate(over="ignore"):
            return values.astype(DTYPES[name], copy=False)
    bits = values.view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    # The carry must not run through a NaN: it keeps its upper bits, and one that says NaN.
    rounded = np.where(np.isnan(values), bits | np.uint32(0x400000), rounded)
    return (rounded >> np.uint32(16)).astype(np.uint16)


def add_bits(below: Array, numbers: Array) -> Array:
    """Elements whose bits, as unsigned integers, differ from those below by zigzag numbers.

    >>> add_bits(np.array([1.0], np.float32), np.array([3], np.uint32).view(np.float32)) < 1
    array([ True])
    """
    kind = f"<u{below.itemsize}"
    found = numbers.view(kind)
    return cast(Array, (below.view(kind) + ((found >> 1) ^ -(found & 1))).view(below.dtype))


def tensor_sha256(array: Array) -> bytes:
    """SHA-256 of a tensor's stored little-endian elements."""
    flat = np.ascontiguousarray(array).reshape(-1)
    return hashlib.sha256(flat.view(np.uint8).data if flat.size else b"").digest()


class Source:
    """Bytes of the archive, from a seekable file or from a pipe."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.at, self._owner = file, 0, os.getpid()
        self.seekable = hasattr(file, "seekable") and file.seekable()
        self.size = file.seek(0, io.SEEK_END) if self.seekable else None
        if self.seekable:
            file.seek(0)

    def read(self, size: int) -> bytes:
        """So many bytes, or a TruncatedError; never more memory than has arrived."""
        parts: list[bytes] = []
        while size:
            part = self.file.read(min(size, 1 << 20))
            if not part:
                raise TruncatedError("the archive ends inside a box", self.at)
            parts.append(part)
            size, self.at = size - len(part), self.at + len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def box(self, at: int | None = None) -> tuple[bytes, bytes]:
        """Type (16 bytes of ours) and payload of the next box; two times nothing at the end."""
        if at is not None:
            if not self.seekable:
                raise FormatError("a pipe can be read once, by `items`", "not-seekable")
            if self._owner != os.getpid():  # a fork shares the place in the file with its parent
                name, self._owner = getattr(self.file, "name", None), os.getpid()
                if isinstance(name, (str, os.PathLike)):
                    self.file = open(name, "rb")  # noqa: PTH123, SIM115
            self.at = self.file.seek(at)
        start, first = self.at, self.file.read(1)
        if not first:
            return b"", b""
        self.at += 1
        head = first + self.read(7)
        size = int.from_bytes(head[:4], "big")
        if not start and head[4:] != b"ftyp":
            raise FormatError("this is not a weightvid archive", "ftyp", start)
        if not 8 <= size <= 2 * MAX_BOX_BYTES:
            raise FormatError(f"a box claims {size} bytes", "box-size", start)
        payload = self.read(size - 8)
        return (payload[:16], payload[16:]) if head[4:] == b"uuid" else (head[4:], payload)


def _children(data: bytes, wanted: bytes) -> list[bytes]:
    found, at = [], 0
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        if not 8 <= size <= len(data) - at:
            raise FormatError("a box inside moov or moof has an impossible size", "box-size")
        if data[at + 4 : at + 8] == wanted:
            found.append(data[at + 8 : at + size])
        at += size
    return found


def parse_moov(payload: bytes) -> Track:
    """Video track of a movie box; its kind and its size are checked."""
    for kind in (b"trak", b"mdia", b"minf", b"stbl", b"stsd"):
        payload, *_ = *_children(payload, kind), b""
    entry, *size = payload[12:16], payload[40:42], payload[42:44]
    width, height = (int.from_bytes(side, "big") for side in size)
    if entry not in TRACKS:
        raise FormatError(f"the track is {entry!r}; allowed are {list(TRACKS)}", "moov")
    sides = min(width, height) >= MIN_SIDE and max(width, height) <= MAX_SIDE
    if not sides or width * height > MAX_SAMPLES or height % BAND or width % BAND:
        raise FormatError(f"frames of {width} x {height} are not allowed", "moov")
    for record in _children(payload[94:], TRACKS[entry][0]):
        return Track(width, height, entry, record)
    raise FormatError("the sample entry has no configuration record", "moov")


def annex_b(track: Track, packet: bytes) -> bytes:
    """An HEVC packet as an access unit that stands alone; packets of other codecs as they are."""
    if track.entry != b"hvc1":
        return packet
    record, picture, units = io.BytesIO(track.record), io.BytesIO(packet), []
    for _ in range(record.read(23)[22]):
        count = int.from_bytes(record.read(3)[1:], "big")
        units += [record.read(int.from_bytes(record.read(2), "big")) for _ in range(count)]
    while head := picture.read(4):
        units.append(picture.read(int.from_bytes(head, "big")))
    return b"".join(b"\0\0\0\1" + unit for unit in units)


class Decoder:
    """Decodes pictures by FFmpeg, in order: ``software`` or one of its hardware devices."""

    def __init__(self, track: Track, device: str = "software", threads: int = 1) -> None:
        self._track = track
        _, software, hardware = TRACKS[track.entry]
        try:
            if device == "software":
                context: Any = av.CodecContext.create(software, "r")
                context.thread_type, context.thread_count = "FRAME", threads
            else:
                accelerator = HWAccel(device_type=device, allow_software_fallback=False)
                context = av.CodecContext.create(hardware, "r", hwaccel=accelerator)
                if not context.is_hwaccel:
                    raise ValueError("there is no such device here")
        except (av.FFmpegError, ValueError, RuntimeError) as error:
            raise CodecError(f"FFmpeg cannot decode {software} on {device}: {error}") from None
        context.extradata = track.record
        context.options = {"max_pixels": str(track.width * track.height)}
        self._context = context

    def decode(self, number: int, data: bytes | None) -> list[tuple[int, Array]]:
        """Numbers and luma of the frames that come out when a packet (None: no more) goes in."""
        packet = None
        try:
            if data is not None:
                # In FFmpeg's own memory: freeing it in a decoding thread needs no Python lock.
                packet = av.Packet(len(data))
                packet.update(data)
                packet.pts = packet.dts = number
            return [self._luma(frame) for frame in self._context.decode(packet)]
        except (av.FFmpegError, ValueError, MemoryError) as error:
            raise CodecError(f"frame {number} does not decode: {error}") from None

    def _luma(self, frame: Any) -> tuple[int, Array]:
        width, height, form = self._track.width, self._track.height, frame.format.name
        if (frame.width, frame.height) != (width, height) or form[:3] not in ("yuv", "nv1"):
            raise CodecError(f"frame {frame.pts} is {frame.width} x {frame.height} {form}")
        plane = frame.planes[0]
        rows = np.frombuffer(cast(Any, plane), np.uint8)[: plane.line_size * height]
        return frame.pts, rows.reshape(height, -1)[:, :width]


def _decoded(
    packets: Packets, track: Track, wanted: str | PacketDecoder, threads: int
) -> Iterator[tuple[Sidecar, Array]]:
    """Sidecar and checked luma of each frame; software takes over where another decoder fails."""
    waiting: list[tuple[Sidecar, bytes]] = []
    decode = _opened(track, wanted, threads)
    for item in chain(packets, (None,)):
        waiting.extend([item] if item else [])
        try:
            for number, luma in decode(item[0].frame, item[1]) if item else decode(-1, None):
                if not waiting or number != waiting[0][0].frame:
                    raise CodecError(f"the decoder gave frame {number} out of order")
                picture = np.array(luma, order="C").reshape(track.height, track.width)
                picture.flags.writeable = False
                if hashlib.sha256(picture.data).digest() != waiting[0][0].sha256:
                    why = f"frame {number} decodes to other samples than were packed"
                    raise FormatError(why, "frame-digest")
                yield waiting.pop(0)[0], picture
        except Exception as error:  # whatever a decoder of others raises
            if wanted == "software" or not waiting:
                raise
            why = f"decoder {wanted!r}: {error}; the software decoder takes over"
            warnings.warn(why, RuntimeWarning, stacklevel=2)
            yield from _decoded(chain(tuple(waiting), packets), track, "software", threads)
            return
    if waiting:
        raise CodecError(f"frame {waiting[0][0].frame} does not decode")


def _opened(track: Track, wanted: str | PacketDecoder, threads: int) -> Decode:
    if callable(wanted):
        given = wanted
        return lambda number, data: [] if data is None else [(number, given(annex_b(track, data)))]
    if wanted == "auto":
        for device in hwdevices_available():
            with suppress(CodecError):
                return Decoder(track, device).decode
    return Decoder(track, "software" if wanted == "auto" else wanted, threads).decode


class Assembler:
    """Collects levels of parts from frames, and gives tensors (only one's) when they are complete.

    They are given after each of their first ``layers`` layers; ``base`` gives the tensors that the
    first layer is added to. Where a sink takes the levels, no tensor is given.
    """

    def __init__(
        self,
        header: Header,
        only: int | None = None,
        check: bool = False,
        sink: Sink | None = None,
        layers: int = MAX_LAYERS,
        base: Callable[[int], Array] | None = None,
    ) -> None:
        self._header, self._only, self._check, self._sink = header, only, check, sink
        self._layers, self._base = layers, base
        #: parts that go on in the next frame, their columns, and how many of them have come.
        self._open: list[tuple[Part, Bytes, int]] = []
        #: of tensors being built: elements, how many there are, whether a layer is added to them.
        self._arrays: dict[int, tuple[Array, int, bool]] = {}
        self._whole, self._layer = dict[int, Array](), dict[int, int]()

    def left(self, number: int) -> int:
        """Layers of a tensor that are still to come."""
        mask = self._header.mask(number) >> 1 & ((1 << self._layers) - 1)
        return mask.bit_count() - self._layer.get(number, 0)

    def add(self, sidecar: Sidecar, luma: Array) -> Iterator[tuple[int, Array]]:
        """Take one frame; give every tensor that ends in it, with its number."""
        height, width = luma.shape
        bands, capacity = luma.reshape(height // BAND, BAND, width), height // BAND * width
        pieces = [(part, room, have, 0) for part, room, have in self._open]
        free = max((len(room) - have for _, room, have in self._open), default=0)
        for part in sidecar.parts:
            if not free <= part.column < capacity:
                raise FormatError(f"parts overlap in frame {sidecar.frame}", "order")
            length = -(part.size // -BAND)
            free = part.column + length
            if self._only in (None, part.tensor):
                pieces.append((part, np.empty((length, BAND), np.uint8), 0, part.column))
        self._open = []
        for part, room, begun, first in pieces:
            have, column = begun, first
            while have < len(room) and column < capacity:
                band, x = divmod(column, width)
                run = min(len(room) - have, width - x)
                room[have : have + run] = bands[band, :, x : x + run].T
                have, column = have + run, column + run
            if have < len(room):
                self._open.append((part, room, have))
            else:
                self._finish(part, room.reshape(-1)[: part.size])
        for end in sidecar.ends:
            if self._only in (None, end.tensor) and self._sink is None:
                yield end.tensor, self._take(end.tensor, end.sha256)

    def add_exact(self, payload: bytes) -> Iterator[tuple[int, Array]]:
        """Take a box of exact tensors; give every tensor that ends in it, with its number."""
        return self.add_elements(parse_exact(payload, self._header))

    def add_elements(self, found: Iterable[tuple[int, int, Array]]) -> Iterator[tuple[int, Array]]:
        """Take parts of exact tensors: number of the tensor, first element, elements."""
        for number, first, elements in found:
            if self._only in (None, number):
                room, added = self._room(number, first, elements.size)
                room[:] = add_bits(room, elements) if added else elements
                if first + elements.size == self._header.tensors[number].size:
                    yield number, self._take(number)

    def _finish(self, part: Part, samples: Bytes) -> None:
        samples ^= ZERO_SAMPLE
        matrix = from_sequence(samples.view(np.int8), part)
        if self._sink is not None:
            self._sink(part, matrix)
            return
        spec, first = self._header.tensors[part.tensor], part.first_row * part.columns
        bases = [self._header.bases[basis] for basis in part.bases]
        flat, added = self._room(part.tensor, first, part.size)
        room = flat.reshape(matrix.shape)
        step = max(1, (1 << 17) // part.columns)
        for row in range(0, part.rows, step):
            levels, target = matrix[row : row + step], room[row : row + step]
            if spec.dtype == "F32" and not added:
                dequantize(levels, part, bases, row, target)
                continue
            values = dequantize(levels, part, bases, row)
            if added:
                with np.errstate(all="ignore"):
                    values += to_float32(target, spec.dtype)
            target[:] = from_float32(values, spec.dtype)

    def _room(self, number: int, first: int, count: int) -> tuple[Array, bool]:
        spec = self._header.tensors[number]
        if number not in self._arrays:
            if self.left(number) < 1:
                raise _defect(spec, "comes more often than the header says")
            self._arrays[number] = self._begin(number, spec)
        array, have, added = self._arrays[number]
        if first != have:
            raise _defect(spec, "has parts out of order")
        self._arrays[number] = array, first + count, added
        return array[first : first + count], added

    def _begin(self, number: int, spec: TensorSpec) -> tuple[Array, int, bool]:
        """Room for a layer: a copy of what it is added to, as it may stay incomplete."""
        if number in self._whole:
            return self._whole[number].copy(), 0, True
        if self._base is not None and self._header.mask(number) & 1:
            return self._base(number).reshape(-1).copy(), 0, True
        try:
            return np.empty(spec.size, DTYPES[spec.dtype]), 0, False
        except (MemoryError, ValueError):
            raise _defect(spec, "needs more memory than there is", "limit") from None

    def _take(self, number: int, digest: bytes | None = None) -> Array:
        spec = self._header.tensors[number]
        array, have, added = self._arrays.pop(number, (np.empty(0), -1, False))
        if have != spec.size:
            raise _defect(spec, "ends too early")
        # Sums are always checked: what they are added to came from elsewhere.
        checked = digest if self._check or added else None
        if checked is not None and tensor_sha256(array)[:TENSOR_SHA_BYTES] != checked:
            raise _defect(spec, "is not what was packed", "tensor-digest")
        self._layer[number] = self._layer.get(number, 0) + 1
        if self.left(number):
            self._whole[number], array.flags.writeable = array, False
        else:
            self._whole.pop(number, None)
        return array.reshape(spec.shape)


class Archive(Mapping[str, Array]):
    """An open archive: a mapping of names to tensors; made by `open_archive`.

    ``archive[name]`` reads one tensor; `items` gives all of them in file order as their frames
    arrive, which is the only way to read a pipe. BF16 comes as float32, float8 as raw bits. It is
    for one thread at a time: let each open its own. Of a file cut short, tensors may lack layers.

    Attributes
    ----------
    header : Header
    track : Track
    index : Index or None
        None: the file is cut short, or a pipe.
    layers : int
        How many layers of the file are read: all, or as many as were asked for.
    base : Archive or None
        What this archive is an update to; see `use_base`.
    """

    def __init__(
        self,
        file: BinaryIO,
        decoder: str | PacketDecoder,
        threads: int,
        check_tensors: bool,
        layers: int = MAX_LAYERS,
    ) -> None:
        self.source, self._opened = Source(file), list[Archive]()
        self.base: Archive | None = None
        self._last: list[tuple[Sidecar, Array]] = []
        self._packet: tuple[int, tuple[Sidecar, bytes]] | None = None
        self._box: tuple[int, dict[int, list[tuple[int, int, Array]]], FormatError | None]
        self._box = -1, {}, None
        self._decoder, self._threads, self._check = decoder, threads, check_tensors
        first, brands = self.source.box()
        if first != b"ftyp" or BRAND not in brands:
            raise FormatError("this is not a weightvid archive", "ftyp")
        (second, movie), (third, payload) = self.source.box(), self.source.box()
        if not third:
            raise TruncatedError("the archive ends before its header", self.source.at)
        if second != b"moov" or third != HEADER_UUID:
            raise FormatError("ftyp is not followed by moov and the header", "order")
        self.header = parse_header(open_body(payload, "the header"), self.source.at)
        self.track = parse_moov(movie)
        self._layer_count = self.header.layers.total if self.header.layers else 1
        self.layers = min(layers, self._layer_count)
        self._numbers = {spec.name: number for number, spec in enumerate(self.header.tensors)}
        self._numbers.update(self.header.aliases)
        if self.header.files and self.source.seekable:
            self.source.box(self.header.files[-1].offset)
        self._start = self.source.at
        self.index = self._read_index() if self.source.seekable else None
        self._boxes: dict[int, list[int]] = {}
        for at, numbers in self.index.boxes if self.index else ():
            for number in numbers:
                self._boxes.setdefault(number, []).append(at)

    __eq__, __hash__ = object.__eq__, object.__hash__  # not those of a Mapping

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file, and bases that were opened with it."""
        for archive in self._opened:
            archive.close()
        self.source.file.close()
        self._last, self._packet, self._box = [], None, (-1, {}, None)

    def use_base(self, *bases: Base) -> None:
        """Read what this update adds to from the archive (or the chain of them) that it names.

        Raises
        ------
        FormatError
            ``base``: it is another archive, or this one is no update.
        """
        *before, last = bases
        if not isinstance(last, Archive):
            last = open_archive(last, base=before or None, check_tensors=self._check)
            self._opened.append(last)
        wanted = self.header.layers.base if self.header.layers else b""
        if not wanted:
            raise FormatError("this archive is no update, and needs no base", "base")
        root, layers = last.root, last.header.layers
        if root != wanted:
            why = f"this update is to the archive of root {wanted.hex()}, not to that of root"
            raise FormatError(f"{why} {root.hex() or 'unknown'}", "base")
        if layers and (last.layers < layers.total or (layers.base and last.base is None)):
            raise FormatError("the base is not open with all its layers and its own base", "base")
        self.base = last

    @property
    def root(self) -> bytes:
        """SHA-256 of all tensors, as the index says; an update names that of its base."""
        return self._indexed().root

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[str]:
        return iter(self._numbers)

    def __contains__(self, name: object) -> bool:
        return name in self._numbers

    def __repr__(self) -> str:
        elements = sum(spec.size for spec in self.header.tensors)
        size = "a pipe" if self.source.size is None else f"{self.source.size} bytes"
        return f"<Archive: {len(self)} tensors, {elements} elements, {size}>"

    def _read_index(self) -> Index | None:
        source, size = self.source, cast(int, self.source.size)
        if size < self._start + 20:
            return None
        source.file.seek(size - 16)
        tail = source.read(16)
        at = size - int.from_bytes(tail[12:], "big")  # where mfra begins
        if tail[4:8] != b"mfro" or at < self._start + 4:
            return None
        source.file.seek(at - 4)
        at -= int.from_bytes(source.read(4), "little")
        kind, payload = source.box(at) if at >= self._start else (b"", b"")
        if kind != INDEX_UUID:
            return None
        return parse_index(open_body(payload[:-4], "the index"), self.header, self._start)

    def _number(self, name: str) -> int:
        if name not in self._numbers:
            raise TensorNotFoundError(f"the archive has no tensor {name!r}")
        return self._numbers[name]

    def _indexed(self) -> Index:
        if self.index is None:
            self.source.box(self._start)  # a pipe says that it is one
            raise TruncatedError("the archive has no index at its end", self.source.size)
        return self.index

    def _payload(self, at: int, kind: bytes, what: str, code: str = "index") -> bytes:
        found, payload = self.source.box(at)
        if found != kind:
            raise FormatError(f"{what} is not where it should be", code, at)
        return payload

    def spec(self, name: str) -> TensorSpec:
        """Name, element type and shape of a tensor (of an alias: those of its target)."""
        return self.header.tensors[self._number(name)]

    def __getitem__(self, name: str) -> Array:
        stored = self.stored(name)
        return to_float32(stored, "BF16") if self.spec(name).dtype == "BF16" else stored

    def stored(self, name: str) -> Array:
        """One tensor in its own element type; raw bits where numpy has none."""
        number, spec = self._number(name), self.spec(name)
        if self.index is None:
            return next(array for found, array in self.stored_items() if found == spec)
        tensors = self._assembler(number)
        if not tensors.left(number) and self.header.mask(number) & 1:
            return self._of_base(number)
        spans, frames = self.index.spans.get(number, ()), self.index.frames
        places = [(frames[span.start][0], span) for span in spans if span]
        places += [(at, range(0)) for at in self._boxes.get(number, ())]
        for at, place in sorted(places, key=lambda entry: entry[0]):
            exact = () if place else self._exact(at).get(number, ())
            decoded = (found for frame in self.frames(place) for found in tensors.add(*frame))
            for _, array in decoded if place else tensors.add_elements(exact):
                if not tensors.left(number):
                    return array
        raise _defect(spec, "is not where the index says", "index")

    def _exact(self, at: int) -> dict[int, list[tuple[int, int, Array]]]:
        """Parts of the exact tensors in a box by number; kept until another box is read."""
        if self._box[0] != at:
            found: dict[int, list[tuple[int, int, Array]]] = {}
            wrong = None
            try:
                payload = self._payload(at, EXACT_UUID, f"the box at byte {at}")
                for part in parse_exact(payload, self.header):
                    found.setdefault(part[0], []).append(part)
            except FormatError as error:
                wrong = error
            self._box = at, found, wrong
        if self._box[2] is not None:
            raise self._box[2].with_traceback(None)
        return self._box[1]

    def _assembler(self, only: int | None = None) -> Assembler:
        return Assembler(self.header, only, self._check, layers=self.layers, base=self._of_base)

    def _of_base(self, number: int) -> Array:
        """A tensor as the base has it."""
        spec = self.header.tensors[number]
        if self.base is None:
            raise _defect(spec, "is an update: give the base of this archive", "base")
        if spec.name not in self.base or self.base.spec(spec.name)[1:] != spec[1:]:
            raise _defect(spec, "is not in the base as it should be", "base")
        return self.base.stored(spec.name)

    def levels(self, name: str) -> Levels:
        """Integers and step of a uniform, untransformed tensor; an error says why it has none."""
        (spec, parts, _, frames, _), values = self.info(name), list[Array]()
        outliers = [part.escapes[1] for part in parts if part.escapes]
        trellis = "its levels are trellis-coded: one integer has two meanings"
        kernels = "its levels are coefficients of a transform, or have steps by row"
        for wrong, why in (
            (self.header.mask(self._number(name)) != 2, "it is a sum of layers"),
            (not parts, "it lies in a box beside the pictures"),
            (any(part.method == TRELLIS for part in parts), trellis),
            (any(part.bases or part.row_steps is not None for part in parts), kernels),
            (not all((abs(n) < 1 << 31).all() for n in outliers), "an outlier exceeds 32 bits"),
        ):
            if wrong:
                raise TensorNotFoundError(
                    f"tensor {name!r} has no integers to compute with: {why}; pack with --integer "
                    "to get them"
                )

        def take(part: Part, matrix: Array) -> None:
            values.append(matrix.astype(np.int32).reshape(-1))
            if part.escapes:
                values[-1][part.escapes[0]] = part.escapes[1]

        assembler = Assembler(self.header, self._number(name), sink=take)
        for frame in self.frames(frames):
            all(assembler.add(*frame))
        if sum(flat.size for flat in values) != spec.size:
            raise _defect(spec, "ends too early")
        return Levels(np.concatenate(values).reshape(spec.shape), parts[0].step)

    def info(self, name: str) -> TensorInfo:
        """What the archive says of a tensor; decodes nothing."""
        number = self._number(name)
        spans = self._indexed().spans.get(number, ())
        frames = spans[0] if len(spans) == 1 else tuple(chain(*spans))
        sidecars = [self.packet(frame)[0] for frame in frames]
        parts = tuple(part for side in sidecars for part in side.parts if part.tensor == number)
        ends = [end for side in sidecars for end in side.ends if end.tensor == number]
        last = parts[-1].bases if parts else ()
        kernel = tuple(len(self.header.bases[basis]) for basis in last)
        return TensorInfo(self.spec(name), parts, ends[-1] if ends else None, frames, kernel)

    def frames(self, numbers: Sequence[int]) -> Iterator[tuple[Sidecar, Array]]:
        """Sidecar and luma, uint8 of shape (height, width), of consecutive frames."""
        if numbers and self._last and self._last[0][0].frame == numbers[0]:
            yield self._last[0]  # tensors that are read one by one share frames
            numbers = numbers[1:]
        if numbers:
            packets = map(self.packet, numbers)
            for frame in _decoded(packets, self.track, self._decoder, self._threads):
                self._last = [frame]
                yield frame

    def packet(self, number: int) -> tuple[Sidecar, bytes]:
        """Sidecar and coded picture of one frame; kept until another one is read."""
        at = self._indexed().frames[number][0]
        if self._packet is None or self._packet[0] != at:
            payload = self._payload(at, FRAME_UUID, f"frame {number}")
            self._packet = at, self._frame(payload, number)
        return self._packet[1]

    def _frame(self, payload: bytes, number: int) -> tuple[Sidecar, bytes]:
        sidecar = parse_sidecar(open_body(payload, f"sidecar {number}"), self.header)
        (first, fragment), (second, packet) = self.source.box(), self.source.box()
        if not second:
            raise TruncatedError("the archive ends behind a sidecar", self.source.at)
        heads = [head[4:] for head in _children(fragment if first == b"moof" else b"", b"mfhd")]
        right = sidecar.frame == number and heads == [(number + 1).to_bytes(4, "big")]
        if second != b"mdat" or not packet or not right:
            raise FormatError(f"sidecar {number} is not followed by its frame", "order")
        return sidecar, packet

    def stored_items(self) -> Iterator[tuple[TensorSpec, Array]]:
        """Distinct tensors in file order as their frames arrive, in their own element types.

        At the end of a file that is cut short come those of which only lower layers have arrived;
        then a `TruncatedError` names what did not arrive at all.
        """
        best = dict[TensorSpec, Array]()
        try:
            for arrival in self.arrivals():
                best[arrival.spec] = arrival.array
                if not arrival.left:
                    yield arrival.spec, best.pop(arrival.spec)
        except TruncatedError:
            yield from best.items()
            raise

    def arrivals(self) -> Iterator[Arrival]:
        """Every tensor each time that a layer of it has arrived, as the sum up to there.

        At the end of a file that is cut short, a `TruncatedError` names what did not arrive.
        """
        specs, tensors = self.header.tensors, self._assembler()
        masks, every = map(self.header.mask, range(len(specs))), self.layers == self._layer_count
        own = [[n for n in range(self.layers) if mask >> 1 + n & 1] for mask in masks]
        ahead, left = Counter(chain(*own)), dict(enumerate(specs))

        def arrived(number: int, array: Array) -> Arrival:
            later = tensors.left(number)
            layer = len(own[number]) - later
            if layer:
                ahead[own[number][layer - 1]] -= 1
            if not later:
                del left[number]
            complete = next((n for n in range(self.layers) if ahead[n]), self.layers)
            return Arrival(specs[number], array, layer, later, complete)

        for number in [number for number, layers in enumerate(own) if not layers]:
            if not self.header.mask(number) & 1:
                name, count = specs[number].name, self.layers
                raise TensorNotFoundError(f"tensor {name!r} is in none of the first {count} layers")
            yield arrived(number, self._of_base(number))
        try:
            for event in self.events() if left or every else ():
                exact = isinstance(event, bytes)
                given = tensors.add_exact(event) if exact else tensors.add(*event)  # type: ignore[arg-type]
                yield from (arrived(*found) for found in given)
                if not left and not every:
                    return
        except TruncatedError as error:
            names: tuple[list[str], list[str]] = [], []
            for number, spec in left.items():
                names[tensors.left(number) < len(own[number])].append(spec.name)
            missing, coarse = (", ".join(n[:5]) + " ..." * (len(n) > 5) for n in names)
            why = f"the archive is cut short; missing: {missing or 'its index'}"
            why += f"; coarse: {coarse}" if coarse else ""
            raise TruncatedError(why, error.offset, *names) from None
        for spec in left.values():
            raise _defect(spec, "is not in the archive")

    def events(self) -> Iterator[tuple[Sidecar, Array] | bytes]:
        """Sidecars and luma of frames, and payloads of boxes of exact tensors, layer by layer."""
        source, at, number = self.source, self._start, 0
        ends = list[TruncatedError]()

        def following() -> tuple[bytes, bytes]:  # others may read from the file meanwhile
            return source.box(at if source.seekable or source.at != at else None)

        box, at = following(), source.at

        def packets() -> Packets:
            nonlocal at, number, box
            try:
                while box[0] in (FRAME_UUID, FILE_UUID):
                    frames = [self._frame(box[1], number)] if box[0] == FRAME_UUID else []
                    number, at = number + len(frames), source.at
                    yield from frames
                    box, at = following(), source.at
            except TruncatedError as error:  # frames that the decoder still holds come first
                ends.append(error)

        for _ in range(self._layer_count):
            yield from _decoded(packets(), self.track, self._decoder, self._threads)
            if ends:
                raise ends[0]
            while box[0] == EXACT_UUID:
                yield box[1]
                box, at = following(), source.at
        if not box[0]:
            raise TruncatedError("the archive ends before its index", source.at)
        if box[0] != INDEX_UUID:
            raise FormatError(f"unexpected box {box[0]!r}", "order", source.at)

    def items(self) -> Iterator[tuple[str, Array]]:  # type: ignore[override]
        """All tensors in file order as their frames arrive; each alias follows its target."""
        names = {spec.name: [spec.name] for spec in self.header.tensors}
        for alias, number in self.header.aliases.items():
            names[self.header.tensors[number].name].append(alias)
        for spec, stored in self.stored_items():
            array = to_float32(stored, "BF16") if spec.dtype == "BF16" else stored
            yield from ((name, array) for name in names[spec.name])

    def read_file(self, path: str) -> bytes:
        """One of the small files that travel with the model (``header.files`` lists them)."""
        places = [entry.offset for entry in self.header.files if entry.path == path]
        if not places:
            raise TensorNotFoundError(f"the archive has no file {path!r}")
        return open_body(self._payload(places[0], FILE_UUID, path, "order"), f"file {path!r}")


def open_archive(
    source: str | os.PathLike[str] | BinaryIO | bytes,
    *,
    base: Base | Sequence[Base] | None = None,
    layers: int = MAX_LAYERS,
    decoder: str | PacketDecoder = "software",
    threads: int = 1,
    check_tensors: bool = False,
) -> Archive:
    """Open an archive.

    Parameters
    ----------
    source : path, binary file object or bytes
        A pipe or the result of ``urlopen`` will do; such a source can be read once, by `items`.
    base : path, file, bytes or Archive, or a sequence of them
        What this archive is an update to; of a chain of updates the oldest first.
    layers : int
        Read the first so many layers of an archive of several.
    decoder : str or callable
        ``software``; ``auto``: a hardware device if there is one; one of FFmpeg's devices
        (``cuda``, ``videotoolbox``, ``vaapi``, ``d3d11va``); or a function from a packet (an
        Annex B access unit with its parameter sets) to luma, uint8 of shape (height, width).
        Each frame's SHA-256 is checked: where it differs, software takes over with a warning.
    threads : int
        Frames decoded at the same time by the software decoder.
    check_tensors : bool
        Compare each dequantized tensor with its SHA-256 too.

    Raises
    ------
    FormatError, TruncatedError, OSError
    """
    if layers < 1:
        raise TensorNotFoundError(f"layers are counted from 1; {layers} is none")
    held = isinstance(source, bytes | bytearray | memoryview)
    file: Any = io.BytesIO(source) if held else source  # type: ignore[arg-type]
    if isinstance(source, str | os.PathLike):
        file = open(source, "rb")  # noqa: SIM115, PTH123 - closed by the archive
    try:
        archive = Archive(file, decoder, threads, check_tensors, layers)
        if base not in (None, (), []):
            archive.use_base(*(base if isinstance(base, list | tuple) else (base,)))
    except BaseException:
        if file is not source:
            file.close()
        raise
    return archive
