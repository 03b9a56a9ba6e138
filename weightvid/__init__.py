"""Neural-network weights as HEVC video.

>>> from weightvid import open_archive

The loader and the errors come with ``import weightvid``; what packs, unpacks, verifies and
summarizes is imported when it is first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

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
from weightvid.version import __version__

if TYPE_CHECKING:
    from weightvid.loader import Archive, open_archive
    from weightvid.pack import PackOptions, PackReport, pack_checkpoint
    from weightvid.summary import ArchiveSummary, summarize_archive
    from weightvid.unpack import UnpackOptions, UnpackReport, unpack_archive
    from weightvid.verify import VerifyReport, verify_archive

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
    "UnpackOptions",
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

_HOME = {
    "Archive": "loader",
    "open_archive": "loader",
    "PackOptions": "pack",
    "PackReport": "pack",
    "pack_checkpoint": "pack",
    "ArchiveSummary": "summary",
    "summarize_archive": "summary",
    "UnpackOptions": "unpack",
    "UnpackReport": "unpack",
    "unpack_archive": "unpack",
    "VerifyReport": "verify",
    "verify_archive": "verify",
}


def __getattr__(name: str) -> Any:
    """Import what has been asked for, once."""
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'weightvid' has no attribute {name!r}")
    value = getattr(import_module(f"weightvid.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Names, those not yet imported included."""
    return sorted({*globals(), *__all__})
