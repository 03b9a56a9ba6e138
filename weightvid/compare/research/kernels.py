"""Quantizers that know kernels: prediction from earlier ones, and a codebook of all."""

import struct
from collections.abc import Iterator, Sequence
from math import log2, prod
from typing import Final, NamedTuple

import numpy as np

from weightvid.compare.research import scalar
from weightvid.compare.research.scalar import Floats64, Integers, Matrix, decode, encode
from weightvid.levels.transform import View

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

    def encode(self, matrices: Sequence[Floats64], views: Sequence[View]) -> bytes:
        """Bytes of matrices."""
        levels = scalar.rounded(scalar.coefficients(matrices, views) if self.dct else matrices)
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
        marks = scalar.flattened(flags)
        data = encode(marks, self._flag_contexts(views))
        refs = scalar.flattened(references)
        data += encode(refs, np.zeros(len(refs), np.int64))
        return data + encode(scalar.flattened(residuals), self._contexts(views, marks))

    def decode(self, data: bytes, views: Sequence[View]) -> list[Matrix]:
        """Matrices of bytes."""
        marks, data = decode(data, self._flag_contexts(views))
        refs, data = decode(data, np.zeros(int(marks.sum()), np.int64))
        residuals, _ = decode(data, self._contexts(views, marks))
        found = scalar.in_shapes(residuals, [scalar.shape_of(view) for view in views])
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
        return scalar.from_coefficients(found, views) if self.dct else found

    def _flag_contexts(self, views: Sequence[View]) -> Integers:
        counts = [view.rows * view.channels for view in views if view.kernel]
        return np.repeat(np.arange(len(counts)), counts)

    def _contexts(self, views: Sequence[View], marks: Integers) -> Integers:
        """Context of each residual: as without prediction, and whether there was one."""
        counts = [view.rows * view.channels if view.kernel else 0 for view in views]
        own = iter(scalar.in_shapes(marks, [(count,) for count in counts]))
        found = []
        for number, view in enumerate(views):
            flags = next(own) if view.kernel else (next(own), np.zeros(1, np.int64))[1]
            classes = scalar.CLASSES * number + scalar.classes_of(view, self.dct)
            every = 2 * classes + flags.reshape(-1, 1)
            found.append(np.broadcast_to(every, (view.rows * view.channels, classes.size)))
        return scalar.flattened(found)


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
    return scalar.flattened(found)


class Codebook(NamedTuple):
    """Entropy-constrained vector quantization of kernels by one codebook for each kernel size.

    It has so many ``entries`` at most: those that nothing refers to are left out.
    """

    entries: int

    def encode(self, matrices: Sequence[Floats64], views: Sequence[View]) -> bytes:
        """Bytes of matrices; those without kernels are quantized as scalars."""
        pairs = list(zip(matrices, views, strict=True))
        levels = scalar.rounded([x for x, view in pairs if not view.kernel])
        contexts = scalar.contexts_of([view for view in views if not view.kernel], dct=False)
        data = encode(scalar.flattened(levels), contexts)
        for size in _kernel_sizes(views):
            vectors = np.concatenate([
                x.reshape(-1, size) for x, view in pairs if view.kernel and x.shape[2] == size
            ])  # fmt: skip
            book, chosen = _ecvq(vectors, min(self.entries, len(vectors) // 8 + 1))
            data += struct.pack("<I", len(book))
            data += encode(book.reshape(-1), np.zeros(book.size, np.int64))
            data += encode(chosen, np.zeros(len(chosen), np.int64))
        return data

    def decode(self, data: bytes, views: Sequence[View]) -> list[Matrix]:
        """Matrices of bytes."""
        flat_views = [view for view in views if not view.kernel]
        levels, data = decode(data, scalar.contexts_of(flat_views, dct=False))
        flat = iter(scalar.in_shapes(levels, [scalar.shape_of(view) for view in flat_views]))
        kernels: dict[int, Iterator[Integers]] = {}
        for size in _kernel_sizes(views):
            own = [view for view in views if view.kernel and prod(view.kernel) == size]
            (count,) = struct.unpack_from("<I", data)
            book, data = decode(data[4:], np.zeros(count * size, np.int64))
            total = sum(view.rows * view.channels for view in own)
            chosen, data = decode(data, np.zeros(total, np.int64))
            vectors = (book.reshape(count, size) / _BOOK_SCALE)[chosen]
            shapes = [scalar.shape_of(view) for view in own]
            kernels[size] = iter(scalar.in_shapes(vectors.reshape(-1), shapes))
        return [next(kernels[prod(view.kernel)] if view.kernel else flat) for view in views]


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
        cost = np.square(book).sum(axis=1) + scalar.SLOPE * bits
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
