"""Checkpoint to archive.

Two passes over the source, one tensor in memory at a time: a survey (statistics, from which the
steps follow), then quantizing, tiling and encoding. The archive is written under a temporary name,
decoded and checked against its own hashes, and renamed.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from time import perf_counter
from typing import Any, BinaryIO, Final, cast

from weightvid import allocate, tile
from weightvid.atomic import AtomicFile
from weightvid.calibration import CalibrationStats, TensorMoments, load_stats
from weightvid.checkpoint import CheckpointReader, open_checkpoint
from weightvid.checkpoint.base import shorten
from weightvid.codec.encode import DEFAULT_PRESET, EncoderSettings
from weightvid.container.files import store_files
from weightvid.container.records import Header
from weightvid.dtypes import LARGEST, PACKABLE
from weightvid.errors import CheckpointError, FormatError, QuantizationError
from weightvid.loader import open_archive
from weightvid.packing.calibrated import fits
from weightvid.packing.write import WritePlan, is_convolution, write_archive
from weightvid.progress import Progress, Report, quiet
from weightvid.quantize import Params, TrellisParams, UniformParams
from weightvid.quantize.mantissa import FULL_BITS
from weightvid.quantize.stats import TensorStats, tensor_stats
from weightvid.spec import TensorSpec
from weightvid.version import __version__

#: smaller tensors are kept exactly: a frame's share and a sidecar entry would cost more.
MIN_WEIGHTS: Final = 256
MIN_MANTISSA_BITS: Final = 11


@dataclass(frozen=True, slots=True)
class PackOptions:
    """Settings of one packing.

    Attributes
    ----------
    recipe : str
        ``balanced``, ``small`` or ``fine``.
    step_factor : float or None
        k of the step rule, instead of the recipe's.
    states : int
        States of the trellis: 4, 8, 16, 32 or 64; 0: the plain uniform quantizer.
    shaping : bool
        Round convolutions with noise shaping: smaller errors of the layers' outputs, larger ones
        of the weights themselves.
    mantissa_bits : int or None
        Mantissa bits that 1-D float32 biases, norms and statistics keep, 11..23, instead of the
        recipe's.
    calibration : path, CalibrationStats or None
        Statistics of this very model: its tensors are quantized with error feedback. Tensors
        without statistics are packed as ever.
    keep : tuple of str
        Shell-style patterns of tensor names that are kept exactly.
    preset : str
        x265's preset.
    jobs : int
        Encoders side by side; 0: one per core.
    force : bool
        Replace an existing file.
    verify : bool
        Decode the archive and check it before it gets its name.
    side_files : bool
        Keep the source's small other files (configuration, tokenizer, ...) in the archive.
    """

    recipe: str = allocate.DEFAULT_RECIPE
    step_factor: float | None = None
    states: int = 8
    shaping: bool = True
    mantissa_bits: int | None = None
    calibration: str | os.PathLike[str] | CalibrationStats | None = None
    keep: tuple[str, ...] = ()
    preset: str = DEFAULT_PRESET
    jobs: int = 0
    force: bool = False
    verify: bool = True
    side_files: bool = True

    @property
    def kept_mantissa_bits(self) -> int:
        """Mantissa bits of 1-D weights: the option, or else the recipe's."""
        if self.mantissa_bits is not None:
            return self.mantissa_bits
        return allocate.recipe(self.recipe).mantissa_bits


@dataclass(frozen=True, slots=True)
class PackReport:
    """What a packing did.

    Attributes
    ----------
    file_bytes, source_bytes : int
        Of the archive, and of all tensors of the source.
    weights : int
        Elements of all floating-point tensors of the source.
    coded_weights : int
        Those that were quantized.
    stream_bytes : int
        Of the packets and of the digits beside them.
    sqnr_db : float or None
        Over all quantized tensors.
    frames : int
    width, height : int
        Of a frame, in samples.
    skipped : tuple of str
        Entries of the source that are no tensors.
    unused_keeps : tuple of str
        Patterns of ``keep`` that no tensor matches.
    seconds : float
    side_files : tuple of str
        Paths of the small other files that the archive keeps.
    """

    file_bytes: int
    source_bytes: int
    weights: int
    coded_weights: int
    stream_bytes: int
    sqnr_db: float | None
    frames: int
    width: int
    height: int
    skipped: tuple[str, ...]
    unused_keeps: tuple[str, ...]
    seconds: float
    side_files: tuple[str, ...] = ()

    @property
    def bits_per_weight(self) -> float:
        """8 x whole file / weights; 0 without weights."""
        return 8 * self.file_bytes / self.weights if self.weights else 0.0

    @property
    def stream_bits_per_weight(self) -> float:
        """8 x (packets + digits) / quantized weights; 0 without any."""
        return 8 * self.stream_bytes / self.coded_weights if self.coded_weights else 0.0


def pack_checkpoint(
    source: str | os.PathLike[str] | CheckpointReader,
    destination: str | os.PathLike[str],
    options: PackOptions | None = None,
    progress: Report = quiet,
) -> PackReport:
    """Pack a checkpoint into an archive.

    Parameters
    ----------
    source : path or CheckpointReader
    destination : path
        Appears whole, or not at all.
    options : PackOptions
    progress : callable
        Told about the stages ``survey``, ``encode`` and ``verify``.

    Raises
    ------
    CheckpointError, QuantizationError, CodecError, OutputError
    """
    chosen = options or PackOptions()
    if isinstance(source, CheckpointReader):
        return _pack(source, destination, chosen, progress)
    if Path(destination).exists() and os.path.realpath(source) == os.path.realpath(destination):
        raise CheckpointError(f"{destination} is the source itself")
    with open_checkpoint(source) as reader:
        return _pack(reader, destination, chosen, progress)


def _pack(
    reader: CheckpointReader,
    destination: str | os.PathLike[str],
    options: PackOptions,
    progress: Report,
) -> PackReport:
    began = perf_counter()
    _check(options)
    output = AtomicFile(destination, force=options.force)
    try:
        plan = _with_files(make_plan(reader, options, progress), reader, options)
        stream = cast(BinaryIO, output.file)
        written = write_archive(stream, plan, reader.read, progress)
        file_bytes = stream.tell()
        if options.verify:
            _verify(stream, reader, progress)
    except BaseException:
        output.abort()
        raise
    output.commit()
    tensors = reader.contents.tensors
    return PackReport(
        file_bytes=file_bytes,
        source_bytes=sum(spec.stored_bytes for spec in tensors),
        weights=sum(spec.size for spec in tensors if spec.dtype in PACKABLE),
        coded_weights=written.weights,
        stream_bytes=written.packet_bytes + written.digit_bytes,
        sqnr_db=written.sqnr_db,
        frames=written.frames,
        width=plan.header.geometry.width,
        height=plan.header.geometry.height,
        skipped=reader.contents.skipped,
        unused_keeps=tuple(
            pattern
            for pattern in options.keep
            if not any(fnmatchcase(spec.name, pattern) for spec in tensors)
        ),
        seconds=perf_counter() - began,
        side_files=tuple(entry.path for entry in plan.header.files),
    )


def _with_files(plan: WritePlan, reader: CheckpointReader, options: PackOptions) -> WritePlan:
    if not options.side_files:
        return plan
    entries, boxes = store_files(reader.contents.files)
    return replace(plan, header=replace(plan.header, files=entries), files=boxes)


def _check(options: PackOptions) -> None:
    allocate.recipe(options.recipe)
    if options.step_factor is not None:
        allocate.steps([], options.step_factor)
    EncoderSettings(tile.MIN_FRAME_PX, tile.MIN_FRAME_PX, options.preset)
    if options.states:
        TrellisParams(1.0, options.states)
    if not MIN_MANTISSA_BITS <= options.kept_mantissa_bits <= FULL_BITS:
        raise QuantizationError(
            f"mantissas keep {MIN_MANTISSA_BITS}..{FULL_BITS} bits, not {options.mantissa_bits}"
        )
    if options.jobs < 0:
        raise QuantizationError(f"the number of jobs must not be negative, as {options.jobs} is")


def make_plan(
    reader: CheckpointReader, options: PackOptions, progress: Report = quiet
) -> WritePlan:
    """Survey a checkpoint and choose the quantizer of each tensor that is worth a video."""
    specs = reader.contents.tensors
    calibration = _calibration(reader, options)
    total = sum(spec.size for spec in specs)
    worth: dict[int, TensorStats] = {}
    done = 0
    for number, spec in enumerate(specs):
        progress(Progress("survey", done, total))
        if _may_code(spec, options.keep):
            stats = tensor_stats(reader.read(spec.name), spec)
            if stats.finite and stats.sigma > 0:
                worth[number] = stats
        done += spec.size
    progress(Progress("survey", total, total))
    factor = options.step_factor or allocate.recipe(options.recipe).step_factor
    moments = _moments(reader, calibration)
    params: dict[int, Params] = {}
    for (number, _), step in zip(
        worth.items(), allocate.steps(list(worth.values()), factor), strict=True
    ):
        if worth[number].absmax + 2 * step >= LARGEST[specs[number].dtype]:
            continue  # a dequantized weight might round to infinity: kept exactly
        try:
            params[number] = _quantizer(step, specs[number], options, number in moments)
        except QuantizationError:
            continue  # weights of a size that no ordinary float32 step fits: kept exactly
    shapes = (tile.matrix_shape(specs[number].shape) for number in params)
    header = Header(
        tile.choose_geometry(tile.starts(shapes)[-1]),
        tuple(specs),
        reader.contents.aliases,
        reader.contents.metadata,
        {**_about(options), **_about_calibration(calibration, specs, params, moments)},
    )
    return WritePlan(
        header,
        params,
        options.preset,
        options.shaping,
        options.kept_mantissa_bits,
        options.keep,
        options.jobs,
        moments,
    )


def _calibration(reader: CheckpointReader, options: PackOptions) -> CalibrationStats | None:
    """The statistics to pack with, known to be of this model."""
    wanted = options.calibration
    if wanted is None:
        return None
    stats = wanted if isinstance(wanted, CalibrationStats) else load_stats(wanted)
    stats.check(reader)
    return stats


def _moments(
    reader: CheckpointReader, calibration: CalibrationStats | None
) -> dict[int, TensorMoments]:
    """Useful statistics, by the id of their tensor."""
    found: dict[int, TensorMoments] = {}
    if calibration is None:
        return found
    numbers = {spec.name: number for number, spec in enumerate(reader.contents.tensors)}
    for name, moments in calibration.tensors.items():
        number = numbers[reader.spec(name).name]
        shape = reader.contents.tensors[number].shape
        if moments.useful and len(shape) >= 2 and fits(tile.matrix_shape(shape), moments):
            found.setdefault(number, moments)
    return found


def _quantizer(step: float, spec: TensorSpec, options: PackOptions, calibrated: bool) -> Params:
    """Quantizer of a tensor: the trellis, but for convolutions that are rounded with shaping."""
    shaped = options.shaping and not calibrated and is_convolution(spec)
    if not options.states or shaped:
        return UniformParams(step)
    return TrellisParams(step, options.states)


def _may_code(spec: TensorSpec, keep: tuple[str, ...]) -> bool:
    return (
        spec.dtype in PACKABLE
        and len(spec.shape) >= 2
        and spec.size >= MIN_WEIGHTS
        and not any(fnmatchcase(spec.name, pattern) for pattern in keep)
    )


def _about(options: PackOptions) -> dict[str, Any]:
    """What the header tells people about the making of the archive."""
    recipe = options.recipe
    if options.step_factor is not None:
        recipe = f"step {options.step_factor:g}"
    about: dict[str, Any] = {"generator": f"weightvid {__version__}", "recipe": recipe}
    if options.kept_mantissa_bits < FULL_BITS:
        about["mantissa_bits"] = options.kept_mantissa_bits
    return about


def _about_calibration(
    calibration: CalibrationStats | None,
    specs: Sequence[TensorSpec],
    params: Collection[int],
    moments: Mapping[int, TensorMoments],
) -> dict[str, Any]:
    """Which quantized tensors had statistics, and which had none."""
    if calibration is None:
        return {}
    used = sum(number in moments for number in params)
    about = {"calibration": f"{used} tensors, {calibration.samples} samples"}
    without = [specs[number].name for number in params if number not in moments]
    if without:
        about["uncalibrated"] = shorten(without)
    return about


def _verify(stream: BinaryIO, reader: CheckpointReader, progress: Report) -> None:
    stream.seek(0)
    specs = reader.contents.tensors
    total = sum(spec.size for spec in specs)
    done = 0
    try:
        with open_archive(stream, check_tensors=True) as archive:
            for spec, _ in archive.iter_stored():
                done += spec.size
                progress(Progress("verify", done, total))
    except FormatError as error:
        raise FormatError(
            f"the archive does not decode to what was packed, and has been discarded: {error}",
            code=error.code,
        ) from error
