"""Calibration statistics: what the layers of a model see at their inputs, and their file.

That is a safetensors file with ``NAME#moment`` and ``NAME#mean`` of each tensor ``NAME``, for some
also ``NAME#row_steps``; the rest is JSON in its metadata. It carries a hash of the tensors that it
speaks of.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, cast

import numpy as np
import numpy.typing as npt

from weightvid.checkpoint import CheckpointReader, Contents, create_checkpoint, open_checkpoint
from weightvid.checkpoint.base import raw_bytes, shorten
from weightvid.errors import CheckpointError, QuantizationError, TensorNotFoundError
from weightvid.loader import Array, Floats, TensorSpec, to_float32

KEY: Final = "weightvid.calibration"
VERSION: Final = 1
#: what the file says of each tensor, and of all.
_RECORDED: Final = ("axis", "damping", "gain_db", "bias", "bias_sign")
_WHOLE: Final = ("model_sha256", "others", "samples", "notes", "refused", "confirmed", "gained")


@dataclass(frozen=True, slots=True)
class CalibrationConfig:
    """How to calibrate.

    Attributes
    ----------
    memory_bytes : int
        Limit of the sums of one pass; more layers take more passes over the inputs. A layer that
        is larger alone gets no statistics.
    held_back : float
        Part of the inputs that the statistics are checked on, 0 to 0.5; 0: no check.
    dampings : tuple of float
        Tried on held-back inputs; the first one when there is no check.
    trust_inputs : bool
        The inputs are known to be of the kind that the model is used on. Otherwise only
        BatchNorm layers, and language models, can confirm it; where they don't, losses are not
        measured and weights not fitted anew: both do harm where inputs are of another kind.
    """

    memory_bytes: int = 1 << 30
    held_back: float = 0.2
    dampings: tuple[float, ...] = (0.01, 0.1, 1.0)
    trust_inputs: bool = False

    def __post_init__(self) -> None:
        if self.memory_bytes < 1:
            raise QuantizationError("the memory limit of calibration must be positive")
        if not 0.0 <= self.held_back <= 0.5:
            raise QuantizationError(f"the part held back must be 0 to 0.5, not {self.held_back}")
        if not self.dampings or not all(0.0 < d < np.inf for d in self.dampings):
            raise QuantizationError(f"dampings must be positive numbers, not {self.dampings}")


@dataclass(frozen=True, slots=True, eq=False)
class TensorMoments:
    """What one weight tensor sees.

    ``mean`` (groups, C) is that of the inputs x of the layer. ``moment`` (groups, C + 1, C + 1) is
    the mean of ``a a'`` over inputs a with a 1 appended or, where gradients are known, over what
    pulls at them (`weightvid.calibrate.watch`). With ``axis`` 1 (linear layers, convolutions,
    attention) the tensor, as a matrix of first axis by the rest, is ``groups`` equal shares of
    rows, each applied to its own x of C columns; with ``axis`` 0 (transposed convolutions,
    ``x @ W``) inputs lie along its rows.
    ``damping``, a part of the mean diagonal, worked best on samples held back; 0: the tensor is
    better off without its moment. ``gain_db`` is what the output error gains there; None: not
    measured. ``bias`` names what is added to the layer's output or, where ``bias_sign`` is -1,
    subtracted from it, as the running mean of a BatchNorm is. ``row_steps`` are quarter octaves by
    which the steps of a table's rows are larger, by how often they are looked up. ``outputs``
    (O, O) is the second moment of what pulls at the outputs, if errors in them make up for one
    another.
    """

    moment: Floats
    mean: Floats
    axis: int = 1
    damping: float = 0.01
    gain_db: float | None = None
    bias: str | None = None
    bias_sign: int = 1
    row_steps: npt.NDArray[np.int8] | None = None
    outputs: Floats | None = None

    @property
    def useful(self) -> bool:
        """Whether quantizing with the moment is better than without."""
        return self.damping > 0.0


@dataclass(frozen=True, slots=True, eq=False)
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
        Squared change of the outputs over all samples, for errors of 1 in each weight of a tensor,
        of which error feedback leaves its share; the scale is common to all tensors.
    refused : str
        Why none of it is to be used; empty: it is.
    confirmed : bool
        The model's BatchNorm layers know the inputs, or whoever calibrated said so.
    others : mapping of str to str
        `model_hash` of each other float tensor of the model.
    gained : str
        What the outputs gain on inputs that were held back, or why nobody knows.
    """

    model_sha256: str
    samples: int
    tensors: Mapping[str, TensorMoments] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    sensitivity: Mapping[str, float] = field(default_factory=dict)
    refused: str = ""
    confirmed: bool = False
    gained: str = ""
    others: Mapping[str, str] = field(default_factory=dict)

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
            why = f"the checkpoint has no {shorten(missing)}"
            raise CheckpointError(f"the calibration statistics are of another model: {why}")
        others = {name: sha for name, sha in self.others.items() if name in known}
        same = all(model_hash(reader, [name]) == sha for name, sha in others.items())
        if not same or model_hash(reader, self.tensors) != self.model_sha256:
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
        arrays: dict[str, Array] = {}
        records: dict[str, Any] = {}
        for name, tensor in sorted(self.tensors.items()):
            arrays[f"{name}#moment"], arrays[f"{name}#mean"] = tensor.moment, tensor.mean
            for part, found in ("row_steps", tensor.row_steps), ("outputs", tensor.outputs):
                if found is not None:
                    arrays[f"{name}#{part}"] = found
            records[name] = {key: getattr(tensor, key) for key in _RECORDED}
        record = {"version": VERSION, "tensors": records, "sensitivity": dict(self.sensitivity)}
        record |= {key: getattr(self, key) for key in _WHOLE}
        specs = [
            TensorSpec(name, "F32" if array.dtype == np.float32 else "I8", array.shape)
            for name, array in arrays.items()
        ]
        contents = Contents(tuple(specs), metadata={KEY: json.dumps(record)})
        with create_checkpoint(path, contents, force=force, kind="safetensors") as writer:
            for name, array in arrays.items():
                writer.write(name, np.ascontiguousarray(array))


#: variance of inputs, as a part of their power, below which they count as constant.
_VARIES: Final = 1e-5


def without_ones(
    products: npt.NDArray[Any],
    left: npt.NDArray[Any] | None = None,
    right: npt.NDArray[Any] | None = None,
) -> npt.NDArray[Any]:
    """Products of inputs that had a 1 appended, shape (groups, C + 1, C + 1), as (groups, C, C).

    ``left`` and ``right``, shape (groups, C), are the means of the inputs on both sides (None: the
    same), which are taken from them where a bias makes up for the means.
    """
    if left is None:
        return products[:, :-1, :-1]
    right = left if right is None else right
    half = products[:, :-1] - left[:, :, None] * products[:, -1:]
    centred: npt.NDArray[Any] = half[:, :, :-1] - half[:, :, -1:] * right[:, None]
    if left is right:
        # Of an input that hardly varies around its mean rounding errors are all that is left.
        powers = np.diagonal(products, axis1=1, axis2=2)[:, :-1]
        constant = np.diagonal(centred, axis1=1, axis2=2) <= _VARIES * powers
        centred = np.where(constant[:, :, None] | constant[:, None], 0, centred)
    return centred


def load_stats(path: str | os.PathLike[str]) -> CalibrationStats:
    """Read a calibration file.

    Raises
    ------
    CheckpointError
        No calibration file, a damaged one, or one of a later version.
    """
    shown = os.fspath(path)
    with open_checkpoint(path) as reader:
        text = reader.contents.metadata.get(KEY)
        if text is None:
            raise CheckpointError(
                f"{shown} holds no calibration statistics, as weightvid calibrate writes them"
            )
        try:
            record = json.loads(text)
            if record["version"] != VERSION:
                raise CheckpointError(
                    f"{shown} holds statistics of version {record['version']}, and this weightvid "
                    f"reads version {VERSION}"
                )
            sensitivity = {str(k): float(v) for k, v in record["sensitivity"].items()}
            if not all(0.0 < value < np.inf for value in sensitivity.values()):
                raise ValueError("a sensitivity is no positive number")
            tensors = {n: _read_tensor(reader, n, entry) for n, entry in record["tensors"].items()}
            known = {key: record[key] for key in _WHOLE} | {"notes": tuple(record["notes"])}
            known["others"] = dict(record["others"].items())
            return CalibrationStats(tensors=tensors, sensitivity=sensitivity, **known)
        except CheckpointError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, TensorNotFoundError) as error:
            raise CheckpointError(
                f"{shown} is damaged: its statistics make no sense ({error})"
            ) from None


def _read_tensor(reader: CheckpointReader, name: str, entry: Mapping[str, Any]) -> TensorMoments:
    moment, mean = (cast(Floats, reader.read(f"{name}#{part}")) for part in ("moment", "mean"))
    known = {spec.name for spec in reader.contents.tensors}
    steps, outputs = (
        reader.read(f"{name}#{part}") if f"{name}#{part}" in known else None
        for part in ("row_steps", "outputs")
    )
    entries = {key: entry[key] for key in _RECORDED}
    found = TensorMoments(
        moment, mean, **entries, row_steps=cast(npt.NDArray[np.int8], steps),
        outputs=cast(Floats, outputs),
    )  # fmt: skip
    good = found.axis in (0, 1) and found.bias_sign in (1, -1) and 0.0 <= found.damping < np.inf
    good = good and (steps is None or (steps.dtype == np.int8 and steps.ndim == 1))
    square = outputs is None or (outputs.ndim == 2 and outputs.shape[0] == outputs.shape[1])
    good = good and square and (outputs is None or outputs.dtype == np.float32)
    good = good and moment.dtype == mean.dtype == np.float32 and mean.ndim == 2
    if not good or moment.shape != (len(mean), *(mean.shape[-1] + 1,) * 2):
        raise ValueError(f"tensor {name!r}")
    return found


def model_hash(reader: CheckpointReader, names: Iterable[str]) -> str:
    """SHA-256 of tensors, by name: of each its name, shape and values as float32, as halves run."""
    digest = hashlib.sha256()
    for name in sorted(names):
        spec = reader.spec(name)
        head = json.dumps([name, list(spec.shape)]).encode()
        digest.update(len(head).to_bytes(4, "little") + head)
        digest.update(raw_bytes(to_float32(reader.read(name).reshape(-1), spec.dtype)).data)
    return digest.hexdigest()
