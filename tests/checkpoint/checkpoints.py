"""Arrays, and a way to write all of a source."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from weightvid.checkpoint import CheckpointReader, create_checkpoint


def normal(seed: int, *shape: int) -> np.ndarray[Any, Any]:
    """Normal weights, float32."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def save(
    path: Path, source: CheckpointReader, kind: str | None = None, **more: Any
) -> tuple[str, ...]:
    """Write all of a source, last tensor first; gives the writer's notes."""
    with create_checkpoint(path, source.contents, kind=kind, **more) as writer:
        for spec in reversed(source.contents.tensors):
            writer.write(spec.name, source.read(spec.name))
    return writer.notes
