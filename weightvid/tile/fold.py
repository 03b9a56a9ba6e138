"""Folding levels into samples: what the video carries, and what it leaves to digits.

HEVC codes large magnitudes with Rice codes that know little of the data, and small dense noise with
more syntax than it is worth. A fold (core b, width w) leaves to the video what it is good at:

* ``|q| <= b``, the **core**: the sample is 128, and ``q + b`` becomes a digit of radix 2 b + 1;
* beyond, the **tail**: the sample is ``128 + sgn(q) * t`` with ``t = ceil((|q| - b) / w)``, and
  ``(|q| - b - 1) mod w`` becomes a digit of radix w (none if w = 1).

Fold (0, 1) is the plain mapping ``128 + q``. Digits of one radix are packed, as many as fit into a
byte, the first in the lowest place, and deflated.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from weightvid.errors import QuantizationError
from weightvid.tile.ribbon import ZERO_SAMPLE, zero_sample

#: folds are of 8-bit samples; deeper ones have none.
Samples = npt.NDArray[np.uint8]
Levels = npt.NDArray[np.int8]
#: levels without a fold, int8 or int16, and their samples, uint8 or uint16.
Plain = npt.NDArray[Any]
Digits = npt.NDArray[np.uint8]

#: bits of samples that levels may be folded into; deeper ones show them as they are.
FOLDED_BITS: Final = 8
MAX_CORE: Final = 15
MAX_WIDTH: Final = 4


@dataclass(frozen=True, slots=True, order=True)
class Fold:
    """How levels become samples.

    Attributes
    ----------
    core : int
        Levels up to this magnitude become digits; 0..15.
    width : int
        Magnitudes beyond the core that share a sample; 1..4.
    """

    core: int = 0
    width: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.core <= MAX_CORE or not 1 <= self.width <= MAX_WIDTH:
            raise QuantizationError(f"fold ({self.core}, {self.width}) is out of range")

    def to_byte(self) -> int:
        """``4 * core + width - 1``."""
        return 4 * self.core + self.width - 1

    @classmethod
    def from_byte(cls, code: int) -> Fold:
        """Undo :meth:`to_byte`."""
        return cls(code >> 2, (code & 3) + 1)


PLAIN: Final = Fold()


def plain_samples(levels: Plain, bits: int) -> Plain:
    """Samples of levels without a fold.

    Examples
    --------
    >>> plain_samples(np.array([-1, 0, 2], np.int8), 8).tolist()
    [127, 128, 130]
    >>> plain_samples(np.array([-511, 0], np.int16), 10).tolist()
    [1, 512]
    """
    if levels.dtype == np.int8:
        return levels.view(np.uint8) ^ np.uint8(ZERO_SAMPLE)
    return (levels + np.int16(zero_sample(bits))).astype(np.uint16)


def plain_levels(samples: Plain, bits: int) -> Plain:
    """Undo :func:`plain_samples`."""
    if samples.dtype == np.uint8:
        return (samples ^ np.uint8(ZERO_SAMPLE)).view(np.int8)
    return samples.astype(np.int16) - np.int16(zero_sample(bits))


def digits_per_byte(radix: int) -> int:
    """How many digits of a radix (2..31) fit into a byte.

    Examples
    --------
    >>> [digits_per_byte(radix) for radix in (2, 3, 4, 5, 7, 15, 17, 31)]
    [8, 5, 4, 3, 2, 2, 1, 1]
    """
    count = 1
    while radix ** (count + 1) <= 256:
        count += 1
    return count


def pack_digits(digits: Digits, radix: int) -> bytes:
    """Bytes of digits; missing digits of the last byte are 0.

    Examples
    --------
    >>> pack_digits(np.array([1, 2, 0, 0, 0, 2], np.uint8), 3).hex()
    '0702'
    """
    each = digits_per_byte(radix)
    if each == 1:
        return digits.tobytes()
    whole = np.zeros(-(-digits.size // each) * each, np.uint8)
    whole[: digits.size] = digits
    packed = np.zeros(whole.size // each, np.uint8)
    for place in range(each):
        packed += whole[place::each] * np.uint8(radix**place)
    return packed.tobytes()


def unpack_digits(data: bytes, radix: int) -> Digits:
    """Undo :func:`pack_digits`, up to the digits that filled the last byte."""
    rest = np.frombuffer(data, np.uint8)
    digits = np.empty((rest.size, digits_per_byte(radix)), np.uint8)
    for place in range(digits.shape[1]):
        higher = rest // np.uint8(radix)
        np.subtract(rest, higher * np.uint8(radix), out=digits[:, place])
        rest = higher
    return digits.reshape(-1)


@cache
def _sample_table(fold: Fold) -> Samples:
    """Sample of each level -127..127, at level + 128."""
    levels = np.arange(-128, 128)
    steps = np.maximum(0, -(-(np.abs(levels) - fold.core) // fold.width))
    table: Samples = (ZERO_SAMPLE + np.sign(levels) * steps).astype(np.uint8)
    return table


@cache
def _level_table(fold: Fold) -> Levels:
    """Level of smallest magnitude of each sample; 0 for the core.

    Samples that no level of -127..127 gives stand for levels that wrap around; they cannot come
    from a packer, and the tensor's hash tells.
    """
    steps = np.arange(256) - ZERO_SAMPLE
    magnitude = fold.core + 1 + (np.abs(steps) - 1) * fold.width
    return np.where(steps == 0, 0, np.sign(steps) * magnitude).astype(np.int8)


def fold_levels(levels: Levels, fold: Fold) -> tuple[Samples, Digits, Digits]:
    """Samples, core digits and tail digits of a piece of a sequence.

    Parameters
    ----------
    levels : ndarray of int8, shape (n,)
        -127..127.
    fold : Fold

    Returns
    -------
    samples : ndarray of uint8, shape (n,)
    core, tail : ndarray of uint8
        Empty if the fold has no such digits.
    """
    samples = np.take(_sample_table(fold), levels.view(np.uint8) ^ np.uint8(128))
    core = tail = np.empty(0, np.uint8)
    if fold.core:
        inner = levels[samples == ZERO_SAMPLE]
        core = (inner + np.int8(fold.core)).view(np.uint8)
    if fold.width > 1:
        outer = np.abs(levels[samples != ZERO_SAMPLE]).astype(np.uint8)
        tail = (outer - np.uint8(fold.core + 1)) % np.uint8(fold.width)
    return samples, core, tail


Counts = npt.NDArray[np.int64]


def fold_counts(counts: Counts, fold: Fold) -> tuple[Counts, Counts, Counts]:
    """How :func:`fold_levels` would divide levels of which so many have each value.

    Parameters
    ----------
    counts : ndarray of int64, shape (256,)
        Number of levels of each value, by the value's byte in two's complement.
    fold : Fold

    Returns
    -------
    samples, core, tail : ndarray of int64, shape (256,)
        Number of samples, core digits and tail digits of each value.
    """
    every = np.arange(-128, 128).astype(np.int8)
    by_level = np.roll(counts, 128)
    samples = _sample_table(fold)
    inner = samples == ZERO_SAMPLE
    core = tail = np.zeros(256, np.int64)
    if fold.core:
        core = _histogram((every[inner] + np.int8(fold.core)).view(np.uint8), by_level[inner])
    if fold.width > 1:
        outer = np.abs(every[~inner].astype(np.int16)).astype(np.uint8)
        digits = (outer - np.uint8(fold.core + 1)) % np.uint8(fold.width)
        tail = _histogram(digits, by_level[~inner])
    return _histogram(samples, by_level), core, tail


def _histogram(values: npt.NDArray[np.uint8], counts: Counts) -> Counts:
    found = np.zeros(256, np.int64)
    np.add.at(found, values, counts)
    return found


def count_digits(samples: Samples, fold: Fold) -> tuple[int, int]:
    """How many core and tail digits belong to these samples."""
    if fold == PLAIN:
        return 0, 0
    inner = int(np.count_nonzero(samples == ZERO_SAMPLE))
    return (inner if fold.core else 0), (samples.size - inner if fold.width > 1 else 0)


def unfold(samples: Samples, fold: Fold, core: Digits, tail: Digits) -> Levels:
    """Undo :func:`fold_levels`; the digits must be as many as :func:`count_digits` says."""
    levels: Levels = (samples ^ np.uint8(ZERO_SAMPLE)).view(np.int8)
    outer = np.flatnonzero(levels != 0) if fold.width > 1 else None
    # Nearly all samples are of the core: its digits go to their places in runs.
    inner = levels == 0 if fold.core else None
    if fold.width == 1:
        levels += np.sign(levels) * np.int8(fold.core)
    if inner is not None:
        levels[inner] = core.view(np.int8) - np.int8(fold.core)
    if outer is not None:
        base = np.take(_level_table(fold), samples[outer])
        more = tail.view(np.int8)
        levels[outer] = np.where(base < 0, base - more, base + more)
    return levels
