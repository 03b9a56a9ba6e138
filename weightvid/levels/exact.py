"""Tensors that are kept exactly: their order in boxes, and shorter mantissas of 1-D floats."""

from __future__ import annotations

from typing import Final

import numpy as np

from weightvid.dtypes import stored_dtype
from weightvid.errors import QuantizationError
from weightvid.loader import Array, Floats, TensorSpec

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
