"""What of an archive is whole: every frame, box and tensor checked, the first defect noted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from weightvid.errors import FormatError
from weightvid.loader import Archive
from weightvid.spec import TensorSpec

Array = npt.NDArray[np.generic]


@dataclass(frozen=True, slots=True)
class Defect:
    """The first thing found wrong.

    Attributes
    ----------
    code : str
        Stable name of the defect, as listed in FORMAT.md.
    message : str
    offset : int or None
        Byte offset in the archive, if known.
    """

    code: str
    message: str
    offset: int | None = None


@dataclass(slots=True)
class Salvage:
    """Iterates over the tensors of an archive, and remembers which are whole and what was wrong.

    A defect does not end the iteration where the file can seek and has its index: the tensors that
    have not come yet are then tried one by one.

    Parameters
    ----------
    archive : Archive
        Opened with ``check_tensors=True`` if the hashes of tensors are to be checked too.

    Attributes
    ----------
    defect : Defect or None
        The first defect met.
    missing : tuple of str
        Distinct tensors that did not come whole; known after the iteration.
    """

    archive: Archive
    defect: Defect | None = None
    missing: tuple[str, ...] = ()
    _left: dict[str, None] = field(default_factory=dict)

    def __iter__(self) -> Iterator[tuple[TensorSpec, Iterator[Array]]]:
        """Tensors in parts, in file order up to the first defect.

        Whether one is whole is known after its last part: see :meth:`is_whole`. A tensor that was
        not may come a second time.
        """
        self._left = dict.fromkeys(spec.name for spec in self.archive.header.tensors)
        self.missing = tuple(self._left)
        try:
            for spec, parts in self.archive.iter_parts():
                yield spec, self._watched(spec, parts)
        except FormatError as error:
            self._note(error)
            if self.archive.complete:
                yield from self._one_by_one()
        self.missing = tuple(self._left)

    def is_whole(self, name: str) -> bool:
        """Whether all parts of a tensor have come, and match its hash."""
        return name not in self._left

    def _one_by_one(self) -> Iterator[tuple[TensorSpec, Iterator[Array]]]:
        for name in tuple(self._left):
            with suppress(FormatError):
                for spec, parts in self.archive.iter_parts([name]):
                    yield spec, self._watched(spec, parts)

    def _watched(self, spec: TensorSpec, parts: Iterator[Array]) -> Iterator[Array]:
        try:
            yield from parts
        except FormatError as error:
            self._note(error)
            return
        self._left.pop(spec.name, None)

    def _note(self, error: FormatError) -> None:
        if self.defect is None:
            self.defect = Defect(error.code, str(error), error.offset)
