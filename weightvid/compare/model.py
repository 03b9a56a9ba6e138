"""The model that is compared on, and what a way of storing it gave back."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import inf, log10
from typing import Any

import numpy as np
import numpy.typing as npt

from weightvid.checkpoint import CheckpointReader
from weightvid.errors import CheckpointError, CodecError
from weightvid.levels.code import compare_rows
from weightvid.levels.transform import view_of
from weightvid.loader import PACKABLE, TensorSpec, to_float32
from weightvid.pack import PackOptions
from weightvid.survey import survey_checkpoint
from weightvid.workers import open_workers

Array = npt.NDArray[Any]
Tensors = dict[str, Array]


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    """A checkpoint, all of it in memory.

    Packing reads ``reader``, which must stay open. ``aliases`` are tied names, which ``tensors``
    lacks; BF16 is there as float32, float8 as raw bits. ``sha256`` is of names, types, shapes and
    elements. ``judged`` are the tensors that the SQNR is counted over: those that ``weightvid
    pack`` quantizes.
    """

    reader: CheckpointReader
    specs: tuple[TensorSpec, ...]
    aliases: Mapping[str, str]
    tensors: Tensors
    sha256: str
    judged: frozenset[str]

    @property
    def weights(self) -> int:
        """Elements of all floating-point tensors: what bits per weight are counted over."""
        return sum(spec.size for spec in self.specs if spec.dtype in PACKABLE)

    def matrices(self) -> dict[str, Array]:
        """Finite float tensors of two axes or more, none empty: what plain ways quantize."""
        return {
            spec.name: self.tensors[spec.name]
            for spec in self.specs
            if spec.dtype in PACKABLE
            and len(spec.shape) >= 2
            and spec.size
            and bool(np.isfinite(to_float32(self.tensors[spec.name], "F32")).all())
        }

    def sqnr_db(self, restored: Mapping[str, Array]) -> float | None:
        """Signal over squared error in dB, as `compare_rows` counts it; None: all is exact.

        A CodecError says that a tensor is missing, of another shape, or changed though no float.
        """
        signal = noise = 0.0
        for spec in self.specs:
            before, after = self.tensors[spec.name], restored.get(spec.name)
            if after is None or after.shape != before.shape:
                raise CodecError(f"tensor {spec.name!r} was not restored")
            if spec.dtype not in PACKABLE and after.tobytes() != before.tobytes():
                raise CodecError(f"tensor {spec.name!r} has changed; it must be exact")
            if spec.name in self.judged:
                shape = -1, view_of(spec.shape).columns
                dtype = "F32" if spec.dtype == "BF16" else spec.dtype
                found = compare_rows(before.reshape(shape), after.reshape(shape), dtype)
                signal, noise = signal + found.signal, noise + found.noise
        known = 0 < noise < inf and 0 < signal < inf
        return 10 * log10(signal / noise) if known else None

    def state(self, restored: Mapping[str, Array]) -> Tensors:
        """Copies of tensors by all their names; tied ones share a copy."""
        found = {name: np.array(restored[name]) for name in self.tensors}
        return found | {alias: found[name] for alias, name in self.aliases.items()}


def load_model(reader: CheckpointReader) -> Model:
    """All tensors of an open checkpoint; a CheckpointError without any floating-point weights."""
    contents, digest = reader.contents, hashlib.sha256()
    tensors: Tensors = {}
    for spec in contents.tensors:
        stored = np.ascontiguousarray(reader.read(spec.name))
        digest.update(f"{spec.name}\0{spec.dtype}\0{spec.shape}\0".encode())
        digest.update(stored.tobytes())
        # A copy: the reader may have mapped the file.
        natural = to_float32(stored, "BF16") if spec.dtype == "BF16" else np.array(stored)
        tensors[spec.name] = natural.reshape(spec.shape)
    with open_workers("threads", 1) as workers:
        survey = survey_checkpoint(reader, PackOptions(), workers)
    judged = frozenset(survey.specs[number].name for number in survey.stats)
    aliases, sha256 = dict(contents.aliases), digest.hexdigest()
    model = Model(reader, contents.tensors, aliases, tensors, sha256, judged)
    if not model.weights:
        raise CheckpointError("the checkpoint holds no floating-point weights to compare on")
    return model


@dataclass(frozen=True, slots=True, eq=False)
class Coded:
    """A model that was stored and restored.

    ``file_bytes`` is everything that a reader needs; ``tensors`` are what it gets, in the types and
    shapes of `Model.tensors`.
    """

    file_bytes: int
    tensors: Mapping[str, Array]
    encode_s: float
    decode_s: float
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Method:
    """A way of storing a model: one curve of a comparison.

    ``kind`` is ``weightvid``, ``codec``, ``plain``, ``peer`` or ``research``. ``code`` stores and
    restores a model at a value. ``parameter`` says what the ``values`` are (``step factor``,
    ``QP``, ``bits``); where it is empty, the only one is 0. ``missing`` is what this machine lacks
    for it, if anything. ``settings`` are all others: they and the value tell points apart.
    ``depends`` are beginnings of the paths of those files of this package that the results depend
    on. ``restore`` gives the tensors of a point that has been stored before, without doing so
    again. ``command`` are arguments of ``weightvid`` that give a point again, before the model's
    and the value's.
    """

    name: str
    kind: str
    code: Callable[[Model, float], Coded]
    parameter: str = ""
    values: tuple[float, ...] = (0.0,)
    missing: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    depends: tuple[str, ...] = ("",)
    restore: Callable[[Model, float], Mapping[str, Array]] | None = None
    command: tuple[str, ...] = ("compare",)

    def points(self) -> tuple[float, ...]:
        """Values to measure: one that says what is missing, where something is."""
        return self.values[:1] if self.missing else self.values

    def label(self, value: float) -> str:
        """Name of a point.

        Examples
        --------
        >>> Method("weightvid", "weightvid", code=None, parameter="step factor").label(0.18)
        'weightvid, step factor 0.18'
        """
        return f"{self.name}, {self.parameter} {value:g}" if self.parameter else self.name
