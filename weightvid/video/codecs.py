"""Video codecs that an archive's track may be coded with, and the settings of one track."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final

from weightvid.errors import CodecError
from weightvid.loader import TRACKS


@dataclass(frozen=True, slots=True)
class VideoCodec:
    """An encoder and the kind of track that it makes.

    Attributes
    ----------
    name, standard : str
        Our name and the standard's: ``x265`` writes ``HEVC``.
    encoder : str
        FFmpeg's name.
    entry : bytes
        Type of the sample entry.
    presets : tuple of str
        From fast to slow.
    default_preset, large_preset : str
        What small models are coded with, and what large ones, where time matters more.
    lossy : tuple of int
        Smallest and largest QP.
    """

    name: str
    standard: str
    encoder: str
    entry: bytes
    presets: tuple[str, ...]
    default_preset: str
    large_preset: str
    lossy: tuple[int, int]

    @property
    def config_box(self) -> bytes:
        """Type of the box that holds the configuration record."""
        return TRACKS[self.entry][0]


#: levels of a model that is large.
LARGE_MODEL: Final = 1 << 22

#: Of x265's and x264's presets, those that differ for levels. x264's superfast predicts by DC more
#: often than slower presets do, which is best for noise.
_ROWS: Final = (
    VideoCodec("x265", "HEVC", "libx265", b"hvc1",
               ("ultrafast", "superfast", "medium", "slower"), "superfast", "ultrafast",
               (0, 51)),
    VideoCodec("svt-av1", "AV1", "libsvtav1", b"av01",
               tuple(str(n) for n in range(12, -1, -1)), "8", "8", (1, 63)),
    VideoCodec("x264", "H.264", "libx264", b"avc1",
               ("superfast", "medium", "slower"), "superfast", "superfast", (1, 51)),
)  # fmt: skip

#: every codec of archives, by name.
CODECS: Final[Mapping[str, VideoCodec]] = MappingProxyType({row.name: row for row in _ROWS})


@dataclass(frozen=True, slots=True)
class Video:
    """How frames are coded.

    Attributes
    ----------
    codec : str
        A name of :data:`CODECS`.
    preset : str
        One of the codec's; empty: as the model's size asks for.
    qp : int or None
        Quantization parameter of every block; None: lossless.

    Raises
    ------
    CodecError
        The codec, preset or QP does not exist.
    """

    codec: str = "x265"
    preset: str = ""
    qp: int | None = None

    def __post_init__(self) -> None:
        row = CODECS.get(self.codec)
        if row is None:
            raise CodecError(f"unknown codec {self.codec!r}; choose one of {', '.join(CODECS)}")
        if self.preset and self.preset not in row.presets:
            raise CodecError(
                f"{row.name} has no preset {self.preset!r}; choose one of {', '.join(row.presets)}"
            )
        low, high = row.lossy
        if self.qp is not None and not (isinstance(self.qp, int) and low <= self.qp <= high):
            raise CodecError(
                f"{row.name} takes an integer QP from {low} to {high}, not {self.qp!r}"
            )

    def for_levels(self, count: int) -> Video:
        """The same with a preset, for a model of so many levels."""
        row = CODECS[self.codec]
        usual = row.default_preset if count <= LARGE_MODEL else row.large_preset
        return replace(self, preset=self.preset or usual)
