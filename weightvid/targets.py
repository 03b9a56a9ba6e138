"""Step factors for a size, a rate or an SQNR: few whole encodings, led by the last two."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from math import exp, inf, isfinite, log, log2
from typing import Final, TypeVar

from weightvid.errors import QuantizationError, TargetError

KINDS: Final = ("size", "bpw", "sqnr")
#: a size or a rate is met from below, at most so much under it.
SIZE_TOLERANCE: Final = 0.01
SQNR_TOLERANCE_DB: Final = 0.1
_MOST_TRIALS: Final = 12
_SMALLEST, _LARGEST = 1e-4, 1e4
_UNITS: Final = {
    "": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20,
    "GIB": 1 << 30,
}  # fmt: skip
_SIZE: Final = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*")


@dataclass(frozen=True, slots=True)
class Target:
    """What the step factor is searched for.

    Attributes
    ----------
    kind : str
        ``size`` (bytes of the whole file), ``bpw`` (8 x bytes / weights) or ``sqnr`` (dB over all
        quantized weights).
    value : float
        > 0. Sizes and rates are upper bounds.

    Raises
    ------
    QuantizationError
        Unknown kind, or a value that is no positive number.
    """

    kind: str
    value: float

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise QuantizationError(f"unknown target {self.kind!r}; choose: {', '.join(KINDS)}")
        if not (isfinite(self.value) and self.value > 0):
            raise QuantizationError(f"a target must be a positive number, not {self.value}")

    def __str__(self) -> str:
        return self.show(self.value)

    def show(self, value: float) -> str:
        """A value of this kind in words.

        Examples
        --------
        >>> Target("size", 5e5).show(499_000), Target("bpw", 2.5).show(2.4871)
        ('499,000 bytes', '2.487 bits per weight')
        """
        if self.kind == "size":
            return f"{round(value):,} bytes"
        return f"{value:.3f} bits per weight" if self.kind == "bpw" else f"{value:.2f} dB"


def parse_size(text: str) -> float:
    """Bytes of a size with a unit: 12MB and 900kB count in thousands, 4KiB and 1MiB in 1024s.

    Raises
    ------
    QuantizationError
        No such size.

    Examples
    --------
    >>> parse_size("1.5 MB"), parse_size("4KiB"), parse_size("700")
    (1500000.0, 4096.0, 700.0)
    """
    found = _SIZE.fullmatch(text)
    if found is None or found[2].upper() not in _UNITS or not float(found[1]):
        raise QuantizationError(f"{text!r} is no size such as 900kB, 12MB, 1.5GB or 4MiB")
    return float(found[1]) * _UNITS[found[2].upper()]


@dataclass(frozen=True, slots=True)
class Trial:
    """A whole encoding: step factor, bytes of the file, SQNR in dB (None: no error)."""

    factor: float
    file_bytes: int
    sqnr_db: float | None


_Made = TypeVar("_Made", bound=Trial)


def search(
    weights: int, factor: float, target: Target, encode: Callable[[float], _Made]
) -> tuple[_Made, int]:
    """Find a step factor whose archive meets a target.

    Sizes fall by about a bit per weight, and the SQNR by about 6 dB, with each octave of the
    factor; from the second trial on, the line through the last two leads.

    Parameters
    ----------
    weights : int
        Of the model.
    factor : float
        Tried first.
    target : Target
    encode : callable
        Makes the archive of a step factor.

    Returns
    -------
    Trial
        The last encoding, which meets the target.
    int
        Number of encodings.

    Raises
    ------
    TargetError
        The target is out of reach; the nearest that was found is named.
    """
    low, high = log(_SMALLEST), log(_LARGEST)
    least, most = target.value * (1 - SIZE_TOLERANCE), target.value
    if target.kind == "sqnr":
        least, most = target.value - SQNR_TOLERANCE_DB, target.value + SQNR_TOLERANCE_DB
    tried: list[tuple[float, float]] = []
    at = log(factor)
    while len(tried) < _MOST_TRIALS:
        made = encode(exp(at))
        value = _value(target, made, weights)
        tried.append((at, value))
        if least <= value <= most:
            return made, len(tried)
        low, high = (low, at) if value < least else (at, high)
        settled = len(tried) > 2 and len({value for _, value in tried[-3:]}) == 1
        if high - low < 1e-4 or settled:
            break
        at = _next(target, tried)
        if not low < at < high:
            at = (low + high) / 2
    nearest = min((value for _, value in tried), key=lambda value: abs(value - target.value))
    if nearest == inf:
        raise TargetError(f"{target} cannot be reached: nothing of the model is packed as video")
    raise TargetError(
        f"{target} cannot be reached; the nearest that was found is {target.show(nearest)}: "
        "choose a value nearer to it"
    )


def _value(target: Target, made: Trial, weights: int) -> float:
    if target.kind == "sqnr":
        return inf if made.sqnr_db is None else made.sqnr_db
    return made.file_bytes if target.kind == "size" else 8 * made.file_bytes / max(1, weights)


def _next(target: Target, tried: list[tuple[float, float]]) -> float:
    """Logarithm of the factor to try next."""
    at, value = tried[-1]
    if target.kind == "sqnr":
        aim, there, slope = target.value, value, -20 / log(10)
    else:
        aim, there, slope = log2(target.value * (1 - 0.4 * SIZE_TOLERANCE)), log2(value), -0.5
    if len(tried) > 1 and tried[-2][0] != at:
        before = tried[-2][1] if target.kind == "sqnr" else log2(tried[-2][1])
        drawn = (there - before) / (at - tried[-2][0])
        slope = drawn if drawn < 0.2 * slope else slope
    return at + (aim - there) / slope
