"""Quantizing a tensor with its calibration statistics."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import log2
from typing import Final

import numpy as np
import numpy.typing as npt

from weightvid.calibration import TensorMoments
from weightvid.errors import QuantizationError
from weightvid.quantize import (
    Params,
    TrellisParams,
    UniformParams,
    dequantize,
    feedback,
    feedback_trellis,
)
from weightvid.quantize.feedback import FeedbackConfig
from weightvid.quantize.feedback_trellis import Fitted
from weightvid.quantize.rate import entropy_bits

Matrix = npt.NDArray[np.float32]
Levels = npt.NDArray[np.int32]

#: tensors of up to so many weights are quantized with the trellis, whose order of columns is their
#: own, and without it in the order of falling energy. The trellis is better by 0.1 to 0.2 bits per
#: weight, but for some last layers (tools/results/calibration_tried.md), so larger ones take it.
_TRIAL_WEIGHTS: Final = 1 << 13


@dataclass(frozen=True, slots=True)
class Calibrated:
    """A quantizer with error feedback for one tensor.

    Attributes
    ----------
    params : Params
        With nothing left free: numbering and axis are those of the statistics.
    moment : ndarray of float32, shape (groups, C, C)
        Inputs along the columns of the matrix that is quantized.
    config : FeedbackConfig
    fitted : Fitted or None
        Of a trellis.
    transposed : bool
        The matrix is quantized in columns: its inputs lie along the rows.
    """

    params: Params
    moment: npt.NDArray[np.float32]
    config: FeedbackConfig
    fitted: Fitted | None
    transposed: bool

    @property
    def divisible(self) -> bool:
        """Whether blocks of rows may be quantized apart."""
        return self.fitted is not None and len(self.moment) == 1 and not self.transposed

    def levels(self, rows: Matrix) -> Levels:
        """Levels of the whole matrix, or of some of its rows if that is divisible."""
        weights = np.ascontiguousarray(rows.T) if self.transposed else rows
        if self.fitted is None:
            step = self.params.step
            found = feedback.quantize(weights, step, self.moment, self.config)
        elif self.divisible:
            found = feedback_trellis.quantize_rows(weights, self.fitted)
        else:
            found = feedback_trellis.quantize_groups(weights, self.fitted)
        return np.ascontiguousarray(found.T) if self.transposed else found


def mean_shift(error: Matrix, moments: TensorMoments) -> Matrix | None:
    """By how much an error of the weights lowers the mean output of a layer, channel by channel.

    Parameters
    ----------
    error : ndarray of float32, shape (R, C)
        Original less dequantized.
    moments : TensorMoments

    Returns
    -------
    ndarray of float32, shape (outputs,), or None
        What a bias must gain to make up for it; None without mean inputs.
    """
    if moments.mean is None:
        return None
    if moments.axis == 0:
        if len(moments.mean) > 1:
            return None
        shift: Matrix = error.T @ moments.mean[0]
    else:
        parts = zip(np.split(error, len(moments.mean)), moments.mean, strict=True)
        shift = np.concatenate([part @ mean for part, mean in parts])
    return shift


def fits(shape: tuple[int, int], moments: TensorMoments) -> bool:
    """Whether statistics are of a matrix of this shape."""
    if moments.moment is None:
        return False
    groups, columns = int(moments.moment.shape[0]), int(moments.moment.shape[1])
    if moments.axis == 0:
        return shape[0] == groups * columns
    return shape[1] == columns and groups > 0 and shape[0] % groups == 0


def calibrate_quantizer(matrix: Matrix, params: Params, moments: TensorMoments) -> Calibrated:
    """Fit a quantizer with error feedback to a tensor.

    Parameters
    ----------
    matrix : ndarray of float32, shape (R, C)
    params : Params
        The numbering of a trellis is still free.
    moments : TensorMoments
        With a useful moment.

    Raises
    ------
    QuantizationError
        Statistics that don't fit the tensor, or weights that cannot be quantized.
    """
    if moments.moment is None or not fits((matrix.shape[0], matrix.shape[1]), moments):
        raise QuantizationError("the calibration statistics are of a tensor of another shape")
    transposed = moments.axis == 0
    moment = _block_diagonal(moments.moment) if transposed else moments.moment
    config = FeedbackConfig(damping=moments.damping)
    if not isinstance(params, TrellisParams):
        return Calibrated(params, moment, config, None, transposed)
    weights = np.ascontiguousarray(matrix.T) if transposed else matrix
    fitted = feedback_trellis.fit(weights, params.step / 4, moment, config, params.states)
    chosen = replace(params, axis=moments.axis, zero=fitted.zero)
    trellis = Calibrated(chosen, moment, config, fitted, transposed)
    if matrix.size > _TRIAL_WEIGHTS:
        return trellis
    rival = Calibrated(UniformParams(params.step), moment, config, None, transposed)
    return min((trellis, rival), key=lambda quantizer: _cost_bits(matrix, quantizer))


def _cost_bits(matrix: Matrix, quantizer: Calibrated) -> float:
    """Bits per weight, and what the output error is worth at six decibels a bit."""
    levels = quantizer.levels(matrix)
    error = matrix - dequantize(levels, quantizer.params)
    error = error.T if quantizer.transposed else error
    lost = feedback.output_error(error, quantizer.moment)
    return entropy_bits(levels) + 0.5 * log2(max(lost, 1e-300))


def _block_diagonal(moment: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """One moment of all inputs of a grouped layer: those of different groups never meet."""
    groups, columns, _ = moment.shape
    if groups == 1:
        return moment
    whole = np.zeros((groups, columns, groups, columns), np.float32)
    whole[np.arange(groups), :, np.arange(groups), :] = moment
    return whole.reshape(1, groups * columns, groups * columns)
