"""The command line. Verbs live in one file each, which is imported when the verb is called."""

try:
    from weightvid.cli.app import main
except ModuleNotFoundError as error:
    if error.name not in ("typer", "rich"):
        raise
    raise SystemExit(
        f"error: the command line needs {error.name}: pip install typer rich"
    ) from None

__all__ = ["main"]
