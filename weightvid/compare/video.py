"""weightvid's own archives, and other codecs on their frames.

A codec's file is the archive with its packets replaced: all else that a reader needs is counted as
it is there. Lossless codecs get the frames of default archives; lossy ones those of integers at a
small step, which they quantize further.
"""

import hashlib
import lzma
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import sqrt
from pathlib import Path
from time import perf_counter
from typing import Final

import numpy as np

from weightvid import loader
from weightvid.archives import walk_frames
from weightvid.atomic import ScratchFolder
from weightvid.compare.codecs import CODECS, FrameCodec, Passage, backend, refused_options, through
from weightvid.compare.model import Array, Coded, Method, Model, Tensors
from weightvid.errors import CodecError
from weightvid.loader import Assembler, Bytes, open_archive, to_float32
from weightvid.pack import PackOptions, PackReport, pack_checkpoint
from weightvid.version import code_sha256

#: of the frames that lossy codecs get: integers reach about 7 sigmas of an average tensor.
_LOSSY_FACTOR: Final = 0.055


def archive_method(
    name: str,
    options: PackOptions,
    factors: Sequence[float] = (),
    folder: Path | None = None,
    command: Sequence[str] = (),
) -> Method:
    """Archives of some step factors; of none: one point, at the recipe's own.

    Archives stay in a folder, if there is one; ``command`` are further options of ``pack``.
    """
    calibration = options.calibration
    settings = {
        "recipe": options.recipe, "fidelity": options.fidelity, "codec": options.video.codec,
        "preset": options.video.preset, "jobs": options.jobs,
        "calibration": None if calibration is None else str(calibration),
    }  # fmt: skip

    def code(model: Model, factor: float) -> Coded:
        """Pack a model as ``weightvid pack`` does, and load it as programs do."""
        chosen = replace(options, step_factor=factor or None)
        with ScratchFolder() as scratch:
            path = place(folder or Path(scratch), model, chosen)
            began = perf_counter()
            made = pack_to(path, model, chosen)
            packed = perf_counter()
            tensors = load(path, model)
            details = {"frames": made.frames, "packet_bytes": made.packet_bytes}
            return Coded(made.file_bytes, tensors, packed - began, perf_counter() - packed, details)

    def restore(model: Model, factor: float) -> Tensors:
        path = place(folder or Path(), model, replace(options, step_factor=factor or None))
        return load(path, model) if path.exists() else dict(code(model, factor).tensors)

    return Method(
        name, "weightvid", code, "step factor" if factors else "", tuple(factors) or (0.0,),
        settings=settings, command=("pack", *command), restore=restore if folder else None,
    )  # fmt: skip


def place(folder: Path, model: Model, options: PackOptions) -> Path:
    """Where the archive of these options lies in a folder."""
    parts = (
        model.sha256, code_sha256(leave=("cli", "compare")), options.recipe, options.step_factor,
        options.fidelity, str(options.calibration), options.video,
    )  # fmt: skip
    return folder / f"{hashlib.sha256(repr(parts).encode()).hexdigest()[:24]}.mp4"


def load(path: Path, model: Model) -> Tensors:
    """Tensors of an archive as programs get them."""
    with open_archive(path, check_tensors=True) as archive:
        return {name: array for name, array in archive.items() if name in model.tensors}


def pack_to(path: Path, model: Model, options: PackOptions) -> PackReport:
    """Pack a model without the files next to it, which no other method stores."""
    chosen = replace(options, side_files=False, verify=False, force=True)
    return pack_checkpoint(model.reader, path, chosen)


@dataclass(frozen=True, slots=True, eq=False)
class Pictures:
    """Frames of an archive, and what else is in it.

    ``lumas`` are of shape (height, width); ``kept`` are the tensors that are not in the frames, and
    ``other_bytes`` those of the file without its packets and parameter sets.
    """

    header: loader.Header
    sidecars: tuple[loader.Sidecar, ...]
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
        """Of all levels by an ideal coder: a code for each part and energy class, and its tables.

        A table of n levels takes half of log2(n) bits a symbol (Rissanen).
        """
        bits = 0.0

        def count(part: loader.Part, levels: Array) -> None:
            nonlocal bits
            classes = np.zeros(levels.shape, np.intp)
            if part.energies is not None:
                classes += part.energies[0][:, None]
                classes += loader.column_energies(part)
            places = 256 * classes + levels.astype(np.int16) + loader.ZERO_SAMPLE
            counts = np.bincount(places.reshape(-1), minlength=256 * (int(classes.max()) + 1))
            found = counts.reshape(-1, 256)[counts.reshape(-1, 256).any(axis=1)].astype(np.float64)
            sizes = found.sum(axis=1, keepdims=True)
            bits -= float((found * np.log2(np.maximum(found, 1) / sizes)).sum())
            bits += float(((found > 0).sum(axis=1) * np.log2(sizes[:, 0])).sum()) / 2

        assembler = Assembler(self.header, sink=count)
        for sidecar, luma in zip(self.sidecars, self.lumas, strict=True):
            all(assembler.add(sidecar, luma))  # a sink takes the levels, and no tensor is given
        return round(bits / 8)


def frame_methods(
    names: Sequence[str],
    presets: Sequence[str],
    more: Sequence[str],
    factors: tuple[float, ...],
    folder: Path,
) -> Iterator[Method]:
    """Codecs on the same frames, lossless and lossy, and an ideal entropy coder of the levels.

    ``names`` are of `weightvid.compare.codecs.CODECS`; a codec without any of the ``presets`` has
    its usual one. ``more`` are options of a codec, ``x265:rd=6``: curves of their own. ``factors``
    are those of the frames for lossless codecs. The archives that several points take their frames
    from lie in ``folder``. An unknown name, or an option that is none, is a CodecError.
    """
    yield Method(
        "ideal entropy coder", "plain", partial(_ideal, folder), "step factor", factors,
        restore=partial(_lossless_again, folder), command=("compare", "--codecs", "none"),
    )  # fmt: skip
    wanted = (*((name, "") for name in names), *map(_parse_option, more))
    for name, _ in wanted:
        if name not in CODECS:
            raise CodecError(f"unknown codec {name!r}; choose: {', '.join(CODECS)}")
    known = {preset for name, _ in wanted for preset in CODECS[name].presets}
    if unknown := sorted(set(presets) - known):
        raise CodecError(
            f"no codec here has a preset {unknown[0]!r}; known: {', '.join(sorted(known))}"
        )
    for name, extra in wanted:
        codec = CODECS[name]
        lacking = f"neither PyAV nor an ffmpeg program has {codec.encoder}"
        missing = "" if backend(codec) else lacking
        chosen = [p for p in presets if p in codec.presets] or [codec.preset]
        codec = codec.with_options(extra) if extra else codec
        if extra and not missing and (said := refused_options(codec)):
            raise CodecError(f"{name} does not take {extra}: {said}")
        for preset in chosen:
            curve = " ".join(filter(None, (name, preset, extra)))
            command = ["compare", "--codecs", "none" if extra else name]
            command += ["--presets", preset] if preset else []
            command += ["--codec-option", f"{name}:{extra}"] if extra else []
            settings = {
                "encoder": codec.encoder, "preset": preset, "pixel_format": codec.pixel_format,
                "program": backend(codec),
            }  # fmt: skip
            if codec.lossless is not None:
                code = partial(_lossless, folder, codec, preset)
                yield Method(
                    curve, "codec", code, "step factor", factors, missing,
                    {**settings, **codec.options(preset, None)},
                    restore=partial(_lossless_again, folder), command=tuple(command),
                )  # fmt: skip
            if codec.lossy is not None:
                code = partial(_lossy, folder, codec, preset)
                yield Method(
                    f"{curve} lossy", "codec", code, "QP", codec.values, missing,
                    {**settings, **codec.options(preset, codec.values[0])}, command=tuple(command),
                )  # fmt: skip


def _parse_option(text: str) -> tuple[str, str]:
    name, _, option = text.partition(":")
    if not all(key and equals for key, equals, _ in (p.partition("=") for p in option.split(":"))):
        raise CodecError(f"{text!r} is no option of a codec such as x265:rd=6")
    return name, option


def pictures(folder: Path, model: Model, factor: float, fidelity: str) -> Pictures:
    """Frames of the archive of a step factor, which is packed into a folder once.

    A model that is too small for frames is a CodecError.
    """
    options = PackOptions(step_factor=factor, fidelity=fidelity)
    path = place(folder, model, options)
    if not path.exists():
        pack_to(path, model, options)
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
        video = len(archive.track.record) + sum(size for _, size in walk_frames(archive))
        return Pictures(archive.header, sidecars, lumas, kept, path.stat().st_size - video)


def _lossless(folder: Path, codec: FrameCodec, preset: str, model: Model, factor: float) -> Coded:
    shown = pictures(folder, model, factor, "outputs")
    passage = through(shown.lumas, codec, preset)
    if not all(np.array_equal(a, b) for a, b in zip(shown.lumas, passage.lumas, strict=True)):
        raise CodecError(f"{codec.encoder} is not lossless: other samples came back")
    return _coded(shown, passage)


def _lossless_again(folder: Path, model: Model, factor: float) -> Tensors:
    shown = pictures(folder, model, factor, "outputs")
    return shown.restore(shown.lumas)


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


#: longest block that is rotated, and width and greatest height of the pictures.
_ROTATED, _PICTURE_WIDTH, _PICTURE_HEIGHT = 256, 512, 1024


def llm265_method() -> Method:
    """Matrices turned by Hadamard blocks, 8 bits by their largest magnitude, coded intra, lossy.

    Source: the recipe of "LLM.265" (video codecs as codecs of tensors), as far as it is told.
    """
    codec = CODECS["x265"]
    missing = "" if backend(codec) else f"neither PyAV nor an ffmpeg program has {codec.encoder}"
    return Method(
        "LLM.265 (Hadamard, lossy intra)", "peer", _llm265, "QP", codec.values, missing,
        {"preset": "medium", **codec.options("medium", codec.values[0])},
        ("compare/video", "compare/codecs"),
    )  # fmt: skip


def _llm265(model: Model, qp: float) -> Coded:
    began, matrices = perf_counter(), model.matrices()
    turned = {name: _rotate(tensor.astype(np.float32)) for name, tensor in matrices.items()}
    scales = {n: max(float(np.abs(x).max()), 1e-30) / 127 for n, x in turned.items()}
    samples = [np.rint(x / scales[n]).reshape(-1) + 128 for n, x in turned.items()]
    flat = np.concatenate([np.zeros(0), *samples]).astype(np.uint8)
    if not flat.size:
        raise CodecError("the model has no matrices")
    rows = -(-flat.size // _PICTURE_WIDTH)
    count = -(-rows // _PICTURE_HEIGHT)
    height = -(-rows // (count * 64)) * 64
    shown = np.full((count, height, _PICTURE_WIDTH), 128, np.uint8)
    shown.reshape(-1)[: flat.size] = flat
    passage = through(list(shown), CODECS["x265"], "medium", qp)
    kept = b"".join(t.tobytes() for n, t in model.tensors.items() if n not in matrices)
    other = len(lzma.compress(kept)) + 4 * len(scales)
    coded = perf_counter()
    levels, at = np.stack(passage.lumas).reshape(-1).astype(np.float32) - 128, 0
    restored = dict(model.tensors)
    for name, tensor in matrices.items():
        values = levels[at : at + tensor.size].reshape(tensor.shape) * np.float32(scales[name])
        restored[name], at = _rotate(values).astype(tensor.dtype), at + tensor.size
    return Coded(passage.size + other, restored, coded - began, perf_counter() - coded)


def _rotate(values: Array) -> Array:
    """Blocks of the elements by an orthonormal Hadamard matrix, which is its own inverse."""
    size = min(values.size & -values.size, _ROTATED)
    turn = np.ones((1, 1), np.float32)
    while len(turn) < size:
        turn = np.block([[turn, turn], [turn, -turn]])
    turned: Array = values.reshape(-1, size) @ (turn / np.float32(sqrt(size)))
    return turned.reshape(values.shape)
