"""Scalar quantizers: uniform levels of fixed length, entropy-coded, and moved to few values.

What all quantizers of the research share is here, too: matrices as levels, levels as one run, and
an entropy coder of integers in known contexts. That is asymmetric numeral systems, by the package
constriction, with static frequencies for each context, which are stored with the data: so sizes are
exact and hold all side information.
"""

import struct
import zlib
from collections.abc import Sequence
from importlib import import_module
from math import log2, prod
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from weightvid.levels.transform import View, whole_basis

Integers = npt.NDArray[Any]
#: in steps: integers, or not.
Matrix = npt.NDArray[Any]
Floats64 = npt.NDArray[np.float64]

#: squared steps that a bit is worth: the slope of a uniform quantizer of fine steps, 2 ln 2 / 12.
SLOPE: Final = 0.1155
#: largest frequency of a context.
_SCALE: Final = 1 << 12
#: lengths of the tables and of the words.
_HEAD: Final = struct.Struct("<II")


def encode(symbols: Integers, contexts: Integers) -> bytes:
    """Bytes of integers, each coded in its context.

    Contexts are small numbers from 0 on; the decoder must have them.
    """
    groups = [symbols[contexts == number] for number in range(int(contexts.max(initial=-1)) + 1)]
    lows = np.array([own.min(initial=0) for own in groups], np.int32)
    tables = [_frequencies(own - low) for own, low in zip(groups, lows, strict=True)]
    sizes = np.array([len(table) for table in tables], np.int32)
    parts = (struct.pack("<I", len(groups)), lows, sizes, *tables)
    listed = zlib.compress(b"".join(map(bytes, parts)), 9)
    coder = import_module("constriction").stream.stack.AnsCoder()
    for own, low, model in reversed(list(zip(groups, lows, _models(tables), strict=True))):
        coder.encode_reverse((own - low).astype(np.int32), model)
    words: bytes = coder.get_compressed().tobytes()
    return _HEAD.pack(len(listed), len(words)) + listed + words


def decode(data: bytes, contexts: Integers) -> tuple[npt.NDArray[np.int64], bytes]:
    """Integers that were encoded in these contexts, and the bytes that follow them."""
    listed, size = _HEAD.unpack_from(data)
    end = _HEAD.size + listed
    raw = zlib.decompress(data[_HEAD.size : end])
    (count,) = struct.unpack_from("<I", raw)
    lows, sizes = np.frombuffer(raw, np.int32, 2 * count, 4).reshape(2, count)
    body = np.frombuffer(raw, np.uint16, offset=4 + 8 * count)
    tables = np.split(body, np.cumsum(sizes)[:-1]) if count else []
    words = np.frombuffer(data, np.uint32, size // 4, end)
    coder = import_module("constriction").stream.stack.AnsCoder(words)
    found = np.empty(len(contexts), np.int64)
    for number, (low, model) in enumerate(zip(lows, _models(tables), strict=True)):
        here = np.flatnonzero(contexts == number)
        found[here] = coder.decode(model, here.size) + low
    return found, data[end + size :]


def _frequencies(symbols: Integers) -> npt.NDArray[np.uint16]:
    """How often numbers from 0 on occur, in about 12 bits; two of them at least."""
    counts = np.bincount(symbols, minlength=2)
    found = np.ceil(counts * (_SCALE / max(1, int(counts.max()))))
    return np.asarray(found, np.uint16)


def _models(tables: Sequence[npt.NDArray[np.uint16]]) -> list[Any]:
    kind = import_module("constriction").stream.model.Categorical
    return [kind(np.maximum(table, 1e-3).astype(np.float32), perfect=False) for table in tables]


def shape_of(view: View) -> tuple[int, int, int]:
    """Rows, channels, kernel positions."""
    return view.rows, view.channels, prod(view.kernel)


def flattened(parts: Sequence[Integers]) -> Integers:
    """All values of all parts."""
    return np.concatenate([np.zeros(0, np.int64), *(part.reshape(-1) for part in parts)])


def in_shapes(values: Integers, shapes: Sequence[tuple[int, ...]]) -> list[Integers]:
    """Consecutive runs of values in the shapes."""
    ends = np.cumsum([prod(shape) for shape in shapes])[:-1]
    cuts = np.split(values[: sum(map(prod, shapes))], ends)
    return [cut.reshape(shape) for cut, shape in zip(cuts, shapes, strict=True)]


def rounded(matrices: Sequence[Floats64]) -> list[Integers]:
    """The nearest levels."""
    return [np.rint(x).astype(np.int64) for x in matrices]


def coefficients(matrices: Sequence[Floats64], views: Sequence[View]) -> list[Floats64]:
    """The DCT of all kernels."""
    return [np.asarray(x @ whole_basis(v.kernel).T) for x, v in zip(matrices, views, strict=True)]


def from_coefficients(found: Sequence[Matrix], views: Sequence[View]) -> list[Matrix]:
    """Kernels of their DCT."""
    return [np.asarray(x @ whole_basis(v.kernel)) for x, v in zip(found, views, strict=True)]


#: classes of frequencies: the sum of both, 4 at most.
CLASSES: Final = 5


def classes_of(view: View, dct: bool) -> Integers:
    """Class of each kernel position: one, or that of its frequency."""
    places = np.indices(view.kernel if dct else (1,) * len(view.kernel))
    sums = np.asarray(places.sum(axis=0) if view.kernel else np.zeros(1, np.int64))
    found = np.minimum(sums, CLASSES - 1).reshape(-1)
    return np.broadcast_to(found, prod(view.kernel)) if found.size == 1 else found


def contexts_of(views: Sequence[View], dct: bool) -> Integers:
    """Context of each level: its tensor, and where it is a coefficient its frequency class."""
    return flattened([
        np.broadcast_to(CLASSES * number + classes_of(view, dct), shape_of(view))
        for number, view in enumerate(views)
    ])  # fmt: skip


class Uniform(NamedTuple):
    """Levels by rounding, with ``dct`` of the kernels' coefficients, entropy-coded.

    If ``rate_aware``, a level is moved towards zero where the bits that saves outweigh the error.
    """

    dct: bool
    rate_aware: bool = False

    def encode(self, matrices: Sequence[Floats64], views: Sequence[View]) -> bytes:
        """Bytes of matrices."""
        scaled = coefficients(matrices, views) if self.dct else matrices
        levels, contexts = flattened(rounded(scaled)), contexts_of(views, self.dct)
        if self.rate_aware:
            levels = _cheapened(np.concatenate([x.reshape(-1) for x in scaled]), levels, contexts)
        return encode(levels, contexts)

    def decode(self, data: bytes, views: Sequence[View]) -> list[Matrix]:
        """Matrices of bytes."""
        levels, _ = decode(data, contexts_of(views, self.dct))
        found = in_shapes(levels, [shape_of(view) for view in views])
        return from_coefficients(found, views) if self.dct else found


def _cheapened(scaled: Floats64, levels: Integers, contexts: Integers) -> Integers:
    """Levels of which each is the nearest or the next towards zero, by error and bits."""
    nearest, nearer = levels, levels - np.sign(levels)
    most = int(np.abs(levels).max(initial=0))
    for _ in range(4):
        counts = np.full((int(contexts.max(initial=0)) + 1, 2 * most + 1), 0.3)
        np.add.at(counts, (contexts, levels + most), 1)
        bits = -np.log2(counts / counts.sum(axis=1, keepdims=True))
        costs = [
            np.square(scaled - each) + SLOPE * bits[contexts, each + most]
            for each in (nearest, nearer)
        ]
        levels = np.where(costs[1] < costs[0], nearer, nearest)
    return levels


def _to_bits(values: Integers, bits: int) -> bytes:
    """Numbers from 0 on, each in so many bits."""
    return np.packbits((values.reshape(-1, 1) >> np.arange(bits)) & 1).tobytes()


def _from_bits(data: bytes, count: int, bits: int) -> tuple[Integers, bytes]:
    size = -(-count * bits // 8)
    found = np.unpackbits(np.frombuffer(data, np.uint8, size), count=count * bits)
    weights = 1 << np.arange(bits)
    return found.reshape(count, bits).astype(np.int64) @ weights, data[size:]


class FixedLength(NamedTuple):
    """Levels by rounding, of each matrix in as many bits as its range takes."""

    def encode(self, matrices: Sequence[Floats64], views: Sequence[View]) -> bytes:
        """Bytes of matrices."""
        data = b""
        for levels in rounded(matrices):
            low = int(levels.min(initial=0))
            bits = int(levels.max(initial=0) - low).bit_length()
            data += struct.pack("<iB", low, bits) + _to_bits(levels - low, bits)
        return data

    def decode(self, data: bytes, views: Sequence[View]) -> list[Matrix]:
        """Matrices of bytes."""
        found = []
        for shape in map(shape_of, views):
            low, bits = struct.unpack_from("<iB", data)
            levels, data = _from_bits(data[5:], prod(shape), bits)
            found.append((levels + low).reshape(shape))
        return found


#: weights of a block, which has a codebook of its own.
_BLOCK: Final = 128


def _clustered(blocks: Integers, clusters: int) -> tuple[Integers, Integers]:
    """Symbols (0: zero, k: centre k - 1 of the block) and centres of blocks of levels."""
    filled = blocks != 0
    mean = np.abs(blocks).sum(axis=1) / np.maximum(filled.sum(axis=1), 1)
    half = clusters // 2
    spread = (np.arange(half) + 0.5) / half * 2
    centres = mean[:, None] * np.concatenate([-spread[::-1], spread])
    for last in (False,) * 8 + (True,):
        if last:
            centres = np.rint(centres)
        chosen = np.abs(blocks[:, :, None] - centres[:, None, :]).argmin(axis=2)
        for k in range(0 if last else clusters):
            own = filled & (chosen == k)
            count = own.sum(axis=1)
            sums = (blocks * own).sum(axis=1)
            centres[:, k] = np.where(count > 0, sums / np.maximum(count, 1), centres[:, k])
    return np.where(filled, chosen + 1, 0), centres.astype(np.int64)


def _blocks_of(count: int) -> int:
    return -(-count // _BLOCK)


class Lnq(NamedTuple):
    """Uniform levels, those of a block that are not zero moved to a few centres.

    ``clusters`` is a power of two. Without ``entropy`` coding there are a map of zeros and indices
    of fixed length.
    """

    clusters: int
    entropy: bool

    def encode(self, matrices: Sequence[Floats64], views: Sequence[View]) -> bytes:
        """Bytes of matrices."""
        symbols, books = [], []
        for levels in rounded(matrices):
            padded = np.zeros(_blocks_of(levels.size) * _BLOCK, np.int64)
            padded[: levels.size] = levels.reshape(-1)
            chosen, centres = _clustered(padded.reshape(-1, _BLOCK), self.clusters)
            symbols.append(chosen.reshape(-1)[: levels.size])
            books.append(centres)
        chosen, centres = flattened(symbols), flattened(books)
        if self.entropy:
            numbers = np.repeat(np.arange(len(symbols)), [len(s) for s in symbols])
            places = np.arange(len(centres)) % self.clusters
            return encode(chosen, numbers) + encode(centres, places)
        low = int(centres.min(initial=0))
        bits = int(centres.max(initial=0) - low).bit_length()
        filled = chosen > 0
        data = struct.pack("<iB", low, bits) + _to_bits(filled.astype(np.int64), 1)
        data += _to_bits(chosen[filled] - 1, round(log2(self.clusters)))
        return data + _to_bits(centres - low, bits)

    def decode(self, data: bytes, views: Sequence[View]) -> list[Matrix]:
        """Matrices of bytes."""
        sizes = [prod(shape_of(view)) for view in views]
        total = self.clusters * sum(map(_blocks_of, sizes))
        if self.entropy:
            chosen, data = decode(data, np.repeat(np.arange(len(sizes)), sizes))
            centres, _ = decode(data, np.arange(total) % self.clusters)
        else:
            low, bits = struct.unpack_from("<iB", data)
            chosen, data = _from_bits(data[5:], sum(sizes), 1)
            places = np.flatnonzero(chosen)
            picked, data = _from_bits(data, len(places), round(log2(self.clusters)))
            chosen[places] += picked
            centres = _from_bits(data, total, bits)[0] + low
        # Centre 0 stands for zeros.
        books = np.pad(centres.reshape(-1, self.clusters), ((0, 0), (1, 0)))
        found, first = [], 0
        for view, own in zip(views, in_shapes(chosen, [(size,) for size in sizes]), strict=True):
            blocks = first + np.arange(own.size) // _BLOCK
            found.append(books[blocks, own].reshape(shape_of(view)))
            first += _blocks_of(own.size)
        return found
