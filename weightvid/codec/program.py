"""Frames to streams and back by the ffmpeg program, for what PyAV's wheel lacks.

The command lines are put together by ffmpeg-python; raw frames and streams go through pipes.
"""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import IO, Any, Final, cast

import av
import numpy as np

from weightvid.codec.pictures import RATE, Luma, Stream, middle
from weightvid.codec.registry import Coding, VideoCodec
from weightvid.errors import CodecError

INSTALL: Final = "pip install 'weightvid[compare]'"
_TIMEOUT_S: Final = 30
_KIB: Final = 1024


@dataclass(frozen=True, slots=True)
class Program:
    """An ffmpeg program.

    Attributes
    ----------
    path : str
    version : str
        As its first line says.
    encoders : frozenset of str
        FFmpeg's names of its video encoders.
    """

    path: str
    version: str
    encoders: frozenset[str]


@dataclass(frozen=True, slots=True)
class Ran:
    """What a run of the program gave: stdout, and its peak memory where the system tells."""

    data: bytes
    peak_bytes: int | None


@lru_cache
def inspect(path: str) -> Program:
    """Ask a program what it is.

    Raises
    ------
    CodecError
        It cannot be run, or is no ffmpeg.
    """
    version = _ask(path, "-version").splitlines()[:1]
    if not version or not version[0].startswith("ffmpeg version"):
        raise CodecError(f"{path} is no ffmpeg: it answers -version with {version[:1]}")
    encoders = set()
    for line in _ask(path, "-hide_banner", "-encoders").splitlines():
        words = line.split()
        if len(words) > 1 and words[0].startswith("V"):
            encoders.add(words[1])
    return Program(path, " ".join(version[0].split()[1:3]), frozenset(encoders))


def _ask(path: str, *arguments: str) -> str:
    try:
        done = subprocess.run(
            [path, *arguments], capture_output=True, timeout=_TIMEOUT_S, check=False,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CodecError(f"{path} cannot be run: {error}") from None
    if done.returncode:
        raise CodecError(f"{path} is no ffmpeg: {arguments[-1]} fails with {done.returncode}")
    return done.stdout.decode("utf-8", "replace")


def programs(wanted: str | None = None) -> tuple[Program, ...]:
    """Programs to try, in order: the one that is asked for; or the system's and imageio-ffmpeg's.

    Raises
    ------
    CodecError
        The program that is asked for is no ffmpeg.
    """
    if wanted is not None:
        return (inspect(wanted),)
    found = []
    system = shutil.which("ffmpeg")
    if system is not None:
        found.append(inspect(system))
    if find_spec("imageio_ffmpeg") is not None:
        import imageio_ffmpeg

        # The wheels of some platforms bring no program.
        with suppress(RuntimeError):
            found.append(inspect(str(imageio_ffmpeg.get_ffmpeg_exe())))
    return tuple(found)


def choose(codec: VideoCodec, candidates: Sequence[Program]) -> Program | str:
    """The newest candidate that has the encoder, or why there is none."""
    if find_spec("ffmpeg") is None:
        return f"needs ffmpeg-python: {INSTALL}"
    if not candidates:
        return f"no ffmpeg program found; install one, or: {INSTALL}"
    # The last one is imageio-ffmpeg's, whose encoders are of known, recent versions.
    for program in reversed(candidates):
        if codec.encoder in program.encoders:
            return program
    return f"no {codec.encoder} in {', '.join(p.path for p in candidates)}; {INSTALL} brings it"


def encode(frames: Sequence[Luma], coding: Coding, program: Program) -> tuple[Stream, int | None]:
    """Code frames by the program, single-threaded where the encoder can be told.

    Parameters
    ----------
    frames : sequence of ndarray, shape (height, width)
        As for :func:`weightvid.codec.pictures.encode`.
    coding : Coding
    program : Program

    Returns
    -------
    (Stream, int or None)
        Packets and the program's peak memory. Streams without a container come as one packet.

    Raises
    ------
    CodecError
        With ffmpeg's own message.
    """
    import ffmpeg

    height, width = frames[0].shape
    source = ffmpeg.input(
        "pipe:", format="rawvideo", pix_fmt=coding.pixel_format, s=f"{width}x{height}", r=RATE
    )
    options = {"c:v": coding.codec.encoder, "threads": "1", **coding.options}
    output = source.output("pipe:", format=coding.codec.muxer, **options)
    ran = _run(_command(output, program), _raw(frames, coding.pixel_format), coding)
    if not ran.data:
        raise CodecError(f"{coding.codec.encoder} wrote nothing")
    if coding.codec.muxer != "nut":
        return Stream((ran.data,)), ran.peak_bytes
    with av.open(io.BytesIO(ran.data), "r", format="nut") as container:
        video: Any = container.streams.video[0]
        extradata = bytes(video.codec_context.extradata or b"")
        packets = [packet for packet in container.demux(video) if packet.size]
        if not coding.inter and not all(packet.is_keyframe for packet in packets):
            raise CodecError(f"{coding.codec.encoder} predicted frames that were to be coded alone")
        return Stream(tuple(map(bytes, packets)), extradata), ran.peak_bytes


def decode(
    stream: Stream, coding: Coding, program: Program, shape: tuple[int, int]
) -> tuple[list[Luma], int | None]:
    """Decode a stream without a container by the program.

    Returns
    -------
    (list of ndarray, int or None)
        Luma of each frame, and the program's peak memory.

    Raises
    ------
    CodecError
        With ffmpeg's own message.
    """
    import ffmpeg

    muxer = "jpegxl_pipe" if coding.codec.muxer == "image2pipe" else coding.codec.muxer
    source = ffmpeg.input("pipe:", format=muxer, threads="1")
    output = source.output(
        "pipe:", format="rawvideo", pix_fmt=coding.pixel_format, fps_mode="passthrough"
    )
    ran = _run(_command(output, program), b"".join(stream.packets), coding)
    height, width = shape
    dtype = np.dtype("<u2") if coding.bits > 8 else np.dtype("u1")
    luma, chroma = height * width, _chroma(coding.pixel_format, shape)
    samples = np.frombuffer(ran.data, dtype)
    if not samples.size or samples.size % (luma + chroma):
        raise CodecError(f"{coding.codec.decoder} gave {len(ran.data)} bytes, no whole frames")
    rows = samples.reshape(-1, luma + chroma)[:, :luma]
    return [row.reshape(shape).astype(dtype.newbyteorder("=")) for row in rows], ran.peak_bytes


def _chroma(pixel_format: str, shape: tuple[int, int]) -> int:
    return 0 if pixel_format.startswith("gray") else shape[0] * shape[1] // 2


def _raw(frames: Sequence[Luma], pixel_format: str) -> bytes:
    parts = []
    for luma in frames:
        little = np.dtype("<u2") if luma.dtype == np.uint16 else np.dtype("u1")
        parts.append(np.ascontiguousarray(luma, little).tobytes())
        blank = np.full(_chroma(pixel_format, luma.shape), middle(pixel_format), little)
        parts.append(blank.tobytes())
    return b"".join(parts)


def _command(output: Any, program: Program) -> list[str]:
    command: list[str] = output.compile(cmd=program.path)
    return [command[0], "-hide_banner", "-loglevel", "error", *command[1:]]


def _run(command: list[str], data: bytes, coding: Coding) -> Ran:
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
    except OSError as error:
        raise CodecError(f"{command[0]} cannot be run: {error}") from None
    given, taken, told = (
        cast(IO[bytes], pipe) for pipe in (process.stdin, process.stdout, process.stderr)
    )
    said: list[bytes] = []
    feeder = threading.Thread(target=_feed, args=(given, data), daemon=True)
    listener = threading.Thread(target=_listen, args=(told, said), daemon=True)
    feeder.start()
    listener.start()
    try:
        with taken:
            out = taken.read()
        feeder.join()
        listener.join()
        peak = _wait(process)
    except BaseException:
        process.kill()
        process.wait()
        raise
    if process.returncode:
        words = b"".join(said).decode("utf-8", "replace").strip().splitlines()
        message = "; ".join(line.strip() for line in words[:3]) or f"status {process.returncode}"
        raise CodecError(f"ffmpeg failed ({coding.label}): {message}")
    return Ran(out, peak)


def _feed(pipe: IO[bytes], data: bytes) -> None:
    # Where it dies early, its status and message tell why.
    with suppress(OSError), pipe:
        pipe.write(data)


def _listen(pipe: IO[bytes], said: list[bytes]) -> None:
    said.append(pipe.read())
    pipe.close()


def _wait(process: subprocess.Popen[bytes]) -> int | None:
    """Wait for the end; peak memory from the kernel where it tells that of one child."""
    if not hasattr(os, "wait4"):
        process.wait()
        return None
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return int(usage.ru_maxrss) * _KIB
