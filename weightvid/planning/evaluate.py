"""Judging a model by the steps of its tensors, and by its archive."""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
import numpy.typing as npt

from weightvid.calibration import CalibrationStats, model_hash
from weightvid.dtypes import PACKABLE, from_float32, to_float32
from weightvid.errors import EvaluationError
from weightvid.loader import open_archive
from weightvid.packing.biases import bias_numbers
from weightvid.packing.quantizer import Request
from weightvid.packing.restored import quantized
from weightvid.packing.source import ReaderSource, TensorRead
from weightvid.planning.function import Function, load_function
from weightvid.planning.memory import Memory, default_folder, steps_key
from weightvid.planning.options import Evaluation
from weightvid.planning.survey import Survey
from weightvid.planning.verdict import Original, Verdict, read_outputs
from weightvid.progress import Progress, Report
from weightvid.spec import TensorSpec
from weightvid.version import __version__, code_sha256

Array = npt.NDArray[np.generic]
#: stored elements of a quantized tensor, and what the bias of its layer gains.
_Made = tuple[Array, npt.NDArray[np.float32] | None]

#: of quantized tensors that are kept for the next evaluation, or the model twice.
_KEPT_BYTES: Final = 1 << 28
#: code that decides what the weights of a step are.
_QUANTIZING: Final = ("quantize/", "packing/", "dtypes.py")
_NUMPY: Final = frozenset({"F16", "F32", "F64"})


class Evaluator:
    """Runs an evaluation, and remembers.

    Parameters
    ----------
    surveyed : Survey
    evaluation : Evaluation
    progress : callable
        Told about the stage ``evaluate``.

    Attributes
    ----------
    budget : int
        Verdicts that a search may ask for.
    asked : int
        Verdicts asked for so far, known ones among them.
    calls : int
        Calls of the function.

    Raises
    ------
    EvaluationError
        There is no such function.
    """

    def __init__(self, surveyed: Survey, evaluation: Evaluation, progress: Report) -> None:
        self._surveyed = surveyed
        self._progress = progress
        self._function = load_function(evaluation.function)
        self._lower = evaluation.lower_is_better
        self._original: Original | None = None
        self._kept: OrderedDict[tuple[int, float], _Made] = OrderedDict()
        model = sum(spec.stored_bytes for spec in surveyed.specs)
        self._room = max(_KEPT_BYTES, 2 * model)
        self._source = ReaderSource(surveyed.reader)
        self._jobs = surveyed.options.jobs or os.cpu_count() or 1
        folder = Path(evaluation.cache) if evaluation.cache is not None else default_folder()
        known = self._function.digest is not None
        self._memory = Memory(
            folder if known else None, _identity(surveyed, self._function, self._lower, known)
        )
        self.budget = 0
        self.asked = 0
        self.calls = 0

    @property
    def name(self) -> str:
        """Of the function."""
        return self._function.name

    @property
    def left(self) -> int:
        """Verdicts that may still be asked for."""
        return max(0, self.budget - self.asked)

    def original(self) -> Original:
        """Outputs of the original model."""
        if self._original is None:
            outputs = read_outputs(self._run({}), self.name)
            self._original = Original(outputs, self._lower, self.name)
        return self._original

    def verdict(self, steps: Mapping[int, float]) -> Verdict:
        """A model of which these tensors are quantized, and all others exact.

        Biases make up for calibrated tensors, as in an archive.

        Raises
        ------
        EvaluationError
            The function failed, or returned what cannot be judged.
        """
        specs = self._surveyed.specs
        key = steps_key({specs[number].name: step for number, step in steps.items()})
        found = self._memory.get(key)
        if found is None:
            made = self._quantized(steps)
            replaced = {specs[number].name: stored for number, (stored, _) in made.items()}
            found = self._judge(replaced | self._corrected(made))
            self._memory.put(key, found)
        self.asked += 1
        self._progress(_progress(self.asked, self.budget))
        return found

    def archive(self, stream: BinaryIO) -> Verdict:
        """An archive, really decoded."""
        stream.seek(0)
        with open_archive(stream) as opened:
            found = {spec.name: stored for spec, stored in opened.iter_stored()}
        return self._judge(found)

    def finish(self) -> None:
        """Nothing more will be asked."""
        self._progress(_progress(self.budget, self.budget))

    def _judge(self, replaced: Mapping[str, Array]) -> Verdict:
        original = self.original()
        return original.judge(read_outputs(self._run(replaced), self.name))

    def _run(self, replaced: Mapping[str, Array]) -> Any:
        """Call the function with fresh tensors: it may do with them as it likes."""
        reader = self._surveyed.reader
        self.calls += 1
        state = {
            spec.name: self._natural(replaced.get(spec.name), spec)
            for spec in reader.contents.tensors
        }
        for alias, name in reader.contents.aliases.items():
            state[alias] = state[name]
        return self._function(state)

    def _natural(self, array: Array | None, spec: TensorSpec) -> Any:
        stored = self._surveyed.reader.read(spec.name) if array is None else array
        if self._function.torch:
            from weightvid.checkpoint.torch_file import from_stored

            return from_stored(stored.copy(), spec.dtype)
        if spec.dtype in PACKABLE and spec.dtype not in _NUMPY:
            return to_float32(stored, spec.dtype)
        return stored.copy()

    def _corrected(self, made: Mapping[int, _Made]) -> dict[str, Array]:
        """Biases of calibrated tensors, by name."""
        surveyed, found = self._surveyed, {}
        biases = bias_numbers(surveyed.specs, surveyed.moments, made.keys(), surveyed.options.keep)
        for number, bias in biases.items():
            spec, shift = surveyed.specs[bias], made[number][1]
            if shift is not None and shift.size == spec.size and np.isfinite(shift).all():
                values = to_float32(surveyed.reader.read(spec.name), spec.dtype) + shift
                found[spec.name] = from_float32(values, spec.dtype)
        return found

    def _quantized(self, steps: Mapping[int, float]) -> dict[int, _Made]:
        missing = [item for item in steps.items() if item not in self._kept]
        if len(missing) > 1 and self._jobs > 1:
            with ThreadPoolExecutor(self._jobs, "weightvid-quantize") as executor:
                made = list(executor.map(self._restored, missing))
        else:
            made = [self._restored(item) for item in missing]
        self._kept.update(zip(missing, made, strict=True))
        found = {}
        for item in steps.items():
            self._kept.move_to_end(item)
            found[item[0]] = self._kept[item]
        size = sum(array.nbytes for array, _ in self._kept.values())
        while size > self._room:
            size -= self._kept.popitem(last=False)[1][0].nbytes
        return found

    def _restored(self, item: tuple[int, float]) -> _Made:
        number, step = item
        surveyed = self._surveyed
        params, read = surveyed.quantizer(number, step), self._read(number)
        if params is None:
            return read(), None
        shaped, moments = surveyed.shaped(number), surveyed.moments.get(number)
        request = Request(number, read.spec, params, read, shaped, moments)
        ((fixed, stored),) = quantized([request])
        return stored, fixed.shift

    def _read(self, number: int) -> TensorRead:
        return TensorRead(self._source, self._surveyed.specs[number])


def _progress(asked: int, budget: int) -> Progress:
    return Progress("evaluate", min(asked, budget), max(1, budget), unit="calls")


def _identity(
    surveyed: Survey, function: Function, lower_is_better: bool, known: bool
) -> dict[str, Any]:
    """All that a verdict depends on, besides the steps."""
    if not known:
        return {}
    options = surveyed.options
    return {
        "version": __version__,
        "code": code_sha256(_QUANTIZING),
        "model": model_hash(surveyed.reader, [spec.name for spec in surveyed.specs]),
        "function": function.digest,
        "lower_is_better": lower_is_better,
        "states": options.states,
        "shaping": options.shapes_noise,
        "calibration": _digest(surveyed.calibration),
    }


def _digest(stats: CalibrationStats | None) -> str | None:
    if stats is None:
        return None
    digest = hashlib.sha256(stats.model_sha256.encode())
    for name, moments in sorted(stats.tensors.items()):
        known = f"{name}\n{moments.axis} {moments.damping!r} {moments.bias}\n"
        digest.update(known.encode())
        for part in (moments.moment, moments.mean):
            if part is not None:
                digest.update(np.ascontiguousarray(part).data)
    return digest.hexdigest()


def check_target(original: Original, kind: str, name: str) -> None:
    """Refuse a target that this function cannot judge.

    Raises
    ------
    EvaluationError
    """
    if kind == "drop" and original.outputs.metric is None:
        raise EvaluationError(
            f"{name} returns outputs alone, which have no metric that could drop; return "
            "(logits, labels) or a number, or bound the divergence"
        )
    if kind == "kl" and original.outputs.vectors is None:
        raise EvaluationError(
            f"{name} returns a number alone; a bound on the divergence needs logits or unit vectors"
        )
