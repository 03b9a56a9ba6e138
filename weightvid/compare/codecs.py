"""Video and image codecs on gray frames: by PyAV where it has the encoder, or by an ffmpeg program.

Every frame is coded alone. 4:2:0 codecs get chroma of the middle value.
"""

from __future__ import annotations

import io
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from importlib.util import find_spec
from time import perf_counter
from types import MappingProxyType
from typing import Any, Final, NamedTuple, cast

import av
import numpy as np
from av.video.frame import PictureType

from weightvid.errors import CodecError
from weightvid.loader import Array, Bytes
from weightvid.video.encoder import usual_priority

#: some encoders demand an ordinary frame rate; nothing depends on it.
_RATE: Final = 25


@dataclass(frozen=True, slots=True)
class FrameCodec:
    """A codec and its options, as FFmpeg takes them.

    ``name`` is ours, ``encoder`` FFmpeg's. Options in ``common`` are always set (``{preset}``
    stands for the preset), those in ``lossless`` and ``lossy`` in these modes (``{value}`` stands
    for the QP); values of one key are joined by ``joiner``. ``values`` are the QPs of a curve.
    ``presets`` go from fast to slow, none where there is nothing to choose; ``preset`` is the usual
    one. ``pixel_format`` is ``yuv420p``, ``yuv420p10le`` or ``gray``; ``muxer`` is what an ffmpeg
    program writes to a pipe.
    """

    name: str
    encoder: str
    common: Mapping[str, str]
    lossless: Mapping[str, str] | None = field(default_factory=dict)
    lossy: Mapping[str, str] | None = None
    values: tuple[float, ...] = ()
    presets: tuple[str, ...] = ()
    preset: str = ""
    pixel_format: str = "gray"
    muxer: str = "nut"
    joiner: str = ":"

    def options(self, preset: str, value: float | None) -> dict[str, str]:
        """Options of a preset at a QP; None: lossless."""
        mode, found = (self.lossless if value is None else self.lossy) or {}, dict[str, str]()
        for part in (self.common, mode):
            for key, text in part.items():
                filled = text.replace("{preset}", preset).replace("{value}", f"{value or 0:g}")
                found[key] = f"{found[key]}{self.joiner}{filled}" if key in found else filled
        return found

    def with_options(self, text: str) -> FrameCodec:
        """The codec with more options, ``key=value:key=value``, of its encoder or of FFmpeg."""
        common = dict(self.common)
        library = next((key for key in common if key.endswith("-params")), None)
        if library is not None:
            common[library] += self.joiner + text.replace(":", self.joiner)
        else:
            common |= dict(pair.split("=", 1) for pair in text.split(":"))
        return replace(self, common=common)


_X26X: Final = tuple("ultrafast superfast veryfast faster fast medium slow slower".split())
_SPEEDS: Final = tuple(map(str, range(12, -1, -1)))
_QPS: Final = (8, 14, 20, 26, 32)
_AV1_QPS: Final = (5, 13, 22, 32, 43)
_CRF: Final = {"crf": "{value}", "qmin": "{value}", "qmax": "{value}"}
#: a codec's own decisions about what an eye would miss are of no use to weights.
_X265_LOSSY: Final = "aq-mode=0:cutree=0:psy-rd=0:psy-rdoq=0:rdoq-level=2:ipratio=1:qp={value}"
_X265: Final = (
    "info=0:log-level=none:pools=none:wpp=0:frame-threads=1:bframes=0:no-sao=1:keyint=2:"
    "min-keyint=1:open-gop=0:scenecut=0:rc-lookahead=0"
)

_ROWS: Final = (
    FrameCodec("x265", "libx265",
               {"x265-params": _X265, "forced-idr": "1", "preset": "{preset}"},
               {"x265-params": "lossless=1"}, {"x265-params": _X265_LOSSY},
               _QPS, _X26X, "superfast", "yuv420p"),
    FrameCodec("x264", "libx264",
               {"bf": "0", "x264-params": "ipratio=1", "aq-mode": "0", "psy": "0",
                "preset": "{preset}"},
               {"qp": "0"}, {"qp": "{value}"}, _QPS, _X26X, "medium", "yuv420p"),
    FrameCodec("svt-av1", "libsvtav1",
               {"svtav1-params": "pred-struct=1:lp=1", "preset": "{preset}"},
               {"svtav1-params": "lossless=1"}, {"svtav1-params": "rc=0:aq-mode=0:qp={value}"},
               _AV1_QPS, _SPEEDS, "8", "yuv420p"),
    FrameCodec("vp9", "libvpx-vp9",
               {"auto-alt-ref": "0", "lag-in-frames": "0", "deadline": "good",
                "cpu-used": "{preset}"},
               {"lossless": "1"}, _CRF | {"b": "0"}, _AV1_QPS, _SPEEDS, "4", "yuv420p"),
    FrameCodec("aom", "libaom-av1",
               {"b:v": "0", "lag-in-frames": "0", "g": "1", "cpu-used": "{preset}"},
               {"aom-params": "lossless=1", "crf": "0"},
               _CRF | {"aom-params": "aq-mode=0:deltaq-mode=0"},
               _AV1_QPS, _SPEEDS, "6", "yuv420p"),
    FrameCodec("rav1e", "librav1e",
               {"rav1e-params": "low_latency=true", "g": "1", "speed": "{preset}"},
               None, {"qp": "{value}"}, (10, 40, 80, 120, 160), _SPEEDS, "8", "yuv420p"),
    FrameCodec("vvenc", "libvvenc", {"g": "1", "preset": "{preset}"},
               None, {"qp": "{value}", "qpa": "0"}, _QPS,
               ("faster", "fast", "medium", "slow", "slower"), "faster", "yuv420p10le", "vvc"),
    FrameCodec("kvazaar", "libkvazaar",
               {"kvazaar-params": "preset={preset},threads=0,owf=0,wpp=0,info=0,gop=0,period=1"},
               {"kvazaar-params": "lossless=1"}, {"kvazaar-params": "qp={value},intra-qp-offset=0"},
               _QPS, _X26X, "ultrafast", "yuv420p", joiner=","),
    FrameCodec("ffv1", "ffv1", {"level": "3", "coder": "range_def", "context": "1"}),
    FrameCodec("jpeg2000", "jpeg2000", {"pred": "dwt53", "format": "j2k"}),
    FrameCodec("png", "png", {"pred": "mixed"}),
)  # fmt: skip

#: every codec, by name.
CODECS: Final[Mapping[str, FrameCodec]] = MappingProxyType({row.name: row for row in _ROWS})


@lru_cache
def programs() -> dict[str, frozenset[str]]:
    """Ffmpeg programs of this machine with their video encoders: the system's, imageio-ffmpeg's."""
    paths = [shutil.which("ffmpeg")]
    if find_spec("ffmpeg") is None:  # what commands are made by
        return {}
    if find_spec("imageio_ffmpeg") is not None:
        import imageio_ffmpeg

        with suppress(RuntimeError):  # the wheels of some platforms bring no program
            paths.append(str(imageio_ffmpeg.get_ffmpeg_exe()))
    found = {}
    for path in filter(None, paths):
        with suppress(OSError, subprocess.SubprocessError):
            done = subprocess.run(
                [path, "-hide_banner", "-encoders"], capture_output=True, text=True, check=True,
                timeout=30, stdin=subprocess.DEVNULL,
            )  # fmt: skip
            lines = [line.split() for line in done.stdout.splitlines()]
            found[path] = frozenset(w[1] for w in lines if len(w) > 1 and w[0].startswith("V"))
    return found


def backend(codec: FrameCodec) -> str | None:
    """What encodes it here: ``PyAV``, the path of an ffmpeg program, or None."""
    with suppress(av.FFmpegError, ValueError):
        av.Codec(codec.encoder, "w")
        return "PyAV"
    return next((path for path, names in programs().items() if codec.encoder in names), None)


class Passage(NamedTuple):
    """Frames that went through a codec: bytes of all packets, luma that came back, seconds."""

    size: int
    lumas: list[Bytes]
    encode_s: float
    decode_s: float


def through(
    frames: Sequence[Bytes], codec: FrameCodec, preset: str, value: float | None = None
) -> Passage:
    """Code frames, uint8 of shape (height, width), at a QP or (None) losslessly; decode them.

    A CodecError says that there is no such encoder here, that it failed, or that not as many frames
    of that size came back.
    """
    options, program = codec.options(preset, value), backend(codec)
    if program is None:
        raise CodecError(f"neither PyAV nor an ffmpeg program has {codec.encoder}")
    began = perf_counter()
    try:
        if program == "PyAV":
            with usual_priority():
                stream = _run_pyav(frames, codec, options)
        else:
            stream = _run_program(program, frames, codec, options)
        coded, size, lumas = perf_counter(), 0, []
        with av.open(io.BytesIO(stream), "r", format=codec.muxer) as container:
            video: Any = container.streams.video[0]
            video.codec_context.thread_count = 1
            # A raw stream repeats in its packets what a container would store once.
            size += 0 if codec.muxer == "vvc" else len(video.codec_context.extradata or b"")
            for packet in container.demux(video):
                if packet.size and not packet.is_keyframe:
                    raise CodecError(f"{codec.encoder} predicted a frame that should stand alone")
                size += packet.size
                lumas += [_luma(frame) for frame in packet.decode()]
    except (av.FFmpegError, ValueError, MemoryError, OSError) as error:
        raise CodecError(f"{codec.encoder} failed: {error}") from error
    if [luma.shape for luma in lumas] != [frame.shape for frame in frames]:
        raise CodecError(
            f"{codec.encoder}: {len(frames)} frames became {len(lumas)}, or others in size"
        )
    return Passage(size, lumas, coded - began, perf_counter() - coded)


def refused_options(codec: FrameCodec) -> str:
    """What an encoder says, to FFmpeg's log at most, of options without which it goes on."""
    level = av.logging.get_level()
    av.logging.set_level(av.logging.WARNING)
    try:
        with av.logging.Capture() as said:
            through([np.full((192, 192), 128, np.uint8)], codec, codec.preset)
    finally:
        av.logging.set_level(level)
    return "; ".join(text.strip() for _, _, text in said if "option" in text)


def _run_pyav(frames: Sequence[Bytes], codec: FrameCodec, options: dict[str, str]) -> bytes:
    # SVT-AV1 would write about itself to the terminal; FFmpeg has no say in it.
    os.environ.setdefault("SVT_LOG", "0")
    file, gray = io.BytesIO(), codec.pixel_format == "gray"
    with av.open(file, "w", format=codec.muxer) as container:
        video: Any = container.add_stream(codec.encoder, rate=_RATE, options=options)
        video.height, video.width = frames[0].shape
        video.pix_fmt = codec.pixel_format
        video.codec_context.thread_count = video.codec_context.gop_size = 1
        for number, luma in enumerate(frames):
            chroma = np.full((0 if gray else luma.shape[0] // 2, luma.shape[1]), 128, np.uint8)
            planes = np.concatenate((luma, chroma))
            frame = av.VideoFrame.from_ndarray(planes, codec.pixel_format)
            frame.pts, frame.pict_type = number, PictureType.I
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
    return file.getvalue()


def _run_program(
    program: str, frames: Sequence[Bytes], codec: FrameCodec, options: dict[str, str]
) -> bytes:
    import ffmpeg

    height, width = frames[0].shape
    size = f"{width}x{height}"
    raw = ffmpeg.input("pipe:", format="rawvideo", pix_fmt=codec.pixel_format, s=size, r=_RATE)
    coded = raw.output("pipe:", format=codec.muxer, vcodec=codec.encoder, threads=1, **options)
    command = coded.global_args("-hide_banner", "-loglevel", "error").compile(program)
    deep, chroma = codec.pixel_format.endswith("10le"), np.full(height * width // 2, 128, np.uint8)
    samples = np.concatenate([part for luma in frames for part in (luma.reshape(-1), chroma)])
    data = (samples.astype("<u2") << 2 if deep else samples).tobytes()
    done = subprocess.run(command, input=data, capture_output=True, check=False)
    if done.returncode or not done.stdout:
        words = done.stderr.decode("utf-8", "replace").strip().splitlines()
        raise CodecError(f"{codec.encoder} failed: {'; '.join(words[:2]) or done.returncode}")
    return done.stdout


def _luma(frame: av.VideoFrame) -> Bytes:
    """Luma of a frame; deeper samples are rounded to 8 bits."""
    plane, bits = frame.planes[0], frame.format.components[0].bits
    rows: Array = np.frombuffer(cast(Any, plane), np.uint8).reshape(plane.height, plane.line_size)
    if bits > 8:  # halves to even: rounding must not move the mean
        rows = np.rint(rows.view("<u2") / (1 << bits - 8)).clip(0, 255)
    return rows[:, : plane.width].astype(np.uint8)
