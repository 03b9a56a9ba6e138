"""Packets to luma for the independent reader: PyAV, or the ffmpeg program.

The only part that is not the standard library alone; it gives bytes.
"""

from __future__ import annotations

import struct
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

Decode = Callable[["Video", Sequence[bytes]], list[bytes]]
#: FFmpeg's decoder of each codec, and from which byte on it is told the configuration record.
DECODERS = {
    "hevc": ("hevc", 0), "avc": ("h264", 0), "av1": ("libdav1d", 0), "vp9": ("vp9", None),
    "vvc": ("vvc", 4), "ffv1": ("ffv1", 0), "png": ("png", None), "jpeg2000": ("jpeg2000", None),
}  # fmt: skip


@dataclass(frozen=True)
class Video:
    """What a decoder must know: configuration record, frame size, codec, bits of a sample."""

    record: bytes
    width: int
    height: int
    codec: str = "hevc"
    bits: int = 8


def by_pyav(video: Video, packets: Sequence[bytes]) -> list[bytes]:
    """Luma of each packet, decoded by FFmpeg's library through PyAV."""
    import av

    name, told = DECODERS[video.codec]
    context = av.CodecContext.create(name, "r")
    context.width, context.height = video.width, video.height
    if told is not None:
        context.extradata = video.record[told:]
    context.thread_count = 1
    frames = []
    for number, data in enumerate(packets):
        packet = av.Packet(data)
        packet.pts = packet.dts = number
        packet.is_keyframe = True
        frames += context.decode(packet)
    frames += context.decode(None)
    found = []
    for frame in frames:
        if (frame.width, frame.height) != (video.width, video.height):
            raise ValueError("a packet decodes to a frame of another size")
        plane = frame.planes[0]
        data, line, row = bytes(plane), plane.line_size, video.width * ((video.bits + 7) // 8)
        found.append(b"".join(data[y * line : y * line + row] for y in range(video.height)))
    return found


def by_ffmpeg(video: Video, packets: Sequence[bytes]) -> list[bytes]:
    """Luma of each packet, decoded by the ffmpeg program from a stream without a container."""
    kind, stream = STREAMS[video.codec](video, packets)
    luma = video.width * video.height * ((video.bits + 7) // 8)
    gray = video.codec in ("png", "jpeg2000")
    pixels = "gray" if gray else "yuv420p" if video.bits == 8 else "yuv420p10le"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "stream"
        path.write_bytes(stream)
        command = ["ffmpeg", "-v", "error", "-f", kind, "-i", str(path)]
        command += ["-fps_mode", "passthrough", "-f", "rawvideo", "-pix_fmt", pixels, "-"]
        raw = subprocess.run(command, check=True, capture_output=True).stdout
    each = luma if gray else luma * 3 // 2
    return [raw[at : at + luma] for at in range(0, len(raw), each)]


def _annex_b(units: Sequence[bytes], packets: Sequence[bytes]) -> bytes:
    """A byte stream of NAL units (Annex B of H.264 and H.265)."""
    stream = bytearray()
    for unit in units:
        stream += b"\0\0\0\1" + unit
    for packet in packets:
        at = 0
        while at < len(packet):
            size = int.from_bytes(packet[at : at + 4], "big")
            stream += b"\0\0\0\1" + packet[at + 4 : at + 4 + size]
            at += 4 + size
    return bytes(stream)


def _hevc(video: Video, packets: Sequence[bytes]) -> tuple[str, bytes]:
    """Parameter sets of an HEVCDecoderConfigurationRecord (ISO/IEC 14496-15, 8.3.3)."""
    record, found, at = video.record, [], 23
    for _ in range(record[22]):
        count = int.from_bytes(record[at + 1 : at + 3], "big")
        at += 3
        for _ in range(count):
            size = int.from_bytes(record[at : at + 2], "big")
            found.append(record[at + 2 : at + 2 + size])
            at += 2 + size
    return "hevc", _annex_b(found, packets)


def _avc(video: Video, packets: Sequence[bytes]) -> tuple[str, bytes]:
    """One SPS and one PPS of an AVCDecoderConfigurationRecord (ISO/IEC 14496-15, 5.3.3)."""
    record = video.record
    size = int.from_bytes(record[6:8], "big")
    at = 8 + size + 1
    last = int.from_bytes(record[at : at + 2], "big")
    return "h264", _annex_b([record[8 : 8 + size], record[at + 2 : at + 2 + last]], packets)


def _ivf(video: Video, packets: Sequence[bytes]) -> tuple[str, bytes]:
    """IVF; each AV1 packet gets its temporal delimiter back."""
    name, before = (b"AV01", b"\x12\x00") if video.codec == "av1" else (b"VP90", b"")
    head = (name, video.width, video.height, 1, 1, len(packets), 0)
    stream = b"DKIF" + struct.pack("<HH4sHHIIII", 0, 32, *head)
    for number, packet in enumerate(packets):
        stream += struct.pack("<IQ", len(before + packet), number) + before + packet
    return "ivf", stream


STREAMS = {
    "hevc": _hevc,
    "avc": _avc,
    "av1": _ivf,
    "vp9": _ivf,
    "png": lambda _, packets: ("png_pipe", b"".join(packets)),
    "jpeg2000": lambda _, packets: ("j2k_pipe", b"".join(packets)),
}
