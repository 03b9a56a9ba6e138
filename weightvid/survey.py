"""The first pass over a checkpoint: every tensor is looked at once.

What follows from it: which tensors are worth quantizing, the steps of the rule, what is kept bit
for bit, and what people should know of the model.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cache
from math import log2
from typing import Final

from weightvid import exact, loader
from weightvid.checkpoint import CheckpointReader
from weightvid.checkpoint.base import shorten
from weightvid.errors import CheckpointError
from weightvid.levels import steps
from weightvid.levels.recipes import forecast, recipe, recipe_factor, speaks, units
from weightvid.levels.stats import TensorStats, is_sinusoid, no_weights, tensor_stats
from weightvid.levels.steps import MIN_WEIGHTS, Moments, TensorPlan, plan_tensor
from weightvid.levels.transform import dct, view_of
from weightvid.loader import PACKABLE, Array, Floats, Header, TensorSpec, from_float32, to_float32
from weightvid.options import PackOptions
from weightvid.progress import Progress, Report, quiet
from weightvid.spec import weight_count
from weightvid.version import __version__
from weightvid.workers import Piece, Workers

#: 1-D floats next to weights that keep all their bits: ResNets have 1 %. A small network of
#: depthwise layers has 13 %; 5 bits take 2 % from its file, and would harm ResNets more than that.
_USUAL_FLOATS: Final = 0.03


def _refuse_unholdable(reader: CheckpointReader) -> None:
    """Raise where the format has no room for a name or a shape, before any work is done."""
    for name, spec in reader.contents.rows():
        if len(name.encode("utf-8", "surrogatepass")) > loader.MAX_NAME_BYTES:
            most = loader.MAX_NAME_BYTES
            said = f"the name {name[:40]!r}... is longer than {most} bytes; rename it"
        elif len(spec.shape) > loader.MAX_AXES:
            said = f"{name!r} has {len(spec.shape)} axes, and an archive {loader.MAX_AXES} at most"
        else:
            continue
        raise CheckpointError(f"a tensor cannot be packed: {said}")


def _refuse_remains(reader: CheckpointReader) -> None:
    """Raise where the weights are left out: an archive of the rest would pass for the model."""
    contents = reader.contents
    packed = [entry for entry in contents.skipped if "_packed_params" in entry]
    weights = sum(spec.size for spec in contents.tensors if spec.dtype in PACKABLE or spec.size > 1)
    place = reader.location or "the checkpoint"
    if packed:
        raise CheckpointError(
            f"{place} holds weights that cannot be packed: {shorten(packed, 4)}; pack the float "
            "model, from before it was quantized dynamically"
        )
    if contents.skipped and not weights:
        raise CheckpointError(
            f"{place} holds no weights that can be packed; left out: {shorten(contents.skipped, 4)}"
        )


@dataclass(frozen=True, slots=True)
class Survey:
    """A checkpoint whose tensors have all been looked at once.

    By number, in order, ``stats`` are of the tensors that are worth quantizing, ``units`` the step
    of each at k = 1, before any limit, and ``moments`` what calibration knows of its inputs.
    ``apart`` names tensors that are kept bit for bit because they are no weights; ``notes`` are
    what people should know of the model.
    """

    reader: CheckpointReader
    options: PackOptions
    stats: Mapping[int, TensorStats]
    units: Mapping[int, float]
    moments: Mapping[int, Moments] = field(default_factory=dict)
    apart: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        """All tensors; a tensor's number is its place."""
        return self.reader.contents.tensors

    @property
    def weights(self) -> int:
        """Elements of all floats, and of what is quantized already."""
        return weight_count(self.specs)

    @property
    def first_factor(self) -> float:
        """The step factor asked for: the option, or else what the recipe means for this model."""
        options, stats = self.options, list(self.stats.values())
        return options.step_factor or recipe_factor(
            options.recipe, stats, [self.units[number] for number in self.stats], options.fidelity
        )

    def noise(self, factor: float) -> float:
        """Error of the outputs that is forecast at a step factor, in that of int8 per channel."""
        units = [self.units[number] for number in self.stats]
        return forecast(factor, list(self.stats.values()), units, self.options.fidelity)

    def mantissa_bits(self, factor: float) -> int:
        """What exact floats keep: with steps as coarse as ``small`` has, no more than there.

        A bit less for each time that they are twice as much of the model as usual.
        """
        own, small = recipe(self.options.recipe), recipe("small")
        if own.name == "fine" or self.noise(factor) < 0.99 * small.noise:
            return own.mantissa_bits
        floats = sum(spec.size for spec in self.specs if exact.rounds_mantissas(spec))
        weights = sum(stats.spec.size for stats in self.stats.values())
        saved = log2(max(1.0, floats / max(1, weights) / _USUAL_FLOATS))
        return max(exact.LEAST_BITS, small.mantissa_bits - round(saved))

    def warning(self, factor: float) -> tuple[str, ...]:
        """What to expect of the outputs, if it is worse than ``balanced`` would be."""
        noise, usual = self.noise(factor), recipe("balanced")
        speaking = speaks(list(self.stats.values()))
        if noise <= 1.5 * (usual.language_noise if speaking else usual.noise):
            return ()
        return (
            f"the outputs will be about {noise:.1f} times as far off as with int8 per channel: "
            "check them, or choose the recipe balanced or an evaluation",
        )

    def header(self, kernels: Iterable[int], layers: loader.Layers | None = None) -> Header:
        """Header of an archive of all tensors, with bases of kernel axes of these sizes."""
        contents, numbers = self.reader.contents, {s.name: n for n, s in enumerate(self.specs)}
        aliases = {alias: numbers[name] for alias, name in contents.aliases.items()}
        bases = tuple(map(dct, kernels))
        return Header(self.specs, aliases, contents.metadata, (), bases, self._about(), layers)

    def _about(self) -> dict[str, str]:
        """What the header says to people about the making of the archive."""
        options = self.options
        made = options.recipe if options.step_factor is None else f"step {options.step_factor:g}"
        if options.target is not None:
            made = f"target {options.target}"
        if options.video.qp is not None:
            made = f"lossy video, QP {options.video.qp}"
        about = {"generator": f"weightvid {__version__}", "recipe": made}
        if options.fidelity != "outputs":
            about["fidelity"] = options.fidelity
        if options.video.codec != "x265":
            about["encoder"] = options.video.codec
        if self.moments:
            about["calibrated"] = "yes"
        return about

    def keeps(self, name: str) -> bool:
        """Whether a tensor that is not quantized is kept bit for bit."""
        return name in self.apart or any(fnmatchcase(name, p) for p in self.options.keep)

    @property
    def unused_keeps(self) -> tuple[str, ...]:
        """Patterns of tensors to keep that no tensor matches."""
        names = [spec.name for spec in self.specs]
        return tuple(p for p in self.options.keep if not any(fnmatchcase(n, p) for n in names))

    def turn(self, number: int) -> int:
        """When a tensor comes: the place of the first pattern of ``first`` that it matches."""
        name, patterns = self.specs[number].name, self.options.first
        matches = (place for place, glob in enumerate(patterns) if fnmatchcase(name, glob))
        return next(matches, len(patterns))

    def exact_tensors(
        self,
        plans: Mapping[int, TensorPlan],
        shifts: Mapping[int, Floats],
        bits: int,
        below: Mapping[int, Array],
    ) -> Iterator[tuple[int, Array]]:
        """Tensors without a plan, in their order, and their elements as they are kept.

        ``shifts`` are added to biases first; 1-D floats keep so many mantissa ``bits``; ``below``
        are elements of a base, or of a layer before.
        """
        specs = self.specs
        norms = {
            number: norm
            for norm in (exact.norms_of(specs) if bits < exact.FULL_BITS else ())
            if not any(each in plans or self.keeps(specs[each].name) for each in norm)
            for number in norm
        }

        def read(number: int) -> Array:
            spec = specs[number]
            array = self.reader.read(spec.name)
            if number not in shifts:
                return array
            return from_float32(to_float32(array, spec.dtype) + shifts[number], spec.dtype)

        @cache
        def rounded(norm: exact.Norm) -> list[Floats]:
            base = [below[each] for each in norm] if below.keys() >= {*norm} else None
            return exact.round_norm(map(read, norm), bits, base)

        left = (number for number in range(len(specs)) if number not in plans)
        for number in sorted(left, key=lambda n: (self.turn(n), *exact.likeness(specs[n]))):
            norm, spec = norms.get(number), specs[number]
            if norm is not None:
                yield number, rounded(norm)[norm.index(number)]
            elif self.keeps(spec.name):
                yield number, read(number)
            else:
                yield number, exact.exact_elements(read(number), spec, bits)

    def plan(self, number: int, step: float, moments: Moments | None = None) -> TensorPlan | None:
        """Plan of a tensor at a step, as `plan_tensor` makes it, and pruned if that is asked for.

        A transform would fill the zeros.
        """
        options, stats = self.options, self.stats[number]
        if options.prune is None:
            return plan_tensor(stats, step, options.fidelity, moments=moments)
        plan = plan_tensor(stats, step, "integers")
        return plan and replace(plan, threshold=options.prune * stats.mean_magnitude)

    def plans(self, factor: float) -> dict[int, TensorPlan]:
        """Plan of each tensor that is quantized, at a step factor."""
        found = {}
        for number, stats in self.stats.items():
            unit = self.units[number]
            if self.options.video.qp is not None:
                plan = plan_tensor(stats, steps.sample_step(unit, stats), "integers")
            else:
                plan = self.plan(number, factor * unit, self.moments.get(number))
            if plan is not None:
                found[number] = plan
        return found


def survey_checkpoint(
    reader: CheckpointReader, options: PackOptions, workers: Workers, progress: Report = quiet
) -> Survey:
    """Read every tensor once.

    A CheckpointError says that the source is damaged, or the statistics are of another model.
    """
    _refuse_remains(reader)
    _refuse_unholdable(reader)
    if options.lossless:
        options = replace(options, keep=("*",))
    specs = reader.contents.tensors
    scales, tables, states = no_weights(specs)
    integers = [s.name for s in specs if s.dtype in ("I8", "U8") and s.size >= MIN_WEIGHTS]
    wanted = {
        number: spec
        for number, spec in enumerate(specs)
        if may_code(spec, options.keep) and spec.name not in scales | tables
    }
    total = sum(spec.size for spec in wanted.values())
    done, stats, broken = 0, {}, list[str]()
    tasks = ((spec, _pieces(reader, spec, workers)) for spec in wanted.values())
    for number, found in zip(wanted, workers.map(_look_at, tasks), strict=True):
        done += found.spec.size
        progress(Progress("survey", done, total))
        if is_sinusoid(found):
            tables.add(found.spec.name)
        elif not found.finite:
            broken.append(found.spec.name)
        elif steps.is_codable(found.spec, found):
            stats[number] = found
    scaled = dict(zip(stats, units(list(stats.values()), options.fidelity), strict=True))
    notes = [
        f"{what}: {shorten(sorted(names))}"
        for what, names in (
            ("kept bit for bit, as integers already", integers),
            ("kept bit for bit, as scales of packed integers", scales),
            ("kept bit for bit, as constant tables", tables),
            ("kept bit for bit, for NaN, infinity or numbers beyond F32 in them", broken),
            ("an optimizer's state, which no loader needs, is packed, too", states),
        )
        if names
    ]
    apart, known = frozenset(scales | tables), options.calibration
    survey = Survey(reader, options, stats, scaled, apart=apart, notes=tuple(notes))
    return survey if known is None else known.apply(survey, progress)


def may_code(spec: TensorSpec, keep: Sequence[str] = ()) -> bool:
    """Whether a tensor may be quantized: not few floats, of two axes, that nobody wants exactly."""
    return (
        spec.dtype in PACKABLE
        and spec.size >= MIN_WEIGHTS
        and sum(size > 1 for size in spec.shape) >= 2
        and not any(fnmatchcase(spec.name, pattern) for pattern in keep)
    )


def _pieces(reader: CheckpointReader, spec: TensorSpec, workers: Workers) -> tuple[Piece, ...]:
    """Blocks of whole rows of a tensor's matrix."""
    columns = view_of(spec.shape).columns
    count = max(1, (1 << 20) // columns) * columns
    return tuple(
        workers.piece(reader, spec.name, first, min(count, spec.size - first))
        for first in range(0, spec.size, count)
    )


def _look_at(task: tuple[TensorSpec, tuple[Piece, ...]]) -> TensorStats:
    spec, pieces = task
    return tensor_stats(spec, (piece.read() for piece in pieces))
