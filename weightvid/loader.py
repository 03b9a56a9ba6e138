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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate, chain, groupby
from math import prod
from typing import Any, BinaryIO, Final, NamedTuple, cast

import av
import numpy as np
import numpy.typing as npt
from av.codec.hwaccel import HWAccel, hwdevices_available

Array = npt.NDArray[Any]
Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
PacketDecoder = Callable[[bytes], Array]
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
    """The archive ends before its end; ``missing`` names the tensors that did not arrive."""

    def __init__(self, why: str, offset: int | None = None, missing: Sequence[str] = ()) -> None:
        super().__init__(why, "truncated", offset)
        self.missing = tuple(missing)
        self.args = why, offset, self.missing


class TensorNotFoundError(WeightvidError, KeyError):
    """The archive or checkpoint has no tensor of that name."""

    __str__ = Exception.__str__  # a KeyError would show its message in quotes


class CodecError(WeightvidError, RuntimeError):
    """The video encoder or decoder failed."""


BRAND, HEADER_UUID, FILE_UUID = b"wvid", b"weightvid-header", b"weightvid-file\0\0"
FRAME_UUID, EXACT_UUID = b"weightvid-frame\0", b"weightvid-exact\0"
INDEX_UUID = b"weightvid-index\0"
#: record types: an odd one may be skipped by a reader that does not know it.
TENSORS, ALIASES, METADATA, FILES, BASES, ABOUT = 2, 4, 6, 8, 10, 13
FRAME, PART, END, ITEMS, DATA, FRAMES, SPANS, BOXES = 32, 34, 36, 48, 50, 64, 66, 68
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
TENSOR_SHA_BYTES, NO_SQNR = 8, 0x7FFF
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


class Header(NamedTuple):
    """What an archive holds: tensors in the order of the source, and what belongs to them."""

    tensors: tuple[TensorSpec, ...]
    aliases: Mapping[str, int]
    metadata: Mapping[str, str]
    files: tuple[StoredFile, ...]
    bases: tuple[Floats, ...]
    about: Mapping[str, str]


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
    """Where things lie: frames (offset, bytes), frames of tensors, boxes of exact tensors."""

    frames: Sequence[tuple[int, int]]
    spans: Mapping[int, range]
    boxes: Sequence[tuple[int, tuple[int, ...]]]


class TensorInfo(NamedTuple):
    """What the archive says of one tensor; ``parts`` is empty and ``end`` None if it is exact."""

    spec: TensorSpec
    parts: tuple[Part, ...]
    end: End | None
    frames: range
    kernel: tuple[int, ...]


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
        value = shift = 0
        for byte in self.data[self.at : self.at + 10]:
            value, shift, self.at = value | (byte & 0x7F) << shift, shift + 7, self.at + 1
            if byte < 0x80:
                break
        else:
            raise self.bad("a number has no end")
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
    if len(found[known[0]]) > 1 or (known[0] < FRAMES and not found[known[0]]):
        raise fields.bad(f"there is not one record of type {known[0]}")
    return list(found.values())


def open_body(payload: bytes, what: str) -> bytes:
    """Records in a box of ours, behind their CRC-32, form and size."""
    if zlib.crc32(payload[4:]) != int.from_bytes(payload[:4], "little") or len(payload) < 9:
        raise FormatError(f"{what} is damaged: its CRC-32 does not match", "digest")
    form, size, data = payload[4], int.from_bytes(payload[5:9], "little"), payload[9:]
    if size > MAX_BOX_BYTES or form not in (STORED, DEFLATED):
        raise FormatError(f"{what} has {size} bytes in form {form}, which is not allowed", "limit")
    if form == DEFLATED:
        inflater = zlib.decompressobj(-15)
        with suppress(zlib.error):
            data = inflater.decompress(data, size + 1)
        if not inflater.eof or inflater.unused_data or len(data) != size:
            raise FormatError(f"{what} is not one deflate stream of {size} bytes", "deflate")
    if len(data) != size:
        raise FormatError(f"{what} has another size than it says", "record")
    return data


def parse_header(body: bytes, offset: int) -> Header:
    """Model header; ``offset`` is where the first box after it starts."""
    kinds = TENSORS, ALIASES, METADATA, FILES, BASES, ABOUT
    listed, named, metadata, stored, matrices, about = read_records(body, "the header", kinds)
    tensors, types, fields = [], list(DTYPES), listed[0]
    for _ in fields.items():
        name, code = fields.text(MAX_NAME_BYTES), fields.uint(len(types) - 1)
        shape = tuple(fields.uint(MAX_ELEMENTS) for _ in range(fields.uint(32)))
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
    return Header(tuple(tensors), dict(aliases), texts[0], files, bases, texts[1])


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
        escapes = places, fields.array("<f4", count)
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
    lists, contents = read_records(open_body(payload, what), what, (ITEMS, DATA))
    fields, items = lists[0], []
    for _ in fields.items():
        tensor = fields.uint(len(header.tensors) - 1)
        first, count = fields.uint(MAX_ELEMENTS), fields.uint(MAX_ELEMENTS)
        if first + count > header.tensors[tensor].size:
            raise fields.bad("an item leaves its tensor")
        items.append((tensor, first, count, DTYPES[header.tensors[tensor].dtype]))
    for size, group in groupby(items, lambda item: item[3].itemsize):
        same = list(group)
        planes = (contents or lists)[0].array("u1", size * sum(item[2] for item in same))
        elements, at = np.ascontiguousarray(planes.reshape(size, -1).T), 0
        for tensor, first, count, dtype in same:
            yield tensor, first, elements[at : at + count].reshape(-1).view(dtype)
            at += count
    for data in contents:
        data.end()


def parse_index(body: bytes, header: Header, offset: int) -> Index:
    """Index; ``offset`` is where the first sidecar starts."""
    listed, spanned, boxed = read_records(body, "the index", (FRAMES, SPANS, BOXES))
    sizes = [f.uint(3 * MAX_BOX_BYTES) for f in listed for _ in f.items(1 << 24)]
    *starts, offset = accumulate(sizes, initial=offset)
    spans, boxes, first, last = {}, [], 0, len(header.tensors) - 1
    for fields in (f for f in spanned for _ in f.items()):
        tensor, first = fields.uint(last), first + fields.uint(len(sizes))
        spans[tensor] = range(first, first + fields.uint(len(sizes) - first))
    for fields in (f for f in boxed for _ in f.items()):
        size, count = fields.uint(2 * MAX_BOX_BYTES), fields.uint(MAX_TENSORS)
        boxes.append((offset, tuple(fields.uint(last) for _ in range(count))))
        offset += size
    return Index(list(zip(starts, sizes, strict=True)), spans, boxes)


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

    The bit w that each level puts into the state is its parity p, exclusive-or the w of one and
    of three levels before: w = p / (1 + D + D^3) over GF(2), D being a delay by one level. And
    (1 + D + D^3) (1 + D + D^2 + D^4) = 1 + D^7, whose inverse is (1 + D^7) (1 + D^14) (1 + D^28)...
    The second quantizer is that of levels whose w of two levels before is 1. Each row of the
    levels, int8 (numbers: int16) or int32, of shape (R, C), is a run that starts in state 0.

    >>> trellis_index(np.array([[1, 1, -2, 0, 3]], np.int8)).tolist()
    [[4, 4, -6, 0, 12]]
    """
    parity = levels.astype(np.uint8) & 1
    state = parity.copy()
    for delay in (1, 2, 4):
        state[:, delay:] ^= parity[:, :-delay]
    delay = 7
    while delay < state.shape[1]:
        state[:, delay:] ^= state[:, :-delay]
        delay *= 2
    index: Array = levels.astype(np.int16 if levels.itemsize == 1 else np.int32)
    index <<= 1
    index[:, 2:] |= state[:, :-2]
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
    some = slice(*np.searchsorted(places, (begin, begin + levels.size)))
    places, numbers = places[some] - begin, numbers[some]
    index.reshape(-1)[places] = 0 if part.bases else numbers
    with np.errstate(all="ignore"):
        if part.bases:
            matrix = kernel_matrix(part, bases)
            cut = index.reshape(len(levels), len(matrix), -1)
            kernels = None if out is None else out.reshape(len(levels), -1, len(matrix))
            kernels = np.matmul(cut.swapaxes(1, 2), matrix, out=kernels)  # (R, C, K)
            row, frequency, channel = np.unravel_index(places, cut.shape)
            for f in sorted(set(frequency.tolist())):
                at = frequency == f
                kernels[row[at], channel[at]] += numbers[at, None] * matrix[f]
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


def tensor_sha256(array: Array) -> bytes:
    """SHA-256 of a tensor's stored little-endian elements."""
    flat = np.ascontiguousarray(array).reshape(-1)
    return hashlib.sha256(flat.view(np.uint8).data if flat.size else b"").digest()


class Source:
    """Bytes of the archive, from a seekable file or from a pipe."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.at = file, 0
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
                picture = np.ascontiguousarray(luma).reshape(track.height, track.width)
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

    Where a sink takes the levels, no tensor is given.
    """

    def __init__(
        self, header: Header, only: int | None = None, check: bool = False, sink: Sink | None = None
    ) -> None:
        self._header, self._only, self._check, self._sink = header, only, check, sink
        self._open: list[tuple[Part, Bytes, int]] = []
        self._arrays: dict[int, tuple[Array, int]] = {}

    def add(self, sidecar: Sidecar, luma: Array) -> Iterator[tuple[int, Array]]:
        """Take one frame; give every tensor that ends in it, with its number."""
        height, width = luma.shape
        bands, capacity = luma.reshape(height // BAND, BAND, width), height // BAND * width
        pieces = [(part, room, have, 0) for part, room, have in self._open]
        free = -(min((have - part.size for part, _, have in self._open), default=0) // BAND)
        for part in sidecar.parts:
            if not free <= part.column < capacity:
                raise FormatError(f"parts overlap in frame {sidecar.frame}", "order")
            free = part.column - part.size // -BAND
            if self._only in (None, part.tensor):
                pieces.append((part, np.empty(part.size, np.uint8), 0, part.column))
        self._open = []
        for part, room, begun, first in pieces:
            have, column = begun, first
            while have < part.size and column < capacity:
                band, x = divmod(column, width)
                run = min(-(-(part.size - have) // BAND), width - x)
                samples = bands[band, :, x : x + run].T.reshape(-1)[: part.size - have]
                room[have : have + samples.size] = samples
                have, column = have + samples.size, column + run
            if have < part.size:
                self._open.append((part, room, have))
            else:
                self._finish(part, room)
        for end in sidecar.ends:
            if self._only in (None, end.tensor) and self._sink is None:
                yield end.tensor, self._take(end.tensor, end.sha256 if self._check else None)

    def add_exact(self, payload: bytes) -> Iterator[tuple[int, Array]]:
        """Take a box of exact tensors; give every tensor that ends in it, with its number."""
        for number, first, elements in parse_exact(payload, self._header):
            if self._only in (None, number):
                self._room(number, first, elements.size)[:] = elements
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
        room = self._room(part.tensor, first, part.size).reshape(matrix.shape)
        step = max(1, (1 << 17) // part.columns)
        for row in range(0, part.rows, step):
            levels, target = matrix[row : row + step], room[row : row + step]
            if spec.dtype == "F32":
                dequantize(levels, part, bases, row, target)
            else:
                target[:] = from_float32(dequantize(levels, part, bases, row), spec.dtype)

    def _room(self, number: int, first: int, count: int) -> Array:
        spec = self._header.tensors[number]
        if number not in self._arrays:
            try:
                self._arrays[number] = np.empty(spec.size, DTYPES[spec.dtype]), 0
            except (MemoryError, ValueError):
                raise _defect(spec, "needs more memory than there is", "limit") from None
        array, have = self._arrays[number]
        if first != have:
            raise _defect(spec, "has parts out of order")
        self._arrays[number] = array, first + count
        return array[first : first + count]

    def _take(self, number: int, digest: bytes | None = None) -> Array:
        spec = self._header.tensors[number]
        array, have = self._arrays.pop(number, (np.empty(0), -1))
        if have != spec.size:
            raise _defect(spec, "ends too early")
        if digest is not None and tensor_sha256(array)[:TENSOR_SHA_BYTES] != digest:
            raise _defect(spec, "is not what was packed", "tensor-digest")
        return array.reshape(spec.shape)


class Archive(Mapping[str, Array]):
    """An open archive: a mapping of names to tensors; made by `open_archive`.

    ``archive[name]`` reads one tensor; `items` gives all of them in file order as their frames
    arrive, which is the only way to read a pipe. BF16 comes as float32, float8 as raw bits.

    Attributes
    ----------
    header : Header
    track : Track
    index : Index or None
        None: the file is cut short, or a pipe.
    """

    def __init__(
        self, file: BinaryIO, decoder: str | PacketDecoder, threads: int, check_tensors: bool
    ) -> None:
        self.source = Source(file)
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
        self._numbers = {spec.name: number for number, spec in enumerate(self.header.tensors)}
        self._numbers.update(self.header.aliases)
        if self.header.files and self.source.seekable:
            self.source.box(self.header.files[-1].offset)
        self._start = self.source.at
        self.index = self._read_index() if self.source.seekable else None

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self.source.file.close()

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
            raise TruncatedError("the archive has no index: it is cut short", self.source.size)
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
        assembler = Assembler(self.header, number, self._check)
        for frame in self.frames(self.index.spans.get(number, range(0))):
            for _, array in assembler.add(*frame):
                return array
        for at in (at for at, numbers in self.index.boxes if number in numbers):
            for _, array in assembler.add_exact(self._payload(at, EXACT_UUID, f"box of {name!r}")):
                return array
        raise _defect(spec, "is not where the index says", "index")

    def levels(self, name: str) -> Levels:
        """Integers and step of a uniform, untransformed tensor; an error says why it has none."""
        spec, values, steps = self.spec(name), list[Array](), list[float]()

        def take(part: Part, matrix: Array) -> None:
            places, numbers = part.escapes or (np.empty(0, np.intp), np.empty(0))
            if part.method == TRELLIS:
                raise refused("its levels are trellis-coded: one integer has two meanings")
            if part.bases or part.row_steps is not None or part.frequency_steps is not None:
                raise refused("its levels are coefficients of a transform, or have steps by row")
            if not (np.abs(numbers) < 1 << 31).all():
                raise refused("it has an outlier that no 32-bit integer holds")
            values.append(matrix.astype(np.int32).reshape(-1))
            values[-1][places] = numbers
            steps.append(part.step)

        def refused(why: str) -> TensorNotFoundError:
            why = f"tensor {name!r} has no integers to compute with: {why}"
            return TensorNotFoundError(f"{why}; pack with --integer to get them")

        assembler = Assembler(self.header, self._number(name), sink=take)
        for frame in self.frames(self.info(name).frames):
            all(assembler.add(*frame))
        if not values:
            raise refused("it lies in a box beside the pictures")
        if sum(flat.size for flat in values) != spec.size:
            raise _defect(spec, "ends too early")
        return Levels(np.concatenate(values).reshape(spec.shape), steps[0])

    def info(self, name: str) -> TensorInfo:
        """What the archive says of a tensor; decodes nothing."""
        number = self._number(name)
        frames = self._indexed().spans.get(number, range(0))
        sidecars = [self.packet(frame)[0] for frame in frames]
        parts = tuple(part for side in sidecars for part in side.parts if part.tensor == number)
        ends = [end for side in sidecars for end in side.ends if end.tensor == number]
        kernel = tuple(len(self.header.bases[basis]) for basis in (parts[0].bases if parts else ()))
        return TensorInfo(self.spec(name), parts, ends[0] if ends else None, frames, kernel)

    def frames(self, numbers: range) -> Iterator[tuple[Sidecar, Array]]:
        """Sidecar and luma, uint8 of shape (height, width), of consecutive frames."""
        return _decoded(map(self.packet, numbers), self.track, self._decoder, self._threads)

    def packet(self, number: int) -> tuple[Sidecar, bytes]:
        """Sidecar and coded picture of one frame."""
        at = self._indexed().frames[number][0]
        return self._frame(self._payload(at, FRAME_UUID, f"frame {number}"), number)

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

        At the end of a file that is cut short, a `TruncatedError` names what did not arrive.
        """
        left = dict(enumerate(self.header.tensors))
        tensors = Assembler(self.header, check=self._check)
        try:
            for event in self.events():
                given = (
                    tensors.add_exact(event) if isinstance(event, bytes) else tensors.add(*event)
                )
                for number, array in given:
                    if number not in left:
                        raise _defect(self.header.tensors[number], "comes twice")
                    yield left.pop(number), array
        except TruncatedError as error:
            missing = [spec.name for spec in left.values()]
            shown = ", ".join(missing[:5]) + (" ..." if len(missing) > 5 else "")
            why = f"the archive is cut short; missing: {shown or 'its index'}"
            raise TruncatedError(why, error.offset, missing) from None
        for spec in left.values():
            raise _defect(spec, "is not in the archive")

    def events(self) -> Iterator[tuple[Sidecar, Array] | bytes]:
        """Sidecars and luma of all frames, then the payloads of boxes of exact tensors."""
        source, at, ends = self.source, self._start, list[tuple[bytes, bytes] | TruncatedError]()

        def following() -> tuple[bytes, bytes]:  # others may read from the file meanwhile
            return source.box(at if source.seekable or source.at != at else None)

        def packets() -> Packets:
            nonlocal at
            number = 0
            try:
                while (box := following())[0] in (FRAME_UUID, FILE_UUID):
                    frames = [self._frame(box[1], number)] if box[0] == FRAME_UUID else []
                    number, at = number + len(frames), source.at
                    yield from frames
                at = source.at
                ends.append(box)
            except TruncatedError as error:  # frames that the decoder still holds come first
                ends.append(error)

        yield from _decoded(packets(), self.track, self._decoder, self._threads)
        box = ends[0]
        if isinstance(box, TruncatedError):
            raise box
        while box[0] == EXACT_UUID:
            yield box[1]
            box, at = following(), source.at
        if not box[0]:
            raise TruncatedError("the archive ends before its index", source.at)
        if box[0] != INDEX_UUID:
            raise FormatError(f"unexpected box {box[0]!r}", "order", source.at)

    def items(self) -> Iterator[tuple[str, Array]]:  # type: ignore[override]
        """All tensors in file order as their frames arrive; each alias follows its target."""
        for spec, stored in self.stored_items():
            array = to_float32(stored, "BF16") if spec.dtype == "BF16" else stored
            names = [a for a, n in self.header.aliases.items() if n == self._numbers[spec.name]]
            yield from ((name, array) for name in (spec.name, *names))

    def read_file(self, path: str) -> bytes:
        """One of the small files that travel with the model (``header.files`` lists them)."""
        places = [entry.offset for entry in self.header.files if entry.path == path]
        if not places:
            raise TensorNotFoundError(f"the archive has no file {path!r}")
        return open_body(self._payload(places[0], FILE_UUID, path, "order"), f"file {path!r}")


def open_archive(
    source: str | os.PathLike[str] | BinaryIO | bytes,
    *,
    decoder: str | PacketDecoder = "software",
    threads: int = 1,
    check_tensors: bool = False,
) -> Archive:
    """Open an archive.

    Parameters
    ----------
    source : path, binary file object or bytes
        A pipe or the result of ``urlopen`` will do; such a source can be read once, by `items`.
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
    if not isinstance(source, str | os.PathLike):
        file = io.BytesIO(source) if isinstance(source, bytes) else source
        return Archive(file, decoder, threads, check_tensors)
    opened = open(source, "rb")  # noqa: SIM115, PTH123 - closed by the archive
    try:
        return Archive(opened, decoder, threads, check_tensors)
    except BaseException:
        opened.close()
        raise
