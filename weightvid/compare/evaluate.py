"""Judging a restored model by a user's function, beside the original."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import io
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import numpy.typing as npt

from weightvid.compare.coded import Tensors
from weightvid.errors import EvaluationError

Floats = npt.NDArray[np.float64]
_MODULE: Final = "weightvid_evaluation_script"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a function said of a model.

    Attributes
    ----------
    number : float or None
        If it returned one.
    logits : ndarray of float64, shape (samples, classes), or None
    labels : ndarray of int64, shape (samples,), or None
    """

    number: float | None = None
    logits: Floats | None = None
    labels: npt.NDArray[np.int64] | None = None

    @property
    def metric(self) -> float | None:
        """The number, or the share of samples of which the largest logit is the label's, in %."""
        if self.number is not None:
            return self.number
        if self.logits is None or self.labels is None:
            return None
        return 100 * float((self.logits.argmax(1) == self.labels).mean())

    def save(self, path: Path) -> None:
        """Write an ``.npz`` file."""
        arrays: dict[str, Any] = {
            name: value
            for name in ("number", "logits", "labels")
            if (value := getattr(self, name)) is not None
        }
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        path.write_bytes(buffer.getvalue())

    @classmethod
    def load(cls, path: Path) -> Outcome:
        """Read what :meth:`save` wrote."""
        with np.load(path, allow_pickle=False) as stored:
            number = float(stored["number"]) if "number" in stored else None
            return cls(number, stored.get("logits"), stored.get("labels"))


@dataclass(frozen=True, slots=True)
class Verdict:
    """A restored model beside the original.

    Attributes
    ----------
    metric : float or None
        The function's number, or top-1 in percent.
    metric_change : float or None
        After minus before.
    kl : float or None
        Mean Kullback-Leibler divergence of the logits from the original's, in nats.
    agreement : float or None
        Share (0..1) of samples of which the largest logit is the original's.
    """

    metric: float | None
    metric_change: float | None
    kl: float | None
    agreement: float | None


def judge(before: Outcome, after: Outcome) -> Verdict:
    """Compare two outcomes of one function.

    Raises
    ------
    EvaluationError
        They are of different kinds or shapes.
    """
    if (before.logits is None) != (after.logits is None):
        raise EvaluationError("the evaluation returns numbers for some models, logits for others")
    kl = agreement = None
    if before.logits is not None and after.logits is not None:
        if before.logits.shape != after.logits.shape:
            raise EvaluationError(
                f"the evaluation returned logits of shape {after.logits.shape}, and "
                f"{before.logits.shape} for the original"
            )
        p, q = _log_softmax(before.logits), _log_softmax(after.logits)
        kl = max(0.0, float((np.exp(p) * (p - q)).sum(1).mean()))
        agreement = float((before.logits.argmax(1) == after.logits.argmax(1)).mean())
    was, now = before.metric, after.metric
    change = None if was is None or now is None else now - was
    return Verdict(now, change, kl, agreement)


def _log_softmax(logits: Floats) -> Floats:
    shifted = logits - logits.max(1, keepdims=True)
    return cast(Floats, shifted - np.log(np.exp(shifted).sum(1, keepdims=True)))


@dataclass(frozen=True, slots=True)
class Function:
    """A user's function that judges a state dict.

    Attributes
    ----------
    call : callable
    torch : bool
        It wants torch tensors.
    """

    call: Callable[[dict[str, Any]], Any]
    torch: bool

    def __call__(self, tensors: Tensors) -> Outcome:
        """Judge a model.

        Raises
        ------
        EvaluationError
            The function failed, or returned what cannot be judged.
        """
        state: Mapping[str, Any] = tensors
        if self.torch:
            import torch

            state = {name: torch.from_numpy(np.array(array)) for name, array in tensors.items()}
        else:
            state = {name: np.array(array) for name, array in tensors.items()}
        try:
            # What it prints is none of the comparison's rows.
            with redirect_stdout(sys.stderr):
                result = self.call(dict(state))
        except Exception as error:
            raise EvaluationError(f"the evaluation raised {_said(error)}") from error
        return outcome(result)


def _said(error: BaseException) -> str:
    words = str(error).strip().splitlines()
    return f"{type(error).__name__}: {words[0]}" if words else type(error).__name__


def outcome(result: Any) -> Outcome:
    """What a function returned: a number, logits, or logits with labels.

    Raises
    ------
    EvaluationError

    Examples
    --------
    >>> outcome(0.5).metric, outcome(([[2.0, 1.0], [0.0, 3.0]], [0, 0])).metric
    (0.5, 50.0)
    """
    logits, labels = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
    try:
        values = np.asarray(_numpy(logits), np.float64)
        names = None if labels is None else np.asarray(_numpy(labels)).astype(np.int64).reshape(-1)
    except (TypeError, ValueError) as error:
        raise EvaluationError(
            f"the evaluation must return a number, logits, or logits and labels, not "
            f"{type(result).__name__}: {error}"
        ) from None
    if not np.isfinite(values).all():
        raise EvaluationError("the evaluation returned NaN or an infinity")
    if values.size == 1 and labels is None:
        return Outcome(float(values.reshape(())))
    if values.ndim < 2 or values.shape[-1] < 2 or not values.size:
        raise EvaluationError(
            f"the evaluation must return a number or logits of shape (..., classes), "
            f"not of shape {values.shape}"
        )
    flat = values.reshape(-1, values.shape[-1])
    if names is not None and len(names) != len(flat):
        raise EvaluationError(
            f"the evaluation returned {len(names)} labels for {len(flat)} rows of logits"
        )
    return Outcome(None, flat, names)


def _numpy(value: Any) -> Any:
    """A tensor of any framework as an array."""
    if hasattr(value, "detach"):
        return value.detach().cpu().double().numpy()
    return value


def load(name: str) -> Function:
    """The function of ``script.py:function`` or ``module:function``.

    Raises
    ------
    EvaluationError
        No such script, module or function.
    """
    where, _, wanted = name.rpartition(":")
    if not where or not wanted.isidentifier():
        raise EvaluationError(f"{name!r} is not of the form script.py:function or module:function")
    known = "torch" in sys.modules
    path = Path(where)
    try:
        with redirect_stdout(sys.stderr):
            module = _script(path) if where.endswith(".py") else importlib.import_module(where)
    except EvaluationError:
        raise
    except Exception as error:
        raise EvaluationError(f"{where} cannot be imported: {_said(error)}") from error
    found = getattr(module, wanted, None)
    if not callable(found):
        raise EvaluationError(f"{where} defines no function {wanted!r}")
    named = [getattr(value, "__name__", "") for value in vars(module).values()]
    torch = any(str(n).split(".")[0] == "torch" for n in named)
    return Function(found, torch or ("torch" in sys.modules and not known))


def _script(path: Path) -> Any:
    if not path.is_file():
        raise EvaluationError(f"{path} is no file")
    spec = importlib.util.spec_from_file_location(_MODULE, path)
    if spec is None or spec.loader is None:
        raise EvaluationError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    # As if it were run: its folder can be imported from, and its classes can be pickled.
    sys.modules[_MODULE] = module
    sys.path.insert(0, str(path.resolve().parent))
    spec.loader.exec_module(module)
    return module


def fingerprint(name: str) -> str:
    """What identifies a function: its name, and the bytes of its file; its data are not seen."""
    where = name.rpartition(":")[0]
    digest = hashlib.sha256(name.encode())
    if where.endswith(".py") and Path(where).is_file():
        digest.update(Path(where).read_bytes())
    else:
        try:
            spec = importlib.util.find_spec(where)
        except (ImportError, ValueError):
            spec = None
        if spec is not None and spec.origin and Path(spec.origin).is_file():
            digest.update(Path(spec.origin).read_bytes())
    return digest.hexdigest()
