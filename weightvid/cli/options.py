"""Options that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, NoReturn

import typer

_SUFFIXES = frozenset(
    {".safetensors", ".pt", ".pth", ".th", ".bin", ".npz", ".gguf", ".onnx", ".mp4", ".json"}
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
Force = Annotated[bool, typer.Option("--force", "-f", help="Replace an existing file.")]
Threads = Annotated[
    int, typer.Option("--threads", min=0, help="Frames decoded side by side; 0: one per core.")
]
TrustInputs = Annotated[
    bool,
    typer.Option(
        "--trust-inputs",
        help="The example inputs are of the kind that the model is used on. Models with BatchNorm "
        "know by themselves; for others, steps follow measured losses only then.",
    ),
]
#: a str, because a Path would make one slash of the two in an address.
ArchivePath = Annotated[
    str, typer.Argument(metavar="ARCHIVE", help="The archive (.mp4): a file or an address.")
]


def named_after(source: str, ending: str) -> Path:
    """A default output: beside a file, in the current folder for an address.

    Examples
    --------
    >>> named_after("models/m.safetensors", ".mp4").as_posix()
    'models/m.mp4'
    >>> named_after("hf://org/model-v1.5", ".mp4").as_posix()
    'model-v1.5.mp4'
    """
    from weightvid.remote import file_name, is_url

    if is_url(source):
        name = file_name(source) or "model"
        # What a hub address or a folder names has no suffix, though it may have dots.
        known = Path(name).suffix.lower() in _SUFFIXES
        return Path(f"{Path(name).stem if known else name}{ending}")
    path = Path(source)
    if path.is_dir():
        folder = path.resolve()
        return folder.with_name(f"{folder.name or 'model'}{ending}")
    return path.with_name(f"{path.stem}{ending}")


def usage_error(message: str, option: str) -> NoReturn:
    """Refuse a wrong call; exit status 2."""
    raise typer.BadParameter(message, param_hint=option)
