"""What verbs print and share: tables and JSON on stdout, warnings and progress on stderr."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from dataclasses import asdict, is_dataclass
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

import typer

#: what typer raises for a wrong call, wherever it keeps click.
UsageError: Final[Any] = typer.BadParameter.__mro__[1]

if TYPE_CHECKING:
    from rich.console import Console

    from weightvid.archives import Location
    from weightvid.progress import Progress

#: where a verb writes to a pipe.
STDOUT: Final = ("-", "/dev/stdout")
#: exit statuses; a program that a signal ended has 128 and its number.
FAILED, USAGE, DAMAGED, MISSING, INTERRUPTED = 1, 2, 3, 4, 130
#: of the JSON objects, as docs/cli.schema.json describes them.
SCHEMA_VERSION: Final = 1
#: letters of a message.
_LINE: Final = 1000


def option(default: Any, text: str, *names: str, **more: Any) -> Any:
    """An option of a verb; ``...`` as its default: it must be given. A flag has no metavar."""
    return typer.Option(default, *names, help=text, **more)


def argument(metavar: str, text: str) -> Any:
    """An argument of a verb."""
    return typer.Argument(..., metavar=metavar, help=text)


def output_option(default: Any, text: str, metavar: str) -> Any:
    """The option that says where a verb writes."""
    return option(default, text, "--output", "-o", metavar=metavar)


#: addresses are of type str, because a Path would make one slash of the two in them.
ARCHIVE: Final = argument("ARCHIVE", "The archive (.mp4): a file or an address.")
ARCHIVE_OR_PIPE: Final = argument("ARCHIVE", "A file, an address, or - for a pipe.")
BASE: Final = option(
    [], "What ARCHIVE is an update to; of a chain of updates the oldest first.",
    "--base", "-b", metavar="ARCHIVE",
)  # fmt: skip
KEY: Final = option(None, "Public key of who must have signed it: PEM or OpenSSH.", metavar="KEY")
SIGNATURE: Final = option(None, "The signature, if it is in a file of its own.", metavar="FILE")
FORCE: Final = option(False, "Replace an existing file.", "--force", "-f")
JSON: Final = option(False, "Print one JSON object instead of a table.", "--json")


def named_after(source: str, ending: str) -> Path:
    """A default output: next to a file, in the current folder for an address.

    >>> named_after("models/m.safetensors", ".mp4").as_posix()
    'models/m.mp4'
    >>> named_after("hf://org/model-v1.5", ".mp4").as_posix()
    'model-v1.5.mp4'
    """
    from weightvid.checkpoint import is_url

    if is_url(source):
        from weightvid.remote import file_name

        name = file_name(source) or "model"
        # What a hub address or a folder names has no suffix, though it may have dots.
        known = is_checkpoint(name) or Path(name).suffix.lower() in (".mp4", ".json")
        return Path(f"{Path(name).stem if known else name}{ending}")
    path = Path(source)
    if path.is_dir():
        folder = Path(os.path.abspath(path))  # noqa: PTH100 - links stay as they are named
        name = folder.name.removesuffix(".mlpackage")
        return folder.with_name(f"{name or 'model'}{ending}")
    return path.with_name(f"{path.stem}{ending}")


def is_checkpoint(name: str) -> bool:
    """Whether a file is named as a kind of checkpoint is."""
    from weightvid.checkpoint import KINDS

    return any(Path(name).suffix.lower() in kind.suffixes for kind in KINDS)


def usage_error(message: str, option: str | None = None) -> NoReturn:
    """Refuse a wrong call; exit status 2."""
    raise typer.BadParameter(message, param_hint=option)


def check_archive_name(name: str) -> None:
    """Refuse to write an archive into what is named as a kind of checkpoint is."""
    if is_checkpoint(name):
        usage_error(f"an archive is an MP4 file: name it .mp4, not {name}", "--output")


def check_output(path: Path | str, inputs: Mapping[str, Path | str]) -> None:
    """Refuse to write over what is read; inputs by what they are."""
    from weightvid.atomic import is_source

    for what, source in inputs.items():
        if is_source(path, source):
            usage_error(f"{path} is {what} itself, or a part of it", "--output")


def check_function(text: str, option: str) -> str:
    """Refuse what is not the name of a function in a script or module."""
    place, _, name = text.rpartition(":")
    if not place or not name.isidentifier():
        usage_error(f"{text!r} is not of the form script.py:function", option)
    if place.endswith(".py") and not Path(place).is_file():
        usage_error(f"there is no file {place}", option)
    return text


@contextmanager
def others_on_stderr() -> Iterator[None]:
    """What models and functions print meanwhile, and programs that they run, goes to stderr."""
    with redirect_stdout(sys.stderr), ExitStack() as stack:
        with suppress(OSError):  # of a stream that is closed
            kept = os.dup(1)
            stack.callback(os.close, kept)
            stack.callback(os.dup2, kept, 1)
            os.dup2(2, 1)
        yield


def console(*, stderr: bool = False) -> Console:
    """A rich console that guesses no markup and no emoji in names."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else 160  # for a file or a pipe
    return Console(file=stream, highlight=False, markup=False, emoji=False, width=width)


def emit_json(record: Any, **more: Any) -> None:
    """Print one JSON object: a dataclass (or mapping) and further keys."""
    fields = asdict(record) if is_dataclass(record) and not isinstance(record, type) else record
    whole = {"schema": SCHEMA_VERSION, "ok": True, **fields, **more}
    # In ASCII: some terminals know nothing else, and lone surrogates in names need it, too.
    typer.echo(json.dumps(_plain(whole), allow_nan=False))


def emit_failure(error: BaseException, message: str, status: int) -> None:
    """Print the JSON object of a verb that failed."""
    code = getattr(error, "code", None)
    name, said = type(error).__name__, brief(message)
    failure = {"ok": False, "status": status, "error": name, "message": said}
    emit_json(failure, code=code if isinstance(code, str) else None)


def _plain(value: Any) -> Any:
    """JSON has no infinities; records become objects, tuples become lists."""
    if isinstance(value, float):
        return value if isfinite(value) else None
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def facts(rows: Sequence[tuple[str, str]]) -> None:
    """Print names and values in two columns; rows without a value are left out."""
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in rows:
        if value:
            table.add_row(printable(name), printable(value))
    console().print(table)


def tell(json: bool, record: Any, rows: Sequence[tuple[str, str]], **more: Any) -> None:
    """Print what a verb has done: one JSON object, or facts."""
    if json:
        emit_json(record, **more)
    else:
        facts(rows)


def tell_paths(json: bool, paths: Sequence[str], record: Mapping[str, Any]) -> None:
    """Print which files a verb has written: one JSON object, or a line for each."""
    if json:
        emit_json(record)
    for path in () if json else paths:
        typer.echo(printable(path))


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; columns whose title starts with ``>`` are aligned to the right."""
    from rich import box
    from rich.table import Table

    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for place, title in enumerate(columns):
        side: Any = "right" if title.startswith(">") else "left"
        # The first column is folded where the terminal is narrow; the others never are.
        made.add_column(title.removeprefix(">"), justify=side, no_wrap=place > 0, overflow="fold")
    for row in rows:
        made.add_row(*map(printable, row))
    console().print(made)


@contextmanager
def checked(source: Location, key: str | None, signature: str | None) -> Iterator[Location]:
    """An archive of which only what the owner of a key signed can be read; without a key, as is."""
    if key is None:
        if signature is not None:
            usage_error("whose signature? give the public key", "--key")
        yield source
        return
    from weightvid.sign import open_signed

    with open_signed(source, key, signature) as file:
        yield file


def printable(text: str) -> str:
    """Text without control characters and lone surrogates: names come from files."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def brief(message: str) -> str:
    """A message as one line of at most 1,000 letters: names in it may be thousands long."""
    line = printable(" ".join(message.split()))
    return line if len(line) <= _LINE else f"{line[: _LINE - 305]} ... {line[-300:]}"


def warn(message: str) -> None:
    """One line on stderr."""
    typer.echo(f"warning: {brief(message)}", err=True)


def note(message: str) -> None:
    """One line on stderr about how far the work is."""
    typer.echo(brief(message), err=True)


def on_terminal() -> bool:
    """Whether somebody watches: progress is bars then, and else a line for what takes long."""
    return sys.stderr.isatty()


def error(message: str) -> None:
    """One line on stderr about what makes the verb fail."""
    typer.echo(f"error: {brief(message)}", err=True)


@contextmanager
def progress_bars() -> Iterator[Callable[[Progress], None]]:
    """Progress bars on stderr, one for each stage, where stderr is a terminal."""
    if not on_terminal():
        yield lambda _: None
        return
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    percent = TextColumn("{task.percentage:>3.0f} %")
    stage, rates = TextColumn("{task.description:>9}"), TextColumn("{task.fields[rate]}")
    columns = (stage, BarColumn(), percent, rates, TimeRemainingColumn())
    bars = Bars(*columns, console=console(stderr=True))
    tasks: dict[str, Any] = {}

    def report(progress: Progress) -> None:
        if progress.stage not in tasks:
            tasks[progress.stage] = bars.add_task(progress.stage, total=progress.total, rate="")
        task = bars.tasks[tasks[progress.stage]]
        speed = task.finished_speed or task.speed or 0.0
        rate = f"{speed:.3g} {progress.unit}/s" if speed < 1e5 else f"{speed / 1e6:.1f} M/s"
        bars.update(task.id, completed=progress.done, total=progress.total, rate=rate)

    with bars:
        yield report


def some(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def size(number: float) -> str:
    """Bytes for people.

    >>> size(999), size(9_416_741)
    ('999 B', '9.42 MB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if number < 999.5 or unit == "GB":
            break
        number /= 1000
    return f"{number:.0f} {unit}" if unit == "B" else f"{number:.3g} {unit}"


def db(value: float | None) -> str:
    """An SQNR; no noise has none."""
    return "no error" if value is None or value == float("inf") else f"{value:.2f} dB"


def number(value: float | None, digits: int) -> str:
    """A number with so many significant digits; nothing for None."""
    return "" if value is None else f"{value:.{digits}g}"
