"""A comparison: every method at each of its values, measured one after another."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import date
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final

from weightvid.atomic import ScratchFolder
from weightvid.calibrate.evaluation import Function, Judge, Verdict
from weightvid.checkpoint import CheckpointReader, open_checkpoint
from weightvid.compare.codecs import CODECS
from weightvid.compare.curves import Goal, Measure, bd_rate, crossing, ending, measures
from weightvid.compare.model import Method, load_model
from weightvid.compare.research import research_methods
from weightvid.compare.rivals import peer_methods, plain_methods
from weightvid.compare.rows import OK, Row, RowStore, machine, versions, with_torch
from weightvid.compare.video import archive_method, frame_methods, llm265_method
from weightvid.errors import QuantizationError
from weightvid.levels.recipes import RECIPES
from weightvid.pack import PackOptions
from weightvid.progress import Progress, Report, quiet

if TYPE_CHECKING:
    from weightvid.calibrate import Calibration

_Point = tuple[Method, float]
#: step factors of a curve, from fine to coarse.
FACTORS: Final = (0.09, 0.13, 0.18, 0.25, 0.36, 0.5, 0.7, 1.0, 1.4)


@dataclass(frozen=True, slots=True)
class CompareOptions:
    """What is compared, and how.

    Attributes
    ----------
    factors : tuple of float
        Step factors of weightvid's curves, and of the frames that lossless codecs get.
    fidelities : tuple of str
        Each is a curve (see `weightvid.pack.PackOptions`).
    recipes : tuple of str
        Each is a point.
    calibration : Calibration or None
        For a curve of calibrated archives.
    calibration_name : str
        How a shell names it.
    codecs : tuple of str
        Names of `weightvid.compare.codecs.CODECS`, coded on weightvid's own frames; ``all``.
    presets : tuple of str
        Of those codecs that have them, instead of the usual one.
    codec_options : tuple of str
        Options of a codec, such as ``x265:rd=6``: more curves of it.
    plain, peers : bool
        Plain integers, halves and GGUF; NNCodec and LLM.265's recipe.
    research : bool
        The untrained methods of `weightvid.compare.research`, and their own scalar quantizers.
    nncodec : path or None
        Python that has NNCodec; None: the environment variable WEIGHTVID_NNCODEC.
    only : tuple of str
        Labels of points or names of curves; empty: all.
    evaluation : callable or None
        See `weightvid.calibrate.evaluation.Judge`.
    numpy_evaluation : bool
        The function wants numpy arrays rather than torch tensors.
    lower_is_better : bool
        The number that the function returns is a loss.
    goals : tuple of Goal
        Qualities at which the rates of all curves are told.
    anchor : str
        Curve that BD-rates are taken against.
    folder : path or None
        Keeps finished rows and archives: a comparison that was stopped goes on from there.
    jobs : int
        Workers of the packer; with one, seconds are those of one core.
    """

    factors: tuple[float, ...] = FACTORS
    fidelities: tuple[str, ...] = ("outputs", "weights")
    recipes: tuple[str, ...] = tuple(RECIPES)
    calibration: Calibration | None = None
    calibration_name: str = "STATS"
    codecs: tuple[str, ...] = ("x265", "x264", "svt-av1")
    presets: tuple[str, ...] = ()
    codec_options: tuple[str, ...] = ()
    plain: bool = True
    peers: bool = True
    research: bool = False
    nncodec: str | os.PathLike[str] | None = None
    only: tuple[str, ...] = ()
    evaluation: Function | None = None
    numpy_evaluation: bool = False
    lower_is_better: bool = False
    goals: tuple[Goal, ...] = ()
    anchor: str = "weightvid"
    folder: str | os.PathLike[str] | None = None
    jobs: int = 1


@dataclass(frozen=True, slots=True)
class CompareResult:
    """A finished comparison.

    Attributes
    ----------
    weights, original_bytes : int
        Floating-point elements of the model, and bytes of all its tensors.
    original : Verdict or None
        Of the evaluation.
    metric_name : str
        What its number is called.
    date : str
        Year, month, day.
    """

    source: str
    weights: int
    original_bytes: int
    original: Verdict | None
    rows: tuple[Row, ...]
    options: CompareOptions
    machine: Mapping[str, Any] = field(default_factory=machine)
    versions: Mapping[str, str] = field(default_factory=versions)
    seconds: float = 0.0
    metric_name: str = "metric"
    date: str = field(default_factory=lambda: date.today().isoformat())

    @property
    def alone(self) -> bool:
        """Whether no other program had the cores while rows were measured."""
        return all(row.load < self.options.jobs + 0.5 for row in self.rows if row.status == OK)

    def curves(self) -> dict[str, list[Row]]:
        """Measured points of each curve, by rate."""
        found: dict[str, list[Row]] = {row.curve: [] for row in self.rows if row.status == OK}
        for row in sorted(self.rows, key=lambda row: row.file_bytes):
            if row.status == OK:
                found[row.curve].append(row)
        return found

    def measures(self) -> list[Measure]:
        """Measures that the rows have; the one that says most comes first."""
        known = measures(self.options.lower_is_better, self.metric_name).values()
        return [m for m in known if any(m.value(row) is not None for row in self.rows)]

    def rates_at(self, goal: Goal) -> dict[str, float | None]:
        """Bits per weight of each curve at a quality, between its two nearest points."""
        measure = measures(self.options.lower_is_better)[goal.measure]
        return {
            name: crossing(measure.levels(rows), measure.level(goal.value))
            for name, rows in self.curves().items()
            if len(rows) > 1
        }

    def words_at(self, goal: Goal) -> dict[str, str]:
        """The same in words, which say where a curve ends that does not reach the quality."""
        measure = measures(self.options.lower_is_better)[goal.measure]
        curves, level = self.curves(), measure.level(goal.value)
        return {
            name: ending(measure, curves[name], level) if rate is None else f"{rate:.3f}"
            for name, rate in self.rates_at(goal).items()
        }

    def bd_rates(self, measure: Measure) -> dict[str, float | None]:
        """BD-rate of each curve against the anchor in percent, where both have a common range."""
        curves = {name: rows for name, rows in self.curves().items() if len(rows) > 1}
        anchor = curves.pop(self.options.anchor, [])
        return {
            name: bd_rate(measure.levels(anchor), measure.levels(rows))
            for name, rows in curves.items()
            if anchor
        }


def compare(
    source: str | os.PathLike[str] | CheckpointReader,
    options: CompareOptions | None = None,
    progress: Report = quiet,
    on_row: Callable[[Row], None] = lambda _: None,
) -> CompareResult:
    """Store a model in many ways, restore it, and measure rate and quality of each.

    Parameters
    ----------
    source : path, address or CheckpointReader
    options : CompareOptions
    progress : callable
        Receives the stage ``compare``, counted in points.
    on_row : callable
        Receives each row when it is finished.

    Raises
    ------
    CheckpointError, QuantizationError, CodecError, EvaluationError, OutputError
        The checkpoint, an option, the evaluation of the original, or the folder is at fault; what
        goes wrong at a point becomes its row.
    """
    chosen, began = options or CompareOptions(), perf_counter()
    with ExitStack() as stack:
        if isinstance(source, CheckpointReader):
            name, reader = source.location or "a checkpoint in memory", source
        else:
            name, reader = str(source), stack.enter_context(open_checkpoint(source, progress))
        model = load_model(reader)
        scratch = Path(stack.enter_context(ScratchFolder()))
        store, judge = RowStore(chosen.folder), None
        if chosen.folder is not None:
            scratch = Path(chosen.folder) / "archives"
            scratch.mkdir(exist_ok=True)
        methods = list(all_methods(chosen, scratch))
        if chosen.anchor not in ("weightvid", *(method.name for method in methods)):
            raise QuantizationError(f"this comparison has no curve {chosen.anchor!r} for an anchor")
        points = _selected([(m, v) for m in methods for v in m.points()], chosen.only)
        if chosen.evaluation is not None:
            wanted = chosen.evaluation if chosen.numpy_evaluation else with_torch(chosen.evaluation)
            judge = Judge(wanted, model.state(model.tensors))
        rows: list[Row] = []
        for method, value in points:
            progress(Progress("compare", len(rows), len(points), unit="points"))
            row = store.measure(model, method, value, judge)
            rows.append(replace(row, command=command_of(name, method, value)))
            on_row(rows[-1])
        progress(Progress("compare", len(rows), len(points), unit="points"))
    return CompareResult(
        name,
        model.weights,
        sum(spec.stored_bytes for spec in model.specs),
        judge.original if judge else None,
        tuple(rows),
        chosen,
        seconds=perf_counter() - began,
        metric_name=judge.metric_name if judge else "metric",
    )


def command_of(source: str, method: Method, value: float) -> str:
    """What a shell runs to get a point again: a file, or its row."""
    verb, *more = method.command
    if verb == "pack":
        step = ["--step", f"{value:g}"] if method.parameter else []
        return shlex.join(["weightvid", verb, source, *more, *step, "--no-side-files"])
    step = ["--steps", f"{value:g}"] if method.parameter == "step factor" else []
    return shlex.join(["weightvid", verb, source, *more, *step, "--only", method.label(value)])


def missing(options: CompareOptions) -> list[str]:
    """What this machine lacks for what the options ask for, known before the work begins."""
    asked = [m for m in all_methods(options, Path()) if not options.only or m.name in options.only]
    found = {f"{method.name}: {method.missing}" for method in asked if method.missing}
    for package, what in (("matplotlib", "plots"), ("bjontegaard", "BD-rates")):
        if find_spec(package) is None:
            found.add(f"{what}: {package} is missing: pip install 'weightvid[compare]'")
    return sorted(found)


def all_methods(options: CompareOptions, folder: Path) -> Iterator[Method]:
    """Every curve that options ask for; archives lie in a folder."""
    base = PackOptions(jobs=options.jobs)
    for factor in options.factors:
        replace(base, step_factor=factor).check()
    for fidelity in options.fidelities:
        name = "weightvid" if fidelity == base.fidelity else f"weightvid {fidelity}"
        settings = replace(base, fidelity=fidelity)
        settings.check()
        yield archive_method(name, settings, options.factors, folder, ("--for", fidelity))
    for recipe in options.recipes:
        settings = replace(base, recipe=recipe)
        settings.check()
        command = ("--recipe", recipe)
        yield archive_method(f"weightvid --recipe {recipe}", settings, (), folder, command)
    if options.calibration is not None:
        settings = replace(base, calibration=options.calibration)
        command = ("--calibrate", options.calibration_name)
        yield archive_method("weightvid calibrated", settings, options.factors, folder, command)
    names = [n for name in options.codecs for n in (CODECS if name == "all" else [name])]
    more = options.presets, options.codec_options, options.factors
    yield from frame_methods(names, *more, folder)
    if options.plain:
        yield from plain_methods()
    if options.peers:
        yield llm265_method()
        yield from peer_methods(options.nncodec)
    if options.research:
        yield from research_methods()


def _selected(points: Sequence[_Point], only: Sequence[str]) -> list[_Point]:
    """The points that are asked for by label or curve."""
    names = {method.name for method, _ in points} | {m.label(v) for m, v in points}
    for name in only:
        if name not in names:
            near = get_close_matches(name, names, n=1, cutoff=0.3)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise QuantizationError(f"this comparison has no point or curve {name!r}{hint}")
    if not points:
        raise QuantizationError("there is nothing to compare: no method is left")
    return [(m, v) for m, v in points if not only or m.name in only or m.label(v) in only]
