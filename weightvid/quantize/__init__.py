"""Quantizers: weights to levels and back.

One quantizer per file; this page offers what every caller needs whatever the quantizer.
Dequantizing needs numpy alone.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from weightvid.quantize import uniform
from weightvid.quantize.params import Params, TrellisParams, UniformParams, params_from_dict

__all__ = ["Params", "TrellisParams", "UniformParams", "dequantize", "params_from_dict"]


def dequantize(
    levels: npt.NDArray[np.integer],
    params: Params,
    out: npt.NDArray[np.float32] | None = None,
) -> npt.NDArray[np.float32]:
    """Weights of a matrix of levels.

    Parameters
    ----------
    levels : ndarray of integers, shape (rows, columns)
        True levels (outliers included). A trellis along rows needs whole rows.
    params : Params
        The tensor's quantizer.
    out : ndarray of float32, same shape, optional
        Takes the weights.

    Returns
    -------
    ndarray of float32, same shape
    """
    if isinstance(params, TrellisParams):
        from weightvid.quantize import trellis

        return trellis.dequantize(levels, params, out)
    return uniform.dequantize(levels, params, out)
