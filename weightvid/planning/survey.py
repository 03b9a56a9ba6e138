"""What is known of a checkpoint before anything is quantized, and plans made from it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Final

from weightvid import allocate, tile
from weightvid.calibration import CalibrationStats, TensorMoments, load_stats
from weightvid.checkpoint import CheckpointReader
from weightvid.checkpoint.base import shorten
from weightvid.codec.encode import DEFAULT_ENCODER
from weightvid.container.files import store_files
from weightvid.container.records import Header
from weightvid.dtypes import LARGEST, PACKABLE
from weightvid.errors import QuantizationError
from weightvid.packing.calibrated import fits
from weightvid.packing.quantizer import Fixed
from weightvid.packing.source import TensorRead
from weightvid.packing.sums import sums_of_tensors
from weightvid.packing.workers import Workers, local_workers
from weightvid.packing.write import WritePlan, is_convolution
from weightvid.planning.curve import RateCurve, sample_tensor
from weightvid.planning.examples import Examples
from weightvid.planning.options import PackOptions
from weightvid.progress import Report, quiet
from weightvid.quantize import Params, TrellisParams, UniformParams
from weightvid.quantize.mantissa import FULL_BITS
from weightvid.quantize.stats import TensorStats, stats_of
from weightvid.spec import TensorSpec
from weightvid.version import __version__

#: smaller tensors are kept exactly: a frame's share and a sidecar entry would cost more.
MIN_WEIGHTS: Final = 256
#: slopes nearer to 1 than this are not stored: 8-bit steps alone move them by 0.8 %.
_SLOPE_SLACK: Final = 0.02


@dataclass(frozen=True, slots=True)
class Survey:
    """A checkpoint, surveyed.

    Attributes
    ----------
    reader : CheckpointReader
    options : PackOptions
    stats : mapping of int to TensorStats
        Of the tensors that are worth quantizing, by id, in order.
    units : mapping of int to float
        Step of each at k = 1, before any limit.
    moments : mapping of int to TensorMoments
        Useful calibration statistics.
    calibration : CalibrationStats or None
    curves : mapping of int to RateCurve
        Rate against step, from samples; empty unless a target asks for them.
    measured : bool
        The units come from an evaluation.
    """

    reader: CheckpointReader
    options: PackOptions
    stats: Mapping[int, TensorStats]
    units: Mapping[int, float]
    moments: Mapping[int, TensorMoments] = field(default_factory=dict)
    calibration: CalibrationStats | None = None
    curves: Mapping[int, RateCurve] = field(default_factory=dict)
    measured: bool = False

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        """All tensors; a tensor's id is its place."""
        return self.reader.contents.tensors

    @property
    def weights(self) -> int:
        """Elements of all floating-point tensors."""
        return sum(spec.size for spec in self.specs if spec.dtype in PACKABLE)

    def steps(self, factor: float) -> dict[int, float]:
        """Step of each tensor at a step factor, within its limits.

        Where a lossy codec quantizes, its samples' steps, whatever the factor.
        """
        if self.options.lossy is not None:
            return {
                number: allocate.sample_step(self.units[number], stats, self.options.bit_depth)
                for number, stats in self.stats.items()
            }
        return {number: self.limited(number, factor * self.units[number]) for number in self.stats}

    def limited(self, number: int, step: float) -> float:
        """A step within the limits of its tensor."""
        return allocate.limited(step, self.stats[number], self._limits)

    def limits(self, number: int) -> tuple[float, float]:
        """Finest and coarsest step of a tensor."""
        return allocate.limits(self.stats[number], self._limits)

    @property
    def _limits(self) -> str:
        # What was measured to be harmless may vanish, too.
        return "sqnr" if self.measured else self.options.rule

    def quantizer(self, number: int, step: float) -> Params | None:
        """Quantizer of a tensor; None if it must be kept exactly at this step.

        The trellis, but for convolutions that are rounded with shaping.
        """
        stats, spec = self.stats[number], self.specs[number]
        if stats.absmax + 2 * step >= LARGEST[spec.dtype]:
            return None  # a dequantized weight might round to infinity
        try:
            if self.options.lossy is not None or not self.options.states or self.shaped(number):
                return UniformParams(step)
            return TrellisParams(step, self.options.states)
        except QuantizationError:
            return None  # weights of a size that no ordinary float32 step fits

    def shaped(self, number: int) -> bool:
        """Whether a tensor is rounded with noise shaping."""
        convolution = is_convolution(self.specs[number])
        return self.options.shapes_noise and convolution and number not in self.moments


def survey(
    reader: CheckpointReader,
    options: PackOptions,
    progress: Report = quiet,
    workers: Workers | None = None,
) -> Survey:
    """Read every tensor once.

    Parameters
    ----------
    reader : CheckpointReader
    options : PackOptions
    progress : callable
        Told about the stage ``survey``.
    workers : Workers, optional
        Who reads; threads of this process, if nobody is named.

    Raises
    ------
    CheckpointError
        The source is damaged, or the calibration statistics are of another model.
    """
    if workers is None:
        with local_workers(options.jobs) as threads:
            return survey(reader, options, progress, threads)
    calibration = _calibration(reader, options, progress)
    sampled = options.target is not None or options.evaluation is not None
    stats: dict[int, TensorStats] = {}
    curves: dict[int, RateCurve] = {}
    wanted = {
        number: spec
        for number, spec in enumerate(reader.contents.tensors)
        if _may_code(spec, options.keep)
    }
    source = workers.source(reader)
    read = {number: TensorRead(source, spec) for number, spec in wanted.items()}
    for number, sums in sums_of_tensors(read, workers, progress):
        found = stats_of(wanted[number], sums)
        if found.finite and found.sigma > 0:
            stats[number] = found
            if sampled:
                curves[number] = RateCurve(sample_tensor(read[number]), found.spec.size)
    units = dict(zip(stats, allocate.units(list(stats.values()), options.rule), strict=True))
    if calibration is not None and options.rule == allocate.DEFAULT_RULE:
        units = _measured_units(units, stats, reader, calibration)
    return Survey(reader, options, stats, units, _moments(reader, calibration), calibration, curves)


def plan_archive(
    surveyed: Survey,
    steps: Mapping[int, float],
    about: Mapping[str, Any] | None = None,
    fixed: Mapping[int, Fixed] | None = None,
) -> WritePlan:
    """Plan of the archive with these steps.

    Parameters
    ----------
    surveyed : Survey
    steps : mapping of int to float
        Of every tensor in ``surveyed.stats``.
    about : mapping
        Further entries of the header for people.
    fixed : mapping of int to Fixed
        Tensors whose levels are known already.
    """
    options, specs = surveyed.options, surveyed.specs
    video = options.video()
    params: dict[int, Params] = {}
    for number, step in steps.items():
        quantizer = surveyed.quantizer(number, step)
        if quantizer is not None:
            params[number] = quantizer
    shapes = (tile.matrix_shape(specs[number].shape) for number in params)
    contents = surveyed.reader.contents
    entries, boxes = store_files(contents.files) if options.side_files else ((), ())
    header = Header(
        tile.choose_geometry(tile.starts(shapes)[-1]),
        specs,
        contents.aliases,
        contents.metadata,
        {**_about(options), **_about_calibration(surveyed, params), **(about or {})},
        files=entries,
        codec=video.track.name,
        bit_depth=video.bits,
    )
    return WritePlan(
        header,
        params,
        video,
        options.shapes_noise and options.lossy is None,
        options.kept_mantissa_bits,
        options.keep,
        surveyed.moments,
        boxes,
        fixed or {},
    )


def slopes(
    steps: Mapping[int, float], units: Mapping[int, float], factor: float
) -> dict[str, float]:
    """Slopes of harm against bits, relative to the model's, of the tensors where it isn't 1.

    Parameters
    ----------
    steps, units : mapping of int to float
        By id.
    factor : float
        k.

    Returns
    -------
    dict of str to float
        By id as text, two significant digits.

    Examples
    --------
    >>> slopes({0: 0.5, 1: 0.25}, {0: 1.0, 1: 1.0}, 0.5)
    {'1': 0.25}
    """
    found = {}
    for number, step in steps.items():
        slope = (step / (factor * units[number])) ** 2
        if abs(slope - 1) > _SLOPE_SLACK:
            found[str(number)] = float(f"{slope:.2g}")
    return found


def _calibration(
    reader: CheckpointReader, options: PackOptions, progress: Report
) -> CalibrationStats | None:
    """The statistics to pack with, known to be of this model."""
    wanted = options.calibration
    if wanted is None:
        return None
    if isinstance(wanted, Examples):
        stats = wanted.statistics(progress)
    elif isinstance(wanted, CalibrationStats):
        stats = wanted
    else:
        stats = load_stats(wanted)
    stats.check(reader)
    return stats


def _measured_units(
    units: Mapping[int, float],
    stats: Mapping[int, TensorStats],
    reader: CheckpointReader,
    calibration: CalibrationStats,
) -> dict[int, float]:
    """Units by the losses that the calibration measured."""
    aliases = reader.contents.aliases
    losses = {aliases.get(name, name): loss for name, loss in calibration.sensitivity.items()}
    found = allocate.measured_units(list(units.values()), list(stats.values()), losses)
    return dict(zip(units, found, strict=True))


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
    if options.target is not None:
        recipe = f"target {options.target.show(options.target.value)}"
    elif options.step_factor is not None:
        recipe = f"step {options.step_factor:g}"
    about: dict[str, Any] = {"generator": f"weightvid {__version__}", "recipe": recipe}
    if options.lossy is not None:
        about["recipe"] = f"lossy video, {options.lossy}"
    if options.codec != DEFAULT_ENCODER:
        about["encoder"] = options.codec
    if options.rule != allocate.DEFAULT_RULE:
        about["rule"] = options.rule
    if options.kept_mantissa_bits < FULL_BITS:
        about["mantissa_bits"] = options.kept_mantissa_bits
    return about


def _about_calibration(surveyed: Survey, params: Collection[int]) -> dict[str, Any]:
    """Which quantized tensors had statistics, and which had none."""
    if surveyed.calibration is None:
        return {}
    if surveyed.calibration.refused:
        return {"calibration": f"not used: {surveyed.calibration.refused}"}
    used = sum(number in surveyed.moments for number in params)
    about = {"calibration": f"{used} tensors, {surveyed.calibration.samples} samples"}
    without: Sequence[str] = [
        surveyed.specs[number].name for number in params if number not in surveyed.moments
    ]
    if without:
        about["uncalibrated"] = shorten(without)
    return about
