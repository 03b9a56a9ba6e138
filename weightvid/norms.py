"""BatchNorms: statistics with few bits, and the scale and shift that make up for it.

A BatchNorm keeps four numbers for each channel and computes with two of them, its gain and offset::

    gain = weight / sqrt(variance + eps)        offset = bias - mean * gain

So mean and variance may be rounded as coarsely as weights are: weight and bias, rounded finely,
are changed so that gain and offset stay. A base's statistics, if near, are kept as they are.
"""

from collections.abc import Iterable
from typing import Final, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from weightvid.exact import STATISTICS, round_mantissa
from weightvid.loader import Floats, TensorSpec

#: what PyTorch adds to a variance. Where a network adds 1e-3, gains of channels that hardly vary
#: err by a few percent.
_EPS: Final = 1e-5
#: how near statistics of a base are: the variance to itself, the mean to the deviation.
_NEAR: Final = 0.25


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
