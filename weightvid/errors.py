"""Every exception that weightvid raises.

Each is also a builtin, so callers may catch ``ValueError`` or ``LookupError`` without knowing us.
Those of the loader are defined in it, as it must work alone.
"""

from __future__ import annotations

from weightvid.loader import (
    CodecError,
    FormatError,
    TensorNotFoundError,
    TruncatedError,
    WeightvidError,
)

__all__ = [
    "CheckpointError",
    "ClusterError",
    "CodecError",
    "EvaluationError",
    "FormatError",
    "KeyFileError",
    "OutputError",
    "QuantizationError",
    "RemoteError",
    "RepairError",
    "SignatureError",
    "TargetError",
    "TensorNotFoundError",
    "TruncatedError",
    "WeightvidError",
]


class CheckpointError(WeightvidError, ValueError):
    """A source checkpoint cannot be read, or an output checkpoint cannot hold what it should."""


class QuantizationError(WeightvidError, ValueError):
    """Weights or quantizer parameters that cannot be quantized as asked."""


class TargetError(WeightvidError, ValueError):
    """A size, rate or quality that was asked for cannot be reached; the nearest is named."""


class EvaluationError(WeightvidError, RuntimeError):
    """A function that judges a model failed, or returned what cannot be judged."""


class ClusterError(WeightvidError, RuntimeError):
    """A cluster cannot be reached, or gave up on the work."""


class RemoteError(WeightvidError, OSError):
    """A file elsewhere (a web server, an object store, a hub) cannot be read."""


class OutputError(WeightvidError, OSError):
    """An output file cannot be written (exists, disk full, no permission)."""


class RepairError(WeightvidError, ValueError):
    """Damage that the parity of an archive cannot restore."""


class SignatureError(WeightvidError, ValueError):
    """An archive is not what was signed, or is not signed by the key that is asked for."""


class KeyFileError(SignatureError):
    """A file holds no key of the kind that is needed."""
