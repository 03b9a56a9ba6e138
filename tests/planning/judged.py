"""A small model, and functions that judge it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from archives import normal

from weightvid.checkpoint import from_mapping
from weightvid.loader import open_archive
from weightvid.pack import Evaluation, PackOptions, PackReport, pack_checkpoint
from weightvid.planning.verdict import divergence

State = dict[str, np.ndarray[Any, Any]]

INPUTS = np.abs(normal(9, 200, 48, scale=1.0))


def model() -> State:
    """Two layers in a row: errors of the first count a hundred times as much as the second's."""
    return {
        "first.weight": normal(1, 64, 48, scale=0.1),
        "second.weight": normal(2, 64, 64, scale=0.1),
        "unused.weight": normal(3, 40, 40, scale=0.1),
        "head.weight": normal(4, 10, 64, scale=0.3),
        "head.bias": normal(5, 10),
    }


def logits(state: State) -> np.ndarray[Any, Any]:
    hidden = INPUTS @ state["first.weight"].T
    hidden = hidden + 0.1 * np.tanh(hidden) @ state["second.weight"].T
    return 2 * np.maximum(hidden, 0) @ state["head.weight"].T + state["head.bias"]


LABELS = logits(model()).argmax(1)


def labelled(state: State) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    return logits(state), LABELS


def unit_vectors(state: State) -> np.ndarray[Any, Any]:
    outputs = logits(state)
    return outputs / np.linalg.norm(outputs, axis=1, keepdims=True)


def loss(state: State) -> float:
    return 1 + float(np.square(logits(state) - logits(model())).mean())


def pack(path: Path, function: Any, **more: Any) -> PackReport:
    settings = {"budget": more.pop("budget", 60), "cache": path.parent / "cache"}
    evaluation = Evaluation(function, more.pop("lower_is_better", False), **settings)
    options = PackOptions(evaluation=evaluation, jobs=1, force=True, **more)
    return pack_checkpoint(from_mapping(model()), path, options)


def archived(path: Path) -> State:
    with open_archive(path) as archive:
        return dict(archive)


def loss_of(path: Path) -> float:
    return divergence(logits(model()).astype(np.float32), logits(archived(path)))


def steps(path: Path) -> dict[str, float]:
    from weightvid.summary import summarize_archive

    return {t.name: t.step for t in summarize_archive(path).tensors if t.step is not None}
