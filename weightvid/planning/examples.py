"""What packing asks of whoever has the model itself and example inputs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from weightvid.calibration import CalibrationStats
from weightvid.packing.quantizer import Fixed
from weightvid.progress import Report

if TYPE_CHECKING:
    from weightvid.planning.survey import Survey


@dataclass(frozen=True, slots=True)
class Recalibrated:
    """A model quantized layer by layer, each for the inputs that the layers before it make.

    Attributes
    ----------
    fixed : mapping of int to Fixed
        Levels of every tensor that is quantized, by id.
    layers : int
        Tensors that were quantized for such inputs.
    refitted : int
        Those whose weights were fitted anew to the original outputs.
    """

    fixed: Mapping[int, Fixed]
    layers: int
    refitted: int


class Examples(ABC):
    """A model and example inputs, at hand while its archive is made.

    Packing knows nothing of how models run: the torch side implements this, and it is handed down.
    """

    @abstractmethod
    def statistics(self, progress: Report) -> CalibrationStats:
        """Statistics of the model as it is; gathered once."""

    @abstractmethod
    def recalibrate(
        self, surveyed: Survey, steps: Mapping[int, float], progress: Report
    ) -> Recalibrated | str:
        """Quantize at these steps, layer by layer; or why not."""

    @abstractmethod
    def loss(self, tensors: Mapping[str, npt.NDArray[np.generic]]) -> float:
        """Mean squared change of the outputs on held-back inputs, for tensors of an archive."""
