"""Packets to luma for the independent reader: PyAV, or the ffmpeg program.

The only part that is not the standard library alone; it gives bytes.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

Decode = Callable[["Video", Sequence[bytes]], list[bytes]]


@dataclass(frozen=True)
class Video:
    """What a decoder must know: decoder configuration record and frame size."""

    hvcc: bytes
    width: int
    height: int


def by_pyav(video: Video, packets: Sequence[bytes]) -> list[bytes]:
    """Luma of each packet, decoded by FFmpeg's library through PyAV."""
    import av

    context = av.CodecContext.create("hevc", "r")
    context.extradata = video.hvcc
    context.thread_count = 1
    frames = []
    for number, data in enumerate(packets):
        packet = av.Packet(data)
        packet.pts = packet.dts = number
        frames += context.decode(packet)
    frames += context.decode(None)
    found = []
    for frame in frames:
        if (frame.width, frame.height) != (video.width, video.height):
            raise ValueError("a packet decodes to a frame of another size")
        plane = frame.planes[0]
        data, line = bytes(plane), plane.line_size
        rows = [data[y * line : y * line + video.width] for y in range(video.height)]
        found.append(b"".join(rows))
    return found


def by_ffmpeg(video: Video, packets: Sequence[bytes]) -> list[bytes]:
    """Luma of each packet, decoded by the ffmpeg program from an Annex B byte stream."""
    stream = bytearray()
    for unit in _parameter_sets(video.hvcc):
        stream += b"\0\0\0\1" + unit
    for packet in packets:
        at = 0
        while at < len(packet):
            size = int.from_bytes(packet[at : at + 4], "big")
            stream += b"\0\0\0\1" + packet[at + 4 : at + 4 + size]
            at += 4 + size
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "stream.hevc"
        path.write_bytes(stream)
        command = ["ffmpeg", "-v", "error", "-f", "hevc", "-i", str(path)]
        command += ["-fps_mode", "passthrough", "-f", "rawvideo", "-pix_fmt", "yuv420p", "-"]
        raw = subprocess.run(command, check=True, capture_output=True).stdout
    luma = video.width * video.height
    each = luma * 3 // 2
    return [raw[at : at + luma] for at in range(0, len(raw), each)]


def _parameter_sets(hvcc: bytes) -> list[bytes]:
    """NAL units of an HEVCDecoderConfigurationRecord (ISO/IEC 14496-15, 8.3.3)."""
    found, at = [], 23
    for _ in range(hvcc[22]):
        count = int.from_bytes(hvcc[at + 1 : at + 3], "big")
        at += 3
        for _ in range(count):
            size = int.from_bytes(hvcc[at : at + 2], "big")
            found.append(hvcc[at + 2 : at + 2 + size])
            at += 2 + size
    return found
