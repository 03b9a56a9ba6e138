"""What verbs print: tables and JSON on stdout, warnings and progress on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from math import isfinite
from typing import TYPE_CHECKING, Any

import typer

from weightvid.progress import Progress, Report, quiet

if TYPE_CHECKING:
    from rich.console import Console

    from weightvid.salvage import Defect

#: width of a table that goes to a file or a pipe.
_PLAIN_WIDTH = 160
#: workers of a cluster that have a line of their own in the progress.
_SHOWN_WORKERS = 16


def console(*, stderr: bool = False) -> Console:
    """A rich console that guesses no markup and no emoji in names."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else _PLAIN_WIDTH
    return Console(file=stream, highlight=False, markup=False, emoji=False, width=width)


def emit_json(record: Any, **more: Any) -> None:
    """Print one JSON object: a dataclass (or mapping) and further keys."""
    fields = asdict(record) if is_dataclass(record) and not isinstance(record, type) else record
    text = json.dumps(_plain({**fields, **more}), ensure_ascii=False, allow_nan=False)
    # Names may hold lone surrogates, which no UTF-8 stream takes.
    typer.echo(text.encode("utf-8", "backslashreplace").decode())


def _plain(value: Any) -> Any:
    """JSON has no infinities; tuples become lists by themselves."""
    if isinstance(value, float):
        return value if isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def facts(rows: Sequence[tuple[str, str]]) -> None:
    """Print names and values in two columns."""
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, printable(value))
    console().print(table)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; columns whose title starts with ``>`` are aligned to the right.

    The first column is folded where the terminal is narrow; the others never are.
    """
    from rich import box
    from rich.table import Table

    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for place, title in enumerate(columns):
        made.add_column(
            title.removeprefix(">"),
            justify="right" if title.startswith(">") else "left",
            no_wrap=place > 0,
            overflow="fold",
        )
    for row in rows:
        made.add_row(*map(printable, row))
    console().print(made)


def printable(text: str) -> str:
    """Text without control characters and lone surrogates: names come from files."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def warn(message: str) -> None:
    """One line on stderr."""
    typer.echo(f"warning: {printable(message)}", err=True)


def error(message: str) -> None:
    """One line on stderr about what makes the verb fail."""
    typer.echo(f"error: {printable(' '.join(message.split()))}", err=True)


def cause(defect: Defect) -> str:
    """A defect in words; the names that an incomplete archive lacks are told elsewhere."""
    if defect.code == "truncated":
        return f"the archive is cut short (at byte {defect.offset}) [truncated]"
    return defect.message


def some(names: Sequence[str], limit: int = 8) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def size(number: float) -> str:
    """Bytes for people.

    Examples
    --------
    >>> size(999), size(9_416_741)
    ('999 B', '9.42 MB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if number < 999.5 or unit == "GB":
            break
        number /= 1000
    return f"{number:.0f} {unit}" if unit == "B" else f"{number:.3g} {unit}"


def count(number: int) -> str:
    """A number with its thousands set apart.

    Examples
    --------
    >>> count(22713728)
    '22,713,728'
    """
    return f"{number:,}"


def db(value: float | None) -> str:
    """An SQNR; no noise has none."""
    return "no error" if value is None else f"{value:.2f} dB"


def number(value: float | None, digits: int) -> str:
    """A number with so many significant digits; nothing for None.

    Examples
    --------
    >>> number(0.00318908, 3), number(28.556, 2), number(None, 2)
    ('0.00319', '29', '')
    """
    return "" if value is None else f"{value:.{digits}g}"


def speed(weights: float | None, size_bytes: float | None) -> str:
    """Weights and bytes per second; nothing while they are unknown.

    Examples
    --------
    >>> speed(4_940_000.0, 19_760_000.0), speed(None, None)
    ('4.9 M weights/s, 19.8 MB/s', '')
    """
    if not weights:
        return ""
    shown = f"{weights / 1e6:.1f} M weights/s"
    return f"{shown}, {size(size_bytes)}/s" if size_bytes else shown


@contextmanager
def progress_bars() -> Iterator[Report]:
    """Progress bars on stderr, one for each stage, where stderr is a terminal.

    Each shows weights and bytes per second and the time left; the workers of a cluster have a
    line of their own.
    """
    if not sys.stderr.isatty():
        yield quiet
        return
    from rich.progress import BarColumn, Task, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars
    from rich.text import Text

    class TimeLeft(TimeRemainingColumn):
        """Nothing for workers: nobody knows which part of the rest will be theirs."""

        def render(self, task: Task) -> Text:
            """The column of one line."""
            return Text() if task.fields["worker"] else super().render(task)

    bars = Bars(
        TextColumn("{task.description:>8}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TextColumn("{task.fields[rate]}"),
        TimeLeft(),
        console=console(stderr=True),
        # What is slow comes in fits: the time left is told from the last minutes.
        speed_estimate_period=180,
    )
    tasks: dict[str, Any] = {}

    def show(name: str, progress: Progress, worker: bool = False) -> None:
        if name not in tasks:
            tasks[name] = bars.add_task(name, total=progress.total, rate="", worker=worker)
        task = bars.tasks[tasks[name]]
        weights = task.finished_speed or task.speed
        each = progress.done_bytes / progress.done if progress.done else 0.0
        if progress.stage == "download":
            rate = "" if not weights else f"{weights / 1e6:.1f} MB/s"
        elif progress.unit != "weights":
            rate = "" if not weights else _rate(weights, progress.unit)
        else:
            rate = speed(weights, weights and weights * each)
        bars.update(task.id, completed=progress.done, total=progress.total, rate=rate)

    def report(progress: Progress) -> None:
        show(progress.stage, progress)
        for share in progress.workers[:_SHOWN_WORKERS]:
            show(printable(share.name), Progress(share.name, share.done, progress.total), True)

    with bars:
        yield report


def _rate(speed: float, unit: str) -> str:
    return f"{speed:.1f} {unit}/s" if speed >= 1 else f"{1 / speed:.1f} s each"
