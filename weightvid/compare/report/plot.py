"""Rate-distortion plots as SVG and PNG."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any, Final

from weightvid.compare.analysis import Quality, series
from weightvid.compare.report.results import Results, write
from weightvid.compare.row import Row

#: Okabe and Ito's colours, which people with any colour vision tell apart; then line styles.
COLOURS: Final = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#999999",
)  # fmt: skip
_MARKERS: Final = "osD^vP*X<>"
_STYLES: Final = ("-", "--", ":", "-.")
_SIZE_INCHES: Final = (9.0, 6.0)
_DPI: Final = 150


def write_plots(folder: Path, results: Results) -> dict[str, Path]:
    """Write ``rate_MEASURE.svg`` and ``.png`` for each measure.

    Raises
    ------
    OutputError
    """
    # The object-oriented interface: no window system is asked, and no global state touched.
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    written = {}
    for quality in results.measures:
        with rc_context({"svg.fonttype": "none", "svg.hashsalt": "weightvid"}):
            figure = Figure(figsize=_SIZE_INCHES, layout="constrained")
            FigureCanvasAgg(figure)
            _draw(figure.add_subplot(), results, quality)
            for kind in ("svg", "png"):
                data = io.BytesIO()
                figure.savefig(data, format=kind, dpi=_DPI, metadata=_metadata(kind))
                path = folder / f"rate_{quality.name}.{kind}"
                written[f"plot ({quality.name}, {kind})"] = write(path, data.getvalue())
    return written


def _metadata(kind: str) -> dict[str, Any]:
    """Without a date, equal results give equal files."""
    return {"Date": None} if kind == "svg" else {"Software": "weightvid"}


def _draw(axes: Any, results: Results, quality: Quality) -> None:
    curves = series(results.rows)
    for place, (name, points) in enumerate(curves.items()):
        shown = [(x, y) for row in points for x, y in [_place(row, quality)] if y is not None]
        if not shown:
            continue
        axes.plot(
            [x for x, _ in shown], [y for _, y in shown],
            label=name,
            color=COLOURS[place % len(COLOURS)],
            marker=_MARKERS[place % len(_MARKERS)],
            linestyle=_STYLES[(place // len(COLOURS)) % len(_STYLES)],
            markersize=4, linewidth=1.2,
        )  # fmt: skip
    original = next((row for row in results.rows if row.kind == "original" and row.ok), None)
    if quality.name == "metric" and original is not None and original.metric is not None:
        axes.axhline(original.metric, color="grey", linewidth=0.8, label="original")
    if quality.name in ("kl", "cosine"):
        axes.set_yscale("log")
    front = [r for r in results.rows if r.label in results.fronts[quality.name]]
    places = [(x, y) for row in front for x, y in [_place(row, quality)] if y is not None]
    axes.scatter(
        [x for x, _ in places], [y for _, y in places], s=70, facecolors="none",
        edgecolors="black", linewidths=0.7, label="Pareto front", zorder=5,
    )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xlabel("bits per weight (whole file)")
    axes.set_ylabel(quality.title)
    axes.set_title(Path(str(results.model["path"])).name)
    _near(axes, curves, quality)
    _ticks(axes, [row for points in curves.values() for row in points])
    axes.grid(True, alpha=0.3)
    axes.legend(fontsize=7, ncols=2)


def _near(axes: Any, curves: Mapping[str, Sequence[Row]], quality: Quality) -> None:
    """Show where the curves lie, and say what lies beyond."""
    places = [
        (row.label, *_place(row, quality), len(points) > 1)
        for points in curves.values()
        for row in points
    ]
    framed = [(x, y) for _, x, y, curve in places if curve and y is not None]
    if len(framed) < 3:
        return
    left, right = min(x for x, _ in framed) / 1.1, max(x for x, _ in framed) * 1.1
    low, high = min(y for _, y in framed), max(y for _, y in framed)
    if quality.name in ("kl", "cosine"):
        low, high = low / 1.5, high * 1.5
    else:
        margin = 0.06 * (high - low) or 1.0
        low, high = low - margin, high + margin
    axes.set_xlim(left, right)
    axes.set_ylim(low, high)
    beyond = [
        f"{label}: {x:.3g} bpw" + ("" if y is None else f", {y:.3g}")
        for label, x, y, _ in places
        if y is None or not (left <= x <= right and low <= y <= high)
    ]
    if beyond:
        text = "beyond: " + "; ".join(beyond)
        axes.text(
            0.995, 0.005, fill(text, 110), transform=axes.transAxes, fontsize=6, ha="right",
            va="bottom", color="grey",
        )  # fmt: skip


def _ticks(axes: Any, rows: Sequence[Row]) -> None:
    from matplotlib.ticker import FixedLocator, FormatStrFormatter, NullLocator

    rates = [row.bits_per_weight for row in rows if row.bits_per_weight]
    known = (0.5, 1, 1.5, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32)
    inside = [t for t in known if rates and min(rates) * 0.8 <= t <= max(rates) * 1.2]
    axes.xaxis.set_major_locator(FixedLocator(inside))
    axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.xaxis.set_minor_locator(NullLocator())


def _place(row: Row, quality: Quality) -> tuple[float, float | None]:
    value = quality.value(row)
    usable = value is not None and (quality.name not in ("kl", "cosine") or value > 0)
    return row.bits_per_weight or 0.0, value if usable else None
