"""Neural-network weights as HEVC video.

>>> from weightvid import open_archive

Nothing is imported before it is asked for: the loader needs numpy and PyAV alone.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from weightvid.version import __version__

if TYPE_CHECKING:
    from weightvid.errors import (
        CheckpointError,
        CodecError,
        EvaluationError,
        FormatError,
        OutputError,
        QuantizationError,
        TargetError,
        TensorNotFoundError,
        TruncatedError,
        WeightvidError,
    )
    from weightvid.inspect import ArchiveSummary, summarize_archive
    from weightvid.loader import Archive, open_archive
    from weightvid.pack import PackOptions, PackReport, pack_checkpoint
    from weightvid.unpack import UnpackReport, unpack_archive
    from weightvid.verify import VerifyReport, verify_archive

#: homes of the names that are no errors.
_HOMES = {
    "loader": "Archive open_archive",
    "pack": "PackOptions PackReport pack_checkpoint",
    "inspect": "ArchiveSummary summarize_archive",
    "unpack": "UnpackReport unpack_archive",
    "verify": "VerifyReport verify_archive",
}
_HOME = {name: home for home, names in _HOMES.items() for name in names.split()}

__all__ = [
    "Archive",
    "ArchiveSummary",
    "CheckpointError",
    "CodecError",
    "EvaluationError",
    "FormatError",
    "OutputError",
    "PackOptions",
    "PackReport",
    "QuantizationError",
    "TargetError",
    "TensorNotFoundError",
    "TruncatedError",
    "UnpackReport",
    "VerifyReport",
    "WeightvidError",
    "__version__",
    "open_archive",
    "pack_checkpoint",
    "summarize_archive",
    "unpack_archive",
    "verify_archive",
]


def __getattr__(name: str) -> Any:
    """Import what has been asked for, once."""
    if name not in __all__:
        raise AttributeError(f"module 'weightvid' has no attribute {name!r}")
    value = getattr(import_module(f"weightvid.{_HOME.get(name, 'errors')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Names, those not yet imported included."""
    return sorted({*globals(), *__all__})
