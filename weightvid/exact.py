"""Exact tensors: their order in boxes, their elements as records, shorter mantissas of 1-D floats.

Elements lie by byte planes; floats that must keep every bit by planes of exponent and mantissa.

A **BatchNorm** keeps four numbers for each channel and computes with two, its gain and offset::

    gain = weight / sqrt(variance + eps)        offset = bias - mean * gain

So mean and variance are rounded as coarsely as weights, and weight and bias are changed so that
gain and offset stay. A base's statistics, if near, are kept as they are.
"""

import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from math import prod
from typing import Final, NamedTuple, TypeVar, cast

import numpy as np
import numpy.typing as npt

from weightvid import loader
from weightvid.container import record, uint
from weightvid.errors import QuantizationError
from weightvid.loader import Array, Floats, TensorSpec
from weightvid.spec import stored_dtype

_T = TypeVar("_T")
_R = TypeVar("_R")


def ahead(task: Callable[[_T], _R], items: Iterable[_T]) -> Iterator[tuple[_T, Future[_R]]]:
    """Items and what becomes of them; two are deflated or inflated while one is used.

    What came before an error of the items is given first.
    """
    waiting = deque[tuple[_T, "Future[_R]"]]()
    with ThreadPoolExecutor(2) as pool:  # zlib needs no Python lock
        try:
            for item in items:
                waiting.append((item, pool.submit(task, item)))
                if len(waiting) > 2:
                    yield waiting.popleft()
        except Exception:
            yield from waiting
            raise
        yield from waiting


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


def approach(below: Floats, values: Floats, bits: int) -> Floats:
    """Floats near others, whose bits differ from those below by a number with many zeros.

    Parameters
    ----------
    below, values : ndarray of float32
    bits : int
        1..23; the relative error is at most 2**-bits.

    Examples
    --------
    >>> approach(np.ones(2, np.float32), np.array([1.1, 1.001], np.float32), 4).tolist()
    [1.125, 1.0]
    """
    step = 1 << (FULL_BITS - bits)
    before, after = (each.view(np.int32).astype(np.int64) for each in (below, values))
    moved = before + (after - before + step // 2) // step * step
    found = moved.astype(np.int32).view(np.float32)
    with np.errstate(invalid="ignore"):
        near = np.abs(found - values) <= np.ldexp(np.abs(values), -bits)
    return np.where(near, found, values)


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
    arrays = [np.ascontiguousarray(part).reshape(-1).view(wide) for *_, part in items]
    bits = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
    shapes = [specs[number].shape[1:] or (part.size,) for number, _, part in items]
    lengths = [max(1, prod(shape)) for shape in shapes]
    runs = loader.float_rows([part.size for *_, part in items], lengths)
    magnitude, upper = wide((1 << width - 1) - 1), wide(mantissa - 2)
    scale, zero = _scales_and_zeros(bits, runs, mantissa)
    keys = zero.astype(np.int32) * 4 + (scale & 3)
    order = np.argsort(keys, kind="stable")
    each = loader.float_lengths(runs)[order]
    bases = ((scale[order] >> 2 << 2).astype(np.int32) - 128).astype(wide)
    row_at = np.cumsum(each) - each
    shifts = range(0, mantissa - 7, 8)
    top8, middle, *lows = np.empty((2 + len(shifts), bits.size), np.uint8)
    for run, shape, numbers, place in loader.float_places(runs, keys):
        first, done = int(np.searchsorted(row_at, place.start)), place.start
        for some in _blocks(numbers, shape[1]):
            block = bits[run].reshape(shape)[some]
            offset, first = bases[first : first + len(some), None], first + len(some)
            here = slice(done, done := done + block.size)
            top = ((block & magnitude) >> upper) - offset
            top &= wide((1 << width + 1 - mantissa) - 1)
            top8[here] = top.reshape(-1)
            top >>= wide(8)
            top <<= wide(6)
            top |= block >> wide(width - 1) << wide(5)
            top |= block >> wide(mantissa - 7) & wide(31)
            middle[here] = top.reshape(-1)
            for low, shift in zip(lows, shifts, strict=True):
                mask = wide((1 << min(8, mantissa - 7 - shift)) - 1)
                low[here] = (block >> wide(shift) & mask).reshape(-1)
    steps, planes = np.diff(scale.astype(np.uint8), prepend=np.uint8(0)), list[bytes]()
    planes += _plane(np.stack((steps, (scale >> 8).astype(np.uint8), zero)), zlib.Z_FILTERED)
    for plane in (top8, middle):
        planes += _plane(plane, zlib.Z_HUFFMAN_ONLY)
    for low, shift in zip(lows, shifts, strict=True):
        some = low[: int(each[zero[order] < shift + 8].sum())]
        whole = shift + 8 <= mantissa - 7 and not ((zero > shift) & (zero < shift + 8)).any()
        planes += _plane(some, None if whole else zlib.Z_HUFFMAN_ONLY)
    fields = [uint(number) + uint(first) + uint(part.size) for number, first, part in items]
    planes = [b"".join(map(uint, lengths)), *planes]
    data = uint(loader.FLOATS) + uint(sum(map(len, planes)))
    return [record(loader.ITEMS, uint(len(items)), *fields), data, *planes]


def _scales_and_zeros(
    bits: Array, runs: Sequence[tuple[int, int]], mantissa: int
) -> tuple[Array, Array]:
    """Of each row the scale, and the zeros that all mantissas end with, if they are 4 or more."""
    wide, width = bits.dtype.type, 8 * bits.itemsize
    scales, zeros, at = [np.empty(0, np.uint16)], [np.empty(0, np.uint8)], 0
    for rows, length in runs:
        matrix, at = bits[at : at + rows * length].reshape(rows, length), at + rows * length
        for block in _blocks(matrix, length):
            top = (block & wide((1 << width - 1) - 1)) >> wide(mantissa - 2)
            total, count = top.sum(axis=1, dtype=np.int64), (top != 0).sum(axis=1, dtype=np.uint32)
            scales.append((total // np.maximum(count, 1)).astype(np.uint16))
            some = np.bitwise_or.reduce(block, axis=1).astype(np.int64) | 1 << mantissa
            lowest = np.log2((some & -some).astype(np.float64)).astype(np.uint8)
            zeros.append(np.where(lowest < 4, 0, lowest).astype(np.uint8))
    return np.concatenate(scales), np.concatenate(zeros)


def _blocks(rows: Array, length: int) -> Iterator[Array]:
    """Rows of so many elements, or their numbers, as many at a time as a cache holds."""
    step = max(1, _BLOCK // length)
    return (rows[first : first + step] for first in range(0, len(rows), step))


def _plane(values: Array, strategy: int | None) -> tuple[bytes, bytes]:
    """A plane, deflated if that is smaller; None: it is not."""
    if strategy is not None:
        packer = zlib.compressobj(1, zlib.DEFLATED, -15, 9, strategy)
        packed = packer.compress(values.data) + packer.flush()
        if len(packed) < values.size:
            return uint(len(packed)), packed
    return uint(0), values.tobytes()


#: elements that a cache holds.
_BLOCK: Final = 1 << 15

#: stored mantissa bits of float32; the fewest that a packed model's 1-D floats keep.
FULL_BITS: Final = 23
LEAST_BITS: Final = 5
#: names of what a BatchNorm has measured: mean and variance.
STATISTICS: Final = ("running_mean", "running_var")
#: what PyTorch adds to a variance. Where a network adds 1e-3, gains of channels that hardly vary
#: err by a few percent.
_EPS: Final = 1e-5
#: how near statistics of a base are: the variance to itself, the mean to the deviation.
_NEAR: Final = 0.25


def round_mantissa(values: Floats, bits: int) -> Floats:
    """Round to ``bits`` stored mantissa bits, to nearest, ties to even.

    Parameters
    ----------
    values : ndarray of float32
    bits : int
        1..23 (else a QuantizationError); the relative error is at most 2**-(bits + 1).

    Returns
    -------
    ndarray of float32, same shape
        NaN and infinity stay; so does what would round to infinity.

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


def kept_bits(values: Floats) -> int:
    """Stored mantissa bits, 0..23, that float32 values use: the others are zeros in all of them."""
    used = int(np.bitwise_or.reduce(values.reshape(-1).view(np.uint32), initial=0))
    used &= (1 << FULL_BITS) - 1
    return FULL_BITS - (used & -used).bit_length() + 1 if used else 0


def rounds_mantissas(spec: TensorSpec) -> bool:
    """Whether a tensor is a 1-D float32 one: a bias, norm or statistic."""
    return spec.dtype == "F32" and sum(size > 1 for size in spec.shape) <= 1 and spec.size > 0


def likeness(spec: TensorSpec) -> tuple[str, bool, str, str]:
    """Sorting key that brings tensors of one kind together: their bytes resemble each other.

    Those of one box have one element type, and statistics, of which few bits are kept, their own.

    Examples
    --------
    >>> likeness(TensorSpec("layer3.bn1.bias", "F32", (64,)))
    ('F32', False, 'bias', 'bn')
    """
    owner, _, kind = spec.name.rpartition(".")
    family = "".join(c for c in owner.rpartition(".")[2] if not c.isdigit())
    return spec.dtype, kind in STATISTICS, kind, family


def exact_elements(array: Array, spec: TensorSpec, mantissa_bits: int) -> Array:
    """Elements as they are kept."""
    if mantissa_bits < FULL_BITS and rounds_mantissas(spec):
        return round_mantissa(array.view(np.float32), mantissa_bits)
    return array


class Norm(NamedTuple):
    """Numbers of the tensors of a BatchNorm."""

    weight: int
    bias: int
    mean: int
    variance: int


def norms_of(specs: Iterable[TensorSpec]) -> list[Norm]:
    """BatchNorms in float32, by the names that PyTorch gives.

    Examples
    --------
    >>> names = "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var", "fc.bias"
    >>> norms_of(TensorSpec(name, "F32", (8,)) for name in names)
    [Norm(weight=0, bias=1, mean=2, variance=3)]
    """
    every = {(s.name, s.shape): n for n, s in enumerate(specs) if s.dtype == "F32" and s.size}
    kinds, found = ("weight", "bias", *STATISTICS), list[Norm]()
    for name, shape in every:
        if name.endswith(kinds[-1]) and len(shape) == 1:
            owner = name.removesuffix(kinds[-1])
            numbers = [every.get((owner + kind, shape)) for kind in kinds]
            if None not in numbers:
                found.append(Norm(*cast(list[int], numbers)))
    return found


def norm_sqnr_db(values: Iterable[Floats], found: Iterable[Floats]) -> float:
    """How near a BatchNorm is to another in what it computes with: the SQNR of the worse of two.

    Errors of offsets are counted against the two terms that offsets are sums of. Infinite without
    an error, NaN where a value is no number.

    Parameters
    ----------
    values, found : four ndarray of float32, shape (channels,)
        In the order of `Norm`.
    """

    def gain_and_terms(norm: Iterable[Floats]) -> tuple[npt.NDArray[np.float64], ...]:
        weight, bias, mean, variance = (each.astype(np.float64) for each in norm)
        gain = weight / np.sqrt(variance + _EPS)
        return gain, bias, mean * gain

    with np.errstate(all="ignore"):
        (gain, *terms), (new_gain, *new_terms) = gain_and_terms(values), gain_and_terms(found)
        offset = np.subtract(*terms) - np.subtract(*new_terms)
        noise = np.array([np.sum((gain - new_gain) ** 2), np.sum(offset**2)])
        power = np.array([np.sum(gain**2), np.sum(np.square(terms))])
        worse = np.max(np.where(noise == 0, 0, noise / power))
        return float(-10 * np.log10(worse))


def round_norm(
    values: Iterable[Floats], bits: int, below: Iterable[Floats] | None = None
) -> list[Floats]:
    """Values of a BatchNorm with shorter mantissas that compute what it does.

    Parameters
    ----------
    values : four ndarray of float32, shape (channels,)
        In the order of `Norm`.
    bits : int
        Stored mantissa bits of weight and bias, 3..23; mean and variance get a third, or 2.
    below : four ndarray of float32, optional
        Those of a base: its mean and variance are taken where they are near.

    Returns
    -------
    list of four ndarray of float32
    """
    given = list(values)
    weight, bias, mean, variance = (each.astype(np.float64) for each in given)
    few = max(2, bits // 3)
    with np.errstate(all="ignore"):
        deviation = np.sqrt(variance + _EPS)
        new_mean, new = round_mantissa(given[2], few), round_mantissa(given[3], few)
        if below is not None:
            *_, old_mean, old = below
            new_mean = np.where(abs(old_mean - mean) <= _NEAR * deviation, old_mean, new_mean)
            new = np.where(abs(old - variance) <= _NEAR * variance, old, new)
        scaled = (weight * np.sqrt(new + _EPS) / deviation).astype(np.float32)
        shifted = (bias + (new_mean - mean) * weight / deviation).astype(np.float32)
    found = [scaled, shifted, new_mean, new]
    if not all(np.isfinite(each).all() for each in found):  # a broken network stays as it is
        found = given
    return [round_mantissa(each, bits) for each in found]
