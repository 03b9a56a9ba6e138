"""Parameters of the quantizers: small frozen records that travel in the sidecars.

A quantizer turns weights into **levels** (integers). A level becomes a value through an integer
**reconstruction index** ``n`` and a float32 ``unit``: ``value = float32(n) * unit``, one IEEE
float32 multiplication, so that every device computes the same bits.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import frexp, isfinite, ldexp
from typing import Any, Final

import numpy as np

from weightvid.errors import QuantizationError

#: largest magnitude of a level; float32 holds every integer up to 256 times as large exactly
#: only below 2**24, and beyond it the conversion rounds to nearest even, the same everywhere.
MAX_LEVEL: Final = 1 << 22
#: shifts of the reconstruction points are counted in this fraction of a step.
SHIFT_UNITS: Final = 256
TRELLIS_STATES: Final = (4, 8, 16, 32, 64)
_MIN_EXPONENT, _MAX_EXPONENT = -110, 120
_STEP_TEXT: Final = re.compile(r"0x1(\.[0-9a-f]{1,6})?p(0|-?[1-9][0-9]{0,2})")


def round_step(step: float, mantissa_bits: int = 8) -> float:
    """Step rounded to ``mantissa_bits`` significant bits, to nearest, so that it is short to store.

    Examples
    --------
    >>> round_step(0.1).hex()
    '0x1.9a00000000000p-4'
    """
    mantissa, exponent = frexp(step)
    scale = 1 << mantissa_bits
    return ldexp(round(mantissa * scale) / scale, exponent)


def step_to_text(step: float) -> str:
    """Shortest hex float of a step: ``0x1.9ap-4``."""
    head, _, exponent = float(step).hex().partition("p")
    return f"{head.rstrip('0').rstrip('.') if '.' in head else head}p{int(exponent)}"


def _step_from_text(text: object) -> float:
    if not isinstance(text, str) or not _STEP_TEXT.fullmatch(text):
        raise QuantizationError(f"a step must be a hex float, not {str(text)[:32]!r}")
    step = float.fromhex(text)
    check_step(step)
    return step


def check_step(step: float) -> None:
    """Refuse a step that is not a positive, normal float32 with room to spare on both sides."""
    good = isfinite(step) and step > 0 and float(np.float32(step)) == step
    if not good or not _MIN_EXPONENT <= frexp(step)[1] <= _MAX_EXPONENT:
        raise QuantizationError(f"step {step!r} is not a positive float32 of ordinary size")


@dataclass(frozen=True, slots=True)
class UniformParams:
    """Uniform quantizer: level q stands for q * step, moved towards zero by an optional shift.

    Attributes
    ----------
    step : float
        Quantizer step size, exactly representable as float32; > 0.
    shifts : tuple of three int, or None
        Distance, in 1/256 of a step, by which the reconstruction points of |q| = 1, 2 and >= 3
        lie nearer to zero than q * step. Range -128..127.
    """

    step: float
    shifts: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        check_step(self.step)
        if self.shifts is not None and any(not -128 <= s <= 127 for s in self.shifts):
            raise QuantizationError(f"centroid shifts {self.shifts} are outside -128..127")

    @property
    def unit(self) -> np.float32:
        """What one reconstruction index is worth."""
        return np.float32(self.step if self.shifts is None else self.step / SHIFT_UNITS)

    def to_dict(self) -> dict[str, Any]:
        """JSON form, without defaults."""
        record: dict[str, Any] = {"step": step_to_text(self.step)}
        if self.shifts is not None:
            record["shifts"] = list(self.shifts)
        return record


@dataclass(frozen=True, slots=True)
class TrellisParams:
    """Trellis-coded (dependent) quantizer: two interleaved scalar quantizers and a state machine.

    Attributes
    ----------
    step : float
        Distance of neighbouring points of one scalar quantizer, as a plain quantizer of about
        that rate has it; a quarter of it is exactly representable as float32; > 0.
    states : int
        4, 8, 16, 32 or 64.
    axis : int
        1: a run is a row of the level matrix; 0: a column.
    zero : bool
        Numbering of the points, see :mod:`weightvid.quantize.trellis`: whether one has a zero.
    """

    step: float
    states: int = 8
    axis: int = 1
    zero: bool = False

    def __post_init__(self) -> None:
        check_step(self.step)
        if self.states not in TRELLIS_STATES:
            raise QuantizationError(f"{self.states} trellis states; known: {TRELLIS_STATES}")
        if self.axis not in (0, 1):
            raise QuantizationError(f"trellis axis {self.axis} is neither 0 nor 1")

    @property
    def unit(self) -> np.float32:
        """What one reconstruction index is worth."""
        return np.float32(self.step / 4)

    def to_dict(self) -> dict[str, Any]:
        """JSON form, without defaults."""
        record: dict[str, Any] = {"step": step_to_text(self.step), "states": self.states}
        if self.axis != 1:
            record["axis"] = self.axis
        if self.zero:
            record["numbering"] = 1
        return record


Params = UniformParams | TrellisParams


def params_from_dict(record: Mapping[str, Any]) -> Params:
    """Parameters from their JSON form.

    Raises
    ------
    QuantizationError
        Anything that is not exactly a known quantizer.
    """
    step = _step_from_text(record.get("step"))
    if "states" in record:
        numbers = [record["states"], record.get("axis", 1), record.get("numbering", 0)]
        if any(type(number) is not int for number in numbers) or numbers[2] not in (0, 1):
            raise QuantizationError("trellis states, axis and numbering must be integers")
        if "shifts" in record:
            raise QuantizationError("a trellis has no centroid shifts")
        return TrellisParams(step, numbers[0], numbers[1], bool(numbers[2]))
    shifts = record.get("shifts")
    if shifts is None:
        return UniformParams(step)
    if not isinstance(shifts, list) or len(shifts) != 3 or any(type(s) is not int for s in shifts):
        raise QuantizationError("centroid shifts must be three integers")
    return UniformParams(step, (shifts[0], shifts[1], shifts[2]))
