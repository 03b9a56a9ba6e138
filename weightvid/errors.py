"""Every exception that weightvid raises.

Each is also a builtin, so callers may catch ``ValueError`` or ``LookupError`` without knowing us.
"""

from __future__ import annotations


class WeightvidError(Exception):
    """Base of all errors raised on purpose by weightvid."""


class CheckpointError(WeightvidError, ValueError):
    """A source checkpoint cannot be read, or an output checkpoint cannot hold what it should."""


class QuantizationError(WeightvidError, ValueError):
    """Weights or quantizer parameters that cannot be quantized as asked."""


class TargetError(WeightvidError, ValueError):
    """A size, rate or quality that was asked for cannot be reached; the nearest is named."""


class EvaluationError(WeightvidError, RuntimeError):
    """A function that judges a model failed, or returned what cannot be judged."""


class FormatError(WeightvidError, ValueError):
    """An archive breaks the format.

    Parameters
    ----------
    message : str
        What is wrong, where, and what to do.
    code : str
        Stable, machine-readable name of the defect (listed in FORMAT.md).
    offset : int or None
        Byte offset in the archive where the defect was found, if known.
    tensor : str or None
        Name of the tensor concerned, if any.
    """

    def __init__(
        self, message: str, *, code: str, offset: int | None = None, tensor: str | None = None
    ) -> None:
        where = "" if offset is None else f" (at byte {offset})"
        super().__init__(f"{message}{where} [{code}]")
        self.code = code
        self.offset = offset
        self.tensor = tensor


class TruncatedError(FormatError):
    """The archive ends before its end; ``missing`` names the tensors that did not arrive."""

    def __init__(
        self, message: str, *, offset: int | None = None, missing: tuple[str, ...] = ()
    ) -> None:
        super().__init__(message, code="truncated", offset=offset)
        self.missing = missing


class TensorNotFoundError(WeightvidError, LookupError):
    """A tensor name that the archive or checkpoint does not have."""


class CodecError(WeightvidError, RuntimeError):
    """The video encoder or decoder failed."""


class ClusterError(WeightvidError, RuntimeError):
    """A cluster cannot be reached, or gave up on the work."""


class RemoteError(WeightvidError, OSError):
    """A file elsewhere (a web server, an object store, a hub) cannot be read."""


class OutputError(WeightvidError, OSError):
    """An output file cannot be written (exists, disk full, no permission)."""
