"""The application: its verbs, and how every failure ends."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from weightvid.cli import calibrate, compare, demo, inspect, output, pack, preview, unpack, verify
from weightvid.errors import WeightvidError
from weightvid.version import __version__

#: what a shell reports for a program that Ctrl-C ended.
INTERRUPTED = 130
TERMINATED = 143


class _Guard(TyperGroup):
    """Turns what a verb raises into one line on stderr and an exit status."""

    def invoke(self, ctx: Any) -> Any:
        """Run the verb."""
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except BrokenPipeError:
            # Whoever read our output has gone (`| head`): nobody is left to tell.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None
        except WeightvidError as error:
            _fail(str(error))
        except OSError as error:
            named = f"{error.filename}: " if error.filename else ""
            _fail(f"{named}{error.strerror or error}")
        except MemoryError:
            _fail("out of memory; fewer --jobs or --threads need less")
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(INTERRUPTED) from None
        return result


def _fail(message: str) -> NoReturn:
    output.error(message)
    raise typer.Exit(1) from None


app = typer.Typer(
    cls=_Guard,
    name="weightvid",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
)
app.command("pack", no_args_is_help=True)(pack.pack)
app.command("unpack", no_args_is_help=True)(unpack.unpack)
app.command("inspect", no_args_is_help=True)(inspect.inspect)
app.command("verify", no_args_is_help=True)(verify.verify)
app.command("preview", no_args_is_help=True)(preview.preview)
app.command("calibrate", no_args_is_help=True)(calibrate.calibrate)
app.command("compare", no_args_is_help=True)(compare.compare)
app.command("demo")(demo.demo)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"weightvid {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Neural-network weights as HEVC video: small archives, exact integers, a tiny loader.

    A first round trip:

    [bold]weightvid pack model.safetensors -o model.mp4[/bold]
    [bold]weightvid inspect model.mp4[/bold]
    [bold]weightvid unpack model.mp4 -o restored.safetensors[/bold]
    """


def _terminate(number: int, frame: FrameType | None) -> None:
    raise SystemExit(TERMINATED)


def main() -> None:
    """Entry point of the ``weightvid`` command."""
    # Leave through the same door as Ctrl-C, so that half-written files are removed.
    signal.signal(signal.SIGTERM, _terminate)
    try:
        app(prog_name="weightvid")
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        sys.exit(INTERRUPTED)
