"""What is asked of a packing, and what it reports."""

from __future__ import annotations

import os
from concurrent.futures import Executor
from dataclasses import dataclass, field
from math import inf
from typing import TYPE_CHECKING, Final, NamedTuple

from weightvid.errors import QuantizationError
from weightvid.levels.recipes import recipe, units
from weightvid.loader import MAX_LAYERS
from weightvid.repair import check_share
from weightvid.targets import Target
from weightvid.video import Video

if TYPE_CHECKING:
    from weightvid.archives import Location
    from weightvid.calibrate import Calibration, Evaluation


_MOST_JOBS: Final = 1024
#: settings, and those that they cannot be combined with.
_EXCLUDED: Final = {
    "pruning": ("a QP",),
    "lossless": ("pruning",),
    "a step factor": ("a target", "an evaluation", "a QP", "lossless"),
    "a target": ("an evaluation", "a QP", "lossless"),
    "an evaluation": ("a QP", "lossless"),
    "a QP": ("lossless",),
    "calibration": ("fidelity 'weights'", "a QP", "lossless"),
    "layers or a base": ("a target", "an evaluation", "a QP", "pruning"),
}


@dataclass(frozen=True, slots=True)
class PackOptions:
    """Settings of one packing.

    Attributes
    ----------
    recipe : str
        ``balanced``, ``small`` or ``fine``.
    step_factor : float or None
        k of the step rule, instead of the recipe's.
    fidelity : str
        ``outputs``: steps that keep the network's outputs; ``weights``: one step for all tensors,
        the least squared error of the weights; ``integers``: plain integers times a step.
    target : Target or None
        Search the step factor for a size, a rate or an SQNR.
    calibration : Calibration or None
        Statistics of this very model, or the model with example inputs.
    evaluation : Evaluation or None
        Search the step factor for a bound of the user's own measure.
    prune : float or None
        Set weights to zero that are smaller than the mean magnitude of their tensor times this;
        with a calibration the others make up for them.
    keep : tuple of str
        Shell-style patterns of tensor names that are kept exactly.
    first : tuple of str
        Patterns of names that come first in the file, in this order.
    lossless : bool
        Keep all tensors exactly, and code floats bit for bit.
    layers : int
        1 to 16, the first the coarsest: see `weightvid.layers`.
    base : tuple of path, address or file
        The archive that is updated; of a chain of updates the oldest first.
    parity : float
        Share of the file that is added to repair it by: 0.01 is 1 %; 0: none.
    side_files : bool
        Store the small other files of a folder: configuration, tokenizer.
    video : Video
        Codec, preset, and the QP of a lossy codec.
    workers : str, Executor or None
        See `weightvid.workers.open_workers`.
    jobs : int
        Workers; 0: one per core.
    force : bool
        Replace an existing file.
    verify : bool
        Decode the archive and check it before it gets its name.
    """

    recipe: str = "balanced"
    step_factor: float | None = None
    fidelity: str = "outputs"
    target: Target | None = None
    calibration: Calibration | None = None
    evaluation: Evaluation | None = None
    prune: float | None = None
    keep: tuple[str, ...] = ()
    first: tuple[str, ...] = ()
    lossless: bool = False
    layers: int = 1
    base: tuple[Location, ...] = ()
    parity: float = 0.0
    side_files: bool = True
    video: Video = field(default_factory=Video)
    workers: str | Executor | None = None
    jobs: int = 0
    force: bool = False
    verify: bool = True

    def check(self, calibrated: bool = False) -> None:
        """A QuantizationError, if settings contradict each other or a calibration to come."""
        for name in ("keep", "first", "base"):
            if isinstance(given := getattr(self, name), str | os.PathLike):
                raise QuantizationError(f"{name} is a tuple, such as ({os.fspath(given)!r},)")
        recipe(self.recipe)
        units((), self.fidelity)
        if self.parity:
            check_share(self.parity)
        factors = ("the step factor", self.step_factor), ("the factor of pruning", self.prune)
        for name, factor in factors:
            if factor is not None and not 0 < factor < inf:
                raise QuantizationError(f"{name} must be a positive number, not {factor}")
        asked = {
            "a step factor": self.step_factor is not None,
            "a target": self.target is not None,
            "an evaluation": self.evaluation is not None,
            "a QP": self.video.qp is not None,
            "lossless": self.lossless,
            "pruning": self.prune is not None,
            "calibration": calibrated or self.calibration is not None,
            "fidelity 'weights'": self.fidelity == "weights",
            "layers or a base": self.layered,
        }
        for name, others in _EXCLUDED.items():
            for other in others:
                if asked[name] and asked[other]:
                    raise QuantizationError(f"{name} and {other} exclude each other")
        if not 0 <= self.jobs <= _MOST_JOBS:
            raise QuantizationError(
                f"jobs are 1 to {_MOST_JOBS} (0: one per core), not {self.jobs}"
            )
        if not 1 <= self.layers <= MAX_LAYERS:
            raise QuantizationError(f"an archive has 1 to {MAX_LAYERS} layers, not {self.layers}")
        if self.layered:
            self._check_layers()

    @property
    def layered(self) -> bool:
        """Whether the archive has layers, or is an update."""
        return self.layers > 1 or bool(self.base)

    def _check_layers(self) -> None:
        if self.layers > 1 and self.base:
            raise QuantizationError("an update has one layer: leave layers or the base out")
        if self.fidelity == "integers":
            raise QuantizationError("integers are no sums: leave layers and the base out")
        if self.lossless and self.layers > 1:
            raise QuantizationError("a lossless archive has nothing to refine: leave layers out")


class TensorReport(NamedTuple):
    """What became of one tensor: SQNR in dB, its worst row, escapes and outliers."""

    name: str
    sqnr_db: float
    worst_row: int
    worst_row_db: float
    escapes: int
    outliers: int


@dataclass(frozen=True, slots=True)
class PackReport:
    """What a packing did.

    Attributes
    ----------
    file_bytes, source_bytes, packet_bytes : int
        Of the archive, of all tensors of the source, and of the video in the archive.
    weights, coded_weights : int
        Elements of all floats and of what is quantized to a byte or less already; and of those
        that were quantized now.
    sqnr_db : float or None
        Over all quantized weights; None without an error, or without any.
    tensors : tuple of TensorReport
        Of the quantized tensors.
    frames, width, height : int
    skipped : tuple of str
        Entries of the source that are no tensors.
    unused_keeps : tuple of str
        Patterns of ``keep`` that no tensor matches.
    side_files : tuple of str
    step_factor : float
    encodings : int
        Whole encodings that a search took; 1 without one.
    seconds : float
    notes : tuple of str
        What calibration and evaluation found.
    """

    file_bytes: int
    source_bytes: int
    packet_bytes: int
    weights: int
    coded_weights: int
    sqnr_db: float | None
    tensors: tuple[TensorReport, ...]
    frames: int
    width: int
    height: int
    skipped: tuple[str, ...]
    unused_keeps: tuple[str, ...]
    side_files: tuple[str, ...]
    step_factor: float
    encodings: int
    seconds: float
    notes: tuple[str, ...] = ()

    @property
    def bits_per_weight(self) -> float:
        """8 x whole file / weights; 0 without weights."""
        return 8 * self.file_bytes / self.weights if self.weights else 0.0

    @property
    def worst_tensor(self) -> TensorReport | None:
        """Tensor of the lowest SQNR."""
        return min(self.tensors, key=lambda tensor: tensor.sqnr_db, default=None)

    @property
    def worst_row(self) -> TensorReport | None:
        """Tensor that has the row of the lowest SQNR."""
        return min(self.tensors, key=lambda tensor: tensor.worst_row_db, default=None)
