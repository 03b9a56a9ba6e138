"""Any codec of the registry on a whole model: everything that restores it, itemised."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from weightvid import tile
from weightvid.codec.pictures import Luma, Stream
from weightvid.codec.program import Program
from weightvid.compare import frames, prepare
from weightvid.compare.coded import Array, Coded, Decoded, Parts, Tensors
from weightvid.compare.frames import Reel
from weightvid.compare.model import Model
from weightvid.compare.prepare import Prepared
from weightvid.compare.settings import Setting
from weightvid.compare.streams import Streams, Tool
from weightvid.container.exact import parse_exact
from weightvid.dtypes import from_float32, stored_dtype, to_float32
from weightvid.errors import CodecError
from weightvid.quantize import dequantize
from weightvid.quantize.params import params_from_dict
from weightvid.spec import TensorSpec

Samples = npt.NDArray[Any]
_LENGTH: Final = 4


@dataclass(frozen=True, slots=True)
class VideoCoder:
    """Codes a model by a codec of the registry.

    Its file has these parts: ``header`` (names, types, shapes, quantizers, sizes of the packets),
    ``extradata``, ``packets``, ``outliers`` and ``exact`` (tensors that are not shown).

    Attributes
    ----------
    model : Model
    setting : Setting
        Of the kind ``lossless`` or ``lossy``.
    program : Program or None
        The ffmpeg program, if the codec needs it.
    """

    model: Model
    setting: Setting
    program: Program | None = None

    @property
    def scales(self) -> bool:
        """More jobs code more pieces of the reel."""
        return not self.setting.inter

    def encode(self, jobs: int) -> Coded:
        """Quantize, lay out, code.

        Raises
        ------
        WeightvidError
        """
        setting, coding = self.setting, self.setting.coding
        if setting.kind == "lossless":
            made = prepare.levels(self.model, setting, jobs)
        else:
            made = prepare.samples(self.model, setting, jobs)
        reels = _reels(made.specs, made.numbers, setting.frames)
        pictures = frames.lay(made.planes, reels, coding.pixel_format)
        coded = Tool(coding, self.program).encode(pictures, jobs)
        about = {
            "frames": sum(reel.frames for reel in reels),
            "width": max((reel.geometry.width for reel in reels), default=0),
            "height": max((reel.geometry.height for reel in reels), default=0),
            "pictures_sha256": _digest(pictures) if setting.kind == "lossless" else None,
        }
        parts = self._parts(made, coded)
        return Coded(parts, codec_s=coded.seconds, peak_bytes=coded.peak_bytes, about=about)

    def _parts(self, made: Prepared, coded: Streams) -> Parts:
        every = [stream for reel in coded.streams for stream in reel]
        record = {
            "tensors": [[spec.name, spec.dtype, list(spec.shape)] for spec in made.specs],
            "aliases": dict(self.model.aliases),
            "shown": [
                [number, len(outliers[0]), quantizer]
                for number, outliers, quantizer in zip(
                    made.numbers, made.outliers, made.quantizers, strict=True
                )
            ],
            "reels": [
                [[len(s.extradata), [len(packet) for packet in s.packets]] for s in reel]
                for reel in coded.streams
            ],
        }
        text = json.dumps(record, separators=(",", ":")).encode()
        return {
            "header": zlib.compress(text, 9),
            "extradata": b"".join(stream.extradata for stream in every),
            "packets": b"".join(packet for stream in every for packet in stream.packets),
            "outliers": _deflate_outliers(made),
            "exact": b"".join(len(box).to_bytes(_LENGTH, "big") + box for box in made.exact),
        }

    def decode(self, coded: Coded, jobs: int) -> Decoded:
        """Restore the model from the parts alone.

        Raises
        ------
        CodecError
            The pictures are not those that were coded, though the codec is lossless.
        """
        coding, parts = self.setting.coding, coded.parts
        record = json.loads(zlib.decompress(parts["header"]))
        specs = tuple(TensorSpec(n, d, tuple(shape)) for n, d, shape in record["tensors"])
        numbers = [number for number, _, _ in record["shown"]]
        reels = _reels(specs, numbers, self.setting.frames)
        sizes = [(reel.geometry.height, reel.geometry.width) for reel in reels]
        streams = _streams(parts, record["reels"])
        shown = Tool(coding, self.program).decode(streams, sizes, jobs)
        promised = coded.about.get("pictures_sha256")
        if promised is not None and promised != _digest(shown.pictures):
            raise CodecError(f"{coding.codec.encoder} is not lossless: other pictures came back")
        shapes = [tile.matrix_shape(specs[number].shape) for number in numbers]
        planes = frames.lift(shown.pictures, shapes, reels, coding.pixel_format)
        tensors = _exact(parts["exact"], specs)
        outliers = _inflate_outliers(parts["outliers"], [n for _, n, _ in record["shown"]])
        for plane, places, (number, _, quantizer) in zip(
            planes, outliers, record["shown"], strict=True
        ):
            spec = specs[number]
            restore = _levels if self.setting.kind == "lossless" else _samples
            stored = from_float32(restore(plane, places, quantizer), spec.dtype)
            tensors[spec.name] = _natural(stored.reshape(spec.shape), spec)
        return Decoded(tensors, codec_s=shown.seconds, peak_bytes=shown.peak_bytes)


def _reels(specs: Sequence[TensorSpec], numbers: Sequence[int], how: str) -> list[Reel]:
    shapes = [tile.matrix_shape(specs[number].shape) for number in numbers]
    if how == "ribbon":
        return frames.ribbon(shapes)
    return frames.like(shapes, [specs[number].name for number in numbers])


def _digest(pictures: Sequence[Sequence[Luma]]) -> str:
    digest = hashlib.sha256()
    for reel in pictures:
        for luma in reel:
            digest.update(np.ascontiguousarray(luma).data)
    return digest.hexdigest()


def _streams(parts: Parts, reels: Any) -> list[list[Stream]]:
    packets, extradata = 0, 0
    found: list[list[Stream]] = []
    for reel in reels:
        streams = []
        for extra, sizes in reel:
            taken = []
            for size in sizes:
                taken.append(parts["packets"][packets : packets + size])
                packets += size
            head = parts["extradata"][extradata : extradata + extra]
            streams.append(Stream(tuple(taken), head))
            extradata += extra
        found.append(streams)
    return found


def _deflate_outliers(made: Prepared) -> bytes:
    """Distances between the places, then what stands there; nothing where there are none."""
    if not any(len(index) for index, _ in made.outliers):
        return b""
    gaps = [np.diff(index, prepend=0).astype("<u4").tobytes() for index, _ in made.outliers]
    values = [value.astype(_value_type(value)).tobytes() for _, value in made.outliers]
    return zlib.compress(b"".join(gaps + values), 9)


def _value_type(value: Samples) -> str:
    return "<f4" if value.dtype.kind == "f" else "<i4"


def _inflate_outliers(
    data: bytes, counts: Sequence[int]
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.uint32]]]:
    """Places and raw values of each tensor."""
    words = np.frombuffer(zlib.decompress(data) if data else b"", "<u4")
    at, half = 0, sum(counts)
    for count in counts:
        gaps = words[at : at + count].astype(np.int64)
        yield np.cumsum(gaps), words[half + at : half + at + count]
        at += count


def _levels(plane: Samples, places: Any, quantizer: Any) -> npt.NDArray[np.float32]:
    """Weights of pack's levels."""
    index, raw = places
    wide = plane.astype(np.int32)
    wide.reshape(-1)[index] = raw.view("<i4")
    return dequantize(wide, params_from_dict(quantizer))


def _samples(plane: Samples, places: Any, quantizer: Any) -> npt.NDArray[np.float32]:
    """Weights of samples that a lossy codec gave back."""
    index, raw = places
    weights = plane.astype(np.float32) * np.float32(float.fromhex(quantizer["step"]))
    weights.reshape(-1)[index] = raw.view("<f4")
    return weights


def _exact(data: bytes, specs: tuple[TensorSpec, ...]) -> Tensors:
    """Tensors of the boxes."""
    parts: dict[int, list[tuple[int, Array]]] = {}
    at = 0
    while at < len(data):
        size = int.from_bytes(data[at : at + _LENGTH], "big")
        for item in parse_exact(data[at + _LENGTH : at + _LENGTH + size], specs):
            parts.setdefault(item.tensor, []).append((item.first, item.data))
        at += _LENGTH + size
    found: Tensors = {}
    for number, pieces in parts.items():
        spec = specs[number]
        whole = np.concatenate([piece for _, piece in sorted(pieces, key=lambda p: p[0])])
        stored = whole.view(stored_dtype(spec.dtype)).reshape(spec.shape)
        found[spec.name] = _natural(stored, spec)
    return found


def _natural(stored: Array, spec: TensorSpec) -> Array:
    """As the loader gives it: BF16 as float32."""
    return to_float32(stored, "BF16") if spec.dtype == "BF16" else stored
