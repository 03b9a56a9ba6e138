"""How much a model's outputs care for the error of each tensor: tried, one tensor at a time.

Each tensor is quantized as `weightvid.pack` would do it at a middling step, with its statistics if
they are of use; the model runs on some of the example inputs with this tensor in place of its own,
and the squared change of the outputs is the tensor's loss. Nothing is derived from a model of the
network: branches, norms and activations all have their say, and no labels are needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from weightvid import allocate
from weightvid.calibrate.outputs import call, first_output, samples_of
from weightvid.calibration import TensorMoments
from weightvid.checkpoint import CheckpointReader
from weightvid.dtypes import PACKABLE, to_float32
from weightvid.packing.calibrated import calibrate_quantizer, fits
from weightvid.progress import Progress, Report
from weightvid.quantize import UniformParams, shaped
from weightvid.quantize.stats import TensorStats, tensor_stats
from weightvid.spec import TensorSpec

#: step factor of trials, a middling one.
TRIAL_FACTOR: Final = 0.25
#: smaller tensors are never quantized.
_LEAST_WEIGHTS: Final = 256

Matrix = npt.NDArray[np.float32]
Levels = npt.NDArray[np.int32]


def sensitivities(
    module: torch.nn.Module,
    reader: CheckpointReader,
    moments: Mapping[str, TensorMoments],
    batches: Sequence[Any],
    progress: Report,
) -> dict[str, float]:
    """Squared change of the outputs, per sample and squared step of the quantizer.

    Parameters
    ----------
    module : torch.nn.Module
        In eval mode, without gradients. Its weights change on the way, and are restored.
    reader : CheckpointReader
        Of the module's own tensors.
    moments : mapping of str to TensorMoments
    batches : sequence
        Example inputs.
    progress : callable
        Told about the stage ``sensitivity``, in tensors.

    Returns
    -------
    dict of str to float
        By name; tensors whose errors don't reach the outputs are left out.
    """
    stats = quantizable(reader)
    steps = allocate.steps(stats, TRIAL_FACTOR) if stats else []
    tensors = module.state_dict(keep_vars=True)
    samples = sum(samples_of(batch) for batch in batches)
    expected = [first_output(call(module, batch)) for batch in batches]
    found: dict[str, float] = {}
    for place, (known, step) in enumerate(zip(stats, steps, strict=True)):
        name = known.spec.name
        levels = quantized(reader, known.spec, step, moments.get(name))
        change = _with(
            tensors[name].detach(),
            levels.astype(np.float32) * np.float32(step),
            lambda: change_of(module, batches, expected),
        )
        if np.isfinite(change) and change > 0.0:
            found[name] = change / max(1, samples) / step**2
        progress(Progress("sensitivity", place + 1, len(stats)))
    return found


def choose_batches(batches: Sequence[Any], samples: int) -> list[Any]:
    """Evenly spaced batches of about so many samples together; at least one."""
    total = sum(samples_of(batch) for batch in batches)
    stride = max(1, total // max(1, samples))
    return list(batches[::stride])


def quantizable(reader: CheckpointReader) -> list[TensorStats]:
    """Tensors that packing would quantize."""
    return [s for spec in reader.contents.tensors if (s := _stats(reader, spec)) is not None]


def _stats(reader: CheckpointReader, spec: TensorSpec) -> TensorStats | None:
    if spec.dtype not in PACKABLE or len(spec.shape) < 2 or spec.size < _LEAST_WEIGHTS:
        return None
    found = tensor_stats(reader.read(spec.name), spec)
    return found if found.finite and found.sigma > 0 else None


def quantized(
    reader: CheckpointReader, spec: TensorSpec, step: float, moments: TensorMoments | None
) -> Levels:
    """Levels of a tensor, nearly as packing would choose them."""
    matrix = to_float32(reader.read(spec.name), spec.dtype).reshape(spec.shape[0], -1)
    kernel = spec.shape[2:]
    if moments is not None and moments.useful and fits((len(matrix), matrix.shape[1]), moments):
        return calibrate_quantizer(matrix, UniformParams(step), moments).levels(matrix)
    if np.prod(kernel) > 1:
        return shaped.quantize(matrix, step, kernel)
    rounded: Levels = np.rint(matrix / np.float32(step)).astype(np.int32)
    return rounded


def _with(tensor: torch.Tensor, values: Matrix, work: Callable[[], float]) -> float:
    """Result of some work while a tensor holds other values."""
    before = tensor.clone()
    try:
        tensor.copy_(torch.from_numpy(values).reshape(tensor.shape))
        return work()
    finally:
        tensor.copy_(before)


def change_of(
    module: torch.nn.Module, batches: Sequence[Any], expected: Sequence[torch.Tensor | None]
) -> float:
    """Squared change of the outputs, over all samples."""
    total = 0.0
    for batch, before in zip(batches, expected, strict=True):
        after = first_output(call(module, batch))
        if before is not None and after is not None:
            total += float((after.double() - before.double()).square().sum())
    return total
