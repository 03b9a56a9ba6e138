"""A model's tensors as integers that a codec can show: pack's levels, or finely sampled weights."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from weightvid import tile
from weightvid.allocate import sample_step
from weightvid.checkpoint import open_checkpoint
from weightvid.codec.encode import DEFAULT_ENCODER, Lossy
from weightvid.codec.registry import bit_depth
from weightvid.compare.frames import Matrix
from weightvid.compare.model import Model
from weightvid.compare.settings import USUAL_BITS, Setting
from weightvid.dtypes import to_float32
from weightvid.packing.exact import ExactWriter
from weightvid.packing.matrices import quantize
from weightvid.packing.workers import Outbox, local_workers
from weightvid.packing.write import Task, kept
from weightvid.planning.named import QUANTIZERS
from weightvid.planning.options import PackOptions
from weightvid.planning.survey import plan_archive, survey
from weightvid.spec import TensorSpec


@dataclass(slots=True)
class Prepared:
    """Tensors ready for pictures.

    Attributes
    ----------
    specs : tuple of TensorSpec
        All tensors.
    numbers : list of int
        Those that are shown, by id.
    planes : list of ndarray of int, shape (R, C)
        Samples around zero.
    quantizers : list of dict
        JSON form of each one's quantizer.
    outliers : list of (ndarray of int64, ndarray)
        Places beyond the range of samples, and what stands there: levels as int32, or weights as
        float32.
    exact : list of bytes
        Boxes of all other tensors.
    """

    specs: tuple[TensorSpec, ...]
    numbers: list[int] = field(default_factory=list)
    planes: list[Matrix] = field(default_factory=list)
    quantizers: list[dict[str, Any]] = field(default_factory=list)
    outliers: list[tuple[npt.NDArray[np.int64], npt.NDArray[Any]]] = field(default_factory=list)
    exact: list[bytes] = field(default_factory=list)

    def write_exact(self, payload: bytes, tensors: tuple[int, ...]) -> None:
        """Take a box of exact tensors."""
        self.exact.append(payload)


def pack_options(setting: Setting, jobs: int, ffmpeg: str | None = None) -> PackOptions:
    """Pack's options at a setting; ``ffmpeg`` is the program of codecs that PyAV lacks."""
    quantizer = QUANTIZERS[setting.quantizer or "pack"]
    archive = setting.kind == "pack"
    lossy = archive and setting.value is not None
    return PackOptions(
        lossy=Lossy(setting.mode, setting.value or 0.0) if lossy else None,
        rule=quantizer.rule,
        step_factor=setting.rate,
        states=quantizer.states,
        shaping=quantizer.shaping,
        side_files=False,
        codec=setting.method if archive else DEFAULT_ENCODER,
        bit_depth=setting.coding.bits if archive else USUAL_BITS,
        preset=setting.preset if archive else "",
        ffmpeg=ffmpeg,
        jobs=jobs,
        verify=False,
    )


def levels(model: Model, setting: Setting, jobs: int) -> Prepared:
    """Pack's levels at a setting, clipped to 8 bits."""
    options = pack_options(setting, jobs)
    with open_checkpoint(model.path) as reader, local_workers(jobs) as workers:
        surveyed = survey(reader, options, workers=workers)
        plan = plan_archive(surveyed, surveyed.steps(options.first_factor))
        found = quantize(plan, workers.source(reader), workers)
    made = Prepared(surveyed.specs, exact=found.boxes)
    for number, tensor, matrix in found.tensors:
        made.numbers.append(number)
        made.planes.append(matrix)
        made.quantizers.append(tensor.params.to_dict())
        made.outliers.append((tensor.escapes.index, tensor.escapes.level))
    return made


def samples(model: Model, setting: Setting, jobs: int) -> Prepared:
    """Weights rounded to fine steps, which follow pack's rule; the codec does the quantizing."""
    bits = bit_depth(setting.coding.pixel_format)
    options = PackOptions(side_files=False)
    with open_checkpoint(model.path) as reader, local_workers(jobs) as workers:
        surveyed = survey(reader, options, workers=workers)
        plan = plan_archive(surveyed, surveyed.steps(options.first_factor))
        made = Prepared(surveyed.specs)
        outbox = Outbox(workers)
        source = workers.source(reader)
        exact = ExactWriter(made, made.specs, outbox)
        task = Task(replace(plan, params={}), source, workers)
        for number, spec in enumerate(made.specs):
            unit = surveyed.units.get(number)
            if unit is None:
                exact.add(number, kept(task, number))
                continue
            weights = to_float32(reader.read(spec.name), spec.dtype)
            matrix = weights.reshape(tile.matrix_shape(spec.shape))
            step = np.float32(sample_step(unit, surveyed.stats[number], bits))
            made.numbers.append(number)
            plane, outliers = sample(matrix, step, bits)
            made.planes.append(plane)
            made.outliers.append(outliers)
            made.quantizers.append({"step": float(step).hex()})
        exact.flush()
        outbox.flush()
    return made


def sample(
    matrix: npt.NDArray[np.float32], step: np.float32, bits: int
) -> tuple[npt.NDArray[np.int16], tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]]:
    """Samples around zero, and the weights that no sample reaches.

    Examples
    --------
    >>> plane, outliers = sample(np.array([[0.5, -1.0, 99.0]], np.float32), np.float32(0.5), 8)
    >>> plane.tolist(), outliers[0].tolist(), outliers[1].tolist()
    ([[1, -2, 127]], [2], [99.0])
    """
    most = (1 << (bits - 1)) - 1
    rounded = np.rint(matrix / step)
    beyond = np.flatnonzero(np.abs(rounded) > most)
    plane = np.clip(rounded, -most, most).astype(np.int16)
    return plane, (beyond.astype(np.int64), matrix.reshape(-1)[beyond])
