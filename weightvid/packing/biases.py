"""Biases that make up for what quantizing does to the mean output of their layer.

With calibration statistics the mean inputs of a layer are known, and so is by how much the error of
its weights moves its mean output. What is added to that output is stored exactly anyway: it takes
the shift upon itself and costs no byte more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from fnmatch import fnmatchcase

import numpy as np
import numpy.typing as npt

from weightvid.calibration import TensorMoments
from weightvid.dtypes import PACKABLE, from_float32, to_float32
from weightvid.spec import TensorSpec

Array = npt.NDArray[np.generic]
Shift = npt.NDArray[np.float32]
Read = Callable[[int, int], Array]


def bias_numbers(
    tensors: Sequence[TensorSpec],
    moments: Mapping[int, TensorMoments],
    quantized: Collection[int],
    keep: tuple[str, ...],
) -> dict[int, int]:
    """Id of the bias of each quantized weight that has one of its own.

    Parameters
    ----------
    tensors : sequence of TensorSpec
    moments : mapping of int to TensorMoments
    quantized : collection of int
        Ids.
    keep : tuple of str
        Patterns of names that stay as they are.
    """
    numbers = {spec.name: number for number, spec in enumerate(tensors)}
    found = {
        weight: numbers[known.bias]
        for weight, known in moments.items()
        if weight in quantized and known.bias in numbers
    }
    uses = Counter(found.values())
    return {
        weight: bias
        for weight, bias in found.items()
        if uses[bias] == 1
        and bias not in quantized
        and tensors[bias].dtype in PACKABLE
        and len(tensors[bias].shape) == 1
        and not any(fnmatchcase(tensors[bias].name, pattern) for pattern in keep)
    }


class Corrections:
    """Matches weights that have been quantized with biases that are still to be written.

    Parameters
    ----------
    tensors : sequence of TensorSpec
    biases : mapping of int to int
        Of :func:`bias_numbers`.
    """

    def __init__(self, tensors: Sequence[TensorSpec], biases: Mapping[int, int]) -> None:
        self._tensors = tensors
        self._bias_of = dict(biases)
        self._awaited = set(biases.values())
        self._shifts: dict[int, Shift | None] = {}
        self._held: dict[int, Read] = {}

    def quantized(self, weight: int, shift: Shift | None) -> list[tuple[int, Read]]:
        """Take note of a weight; gives the bias that waited for it, ready to be stored."""
        bias = self._bias_of.get(weight)
        if bias is None:
            return []
        self._awaited.discard(bias)
        fits = shift is not None and shift.size == self._tensors[bias].size
        finite = shift is not None and bool(np.isfinite(shift).all())
        self._shifts[bias] = shift if fits and finite else None
        read = self._held.pop(bias, None)
        return [] if read is None else [(bias, self._corrected(bias, read))]

    def kept(self, number: int, read: Read) -> list[tuple[int, Read]]:
        """Take a tensor that is not quantized; gives it back unless it has to wait."""
        if number in self._awaited:
            self._held[number] = read
            return []
        return [(number, self._corrected(number, read))]

    def _corrected(self, number: int, read: Read) -> Read:
        shift = self._shifts.pop(number, None)
        if shift is None:
            return read
        dtype = self._tensors[number].dtype

        def corrected(first: int, count: int) -> Array:
            values = to_float32(read(first, count), dtype) + shift[first : first + count]
            return from_float32(values.astype(np.float32, copy=False), dtype)

        return corrected
