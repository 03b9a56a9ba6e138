"""`Evaluation`: the step factor is searched for a bound of the user's own measure."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from dataclasses import dataclass
from math import inf, sqrt
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, BinaryIO, Final

from weightvid.calibrate.judge import Function, Judge, Verdict, one_line
from weightvid.errors import EvaluationError, QuantizationError, TargetError
from weightvid.loader import Array, TensorSpec, open_archive, to_float32
from weightvid.progress import Progress, Report, quiet

if TYPE_CHECKING:
    from weightvid.pack import Survey, Written

_MODULE: Final = "weightvid_evaluation_script"
_TORCH: Final = re.compile(r"^\s*(?:import|from)\b.*(?<![\w.])torch\b", re.MULTILINE)
_MOST_ENCODINGS: Final = 12
_SMALLEST, _LARGEST = 1e-3, 1e2
#: a divergence is met from below, at most so much under its bound.
_TOLERANCE: Final = 0.06
#: a metric moves by chance, so only the factor is narrowed down, to this ratio.
_NEAR: Final = 1.06


@dataclass(frozen=True, slots=True)
class Evaluation:
    """How a model is judged, and how much it may lose.

    Attributes
    ----------
    function : str or callable
        ``module:function``, ``script.py:function``, or the function itself. It gets a dict of
        name to tensor (torch tensors if its module imports torch, else numpy arrays) and returns
        a number, or logits of shape (..., classes), or unit vectors, or a pair of outputs and of
        labels or a number.
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
            raise QuantizationError("an evaluation needs one bound: give max_drop or max_kl")
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

        Parameters
        ----------
        survey : Survey
        encode : callable
            Writes the archive of a step factor.
        file : binary file object
            Holds the last archive.
        progress : callable
            Told about the stage ``evaluate``, in encodings.

        Returns
        -------
        tuple of Written, int, tuple of str
            The last encoding, which keeps the bound; the number of encodings; what the function
            says of it.

        Raises
        ------
        EvaluationError
            The function failed, or cannot judge the bound.
        TargetError
            The bound is out of reach; the nearest that was found is named.
        """
        function, torch = load_function(self.function)
        aliases, reader = survey.reader.contents.aliases, survey.reader

        def state(items: Iterable[tuple[TensorSpec, Array]]) -> dict[str, Any]:
            found = {spec.name: _natural(stored, spec, torch) for spec, stored in items}
            return found | {alias: found[name] for alias, name in aliases.items()}

        judge = Judge(function, state((s, reader.read(s.name)) for s in reader.contents.tensors))
        original = judge.original
        self._check(original)
        low, high, factor = 0.0, inf, survey.options.first_factor
        tried: dict[float, tuple[Written, Verdict, float]] = {}
        while True:
            made = encode(factor)
            file.seek(0)
            verdict = judge.judge(state(open_archive(file).stored_items()))
            lost = self._lost(original, verdict)
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

    def _check(self, original: Verdict) -> None:
        if self.max_drop is not None and original.metric is None:
            raise EvaluationError(
                "the evaluation returns outputs alone, which have no metric that could drop; "
                "return (logits, labels) or a number, or bound the divergence by max_kl"
            )
        if self.max_kl is not None and original.loss is None:
            raise EvaluationError(
                "the evaluation returns a number alone; max_kl needs logits or unit vectors, and "
                "max_drop bounds a number"
            )

    def _lost(self, original: Verdict, verdict: Verdict) -> float:
        """What is bounded."""
        if self.max_drop is None:
            return verdict.loss or 0.0
        before, after = original.metric or 0.0, verdict.metric or 0.0
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
    """The function that a text names, and whether it wants torch tensors.

    What it prints goes to stderr, as stdout is data. A script is read anew each time.

    Parameters
    ----------
    wanted : str or callable
        ``module:function`` or ``script.py:function``, or the function itself.

    Raises
    ------
    EvaluationError
        There is no such function, or its module cannot be imported.
    """
    call: Any = wanted
    source: Any = wanted
    brought = False
    if isinstance(wanted, str):
        place, colon, name = wanted.rpartition(":")
        if not (colon and place and name.isidentifier()):
            raise EvaluationError(
                f"{wanted!r} is not of the form module:function or script.py:function"
            )
        before = "torch" in sys.modules
        try:
            source = _script(place) if place.endswith(".py") else importlib.import_module(place)
        except (Exception, SystemExit) as error:
            raise EvaluationError(f"{place} cannot be imported: {one_line(error)}") from error
        call, brought = getattr(source, name, None), not before and "torch" in sys.modules
        if not callable(call):
            raise EvaluationError(f"{place} defines no function {name!r}")

    def quieted(*arguments: Any) -> Any:
        with redirect_stdout(sys.stderr):
            return call(*arguments)

    return quieted, brought or _imports_torch(source)


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


def _natural(stored: Array, spec: TensorSpec, torch: bool) -> Any:
    """A tensor of its own: the function may do with it as it likes."""
    if torch:
        from weightvid.checkpoint.torch_file import from_stored

        return from_stored(stored.copy(), spec.dtype)
    return to_float32(stored, spec.dtype) if spec.dtype == "BF16" else stored.copy()
