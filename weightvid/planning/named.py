"""pack's quantizers by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from weightvid.allocate import DEFAULT_RULE


@dataclass(frozen=True, slots=True)
class Quantizer:
    """One of pack's quantizers.

    Attributes
    ----------
    states : int
        Of the trellis; 0: none.
    shaping : bool
        Convolutions are rounded with noise shaping.
    rule : str
        pack's step rule.
    """

    states: int
    shaping: bool
    rule: str = DEFAULT_RULE


#: pack's own choice comes first.
QUANTIZERS: Final[Mapping[str, Quantizer]] = MappingProxyType(
    {
        "pack": Quantizer(8, True),
        "sqnr": Quantizer(8, False, "sqnr"),
        "uniform": Quantizer(0, False),
        "shaped": Quantizer(0, True),
        "trellis4": Quantizer(4, False),
        "trellis8": Quantizer(8, False),
        "trellis16": Quantizer(16, False),
        "trellis32": Quantizer(32, False),
        "trellis64": Quantizer(64, False),
    }
)
DEFAULT_QUANTIZER: Final = "pack"
