"""The points that a command asks for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from math import isfinite
from typing import Final

from weightvid.codec.encode import DEFAULT_ENCODER, Video
from weightvid.codec.registry import CODECS, X265_PRESET, suggestion
from weightvid.codec.tracks import TRACKS
from weightvid.compare.baselines import BASELINES
from weightvid.compare.settings import Setting
from weightvid.errors import CodecError, QuantizationError, WeightvidError
from weightvid.planning.named import DEFAULT_QUANTIZER, QUANTIZERS

#: factors of pack's step rule.
RATES: Final = (0.065, 0.12, 0.18, 0.33, 0.5)
#: of lossless x265 where none are asked for; they make the same archive but for 0.1 %.
PRESETS: Final = (X265_PRESET, "medium", "slow")
DEFAULT_CODECS: Final = ("x265", "x264", "svtav1")
DEFAULT_QUANTIZERS: Final = ("pack", "sqnr", "uniform", "trellis8")
_USUAL: Final = "yuv420p"
#: names that stand for all and for none of a list.
ALL: Final = "all"
NONE: Final = "none"


@dataclass(frozen=True, slots=True)
class Sweep:
    """What to vary.

    Attributes
    ----------
    codecs, presets, quantizers, baselines : tuple of str
        Names; ``all`` for every one, ``none`` for none. No presets: each codec's usual one, and
        three for pack.
    rates : tuple of float
        Factors of pack's step rule.
    qp, crf : tuple of float
        Instead of each codec's own values; CRF is measured only where it is given.
    formats : tuple of str
        Pixel formats, where a codec takes them; empty: each codec's usual one.
    inter : bool
        Every codec that predicts frames from others also with that, beside the same frames
        without.
    calibrated : bool
        Pack's own quantizer also with calibration statistics.
    """

    codecs: tuple[str, ...] = DEFAULT_CODECS
    presets: tuple[str, ...] = ()
    quantizers: tuple[str, ...] = DEFAULT_QUANTIZERS
    rates: tuple[float, ...] = RATES
    qp: tuple[float, ...] = ()
    crf: tuple[float, ...] = ()
    baselines: tuple[str, ...] = (ALL,)
    formats: tuple[str, ...] = ()
    inter: bool = False
    calibrated: bool = False

    def settings(self) -> list[Setting]:
        """Every point, each once.

        Raises
        ------
        WeightvidError
            An unknown name; the nearest one is suggested. A value out of range.
        """
        codecs = _known(self.codecs, tuple(CODECS), "codec")
        self._check(codecs)
        found = [*self._packs(codecs)]
        for name in codecs:
            found += self._codec(name)
        for name in _known(self.baselines, tuple(BASELINES), "baseline"):
            found += [Setting("baseline", name, value=v) for v in BASELINES[name].values]
        for setting in found:
            if setting.kind in ("lossless", "lossy"):
                setting.coding  # noqa: B018 - refuses what the codec does not take
        if not found:
            raise QuantizationError("nothing to compare: no codec, quantizer or baseline is left")
        return list(dict.fromkeys(found))

    def _check(self, codecs: Sequence[str]) -> None:
        for rate in self.rates:
            if not 0 < rate < float("inf"):
                raise QuantizationError(f"a rate is a positive step factor, not {rate:g}")
        every = tuple(dict.fromkeys(p for n in ("x265", *codecs) for p in CODECS[n].presets))
        for preset in self.presets:
            if preset not in every:
                raise CodecError(f"unknown preset {preset!r}{suggestion(preset, every)}")
        modes = [mode for name in codecs for mode in CODECS[name].modes.values()]
        formats = tuple(dict.fromkeys(f for mode in modes for f in mode.formats))
        for chosen in self.formats:
            if chosen not in formats:
                raise CodecError(f"unknown pixel format {chosen!r}{suggestion(chosen, formats)}")
        for mode_name, values in (("qp", self.qp), ("crf", self.crf)):
            limits = [CODECS[n].modes[mode_name].limits for n in codecs
                      if mode_name in CODECS[n].modes]  # fmt: skip
            for value in values:
                if not isfinite(value) or not any(low <= value <= high for low, high in limits):
                    raise CodecError(f"no codec of this comparison takes {mode_name} {value:g}")

    def _packs(self, codecs: Sequence[str]) -> Iterator[Setting]:
        """Pack's own quantizer at several presets, the others at the usual one."""
        x265 = CODECS["x265"].presets
        presets = tuple(p for p in self.presets if p in x265)
        if not presets:
            presets = PRESETS if "x265" in codecs and not self.presets else PRESETS[:1]
        names = _known(self.quantizers, tuple(QUANTIZERS), "quantizer")
        for name in names:
            for preset in presets if name == DEFAULT_QUANTIZER else presets[:1]:
                for rate in self.rates:
                    yield Setting(
                        "pack", "x265", preset, "lossless", _USUAL, None, name, rate
                    )  # fmt: skip
        if self.calibrated:
            for rate in self.rates:
                yield Setting(
                    "pack", "x265", presets[0], "lossless", _USUAL, None, DEFAULT_QUANTIZER, rate,
                    calibrated=True,
                )  # fmt: skip
        if DEFAULT_QUANTIZER in names:
            for name in codecs:
                yield from self._archives(name, presets[0])

    def _archives(self, name: str, x265_preset: str) -> Iterator[Setting]:
        """Archives by a codec, with pack's own quantizer and with lossy video."""
        row = CODECS[name]
        if not row.track:
            return
        usual = name == DEFAULT_ENCODER
        presets = [p for p in self.presets if p in row.presets] or [row.preset]
        for preset in [x265_preset] if usual else presets:
            if "lossless" in row.modes and not usual:
                shown = Video(name, preset).coding.pixel_format
                for rate in self.rates:
                    yield Setting(
                        "pack", name, preset, "lossless", shown, None, DEFAULT_QUANTIZER, rate
                    )
            for mode, values in (("qp", self.qp), ("crf", self.crf)):
                if mode in row.modes:
                    for shown in self._archive_formats(name, mode):
                        for value in self._values(name, mode, values):
                            yield Setting("pack", name, preset, mode, shown, value)

    def _archive_formats(self, name: str, mode: str) -> list[str]:
        """Pixel formats that are asked for and fit an archive, or the usual one."""
        row = CODECS[name]
        known = [f for fs in TRACKS[row.track].formats.values() for f in fs]
        fitting = [f for f in row.modes[mode].formats if f in known]
        return [f for f in self.formats if f in fitting] or fitting[:1]

    def _values(self, name: str, mode_name: str, chosen: Sequence[float]) -> Sequence[float]:
        """Values of a lossy mode: those asked for that the codec takes, or its own."""
        if mode_name == "crf" and not chosen:
            return ()
        mode = CODECS[name].modes[mode_name]
        low, high = mode.limits
        return [v for v in chosen if low <= v <= high] or mode.values

    def _codec(self, name: str) -> Iterator[Setting]:
        row = CODECS[name]
        for preset in [p for p in self.presets if p in row.presets] or [row.preset]:
            yield from self._modes(name, preset, "ribbon", inter=False)
            if self.inter and row.predicts:
                for inter in (False, True):
                    yield from self._modes(name, preset, "like", inter)

    def _modes(self, name: str, preset: str, frames: str, inter: bool) -> Iterator[Setting]:
        for mode_name, mode in CODECS[name].modes.items():
            formats = [f for f in self.formats if f in mode.formats] or [mode.formats[0]]
            for pixel_format in formats:
                if mode_name == "lossless":
                    for rate in self.rates:
                        yield Setting(
                            "lossless", name, preset, mode_name, pixel_format, None,
                            DEFAULT_QUANTIZER, rate, frames, inter,
                        )  # fmt: skip
                    continue
                chosen = {"qp": self.qp, "crf": self.crf}.get(mode_name, ())
                for value in self._values(name, mode_name, chosen):
                    yield Setting(
                        "lossy", name, preset, mode_name, pixel_format, value,
                        frames=frames, inter=inter,
                    )  # fmt: skip


def select(settings: Sequence[Setting], labels: Sequence[str]) -> list[Setting]:
    """The points of these labels, or curves of these names.

    Raises
    ------
    WeightvidError
        No such label; the nearest is suggested.
    """
    names = tuple(dict.fromkeys(n for s in settings for n in (s.label, s.series)))
    for label in labels:
        if label not in names:
            near = get_close_matches(label, names, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise WeightvidError(f"this comparison has no point {label!r}{hint}")
    return [s for s in settings if s.label in labels or s.series in labels]


def _known(names: Sequence[str], known: tuple[str, ...], what: str) -> tuple[str, ...]:
    """The names that are asked for, known to exist."""
    if ALL in names:
        return known
    for name in names:
        if name not in known and name != NONE:
            raise CodecError(f"unknown {what} {name!r}{suggestion(name, known)}")
    return tuple(dict.fromkeys(name for name in names if name in known))
