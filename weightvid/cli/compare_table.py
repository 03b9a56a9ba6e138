"""The table of a comparison on a terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import inf
from typing import TYPE_CHECKING, Any, Final

from weightvid.cli import output

if TYPE_CHECKING:
    from weightvid.compare.report.results import Results
    from weightvid.compare.row import Row

_MIB: Final = 1 << 20


def _falling(field: str) -> Callable[[Row], Any]:
    """Larger first."""
    return lambda row: -inf if getattr(row, field) is None else -getattr(row, field)


def _rising(field: str) -> Callable[[Row], Any]:
    """Smaller first; none last."""
    return lambda row: inf if getattr(row, field) is None else getattr(row, field)


#: columns that the table can be sorted by.
SORTS: Final[Mapping[str, Callable[[Row], Any] | None]] = {
    "curve": None,
    "bytes": _rising("file_bytes"),
    "sqnr": _falling("sqnr_db"),
    "worst": _falling("worst_sqnr_db"),
    "metric": _falling("metric"),
    "kl": _rising("kl"),
    "cosine": _rising("cosine_loss"),
    "agreement": _falling("agreement"),
    "encode": _rising("encode_s"),
    "decode": _rising("decode_s"),
    "memory": _rising("encode_peak_bytes"),
}


def show(results: Results, sort: str = "curve") -> None:
    """Print the table; points on the Pareto front are marked."""
    rows = [row for row in results.rows if row.ok]
    key = SORTS[sort]
    if key is not None:
        rows.sort(key=key)
    judged = any((row.metric, row.kl, row.cosine_loss) != (None, None, None) for row in rows)
    unit = any(row.cosine_loss is not None for row in rows)
    columns = ["point", "", ">bytes", ">bpw", ">SQNR dB", ">worst"]
    columns += [">metric", ">1-cos" if unit else ">KL", ">agree"] if judged else []
    columns += [">enc M/s", ">all", ">dec M/s", ">all", ">MiB"]
    output.table(columns, [_cells(row, results, judged) for row in rows])
    shared = any(row.timing == "shared" for row in rows)
    notes = ["* no other point is smaller and better"]
    notes += [f"(by {results.measures[0].title})"] if results.measures else []
    notes += ["; speeds are shared: points ran side by side"] if shared else []
    output.console().print(" ".join(notes))
    _show_bd(results)


def _cells(row: Row, results: Results, judged: bool) -> list[str]:
    cells = [
        row.label,
        "*" if row.label in results.front else "",
        output.count(row.file_bytes or 0),
        output.number(row.bits_per_weight, 4),
        "exact" if row.exact else output.number(row.sqnr_db, 4),
        "" if row.exact else output.number(row.worst_sqnr_db, 4),
    ]
    if judged:
        agree = None if row.agreement is None else 100 * row.agreement
        cells += [
            output.number(row.metric, 4),
            output.number(row.kl if row.cosine_loss is None else row.cosine_loss, 3),
            "" if agree is None else f"{agree:.1f}",
        ]
    speeds = (row.encode_s, row.encode_all_s, row.decode_s, row.decode_all_s)
    cells += [_speed(row.rate(seconds)) for seconds in speeds]
    peak = row.encode_peak_bytes
    return [*cells, "" if peak is None else f"{peak / _MIB:.0f}"]


def _speed(weights_per_s: float | None) -> str:
    return "" if weights_per_s is None else f"{weights_per_s / 1e6:.3g}"


def _show_bd(results: Results) -> None:
    if not results.bd:
        return
    output.console().print(f"BD-rate against {results.anchor}, % (negative: smaller):")
    names = [quality.name for quality in results.measures]
    rows = []
    for name, each in results.bd.items():
        cells = [name]
        for measure in names:
            bd = each[measure]
            cells.append(bd.reason if bd.percent is None else f"{bd.percent:+.1f}")
        rows.append(cells)
    output.table(["curve", *(f">over {name}" for name in names)], rows)
