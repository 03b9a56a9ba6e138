"""A comparison: points measured one after another or side by side, each in its own process."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from weightvid.codec import pictures, program
from weightvid.codec.program import Program
from weightvid.codec.registry import codec
from weightvid.compare import evaluate, meter, nnc
from weightvid.compare.baselines import BASELINES
from weightvid.compare.cache import NOT_MEASURING, Cache, default_folder, key_of, versions
from weightvid.compare.children import Children, Judge
from weightvid.compare.judge import Question
from weightvid.compare.model import Model, load_model, statistics_sha256
from weightvid.compare.point import Request
from weightvid.compare.row import ERROR, MISSING, OK, Row
from weightvid.compare.settings import ORIGINAL, Setting
from weightvid.compare.sweep import Sweep, select
from weightvid.errors import EvaluationError, QuantizationError
from weightvid.version import code_sha256


@dataclass(frozen=True, slots=True)
class Options:
    """How a comparison is run.

    Attributes
    ----------
    sweep : Sweep
        Which points.
    only : tuple of str
        Of these, those of the labels or curves named here; empty: all.
    evaluation : str or None
        ``script.py:function`` or ``module:function``.
    lower_is_better : bool
        The function's number is a loss.
    ffmpeg : str or None
        Program for the codecs that PyAV lacks; None: the system's or imageio-ffmpeg's.
    nncodec : str or None
        Python that has NNCodec.
    jobs : int
        Points measured side by side. With one, nothing runs beside a point, and all cores are
        measured too; with more, timings are marked as shared.
    cache : path or None
        Folder of finished points; None: the user's cache folder.
    refresh : bool
        Measure again what is there.
    calibration : path or None
        Statistics of this very model: pack's own quantizer is measured with them, too.
    """

    sweep: Sweep = field(default_factory=Sweep)
    only: tuple[str, ...] = ()
    evaluation: str | None = None
    lower_is_better: bool = False
    ffmpeg: str | None = None
    nncodec: str | None = None
    jobs: int = 1
    cache: str | os.PathLike[str] | None = None
    refresh: bool = False
    calibration: str | os.PathLike[str] | None = None


@dataclass(frozen=True, slots=True)
class Subject:
    """What is compared on.

    Attributes
    ----------
    path : str
    sha256 : str
        Of its names, types, shapes and elements.
    weights : int
        Floating-point elements.
    names : tuple of str
        Of all tensors, in order.
    aliases : mapping of str to str
    """

    path: str
    sha256: str
    weights: int
    names: tuple[str, ...]
    aliases: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class _Task:
    """A point that can be measured: its setting, its row so far, the program it needs."""

    setting: Setting
    row: Row
    program: Program | None = None


class Comparison:
    """Points of one model.

    Parameters
    ----------
    model : path
        A checkpoint.
    options : Options

    Attributes
    ----------
    options : Options
    subject : Subject
    settings : list of Setting
        All points, the original first.

    Raises
    ------
    WeightvidError
        The checkpoint cannot be read; a setting makes no sense; the program is no ffmpeg; the
        evaluation does not exist; the statistics are of another model; the cache cannot be written.
    """

    def __init__(self, model: str | os.PathLike[str], options: Options | None = None) -> None:
        self.options = options or Options()
        if self.options.jobs < 1:
            raise QuantizationError(f"a comparison needs at least one job, not {self.options.jobs}")
        if self.options.nncodec is not None:
            nnc.version(self.options.nncodec)
            os.environ[nnc.VARIABLE] = self.options.nncodec
        statistics = self.options.calibration
        sweep = replace(self.options.sweep, calibrated=statistics is not None)
        chosen = sweep.settings()
        if self.options.only:
            chosen = select(chosen, self.options.only)
        self._programs = program.programs(self.options.ffmpeg)
        named = self.options.evaluation
        self._evaluation = None if named is None else _checked(named)
        self._statistics = None if statistics is None else statistics_sha256(statistics, model)
        loaded = load_model(model)
        self.subject = Subject(
            loaded.path, loaded.sha256, loaded.weights, tuple(loaded.tensors), loaded.aliases
        )
        self.settings = [ORIGINAL, *(s for s in chosen if not _repeats(s, loaded))]
        self._cache = Cache(Path(self.options.cache or default_folder()))
        self._machine = meter.machine()

    @property
    def machine(self) -> dict[str, Any]:
        """The machine, in words, without its name."""
        return dict(self._machine)

    def rows(self) -> Iterator[Row]:
        """Every point, as it is finished; those known from before come first.

        Closing the iterator ends what is running.

        Raises
        ------
        EvaluationError
            The evaluation fails on the original: no point can be judged.
        """
        with tempfile.TemporaryDirectory(prefix="weightvid-") as name:
            runner = _Runner(self, Path(name))
            try:
                yield runner.original()
                todo = []
                for setting in self.settings[1:]:
                    task = self.task(setting)
                    done = task.row if task.row.status != OK else self.known(task)
                    if done is not None:
                        yield done
                    else:
                        todo.append(task)
                yield from runner.run(todo)
            finally:
                runner.close()

    def task(self, setting: Setting) -> _Task:
        """The program that a setting needs, and its row before it is measured."""
        tool, reason = self._tool(setting)
        row = Row(
            setting.label, setting.series, setting.kind, setting.record(),
            command=setting.command(self.subject.path, self.calibration(setting)),
            weights=self.subject.weights,
            timing="alone" if self.options.jobs == 1 else "shared",
            options=_options(setting), about=_about(setting),
        )  # fmt: skip
        if reason is not None:
            return _Task(setting, replace(row, status=MISSING, message=reason))
        return _Task(setting, replace(row, versions=versions(setting, tool)), tool)

    def calibration(self, setting: Setting) -> str | None:
        """Path of the statistics that a setting is packed with."""
        path = self.options.calibration
        return os.fspath(path) if path is not None and setting.calibrated else None

    def _tool(self, setting: Setting) -> tuple[Program | None, str | None]:
        if setting.kind in ("pack", "lossless", "lossy"):
            row = codec(setting.method)
            if row.backend == "pyav":
                return None, pictures.missing(row)
            found = program.choose(row, self._programs)
            return (None, found) if isinstance(found, str) else (found, None)
        if setting.kind == "baseline":
            return None, BASELINES[setting.method].missing()
        return None, None

    def _key(self, task: _Task) -> str:
        return key_of(
            {
                "model": self.subject.sha256,
                "setting": task.setting.record(),
                "statistics": self._statistics if task.setting.calibrated else None,
                "options": dict(task.row.options),
                "versions": dict(task.row.versions),
                "code": code_sha256(leave=NOT_MEASURING),
                "timing": task.row.timing,
                "machine": [self._machine["processor"], self._machine["cores"]],
            }
        )

    def _verdict_key(self, restored_sha256: str) -> str:
        return key_of(
            {
                "model": self.subject.sha256,
                "evaluation": self._evaluation,
                "restored": restored_sha256,
                "code": code_sha256(leave=NOT_MEASURING),
            }
        )

    @property
    def outcome(self) -> Path:
        """Where the original's outcome is kept."""
        return self._cache.path(self._verdict_key("original"), ".npz")

    def verdict(self, restored_sha256: str) -> dict[str, Any] | None:
        """What is known of restored tensors; nothing where nobody is asked to judge."""
        if self._evaluation is None:
            return {}
        return self._cache.get(self._verdict_key(restored_sha256))

    def known(self, task: _Task) -> Row | None:
        """A finished point, if it is in the cache."""
        if self.options.refresh:
            return None
        found = self._cache.get(self._key(task))
        verdict = None if found is None else self.verdict(str(found.get("restored_sha256")))
        if found is None or verdict is None:
            return None
        return task.row.merged({**found, **verdict})

    def keep(self, task: _Task, found: Mapping[str, Any], verdict: Mapping[str, Any]) -> None:
        """Put a finished point into the cache."""
        if verdict:
            self._cache.put(self._verdict_key(found["restored_sha256"]), verdict)
        self._cache.put(self._key(task), {**found, "label": task.setting.label})


class _Runner:
    """Measures points by processes, and has them judged."""

    def __init__(self, comparison: Comparison, folder: Path) -> None:
        self._comparison = comparison
        self._folder = folder
        self._jobs = comparison.options.jobs
        self._children = Children(self._jobs)
        self._judges: list[Judge] = []
        self._local = threading.local()

    def original(self) -> Row:
        """The model itself: measured where its outcome is not known."""
        comparison = self._comparison
        task = comparison.task(ORIGINAL)
        row = comparison.known(task)
        judged = comparison.options.evaluation is not None
        if row is None or (judged and not comparison.outcome.is_file()):
            row = self._measured(task)
            if not row.ok:
                raise EvaluationError(f"the original model cannot be judged: {row.message}")
        return row

    def run(self, todo: Sequence[_Task]) -> Iterator[Row]:
        """Rows as they are finished."""
        with ThreadPoolExecutor(self._jobs, "weightvid-compare") as executor:
            running: set[Future[Row]] = set()
            waiting = list(reversed(todo))
            try:
                while waiting or running:
                    while waiting and len(running) < self._jobs:
                        running.add(executor.submit(self._measured, waiting.pop()))
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    for future in done:
                        yield future.result()
            except BaseException:
                self._children.end()
                raise

    def close(self) -> None:
        """End all processes."""
        self._children.end()
        for judge in self._judges:
            judge.close()

    def _measured(self, task: _Task) -> Row:
        """Measure a point, and keep it if it succeeds."""
        comparison = self._comparison
        with tempfile.TemporaryDirectory(dir=self._folder) as name:
            folder = Path(name)
            judged = comparison.options.evaluation is not None
            request = Request(
                comparison.subject.path,
                comparison.subject.sha256,
                task.setting.record(),
                str(folder / "result.json"),
                None if task.program is None else task.program.path,
                str(folder / "restored.npz") if judged else None,
                self._jobs == 1,
                comparison.calibration(task.setting),
            )
            found = self._children.point(request, folder)
            found["about"] = {**task.row.about, **found.get("about", {})}
            if found["status"] != OK:
                return task.row.merged(found)
            verdict = self._verdict(task, found["restored_sha256"], folder)
        if verdict.get("status") == ERROR:
            return task.row.merged({**found, **verdict})
        comparison.keep(task, found, verdict)
        return task.row.merged({**found, **verdict})

    def _verdict(self, task: _Task, sha256: str, folder: Path) -> dict[str, Any]:
        """What the evaluation says; equal reconstructions are judged once."""
        comparison, is_original = self._comparison, task.setting == ORIGINAL
        if comparison.options.evaluation is None:
            return {}
        known = None if comparison.options.refresh else comparison.verdict(sha256)
        if known is not None and not is_original:
            return known
        question = Question(
            str(folder / "restored.npz"),
            list(comparison.subject.names),
            dict(comparison.subject.aliases),
            str(comparison.outcome),
            is_original,
            str(folder / "verdict.json"),
        )
        return self._judge().ask(question)

    def _judge(self) -> Judge:
        """The judge of this thread."""
        judge: Judge | None = getattr(self._local, "judge", None)
        if judge is None:
            name = str(self._comparison.options.evaluation)
            folder = Path(tempfile.mkdtemp(dir=self._folder))
            judge = self._local.judge = Judge(self._children, name, folder)
            self._judges.append(judge)
        return judge


def _repeats(setting: Setting, model: Model) -> bool:
    """Whether a quantizer differs from pack's own only in what this model has none of."""
    if setting.kind != "pack" or setting.quantizer != "trellis8":
        return False
    return not any(len(spec.shape) > 2 for spec in model.specs)


def _checked(name: str) -> str:
    """Fingerprint of an evaluation that exists."""
    where, _, function = name.rpartition(":")
    if not where or not function.isidentifier():
        raise EvaluationError(f"{name!r} is not of the form script.py:function or module:function")
    if where.endswith(".py") and not Path(where).is_file():
        raise EvaluationError(f"{where} is no file")
    return evaluate.fingerprint(name)


def _options(setting: Setting) -> Mapping[str, str]:
    return setting.coding.options if setting.kind in ("lossless", "lossy") else {}


def _about(setting: Setting) -> Mapping[str, Any]:
    """What tables tell of a codec."""
    if setting.kind == "baseline":
        return {"what": BASELINES[setting.method].about}
    if setting.kind == "original":
        return {"what": "the model as it is"}
    row = codec(setting.method)
    return {
        "standard": row.standard,
        "encoder": row.encoder,
        "backend": row.backend,
        "profile": setting.coding.profile,
        "container": row.container,
        "hardware": row.hardware,
    }


def compare(model: str | os.PathLike[str], options: Options | None = None) -> list[Row]:
    """Every point of a comparison.

    Raises
    ------
    WeightvidError
        See :class:`Comparison`.
    """
    return list(Comparison(model, options).rows())
