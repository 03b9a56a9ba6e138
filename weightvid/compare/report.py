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
_COLOURS: Final = tuple("#0072b2 #d55e00 #009e73 #cc79a7 #56b4e9 #e69f00 #000000 #888888".split())
_TICKS: Final = (0.1, 0.2, 0.3, 0.5, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32)
#: sizes of a plot in inches, for wide windows and for telephones; texts are of one size on both.
_WIDE, _NARROW = (12.0, 5.5), (4.2, 4.2)
#: what a recommended point may lose, where no goal is given.
_BOUNDS: Final = {"metric": 0.005, "kl": 0.02, "cosine": 0.99, "sqnr": 25.0}
_Range = tuple[float, float]
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
svg { width:100%; height:auto; } .narrow { display:none; }
.facts { display:flex; flex-wrap:wrap; gap:.5rem 2.5rem; margin:1rem 0; }
.facts b { display:block; font-size:1.6rem; font-variant-numeric:tabular-nums; }
code { overflow-wrap:anywhere; background:#f6f8fa; padding:.15rem .3rem; border-radius:4px; }
.table { overflow-x:auto; border:1px solid #d0d7de; border-radius:6px; }
table { border-collapse:collapse; width:100%; font-size:.88rem; font-variant-numeric:tabular-nums; }
th, td { padding:.3rem .6rem; text-align:right; white-space:nowrap; }
th:first-child, td:first-child, td.bad { text-align:left; }
tr { border-bottom:1px solid #eaeef2; } td.bad { color:#b3261e; white-space:normal; }
@media (max-width:700px) { .wide { display:none; } .narrow { display:block; }
  th, td { white-space:normal; padding:.3rem; } tr > :first-child { position:sticky; left:0;
  background:#fff; min-width:7rem; } }
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
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, _COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(row.record() for row in result.rows)
    plots = {m.name: plot(result, m, _WIDE) for m in result.measures()}
    narrow = [plot(result, m, _NARROW) for m in result.measures()]
    files = {
        "results": ("results.json", json.dumps(record(result), indent=1) + "\n"),
        "table": ("results.csv", table.getvalue()),
        "report": ("report.html", page(result, list(zip(plots.values(), narrow, strict=True)))),
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
        "schema": 1,
        "source": Path(result.source).name,
        "date": result.date,
        "weights": result.weights,
        "original_bytes": result.original_bytes,
        "original_metric": result.original.metric if result.original else None,
        "metric_name": result.metric_name,
        "lower_is_better": result.options.lower_is_better,
        "anchor": result.options.anchor,
        "machine": dict(result.machine),
        "versions": dict(result.versions),
        "seconds": round(result.seconds, 1),
        "alone": result.alone,
        "rows": [row.record() for row in result.rows],
        "rates": {str(goal): result.rates_at(goal) for goal in result.options.goals},
        "rates_in_words": {str(g): result.words_at(g) for g in result.options.goals},
        "bd_rates": {m.name: result.bd_rates(m) for m in result.measures()},
    }


def plot(result: CompareResult, measure: Measure, size: tuple[float, float] = _WIDE) -> str:
    """Rate-distortion plot as SVG; empty without matplotlib."""
    if find_spec("matplotlib") is None:
        return ""
    # The object-oriented interface: no window system is asked, and no global state touched.
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import FormatStrFormatter, LogLocator, MaxNLocator, NullLocator

    text, is_wide = io.StringIO(), size == _WIDE
    curves = merged(result, measure)
    height = size[1] if is_wide else size[1] + 0.19 * len(curves)
    settings = {"svg.hashsalt": f"weightvid {measure.name} {size}", "svg.fonttype": "none"}
    with rc_context(settings | {"font.family": "sans-serif", "font.size": 10}):
        figure = Figure(figsize=(size[0], height), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        for number, (name, rows) in enumerate(curves.items()):
            points = measure.points(rows)
            axes.plot(
                [x for x, _ in points], [y for _, y in points], label=name,
                color=_COLOURS[number % len(_COLOURS)], marker=_MARKERS[number % len(_MARKERS)],
                linestyle=_STYLES[number // len(_COLOURS) % len(_STYLES)],
                markersize=4, linewidth=2.4 if rows[0].kind == "weightvid" else 1,
            )  # fmt: skip
        if measure.name == "metric" and result.original and result.original.metric is not None:
            axes.axhline(result.original.metric, color="grey", linewidth=0.8, label="original")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log" if measure.is_log else "linear")
        limits = _limits(result, measure)
        if limits is not None:
            (low, high), heights = limits
            axes.set_xlim(low, high)
            ticks = [x for x in _TICKS if low <= x <= high]
            axes.set_xticks(ticks if is_wide else ticks[:: max(1, len(ticks) // 5)])
            axes.set_ylim(heights)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FormatStrFormatter("%g"))
            axis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_locator(LogLocator(numticks=7) if measure.is_log else MaxNLocator(7))
        axes.set_xlabel("bits per weight (entire file)")
        axes.set_ylabel(measure.title)
        axes.grid(visible=True, alpha=0.3)
        place = "outside right upper" if is_wide else "outside lower left"
        figure.legend(fontsize=9, loc=place, frameon=False)
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def merged(result: CompareResult, measure: Measure) -> dict[str, list[Row]]:
    """Curves that a plot shows; one that lies on an earlier one gives it its name, too."""
    found: dict[str, list[Row]] = {}
    for name, rows in result.curves().items():
        points = measure.points(rows)
        if not points:
            continue
        for other, drawn in found.items():
            pairs = list(zip(measure.points(drawn), points, strict=False))
            if len(measure.points(drawn)) == len(points) and all(
                abs(a - b) <= 0.01 * abs(a) for one, two in pairs
                for a, b in zip(one, two, strict=True)
            ):  # fmt: skip
                found = {(f"{n} = {name}" if n == other else n): r for n, r in found.items()}
                break
        else:
            found[name] = rows
    return found


def _limits(result: CompareResult, measure: Measure) -> tuple[_Range, _Range] | None:
    """Of a plot: where the curves lie, as single points far away would squeeze them."""
    curves = (measure.points(rows) for rows in result.curves().values())
    places = [place for points in curves if len(points) > 1 for place in points]
    if not places:
        return None
    xs, ys = zip(*places, strict=True)
    margin = 0.05 * (max(ys) - min(ys) or abs(ys[0]) or 1.0)
    heights = (min(ys) / 1.5, max(ys) * 1.5), (min(ys) - margin, max(ys) + margin)
    return (min(xs) / 1.1, max(xs) * 1.1), heights[not measure.is_log]


def _unseen(result: CompareResult, measure: Measure) -> str:
    """Points that lie beyond the edges of a plot, or that have no place there as they are exact."""
    limits, unseen = _limits(result, measure), []
    for row in (row for row in result.rows if row.status == OK):
        value, points = measure.value(row), measure.points([row])
        spans = zip(limits or (), points[0] if points else (), strict=False)
        if not points or not all(low <= place <= high for (low, high), place in spans):
            said = "exact" if not points else f"{value:.3g}"
            unseen.append(f"{row.label} ({row.bits_per_weight:.2f} bits per weight, {said})")
    return f"Beyond this plot: {', '.join(unseen)}." if unseen else ""


def recommended(result: CompareResult) -> tuple[Row, str] | None:
    """The archive to ship, and why: the smallest that loses no more than it may."""
    known = {measure.name: measure for measure in result.measures()}
    goal = next((goal for goal in result.options.goals if goal.measure in known), None)
    measure = known[goal.measure] if goal else next(iter(known.values()), None)
    if measure is None:
        return None
    original = result.original.metric if result.original else None
    title = measure.title if measure.name == "metric" else measure.name
    bound, kept = _BOUNDS.get(measure.name, 0.0), f"that reaches {goal or title}"
    if goal is not None:
        bound = goal.value
    elif measure.name == "metric" and original is not None:
        bound = original - abs(original) * (-bound if result.options.lower_is_better else bound)
        kept = f"whose {title} is within 0.5 % of the original's"
    else:
        kept += f"={bound:g}"
    own = [row for row in result.rows if row.status == OK and row.kind == "weightvid"]
    usual = [row for row in own if row.label == "weightvid --recipe balanced"]
    if goal is None and measure.name == "sqnr" and usual:
        # An SQNR says little of what the network computes.
        return usual[0], "the usual recipe; with --eval, the report says what it costs"
    told = sorted(((row, measure.value(row)) for row in own), key=lambda each: each[0].file_bytes)
    smaller = ""
    for row, value in told:
        if value is None or measure.level(value) <= measure.level(bound):
            return row, f"the smallest archive {kept}{smaller}"
        smaller = f"; the next smaller ({row.label}) has {title} {value:.4g}"
    return None


def _headline(result: CompareResult) -> list[str]:
    """What somebody in a hurry reads."""
    found = recommended(result)
    machine = f"{result.machine['processor']}, {result.machine['cores']} cores"
    measured = f'<p class="soft">{escape(f"{result.date}; {machine}")}</p>'
    if found is None:
        return [measured]
    row, why = found
    ratio = result.original_bytes / row.file_bytes
    sizes = f"{_mb(result.original_bytes)} → {_mb(row.file_bytes)}"
    facts = [("size", sizes, f"1/{ratio:.1f}, {row.bits_per_weight:.2f} bits per weight")]
    before = result.original.metric if result.original else None
    if before is not None and row.metric is not None:
        facts.append((result.metric_name, f"{before:.5g} → {row.metric:.5g}", "before and after"))
    if row.agreement is not None:
        facts.append(("same answer", f"{100 * row.agreement:.1f} %", f"KL {row.kl:.3g}"))
    if row.cosine is not None:
        facts.append(("cosine", f"{row.cosine:.4f}", "to the original's outputs"))
    if row.sqnr_db is not None and len(facts) < 3:
        facts.append(("SQNR", f"{row.sqnr_db:.1f} dB", "of the quantized weights"))
    cells = [
        f'<div><span class="soft">{escape(name)}</span><b>{escape(value)}</b>'
        f'<span class="soft">{escape(more)}</span></div>'
        for name, value, more in facts
    ]
    return [
        f'<div class="facts">{"".join(cells)}</div>',
        f"<p><b>{escape(row.label)}</b>: {escape(why)}.</p>",
        f"<p><code>{escape(row.command)}</code></p>",
        measured,
    ]


def _mb(number: int) -> str:
    return f"{number / 1e6:.3g} MB" if number >= 1e6 else f"{number / 1e3:.3g} kB"


def page(result: CompareResult, plots: Sequence[tuple[str, str]]) -> str:
    """One page that needs no network; plots for wide and narrow windows."""
    title = f"weightvid compare: {Path(result.source).name}"
    failed = sum(row.status not in (OK, MISSING) for row in result.rows)
    absent = sorted({f"{row.curve}: {row.message}" for row in result.rows if row.status == MISSING})
    versions = ", ".join(f"{name} {version}" for name, version in result.versions.items())
    about = f"{result.weights:,} weights in {result.original_bytes:,} bytes; "
    about += f"{len(result.rows)} points; {versions}"
    parts = [f"<h1>{escape(title)}</h1>", *_headline(result)]
    parts += [f"<p>{failed} points failed; the table says why.</p>"] if failed else []
    parts += [f"<p>Not measured: {escape('; '.join(absent))}</p>"] if absent else []
    if not result.alone:
        parts.append("<p>Other programs ran meanwhile: the seconds say little.</p>")
    if result.options.goals:
        parts.append("<h2>Bits per weight at a quality</h2>")
        rates = [result.words_at(goal) for goal in result.options.goals]
        rows = [[name, *(rate[name] for rate in rates)] for name in rates[0]]
        parts.append(_table(["curve", *map(str, result.options.goals)], rows))
    parts.append("<h2>Rate and quality</h2>")
    for measure, each in zip(result.measures(), plots, strict=True):
        for name, svg in zip(("wide", "narrow"), each, strict=True):
            parts.append(f'<div class="{name}">{svg[svg.find("<svg") :]}</div>')
        parts += [f'<p class="soft">{escape(_unseen(result, measure))}</p>'] if each[0] else []
    if not any(wide for wide, _ in plots):
        parts.append("<p>Plots need matplotlib: pip install 'weightvid[compare]'</p>")
    measures = result.measures()
    bd = {m.name: result.bd_rates(m) for m in measures}
    names = [result.metric_name if m.name == "metric" else m.name for m in measures]
    if any(value is not None for rates in bd.values() for value in rates.values()):
        parts.append(f"<h2>BD-rate against {escape(result.options.anchor)}</h2>")
        parts.append('<p class="soft">Percent of its rate at equal quality; less is smaller.</p>')
        curves = dict.fromkeys(name for rates in bd.values() for name in rates)
        rows = [[n, *(_told(bd[m.name].get(n), "+.1f") for m in measures)] for n in curves]
        parts.append(_table(["curve", *names], rows))
    parts.append('<h2>All points</h2><p class="soft narrow">The table scrolls sideways.</p>')
    parts.append(_table(["point", "bytes", "bits per weight", *names,
                         "encode s", "decode s", "CPU s"],
                        [_cells(row, measures) for row in result.rows]))  # fmt: skip
    parts.append(f'<p class="soft">{escape(about)}</p>')
    return _PAGE.replace("@TITLE@", escape(title)).replace("@BODY@", "\n".join(parts))


def _cells(row: Row, measures: Sequence[Measure]) -> list[str]:
    if row.status != OK:
        return [row.label, row.message]
    return [
        row.label, f"{row.file_bytes:,}", f"{row.bits_per_weight:.3f}",
        *(_told(m.value(row), ".4g") for m in measures),
        f"{row.encode_s:.2f}", f"{row.decode_s:.2f}", f"{row.cpu_s:.2f}",
    ]  # fmt: skip


def _told(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table without its empty columns; a row of two cells holds a message over the rest."""
    every = list(rows)
    whole = [row for row in every if len(row) == len(head)]
    shown = [n for n in range(len(head)) if not n or any(row[n] not in ("–", "") for row in whole)]
    lines = []
    for first, *rest in every:
        cells = [f"<td>{escape(rest[n - 1])}</td>" for n in shown[1:] if len(rest) == len(head) - 1]
        if len(rest) == 1 < len(head) - 1:
            cells = [f'<td class="bad" colspan="{len(shown) - 1}">{escape(rest[0])}</td>']
        lines.append(f"<tr><td>{escape(first)}</td>{''.join(cells)}</tr>")
    top = "".join(f"<th>{escape(head[n])}</th>" for n in shown)
    body = "\n".join(lines)
    return f'<div class="table"><table><thead><tr>{top}</tr></thead>{body}</table></div>'
