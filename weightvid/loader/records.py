"""What the loader tells of a tensor."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from weightvid.quantize import Params


@dataclass(frozen=True, slots=True)
class Levels:
    """A quantized tensor for integer kernels.

    Attributes
    ----------
    levels : ndarray of int8, int16 or int32, of the tensor's shape
    params : Params
        The quantizer; for a uniform one without shifts, ``weight = level * params.step``.
    """

    levels: npt.NDArray[np.integer]
    params: Params


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What the archive says of one tensor without decoding it.

    Attributes
    ----------
    name : str
    dtype : str
        Element type as safetensors spells it.
    shape : tuple of int
    coding : str
        ``video``, ``plain`` (levels in an exact box) or ``exact``.
    alias_of : str or None
        The tensor whose storage this name shares.
    params : Params or None
        The quantizer; None for exact tensors.
    frames : range
        Frames on which the tensor lies.
    escapes : int
        Levels listed exactly beside the frames.
    sqnr_db : float or None
    sha256 : str
        First 16 bytes, in hex, of the SHA-256 of the dequantized elements; empty for exact
        tensors.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    coding: str
    alias_of: str | None = None
    params: Params | None = None
    frames: range = range(0)
    escapes: int = 0
    sqnr_db: float | None = None
    sha256: str = ""
