"""Check an archive's hashes, and compare it with the checkpoint it was made from."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from math import inf, isnan, log10
from time import perf_counter
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from weightvid.archives import Defect, Location, Salvage, open_anywhere
from weightvid.calibrate.evaluation import Function, Judge, load_function, natural_tensor
from weightvid.checkpoint import CheckpointReader, open_checkpoint
from weightvid.errors import EvaluationError, FormatError, TensorNotFoundError
from weightvid.exact import (
    FULL_BITS,
    LEAST_BITS,
    kept_bits,
    norm_sqnr_db,
    norms_of,
    rounds_mantissas,
)
from weightvid.levels.code import compare_rows
from weightvid.levels.transform import view_of
from weightvid.loader import PACKABLE, Archive, Array, TensorSpec, to_float32
from weightvid.progress import Report, quiet

_BLOCK: Final = 1 << 20
#: the archive gives an SQNR in hundredths of a decibel.
_CLAIM_ROUNDING_DB: Final = 0.02
#: of a tensor that an update leaves as it was, as its error grows by less than 1.5 %.
_UNCHANGED_DB: Final = 0.15
#: a tensor beside the pictures keeps 7 bits of mantissa, and in an update nearly so many; of a
#: BatchNorm that holds for what it computes with.
_EXACT_DB: Final = 42.0
#: where floats are much of a small model, they keep fewer: each bit is worth so much, and in a
#: BatchNorm two errors may meet.
_DB_A_BIT, _MEETING_DB = 6.0, 3.0


class TensorComparison(NamedTuple):
    """One tensor of the archive, compared with the checkpoint's.

    ``exact``: equal bit for bit. The SQNR, 10 log10(sum x^2 / sum (x - x')^2) over all weights but
    outliers (beyond 48 scales of their row), is None for equal tensors and for types without values
    that can be compared; ``claimed_db`` is what the archive says of it. The largest error |x - x'|
    is None for such types, too.
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
        Tensors farther from the checkpoint's than the archive says, or than was asked for, and why.
    sqnr_db, max_abs_error : float or None, float
        Over all tensors in the pictures; None if there is no error at all. Largest of all tensors.
    norms_db : float or None
        Of the gain and offset of the worst BatchNorm, for which its tensors are judged.
    divergence, max_kl : float or None
        Of the outputs, as the function judges them, and what it may be at most.
    """

    tensors: tuple[TensorComparison, ...]
    missing: tuple[str, ...]
    extra: tuple[str, ...]
    mismatched: tuple[str, ...]
    below: tuple[str, ...]
    sqnr_db: float | None
    max_abs_error: float
    norms_db: float | None = None
    divergence: float | None = None
    max_kl: float | None = None

    @property
    def ok(self) -> bool:
        """Whether names, types and shapes are the same, and nothing is worse than it should be."""
        far = None not in (self.divergence, self.max_kl) and self.divergence > self.max_kl  # type: ignore[operator]
        return not (self.missing or self.extra or self.mismatched or self.below or far)


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
        The first thing found wrong, and the tensors that are missing, coarse or damaged.
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
    archive: Location | Archive,
    against: str | os.PathLike[str] | None = None,
    progress: Report = quiet,
    *,
    min_sqnr_db: float | None = None,
    evaluation: str | Function | None = None,
    max_kl: float | None = None,
) -> VerifyReport:
    """Decode an archive and check the hash of every frame, box and tensor.

    Parameters
    ----------
    archive : path, address, binary file object or Archive
        May be a pipe; an update is opened with its base before.
    against : path, address or None
        Checkpoint to compare with: each tensor's SQNR must reach what the archive says of it.
    progress : callable
        Receives the stage ``verify``.
    min_sqnr_db : float, optional
        What the SQNR of each tensor must reach, too.
    evaluation, max_kl : str or callable, float, optional
        Judges dicts of all tensors (see `weightvid.calibrate.evaluation.Judge`): the divergence of
        the archive's outputs from the checkpoint's may be ``max_kl`` at most.

    Raises
    ------
    FormatError
        Only for a file whose head cannot be read, or an update without its base; later defects are
        in the report.
    CheckpointError, RemoteError, EvaluationError
    """
    began = perf_counter()
    with open_anywhere(archive) as opened:
        salvage, comparison = Salvage(opened, progress, "verify"), None
        if opened.header.layers and opened.header.layers.base and opened.base is None:
            raise FormatError("this is an update: give the base of this archive", "base")
        if against is None:
            came = [spec for spec, _ in salvage]
        else:
            with open_checkpoint(against) as reader:
                judged = None if evaluation is None else _Judged(evaluation, max_kl)
                came, comparison = _compare(salvage, reader, min_sqnr_db, judged)
        coarse = set(salvage.coarse)
        intact = [spec for spec in came if spec.name not in coarse]
        return VerifyReport(
            tensors=len(opened.header.tensors),
            tensors_intact=len(intact),
            weights=sum(spec.size for spec in intact),
            frames=None if opened.index is None else len(opened.index.frames),
            file_bytes=opened.source.size,
            defect=salvage.defect,
            affected=(*salvage.missing, *salvage.coarse),
            comparison=comparison,
            seconds=perf_counter() - began,
        )


class _Judged:
    """Collects the tensors of an archive, and judges them next to the checkpoint's."""

    def __init__(self, function: str | Function, max_kl: float | None) -> None:
        self._function, self._torch = load_function(function)
        self.max_kl, self._found = max_kl, dict[str, Any]()

    def add(self, spec: TensorSpec, array: Array) -> None:
        self._found[spec.name] = natural_tensor(array, spec, self._torch)

    def divergence(self, reader: CheckpointReader, aliases: Mapping[str, str]) -> float:
        read, contents = reader.read, reader.contents
        state = {s.name: natural_tensor(read(s.name), s, self._torch) for s in contents.tensors}
        judge = Judge(self._function, state | {a: state[n] for a, n in contents.aliases.items()})
        verdict = judge.judge(self._found | {a: self._found[n] for a, n in aliases.items()})
        if verdict.loss is None:
            raise EvaluationError(
                "the evaluation returns a number alone; a divergence needs logits or unit vectors"
            )
        return verdict.loss


def _compare(
    salvage: Salvage, reader: CheckpointReader, least_db: float | None, judged: _Judged | None
) -> tuple[list[TensorSpec], Comparison]:
    archive, intact, compared, mismatched = salvage.archive, [], [], []
    specs = archive.header.tensors
    norms = [[specs[number].name for number in norm] for norm in norms_of(specs)]
    normal, parts, kept = {*chain(*norms)}, dict[str, Array](), dict[str, float]()
    bits = dict[str, int]()
    for spec, array in salvage:
        intact.append(spec)
        if rounds_mantissas(spec):
            bits[spec.name] = max(LEAST_BITS, kept_bits(array))
        if spec.name in normal:
            parts[spec.name] = to_float32(array, "F32")
        if judged is not None:
            judged.add(spec, array)
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
    same = {spec.name for spec, _ in compared}
    for norm in norms:
        if same.issuperset(norm):
            bits |= dict.fromkeys(norm, max(bits[name] for name in norm))
            given = (to_float32(reader.read(name), "F32") for name in norm)
            sqnr = norm_sqnr_db(given, (parts[name] for name in norm))
            kept |= {} if isnan(sqnr) else dict.fromkeys(norm, sqnr)
    claims = _claims(archive)
    rows = [
        TensorComparison(
            spec.name, spec.dtype, spec.size, sums.equal, sums.sqnr_db, claims.get(spec.name),
            sums.largest if spec.dtype in PACKABLE else None,
        )
        for spec, sums in compared
    ]  # fmt: skip
    # Of a pipe, nobody knows any more which tensors were in the pictures.
    index, tensors = archive.index, archive.header.tensors
    video = {spec.name for n, spec in enumerate(tensors) if index is None or n in index.spans}
    coded = [s for spec, s in compared if spec.name in video and not (index is None and s.equal)]
    total = _Sums(sum(s.power for s in coded), sum(s.noise for s in coded))
    ours, theirs = set(archive), [name for name, _ in reader.contents.rows()]
    others, divergence = set(theirs), None
    whole = not (salvage.missing or mismatched or ours != others)
    if judged is not None and whole:
        named = {alias: archive.spec(alias).name for alias in archive.header.aliases}
        divergence = judged.divergence(reader, named)
    return intact, Comparison(
        tensors=tuple(rows),
        missing=tuple(name for name in theirs if name not in ours),
        extra=tuple(name for name in archive if name not in others),
        mismatched=tuple(mismatched),
        below=tuple(_below(rows, least_db, archive, kept, bits)),
        sqnr_db=total.sqnr_db,
        max_abs_error=max((sums.largest for _, sums in compared), default=0.0),
        norms_db=min((sqnr for sqnr in kept.values() if sqnr < inf), default=None),
        divergence=divergence,
        max_kl=None if judged is None else judged.max_kl,
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
        """Compare in blocks of rows: little more than the tensor itself is in memory."""
        sums, flat, columns = cls(), array.reshape(-1), max(1, view_of(spec.shape).columns)
        step = max(1, _BLOCK // columns) * columns
        for first in range(0, flat.size, step):
            ours = flat[first : first + step]
            theirs = reader.read_range(spec.name, first, ours.size)
            same = ours.tobytes() == theirs.tobytes()
            sums.equal = sums.equal and same
            if spec.dtype in PACKABLE:
                shape = -1, columns
                found = compare_rows(theirs.reshape(shape), ours.reshape(shape), spec.dtype)
                sums.power, sums.noise = sums.power + found.signal, sums.noise + found.noise
                error = _values(theirs, spec.dtype) - _values(ours, spec.dtype)
                sums.largest = max(sums.largest, float(np.abs(error).max()))
        return sums


def _claims(archive: Archive) -> dict[str, float | None]:
    """What the archive says of the SQNR of each tensor, as far as its sidecars are whole.

    Of a tensor that begins in the base, the base does.
    """
    found, header = dict[str, float | None](), archive.header
    tensors = header.tensors
    if archive.base is not None:
        begun = [spec.name for number, spec in enumerate(tensors) if header.mask(number) & 1]
        base, said = archive.base, _claims(archive.base)
        found = {name: said.get(base.spec(name).name) for name in begun if name in base}
    for number in range(len(archive.index.frames) if archive.index else 0):
        with suppress(FormatError):
            ends = archive.packet(number)[0].ends
            found.update((tensors[end.tensor].name, end.sqnr_db) for end in ends)
    return found


def _below(
    rows: list[TensorComparison],
    least_db: float | None,
    archive: Archive,
    norms: Mapping[str, float],
    bits: Mapping[str, int],
) -> Iterator[str]:
    """What is worse than it should be; calibration may move what lies beside the pictures."""
    moved = "calibrated" in archive.header.about
    # Of what the last layer leaves as it was, the claim may be about a model that it is near to.
    header = archive.header
    last = 1 << header.layers.total if header.layers else 0
    left = {s.name for n, s in enumerate(header.tensors) if last and not header.mask(n) & last}
    for row in rows:
        sqnr, claimed = norms.get(row.name, row.sqnr_db), row.claimed_db
        floor = _DB_A_BIT * (bits.get(row.name, FULL_BITS) + 1) - _MEETING_DB * (row.name in norms)
        slack = _UNCHANGED_DB if row.name in left else _CLAIM_ROUNDING_DB
        kept = claimed is None and archive.index is not None and not row.exact
        if kept and row.dtype not in PACKABLE:
            yield f"{row.name}: other elements, and the archive keeps it exactly"
        elif kept and not moved and sqnr is not None and sqnr < min(_EXACT_DB, floor):
            yield f"{row.name}: {sqnr:.2f} dB, and the archive keeps it but for its last bits"
        elif sqnr is not None and claimed is not None and sqnr < claimed - slack:
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
