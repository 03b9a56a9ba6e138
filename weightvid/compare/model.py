"""The model that is compared on: its tensors, its hash, and how far a restored one is from it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import log10
from pathlib import Path

import numpy as np

from weightvid.calibration import load_stats
from weightvid.checkpoint import open_checkpoint
from weightvid.compare.coded import Array, Tensors
from weightvid.dtypes import PACKABLE, to_float32
from weightvid.errors import CheckpointError, CodecError
from weightvid.spec import TensorSpec


@dataclass(frozen=True, slots=True)
class Quality:
    """How far restored tensors are from the model's.

    Attributes
    ----------
    sqnr_db : float or None
        Over all finite float tensors of two or more dimensions; None where all are exact.
    worst_sqnr_db : float or None
        Of the tensor that fares worst.
    worst_tensor : str or None
    sha256 : str
        Of the restored tensors: equal for equal reconstructions.
    """

    sqnr_db: float | None
    worst_sqnr_db: float | None
    worst_tensor: str | None
    sha256: str


@dataclass(frozen=True, slots=True)
class Model:
    """A checkpoint, whole in memory.

    Attributes
    ----------
    path : str
    specs : tuple of TensorSpec
    aliases : mapping of str to str
        Tied names.
    tensors : dict of str to ndarray
        By name, without aliases; BF16 as float32, float8 as raw bits.
    weights : int
        Elements of all floating-point tensors: what bits per weight are counted over.
    sha256 : str
        Of names, types, shapes and elements.
    """

    path: str
    specs: tuple[TensorSpec, ...]
    aliases: Mapping[str, str]
    tensors: Tensors
    weights: int
    sha256: str

    def judge(self, restored: Mapping[str, Array]) -> Quality:
        """Compare restored tensors with the model's.

        Raises
        ------
        CodecError
            A tensor is missing, of another shape, or not what it was though it is no float.
        """
        digest = hashlib.sha256()
        power = noise = 0.0
        worst: tuple[float, str] | None = None
        for spec in self.specs:
            before, after = self.tensors[spec.name], restored.get(spec.name)
            if after is None or after.shape != before.shape:
                raise CodecError(f"tensor {spec.name!r} was not restored")
            digest.update(np.ascontiguousarray(after).view(np.uint8).reshape(-1).data)
            if spec.dtype not in PACKABLE:
                if after.tobytes() != before.tobytes():
                    raise CodecError(f"tensor {spec.name!r} has changed; it must be exact")
                continue
            signal, error = _energies(before, after)
            if before.ndim < 2 or not (np.isfinite(signal) and np.isfinite(error)):
                continue
            power, noise = power + signal, noise + error
            if error > 0 and signal > 0 and (worst is None or signal / error < worst[0]):
                worst = (signal / error, spec.name)
        return Quality(
            10 * log10(power / noise) if noise > 0 and power > 0 else None,
            10 * log10(worst[0]) if worst else None,
            worst[1] if worst else None,
            digest.hexdigest(),
        )

    def state(self, restored: Mapping[str, Array]) -> Tensors:
        """Tensors by all their names, tied ones included."""
        found = {name: restored[name] for name in self.tensors}
        return found | {alias: restored[name] for alias, name in self.aliases.items()}


def _energies(before: Array, after: Array) -> tuple[float, float]:
    """Sums of squares of a tensor and of its error."""
    with np.errstate(all="ignore"):
        wide = before.astype(np.float64)
        error = wide - after
        return float(np.square(wide).sum()), float(np.square(error).sum())


def load_model(path: str | os.PathLike[str]) -> Model:
    """Read a checkpoint whole.

    Raises
    ------
    CheckpointError
        It cannot be read, or holds no floating-point weights.
    """
    digest = hashlib.sha256()
    tensors: Tensors = {}
    with open_checkpoint(path) as reader:
        specs = reader.contents.tensors
        for spec in specs:
            stored = reader.read(spec.name)
            digest.update(f"{spec.name}\0{spec.dtype}\0{spec.shape}\0".encode())
            digest.update(np.ascontiguousarray(stored).reshape(-1).view(np.uint8).data)
            # A copy: some readers map the file, and the pages would count as our memory.
            tensors[spec.name] = (
                to_float32(stored, "BF16") if spec.dtype == "BF16" else np.array(stored)
            )
        aliases = dict(reader.contents.aliases)
    weights = sum(spec.size for spec in specs if spec.dtype in PACKABLE)
    if not weights:
        raise CheckpointError(f"{path} holds no floating-point weights to compare on")
    return Model(str(Path(path)), specs, aliases, tensors, weights, digest.hexdigest())


def statistics_sha256(path: str | os.PathLike[str], model: str | os.PathLike[str]) -> str:
    """SHA-256 of a file of calibration statistics, known to be of this model.

    Raises
    ------
    CheckpointError
        The file is no such file, or its statistics are of another model.
    """
    stats = load_stats(path)
    with open_checkpoint(model) as reader:
        stats.check(reader)
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
