"""What a comparison leaves in a folder: JSON, CSV, plots, and one page to look at."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import fields
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from weightvid.atomic import atomic_output
from weightvid.compare.curves import Measure
from weightvid.compare.rows import MISSING, OK, Row
from weightvid.compare.run import CompareResult
from weightvid.errors import OutputError

_COLUMNS: Final = [item.name for item in fields(Row) if item.name not in ("settings", "details")]
#: Okabe and Ito's colours, which people with any colour vision tell apart.
_COLOURS: Final = (
    *("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#888888"),
)
_TICKS: Final = (0.5, 0.7, 1, 1.5, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32)
_MARKERS: Final = "osD^vP*X<>"
_STYLES: Final = ("-", "--", ":", "-.")
_PAGE: Final = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>@TITLE@</title>
<style>
body { margin:0 auto; padding:1rem; max-width:75rem; font:15px/1.5 system-ui, sans-serif;
  color:#1b1f24; background:#fff; }
h1, h2 { font-size:1.3rem; margin:1.5rem 0 .5rem; overflow-wrap:anywhere; }
.soft { color:#57606a; }
svg { width:100%; height:auto; }
div { overflow-x:auto; border:1px solid #d0d7de; border-radius:6px; }
table { border-collapse:collapse; width:100%; font-size:.88rem; font-variant-numeric:tabular-nums; }
th, td { padding:.3rem .6rem; text-align:right; white-space:nowrap; }
th:first-child, td:first-child, td.bad { text-align:left; }
tr { border-bottom:1px solid #eaeef2; } td.bad { color:#b3261e; white-space:normal; }
</style></head><body>
@BODY@
</body></html>
"""


def write_report(folder: str | os.PathLike[str], result: CompareResult) -> dict[str, Path]:
    """Write a comparison into a folder, which is made; older files are replaced.

    Returns
    -------
    dict of str to Path
        What was written. Plots need matplotlib.

    Raises
    ------
    OutputError
    """
    place = Path(folder)
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make the folder {place}: {error}") from None
    plots = {measure.name: plot(result, measure) for measure in result.measures()}
    files = {
        "results": ("results.json", json.dumps(record(result), indent=1) + "\n"),
        "table": ("results.csv", _csv(result.rows)),
        "report": ("report.html", page(result, list(plots.values()))),
    }
    files |= {f"plot of {name}": (f"rate_{name}.svg", svg) for name, svg in plots.items() if svg}
    written = {}
    for what, (name, text) in files.items():
        with atomic_output(place / name, force=True) as file:
            file.write(text.encode())
        written[what] = place / name
    return written


def record(result: CompareResult) -> dict[str, Any]:
    """A comparison as JSON has it."""
    return {
        "source": Path(result.source).name,
        "weights": result.weights,
        "original_bytes": result.original_bytes,
        "original_metric": result.original.metric if result.original else None,
        "lower_is_better": result.options.lower_is_better,
        "anchor": result.options.anchor,
        "machine": dict(result.machine),
        "versions": dict(result.versions),
        "seconds": round(result.seconds, 1),
        "rows": [row.record() for row in result.rows],
        "rates": {str(goal): result.rates_at(goal) for goal in result.options.goals},
        "bd_rates": {m.name: result.bd_rates(m) for m in result.measures()},
    }


def _csv(rows: Sequence[Row]) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, _COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(row.record() for row in rows)
    return text.getvalue()


def plot(result: CompareResult, measure: Measure) -> str:
    """Rate-distortion plot as SVG; empty without matplotlib."""
    if find_spec("matplotlib") is None:
        return ""
    # The object-oriented interface: no window system is asked, and no global state touched.
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import FormatStrFormatter, NullLocator

    text = io.StringIO()
    with rc_context({"svg.hashsalt": f"weightvid {measure.name}"}):
        figure = Figure(figsize=(12, 6), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        places = []
        for number, (name, rows) in enumerate(result.curves().items()):
            points = measure.points(rows)
            places += points if len(points) > 1 else []
            axes.plot(
                [x for x, _ in points], [y for _, y in points], label=name,
                color=_COLOURS[number % len(_COLOURS)], marker=_MARKERS[number % len(_MARKERS)],
                linestyle=_STYLES[number // len(_COLOURS) % len(_STYLES)],
                markersize=4, linewidth=2.4 if rows[0].kind == "weightvid" else 1,
            )  # fmt: skip
        if measure.name == "metric" and result.original and result.original.metric is not None:
            axes.axhline(result.original.metric, color="grey", linewidth=0.8, label="original")
        axes.set_xscale("log", base=2)
        if measure.is_log:
            axes.set_yscale("log")
        if places:  # where the curves lie; single points far away would squeeze them
            (low, high), ys = _span([x for x, _ in places], 1.1), [y for _, y in places]
            margin = 0.05 * (max(ys) - min(ys)) or 1.0
            axes.set_xlim(low, high)
            axes.set_xticks([x for x in _TICKS if low <= x <= high])
            axes.set_ylim(
                _span(ys, 1.5) if measure.is_log else (min(ys) - margin, max(ys) + margin)
            )
        axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("bits per weight (entire file)")
        axes.set_ylabel(measure.title)
        axes.grid(visible=True, alpha=0.3)
        figure.legend(fontsize=8, loc="outside right upper")
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def _span(values: Sequence[float], factor: float) -> tuple[float, float]:
    return min(values) / factor, max(values) * factor


def page(result: CompareResult, plots: Sequence[str]) -> str:
    """One page that needs no network."""
    title = f"weightvid compare: {Path(result.source).name}"
    failed = sum(row.status not in (OK, MISSING) for row in result.rows)
    missing = sorted(
        {f"{row.curve}: {row.message}" for row in result.rows if row.status == MISSING}
    )
    about = (
        f"{result.weights:,} weights in {result.original_bytes:,} bytes; "
        f"{len(result.rows)} points; "
        f"{result.machine['processor']}, {result.machine['cores']} cores; "
        + ", ".join(f"{name} {version}" for name, version in result.versions.items())
    )
    parts = [f"<h1>{escape(title)}</h1>", f'<p class="soft">{escape(about)}</p>']
    parts += [f"<p>{failed} points failed; the table says why.</p>"] if failed else []
    parts += [f"<p>Not measured: {escape('; '.join(missing))}</p>"] if missing else []
    parts += ["<h2>Rate and quality</h2>", *(svg[svg.find("<svg") :] for svg in plots)]
    if not any(plots):
        parts.append("<p>Plots need matplotlib: pip install 'weightvid[compare]'</p>")
    if result.options.goals:
        parts.append("<h2>Bits per weight at a quality</h2>")
        rates = [result.rates_at(goal) for goal in result.options.goals]
        rows = [[name, *(_number(rate[name], 3) for rate in rates)] for name in rates[0]]
        parts.append(_table(["curve", *map(str, result.options.goals)], rows))
    measures = result.measures()
    bd = {m.name: result.bd_rates(m) for m in measures}
    if any(bd.values()):
        parts.append(f"<h2>BD-rate against {escape(result.options.anchor)}</h2>")
        parts.append('<p class="soft">Percent of its rate at equal quality; less is smaller.</p>')
        names = dict.fromkeys(name for rates in bd.values() for name in rates)
        rows = [[n, *(_number(bd[m.name].get(n), 1, "+") for m in measures)] for n in names]
        parts.append(_table(["curve", *(m.name for m in measures)], rows))
    parts.append("<h2>All points</h2>")
    parts.append(_table(["point", "bytes", "bits per weight", *(m.name for m in measures),
                         "encode s", "decode s"],
                        [_cells(row, measures) for row in result.rows]))  # fmt: skip
    return _PAGE.replace("@TITLE@", escape(title)).replace("@BODY@", "\n".join(parts))


def _cells(row: Row, measures: Sequence[Measure]) -> list[str]:
    if row.status != OK:
        return [row.label, row.message]
    values = [m.value(row) for m in measures]
    return [
        row.label, f"{row.file_bytes:,}", f"{row.bits_per_weight:.3f}",
        *("–" if value is None else f"{value:.4g}" for value in values),
        f"{row.encode_s:.2f}", f"{row.decode_s:.2f}",
    ]  # fmt: skip


def _number(value: float | None, digits: int, sign: str = "") -> str:
    return "–" if value is None else f"{value:{sign}.{digits}f}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; a row of two cells holds a message that spans the rest."""
    lines = []
    for first, *rest in rows:
        cells = [f"<td>{escape(cell)}</td>" for cell in rest]
        if len(rest) == 1 < len(head) - 1:
            cells = [f'<td class="bad" colspan="{len(head) - 1}">{escape(rest[0])}</td>']
        lines.append(f"<tr><td>{escape(first)}</td>{''.join(cells)}</tr>")
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "\n".join(lines)
    return f"<div><table><thead><tr>{top}</tr></thead>{body}</table></div>"
