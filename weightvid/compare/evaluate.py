"""Judging a restored model by a user's function, beside the original."""

from __future__ import annotations

import hashlib
import importlib.util
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from weightvid.compare.coded import Tensors
from weightvid.errors import EvaluationError
from weightvid.planning.function import Function
from weightvid.planning.verdict import Original, Outputs, read_outputs


@dataclass(frozen=True, slots=True)
class Verdict:
    """A restored model beside the original.

    Attributes
    ----------
    metric : float or None
        The function's number, or, of logits with labels, top-1 in percent.
    metric_change : float or None
        After minus before.
    kl : float or None
        Mean Kullback-Leibler divergence of the logits from the original's, in nats.
    cosine_loss : float or None
        Of outputs that are unit vectors: one minus the mean cosine to the original's.
    agreement : float or None
        Share (0..1) of samples of which the largest logit is the original's.
    """

    metric: float | None
    metric_change: float | None
    kl: float | None
    cosine_loss: float | None
    agreement: float | None


def run(function: Function, tensors: Tensors) -> Outputs:
    """What a function says of a model.

    Raises
    ------
    EvaluationError
        The function failed, or returned what cannot be judged.
    """
    state: Mapping[str, Any] = {name: np.array(array) for name, array in tensors.items()}
    if function.torch:
        import torch

        state = {name: torch.from_numpy(array) for name, array in state.items()}
    result = function(dict(state))
    found = read_outputs(result, function.name)
    pair = isinstance(result, (tuple, list)) and len(result) == 2
    if pair and found.metric is not None and np.ndim(_plain(result[1])) > 0:
        return Outputs(found.vectors, 100 * found.metric)
    return found


def _plain(value: Any) -> Any:
    return value.detach().cpu().numpy() if hasattr(value, "detach") else value


def judge(before: Outputs, after: Outputs, name: str) -> Verdict:
    """Compare what one function says of two models.

    Raises
    ------
    EvaluationError
        The outputs are of different kinds or shapes.
    """
    original = Original(before, False, name)
    if before.vectors is None and before.metric is None:
        raise EvaluationError(f"{name} returned nothing that can be judged")
    loss = original.judge(after).loss
    kl = cosine = agreement = None
    if before.vectors is not None and after.vectors is not None:
        if original.unit:
            cosine = max(0.0, loss)
        else:
            kl = loss
            agreement = float((before.vectors.argmax(1) == after.vectors.argmax(1)).mean())
    was, now = before.metric, after.metric
    change = None if was is None or now is None else now - was
    return Verdict(now, change, kl, cosine, agreement)


def save(path: Path, outputs: Outputs) -> None:
    """Write outputs as an ``.npz`` file."""
    arrays: dict[str, Any] = {}
    if outputs.vectors is not None:
        arrays["vectors"] = outputs.vectors
    if outputs.metric is not None:
        arrays["metric"] = np.float64(outputs.metric)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    path.write_bytes(buffer.getvalue())


def load(path: Path) -> Outputs:
    """Read what :func:`save` wrote."""
    with np.load(path, allow_pickle=False) as stored:
        metric = float(stored["metric"]) if "metric" in stored else None
        return Outputs(stored.get("vectors"), metric)


def fingerprint(name: str) -> str:
    """What identifies a function without running it: its name, and the bytes of its file.

    Its data are not seen.
    """
    where = name.rpartition(":")[0]
    digest = hashlib.sha256(name.encode())
    path = Path(where) if where.endswith(".py") else None
    if path is None:
        try:
            spec = importlib.util.find_spec(where)
        except (ImportError, ValueError):
            spec = None
        path = Path(spec.origin) if spec is not None and spec.origin else None
    if path is not None and path.is_file():
        digest.update(path.read_bytes())
    return digest.hexdigest()
