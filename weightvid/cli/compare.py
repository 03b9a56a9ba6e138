"""``weightvid compare``: codecs, presets and quantizers side by side."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer

from weightvid.cli import output
from weightvid.cli.compare_table import SORTS, show
from weightvid.cli.options import usage_error

if TYPE_CHECKING:
    from weightvid.compare.analysis import At
    from weightvid.compare.report.results import Results
    from weightvid.compare.row import Row
    from weightvid.compare.run import Comparison
    from weightvid.compare.sweep import Sweep

_LIST = "NAME,..."
_NUMERIC = frozenset({"rates", "qp", "crf"})


def compare(
    model: Annotated[
        Path,
        typer.Argument(metavar="MODEL", help="A checkpoint, as for [bold]weightvid pack[/bold]."),
    ],
    codecs: Annotated[
        str | None,
        typer.Option(metavar=_LIST, help="Codecs; all or none. Default: x265,x264,svtav1."),
    ] = None,
    presets: Annotated[
        str | None,
        typer.Option(metavar=_LIST, help="Presets, where a codec has them. Default: its own."),
    ] = None,
    quantizers: Annotated[
        str | None,
        typer.Option(
            metavar=_LIST, help="weightvid's quantizers. Default: pack,sqnr,uniform,trellis8."
        ),
    ] = None,
    rates: Annotated[
        str | None,
        typer.Option(metavar="K,...", help="Step factors. Default: 0.065,0.12,0.18,0.33,0.5."),
    ] = None,
    qp: Annotated[
        str | None, typer.Option(metavar="N,...", help="QPs, instead of each codec's own.")
    ] = None,
    crf: Annotated[
        str | None, typer.Option(metavar="N,...", help="CRFs; without them, none is measured.")
    ] = None,
    formats: Annotated[
        str | None,
        typer.Option(
            metavar=_LIST, help="Pixel formats, where a codec takes them: yuv420p10le, gray, ..."
        ),
    ] = None,
    inter: Annotated[
        bool,
        typer.Option("--inter", help="Also predict frames from those of like layers."),
    ] = False,
    baselines: Annotated[
        str | None, typer.Option(metavar=_LIST, help="Baselines; all (default) or none.")
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            metavar="STATS",
            help="Statistics that [bold]weightvid calibrate[/bold] wrote for this model: a curve "
            "of calibrated archives.",
        ),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="LABEL", help="Only this point or curve. May be repeated."),
    ] = None,
    evaluate: Annotated[
        str | None,
        typer.Option(
            "--eval",
            metavar="SCRIPT:FUNCTION",
            help="A function that takes a dict of tensors and returns a number, logits, or logits "
            "and labels.",
        ),
    ] = None,
    lower: Annotated[
        bool, typer.Option("--lower-is-better", help="The function's number is a loss.")
    ] = False,
    anchor: Annotated[
        str | None,
        typer.Option(metavar="CURVE", help="BD-rates are taken against it. Default: weightvid."),
    ] = None,
    at: Annotated[
        list[str] | None,
        typer.Option(
            metavar="POINT",
            help="Show each codec's best setting there: sqnr=22, metric=91.0, kl=0.02, "
            "size=110kB, bpw=3.5. May be repeated.",
        ),
    ] = None,
    sort: Annotated[
        str, typer.Option(metavar="COLUMN", help=f"Sort the table: {', '.join(SORTS)}.")
    ] = "curve",
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder for results, plots and the report.")
    ] = Path("compare"),
    jobs: Annotated[
        int,
        typer.Option(
            "--jobs",
            "-j",
            min=1,
            help="Points side by side; with more than one, timings are marked as shared.",
        ),
    ] = 1,
    ffmpeg: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="Program for libaom, VVC, JPEG XL, kvazaar and rav1e."),
    ] = None,
    nncodec: Annotated[
        str | None, typer.Option(metavar="PYTHON", help="A Python that has NNCodec.")
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where finished points are kept between runs."),
    ] = None,
    refresh: Annotated[
        bool, typer.Option("--refresh", help="Measure again what is known.")
    ] = False,
    json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object for each point as it finishes.")
    ] = False,
) -> None:
    """Compare codecs, presets and quantizers on a model, with the plain baselines.

    Every point is decoded and checked. What is finished is kept: run it again, and it goes on.
    The script of --eval is run as Python code: call only what you trust.

    [bold]weightvid compare model.safetensors[/bold]
    [bold]weightvid compare model.safetensors --eval script.py:logits --at kl=0.02[/bold]
    [bold]weightvid compare model.safetensors --codecs all --quantizers none --rates 0.18[/bold]
    """
    from weightvid.compare.analysis import check_anchor, parse_at
    from weightvid.compare.cache import make_folder
    from weightvid.compare.report import write_all
    from weightvid.compare.run import Comparison, Options
    from weightvid.errors import WeightvidError

    if sort not in SORTS:
        usage_error(f"unknown column {sort!r}; known: {', '.join(SORTS)}", "--sort")
    try:
        points = [parse_at(text) for text in at or ()]
        given = {
            "codecs": codecs, "presets": presets, "quantizers": quantizers, "rates": rates,
            "qp": qp, "crf": crf, "formats": formats, "baselines": baselines,
        }  # fmt: skip
        sweep = sweep_of(given, inter)
        sweep.settings()
    except WeightvidError as error:
        raise typer.BadParameter(str(error)) from None
    make_folder(out)
    options = Options(
        sweep, tuple(only or ()), evaluate, lower, ffmpeg, nncodec, jobs, cache, refresh,
        calibration,
    )  # fmt: skip
    began = perf_counter()
    comparison = Comparison(model, options)
    curves = [setting.series for setting in comparison.settings[1:]]
    if anchor is not None:
        check_anchor(anchor, tuple(dict.fromkeys(curves)))
    rows = _measure(comparison, json)
    results = _results(comparison, rows, anchor, perf_counter() - began)
    written = write_all(out, results)
    if not json:
        show(results, sort)
        for point in points:
            _show_at(results, point)
        output.facts([(name, str(path)) for name, path in written.items()])
    for curve, message in dict.fromkeys((row.series, row.message) for row in results.missing):
        output.warn(f"{curve}: {message}")
    for row in results.failed:
        output.error(f"{row.label}: {row.message}")
    if results.failed:
        raise typer.Exit(1)


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _numbers(text: str, option: str) -> tuple[float, ...]:
    try:
        return tuple(float(name) for name in _names(text))
    except ValueError:
        usage_error(f"{text!r} is no list of numbers", f"--{option}")


def sweep_of(given: Mapping[str, str | None], inter: bool) -> Sweep:
    """What a command line asks for.

    Parameters
    ----------
    given : mapping of str to str or None
        Comma-separated lists by the name of the option.
    inter : bool
    """
    from weightvid.compare.sweep import Sweep

    chosen: dict[str, Any] = {}
    for name, text in given.items():
        if text is not None:
            chosen[name] = _numbers(text, name) if name in _NUMERIC else _names(text)
    return Sweep(inter=inter, **chosen)


def _measure(comparison: Comparison, json: bool) -> list[Row]:
    """All rows, told as they come."""
    found = []
    rows = comparison.rows()
    try:
        with _progress(len(comparison.settings)) as advance:
            for row in rows:
                found.append(row)
                if json:
                    output.emit_json(row.record())
                advance(row.label)
    finally:
        rows.close()  # type: ignore[attr-defined]
    return found


class _Advance(Protocol):
    def __call__(self, label: str) -> None: ...


@contextmanager
def _progress(total: int) -> Iterator[_Advance]:
    """A bar with the time that is left, on a terminal; else nothing."""
    if not sys.stderr.isatty():
        yield lambda label: None
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns: Sequence[Any] = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=output.console(stderr=True), transient=True) as bars:
        bar = bars.add_task("points", total=total)

        def advance(label: str) -> None:
            bars.update(bar, advance=1, description=output.printable(label))

        yield advance


def _results(
    comparison: Comparison, rows: list[Row], anchor: str | None, seconds: float
) -> Results:
    from weightvid.compare.analysis import series
    from weightvid.compare.report.results import Results, shown

    subject, options = comparison.subject, comparison.options
    order = {setting.label: place for place, setting in enumerate(comparison.settings)}
    rows.sort(key=lambda row: order[row.label])
    if anchor is None:
        known = [name for name, points in series(rows).items() if len(points) > 1]
        anchor = "weightvid" if "weightvid" in known else next(iter(known), "")
    return Results(
        {
            "path": subject.path,
            "sha256": subject.sha256,
            "weights": subject.weights,
            "tensors": len(subject.names),
        },
        comparison.machine,
        shlex.join(["weightvid", *sys.argv[1:]]),
        tuple(shown(rows)),
        options.evaluation,
        options.lower_is_better,
        anchor,
        seconds,
    )


def _show_at(results: Results, at: At) -> None:
    from weightvid.compare.analysis import best_at

    found = best_at(results.rows, at, results.lower_is_better)
    output.console().print(f"best of each codec at {at.kind} {at.value:g}:")
    if not found:
        output.console().print("  none reaches it")
        return
    output.table(
        ("point", ">bytes", ">bpw", ">SQNR dB", ">metric", ">KL"),
        [
            (
                row.label,
                output.count(row.file_bytes or 0),
                output.number(row.bits_per_weight, 4),
                output.number(row.sqnr_db, 4),
                output.number(row.metric, 4),
                output.number(row.kl, 3),
            )
            for row in found
        ],
    )
    for row in found:
        # Not in the table: a command that is cut or folded cannot be copied.
        typer.echo(f"  {output.printable(row.label)}:\n    {output.printable(row.command)}")
    typer.echo()
