"""What a user's function says of a restored model, next to what it says of the original."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from weightvid.errors import EvaluationError

Vectors = npt.NDArray[np.floating[Any]]
#: takes a dict of names to tensors.
Function = Callable[[dict[str, Any]], Any]
#: outputs whose vectors are so nearly of length 1 are embeddings.
_UNIT_SLACK: Final = 1e-2
_BLOCK: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Verdict:
    """A restored model next to the original.

    Attributes
    ----------
    metric : float or None
        The number that the function returned, as it returned it; of logits with labels, the share
        (0..1) of samples whose largest logit is at the label.
    kl : float or None
        Mean Kullback-Leibler divergence of the original's logits from these, in nats.
    cosine : float or None
        Of outputs that are unit vectors: their mean cosine to the original's.
    agreement : float or None
        Share (0..1) of samples whose largest logit is where the original's is.
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

    Parameters
    ----------
    function : callable
        Takes a dict of names to tensors. Returns a number; or logits or unit vectors, shape (...,
        classes); or a pair of such outputs and of labels or a number.
    original : dict of str to tensor
        The function may change it.

    Raises
    ------
    EvaluationError
        The function fails on the original, or returns something else.
    """

    def __init__(self, function: Function, original: dict[str, Any]) -> None:
        self._function = function
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
        """Run the function on a restored model.

        Raises
        ------
        EvaluationError
            It fails, or returns outputs of another kind or shape.
        """
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
                return outputs, float((outputs.argmax(1) == second).mean())
        raise EvaluationError(
            f"the evaluation returned {_described(found)}; it must return a number, outputs of "
            "shape (samples, classes), or a pair of outputs and of labels or a number"
        )


def one_line(error: BaseException) -> str:
    """Type and text of an error, without line breaks."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _described(found: Any) -> str:
    if isinstance(found, (tuple, list)):
        return f"a {type(found).__name__} of {', '.join(_described(each) for each in found[:4])}"
    shape = getattr(found, "shape", None)
    return f"a {type(found).__name__}{'' if shape is None else f' of shape {list(shape)}'}"


def _array(value: Any) -> Vectors:
    if value is None:  # which numpy takes for NaN
        return np.empty((0, 0, 0))
    for method in ("detach", "cpu", "double"):  # of torch tensors of any device and type
        value = getattr(value, method)() if hasattr(value, method) else value
    try:
        found: Vectors = np.asarray(value, np.float64)
    except (TypeError, ValueError):
        return np.empty((0, 0, 0))
    if not np.isfinite(found).all():
        raise EvaluationError("the evaluation returned NaN or infinity")
    return found


def is_unit(vectors: Vectors) -> bool:
    """Whether all vectors, shape (n, C), are of length 1, nearly: embeddings."""
    return bool(np.all(np.abs(np.linalg.norm(vectors, axis=1) - 1) < _UNIT_SLACK))


def divergence(before: Vectors, after: Vectors) -> float:
    """Mean Kullback-Leibler divergence of softmax distributions, in nats.

    Parameters
    ----------
    before, after : ndarray of float, shape (samples, classes)
        Logits.

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
