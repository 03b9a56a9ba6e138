"""A plan's levels as matrices, for whoever codes them by other means than an archive."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from weightvid import tile
from weightvid.packing.exact import ExactWriter
from weightvid.packing.quantized import CodedTensor
from weightvid.packing.quantizer import Coded
from weightvid.packing.schedule import Kept, code_tensors
from weightvid.packing.source import Source
from weightvid.packing.workers import Outbox, Workers
from weightvid.packing.write import Task, WritePlan, kept, requests
from weightvid.scratch import Scratch

Levels = npt.NDArray[np.int8]


@dataclass(slots=True)
class Matrices:
    """All tensors of a plan, in memory.

    Attributes
    ----------
    tensors : list of (int, CodedTensor, ndarray of int8)
        Id, quantizer and escapes, and clipped levels, shape (R, C).
    boxes : list of bytes
        Payloads of the boxes that hold all others.
    """

    tensors: list[tuple[int, CodedTensor, Levels]] = field(default_factory=list)
    boxes: list[bytes] = field(default_factory=list)

    def write_exact(self, payload: bytes, tensors: tuple[int, ...]) -> None:
        """Take a box of exact tensors."""
        self.boxes.append(payload)


def quantize(plan: WritePlan, source: Source, workers: Workers) -> Matrices:
    """Quantize as for an archive, but for the question whether a tensor is worth a video.

    Raises
    ------
    QuantizationError, CheckpointError
    """
    made, task = Matrices(), Task(plan, source, workers)
    outbox = Outbox(workers)
    exact = ExactWriter(made, plan.header.tensors, outbox)
    for coded in code_tensors(requests(task), workers):
        if isinstance(coded, Kept):
            exact.add(coded.number, kept(task, coded.number))
        elif coded.choice.coding == "exact" or coded.levels is None:
            exact.add(coded.number, task.read(coded.number).elements)
        else:
            made.tensors.append((coded.number, coded.tensor, _matrix(coded, coded.levels)))
    exact.flush()
    outbox.flush()
    return made


def _matrix(coded: Coded, levels: Levels | Scratch) -> Levels:
    """Levels of a tensor, row by row."""
    tensor = coded.tensor
    if isinstance(levels, Scratch):
        whole = levels.read(0, tensor.spec.size).view(np.int8)
        levels.close()
    else:
        whole = levels
    if coded.choice.coding != "video":
        return whole.reshape(tensor.shape)
    return tile.from_sequence(whole, tensor.shape, tensor.layout.order)
