"""Options of ``weightvid pack`` that are about the video codec."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from weightvid.cli.options import usage_error

if TYPE_CHECKING:
    from weightvid.codec.encode import Lossy

_OURS = "x265"

Codec = Annotated[
    str | None, typer.Option(metavar="NAME", help="x265 (default); for others, says why not.")
]
Qp = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=0,
        max=51,
        help="Lossy video: the codec quantizes, by this QP. Levels take fewer bits at equal error, "
        "but for the lowest rates.",
    ),
]
Crf = Annotated[
    float | None,
    typer.Option(metavar="N", min=0, max=51, help="Lossy video, by x265's rate factor."),
]


def chosen(codec: str | None, qp: int | None, crf: float | None, levels: bool) -> Lossy | None:
    """How lossy the video is to be; None: not at all.

    Parameters
    ----------
    codec : str or None
    qp, crf : number or None
    levels : bool
        Options about levels were given, which lossy video has none of.
    """
    from weightvid.codec.encode import Lossy

    if codec is not None and codec != _OURS:
        usage_error(_why_not(codec), "--codec")
    if qp is not None and crf is not None:
        usage_error("a QP and a CRF exclude each other", "--qp / --crf")
    if qp is None and crf is None:
        return None
    if levels:
        usage_error("lossy video takes no --recipe, --step or --quantizer", "--qp / --crf")
    return Lossy("crf", crf) if crf is not None else Lossy("qp", qp or 0)


def _why_not(name: str) -> str:
    """Why a codec's stream is no archive."""
    from weightvid.codec.registry import CODECS, suggestion

    row = CODECS.get(name)
    if row is None:
        return f"unknown codec {name!r}{suggestion(name, tuple(CODECS))}"
    measured = f"weightvid compare MODEL --codecs {name} measures it"
    if row.standard != "HEVC":
        return (
            f"{name} writes {row.standard}, and readers of archives decode HEVC alone; {measured}"
        )
    return (
        f"{name} writes HEVC, but archives are made by x265 alone, whose frames are known to be "
        f"coded one by one; {measured}"
    )
