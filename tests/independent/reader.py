"""A second reader of weightvid archives, written from FORMAT.md alone.

It shares no line with the package, and says each formula as plainly as it can: where the two
disagree, one of them or the text is wrong. NumPy gives it float32, PyAV decodes the pictures.
"""

from __future__ import annotations

import hashlib
import io
import struct
import zlib
from collections.abc import Callable, Iterator
from itertools import groupby
from math import ceil, prod
from typing import Any, BinaryIO, NamedTuple

import av
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

ONE_BYTE = "F8_E4M3 F8_E5M2 F8_E8M0 F8_E4M3FNUZ F8_E5M2FNUZ F6_E2M3 F6_E3M2 F4"
SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2} | dict.fromkeys(ONE_BYTE.split(), 1)
SIZES |= {"C64": 8, "C128": 16, "C32": 4, "I64": 8, "I32": 4, "I16": 2, "I8": 1}
SIZES |= {"U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1}
DECODERS = {b"hvc1": ("hevc", b"hvcC"), b"avc1": ("h264", b"avcC"), b"av01": ("libdav1d", b"av1C")}
HEADER, FILE, FRAME = b"weightvid-header", b"weightvid-file\0\0", b"weightvid-frame\0"
EXACT, INDEX = b"weightvid-exact\0", b"weightvid-index\0"


class ArchiveError(Exception):
    """The file breaks a rule of FORMAT.md; ``code`` is one of its section 9."""

    def __init__(self, code: str, what: object) -> None:
        super().__init__(f"{code}: {what}")
        self.code = code


def require(holds: bool, code: str, what: object) -> None:
    if not holds:
        raise ArchiveError(code, what)


class Box(NamedTuple):
    """A box: its type (of ours: the extended one), the payload behind it, bytes of the box."""

    kind: bytes
    payload: bytes
    size: int


def read_box(file: BinaryIO, *allowed: bytes) -> Box:
    """Read the next box; at the end of the file its type is empty."""
    head = file.read(8)
    size, kind = struct.unpack(">I4s", head) if len(head) == 8 else (8, b"")
    require(8 <= size <= 2**27, "box-size", f"{kind!r} of {size} bytes")
    payload = file.read(size - 8)
    require(len(head) in (0, 8) and len(payload) == size - 8, "truncated", kind)
    if kind == b"uuid":
        kind, payload = payload[:16], payload[16:]
    require(kind in allowed or not allowed, "order" if kind else "truncated", (kind, allowed))
    return Box(kind, payload, size)


def children(payload: bytes) -> list[Box]:
    file = io.BytesIO(payload)
    return list(iter(lambda: read_box(file), Box(b"", b"", 8)))


def inflate(stream: bytes, size: int) -> bytes:
    """Undo one raw deflate stream; what gives more than a byte too many is refused."""
    inflater = zlib.decompressobj(-15)
    try:
        data = inflater.decompress(stream, size + 1)
    except zlib.error as error:
        raise ArchiveError("deflate", error) from error
    require(inflater.eof and not inflater.unused_data, "deflate", "not one whole stream")
    return data


def body_of(payload: bytes) -> bytes:
    """Check the CRC-32 of a box of our own and give its body."""
    require(len(payload) >= 9, "digest", "a box of our own is too short")
    crc, form, size = struct.unpack_from("<IBI", payload)
    require(zlib.crc32(payload[4:]) == crc, "digest", "CRC-32")
    require(form in (0, 1), "version", f"form {form}")
    require(size <= 2**26, "limit", f"a body of {size} bytes")
    body = inflate(payload[9:], size) if form == 1 else payload[9:]
    require(len(body) == size, "record", "the body has another size")
    return body


class Fields:
    """The fields of a record, read from the front."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, count: int) -> bytes:
        require(count <= len(self.data) - self.at, "record", "a field ends behind its record")
        self.at += count
        return self.data[self.at - count : self.at]

    def uint(self, most: int = 2**64 - 1) -> int:
        value = 0
        for place in range(10):
            byte = self.take(1)[0]
            value |= (byte & 127) << 7 * place
            if byte < 128:
                break
        require(byte < 128, "record", "a number of more than ten bytes")
        require(value <= most, "limit", f"{value} is above {most}")
        return value

    def uints(self, count: int) -> list[int]:
        return [self.uint() for _ in range(count)]

    def text(self, most: int = 2**26) -> str:
        return self.take(self.uint(most)).decode("utf-8", "surrogatepass")

    def numbers(self, code: str, count: int) -> list[Any]:
        return list(struct.unpack(f"<{count}{code}", self.take(struct.calcsize(code) * count)))

    def plane(self, size: int) -> Array:
        """Read a plane of floats, section 6: so many bytes, as they are or deflated."""
        packed = self.uint()
        data = inflate(self.take(packed), size) if packed else self.take(size)
        require(len(data) == size, "deflate", f"a plane of {len(data)} bytes, not {size}")
        return np.frombuffer(data, np.uint8).astype(np.int64)

    def finish(self) -> None:
        require(self.at == len(self.data), "record", "bytes behind the last field")


def records(body: bytes, *known: int) -> dict[int, list[Fields]]:
    """Sort the records of a body by their type; those with an even one that is not known stop."""
    found: dict[int, list[Fields]] = {kind: [] for kind in known}
    fields = Fields(body)
    while fields.at < len(body):
        kind, data = fields.uint(), fields.take(fields.uint())
        require(kind in known or kind % 2 == 1, "version", f"record type {kind}")
        found.get(kind, []).append(Fields(data))
    for kind, same in found.items():
        require(len(same) == 1 or kind not in (2, 32, 48), "record", f"one record {kind}")
        require(len(same) <= 1 or kind in (34, 36), "record", f"record {kind} is there twice")
    return found


def entries(found: list[Fields], most: int, read: Callable[[Fields], Any]) -> list[Any]:
    """Read the one record (or none) that is a count and so many entries."""
    result = [read(fields) for fields in found for _ in range(fields.uint(most))]
    for fields in found:
        fields.finish()
    return result


class Tensor(NamedTuple):
    name: str
    type: str
    shape: tuple[int, ...]


class Header:
    """Section 3: what the archive holds."""

    def __init__(self, body: bytes) -> None:
        found = records(body, 2, 4, 6, 8, 10, 12, 13)
        self.names_data = found[2][0].data
        self.tensors: list[Tensor] = entries(found[2], 2**20, self.tensor)
        self.aliases: list[tuple[str, int]] = entries(
            found[4], 2**20, lambda f: (f.text(4096), f.uint(len(self.tensors) - 1))
        )
        names = [one.name for one in self.tensors] + [name for name, _ in self.aliases]
        require(len(set(names)) == len(names), "record", "a name is there twice")
        texts = [entries(found[kind], 2**20, lambda f: (f.text(), f.text())) for kind in (6, 13)]
        self.metadata, self.about = map(dict, texts)
        self.files: list[tuple[str, str, int, int]] = entries(
            found[8], 4096, lambda f: (f.text(1024), f.text(64), f.uint(), f.uint())
        )
        self.bases: list[Array] = entries(found[10], 256, self.basis)
        self.layers, self.base, self.masks = 1, b"", [2] * len(self.tensors)
        for fields in found[12]:
            self.layers = fields.uint(16)
            self.base = fields.take(fields.uint(32))
            self.masks = fields.uints(len(self.tensors))
            fields.finish()
        good = all(0 < mask < 2 << self.layers for mask in self.masks)
        require(good and len(self.base) in (0, 32), "record", "layers")
        require(bool(self.base) or not any(mask & 1 for mask in self.masks), "record", "base")

    @staticmethod
    def tensor(fields: Fields) -> Tensor:
        name, kind = fields.text(4096), list(SIZES)[fields.uint(len(SIZES) - 1)]
        shape = tuple(fields.uints(fields.uint(32)))
        require(prod(size for size in shape if size) <= 2**38, "limit", "elements of a tensor")
        return Tensor(name, kind, shape)

    @staticmethod
    def basis(fields: Fields) -> Array:
        size = fields.uint(1024)
        return np.array([fields.numbers("f", size) for _ in range(size)], np.float32)


class Track:
    """Section 8: the codec and the size of the pictures."""

    def __init__(self, moov: bytes) -> None:
        boxes = children(moov)
        for kind in (b"trak", b"mdia", b"minf", b"stbl", b"stsd"):
            payload = next((box.payload for box in boxes if box.kind == kind), b"")
            boxes = children(payload[8 if kind == b"stsd" else 0 :])
        require(len(boxes) == 1 and boxes[0].kind in DECODERS, "moov", "no codec of this format")
        self.decoder, wanted = DECODERS[boxes[0].kind]
        self.width, self.height = sides = struct.unpack_from(">HH", boxes[0].payload, 24)
        require(all(192 <= one <= 2176 and one % 64 == 0 for one in sides), "moov", sides)
        require(prod(sides) <= 2_228_224, "moov", sides)
        self.configuration = dict(box[:2] for box in children(boxes[0].payload[78:]))[wanted]

    def luma(self, sample: bytes) -> Array:
        """Decode one sample, which needs no other."""
        context: Any = av.CodecContext.create(self.decoder, "r")
        context.extradata = self.configuration
        frames = [*context.decode(av.Packet(sample)), *context.decode(None)]
        require(len(frames) == 1, "frame-digest", f"{len(frames)} pictures in one sample")
        plane = frames[0].planes[0]
        rows = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)
        return rows[: self.height, : self.width].copy()


def trellis_numbers(row: list[int]) -> list[int]:
    """Walk the machine of section 5.2 over the levels of one row."""
    state, numbers = 0, []
    for k in row:
        odd = (state & 1) ^ (state >> 1 & 1) ^ (state >> 2 & 1)
        numbers.append(4 * k + 2 * odd)
        w = (k & 1) ^ (state >> 4 & 1)
        state = ((state << 1) | w) & 31
    return numbers


def q(t: int) -> np.float32:
    bits = (0x3F800000, 0x3F9837F0, 0x3FB504F3, 0x3FD744FD)[t & 3]
    return np.float32(np.ldexp(np.array(bits, np.uint32).view(np.float32), t >> 2))


class Part:
    """Consecutive rows of a tensor: the record of section 4, the formulas of section 5."""

    def __init__(self, fields: Fields, header: Header) -> None:
        self.tensor, self.column = fields.uint(len(header.tensors) - 1), 4 * fields.uint()
        self.first_row, rows, columns = fields.uint(), fields.uint(), fields.uint()
        require(0 < rows * columns <= 2**24, "limit", "levels of a part")
        self.rows, self.columns = rows, columns
        self.method, flags = fields.take(2)
        require(self.method < 2 and flags < 16, "version", f"method {self.method}, fields {flags}")
        self.step = np.float32(fields.numbers("f", 1)[0])
        require(bool(2.0**-110 <= self.step <= 2.0**110), "record", f"step {self.step}")
        places = [fields.uint(len(header.bases) - 1) for _ in range(fields.uint(4))]
        self.bases = [header.bases[place] for place in places]
        k = prod(len(basis) for basis in self.bases)
        self.shift = fields.take(1)[0] if places else 0
        require(self.shift <= 24, "record", f"shift {self.shift}")
        require(bool(places) or not flags & 1, "record", "steps of frequencies without any")
        require(0 < k <= 1024 and columns % k == 0, "record", f"{columns} columns, {k} frequencies")
        self.frequency_steps = fields.numbers("b", k) if flags & 1 else [0] * k
        self.row_steps = fields.numbers("b", rows) if flags & 2 else None
        self.energies = []
        if flags & 4:
            self.energies = [fields.numbers("B", count) for count in (rows, columns // k, k)]
            require(max(map(max, self.energies)) <= 63, "record", "an energy above 63")
        self.escapes: dict[int, float] = {}
        if flags & 8:
            gaps = fields.uints(fields.uint(rows * columns))
            places = [sum(gaps[: i + 1]) + i for i in range(len(gaps))]
            require(bool(gaps) and places[-1] < rows * columns, "record", "place of an escape")
            planes = [fields.take(len(gaps)) for _ in range(4)]
            found = [struct.unpack("<f", bytes(four))[0] for four in zip(*planes, strict=True)]
            self.escapes = dict(zip(places, found, strict=True))
        fields.finish()

    def order(self) -> Array:
        """Give the place (row x columns + column) of every level in coding order."""
        if not self.energies:
            return np.arange(self.rows * self.columns)
        rows, channels, frequencies = self.energies
        row_energies = np.repeat(rows, self.columns)
        classes = row_energies + np.tile([f + c for f in frequencies for c in channels], self.rows)
        return np.lexsort((-row_energies, -classes))  # stable: within a rectangle row by row

    def weights(self, samples: bytes) -> Array:
        """Give the rows x columns weights from the samples in coding order."""
        levels = np.empty(self.rows * self.columns, np.int64)
        levels[self.order()] = np.frombuffer(samples, np.uint8).astype(np.int64) - 128
        step = np.float64(self.step)
        if self.method == 1:
            grid = levels.reshape(self.rows, self.columns).tolist()
            levels = np.array([trellis_numbers(row) for row in grid]).reshape(-1)
            step /= 4
        unit = np.float32(step * 2.0**-self.shift)
        values = levels.astype(np.float32).reshape(self.rows, -1)
        if self.bases:
            values = self.kernels(levels)
        else:
            values.reshape(-1)[list(self.escapes)] = list(self.escapes.values())
        values = values * unit
        if self.row_steps is not None:
            values = values * np.array([q(t) for t in self.row_steps], np.float32)[:, None]
        return values

    def kernels(self, numbers: Array) -> Array:
        """Give the sums of section 5.4 from the numbers, as rows of [C][K1][K2]...."""
        matrix = np.array([[1]], np.float32)
        for basis in self.bases:
            products = [[a * b for a in row for b in line] for row in matrix for line in basis]
            matrix = np.array(products, np.float32)
        matrix = matrix * np.array([[q(t)] for t in self.frequency_steps], np.float32)
        whole = np.rint(matrix.astype(np.float64) * 2.0**self.shift)
        good = bool((np.abs(whole).sum(axis=0) <= 32767).all())
        require(good, "limit", "a kernel matrix is too large")
        normal = numbers.copy()
        normal[list(self.escapes)] = 0
        cut = normal.reshape(self.rows, len(whole), -1)
        sums = np.einsum("rfc,fi->rci", cut, whole.astype(np.int64)).astype(np.float32)
        for place, number in self.escapes.items():
            row, column = divmod(place, self.columns)
            f, c = divmod(column, cut.shape[2])
            sums[row, c] += np.float32(number) * whole[f].astype(np.float32)
        return sums.reshape(self.rows, -1)


class Sidecar:
    """Section 4: what stands before a frame."""

    def __init__(self, body: bytes, header: Header) -> None:
        found = records(body, 32, 34, 36)
        self.number, self.digest = found[32][0].uint(), found[32][0].take(32)
        self.parts = [Part(fields, header) for fields in found[34]]
        last = len(header.tensors) - 1
        self.ends = [(f.uint(last), f.take(8), f.numbers("h", 1)[0]) for f in found[36]]
        for fields in found[32] + found[36]:
            fields.finish()


def elements(values: Array, kind: str) -> bytes:
    """Round weights to the element type, section 5.5."""
    if kind == "BF16":
        bits = values.view(np.uint32).astype(np.uint64)
        rounded = np.where(np.isnan(values), bits | 0x400000, bits + 0x7FFF + (bits >> 16 & 1))
        return (rounded >> 16).astype("<u2").tobytes()
    return values.astype({"F32": "<f4", "F64": "<f8", "F16": "<f2"}[kind]).tobytes()


def numbers(data: bytes, kind: str) -> Array:
    """Give elements as f32, section 5.6."""
    if kind == "BF16":
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    code = {"F32": "<f4", "F64": "<f8", "F16": "<f2"}[kind]
    return np.frombuffer(data, code).astype(np.float32)


def by_planes(data: Fields, items: list[tuple[str, int]]) -> Iterator[bytes]:
    """Give the elements of each item, a type and a length, from the data of section 6."""
    for size, same in groupby(items, lambda item: SIZES[item[0]]):
        lengths = [length for _, length in same]
        planes = np.frombuffer(data.take(sum(lengths) * size), np.uint8).reshape(size, -1)
        for part in np.split(planes, np.cumsum(lengths)[:-1], axis=1):
            yield part.T.tobytes()


def by_floats(data: Fields, items: list[tuple[str, int]]) -> Iterator[bytes]:
    """Give the elements of each item from the floats of section 6."""
    kinds, counts = {kind for kind, _ in items}, [length for _, length in items]
    require(kinds in ({"F32"}, {"F16"}, {"BF16"}), "record", f"floats of {kinds}")
    (kind,), total = kinds, sum(counts)
    w, p = {"F32": (32, 23), "F16": (16, 10), "BF16": (16, 7)}[kind]
    require(total * w // 8 <= 2**26, "limit", f"{total} floats in a box")
    lengths = data.uints(len(items))
    require(0 not in lengths, "record", "rows without elements")
    require(max(lengths, default=0) <= 2**26, "limit", "long rows")
    pairs = list(zip(counts, lengths, strict=True))
    sizes = [min(row, count - at) for count, row in pairs for at in range(0, count, row)]
    low, high, z = data.plane(3 * len(sizes)).reshape(3, -1)
    scales = np.cumsum(low) % 256 + 256 * high
    require(bool((z <= p).all()), "record", f"more than {p} zero bits")
    order = np.argsort(4 * z + scales % 4, kind="stable")
    row = np.repeat(order, np.array(sizes, np.int64)[order])  # of each element of the planes
    top, middle, rest = data.plane(total), data.plane(total), np.zeros(total, np.int64)
    for j in range(ceil((p - 7) / 8)):
        there = z[row] < 8 * (j + 1)
        rest[there] += data.plane(int(there.sum())) << 8 * j
    rest %= 2 ** (p - 7)
    e = (top + 256 * (middle // 64) + 4 * (scales[row] // 4) - 128) % 2 ** (w + 1 - p)
    bits = (middle >> 5 & 1) << w - 1 | e << p - 2 | (middle & 31) << p - 7 | rest
    found = bits[np.argsort(row, kind="stable")].astype(f"<u{w // 8}")
    yield from (part.tobytes() for part in np.split(found, np.cumsum(counts)[:-1]))


def moved(below: bytes, data: bytes, size: int) -> bytes:
    """Add the numbers of section 6 to the bits of elements."""
    found = b""
    for at in range(0, len(data), size):
        u = int.from_bytes(data[at : at + size], "little")
        bits = int.from_bytes(below[at : at + size], "little")
        bits += -(u + 1) // 2 if u % 2 else u // 2
        found += (bits % 256**size).to_bytes(size, "little")
    return found


class Assembler:
    """Takes frames and exact boxes in order and gives the tensors that they complete."""

    def __init__(
        self, header: Header, track: Track, wanted: set[int], base: Callable[[str], bytes] | None
    ) -> None:
        self.header, self.track, self.wanted, self.base = header, track, wanted, base
        #: layers of a tensor that are still to come; its elements so far; those of this layer.
        self.ahead = {number: (header.masks[number] >> 1).bit_count() for number in wanted}
        self.below: dict[int, bytes] = {}
        self.done: dict[int, bytearray] = {number: bytearray() for number in wanted}
        self.open: list[tuple[Part, bytes]] = []
        self.added = 0

    def unchanged(self) -> Iterator[tuple[str, bytes]]:
        """Give the tensors that are in the base alone."""
        for number in [number for number, ahead in self.ahead.items() if not ahead]:
            self.fetch(number)
            del self.done[number]
            yield self.header.tensors[number].name, self.below[number]

    def fetch(self, number: int) -> None:
        if number not in self.below and self.header.masks[number] & 1:
            require(self.base is not None, "base", "an update without its base")
            self.below[number] = self.base(self.header.tensors[number].name)

    def extend(self, number: int, first: int, data: bytes | Array) -> None:
        tensor = self.header.tensors[number]
        size = SIZES[tensor.type]
        done = self.done.get(number, bytearray(1))
        have = len(done) // size
        require(len(done) % size == 0 and have == first, "order", f"tensor {number} from {first}")
        self.fetch(number)
        below = self.below.get(number)
        if isinstance(data, bytes):
            if below is not None:
                data = moved(below[first * size :][: len(data)], data, size)
        else:
            values = data.reshape(-1)
            if below is not None:
                values = values + numbers(below[first * size :][: values.size * size], tensor.type)
            data = elements(values, tensor.type)
        done += data

    def whole(self, number: int) -> tuple[str, bytes]:
        tensor, data = self.header.tensors[number], bytes(self.done.pop(number, b"-"))
        require(len(data) == prod(tensor.shape) * SIZES[tensor.type], "order", tensor.name)
        self.below[number] = data
        self.ahead[number] -= 1
        if self.ahead[number]:
            self.done[number] = bytearray()
        return tensor.name, data

    def frame(self, sidecar: Sidecar, sample: bytes) -> Iterator[tuple[str, bytes]]:
        luma = self.track.luma(sample)
        digest = hashlib.sha256(luma.tobytes()).digest()
        require(digest == sidecar.digest, "frame-digest", f"frame {sidecar.number}")
        bands = luma.reshape(self.track.height // 64, 64, self.track.width)
        ribbon, end = bands.transpose(0, 2, 1).tobytes(), 0
        parts, self.open = [*self.open, *((part, b"") for part in sidecar.parts)], []
        for part, before in parts:
            if part.tensor in self.wanted:
                start, size = 0 if before else 64 * part.column, part.rows * part.columns
                require(end <= start < len(ribbon), "order", "parts overlap or leave the frame")
                end = start + size - len(before)
                samples = before + ribbon[start:end]
                if len(samples) < size:
                    self.open = [(part, samples)]
                    continue
                self.extend(part.tensor, part.first_row * part.columns, part.weights(samples))
        for number, start_of_digest, _ in sidecar.ends:
            if number in self.wanted:
                name, data = self.whole(number)
                require(hashlib.sha256(data).digest()[:8] == start_of_digest, "tensor-digest", name)
                yield name, data  # of a layer; the last one counts

    def exact(self, payload: bytes) -> Iterator[tuple[str, bytes]]:
        found, tensors = records(body_of(payload), 48, 50, 54), self.header.tensors
        require(len(found[50] + found[54]) == 1, "record", "data and floats, or neither")
        last = len(tensors) - 1
        items = entries(found[48], 2**20, lambda f: (f.uint(last), f.uint(), f.uint()))
        (data,), pieces = found[50] + found[54], by_floats if found[54] else by_planes
        whole = list(pieces(data, [(tensors[number].type, size) for number, _, size in items]))
        data.finish()
        for (number, first, size), piece in zip(items, whole, strict=True):
            if number in self.wanted:
                self.extend(number, first, piece)
                if first + size == prod(tensors[number].shape):
                    yield self.whole(number)


class Archive:
    """An open archive, read up to its first frame; then `stream` it once, or `read` tensors."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        ftyp = read_box(file)
        brands = [ftyp.payload[at : at + 4] for at in range(8, len(ftyp.payload), 4)]
        require(ftyp.kind == b"ftyp" and b"wvid" in brands, "ftyp", brands)
        moov, head = read_box(file, b"moov"), read_box(file, HEADER)
        self.track, self.header = Track(moov.payload), Header(body_of(head.payload))
        self.names = {one.name: number for number, one in enumerate(self.header.tensors)}
        self.files: dict[str, bytes] = {}
        for path, _, size, box_size in self.header.files:
            box = read_box(file, FILE)
            self.files[path] = body_of(box.payload)
            require((len(self.files[path]), box.size) == (size, box_size), "record", path)
        self.start = ftyp.size + moov.size + head.size + sum(one[3] for one in self.header.files)
        self.lumas: list[str] = []
        self.base: Callable[[str], bytes] | None = None
        self.stored_root = b""

    def read_frame(self, payload: bytes) -> tuple[Sidecar, bytes]:
        sidecar = Sidecar(body_of(payload), self.header)
        moof, mdat = read_box(self.file, b"moof"), read_box(self.file, b"mdat")
        (mfhd,) = (box.payload for box in children(moof.payload) if box.kind == b"mfhd")
        require(struct.unpack(">I", mfhd[4:8])[0] == sidecar.number + 1, "order", "mfhd")
        return sidecar, mdat.payload

    def use_base(self, base: Archive) -> None:
        """Take a base, of the right root."""
        require(base.root() == self.header.base, "base", base.root().hex())
        self.base = base.read

    def root(self) -> bytes:
        """Compute the root from all tensors, and compare it with that of the index."""
        self.read_index()
        heads = b"".join(
            hashlib.sha256(self.read(one.name)).digest()[:8] for one in self.header.tensors
        )
        root = hashlib.sha256(self.header.names_data + heads).digest()
        require(self.stored_root in (b"", root), "tensor-digest", "root")
        return root

    def stream(self) -> Iterator[tuple[str, bytes]]:
        """Read on, front to back, and give each tensor as soon as a layer of it is there."""
        assembler = Assembler(self.header, self.track, set(self.names.values()), self.base)
        yield from assembler.unchanged()
        box = read_box(self.file, FRAME, EXACT, INDEX)
        for _ in range(self.header.layers):
            while box.kind == FRAME:
                sidecar, sample = self.read_frame(box.payload)
                require(sidecar.number == len(self.lumas), "order", f"frame {sidecar.number}")
                self.lumas.append(sidecar.digest.hex())
                yield from assembler.frame(sidecar, sample)
                box = read_box(self.file, FRAME, EXACT, INDEX)
            while box.kind == EXACT:
                yield from assembler.exact(box.payload)
                box = read_box(self.file, FRAME, EXACT, INDEX)
        require(box.kind == INDEX, "order", box.kind)
        read_box(self.file, b"mfra")
        require(not assembler.done, "order", f"no tensors {sorted(assembler.done)}")

    def read_index(self) -> dict[int, list[int]]:
        """Give the offsets of the sidecars and exact boxes of every tensor."""
        length = self.file.seek(-4, io.SEEK_END) + 4
        mfra = length - struct.unpack(">I", self.file.read(4))[0]
        self.file.seek(mfra - 4)
        size = struct.unpack("<I", self.file.read(4))[0]
        self.file.seek(mfra - size)
        box = read_box(self.file, INDEX)
        require(box.size == size, "index", "the size at the end of the index box")
        found = records(body_of(box.payload[:-4]), 64, 66, 68, 70, 73)
        frames = entries(found[64], 2**24, Fields.uint)
        boxes = entries(found[68], 2**20, lambda f: (f.uint(), f.uints(f.uint())))
        stages = entries(found[70], 16, lambda f: f.uints(2)) or [[len(frames), len(boxes)]]
        self.stored_root = found[73][0].take(32) if found[73] else b""
        at, offsets, places, first = self.start, list[int](), dict[int, list[int]](), 0
        for frame_count, box_count in stages:
            for _ in range(frame_count):
                offsets.append(at)
                at += frames[len(offsets) - 1]
            for size, tensors in boxes[:box_count]:
                for tensor in tensors:
                    places.setdefault(tensor, []).append(at)
                at += size
            boxes = boxes[box_count:]
        require(len(offsets) == len(frames) and not boxes, "record", "stages")
        for tensor, gap, count in entries(found[66], 2**24, lambda f: f.uints(3)):
            first += gap
            places.setdefault(tensor, []).extend(offsets[first : first + count])
        require(at + box.size == mfra, "index", "sizes that do not reach the index")
        return {tensor: sorted(dict.fromkeys(own)) for tensor, own in places.items()}

    def read(self, name: str) -> bytes:
        """Read one tensor's bytes, touching only the index and its own frames or boxes."""
        number = (self.names | dict(self.header.aliases))[name]
        assembler = Assembler(self.header, self.track, {number}, self.base)
        found = list(assembler.unchanged())
        for at in self.read_index().get(number, []):
            self.file.seek(at)
            box = read_box(self.file, FRAME, EXACT)
            frame = box.kind == FRAME and self.read_frame(box.payload)
            found += assembler.frame(*frame) if frame else assembler.exact(box.payload)
        require(not assembler.done, "index", f"{name} is not where the index says")
        return dict(found)[self.header.tensors[number].name]
