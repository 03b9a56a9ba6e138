"""What an evaluation says of a model beside the original."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import isfinite
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from weightvid.errors import EvaluationError

Floats = npt.NDArray[np.float32]

#: outputs whose vectors are so nearly of length 1 are embeddings.
_UNIT_SLACK: Final = 1e-2
#: softened outputs: of a sure prediction, too, one sees how far it has moved.
_TEMPERATURE: Final = 2.0
_BLOCK: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Outputs:
    """What a function returned.

    Attributes
    ----------
    vectors : ndarray of float32, shape (samples, classes), or None
        Logits or unit vectors.
    metric : float or None
        The number it returned, or the share of right predictions.
    """

    vectors: Floats | None
    metric: float | None


@dataclass(frozen=True, slots=True)
class Verdict:
    """A model beside the original.

    Attributes
    ----------
    loss : float
        Mean KL divergence of the logits in nats; 1 - mean cosine of unit vectors; or, where a
        function returns a number alone, its relative drop.
    drive : float
        What a search makes small: a smoother form of the loss.
    metric : float or None
    """

    loss: float
    drive: float
    metric: float | None


def read_outputs(returned: Any, name: str) -> Outputs:
    """What a function returned, as numbers.

    Parameters
    ----------
    returned : number, array, or tuple of an array and labels or a number
    name : str
        Of the function, for messages.

    Raises
    ------
    EvaluationError
        It cannot be judged.
    """
    if isinstance(returned, (tuple, list)) and len(returned) == 2:
        vectors = _vectors(returned[0], name)
        other = _array(returned[1], name)
        if other.ndim == 0:
            return Outputs(vectors, _number(other, name))
        labels = other.reshape(-1)
        if labels.size != len(vectors):
            raise EvaluationError(
                f"{name} returned {labels.size} labels for {len(vectors)} outputs"
            )
        right = vectors.argmax(1) == labels
        return Outputs(vectors, float(right.mean()))
    array = _array(returned, name)
    if array.ndim == 0 or array.size == 1:
        return Outputs(None, _number(array, name))
    return Outputs(_vectors(returned, name), None)


def _array(value: Any, name: str) -> npt.NDArray[np.generic]:
    for method in ("detach", "cpu", "float"):  # torch tensors of any device and type
        if method == "float" and isinstance(value, (int, float, np.ndarray, np.generic)):
            break
        found = getattr(value, method, None)
        value = found() if callable(found) else value
    try:
        array = np.asarray(value)
    except (TypeError, ValueError):
        array = np.empty(0, object)
    if array.dtype.kind not in "biuf":
        raise EvaluationError(
            f"{name} returned {_what(value)}, neither a number nor outputs nor a pair of both"
        )
    return array


def _what(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def _number(array: npt.NDArray[np.generic], name: str) -> float:
    value = float(array.reshape(-1)[0])
    if not isfinite(value):
        raise EvaluationError(f"{name} returned {value}")
    return value


def _vectors(value: Any, name: str) -> Floats:
    array = _array(value, name)
    if array.ndim < 2 or not array.size or array.shape[-1] < 2:
        raise EvaluationError(
            f"{name} returned outputs of shape {list(array.shape)}; (samples, classes) is wanted"
        )
    vectors = array.reshape(-1, array.shape[-1]).astype(np.float32)
    if not np.isfinite(vectors).all():
        raise EvaluationError(f"{name} returned outputs with NaN or infinity")
    return vectors


class Original:
    """Outputs of the original model, and comparison with them.

    Parameters
    ----------
    outputs : Outputs
    lower_is_better : bool
        The metric is a loss.
    name : str
        Of the function, for messages.
    """

    def __init__(self, outputs: Outputs, lower_is_better: bool, name: str) -> None:
        self.outputs = outputs
        self._sign = -1.0 if lower_is_better else 1.0
        self._name = name
        vectors = outputs.vectors
        self.unit = vectors is not None and bool(
            np.all(np.abs(np.linalg.norm(vectors, axis=1) - 1) < _UNIT_SLACK)
        )

    def drop(self, metric: float) -> float:
        """Loss of the metric, relative to the original's; absolute where that is zero."""
        before = self.outputs.metric
        if before is None:
            return 0.0
        lost = self._sign * (before - metric)
        return lost / abs(before) if before else lost

    def judge(self, outputs: Outputs) -> Verdict:
        """Another model's outputs beside these.

        Raises
        ------
        EvaluationError
            They are of another kind or shape.
        """
        mine, other = self.outputs.vectors, outputs.vectors
        if mine is None and other is None and outputs.metric is not None:
            lost = self.drop(outputs.metric)
            return Verdict(lost, lost, outputs.metric)
        if mine is None or other is None or mine.shape != other.shape:
            raise EvaluationError(
                f"{self._name} returned outputs of another shape than for the original model "
                f"({_shape(other)}, not {_shape(mine)}): it must judge the same samples each time"
            )
        if self.unit:
            loss = 1 - float(np.einsum("ij,ij->", mine, other, dtype=np.float64)) / len(mine)
            return Verdict(loss, loss, outputs.metric)
        return Verdict(
            divergence(mine, other), divergence(mine, other, _TEMPERATURE), outputs.metric
        )


def _shape(vectors: Floats | None) -> str:
    return "a number" if vectors is None else " x ".join(map(str, vectors.shape))


def divergence(before: Floats, after: Floats, temperature: float = 1.0) -> float:
    """Mean Kullback-Leibler divergence of softmax distributions, in nats.

    Parameters
    ----------
    before, after : ndarray of float32, shape (samples, classes)
        Logits.
    temperature : float
        What the logits are divided by.

    Examples
    --------
    >>> divergence(np.log(np.float32([[0.5, 0.5]])), np.log(np.float32([[0.25, 0.75]])))
    0.1438410...
    """
    total = 0.0
    for rows in _blocks(before):
        p = _log_softmax(before[rows] / temperature)
        q = _log_softmax(after[rows] / temperature)
        total += float((np.exp(p) * (p - q)).sum())
    return max(0.0, total / len(before))


def _blocks(array: Floats) -> Iterator[slice]:
    step = max(1, _BLOCK // array.shape[1])
    return (slice(begin, begin + step) for begin in range(0, len(array), step))


def _log_softmax(logits: Floats) -> npt.NDArray[np.float64]:
    wide = logits.astype(np.float64)
    wide -= wide.max(1, keepdims=True)
    return np.asarray(wide - np.log(np.exp(wide).sum(1, keepdims=True)))
