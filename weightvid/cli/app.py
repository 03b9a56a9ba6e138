"""The application: its verbs, and how every failure ends."""

from __future__ import annotations

import os
import signal
import sys
from importlib import import_module
from types import FrameType
from typing import Any, Final, NoReturn

import typer
from typer.core import TyperGroup
from typer.main import get_command

from weightvid.cli import output
from weightvid.version import __version__

#: in the order of the help.
VERBS: Final = (
    "pack", "unpack", "inspect", "verify", "preview", "calibrate", "compare", "device", "demo",
)  # fmt: skip
#: what a shell reports for programs that Ctrl-C and kill ended.
INTERRUPTED, TERMINATED = 130, 143


class _Verbs(TyperGroup):
    """Imports a verb when it is called, and turns what it raises into one line and a status."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Names of the verbs."""
        return list(VERBS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Command of a verb."""
        if cmd_name not in VERBS:
            return None
        verb = getattr(import_module(f"weightvid.cli.{cmd_name}"), cmd_name)
        made = typer.Typer(rich_markup_mode="rich", add_completion=False)
        made.command(cmd_name, no_args_is_help=cmd_name != "demo")(verb)
        return get_command(made)

    def invoke(self, ctx: Any) -> Any:
        """Run the verb."""
        from weightvid.errors import WeightvidError

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
            _fail("out of memory; fewer --jobs need less")
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(INTERRUPTED) from None
        return result


def _fail(message: str) -> NoReturn:
    output.error(message)
    raise typer.Exit(1) from None


app = typer.Typer(
    cls=_Verbs,
    name="weightvid",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"weightvid {__version__}")
        raise typer.Exit


_VERSION = output.option(
    False, "Print the version and exit.", "--version", callback=_show_version, is_eager=True
)


@app.callback()
def root(version: bool = _VERSION) -> None:
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
