"""Calibration: run a torch module on example inputs and keep what its layers see.

>>> from weightvid.calibrate import calibrate  # doctest: +SKIP
>>> calibrate(module, batches).save("stats.safetensors")  # doctest: +SKIP
"""

from weightvid.calibrate.examples import ModuleExamples
from weightvid.calibrate.run import CalibrationConfig, calibrate
from weightvid.calibration import CalibrationStats, load_stats

__all__ = ["CalibrationConfig", "CalibrationStats", "ModuleExamples", "calibrate", "load_stats"]
