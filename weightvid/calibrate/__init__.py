"""Calibration and evaluation: what a model's own data says of its weights.

>>> from weightvid.calibrate import Calibration, calibrate  # doctest: +SKIP
>>> calibrate(module, batches).save("stats.safetensors")  # doctest: +SKIP

Only what runs a model imports torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from weightvid.calibrate.calibration import Calibration
from weightvid.calibrate.evaluation import Evaluation
from weightvid.calibrate.stats import CalibrationConfig, CalibrationStats, load_stats

if TYPE_CHECKING:
    from weightvid.calibrate.run import calibrate

__all__ = [
    "Calibration",
    "CalibrationConfig",
    "CalibrationStats",
    "Evaluation",
    "calibrate",
    "load_stats",
]


def __getattr__(name: str) -> Any:
    """Import `calibrate`, which needs torch, when it is asked for."""
    if name != "calibrate":
        raise AttributeError(f"module 'weightvid.calibrate' has no attribute {name!r}")
    from weightvid.calibrate.run import calibrate

    return calibrate
