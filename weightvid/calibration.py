"""Calibration statistics: what the layers of a model see at their inputs, and their file.

The file is a safetensors file. Of each tensor ``NAME`` it holds ``NAME#moment`` (float32, shape
(groups, C, C)) and ``NAME#mean`` (float32, (groups, C)), or ``NAME#counts`` (int64, (rows,)) of an
embedding table; the rest is JSON in the metadata under `KEY`. Statistics belong to one model: the
file carries a hash of the tensors that it speaks of.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from weightvid.checkpoint import CheckpointReader, Contents, create_checkpoint, open_checkpoint
from weightvid.checkpoint.base import raw_bytes, shorten
from weightvid.dtypes import name_of
from weightvid.errors import CheckpointError, TensorNotFoundError
from weightvid.spec import TensorSpec

KEY: Final = "weightvid.calibration"
VERSION: Final = 1
_BLOCK_BYTES: Final = 1 << 24


@dataclass(frozen=True, slots=True)
class TensorMoments:
    """What one weight tensor sees.

    Attributes
    ----------
    moment : ndarray of float32, shape (groups, C, C), or None
        Mean of ``x x'`` over the inputs x of the layer. With ``axis`` 1 the tensor, as a matrix of
        first axis by the rest, is ``groups`` equal shares of rows, each applied to its own x of
        C columns. With ``axis`` 0 the inputs lie along its rows, ``groups`` times C of them.
        None: only ``counts`` are known.
    mean : ndarray of float32, shape (groups, C), or None
        Mean of x.
    axis : int
        1 (Linear, convolutions, attention) or 0 (transposed convolutions, ``x @ W``).
    rows : int
        Number of inputs x seen.
    damping : float
        What worked best on samples held back, as a part of the mean diagonal; 0: the tensor is
        better off without its moment.
    gain_db : float or None
        Output error on samples held back, without the moment against with it; None: not measured.
    counts : ndarray of int64, shape (rows of the tensor,), or None
        How often each row of an embedding table was looked up.
    bias : str or None
        Name of the tensor that is added to the layer's output, if there is one.
    """

    moment: npt.NDArray[np.float32] | None
    mean: npt.NDArray[np.float32] | None
    axis: int = 1
    rows: int = 0
    damping: float = 0.01
    gain_db: float | None = None
    counts: npt.NDArray[np.int64] | None = None
    bias: str | None = None

    @property
    def useful(self) -> bool:
        """Whether quantizing with the moment is better than without."""
        return self.moment is not None and self.damping > 0.0


@dataclass(frozen=True, slots=True)
class CalibrationStats:
    """Statistics of one model.

    Attributes
    ----------
    model_sha256 : str
        `model_hash` of the tensors that have statistics.
    samples : int
        Example inputs seen.
    tensors : mapping of str to TensorMoments
        By name in the state dict.
    notes : tuple of str
        What could not be measured.
    sensitivity : mapping of str to float
        Squared change of the outputs, per sample and squared step of the quantizer, when this
        tensor alone is quantized. May name tensors that have no other statistics.
    refused : str
        Why none of it is to be used; empty: it is.
    confirmed : bool
        The inputs are of the kind that the model is used on: its BatchNorm layers know them, or
        whoever calibrated said so.
    """

    model_sha256: str
    samples: int
    tensors: Mapping[str, TensorMoments] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    sensitivity: Mapping[str, float] = field(default_factory=dict)
    refused: str = ""
    confirmed: bool = False

    def check(self, reader: CheckpointReader) -> None:
        """Refuse statistics of another model.

        Raises
        ------
        CheckpointError
            The checkpoint lacks a tensor, or its weights are not those that were calibrated.
        """
        known = {spec.name for spec in reader.contents.tensors} | set(reader.contents.aliases)
        missing = [name for name in self.tensors if name not in known]
        if missing:
            raise CheckpointError(
                f"the calibration statistics are of another model: the checkpoint has no "
                f"{shorten(missing)}"
            )
        if model_hash(reader, self.tensors) != self.model_sha256:
            raise CheckpointError(
                "the calibration statistics are of a model with other weights than this "
                "checkpoint's; calibrate again"
            )

    def save(self, path: str | os.PathLike[str], *, force: bool = False) -> None:
        """Write the file; it appears whole, or not at all.

        Raises
        ------
        OutputError
            The file exists or cannot be written.
        """
        arrays: dict[str, npt.NDArray[np.generic]] = {}
        records: dict[str, Any] = {}
        for name in sorted(self.tensors):
            tensor = self.tensors[name]
            for part in ("moment", "mean", "counts"):
                array = getattr(tensor, part)
                if array is not None:
                    arrays[f"{name}#{part}"] = np.ascontiguousarray(array)
            records[name] = {
                "axis": tensor.axis,
                "rows": tensor.rows,
                "damping": tensor.damping,
                "gain_db": tensor.gain_db,
                "bias": tensor.bias,
            }
        record = {
            "version": VERSION,
            "model_sha256": self.model_sha256,
            "samples": self.samples,
            "tensors": records,
            "notes": list(self.notes),
            "sensitivity": dict(self.sensitivity),
            "refused": self.refused,
            "confirmed": self.confirmed,
        }
        specs = [TensorSpec(name, name_of(a.dtype), a.shape) for name, a in arrays.items()]
        contents = Contents(tuple(specs), metadata={KEY: json.dumps(record)})
        with create_checkpoint(path, contents, force=force, kind="safetensors") as writer:
            for name, array in arrays.items():
                writer.write(name, array)


def load_stats(path: str | os.PathLike[str]) -> CalibrationStats:
    """Read a calibration file.

    Raises
    ------
    CheckpointError
        No calibration file, a damaged one, or one of a later version.
    """
    with open_checkpoint(path) as reader:
        text = reader.contents.metadata.get(KEY)
        if text is None:
            raise CheckpointError(f"{os.fspath(path)} holds no calibration statistics")
        try:
            record = json.loads(text)
            if record["version"] != VERSION:
                raise CheckpointError(
                    f"{os.fspath(path)} is of version {record['version']}; this weightvid reads "
                    f"version {VERSION}"
                )
            tensors = {
                str(name): _read_tensor(reader, str(name), entry)
                for name, entry in record["tensors"].items()
            }
            notes = tuple(str(note) for note in record["notes"])
            sensitivity = _read_sensitivity(record.get("sensitivity", {}))
            return CalibrationStats(
                str(record["model_sha256"]),
                int(record["samples"]),
                tensors,
                notes,
                sensitivity,
                str(record.get("refused", "")),
                bool(record.get("confirmed", False)),
            )
        except CheckpointError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, TensorNotFoundError) as error:
            raise CheckpointError(
                f"{os.fspath(path)} is damaged: its statistics make no sense ({error})"
            ) from None


def _read_sensitivity(entry: Any) -> dict[str, float]:
    found = {str(name): float(value) for name, value in entry.items()}
    if not all(0.0 < value < np.inf for value in found.values()):
        raise ValueError("a sensitivity is no positive number")
    return found


def _read_tensor(reader: CheckpointReader, name: str, entry: Any) -> TensorMoments:
    names = {spec.name for spec in reader.contents.tensors}
    parts: dict[str, Any] = {}
    for part in ("moment", "mean", "counts"):
        full = f"{name}#{part}"
        parts[part] = reader.read(full) if full in names else None
    moment, mean, counts = parts["moment"], parts["mean"], parts["counts"]
    axis, damping = int(entry["axis"]), float(entry["damping"])
    good = axis in (0, 1) and 0.0 <= damping < np.inf
    if moment is not None:
        good = good and moment.dtype == np.float32 and moment.ndim == 3
        good = good and mean is not None and mean.dtype == np.float32
        good = good and moment.shape == (*mean.shape, mean.shape[-1])
    if counts is not None:
        good = good and counts.dtype == np.int64 and counts.ndim == 1
    if not good or (moment is None and counts is None):
        raise CheckpointError(f"the calibration statistics of tensor {name!r} are damaged")
    gain, bias = entry["gain_db"], entry.get("bias")
    return TensorMoments(
        moment=moment,
        mean=mean,
        axis=axis,
        rows=int(entry["rows"]),
        damping=damping,
        gain_db=None if gain is None else float(gain),
        counts=counts,
        bias=None if bias is None else str(bias),
    )


def model_hash(reader: CheckpointReader, names: Iterable[str]) -> str:
    """SHA-256 of tensors: for each, in order of its name, name, dtype, shape and stored bytes.

    Parameters
    ----------
    reader : CheckpointReader
    names : iterable of str
        Tensors that count. Buffers such as batch counters differ between a file and the module
        that was loaded from it, so only tensors that have statistics are taken.

    Raises
    ------
    TensorNotFoundError
        The checkpoint lacks one.
    """
    digest = hashlib.sha256()
    for name in sorted(names):
        spec = reader.spec(name)
        head = json.dumps([name, spec.dtype, list(spec.shape)]).encode()
        digest.update(len(head).to_bytes(4, "little") + head)
        data = raw_bytes(np.ascontiguousarray(reader.read(name)))
        for start in range(0, data.size, _BLOCK_BYTES):
            digest.update(data[start : start + _BLOCK_BYTES].data)
    return digest.hexdigest()
