"""What a packing may aim at: a size, a rate, an SQNR, or a loss that an evaluation measures."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import isfinite
from typing import Final

from weightvid.errors import QuantizationError

#: what a target can be of.
KINDS: Final = ("size", "bpw", "sqnr", "drop", "kl")
#: those that only an evaluation can judge.
MEASURED: Final = ("drop", "kl")
#: a size is met from below, at most so much under it.
SIZE_TOLERANCE: Final = 0.01
SQNR_TOLERANCE_DB: Final = 0.1

_UNITS: Final = {
    "": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20,
    "GIB": 1 << 30,
}  # fmt: skip
_SIZE: Final = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*")
_SHARE: Final = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*(%?)\s*")


@dataclass(frozen=True, slots=True)
class Target:
    """What the step factor is searched for.

    Attributes
    ----------
    kind : str
        ``size`` (bytes of the whole file), ``bpw`` (8 x bytes / weights), ``sqnr`` (dB over all
        quantized weights), ``drop`` (relative loss of the metric, 0.01 for 1 %) or ``kl``
        (mean Kullback-Leibler divergence of the outputs, in nats).
    value : float
        > 0. Sizes, rates and losses are upper bounds.

    Raises
    ------
    QuantizationError
        Unknown kind, or a value that is no positive number.
    """

    kind: str
    value: float

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise QuantizationError(f"unknown target {self.kind!r}; known: {', '.join(KINDS)}")
        if not (isfinite(self.value) and self.value > 0):
            raise QuantizationError(f"a target must be a positive number, not {self.value}")

    @property
    def measured(self) -> bool:
        """Whether only an evaluation can judge it."""
        return self.kind in MEASURED

    def show(self, value: float) -> str:
        """A value of this kind in words.

        Examples
        --------
        >>> Target("size", 5e5).show(499_000), Target("drop", 0.005).show(0.00713)
        ('499,000 bytes', 'a drop of 0.713 %')
        """
        if self.kind == "size":
            return f"{round(value):,} bytes"
        if self.kind == "bpw":
            return f"{value:.3f} bits per weight"
        if self.kind == "sqnr":
            return f"{value:.2f} dB"
        if self.kind == "drop":
            return f"a drop of {100 * value:.3g} %"
        return f"a KL divergence of {value:.3g}"


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


def parse_share(text: str) -> float:
    """A share such as ``0.5%`` or ``0.005``.

    Raises
    ------
    QuantizationError
        No share below 1.

    Examples
    --------
    >>> parse_share("0.5%"), parse_share("0.02")
    (0.005, 0.02)
    """
    found = _SHARE.fullmatch(text)
    value = float(found[1]) / (100 if found[2] else 1) if found else 0.0
    if not 0 < value < 1:
        raise QuantizationError(f"{text!r} is no share such as 0.5% or 0.005")
    return value
