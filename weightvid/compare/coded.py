"""What coders of all kinds give: the parts of a file, and tensors again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy.typing as npt

Array = npt.NDArray[Any]
Tensors = dict[str, Array]
Parts = dict[str, bytes]


@dataclass(frozen=True, slots=True)
class Coded:
    """A model in its coded form.

    Attributes
    ----------
    parts : dict of str to bytes
        Everything that is needed to restore the model but what the coder's row says, by name.
    sizes : mapping of str to int
        Itemised bytes; of the parts, unless given.
    codec_s : float or None
        Seconds in the video codec alone.
    seconds : float or None
        What the work took where another program did it and measured itself, start-up left out.
    peak_bytes : int or None
        Peak memory of another program.
    about : mapping
        Facts for the row: profile, frame size, number of frames.
    """

    parts: Parts
    sizes: Mapping[str, int] = field(default_factory=dict)
    codec_s: float | None = None
    seconds: float | None = None
    peak_bytes: int | None = None
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def items(self) -> dict[str, int]:
        """Itemised bytes, empty parts left out."""
        sizes = self.sizes or {name: len(data) for name, data in self.parts.items()}
        return {name: size for name, size in sizes.items() if size}


@dataclass(frozen=True, slots=True)
class Decoded:
    """Restored tensors by name; the rest as in :class:`Coded`."""

    tensors: Tensors
    codec_s: float | None = None
    seconds: float | None = None
    peak_bytes: int | None = None


class Coder(Protocol):
    """Codes one model at one setting."""

    def encode(self, jobs: int) -> Coded:
        """Code the model; ``jobs`` threads at most, 0: one per core."""

    def decode(self, coded: Coded, jobs: int) -> Decoded:
        """Restore the model from the coded form alone, and from its names and shapes."""

    @property
    def scales(self) -> bool:
        """Whether more jobs make a difference."""
