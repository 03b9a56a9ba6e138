"""Reading archives on the device: numpy and PyAV, nothing else.

>>> from weightvid.loader import open_archive
"""

from weightvid.loader.archive import Archive, Levels, TensorInfo, open_archive

__all__ = ["Archive", "Levels", "TensorInfo", "open_archive"]
