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
    """Iterates over the tensors of an archive that are whole, and remembers what was wrong.

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

    def __iter__(self) -> Iterator[tuple[TensorSpec, Array]]:
        """Whole tensors: in file order up to the first defect."""
        self._left = dict.fromkeys(spec.name for spec in self.archive.header.tensors)
        self.missing = tuple(self._left)
        try:
            yield from self._counted(self.archive.iter_stored())
        except FormatError as error:
            self.defect = Defect(error.code, str(error), error.offset)
            if self.archive.complete:
                yield from self._one_by_one()
        self.missing = tuple(self._left)

    def _one_by_one(self) -> Iterator[tuple[TensorSpec, Array]]:
        for name in tuple(self._left):
            with suppress(FormatError):
                yield from self._counted(self.archive.iter_selected([name]))

    def _counted(
        self, tensors: Iterator[tuple[TensorSpec, Array]]
    ) -> Iterator[tuple[TensorSpec, Array]]:
        for spec, array in tensors:
            self._left.pop(spec.name, None)
            yield spec, array
