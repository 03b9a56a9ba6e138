"""Reading archives on the device: numpy and PyAV, nothing else.

>>> from weightvid.loader import open_archive
"""

from weightvid.loader.archive import Archive
from weightvid.loader.opening import open_archive
from weightvid.loader.records import Levels, TensorInfo

__all__ = ["Archive", "Levels", "TensorInfo", "open_archive"]
