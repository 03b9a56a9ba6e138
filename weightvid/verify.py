"""Check an archive's hashes, and compare it with the checkpoint it was made from."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from math import inf, log10
from time import perf_counter
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from weightvid.archives import Defect, Location, Salvage, open_anywhere
from weightvid.checkpoint import CheckpointReader, open_checkpoint
from weightvid.errors import TensorNotFoundError
from weightvid.loader import Archive, Array, TensorSpec
from weightvid.progress import Report, quiet
from weightvid.spec import PACKABLE, to_float32

_BLOCK: Final = 1 << 20
#: the archive gives an SQNR in hundredths of a decibel.
_CLAIM_ROUNDING_DB: Final = 0.02


class TensorComparison(NamedTuple):
    """One tensor of the archive, compared with the checkpoint's.

    ``exact``: equal bit for bit. The SQNR, 10 log10(sum x^2 / sum (x - x')^2), is None for equal
    tensors and for types without values that can be compared; ``claimed_db`` is what the archive
    says of it. The largest error |x - x'| is None for such types, too.
    """

    name: str
    dtype: str
    weights: int
    exact: bool
    sqnr_db: float | None
    claimed_db: float | None
    max_abs_error: float | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """An archive compared with a checkpoint.

    Attributes
    ----------
    tensors : tuple of TensorComparison
        Distinct tensors that both have, with one dtype and shape.
    missing, extra, mismatched : tuple of str
        Names that only the checkpoint has, only the archive has, or of another dtype or shape.
    below : tuple of str
        Tensors whose SQNR is below the archive's claim or the minimum asked for, each with both.
    sqnr_db, max_abs_error : float or None, float
        Over all tensors in the pictures; None if there is no error at all. Largest of all tensors.
    """

    tensors: tuple[TensorComparison, ...]
    missing: tuple[str, ...]
    extra: tuple[str, ...]
    mismatched: tuple[str, ...]
    below: tuple[str, ...]
    sqnr_db: float | None
    max_abs_error: float

    @property
    def ok(self) -> bool:
        """Whether names, dtypes and shapes are the same, and each SQNR is as good as it should."""
        return not (self.missing or self.extra or self.mismatched or self.below)


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What a check found.

    Attributes
    ----------
    tensors, tensors_intact, weights : int
        Distinct tensors listed in the header, those whose every hash matches, and their elements.
    frames, file_bytes : int or None
        None when read from a pipe.
    defect, affected : Defect or None, tuple of str
        The first thing found wrong, and the tensors that are missing or damaged.
    comparison : Comparison or None
    seconds : float
    """

    tensors: int
    tensors_intact: int
    weights: int
    frames: int | None
    file_bytes: int | None
    defect: Defect | None
    affected: tuple[str, ...]
    comparison: Comparison | None
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether there is no defect, and the comparison, if there is one, is good."""
        return self.defect is None and (self.comparison is None or self.comparison.ok)


def verify_archive(
    archive: Location,
    against: str | os.PathLike[str] | None = None,
    progress: Report = quiet,
    *,
    min_sqnr_db: float | None = None,
) -> VerifyReport:
    """Decode an archive and check the hash of every frame, box and tensor.

    Parameters
    ----------
    archive : path, address or binary file object
        May be a pipe.
    against : path, address or None
        Checkpoint to compare with: each tensor's SQNR must reach what the archive says of it.
    progress : callable
        Receives the stage ``verify``.
    min_sqnr_db : float, optional
        What the SQNR of each tensor must reach, too.

    Raises
    ------
    FormatError
        Only for a file whose head cannot be read; later defects are in the report.
    CheckpointError, RemoteError
    """
    began = perf_counter()
    with open_anywhere(archive) as opened:
        salvage, comparison = Salvage(opened, progress, "verify"), None
        if against is None:
            intact = [spec for spec, _ in salvage]
        else:
            with open_checkpoint(against) as reader:
                intact, comparison = _compare(salvage, reader, min_sqnr_db)
        return VerifyReport(
            tensors=len(opened.header.tensors),
            tensors_intact=len(intact),
            weights=sum(spec.size for spec in intact),
            frames=None if opened.index is None else len(opened.index.frames),
            file_bytes=opened.source.size,
            defect=salvage.defect,
            affected=salvage.missing,
            comparison=comparison,
            seconds=perf_counter() - began,
        )


def _compare(
    salvage: Salvage, reader: CheckpointReader, least_db: float | None
) -> tuple[list[TensorSpec], Comparison]:
    archive, intact, compared, mismatched = salvage.archive, [], [], []
    for spec, array in salvage:
        intact.append(spec)
        try:
            other = reader.spec(spec.name)
        except TensorNotFoundError:
            continue
        if (other.dtype, other.shape) == (spec.dtype, spec.shape):
            compared.append((spec, _Sums.of(spec, array, reader)))
        else:
            mismatched.append(
                f"{spec.name}: {spec.dtype} {list(spec.shape)} in the archive, "
                f"{other.dtype} {list(other.shape)} in the checkpoint"
            )
    rows = [_comparison(archive, spec, sums) for spec, sums in compared]
    # Of a pipe, nobody knows any more which tensors were in the pictures.
    spans = archive.index.spans if archive.index else {}
    video = {archive.header.tensors[number].name for number in spans}
    coded = [s for spec, s in compared if (spec.name in video if spans else not s.equal)]
    total = _Sums(sum(s.power for s in coded), sum(s.noise for s in coded))
    ours, theirs = set(archive), [name for name, _ in reader.contents.rows()]
    return intact, Comparison(
        tensors=tuple(rows),
        missing=tuple(name for name in theirs if name not in ours),
        extra=tuple(name for name in archive if name not in set(theirs)),
        mismatched=tuple(mismatched),
        below=tuple(_below(rows, least_db)),
        sqnr_db=total.sqnr_db,
        max_abs_error=max((sums.largest for _, sums in compared), default=0.0),
    )


@dataclass(slots=True)
class _Sums:
    """Sums of squares of originals and of errors, the largest error, and whether all is equal."""

    power: float = 0.0
    noise: float = 0.0
    largest: float = 0.0
    equal: bool = True

    @property
    def sqnr_db(self) -> float | None:
        """None without noise."""
        if self.noise <= 0:
            return None
        return 10 * log10(self.power / self.noise) if self.power > 0 else -inf

    @classmethod
    def of(cls, spec: TensorSpec, array: Array, reader: CheckpointReader) -> _Sums:
        """Compare in blocks, so that little more than the tensor itself is in memory."""
        sums, flat = cls(), array.reshape(-1)
        for first in range(0, flat.size, _BLOCK):
            ours = flat[first : first + _BLOCK]
            theirs = reader.read_range(spec.name, first, ours.size)
            same = ours.tobytes() == theirs.tobytes()
            sums.equal = sums.equal and same
            if spec.dtype in PACKABLE:
                x = _values(theirs, spec.dtype)
                error = x - _values(ours, spec.dtype)
                sums.power += float(np.vdot(x, x))
                sums.noise += float(np.vdot(error, error))
                sums.largest = max(sums.largest, float(np.abs(error).max()))
        return sums


def _comparison(archive: Archive, spec: TensorSpec, sums: _Sums) -> TensorComparison:
    end = archive.info(spec.name).end if archive.index else None
    return TensorComparison(
        spec.name, spec.dtype, spec.size, sums.equal, sums.sqnr_db, end and end.sqnr_db,
        sums.largest if spec.dtype in PACKABLE else None,
    )  # fmt: skip


def _below(rows: list[TensorComparison], least_db: float | None) -> Iterator[str]:
    for row in rows:
        sqnr, claimed = row.sqnr_db, row.claimed_db
        if sqnr is not None and claimed is not None and sqnr < claimed - _CLAIM_ROUNDING_DB:
            yield f"{row.name}: {sqnr:.2f} dB, and the archive says {claimed:.2f}"
        elif sqnr is not None and least_db is not None and sqnr < least_db:
            yield f"{row.name}: {sqnr:.2f} dB, and {least_db:g} was asked for"


def _values(array: Array, dtype: str) -> npt.NDArray[np.float64]:
    """Values in double precision; NaN and infinities, which are stored exactly, count as zero."""
    values = to_float32(array, "BF16") if dtype == "BF16" else array
    with np.errstate(invalid="ignore"):
        wide = values.astype(np.float64)
    wide[~np.isfinite(wide)] = 0.0
    return wide
