"""Archive to checkpoint, one tensor in memory at a time."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import groupby
from pathlib import Path
from time import perf_counter
from typing import Final

import numpy as np

from weightvid import loader
from weightvid.archives import (
    Defect,
    Location,
    Salvage,
    open_anywhere,
    read_tensors,
    seekable,
    stored_pieces,
)
from weightvid.atomic import is_source
from weightvid.checkpoint import Contents, create_checkpoint, kind_for_output
from weightvid.errors import CheckpointError, FormatError, TensorNotFoundError
from weightvid.loader import Archive, Array, Header, TensorSpec, from_float32, to_float32
from weightvid.progress import Progress, Report, quiet
from weightvid.spec import SideFile, stored_dtype

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
        One of :data:`OUTPUT_DTYPES`: all tensors of these types are converted to it.
    kind : str or None
        Name of a checkpoint kind; None: by the destination's suffix, or a folder without one.
    force, partial, side_files : bool
        Replace an existing file; write what is whole of an archive that is cut short or damaged;
        restore the model's small other files, where the kind has a place for them.
    base : tuple of path, address or file
        What the archive is an update to; of a chain of updates the oldest first.
    layers : int or None
        Read the first so many layers only; None: all.
    """

    tensors: tuple[str, ...] = ()
    dtype: str | None = None
    kind: str | None = None
    force: bool = False
    partial: bool = False
    side_files: bool = True
    base: tuple[Location, ...] = ()
    layers: int | None = None


@dataclass(frozen=True, slots=True)
class UnpackReport:
    """What an unpacking did: distinct tensors written, their elements, size of the checkpoint, ...

    Attributes
    ----------
    aliases, converted, side_files : tuple of str
        Further names of those tensors; tensors that changed their type; small other files.
    notes : tuple of str
        What the output's kind cannot hold as it is, and what was written instead.
    missing, coarse, lost, defect : tuple of str, tuple of str, mapping, Defect or None
        With ``partial``: tensors asked for that are not there, and those that lack layers; of those
        of which some rows are lost, and zero, first row and rows of each such span; and why.
    """

    tensors: int
    weights: int
    file_bytes: int
    aliases: tuple[str, ...]
    converted: tuple[str, ...]
    notes: tuple[str, ...]
    missing: tuple[str, ...]
    coarse: tuple[str, ...]
    lost: Mapping[str, Sequence[tuple[int, int]]]
    defect: Defect | None
    side_files: tuple[str, ...]
    seconds: float


def unpack_archive(
    archive: Location,
    destination: str | os.PathLike[str],
    options: UnpackOptions | None = None,
    progress: Report = quiet,
) -> UnpackReport:
    """Unpack an archive into a checkpoint; every hash is checked, that of each tensor included.

    Parameters
    ----------
    archive : path, address or binary file object
        A pipe is read once, in order; with ``partial`` it is first copied to a temporary file.
    destination : path
        Appears whole, or not at all.
    options : UnpackOptions
    progress : callable
        Receives the stage ``decode`` (and, with ``partial``, ``check`` before it).

    Raises
    ------
    FormatError, CodecError, RemoteError
        The archive is damaged or cannot be read; a TruncatedError names tensors asked for that are
        missing, unless ``partial``.
    TensorNotFoundError
        A pattern matches no tensor, or there are fewer layers.
    CheckpointError, OutputError
        The checkpoint cannot hold these tensors, or cannot be written.
    """
    began, chosen, target = perf_counter(), options or UnpackOptions(), Path(destination)
    if chosen.dtype not in (None, *OUTPUT_DTYPES):
        raise CheckpointError(f"no type {chosen.dtype!r}; choose one of {', '.join(OUTPUT_DTYPES)}")
    if isinstance(chosen.tensors, str):
        raise CheckpointError(f"tensors is a tuple, such as ({chosen.tensors!r},)")
    if chosen.dtype and kind_for_output(target, chosen.kind).label == "GGUF":
        raise CheckpointError("types of GGUF are a kind: gguf (F16), gguf-f32, gguf-q8_0")
    with ExitStack() as stack:
        if isinstance(archive, (str, os.PathLike)):
            if is_source(target, archive):
                raise CheckpointError(f"{target} is the archive itself")
        elif chosen.partial:
            archive = stack.enter_context(seekable(archive))
        layers = loader.MAX_LAYERS if chosen.layers is None else chosen.layers
        opened = stack.enter_context(open_anywhere(archive, base=chosen.base, layers=layers))
        held = opened.header.layers.total if opened.header.layers else 1
        if chosen.layers is not None and chosen.layers > held:
            raise TensorNotFoundError(
                f"there is no layer {chosen.layers}: the archive has {held} (pack --layers)"
            )
        report = _unpack(opened, target, chosen, progress)
    return replace(report, seconds=perf_counter() - began)


def _unpack(
    archive: Archive, destination: Path, options: UnpackOptions, progress: Report
) -> UnpackReport:
    names, aliases = _select(archive.header, options.tensors)
    files, file_notes = _side_files(archive, destination, options)
    check = Salvage(archive, progress, "check", rows=True)
    if options.partial:
        deque(check, 0)
    missing = tuple(names.pop(name) for name in check.missing if name in names)
    aliases = {alias: out for alias, out in aliases.items() if out not in missing}
    specs, converted = [], []
    for spec in archive.header.tensors:
        if spec.name in names:
            changes = options.dtype not in (None, spec.dtype) and spec.dtype in loader.PACKABLE
            converted += [names[spec.name]] if changes else []
            dtype = options.dtype if changes and options.dtype else spec.dtype
            specs.append(TensorSpec(names[spec.name], dtype, spec.shape))
    contents = Contents(tuple(specs), aliases, archive.header.metadata, files=files)
    total, total_bytes = sum(s.size for s in specs), sum(s.stored_bytes for s in specs)
    done = done_bytes = 0
    with create_checkpoint(destination, contents, force=options.force, kind=options.kind) as writer:
        by_pieces = len(names) == len(archive.header.tensors) and not (converted or check.defect)
        pieces = stored_pieces(archive) if by_pieces else ()
        for spec, group in groupby(pieces, lambda piece: piece[0]):
            writer.write_parts(names[spec.name], (elements for _, _, elements in group))
            done, done_bytes = done + spec.size, done_bytes + spec.stored_bytes
            progress(Progress("decode", done, total, done_bytes, total_bytes))
        # What is missing is known: a second pass meets the same defects, and goes on behind them.
        rest = Salvage(archive, rows=True) if check.defect else read_tensors(archive, names)
        for spec, array in () if by_pieces else rest:
            if spec.name not in names:
                continue
            made = convert(array, spec, options.dtype) if names[spec.name] in converted else array
            writer.write(names[spec.name], made)
            done, done_bytes = done + made.size, done_bytes + made.nbytes
            progress(Progress("decode", done, total, done_bytes, total_bytes))
    return UnpackReport(
        tensors=len(specs),
        weights=total,
        file_bytes=writer.file_bytes,
        aliases=tuple(aliases),
        converted=tuple(converted),
        notes=(*writer.notes, *file_notes),
        missing=missing,
        coarse=tuple(names[name] for name in check.coarse if name in names),
        lost={names[name]: spans for name, spans in check.lost.items() if name in names},
        defect=check.defect,
        side_files=tuple(file.path for file in writer.contents.files),
        seconds=0.0,
    )


def _side_files(
    archive: Archive, destination: Path, options: UnpackOptions
) -> tuple[tuple[SideFile, ...], tuple[str, ...]]:
    """Side files that the destination takes, and notes about those that it does not get."""
    if not options.side_files:
        return (), ()
    roles = kind_for_output(destination, options.kind).roles
    others = [file.path for file in archive.header.files if file.role == "file" not in roles]
    found, notes = [], []
    if others:
        shown = ", ".join(others[:5]) + (", ..." if len(others) > 5 else "")
        notes.append(f"side files are written into folders only; left out: {shown}")
    for entry in archive.header.files:
        if entry.role in roles:
            try:
                found.append(SideFile(entry.path, archive.read_file(entry.path), entry.role))
            except FormatError as error:
                if not options.partial:
                    raise
                notes.append(f"the side file {entry.path} is damaged and left out: {error}")
    return tuple(found), tuple(notes)


def _select(header: Header, patterns: tuple[str, ...]) -> tuple[dict[str, str], Mapping[str, str]]:
    """Names of the tensors wanted with their names in the output, and the output's aliases."""
    groups = [[spec.name] for spec in header.tensors]
    for alias, number in header.aliases.items():
        groups[number].append(alias)
    matched: set[str] = set()
    for pattern in patterns:
        found = {name for group in groups for name in group if fnmatchcase(name, pattern)}
        if not found:
            raise TensorNotFoundError(f"no tensor of the archive matches {pattern!r}")
        matched |= found
    names: dict[str, str] = {}
    aliases: dict[str, str] = {}
    for group in groups:
        wanted = group
        if patterns and group[0] not in matched:
            wanted = [alias for alias in group[1:] if alias in matched]
        if wanted:
            names[group[0]] = wanted[0]
            aliases |= dict.fromkeys(wanted[1:], wanted[0])
    return names, aliases


def convert(array: Array, spec: TensorSpec, dtype: str | None) -> Array:
    """Stored F64, F32, F16 or BF16 elements in another of these types, rounded to nearest even.

    BF16 from F64 goes by way of F32.

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
            made = from_float32(values.astype(np.float32), "BF16")
            after: Array = to_float32(made, "BF16")
        else:
            made = after = values.astype(stored_dtype(dtype or spec.dtype))
    lost = np.isfinite(values) & ~np.isfinite(after)
    if lost.any():
        raise CheckpointError(
            f"tensor {spec.name!r} does not fit {dtype}: {int(lost.sum())} of its elements "
            f"would become infinite (largest magnitude {float(np.abs(values[lost]).max()):.6g})"
        )
    return made
