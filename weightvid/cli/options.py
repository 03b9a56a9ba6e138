"""Options that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, NoReturn

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
Force = Annotated[bool, typer.Option("--force", "-f", help="Replace an existing file.")]
Threads = Annotated[
    int, typer.Option("--threads", min=0, help="Frames decoded side by side; 0: one per core.")
]
ArchivePath = Annotated[Path, typer.Argument(metavar="ARCHIVE", help="The archive (.mp4).")]


def usage_error(message: str, option: str) -> NoReturn:
    """Refuse a wrong call; exit status 2."""
    raise typer.BadParameter(message, param_hint=option)
