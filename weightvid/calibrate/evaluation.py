"""A user's own measure judges archives, and the step factor is searched for its bound."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import wraps
from math import inf, sqrt
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, BinaryIO, Final

import numpy as np
import numpy.typing as npt

from weightvid.errors import EvaluationError, QuantizationError, TargetError
from weightvid.loader import Array, TensorSpec, open_archive, to_float32
from weightvid.progress import Progress, Report, quiet

if TYPE_CHECKING:
    from weightvid.survey import Survey
    from weightvid.tasks import Written

Vectors = npt.NDArray[np.floating[Any]]
#: takes a dict of names to tensors.
Function = Callable[[dict[str, Any]], Any]
#: outputs whose vectors are so nearly of length 1 are embeddings.
_UNIT_SLACK: Final = 1e-2
_BLOCK: Final = 1 << 20
_MODULE: Final = "weightvid_evaluation_script"
_TORCH: Final = re.compile(r"^\s*(?:import|from)\b.*(?<![\w.])torch\b", re.MULTILINE)
_MOST_ENCODINGS: Final = 12
_SMALLEST, _LARGEST = 1e-3, 1e2
#: a divergence is met from below, at most so much under its bound.
_TOLERANCE: Final = 0.06
#: a metric moves by chance, so only the factor is narrowed down, to this ratio.
_NEAR: Final = 1.06


@dataclass(frozen=True, slots=True)
class Verdict:
    """A restored model next to the original.

    ``metric`` is the number that the function returned, as it returned it; of logits with labels,
    the share (0..1) of samples whose largest logit is at the label. ``kl`` is the mean
    Kullback-Leibler divergence of the original's logits from these, in nats, and ``agreement`` the
    share (0..1) of samples whose largest logit is where the original's is; ``cosine`` the mean
    cosine to the original's of outputs that are unit vectors.
    """

    metric: float | None = None
    kl: float | None = None
    cosine: float | None = None
    agreement: float | None = None

    @property
    def loss(self) -> float | None:
        """Divergence, or 1 - cosine; None of a number alone."""
        return self.kl if self.cosine is None else 1 - self.cosine

    def describe(self, original: Verdict) -> str:
        """In words, next to the original's."""
        facts = []
        if original.metric is not None:
            facts.append(f"metric {original.metric:.6g} -> {self.metric:.6g}")
        if self.kl is not None:
            facts.append(f"KL divergence {self.kl:.4g}, same answer {self.agreement:.1%}")
        if self.cosine is not None:
            facts.append(f"mean cosine {self.cosine:.5f}")
        return ", ".join(facts)


class Judge:
    """A function, and what it returned for the original.

    The function takes a dict of names to tensors, and may change it. It returns a number; or logits
    or unit vectors, shape (..., classes); or a pair of such outputs and of labels or a number. If
    it fails, or returns something else, an EvaluationError says so.
    """

    def __init__(self, function: Function, original: dict[str, Any]) -> None:
        self._function = function
        #: what the number is called.
        self.metric_name = str(getattr(function, "__name__", "metric"))
        self._outputs, self._metric = self._run(original)
        self.embeds = self._outputs is not None and is_unit(self._outputs)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what the function returned, which changes with its data and its helpers."""
        outputs = b"" if self._outputs is None else self._outputs.tobytes()
        return hashlib.sha256(repr(self._metric).encode() + outputs).hexdigest()

    @property
    def original(self) -> Verdict:
        """The original next to itself."""
        if self._outputs is None:
            return Verdict(self._metric)
        return Verdict(self._metric, *((None, 1.0) if self.embeds else (0.0, None, 1.0)))

    def judge(self, tensors: dict[str, Any]) -> Verdict:
        """Run the function on a restored model; its outputs must have the original's shape."""
        before, (after, metric) = self._outputs, self._run(tensors)
        shapes = [None if each is None else each.shape for each in (before, after)]
        if shapes[0] != shapes[1]:
            raise EvaluationError(
                f"the evaluation returned outputs of shape {shapes[1]}, and {shapes[0]} for the "
                "original: it must judge the same samples each time"
            )
        if before is None or after is None:
            return Verdict(metric)
        if self.embeds:
            return Verdict(metric, cosine=float(np.einsum("ij,ij->", before, after)) / len(before))
        agreement = float((before.argmax(1) == after.argmax(1)).mean())
        return Verdict(metric, divergence(before, after), None, agreement)

    def _run(self, state: dict[str, Any]) -> tuple[Vectors | None, float | None]:
        try:
            found = self._function(state)
        except (Exception, SystemExit) as error:
            raise EvaluationError(f"the evaluation failed: {one_line(error)}") from error
        pair = isinstance(found, (tuple, list)) and len(found) == 2
        outputs, second = (_array(each) for each in (found if pair else (found, 0.0)))
        if not pair and outputs.size == 1:
            return None, float(outputs.reshape(-1)[0])
        if outputs.ndim >= 2 and outputs.size and outputs.shape[-1] > 1:
            outputs, second = outputs.reshape(-1, outputs.shape[-1]), second.reshape(-1)
            if not pair:
                return outputs, None
            if second.size == 1:
                return outputs, float(second[0])
            if second.size == len(outputs):
                self.metric_name = "accuracy"
                return outputs, float((outputs.argmax(1) == second).mean())
        raise EvaluationError(
            f"the evaluation returned {_described(found)}; it must return a number, outputs of "
            "shape (samples, classes), or a pair of outputs and of labels or a number"
        )


@dataclass(frozen=True, slots=True)
class Evaluation:
    """How a model is judged, and how much it may lose.

    Attributes
    ----------
    function : str or callable
        ``module:function``, ``script.py:function``, or the function itself. It gets a dict of
        name to tensor (torch tensors if its module imports torch, else numpy arrays) and returns
        what `Judge` takes.
    max_drop : float or None
        Bound of the loss of the number, or of the share of right labels, relative to the
        original's: 0.005 is half a percent.
    max_kl : float or None
        Bound of the mean Kullback-Leibler divergence of logits from the original's, in nats, or of
        1 - mean cosine of unit vectors.
    lower_is_better : bool
        The number is a loss.
    """

    function: str | Function
    max_drop: float | None = None
    max_kl: float | None = None
    lower_is_better: bool = False

    def __post_init__(self) -> None:
        if (self.max_drop is None) == (self.max_kl is None):
            raise QuantizationError(
                "an evaluation needs one bound: the largest KL divergence (max_kl, --max-kl) "
                "or the largest drop (max_drop, --max-drop)"
            )
        if not (0 <= self._bound < inf and self.max_kl != 0):
            raise QuantizationError(f"a bound must be a positive number, not {self._bound}")

    @property
    def _bound(self) -> float:
        return self.max_drop if self.max_drop is not None else self.max_kl or 0.0

    def search(
        self,
        survey: Survey,
        encode: Callable[[float], Written],
        file: BinaryIO,
        progress: Report = quiet,
    ) -> tuple[Written, int, tuple[str, ...]]:
        """Find the largest step factor whose archive keeps the bound.

        ``encode`` writes the archive of a step factor into ``file``. Returned are the last
        encoding, which keeps the bound; the number of encodings; what the function says of it.

        Raises
        ------
        EvaluationError
            The function failed, or cannot judge the bound.
        TargetError
            The bound is out of reach; the nearest that was found is named.
        """
        function, torch = load_function(self.function)
        contents, read = survey.reader.contents, survey.reader.read

        def state(items: Iterable[tuple[TensorSpec, Array]]) -> dict[str, Any]:
            found = {spec.name: natural_tensor(stored, spec, torch) for spec, stored in items}
            return found | {alias: found[name] for alias, name in contents.aliases.items()}

        judge = Judge(function, state((spec, read(spec.name)) for spec in contents.tensors))
        original = judge.original
        if self._lost(original, original) is None:
            raise EvaluationError(
                "the evaluation returns outputs alone, which have no metric that could drop; "
                "return (logits, labels) or a number, or bound the divergence by max_kl"
                if self.max_kl is None
                else "the evaluation returns a number alone; max_kl needs logits or unit vectors, "
                "and max_drop bounds a number"
            )
        low, high, factor = 0.0, inf, survey.first_factor
        tried: dict[float, tuple[Written, Verdict, float]] = {}
        while True:
            made = encode(factor)
            file.seek(0)
            verdict = judge.judge(state(open_archive(file).stored_items()))
            lost = self._lost(original, verdict) or 0.0
            tried[factor] = made, verdict, lost
            progress(Progress("evaluate", len(tried), _MOST_ENCODINGS, unit="encodings"))
            low, high = (factor, high) if lost <= self._bound else (low, factor)
            met = self.max_kl is not None and (1 - _TOLERANCE) * self.max_kl <= lost <= self.max_kl
            last = [each.file_bytes for each, _, _ in tried.values()][-3:]
            settled = len(last) == 3 and len({*last}) == 1  # all steps are at their limits
            following = self._next(factor, lost, low, high)
            if met or settled or high < _NEAR * low or len(tried) == _MOST_ENCODINGS:
                break
            if not _SMALLEST < following < _LARGEST:
                break
            factor = following
        progress(Progress("evaluate", _MOST_ENCODINGS, _MOST_ENCODINGS, unit="encodings"))
        if not low:
            nearest = min(lost for _, _, lost in tried.values())
            raise TargetError(
                f"{self._show(self._bound)} at most cannot be reached; the nearest that was found "
                f"is {self._show(nearest)}: choose a value above it"
            )
        made, verdict, _ = tried[low]
        made = made if factor == low else encode(low)
        said = f"evaluation: {verdict.describe(original)}"
        return made, len(tried) + (factor != low), (said,)

    def _lost(self, original: Verdict, verdict: Verdict) -> float | None:
        """What is bounded; None where the function doesn't tell."""
        before, after = original.metric, verdict.metric
        if self.max_drop is None or before is None or after is None:
            return verdict.loss if self.max_drop is None else None
        drop = after - before if self.lower_is_better else before - after
        return drop / abs(before) if before else drop

    def _next(self, factor: float, lost: float, low: float, high: float) -> float:
        """Factor to try next: a divergence goes with the square of the steps."""
        if self.max_kl is not None and lost > 0:
            ratio = sqrt((1 - _TOLERANCE / 2) * self.max_kl / lost)
            aim = factor * min(max(ratio, 0.25), 4.0)
            if low < aim < high:
                return aim
        if not low:
            return factor / 1.6
        return 1.6 * factor if high == inf else sqrt(low * high)

    def _show(self, lost: float) -> str:
        drop = self.max_drop is not None
        return f"a drop of {100 * lost:.3g} %" if drop else f"a divergence of {lost:.3g}"


def load_function(wanted: str | Function) -> tuple[Function, bool]:
    """The function that ``module:function`` or ``script.py:function`` names, or that is given.

    And whether it wants torch tensors. What it prints goes to stderr, as stdout is data. A script
    is read anew each time. An EvaluationError says that there is none, or its module cannot be
    imported.
    """
    call: Any = wanted
    source: Any = wanted
    before = "torch" in sys.modules
    if isinstance(wanted, str):
        place, _, name = wanted.rpartition(":")
        if not (place and name.isidentifier()):
            raise EvaluationError(
                f"{wanted!r} is not of the form module:function or script.py:function"
            )
        try:
            source = _script(place) if place.endswith(".py") else importlib.import_module(place)
        except (Exception, SystemExit) as error:
            raise EvaluationError(f"{place} cannot be imported: {one_line(error)}") from error
        call = getattr(source, name, None)
        if not callable(call):
            raise EvaluationError(f"{place} defines no function {name!r}")
    torch = _imports_torch(source) or ("torch" in sys.modules and not before)

    @wraps(call)
    def quieted(*arguments: Any) -> Any:
        with redirect_stdout(sys.stderr):
            return call(*arguments)

    return quieted, torch


def _imports_torch(source: Any) -> bool:
    """Whether the file of a module or function imports torch, as far as it can be read."""
    try:
        text = Path(inspect.getsourcefile(source) or "").read_text(encoding="utf-8")
    except (OSError, TypeError, UnicodeDecodeError):
        return "torch" in sys.modules
    return bool(_TORCH.search(text))


def _script(place: str) -> ModuleType:
    if not Path(place).is_file():
        raise FileNotFoundError("no such file")
    spec = importlib.util.spec_from_file_location(_MODULE, place)
    if spec is None or spec.loader is None:
        raise ImportError("no Python file")
    module = importlib.util.module_from_spec(spec)
    # As if it were run: its folder can be imported from, and its classes can be pickled.
    sys.modules[_MODULE] = module
    folder = str(Path(place).resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    with redirect_stdout(sys.stderr):
        spec.loader.exec_module(module)
    return module


def natural_tensor(stored: Array, spec: TensorSpec, torch: bool) -> Any:
    """A tensor of its own: the function may do with it as it likes."""
    if torch:
        from weightvid.checkpoint.torch_file import from_stored

        return from_stored(stored.copy(), spec.dtype)
    return to_float32(stored, spec.dtype) if spec.dtype == "BF16" else stored.copy()


def one_line(error: BaseException) -> str:
    """Type and text of an error, without line breaks."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _described(found: Any) -> str:
    if isinstance(found, (tuple, list)):
        return f"a {type(found).__name__} of {', '.join(_described(each) for each in found[:4])}"
    shape = getattr(found, "shape", None)
    return f"a {type(found).__name__}{'' if shape is None else f' of shape {list(shape)}'}"


def _array(value: Any) -> Vectors:
    # numpy takes None for NaN, and drops imaginary parts.
    if value is None or "complex" in str(getattr(value, "dtype", "")):
        return np.empty((0, 0, 0))
    for method in ("detach", "cpu", "double"):  # of torch tensors of any device and type
        value = getattr(value, method)() if hasattr(value, method) else value
    try:
        found: Vectors = np.asarray(value, np.float64)
    except (TypeError, ValueError, OverflowError):
        return np.empty((0, 0, 0))
    if not np.isfinite(found).all():
        raise EvaluationError("the evaluation returned NaN or infinity")
    return found


def is_unit(vectors: Vectors) -> bool:
    """Whether all vectors, shape (n, C), are of length 1, nearly: embeddings."""
    return bool(np.all(np.abs(np.linalg.norm(vectors, axis=1) - 1) < _UNIT_SLACK))


def divergence(before: Vectors, after: Vectors) -> float:
    """Mean Kullback-Leibler divergence of softmax distributions in nats, of logits (n, classes).

    Examples
    --------
    >>> divergence(np.log([[0.5, 0.5]]), np.log([[0.25, 0.75]]))
    0.1438410...
    """
    total, step = 0.0, max(1, _BLOCK // before.shape[1])
    for first in range(0, len(before), step):
        p, q = (_log_softmax(each[first : first + step]) for each in (before, after))
        total += float((np.exp(p) * (p - q)).sum())
    return max(0.0, total / len(before))


def _log_softmax(logits: Vectors) -> npt.NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(1, keepdims=True)))
