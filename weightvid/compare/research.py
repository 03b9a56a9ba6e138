"""Quantizers of the research that this grew out of, without training, as rows of a comparison.

Each turns all matrices of a model into bytes at one step, and the bytes back into matrices; shapes
and names are known to both sides, as with the plain ways. docs/research.md says where they come
from and what was measured.
"""

from __future__ import annotations

import lzma
import struct
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from math import log2, prod, sqrt
from time import perf_counter
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from weightvid.compare.model import Array, Coded, Method, Model
from weightvid.compare.rans import decode, encode
from weightvid.exact import exact_elements
from weightvid.levels.transform import View, view_of, whole_basis

Integers = npt.NDArray[Any]
Floats64 = npt.NDArray[np.float64]

#: steps in units of the root mean square of all weights.
FACTORS: Final = (0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8)
#: squared steps that a bit is worth: the slope of a uniform quantizer of fine steps, 2 ln 2 / 12.
_SLOPE: Final = 0.1155
#: mantissa bits of what is no matrix, as in weightvid's own recipes.
_MANTISSA_BITS: Final = 8


class Scheme(NamedTuple):
    """A quantizer: matrices and a step to bytes; bytes and views to matrices.

    A matrix has the shape (rows, channels, kernel positions).
    """

    encode: Callable[[Sequence[Floats64], Sequence[View], float], bytes]
    decode: Callable[[bytes, Sequence[View]], list[Floats64]]


def research_methods() -> Iterator[Method]:
    """Every untrained method of the research, and the scalar quantizers it is judged against."""
    for name, scheme in SCHEMES.items():
        code = partial(_code, scheme)
        depends = ("compare/research", "compare/rans", "levels/transform")
        yield Method(
            f"research {name}", "research", code, "step factor", FACTORS, depends=depends
        )  # fmt: skip


def _code(scheme: Scheme, model: Model, factor: float) -> Coded:
    began = perf_counter()
    matrices = model.matrices()
    views = [view_of(tensor.shape) for tensor in matrices.values()]
    shaped = [
        tensor.astype(np.float64).reshape(_shape(view))
        for view, tensor in zip(views, matrices.values(), strict=True)
    ]
    count = max(1, sum(each.size for each in shaped))
    step = factor * sqrt(sum(float(np.square(x).sum()) for x in shaped) / count) or 1.0
    data = scheme.encode(shaped, views, step)
    kept = {
        spec.name: exact_elements(model.tensors[spec.name], spec, _MANTISSA_BITS)
        for spec in model.specs
        if spec.name not in matrices
    }
    other = lzma.compress(b"".join(array.tobytes() for array in kept.values()))
    coded = perf_counter()
    restored: dict[str, Array] = {
        name: array.astype(model.tensors[name].dtype) for name, array in kept.items()
    }
    for (name, tensor), found in zip(matrices.items(), scheme.decode(data, views), strict=True):
        restored[name] = found.reshape(tensor.shape).astype(tensor.dtype)
    tensors = {name: restored[name] for name in model.tensors}
    return Coded(len(data) + len(other), tensors, coded - began, perf_counter() - coded)


def _shape(view: View) -> tuple[int, int, int]:
    return view.rows, view.channels, prod(view.kernel)


def _flat(parts: Sequence[Integers]) -> Integers:
    return np.concatenate([np.zeros(0, np.int64), *(part.reshape(-1) for part in parts)])


def _cut(values: Integers, shapes: Sequence[tuple[int, ...]]) -> list[Integers]:
    """Consecutive runs of values in the shapes."""
    ends = np.cumsum([prod(shape) for shape in shapes])[:-1]
    cuts = np.split(values[: sum(map(prod, shapes))], ends)
    return [cut.reshape(shape) for cut, shape in zip(cuts, shapes, strict=True)]


# --- uniform: without and with entropy coding, and with the DCT -----------------------------------


def _rounded(matrices: Sequence[Floats64], step: float) -> list[Integers]:
    return [np.rint(x / step).astype(np.int64) for x in matrices]


def _coefficients(matrices: Sequence[Floats64], views: Sequence[View]) -> list[Floats64]:
    pairs = zip(matrices, views, strict=True)
    return [np.asarray(x @ whole_basis(view.kernel).T) for x, view in pairs]


def _from_coefficients(found: Sequence[Floats64], views: Sequence[View]) -> list[Floats64]:
    pairs = zip(found, views, strict=True)
    return [np.asarray(x @ whole_basis(view.kernel)) for x, view in pairs]


#: classes of frequencies: the sum of both, 4 at most.
_CLASSES: Final = 5


def _classes(view: View, dct: bool) -> Integers:
    """Class of each kernel position: one, or that of its frequency."""
    places = np.indices(view.kernel if dct else (1,) * len(view.kernel))
    sums = np.asarray(places.sum(axis=0) if view.kernel else np.zeros(1, np.int64))
    found = np.minimum(sums, _CLASSES - 1).reshape(-1)
    return np.broadcast_to(found, prod(view.kernel)) if found.size == 1 else found


def _contexts(views: Sequence[View], dct: bool) -> Integers:
    """Context of each level: its tensor, and where it is a coefficient its frequency class."""
    return _flat([
        np.broadcast_to(_CLASSES * number + _classes(view, dct), _shape(view))
        for number, view in enumerate(views)
    ])  # fmt: skip


class Uniform(NamedTuple):
    """Levels by rounding, entropy-coded.

    Attributes
    ----------
    dct : bool
        Of the kernels' coefficients.
    rate_aware : bool
        A level is moved towards zero where the bits that saves outweigh the error.
    """

    dct: bool
    rate_aware: bool = False

    def encode(self, matrices: Sequence[Floats64], views: Sequence[View], step: float) -> bytes:
        """Bytes of matrices."""
        scaled = [x / step for x in (_coefficients(matrices, views) if self.dct else matrices)]
        levels, contexts = _flat(_rounded(scaled, 1.0)), _contexts(views, self.dct)
        if self.rate_aware:
            levels = _cheapened(np.concatenate([x.reshape(-1) for x in scaled]), levels, contexts)
        return struct.pack("<d", step) + encode(levels, contexts)

    def decode(self, data: bytes, views: Sequence[View]) -> list[Floats64]:
        """Matrices of bytes."""
        (step,) = struct.unpack_from("<d", data)
        levels, _ = decode(data[8:], _contexts(views, self.dct))
        found = [x * step for x in _cut(levels, [_shape(view) for view in views])]
        return _from_coefficients(found, views) if self.dct else found


def _cheapened(scaled: Floats64, levels: Integers, contexts: Integers) -> Integers:
    """Levels of which each is the nearest or the next towards zero, by error and bits."""
    nearest, nearer = levels, levels - np.sign(levels)
    most = int(np.abs(levels).max(initial=0))
    for _ in range(4):
        counts = np.full((int(contexts.max(initial=0)) + 1, 2 * most + 1), 0.3)
        np.add.at(counts, (contexts, levels + most), 1)
        bits = -np.log2(counts / counts.sum(axis=1, keepdims=True))
        costs = [
            np.square(scaled - each) + _SLOPE * bits[contexts, each + most]
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


def _fixed_encode(matrices: Sequence[Floats64], _: Sequence[View], step: float) -> bytes:
    data = struct.pack("<d", step)
    for levels in _rounded(matrices, step):
        low = int(levels.min(initial=0))
        bits = int(levels.max(initial=0) - low).bit_length()
        data += struct.pack("<iB", low, bits) + _to_bits(levels - low, bits)
    return data


def _fixed_decode(data: bytes, views: Sequence[View]) -> list[Floats64]:
    (step,), data = struct.unpack_from("<d", data), data[8:]
    found = []
    for shape in map(_shape, views):
        low, bits = struct.unpack_from("<iB", data)
        levels, data = _from_bits(data[5:], prod(shape), bits)
        found.append((levels + low).reshape(shape) * step)
    return found


# --- local non-linear quantization ----------------------------------------------------------------

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

    Attributes
    ----------
    clusters : int
        A power of two.
    entropy : bool
        Entropy-coded; otherwise a map of zeros and indices of fixed length.
    """

    clusters: int
    entropy: bool

    def encode(self, matrices: Sequence[Floats64], views: Sequence[View], step: float) -> bytes:
        """Bytes of matrices."""
        symbols, books = [], []
        for levels in _rounded(matrices, step):
            padded = np.zeros(_blocks_of(levels.size) * _BLOCK, np.int64)
            padded[: levels.size] = levels.reshape(-1)
            chosen, centres = _clustered(padded.reshape(-1, _BLOCK), self.clusters)
            symbols.append(chosen.reshape(-1)[: levels.size])
            books.append(centres)
        head, chosen, centres = struct.pack("<d", step), _flat(symbols), _flat(books)
        if self.entropy:
            numbers = np.repeat(np.arange(len(symbols)), [len(s) for s in symbols])
            places = np.arange(len(centres)) % self.clusters
            return head + encode(chosen, numbers) + encode(centres, places)
        low = int(centres.min(initial=0))
        bits = int(centres.max(initial=0) - low).bit_length()
        head += struct.pack("<iB", low, bits)
        filled = chosen > 0
        head += _to_bits(filled.astype(np.int64), 1)
        head += _to_bits(chosen[filled] - 1, round(log2(self.clusters)))
        return head + _to_bits(centres - low, bits)

    def decode(self, data: bytes, views: Sequence[View]) -> list[Floats64]:
        """Matrices of bytes."""
        (step,), data = struct.unpack_from("<d", data), data[8:]
        sizes = [prod(_shape(view)) for view in views]
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
        for view, own in zip(views, _cut(chosen, [(size,) for size in sizes]), strict=True):
            blocks = first + np.arange(own.size) // _BLOCK
            found.append(books[blocks, own].reshape(_shape(view)) * step)
            first += _blocks_of(own.size)
        return found


# --- prediction of kernels from earlier ones ------------------------------------------------------

#: how far back a kernel may refer, and by what its reference may be multiplied, in halves.
_WINDOW: Final = 256
_SCALES: Final = np.array([2, -2, 1, -1])
#: kernels whose references are searched for at a time.
_CHUNK: Final = 128


class KernelPrediction(NamedTuple):
    """Levels of a kernel less those of an earlier one, scaled, where that is cheaper.

    The levels are those of uniform quantization, with or without the DCT: only bits are saved.
    """

    dct: bool

    def encode(self, matrices: Sequence[Floats64], views: Sequence[View], step: float) -> bytes:
        """Bytes of matrices."""
        levels = _rounded(_coefficients(matrices, views) if self.dct else matrices, step)
        flags, references, residuals = [], [], []
        history: dict[int, Integers] = {}
        for view, own in zip(views, levels, strict=True):
            kernels = own.reshape(-1, own.shape[2])
            if not view.kernel:
                residuals.append(kernels)
                continue
            before = history.get(own.shape[2], np.zeros((0, own.shape[2]), np.int64))
            every = np.concatenate([before, kernels])
            history[own.shape[2]] = every[-_WINDOW:]
            chosen = _references(every, len(before))
            predicted = np.flatnonzero(chosen >= 0)
            residual = kernels.copy()
            back, scale = chosen[predicted] // len(_SCALES), chosen[predicted] % len(_SCALES)
            source = every[len(before) + predicted - 1 - back]
            residual[predicted] -= _scaled(source, _SCALES[scale][:, None])
            flags.append((chosen >= 0).astype(np.int64))
            references.append(chosen[predicted])
            residuals.append(residual)
        marks = _flat(flags)
        data = struct.pack("<d", step) + encode(marks, self._flag_contexts(views))
        refs = _flat(references)
        data += encode(refs, np.zeros(len(refs), np.int64))
        return data + encode(_flat(residuals), self._contexts(views, marks))

    def decode(self, data: bytes, views: Sequence[View]) -> list[Floats64]:
        """Matrices of bytes."""
        (step,) = struct.unpack_from("<d", data)
        marks, data = decode(data[8:], self._flag_contexts(views))
        refs, data = decode(data, np.zeros(int(marks.sum()), np.int64))
        residuals, _ = decode(data, self._contexts(views, marks))
        found = _cut(residuals, [_shape(view) for view in views])
        history: dict[int, Integers] = {}
        flags, numbers = iter(marks.tolist()), iter(refs.tolist())
        for view, own in zip(views, found, strict=True):
            if not view.kernel:
                continue
            kernels = own.reshape(-1, own.shape[2])
            before = history.get(own.shape[2], np.zeros((0, own.shape[2]), np.int64))
            every = np.concatenate([before, kernels])
            for place in range(len(before), len(every)):
                if next(flags):
                    back, scale = divmod(next(numbers), len(_SCALES))
                    every[place] += _scaled(every[place - 1 - back], _SCALES[scale])
            own[:] = every[len(before) :].reshape(own.shape)
            history[own.shape[2]] = every[-_WINDOW:]
        values = [own * step for own in found]
        return _from_coefficients(values, views) if self.dct else values

    def _flag_contexts(self, views: Sequence[View]) -> Integers:
        counts = [view.rows * view.channels for view in views if view.kernel]
        return np.repeat(np.arange(len(counts)), counts)

    def _contexts(self, views: Sequence[View], marks: Integers) -> Integers:
        """Context of each residual: as without prediction, and whether there was one."""
        counts = [view.rows * view.channels if view.kernel else 0 for view in views]
        own = iter(_cut(marks, [(count,) for count in counts]))
        found = []
        for number, view in enumerate(views):
            flags = next(own) if view.kernel else (next(own), np.zeros(1, np.int64))[1]
            classes = _CLASSES * number + _classes(view, self.dct)
            every = 2 * classes + flags.reshape(-1, 1)
            found.append(np.broadcast_to(every, (view.rows * view.channels, classes.size)))
        return _flat(found)


def _scaled(levels: Integers, halves: Integers) -> Integers:
    return (levels * halves) >> 1


def _references(kernels: Integers, first: int) -> Integers:
    """Best reference of each kernel from ``first`` on: 4 x distance + scale; -1: none."""
    most = int(np.abs(kernels).max(initial=0))
    # What a level costs at each kernel position, by its magnitude.
    counts = np.stack([np.bincount(x, minlength=2 * most + 1) for x in np.abs(kernels[first:]).T])
    shares = (counts + 0.3) / (counts + 0.3).sum(axis=1, keepdims=True)
    bits = -np.log2(shares) + (np.arange(2 * most + 1) > 0)
    bits = np.maximum.accumulate(bits, axis=1).astype(np.float32)
    position = np.arange(kernels.shape[1])
    price = log2(_WINDOW * len(_SCALES)) + 2
    padded = np.concatenate([np.zeros((_WINDOW, kernels.shape[1]), np.int64), kernels])
    found = []
    for start in range(first, len(kernels), _CHUNK):
        own = kernels[start : start + _CHUNK]
        # Reference ``back`` of kernel i is kernel i - 1 - back.
        places = _WINDOW + start + np.arange(len(own))[:, None] - 1 - np.arange(_WINDOW)
        window = padded[places]
        cost = np.stack([
            bits[position, np.abs(own[:, None] - _scaled(window, halves))].sum(axis=2)
            for halves in _SCALES
        ], axis=2)  # fmt: skip
        cost[places < _WINDOW] = np.inf
        flat = cost.reshape(len(own), -1)
        best = flat.argmin(axis=1)
        gain = bits[position, np.abs(own)].sum(axis=1) - flat[np.arange(len(own)), best]
        found.append(np.where(gain > price, best, -1))
    return _flat(found)


# --- a codebook of kernels for the whole network --------------------------------------------------


class Codebook(NamedTuple):
    """Entropy-constrained vector quantization of kernels by one codebook for each kernel size.

    Attributes
    ----------
    entries : int
        At most; those that nothing refers to are left out.
    """

    entries: int

    def encode(self, matrices: Sequence[Floats64], views: Sequence[View], step: float) -> bytes:
        """Bytes of matrices; those without kernels are quantized as scalars."""
        data = struct.pack("<d", step)
        pairs = list(zip(matrices, views, strict=True))
        scalar = [(x, view) for x, view in pairs if not view.kernel]
        levels = _rounded([x for x, _ in scalar], step)
        data += encode(_flat(levels), _contexts([view for _, view in scalar], dct=False))
        for size in _kernel_sizes(views):
            vectors = np.concatenate([
                x.reshape(-1, size) for x, view in pairs if view.kernel and x.shape[2] == size
            ])  # fmt: skip
            book, chosen = _ecvq(vectors / step, min(self.entries, len(vectors) // 8 + 1))
            data += struct.pack("<I", len(book))
            data += encode(book.reshape(-1), np.zeros(book.size, np.int64))
            data += encode(chosen, np.zeros(len(chosen), np.int64))
        return data

    def decode(self, data: bytes, views: Sequence[View]) -> list[Floats64]:
        """Matrices of bytes."""
        (step,) = struct.unpack_from("<d", data)
        scalar = [view for view in views if not view.kernel]
        levels, data = decode(data[8:], _contexts(scalar, dct=False))
        flat = iter(_cut(levels, [_shape(view) for view in scalar]))
        kernels: dict[int, Iterator[Integers]] = {}
        for size in _kernel_sizes(views):
            own = [view for view in views if view.kernel and prod(view.kernel) == size]
            (count,) = struct.unpack_from("<I", data)
            book, data = decode(data[4:], np.zeros(count * size, np.int64))
            total = sum(view.rows * view.channels for view in own)
            chosen, data = decode(data, np.zeros(total, np.int64))
            vectors = (book.reshape(count, size) / _BOOK_SCALE)[chosen]
            kernels[size] = iter(_cut(vectors.reshape(-1), [_shape(view) for view in own]))
        return [next(kernels[prod(view.kernel)] if view.kernel else flat) * step for view in views]


#: entries of a codebook are integers over this, in steps.
_BOOK_SCALE: Final = 2
_ROUNDS: Final = 12


def _kernel_sizes(views: Sequence[View]) -> list[int]:
    return sorted({prod(view.kernel) for view in views if view.kernel})


def _ecvq(vectors: Floats64, entries: int) -> tuple[Integers, Integers]:
    """Codebook, in integers, and the entry of each vector."""
    chance = np.random.default_rng(0)
    book = vectors[chance.choice(len(vectors), entries, replace=False)]
    book[0] = 0
    bits = np.full(entries, log2(entries))
    chosen = np.zeros(len(vectors), np.int64)
    for rounds in range(_ROUNDS + 1):
        if rounds == _ROUNDS:
            book = np.rint(book * _BOOK_SCALE) / _BOOK_SCALE
        cost = np.square(book).sum(axis=1) + _SLOPE * bits
        for first in range(0, len(vectors), 4096):
            part = vectors[first : first + 4096]
            chosen[first : first + 4096] = (cost - 2 * part @ book.T).argmin(axis=1)
        counts = np.bincount(chosen, minlength=len(book))
        used = counts > 0
        chosen = (np.cumsum(used) - 1)[chosen]
        book, counts = book[used], counts[used]
        bits = -np.log2(counts / counts.sum())
        if rounds < _ROUNDS:
            sums = np.zeros_like(book)
            np.add.at(sums, chosen, vectors)
            book = sums / counts[:, None]
    return np.rint(book * _BOOK_SCALE).astype(np.int64), chosen


# --- pyramids -------------------------------------------------------------------------------------

_LEVELS: Final = 3
_TAPS: Final = {3: np.array([1, 2, 1]), 5: np.array([1, 4, 6, 4, 1])}


class Pyramid(NamedTuple):
    """A pyramid of each matrix of levels: coarse first, then what is missing, without loss.

    Attributes
    ----------
    taps : int
        3, 5: Burt and Adelson's Laplacian pyramid with such a kernel. 0: every second sample is
        kept, and predicts those between (no sample is coded twice).
    """

    taps: int

    def encode(self, matrices: Sequence[Floats64], views: Sequence[View], step: float) -> bytes:
        """Bytes of matrices."""
        bands: list[Integers] = []
        for levels in _rounded(matrices, step):
            bands += self._bands(levels.reshape(len(levels), -1))
        shapes = [band.shape for band in bands]
        contexts = np.repeat(np.arange(len(bands)), [prod(shape) for shape in shapes])
        return struct.pack("<d", step) + encode(_flat(bands), contexts)

    def decode(self, data: bytes, views: Sequence[View]) -> list[Floats64]:
        """Matrices of bytes."""
        (step,) = struct.unpack_from("<d", data)
        # Bands of zeros have the shapes of those that were coded.
        empty = [self._bands(np.zeros((v.rows, v.columns), np.int64)) for v in views]
        shapes = [band.shape for bands in empty for band in bands]
        contexts = np.repeat(np.arange(len(shapes)), [prod(shape) for shape in shapes])
        bands = iter(_cut(decode(data[8:], contexts)[0], shapes))
        found = []
        for view, own in zip(views, empty, strict=True):
            whole = self._whole([next(bands) for _ in own], (view.rows, view.columns))
            found.append(whole.reshape(_shape(view)) * step)
        return found

    def _bands(self, matrix: Integers) -> list[Integers]:
        found: list[Integers] = []
        for _ in range(_LEVELS):
            if self.taps:
                coarse = _reduced(matrix, _TAPS[self.taps])
                found.append(matrix - _expanded(coarse, matrix.shape, _TAPS[self.taps]))
                matrix = coarse
                continue
            for _ in ("rows", "columns"):
                even, odd = matrix[::2], matrix[1::2]
                found.append(odd - _between(even, len(odd)))
                matrix = even.T
        return [*found, matrix]

    def _whole(self, bands: list[Integers], shape: tuple[int, int]) -> Integers:
        *rest, matrix = bands
        for band in reversed(rest):
            if self.taps:
                matrix = band + _expanded(matrix, band.shape, _TAPS[self.taps])
                continue
            even = matrix.T
            odd = band + _between(even, len(band))
            matrix = np.empty((len(even) + len(odd), even.shape[1]), np.int64)
            matrix[::2], matrix[1::2] = even, odd
        return matrix.reshape(shape)


def _filtered(matrix: Integers, taps: Integers) -> Integers:
    """Sums along both axes, edges repeated."""
    for _ in range(2):
        padded = np.pad(matrix, ((len(taps) // 2,) * 2, (0, 0)), "edge")
        rows = [tap * padded[i : i + len(matrix)] for i, tap in enumerate(taps)]
        matrix = np.sum(rows, axis=0).T
    return matrix


def _reduced(matrix: Integers, taps: Integers) -> Integers:
    weight = int(taps.sum()) ** 2
    return (_filtered(matrix, taps)[::2, ::2] + weight // 2) // weight


def _expanded(coarse: Integers, shape: tuple[int, ...], taps: Integers) -> Integers:
    spread = np.zeros((2 * coarse.shape[0], 2 * coarse.shape[1]), np.int64)
    spread[::2, ::2] = coarse
    weight = int(taps.sum()) ** 2 // 4
    return ((_filtered(spread, taps) + weight // 2) // weight)[: shape[0], : shape[1]]


def _between(even: Integers, count: int) -> Integers:
    """Rows between those kept: the mean of both neighbours."""
    below = np.concatenate([even[1:], even[-1:]])[:count]
    return np.asarray((even[:count] + below) >> 1)


_QUANTIZERS: Final[dict[str, Uniform | Lnq | KernelPrediction | Codebook | Pyramid]] = {
    "uniform": Uniform(dct=False),
    "uniform + DCT": Uniform(dct=True),
    "uniform, rate-aware": Uniform(dct=False, rate_aware=True),
    "uniform + DCT, rate-aware": Uniform(dct=True, rate_aware=True),
    "LNQ 2, fixed length": Lnq(2, entropy=False),
    "LNQ 4, fixed length": Lnq(4, entropy=False),
    "LNQ 2": Lnq(2, entropy=True),
    "LNQ 4": Lnq(4, entropy=True),
    "kernel prediction": KernelPrediction(dct=False),
    "kernel prediction + DCT": KernelPrediction(dct=True),
    "kernel codebook": Codebook(256),
    "pyramid 3x3": Pyramid(3),
    "pyramid 5x5": Pyramid(5),
    "pyramid, predictive": Pyramid(0),
}
#: every quantizer, by name.
SCHEMES: Final[dict[str, Scheme]] = {
    "uniform, fixed length": Scheme(_fixed_encode, _fixed_decode),
    **{name: Scheme(each.encode, each.decode) for name, each in _QUANTIZERS.items()},
}
