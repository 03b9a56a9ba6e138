"""What a track's packets decode to, and what its configuration record says of itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Form:
    """The pictures of a track.

    Attributes
    ----------
    width, height : int
        In luma samples; multiples of 64.
    bits : int
        Of a sample.
    """

    width: int
    height: int
    bits: int = 8


@dataclass(frozen=True, slots=True)
class Claim:
    """What a configuration record claims, in words; empty where a codec has no such thing.

    Attributes
    ----------
    profile, tier, level : str
    """

    profile: str
    tier: str = ""
    level: str = ""
