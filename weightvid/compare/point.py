"""Measures one point, in a process of its own: ``python -m weightvid.compare.point REQUEST``.

The request is a JSON file; the result goes to the file that it names. The process ends when its
standard input does, so that none is left behind by a comparison that was killed.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final, TypeVar

from weightvid.codec import program
from weightvid.compare.archive import ArchiveCoder
from weightvid.compare.baselines import BASELINES
from weightvid.compare.coded import Coded, Coder, Decoded
from weightvid.compare.judge import save_tensors
from weightvid.compare.meter import cores, metered
from weightvid.compare.model import Model, load_model
from weightvid.compare.settings import Setting
from weightvid.compare.video import VideoCoder
from weightvid.errors import CodecError, WeightvidError

_T = TypeVar("_T")
#: short work is measured again, and the median counts.
_SHORT_S: Final = 0.25
_REPEATS: Final = 3
#: exit status where the parent has gone.
_ORPHANED: Final = 3


@dataclass(frozen=True, slots=True)
class Request:
    """What to measure.

    Attributes
    ----------
    model : str
        Path of the checkpoint.
    model_sha256 : str
        What it must be.
    setting : dict
    result : str
        File for the result.
    program : str or None
        ffmpeg program, where the codec needs one.
    restored : str or None
        File for the restored tensors, where somebody will judge them.
    alone : bool
        Nothing runs beside it: all cores are measured too.
    calibration : str or None
        Path of the statistics that calibrated points are packed with.
    """

    model: str
    model_sha256: str
    setting: dict[str, Any]
    result: str
    program: str | None = None
    restored: str | None = None
    alone: bool = True
    calibration: str | None = None


@dataclass(frozen=True, slots=True)
class _Original:
    """The model itself."""

    model: Model
    scales: bool = False

    def encode(self, jobs: int) -> Coded:
        """Nothing is coded."""
        sizes = {"tensors": sum(spec.stored_bytes for spec in self.model.specs)}
        return Coded({}, sizes)

    def decode(self, coded: Coded, jobs: int) -> Decoded:
        """The tensors as they are."""
        return Decoded(self.model.tensors)


@dataclass(frozen=True, slots=True)
class _BaselineCoder:
    """A baseline at a value."""

    model: Model
    setting: Setting
    scales: bool = False

    def encode(self, jobs: int) -> Coded:
        return BASELINES[self.setting.method].encode(self.model, self.setting.value)

    def decode(self, coded: Coded, jobs: int) -> Decoded:
        return BASELINES[self.setting.method].decode(coded, self.model, self.setting.value)


def coder(model: Model, request: Request) -> Coder:
    """What codes a model as requested."""
    setting, ffmpeg = Setting(**request.setting), request.program
    if setting.kind == "original":
        return _Original(model)
    if setting.kind == "baseline":
        return _BaselineCoder(model, setting)
    if setting.kind == "pack":
        return ArchiveCoder(model, setting, ffmpeg, request.calibration)
    return VideoCoder(model, setting, None if ffmpeg is None else program.inspect(ffmpeg))


@dataclass(frozen=True, slots=True)
class _Timed:
    seconds: float
    codec_s: float | None
    peak_bytes: int | None
    result: Any


def _timed(work: Callable[[], Coded | Decoded]) -> _Timed:
    """Seconds of a single job: medians of a few where it is short; memory of the first."""
    first = metered(work)
    seconds = [first.result.seconds or first.seconds]
    codec = [first.result.codec_s]
    while seconds[0] < _SHORT_S and len(seconds) < _REPEATS:
        again = metered(work)
        seconds.append(again.result.seconds or again.seconds)
        codec.append(again.result.codec_s)
    peaks = [peak for peak in (first.peak_bytes, first.result.peak_bytes) if peak is not None]
    codecs = [each for each in codec if each is not None]
    return _Timed(
        median(seconds),
        median(codecs) if codecs else None,
        sum(peaks) if peaks else None,
        first.result,
    )


def measure(request: Request) -> dict[str, Any]:
    """Measure a point.

    Returns
    -------
    dict
        Fields of :class:`.row.Row`.

    Raises
    ------
    WeightvidError
        It failed, or did not round-trip.
    """
    setting, model = Setting(**request.setting), load_model(request.model)
    if model.sha256 != request.model_sha256:
        raise WeightvidError(f"{request.model} has changed since the comparison began")
    chosen = coder(model, request)
    encoding = _timed(lambda: chosen.encode(1))
    coded: Coded = encoding.result
    decoding = _timed(lambda: chosen.decode(coded, 1))
    restored = decoding.result.tensors
    quality = model.judge(restored)
    exact = quality.sha256 == model.judge(model.tensors).sha256
    if setting.kind == "baseline" and BASELINES[setting.method].exact and not exact:
        raise CodecError(f"{setting.method} is bit-exact, but other tensors came back")
    sizes = coded.items
    found: dict[str, Any] = {
        "file_bytes": sum(sizes.values()),
        "items": sizes,
        "bits_per_weight": 8 * sum(sizes.values()) / model.weights,
        "weights": model.weights,
        "exact": exact,
        "sqnr_db": quality.sqnr_db,
        "worst_sqnr_db": quality.worst_sqnr_db,
        "worst_tensor": quality.worst_tensor,
        "restored_sha256": quality.sha256,
        "about": dict(coded.about),
    }
    if setting.kind != "original":
        found |= {
            "encode_s": encoding.seconds,
            "decode_s": decoding.seconds,
            "codec_encode_s": encoding.codec_s,
            "codec_decode_s": decoding.codec_s,
            "encode_peak_bytes": encoding.peak_bytes,
            "decode_peak_bytes": decoding.peak_bytes,
        }
        if request.alone and chosen.scales and cores() > 1:
            found |= _all_cores(model, chosen, coded, quality.sha256)
    if request.restored is not None:
        save_tensors(Path(request.restored), {name: restored[name] for name in model.tensors})
    return found


def _all_cores(model: Model, chosen: Coder, coded: Coded, sha256: str) -> dict[str, Any]:
    """A job for each core; the result must be the same."""
    encoding = metered(lambda: chosen.encode(cores()))
    decoding = metered(lambda: chosen.decode(coded, cores()))
    if model.judge(decoding.result.tensors).sha256 != sha256:
        raise CodecError("decoding on all cores gave other tensors than on one")
    return {"encode_all_s": encoding.seconds, "decode_all_s": decoding.seconds}


def _watch() -> None:
    """End with the parent: its end of our standard input closes however it ends."""
    # Not by sys.stdin, whose lock would be held when the interpreter ends.
    while os.read(0, 1):
        pass
    os._exit(_ORPHANED)


def main(path: str) -> None:
    """Measure what a request file asks for."""
    threading.Thread(target=_watch, daemon=True).start()
    request = Request(**json.loads(Path(path).read_text(encoding="utf-8")))
    found: dict[str, Any]
    try:
        found = {"status": "ok", **measure(request)}
    except (WeightvidError, OSError, MemoryError) as error:
        message = str(error) or type(error).__name__
        found = {"status": "error", "message": message}
    text = json.dumps(found)
    Path(request.result).write_text(text, encoding="utf-8")
    sys.stdout.flush()
    # Threads of some libraries must not keep a finished point alive.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
