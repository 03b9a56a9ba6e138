"""Rate and error of a tensor against its step, estimated from a sample of its weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import floor, log2
from typing import Final

import numpy as np
import numpy.typing as npt

from weightvid.dtypes import to_float32
from weightvid.packing.source import TensorRead
from weightvid.quantize.rate import entropy_bits

_SAMPLE: Final = 1 << 13
#: points of a curve per octave of the step; between them it is a straight line.
_PER_OCTAVE: Final = 4


def sample_tensor(read: TensorRead, count: int = _SAMPLE) -> npt.NDArray[np.float32]:
    """About so many weights of a tensor, in evenly spaced runs; all of a small one's."""
    size, dtype = read.spec.size, read.spec.dtype
    if size <= count:
        return to_float32(read.elements(0, size), dtype).copy()
    run = 64
    starts = np.linspace(0, size - run, max(1, count // run)).astype(np.int64)
    return to_float32(np.concatenate([read.elements(int(at), run) for at in starts]), dtype)


@dataclass(slots=True)
class RateCurve:
    """Plain quantization of a sample, at any step.

    Attributes
    ----------
    sample : ndarray of float32, 1-D
    weights : int
        Of the whole tensor.
    """

    sample: npt.NDArray[np.float32]
    weights: int
    _known: dict[int, tuple[float, float]] = field(default_factory=dict)

    def bits(self, step: float) -> float:
        """Zero-order entropy of the whole tensor's levels."""
        return self._at(step)[0] * self.weights

    def noise(self, step: float) -> float:
        """Sum of the squared errors of the whole tensor."""
        return self._at(step)[1] * self.weights

    @property
    def power(self) -> float:
        """Sum of the squares of the whole tensor."""
        return float(np.vdot(self.sample, self.sample)) / self.sample.size * self.weights

    def _at(self, step: float) -> tuple[float, float]:
        place = _PER_OCTAVE * log2(step)
        low = floor(place)
        below, above = self._point(low), self._point(low + 1)
        part = place - low
        return (
            below[0] + part * (above[0] - below[0]),
            below[1] + part * (above[1] - below[1]),
        )

    def _point(self, place: int) -> tuple[float, float]:
        known = self._known.get(place)
        if known is None:
            step = 2.0 ** (place / _PER_OCTAVE)
            scaled = self.sample.astype(np.float64) / step
            levels = np.rint(scaled)
            error = scaled - levels
            noise = float(np.vdot(error, error)) / levels.size * step * step
            # Outliers beyond the range of a sample are listed elsewhere.
            clipped = np.clip(levels, -128, 128).astype(np.int64)
            known = self._known[place] = (entropy_bits(clipped), noise)
        return known
