"""Check an archive's hashes, and compare it with the checkpoint it was made from."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from math import log10
from time import perf_counter
from typing import BinaryIO, Final

import numpy as np
import numpy.typing as npt

from weightvid.checkpoint import CheckpointReader, open_checkpoint
from weightvid.dtypes import PACKABLE, to_float32
from weightvid.errors import TensorNotFoundError
from weightvid.loader import Archive, open_archive
from weightvid.progress import Progress, Report, quiet
from weightvid.remote import is_url, open_remote
from weightvid.salvage import Defect, Salvage
from weightvid.spec import TensorSpec

Array = npt.NDArray[np.generic]

_BLOCK: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class TensorComparison:
    """One tensor of the archive beside the checkpoint's.

    Attributes
    ----------
    name, dtype : str
    weights : int
    exact : bool
        Equal bit for bit.
    sqnr_db : float or None
        10 log10(sum x^2 / sum (x - x')^2); None for equal tensors and for types without values
        that can be compared (then ``exact`` says all).
    max_abs_error : float or None
        Largest |x - x'|; None for such types.
    """

    name: str
    dtype: str
    weights: int
    exact: bool
    sqnr_db: float | None
    max_abs_error: float | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """An archive beside a checkpoint.

    Attributes
    ----------
    tensors : tuple of TensorComparison
        Distinct tensors that both have, with one dtype and shape.
    missing : tuple of str
        Names of the checkpoint that the archive lacks.
    extra : tuple of str
        Names of the archive that the checkpoint lacks.
    mismatched : tuple of str
        Tensors of another dtype or shape, each with both.
    sqnr_db : float or None
        Over all quantized floating-point tensors together; None if there is no error at all.
    max_abs_error : float
        Of all tensors.
    """

    tensors: tuple[TensorComparison, ...]
    missing: tuple[str, ...]
    extra: tuple[str, ...]
    mismatched: tuple[str, ...]
    sqnr_db: float | None
    max_abs_error: float

    @property
    def same_model(self) -> bool:
        """Whether both have the same names, dtypes and shapes."""
        return not (self.missing or self.extra or self.mismatched)


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What a check found.

    Attributes
    ----------
    tensors, tensors_whole : int
        Distinct tensors listed in the header, and those whose every hash matches.
    weights : int
        Elements of the whole ones.
    frames : int or None
        Frames listed in the index; None when read from a pipe.
    file_bytes : int
        Bytes read from the archive, which is all of them if it is sound.
    defect : Defect or None
        The first thing found wrong.
    affected : tuple of str
        Tensors that are missing or damaged.
    comparison : Comparison or None
        Only with ``against``.
    seconds : float
    """

    tensors: int
    tensors_whole: int
    weights: int
    frames: int | None
    file_bytes: int
    defect: Defect | None
    affected: tuple[str, ...]
    comparison: Comparison | None
    seconds: float

    @property
    def ok(self) -> bool:
        """No defect, and the same names, dtypes and shapes as the checkpoint, if there is one."""
        return self.defect is None and (self.comparison is None or self.comparison.same_model)


@dataclass(slots=True)
class _Sums:
    """Sums over a tensor, or over all tensors compared so far.

    Attributes
    ----------
    power, noise : float
        Sums of squares of the original and of the error.
    largest : float
        Magnitude of an error.
    equal : bool
        No part differs in a bit.
    """

    power: float = 0.0
    noise: float = 0.0
    largest: float = 0.0
    equal: bool = True

    @property
    def sqnr_db(self) -> float | None:
        """None without noise."""
        if self.noise <= 0:
            return None
        return 10 * log10(self.power / self.noise) if self.power > 0 else float("-inf")

    def add(self, ours: Array, theirs: Array, dtype: str) -> None:
        """Compare some elements."""
        same = np.array_equal(_bits(ours), _bits(theirs))
        self.equal = self.equal and same
        if dtype not in PACKABLE:
            return
        x = _values(theirs, dtype)
        self.power += float(np.vdot(x, x))
        if not same:
            x -= _values(ours, dtype)
            self.noise += float(np.vdot(x, x))
            self.largest = max(self.largest, float(np.abs(x).max()))


def verify_archive(
    archive: str | os.PathLike[str] | BinaryIO,
    against: str | os.PathLike[str] | None = None,
    progress: Report = quiet,
    *,
    threads: int = 0,
) -> VerifyReport:
    """Decode an archive and check the hash of every frame, box and tensor.

    Parameters
    ----------
    archive : path, address or binary file object
        May be a pipe.
    against : path, address or None
        Checkpoint to compare with.
    progress : callable
        Told about the stage ``verify``.
    threads : int
        Frames decoded at the same time; 0: one per core.

    Raises
    ------
    FormatError
        Only for a file whose head cannot be read; later defects are in the report.
    CheckpointError
        The checkpoint cannot be read.
    RemoteError
        The archive cannot be read from its address.
    """
    began = perf_counter()
    if is_url(archive):
        with open_remote(archive) as stream:
            return verify_archive(stream, against, progress, threads=threads)
    with open_archive(archive, threads=threads, check_tensors=True) as opened:
        salvage = Salvage(opened)
        if against is None:
            whole, comparison = list(_walk(opened, salvage, progress)), None
        else:
            with open_checkpoint(against) as reader:
                whole, comparison = _compare(opened, salvage, reader, progress)
        return VerifyReport(
            tensors=len(opened.header.tensors),
            tensors_whole=len(whole),
            weights=sum(spec.size for spec in whole),
            frames=None if opened.complete is None else len(opened.index.frames),
            file_bytes=_size(archive, opened),
            defect=salvage.defect,
            affected=salvage.missing,
            comparison=comparison,
            seconds=perf_counter() - began,
        )


def _size(archive: str | os.PathLike[str] | BinaryIO, opened: Archive) -> int:
    if isinstance(archive, (str, os.PathLike)):
        return os.stat(archive).st_size  # noqa: PTH116 - a path of any make
    if opened.complete is None:
        return opened.bytes_read
    return archive.seek(0, os.SEEK_END)


def _walk(archive: Archive, salvage: Salvage, progress: Report) -> Iterator[TensorSpec]:
    for spec, parts in _tracked(archive, salvage, progress):
        for _ in parts:
            pass
        if salvage.is_whole(spec.name):
            yield spec


def _tracked(
    archive: Archive, salvage: Salvage, progress: Report
) -> Iterator[tuple[TensorSpec, Iterator[Array]]]:
    """What is salvaged, in parts, told as they pass."""
    specs = archive.header.tensors
    told = _Told(sum(s.size for s in specs), sum(s.stored_bytes for s in specs), progress)
    for spec, parts in salvage:
        yield spec, told.parts(parts)


@dataclass(slots=True)
class _Told:
    total: int
    total_bytes: int
    progress: Report
    done: int = 0
    done_bytes: int = 0

    def parts(self, parts: Iterator[Array]) -> Iterator[Array]:
        for part in parts:
            yield part
            # What is tried a second time counts once.
            self.done = min(self.total, self.done + part.size)
            self.done_bytes = min(self.total_bytes, self.done_bytes + part.nbytes)
            self.progress(
                Progress("verify", self.done, self.total, self.done_bytes, self.total_bytes)
            )


def _compare(
    archive: Archive, salvage: Salvage, reader: CheckpointReader, progress: Report
) -> tuple[list[TensorSpec], Comparison]:
    total = _Sums()
    whole, rows, mismatched = [], [], []
    for spec, parts in _tracked(archive, salvage, progress):
        other = _same_name(reader, spec)
        comparable = other is not None and (other.dtype, other.shape) == (spec.dtype, spec.shape)
        sums = _compare_parts(spec, parts, reader if comparable else None)
        if not salvage.is_whole(spec.name):
            continue
        whole.append(spec)
        if comparable:
            rows.append(_comparison(spec, sums, total))
        elif other is not None:
            mismatched.append(
                f"{spec.name}: {spec.dtype} {list(spec.shape)} in the archive, "
                f"{other.dtype} {list(other.shape)} in the checkpoint"
            )
    ours = set(archive.names)
    theirs = [*(spec.name for spec in reader.contents.tensors), *reader.contents.aliases]
    return whole, Comparison(
        tensors=tuple(rows),
        missing=tuple(name for name in theirs if name not in ours),
        extra=tuple(name for name in archive.names if name not in set(theirs)),
        mismatched=tuple(mismatched),
        sqnr_db=total.sqnr_db,
        max_abs_error=total.largest,
    )


def _same_name(reader: CheckpointReader, spec: TensorSpec) -> TensorSpec | None:
    try:
        return reader.spec(spec.name)
    except TensorNotFoundError:
        return None


def _compare_parts(
    spec: TensorSpec, parts: Iterator[Array], reader: CheckpointReader | None
) -> _Sums:
    """Compare a tensor part by part, in blocks; without a reader the parts only pass."""
    sums = _Sums()
    first = 0
    for part in parts:
        flat = part.reshape(-1)
        if reader is not None:
            theirs = reader.read_range(spec.name, first, flat.size)
            for begin in range(0, flat.size, _BLOCK):
                block = slice(begin, begin + _BLOCK)
                sums.add(flat[block], theirs[block], spec.dtype)
        first += flat.size
    return sums


def _comparison(spec: TensorSpec, sums: _Sums, total: _Sums) -> TensorComparison:
    if spec.dtype not in PACKABLE:
        return TensorComparison(spec.name, spec.dtype, spec.size, sums.equal, None, None)
    if not sums.equal:
        total.power += sums.power
        total.noise += sums.noise
    total.largest = max(total.largest, sums.largest)
    return TensorComparison(
        spec.name, spec.dtype, spec.size, sums.equal, sums.sqnr_db, sums.largest
    )


def _bits(array: Array) -> npt.NDArray[np.uint8]:
    return np.ascontiguousarray(array).view(np.uint8)


def _values(array: Array, dtype: str) -> npt.NDArray[np.float64]:
    """Values in double precision; NaN and infinities, which are stored exactly, count as zero."""
    values = to_float32(array, "BF16") if dtype == "BF16" else array
    with np.errstate(invalid="ignore"):
        wide = values.astype(np.float64)
    wide[~np.isfinite(wide)] = 0.0
    return wide
