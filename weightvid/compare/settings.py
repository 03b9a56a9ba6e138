"""One point to measure: what is coded, by what, and how."""

from __future__ import annotations

import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from weightvid.codec.encode import DEFAULT_ENCODER
from weightvid.codec.registry import Coding, codec
from weightvid.planning.named import DEFAULT_QUANTIZER

#: bits of a sample that no name mentions.
USUAL_BITS: Final = 8
#: kinds of points, in the order of tables.
KINDS: Final = ("original", "pack", "lossless", "lossy", "baseline")


@dataclass(frozen=True, slots=True)
class Setting:
    """One point to measure.

    Attributes
    ----------
    kind : str
        ``original``: the model itself; ``pack``: an archive by weightvid, with lossy video if it
        has a value; ``lossless``: pack's levels as plain samples of some codec; ``lossy``: a codec
        that does the quantizing; ``baseline``.
    method : str
        Codec or baseline.
    preset, mode, pixel_format : str
        Of the codec; empty for baselines.
    value : float or None
        QP, CRF, distance, or a baseline's own parameter.
    quantizer : str
        Of a ``pack`` or ``lossless`` point.
    rate : float or None
        Factor of pack's step rule.
    frames : str
        ``ribbon``: tensors one after another, as pack lays them; ``like``: a tensor to a picture,
        like tensors of the layers following each other.
    inter : bool
        Frames predicted from the ones before.
    calibrated : bool
        Of a ``pack`` point: with the comparison's calibration statistics.
    """

    kind: str
    method: str
    preset: str = ""
    mode: str = ""
    pixel_format: str = ""
    value: float | None = None
    quantizer: str = ""
    rate: float | None = None
    frames: str = "ribbon"
    inter: bool = False
    calibrated: bool = False

    def record(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)

    @property
    def coding(self) -> Coding:
        """The codec's setting.

        Raises
        ------
        CodecError
            Something that the codec does not take.
        """
        row, mode = codec(self.method), self.mode or "lossless"
        return Coding(row, mode, self.value, self.preset, self.pixel_format, self.inter)

    @property
    def series(self) -> str:
        """Name of the curve that the point lies on.

        Examples
        --------
        >>> Setting("pack", "x265", "ultrafast", quantizer="pack", rate=0.18).series
        'weightvid'
        >>> Setting("lossy", "x264", "medium", "qp", "yuv420p", 20.0).series
        'x264 medium qp'
        """
        if self.kind in ("baseline", "original"):
            return self.method
        if self.kind == "pack":
            usual = self.method == DEFAULT_ENCODER
            parts = ["weightvid"] if usual else ["weightvid", self.method]
            parts += ["calibrated"] if self.calibrated else []
            parts += [self.mode] if self.value is not None or not usual else []
            parts += [self.quantizer] if self.quantizer not in (DEFAULT_QUANTIZER, "") else []
            parts += [self.preset] if self.preset != codec(self.method).preset else []
            parts += [self.pixel_format] if self.coding.bits > USUAL_BITS else []
            return " ".join(parts)
        parts = [self.coding.label]
        if self.frames != "ribbon" and not self.inter:
            parts.append("intra")
        if self.kind == "lossless" and self.quantizer != DEFAULT_QUANTIZER:
            parts.append(self.quantizer)
        return " ".join(parts)

    @property
    def label(self) -> str:
        """Short name of the point, unique in a comparison."""
        if self.rate is not None:
            return f"{self.series} k={self.rate:g}"
        return self.series if self.value is None else f"{self.series} {self.value:g}"

    def command(self, model: str, calibration: str | None = None) -> str:
        """What a shell runs to get this point again.

        Parameters
        ----------
        model : str
            Path of the checkpoint.
        calibration : str or None
            Path of the statistics.
        """
        quoted = shlex.quote(model)
        if self.kind == "pack":
            parts = ["weightvid pack", quoted]
            parts += [f"--codec {self.method}"] if self.method != DEFAULT_ENCODER else []
            if self.value is not None:
                parts.append(f"--{self.mode} {self.value:g}")
                bits = self.coding.bits
                parts += [f"--bit-depth {bits}"] if bits > USUAL_BITS else []
            else:
                parts.append(f"--step {self.rate:g}")
                parts += [f"--quantizer {self.quantizer}"] if self.quantizer != "pack" else []
            usual = codec(self.method).preset
            parts += [f"--preset {self.preset}"] if self.preset != usual else []
            if self.calibrated and calibration is not None:
                parts.append(f"--calibration {shlex.quote(calibration)}")
            parts += ["--no-side-files"] if Path(model).is_dir() else []
            return " ".join(parts)
        if self.kind == "original":
            return ""
        return f"weightvid compare {quoted} {self._selection()} --only {shlex.quote(self.label)}"

    def _selection(self) -> str:
        """Options of a comparison that has the point and little else."""
        none = {"codecs": "none", "quantizers": "none", "baselines": "none"}
        if self.kind == "baseline":
            chosen = {**none, "baselines": self.method}
        else:
            chosen = {**none, "codecs": self.method, "presets": self.preset}
            chosen |= {"formats": self.pixel_format}
            if self.kind == "lossless":
                chosen["rates"] = f"{self.rate:g}"
            elif self.mode in ("qp", "crf"):
                chosen[self.mode] = f"{self.value:g}"
        options = [f"--{name} {value}" for name, value in chosen.items() if value]
        return " ".join([*options, *(["--inter"] if self.frames == "like" else [])])


ORIGINAL: Final = Setting("original", "original")
