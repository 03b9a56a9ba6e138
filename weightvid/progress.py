"""How long work reports its progress: to a callable, from whatever floor it runs on."""

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
        Done so far, and in all.
    done_bytes, total_bytes : int
        The same as bytes of the checkpoint; 0 where nobody counts them.
    unit : str
        What is counted.
    """

    stage: str
    done: int
    total: int
    done_bytes: int = 0
    total_bytes: int = 0
    unit: str = "weights"


Report = Callable[[Progress], None]


def quiet(_: Progress) -> None:
    """Report to nobody."""
