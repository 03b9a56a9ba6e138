"""One measured point, as tables and files show it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Final

#: states of a row.
OK: Final = "ok"
ERROR: Final = "error"
MISSING: Final = "missing"


@dataclass(frozen=True, slots=True)
class Row:
    """One point of a comparison.

    Attributes
    ----------
    label, series, kind : str
        Name of the point, of its curve, and what it is (see :class:`.settings.Setting`).
    setting : mapping
        All of the setting.
    status : str
        ``ok``; ``error``: it failed, or did not round-trip; ``missing``: this machine lacks what
        it needs.
    message : str
        Why it is not ok.
    command : str
        What a shell runs to get the point again.
    file_bytes : int or None
        Everything that is needed to restore the model.
    items : mapping of str to int
        Where the bytes go.
    bits_per_weight : float or None
        8 x file_bytes over all floating-point elements of the model.
    exact : bool
        Every element came back bit for bit.
    sqnr_db : float or None
        Over all floating-point tensors of two or more dimensions; None where there is no error.
    worst_sqnr_db, worst_tensor
        Of the tensor that fares worst.
    encode_s, decode_s : float or None
        Wall seconds of a single job.
    encode_all_s, decode_all_s : float or None
        With a job for each core; None where that makes no difference, or was not measured.
    codec_encode_s, codec_decode_s : float or None
        In the video codec alone, a single job.
    encode_peak_bytes, decode_peak_bytes : int or None
        Memory on top of what was held before, the model itself among it.
    timing : str
        ``alone``, or ``shared``: other points ran beside it.
    weights : int
        Floating-point elements of the model.
    metric, metric_change, kl, cosine_loss, agreement : float or None
        See :class:`.evaluate.Verdict`.
    restored_sha256 : str
        Of the restored tensors.
    options : mapping of str to str
        Options of the encoder, complete.
    about : mapping
        Standard, profile, container, phones' hardware, frames, encoder.
    versions : mapping of str to str
        Of what measured it.
    """

    label: str
    series: str
    kind: str
    setting: Mapping[str, Any]
    status: str = OK
    message: str = ""
    command: str = ""
    file_bytes: int | None = None
    items: Mapping[str, int] = field(default_factory=dict)
    bits_per_weight: float | None = None
    exact: bool = False
    sqnr_db: float | None = None
    worst_sqnr_db: float | None = None
    worst_tensor: str | None = None
    encode_s: float | None = None
    decode_s: float | None = None
    encode_all_s: float | None = None
    decode_all_s: float | None = None
    codec_encode_s: float | None = None
    codec_decode_s: float | None = None
    encode_peak_bytes: int | None = None
    decode_peak_bytes: int | None = None
    timing: str = "alone"
    weights: int = 0
    metric: float | None = None
    metric_change: float | None = None
    kl: float | None = None
    cosine_loss: float | None = None
    agreement: float | None = None
    restored_sha256: str = ""
    options: Mapping[str, str] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether it was measured."""
        return self.status == OK

    def rate(self, seconds: float | None) -> float | None:
        """Weights per second."""
        return self.weights / seconds if seconds else None

    def record(self) -> dict[str, Any]:
        """As JSON has it, with the speeds."""
        return asdict(self) | {
            name.removesuffix("_s") + "_weights_per_s": self.rate(getattr(self, name))
            for name in ("encode_s", "decode_s", "encode_all_s", "decode_all_s")
        }

    def merged(self, found: Mapping[str, Any]) -> Row:
        """With what was measured; unknown keys are ignored."""
        known = {item.name for item in fields(self)}
        return replace(self, **{name: v for name, v in found.items() if name in known})
