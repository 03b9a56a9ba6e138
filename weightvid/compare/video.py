"""weightvid's own archives, and other codecs on their frames.

A codec's file is the archive with its packets replaced: all else that a reader needs is counted as
it is there. Lossless codecs get the frames of default archives; lossy ones those of integers at a
small step, which they quantize further.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Final

import numpy as np

from weightvid.archives import walk_frames
from weightvid.compare.codecs import CODECS, FrameCodec, Passage, backend, through
from weightvid.compare.model import Array, Coded, Method, Model, Tensors
from weightvid.errors import CodecError
from weightvid.levels.trellis import entropy_bits
from weightvid.loader import Assembler, Bytes, Header, Sidecar, open_archive, to_float32
from weightvid.pack import PackOptions, PackReport, pack_checkpoint

#: of the frames that lossy codecs get: integers reach about 7 sigmas of an average tensor.
_LOSSY_FACTOR: Final = 0.055


def archive_method(name: str, options: PackOptions, factors: Sequence[float] = ()) -> Method:
    """Archives of some step factors; of none: one point, at the recipe's own."""
    calibration = options.calibration
    settings = {
        "recipe": options.recipe, "fidelity": options.fidelity, "codec": options.video.codec,
        "preset": options.video.preset, "jobs": options.jobs,
        "calibration": None if calibration is None else str(calibration),
    }  # fmt: skip

    def code(model: Model, factor: float) -> Coded:
        return pack_and_load(model, replace(options, step_factor=factor or None))

    if not factors:
        return Method(name, "weightvid", code, settings=settings)
    return Method(name, "weightvid", code, "step factor", tuple(factors), settings=settings)


def pack_and_load(model: Model, options: PackOptions) -> Coded:
    """Pack a model as ``weightvid pack`` does, and load it as programs do."""
    with tempfile.TemporaryDirectory(prefix="weightvid-") as folder:
        path = Path(folder) / "model.mp4"
        began = perf_counter()
        made = pack_to(path, model, options)
        packed = perf_counter()
        with open_archive(path, check_tensors=True) as archive:
            tensors = {name: array for name, array in archive.items() if name in model.tensors}
        details = {"frames": made.frames, "packet_bytes": made.packet_bytes}
        return Coded(made.file_bytes, tensors, packed - began, perf_counter() - packed, details)


def pack_to(path: Path, model: Model, options: PackOptions) -> PackReport:
    """Pack a model without the files next to it, which no other method stores."""
    return pack_checkpoint(model.reader, path, replace(options, side_files=False, verify=False))


@dataclass(frozen=True, slots=True, eq=False)
class Pictures:
    """Frames of an archive, and what else is in it.

    Attributes
    ----------
    header : Header
    sidecars : tuple of Sidecar
    lumas : tuple of ndarray of uint8, shape (height, width)
    kept : dict of str to ndarray
        Tensors that are not in the frames.
    other_bytes : int
        Of the file without its packets and parameter sets.
    """

    header: Header
    sidecars: tuple[Sidecar, ...]
    lumas: tuple[Bytes, ...]
    kept: Tensors
    other_bytes: int

    def restore(self, lumas: Sequence[Bytes]) -> Tensors:
        """Tensors of the model, from these frames instead."""
        found, assembler = dict(self.kept), Assembler(self.header)
        for sidecar, luma in zip(self.sidecars, lumas, strict=True):
            for number, stored in assembler.add(sidecar, luma):
                name, dtype, _ = self.header.tensors[number]
                found[name] = to_float32(stored, dtype) if dtype == "BF16" else stored
        return found

    def entropy_bytes(self) -> int:
        """Of all levels by an ideal coder that knows how often each occurs in its part."""
        found: list[Array] = []
        assembler = Assembler(self.header, sink=lambda _, levels: found.append(levels))
        for sidecar, luma in zip(self.sidecars, self.lumas, strict=True):
            all(assembler.add(sidecar, luma))  # a sink takes the levels, and no tensor is given
        return round(sum(levels.size * entropy_bits(levels) for levels in found) / 8)


def frame_methods(
    names: Sequence[str], presets: Sequence[str], factors: Sequence[float], folder: Path
) -> Iterator[Method]:
    """Codecs on the same frames, lossless and lossy, and an ideal entropy coder of the levels.

    Parameters
    ----------
    names, presets : sequence of str
        Of `weightvid.compare.codecs.CODECS`; a codec without any of the presets has its usual one.
    factors : sequence of float
        Step factors of the frames for lossless codecs.
    folder : path
        For archives that several points take their frames from.

    Raises
    ------
    CodecError
        Unknown name.
    """
    yield Method(
        "ideal entropy coder", "plain", partial(_ideal, folder), "step factor", tuple(factors)
    )
    for name in names:
        codec = CODECS.get(name)
        if codec is None:
            raise CodecError(f"unknown codec {name!r}; choose: {', '.join(CODECS)}")
        missing = ""
        if backend(codec) is None:
            missing = f"neither PyAV nor an ffmpeg program has {codec.encoder}"
        chosen = [preset for preset in presets if preset in codec.presets] or [codec.preset]
        for preset in chosen:
            curve = f"{name} {preset}".strip()
            settings = {
                "encoder": codec.encoder, "preset": preset, "pixel_format": codec.pixel_format,
                "program": backend(codec),
            }  # fmt: skip
            if codec.lossless is not None:
                code = partial(_lossless, folder, codec, preset)
                yield Method(
                    curve, "codec", code, "step factor", tuple(factors), missing,
                    {**settings, **codec.options(preset, None)},
                )  # fmt: skip
            if codec.lossy is not None:
                code = partial(_lossy, folder, codec, preset)
                yield Method(f"{curve} lossy", "codec", code, "QP", codec.values, missing, settings)


def pictures(folder: Path, model: Model, factor: float, fidelity: str) -> Pictures:
    """Frames of the archive of a step factor, which is packed into a folder once.

    Raises
    ------
    CodecError
        The model is too small for frames.
    """
    path = folder / f"{fidelity}-{factor:g}.mp4"
    if not path.exists():
        pack_to(path, model, PackOptions(step_factor=factor, fidelity=fidelity))
    with path.open("rb") as file:
        archive = open_archive(file)
        if archive.index is None or not archive.index.frames:
            raise CodecError("the archive has no frames: the model is too small")
        frames = archive.frames(range(len(archive.index.frames)))
        sidecars, lumas = zip(*((s, np.array(luma)) for s, luma in frames), strict=True)
        kept = {
            spec.name: archive[spec.name]
            for number, spec in enumerate(archive.header.tensors)
            if number not in archive.index.spans
        }
        video = len(archive.track.record) + sum(f.packet_bytes for f in walk_frames(archive))
        return Pictures(archive.header, sidecars, lumas, kept, path.stat().st_size - video)


def _lossless(folder: Path, codec: FrameCodec, preset: str, model: Model, factor: float) -> Coded:
    shown = pictures(folder, model, factor, "outputs")
    passage = through(shown.lumas, codec, preset)
    if not all(np.array_equal(a, b) for a, b in zip(shown.lumas, passage.lumas, strict=True)):
        raise CodecError(f"{codec.encoder} is not lossless: other samples came back")
    return _coded(shown, passage)


def _lossy(folder: Path, codec: FrameCodec, preset: str, model: Model, qp: float) -> Coded:
    shown = pictures(folder, model, _LOSSY_FACTOR, "integers")
    return _coded(shown, through(shown.lumas, codec, preset, qp))


def _coded(shown: Pictures, passage: Passage) -> Coded:
    size, tensors = shown.other_bytes + passage.size, shown.restore(passage.lumas)
    details = {"frames": len(passage.lumas), "packet_bytes": passage.size}
    return Coded(size, tensors, passage.encode_s, passage.decode_s, details)


def _ideal(folder: Path, model: Model, factor: float) -> Coded:
    shown = pictures(folder, model, factor, "outputs")
    size = shown.other_bytes + shown.entropy_bytes()
    return Coded(size, shown.restore(shown.lumas), 0.0, 0.0)
