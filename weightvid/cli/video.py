"""Options of ``weightvid pack`` that are about the video codec."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from weightvid.cli.options import usage_error

if TYPE_CHECKING:
    from weightvid.codec.encode import Lossy

Codec = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="x265 (default), x264, svtav1, vp9, aom, kvazaar, ...; of others it says why not.",
    ),
]
Qp = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=0,
        help="Lossy video: the codec quantizes, by this QP (x265: 0 to 51). Levels take fewer bits "
        "at equal error, but for the lowest rates.",
    ),
]
Crf = Annotated[
    float | None,
    typer.Option(metavar="N", min=0, help="Lossy video, by the codec's rate factor."),
]
BitDepth = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Bits of a sample of lossy video: 8 (default where the codec has them) or 10.",
    ),
]
WholeVideo = Annotated[
    bool,
    typer.Option(
        "--whole-video",
        help="Put every level into the pictures, instead of the smaller way, half of it beside "
        "them: a decoder in hardware then does all the work.",
    ),
]
Ffmpeg = Annotated[
    str | None,
    typer.Option(metavar="PATH", help="The ffmpeg program, for aom, kvazaar and rav1e."),
]


def known_codec(name: str | None) -> str:
    """A codec of archives."""
    from weightvid.codec.encode import DEFAULT_ENCODER
    from weightvid.codec.registry import CODECS, suggestion

    if name is None:
        return DEFAULT_ENCODER
    row = CODECS.get(name)
    if row is None:
        usage_error(f"unknown codec {name!r}{suggestion(name, tuple(CODECS))}", "--codec")
    if not row.track:
        usage_error(
            f"{name} is no codec of archives: {row.unfit}; "
            f"weightvid compare MODEL --codecs {name} measures it",
            "--codec",
        )
    return name


@dataclass(frozen=True, slots=True)
class Wish:
    """What a command line says of the codec.

    Attributes
    ----------
    codec : str
        Of archives.
    qp, crf : number or None
    bits : int or None
        Of a sample; None: as few as the codec has.
    """

    codec: str
    qp: int | None
    crf: float | None
    bits: int | None

    @property
    def bit_depth(self) -> int:
        """Bits of a sample: those asked for, or else 8, or else the codec's."""
        from weightvid.codec.encode import depths_of

        if self.bits is not None or (self.qp, self.crf) == (None, None):
            return self.bits or 8
        return min(depths_of(self.codec, "crf" if self.qp is None else "qp"), default=8)

    def lossy(self, levels: bool) -> Lossy | None:
        """How lossy the video is to be; None: not at all.

        Parameters
        ----------
        levels : bool
            Options about levels were given, which lossy video has none of.
        """
        from weightvid.codec.encode import Video
        from weightvid.errors import CodecError

        wanted = _lossy(self.qp, self.crf, self.bit_depth, levels)
        try:
            Video(self.codec, "", wanted, self.bit_depth)
        except CodecError as error:
            usage_error(str(error), "--codec / --qp / --crf / --bit-depth")
        return wanted


def _lossy(qp: int | None, crf: float | None, bit_depth: int, levels: bool) -> Lossy | None:
    from weightvid.codec.encode import Lossy

    if qp is not None and crf is not None:
        usage_error("a QP and a CRF exclude each other", "--qp / --crf")
    if qp is None and crf is None:
        if bit_depth != 8:
            usage_error("it is of lossy video; give a --qp or --crf", "--bit-depth")
        return None
    if levels:
        usage_error("lossy video takes no --recipe, --step or --quantizer", "--qp / --crf")
    return Lossy("crf", crf) if crf is not None else Lossy("qp", qp or 0)
