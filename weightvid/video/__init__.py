"""Video encoders: frames of 8-bit luma to the samples of an MP4 track."""

from weightvid.video.encoder import CODECS, Encoder, Video, VideoCodec, open_encoder
from weightvid.video.level import Claim, HevcLevel, describe, hevc_level, with_level

__all__ = [
    "CODECS",
    "Claim",
    "Encoder",
    "HevcLevel",
    "Video",
    "VideoCodec",
    "describe",
    "hevc_level",
    "open_encoder",
    "with_level",
]
