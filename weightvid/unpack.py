"""Archive to checkpoint, one tensor in memory at a time."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from time import perf_counter
from typing import IO, BinaryIO, Final, cast

import numpy as np
import numpy.typing as npt

from weightvid.checkpoint import Contents, create_checkpoint, kind_for_output
from weightvid.checkpoint.base import shorten
from weightvid.container.records import Header
from weightvid.dtypes import PACKABLE, from_float32, stored_dtype, to_float32
from weightvid.errors import CheckpointError, FormatError, TensorNotFoundError, TruncatedError
from weightvid.loader import Archive, open_archive
from weightvid.loader.stream import Spill
from weightvid.progress import Progress, Report, quiet
from weightvid.remote import is_url, open_remote
from weightvid.salvage import Defect, Salvage
from weightvid.spec import SideFile, TensorSpec

Array = npt.NDArray[np.generic]

#: floating-point types that ``UnpackOptions.dtype`` may name.
OUTPUT_DTYPES: Final = ("F32", "F16", "BF16", "F64")


@dataclass(frozen=True, slots=True)
class UnpackOptions:
    """Settings of one unpacking.

    Attributes
    ----------
    tensors : tuple of str
        Shell-style patterns of the names wanted; empty: all. The pattern of a tensor brings its
        aliases along; a pattern of an alias alone brings the tensor's data under that name.
    dtype : str or None
        F32, F16, BF16 or F64: every F64, F32, F16 and BF16 tensor is converted to it (nearest,
        ties to even). None: each has the type it had in the source.
    kind : str or None
        ``safetensors``, ``torch``, ``npz``, ``folder``, ...; None: by the destination's suffix, or
        a folder if it has none.
    force : bool
        Replace an existing file.
    threads : int
        Frames decoded at the same time; 0: one per core.
    partial : bool
        Write what is whole of an archive that is cut short or damaged.
    side_files : bool
        Restore the model's small other files, where the kind has a place for them.
    """

    tensors: tuple[str, ...] = ()
    dtype: str | None = None
    kind: str | None = None
    force: bool = False
    threads: int = 0
    partial: bool = False
    side_files: bool = True


@dataclass(frozen=True, slots=True)
class UnpackReport:
    """What an unpacking did.

    Attributes
    ----------
    tensors : int
        Distinct tensors written.
    weights : int
        Their elements.
    file_bytes : int
        Of the checkpoint.
    aliases : tuple of str
        Further names written for those tensors.
    converted : tuple of str
        Tensors that changed their type, as asked.
    notes : tuple of str
        What the output's kind cannot hold as it is, and what was written instead.
    missing : tuple of str
        Tensors asked for that the archive does not hold whole (``partial`` only).
    defect : Defect or None
        Why they are missing.
    seconds : float
    side_files : tuple of str
        Paths of the small other files written.
    """

    tensors: int
    weights: int
    file_bytes: int
    aliases: tuple[str, ...]
    converted: tuple[str, ...]
    notes: tuple[str, ...]
    missing: tuple[str, ...]
    defect: Defect | None
    seconds: float
    side_files: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Selection:
    """Which tensors are wanted, and under which names they are written.

    Attributes
    ----------
    names : mapping of str to str
        Name in the archive of each distinct tensor wanted -> its name in the output.
    aliases : mapping of str to str
        Further name in the output -> name in the output.
    """

    names: Mapping[str, str]
    aliases: Mapping[str, str] = field(default_factory=dict)

    def without(self, missing: tuple[str, ...]) -> _Selection:
        names = {name: out for name, out in self.names.items() if name not in missing}
        kept = set(names.values())
        return _Selection(names, {a: out for a, out in self.aliases.items() if out in kept})


def unpack_archive(
    archive: str | os.PathLike[str] | BinaryIO,
    destination: str | os.PathLike[str],
    options: UnpackOptions | None = None,
    progress: Report = quiet,
) -> UnpackReport:
    """Unpack an archive into a checkpoint.

    Every hash is checked, that of each tensor included.

    Parameters
    ----------
    archive : path, address or binary file object
        A pipe is read once, in order; with ``partial`` it is first copied to a temporary file.
    destination : path
        Appears whole, or not at all.
    options : UnpackOptions
    progress : callable
        Told about the stage ``decode`` (and, with ``partial``, ``check`` before it).

    Raises
    ------
    FormatError
        The archive is damaged; without ``partial``, also when tensors asked for are missing
        (:class:`~weightvid.errors.TruncatedError` with their names).
    TensorNotFoundError
        A pattern matches no tensor.
    CheckpointError, OutputError
        The checkpoint cannot hold these tensors, or cannot be written.
    RemoteError
        The archive cannot be read from its address.
    """
    began = perf_counter()
    chosen = options or UnpackOptions()
    if chosen.dtype is not None and chosen.dtype not in OUTPUT_DTYPES:
        raise CheckpointError(
            f"cannot convert to {chosen.dtype!r}; known are {', '.join(OUTPUT_DTYPES)}"
        )
    if is_url(archive):
        with open_remote(archive) as stream:
            report = unpack_archive(stream, destination, chosen, progress)
        return replace(report, seconds=perf_counter() - began)
    if isinstance(archive, (str, os.PathLike)):
        _refuse_same_file(archive, destination)
    elif chosen.partial and not archive.seekable():
        with tempfile.TemporaryFile() as spool:
            shutil.copyfileobj(archive, cast("IO[bytes]", spool))
            spool.seek(0)
            report = unpack_archive(cast(BinaryIO, spool), destination, chosen, progress)
        return replace(report, seconds=perf_counter() - began)
    with open_archive(archive, threads=chosen.threads, check_tensors=True) as opened:
        report = _unpack(opened, Path(destination), chosen, progress)
    return replace(report, seconds=perf_counter() - began)


def _refuse_same_file(archive: str | os.PathLike[str], destination: str | os.PathLike[str]) -> None:
    if Path(destination).exists() and os.path.realpath(archive) == os.path.realpath(destination):
        raise CheckpointError(f"{os.fspath(destination)} is the archive itself")


def _unpack(
    archive: Archive, destination: Path, options: UnpackOptions, progress: Report
) -> UnpackReport:
    selection = _select(archive.header, options.tensors)
    files, file_notes = _side_files(archive, destination, options)
    missing: tuple[str, ...] = ()
    defect: Defect | None = None
    if options.partial:
        absent, defect = _find_missing(archive, progress)
        missing = tuple(selection.names[name] for name in absent if name in selection.names)
        selection = selection.without(absent)
    contents, converted = _contents(archive.header, selection, options.dtype)
    contents = replace(contents, files=files)
    total = sum(spec.size for spec in contents.tensors)
    with create_checkpoint(destination, contents, force=options.force, kind=options.kind) as writer:
        told = _Told(total, sum(spec.stored_bytes for spec in contents.tensors), progress)
        for spec, parts in _read(archive, selection, _spill(destination), not missing):
            output = selection.names[spec.name]
            dtype = options.dtype if output in converted else None
            writer.write_parts(output, told.parts(parts, spec, dtype))
        notes = writer.notes
    return UnpackReport(
        tensors=len(contents.tensors),
        weights=total,
        file_bytes=_size(destination),
        aliases=tuple(selection.aliases),
        converted=converted,
        notes=(*notes, *file_notes),
        missing=missing,
        defect=defect if missing else None,
        seconds=0.0,
        side_files=tuple(file.path for file in files),
    )


@dataclass(slots=True)
class _Told:
    """Progress, in weights and in bytes of the checkpoint that is written."""

    total: int
    total_bytes: int
    progress: Report
    done: int = 0
    done_bytes: int = 0

    def parts(self, parts: Iterable[Array], spec: TensorSpec, dtype: str | None) -> Iterator[Array]:
        """Parts of a tensor on their way to the writer, converted if asked."""
        for part in parts:
            made = part if dtype is None else convert(part, spec, dtype)
            yield made
            self.done += part.size
            self.done_bytes += made.nbytes
            self.progress(
                Progress("decode", self.done, self.total, self.done_bytes, self.total_bytes)
            )


def _spill(destination: Path) -> Spill:
    """Levels of large tensors wait beside what is being written: there is room, or else no use."""
    folder = destination.resolve().parent
    return Spill(folder if folder.is_dir() else None)


def _size(path: Path) -> int:
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return path.stat().st_size


def _side_files(
    archive: Archive, destination: Path, options: UnpackOptions
) -> tuple[tuple[SideFile, ...], tuple[str, ...]]:
    """Side files that the destination takes, and notes about those that it does not get."""
    roles = kind_for_output(destination, options.kind).roles
    wanted = [entry.path for entry in archive.files if entry.role in roles]
    others = [entry.path for entry in archive.files if entry.role == "file" not in roles]
    notes: tuple[str, ...] = ()
    if others and options.side_files:
        notes = (f"side files are written into folders only; left out: {shorten(others)}",)
    found: list[SideFile] = []
    if wanted and options.side_files:
        try:
            for entry, data in archive.read_files():
                if entry.role in roles:
                    found.append(SideFile(entry.path, data, entry.role))
        except FormatError as error:
            if not options.partial:
                raise
            notes = (*notes, f"side files are damaged; {len(found)} were whole: {error}")
    return tuple(found), notes


def _select(header: Header, patterns: tuple[str, ...]) -> _Selection:
    if not patterns:
        return _Selection({spec.name: spec.name for spec in header.tensors}, header.aliases)
    all_names = [*(spec.name for spec in header.tensors), *header.aliases]
    matched: set[str] = set()
    for pattern in patterns:
        found = {name for name in all_names if fnmatchcase(name, pattern)}
        if not found:
            raise TensorNotFoundError(f"no tensor of the archive matches {pattern!r}")
        matched |= found
    names: dict[str, str] = {}
    aliases: dict[str, str] = {}
    for spec in header.tensors:
        others = [alias for alias, target in header.aliases.items() if target == spec.name]
        if spec.name in matched:
            group = [spec.name, *others]
        else:
            group = [alias for alias in others if alias in matched]
        if group:
            names[spec.name] = group[0]
            aliases |= dict.fromkeys(group[1:], group[0])
    return _Selection(names, aliases)


def _find_missing(archive: Archive, progress: Report) -> tuple[tuple[str, ...], Defect | None]:
    """Decode everything once; what is not whole, and the first defect."""
    salvage = Salvage(archive)
    total = sum(spec.size for spec in archive.header.tensors)
    done = 0
    for _, parts in salvage:
        for part in parts:
            done = min(total, done + part.size)
            progress(Progress("check", done, total))
    return salvage.missing, salvage.defect


def _contents(
    header: Header, selection: _Selection, dtype: str | None
) -> tuple[Contents, tuple[str, ...]]:
    specs = []
    converted = []
    for spec in header.tensors:
        if spec.name not in selection.names:
            continue
        output = replace(spec, name=selection.names[spec.name])
        if dtype is not None and spec.dtype in PACKABLE and spec.dtype != dtype:
            output = replace(output, dtype=dtype)
            converted.append(output.name)
        specs.append(output)
    return Contents(tuple(specs), selection.aliases, header.metadata), tuple(converted)


def _read(
    archive: Archive, selection: _Selection, spill: Spill, sequential: bool
) -> Iterator[tuple[TensorSpec, Iterable[Array]]]:
    """Wanted tensors, in parts; decodes nothing else where that can be helped."""
    everything = len(selection.names) == len(archive.header.tensors)
    if archive.complete is not None and not (everything and sequential):
        yield from archive.iter_parts(selection.names, spill)
        return
    left = set(selection.names)
    try:
        for spec, parts in archive.iter_parts(None, spill):
            if spec.name in left:
                left.discard(spec.name)
                yield spec, parts
            if not left and not everything:
                return  # the rest of a pipe need not arrive
    except TruncatedError as error:
        if everything:
            raise
        lost = tuple(name for name in error.missing if name in left)
        raise TruncatedError(
            f"the archive is incomplete; missing: {shorten(lost)}",
            offset=error.offset,
            missing=lost,
        ) from None


def convert(array: Array, spec: TensorSpec, dtype: str) -> Array:
    """Stored elements in another floating-point type, rounded to nearest, ties to even.

    Parameters
    ----------
    array : ndarray
        Stored elements of ``spec``, whose dtype is F64, F32, F16 or BF16.
    spec : TensorSpec
    dtype : str
        One of :data:`OUTPUT_DTYPES`. BF16 from F64 goes by way of F32.

    Raises
    ------
    CheckpointError
        A finite element would become infinite.

    Examples
    --------
    >>> convert(np.array([1.5, 0.1]), TensorSpec("w", "F64", (2,)), "F16")
    array([1.5, 0.1], dtype=float16)
    """
    values = to_float32(array, "BF16") if spec.dtype == "BF16" else array
    with np.errstate(over="ignore", invalid="ignore"):
        if dtype == "BF16":
            narrow = values.astype(np.float32)
            made = from_float32(narrow, "BF16")
            # Rounding by addition would carry a NaN's mantissa into its sign.
            nan = np.isnan(narrow)
            if nan.any():
                made[nan] = (narrow.view(np.uint32)[nan] >> np.uint32(16)).astype(
                    np.uint16
                ) | np.uint16(0x40)
            after: Array = to_float32(made, "BF16")
        else:
            made = after = values.astype(stored_dtype(dtype))
    lost = np.isfinite(values) & ~np.isfinite(after)
    if lost.any():
        raise CheckpointError(
            f"tensor {spec.name!r} does not fit {dtype}: {int(lost.sum())} of its elements "
            f"would become infinite (largest magnitude {float(np.abs(values[lost]).max()):.6g})"
        )
    return made
