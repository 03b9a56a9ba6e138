"""How long work reports its progress: to a callable, from whatever floor it runs on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Progress:
    """A point on the way.

    Attributes
    ----------
    stage : str
        What is being done: ``survey``, ``encode``, ``verify``, ``decode``, ...
    done, total : int
        Weights done so far, and in all.
    """

    stage: str
    done: int
    total: int


Report = Callable[[Progress], None]


def quiet(_: Progress) -> None:
    """Report to nobody."""
