"""The application: its verbs, and how every failure ends."""

import os
import signal
import sys
from importlib import import_module
from types import FrameType
from typing import Any, Final, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from weightvid.cli import output
from weightvid.cli.output import DAMAGED, FAILED, INTERRUPTED, MISSING, USAGE, UsageError
from weightvid.version import __version__

#: in the order of the help.
VERBS: Final = (
    *("pack", "unpack", "apply", "inspect", "verify", "fetch", "sign", "preview"),
    *("calibrate", "compare", "export-int8", "device", "cache", "demo"),
)


class _Verb(TyperCommand):
    """Refuses what is empty, as a shell's variable that is not set, and a folder elsewhere."""

    def invoke(self, ctx: Any) -> Any:
        for param in self.params:
            given = ctx.get_parameter_source(param.name).name == "COMMANDLINE"
            value = ctx.params.get(param.name)
            if given and isinstance(value, str) and not value.strip():
                output.usage_error("the value is empty", param.opts[0])
            if "--output" in param.opts and str(value) in output.STDOUT and ctx.info_name != "pack":
                output.usage_error("only pack writes to a pipe; name a file", "--output")
            if param.metavar == "FOLDER" and "://" in (value or ""):
                output.usage_error("it is an address: name a folder, and upload it", param.opts[0])
        return super().invoke(ctx)


class _Verbs(TyperGroup):
    """Imports a verb when it is called, and turns what it raises into one line and a status."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in VERBS:
            return None
        name = cmd_name.replace("-", "_")
        verb = getattr(import_module(f"weightvid.cli.{name}"), name)
        made = typer.Typer(rich_markup_mode="rich", add_completion=False)
        made.command(cmd_name, cls=_Verb, no_args_is_help=cmd_name not in ("demo", "cache"))(verb)
        return get_command(made)

    def invoke(self, ctx: Any) -> Any:
        from weightvid.errors import WeightvidError

        json = "--json" in ctx.args
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except BrokenPipeError:
            # Whoever read our output has gone (`| head`): nobody is left to tell.
            _stop_writing()
            raise typer.Exit(FAILED) from None
        except UsageError as error:
            if json:
                output.emit_failure(error, error.format_message(), USAGE)
            raise
        except WeightvidError as error:
            _fail(error, str(error), json)
        except OSError as error:
            try:
                sys.stdout.flush()
            except OSError:
                _stop_writing()
            named = f"{error.filename}: " if error.filename else ""
            _fail(error, f"{named}{error.strerror or error}", json)
        except MemoryError as error:
            _fail(error, "out of memory; fewer --jobs need less", json)
        except KeyboardInterrupt as error:
            status = _interrupted(error)
            if json:
                output.emit_failure(error, "interrupted", status)
            raise typer.Exit(status) from None
        return result


def _stop_writing() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(error: BaseException, message: str, json: bool) -> NoReturn:
    status = _status(error)
    if json:
        try:
            output.emit_failure(error, message, status)
        except OSError:
            _stop_writing()
    output.error(message)
    raise typer.Exit(status) from None


def _status(error: BaseException) -> int:
    """Exit status that tells scripts whether another download may help."""
    from weightvid import errors

    # A package, a key or a base is what is wrong, not the archive.
    own = isinstance(error.__context__, ImportError) or isinstance(error, errors.KeyFileError)
    if own or getattr(error, "code", "") == "base":
        return FAILED
    if isinstance(error, (errors.FormatError, errors.RepairError, errors.SignatureError)):
        return DAMAGED
    absent = isinstance(error.__context__, FileNotFoundError)
    absent = absent or isinstance(error, (FileNotFoundError, errors.RemoteError))
    return MISSING if absent else FAILED


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


@app.callback()
def root(
    version: bool = output.option(
        False, "Print the version and exit.", "--version", callback=_show_version, is_eager=True
    ),
) -> None:
    """Neural-network weights as HEVC video: small archives, exact integers, a tiny loader.

    A first round trip:

    [bold]weightvid pack model.safetensors -o model.mp4[/bold]
    [bold]weightvid inspect model.mp4[/bold]
    [bold]weightvid unpack model.mp4 -o restored.safetensors[/bold]
    """


def _terminate(number: int, frame: FrameType | None) -> None:
    # Not SystemExit: an evaluation that calls sys.exit() has failed, and the work goes on.
    raise KeyboardInterrupt(128 + number)


def _interrupted(error: KeyboardInterrupt) -> int:
    """Say it; the exit status."""
    typer.echo("interrupted", err=True)
    return int(error.args[0]) if error.args else INTERRUPTED


def main() -> None:
    """Entry point of the ``weightvid`` command."""
    # Leave through the same door as Ctrl-C, so that half-written files are removed; nohup stays.
    for name in ("SIGTERM", "SIGHUP", "SIGQUIT"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _terminate)
    # A closed stream would be None, and its number that of the next file, an archive.
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))
        # Names of tensors may have letters that the terminal has not.
        getattr(sys, name).reconfigure(errors="backslashreplace")
    try:
        app(prog_name="weightvid")
    except KeyboardInterrupt as error:
        sys.exit(_interrupted(error))
    except SystemExit as done:  # typer makes 130 of any signal
        cause = getattr(done.__context__, "__cause__", None)
        sys.exit(_interrupted(cause) if isinstance(cause, KeyboardInterrupt) else done.code)
    except OSError as error:  # the help cannot be written
        _stop_writing()
        sys.exit(f"error: {error.strerror}")
