"""Checkpoints in and out: one reader and one writer per file kind.

To add a kind: write its module (``Reader`` and ``Writer``), add a row to `KINDS`, and say in
`_recognise` how it begins. The module is imported when a file of that kind is opened: only torch
files need torch, and only addresses what lies in :mod:`weightvid.checkpoint.download`.
"""

from __future__ import annotations

import os
import re
import zipfile
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Final, TypeGuard, cast

from weightvid.checkpoint import base
from weightvid.checkpoint.base import CheckpointReader, CheckpointWriter, Contents
from weightvid.errors import CheckpointError, OutputError
from weightvid.loader import TensorSpec
from weightvid.progress import Report, quiet

__all__ = [
    "KINDS",
    "CheckpointReader",
    "CheckpointWriter",
    "Contents",
    "Kind",
    "TensorSpec",
    "create_checkpoint",
    "from_mapping",
    "is_url",
    "kind_for_output",
    "open_checkpoint",
]

from_mapping: Final = base.ArrayReader

_ZIP_STARTS: Final = (b"PK\x03\x04", b"PK\x05\x06")
#: two letters at least: one is a drive of Windows.
_URL: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://.")


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of checkpoint."""

    #: what ``create_checkpoint(kind=...)`` takes, and what messages call it.
    name: str
    label: str
    #: lower case, with the dot.
    suffixes: tuple[str, ...]
    #: of this package; imported when a file of this kind is opened.
    module: str
    #: roles of the side files that a checkpoint of this kind takes back.
    roles: tuple[str, ...] = ()
    #: handed to ``Writer``, where one module writes several kinds; those are never read.
    variant: str = ""

    def open(self, path: Path) -> CheckpointReader:
        """Open a file of this kind."""
        module = import_module(f"weightvid.checkpoint.{self.module}")
        with base.explained(f"cannot read {path}"):
            return cast(CheckpointReader, module.Reader(path))

    def create(self, path: Path, contents: Contents, *, force: bool) -> CheckpointWriter:
        """Start writing a file of this kind."""
        module = import_module(f"weightvid.checkpoint.{self.module}")
        variant = {"variant": self.variant} if self.variant else {}
        return cast(CheckpointWriter, module.Writer(path, contents, force=force, **variant))


KINDS: Final[tuple[Kind, ...]] = (
    Kind("safetensors", "safetensors", (".safetensors",), "safetensors"),
    Kind("torch", "PyTorch", (".pt", ".pth", ".th", ".bin"), "torch_file"),
    Kind("npz", "NumPy npz", (".npz",), "npz"),
    Kind("gguf", "GGUF", (".gguf",), "gguf", ("gguf-metadata",)),
    Kind("onnx", "ONNX", (".onnx",), "onnx_file", ("onnx-graph",)),
    Kind("tflite", "LiteRT", (".tflite",), "tflite_file", ("tflite-graph",)),
    Kind(
        *("coreml", "Core ML package", (".mlpackage",), "coreml"), ("coreml-file", "coreml-weights")
    ),
    Kind("nnc", "MPEG NNC", (".nnc",), "nnc"),
    Kind("folder", "Hugging Face folder", (), "folder", ("file", "weights")),
    Kind("gguf-f32", "GGUF", (), "gguf", ("gguf-metadata",), "F32"),
    Kind("gguf-q8_0", "GGUF", (), "gguf", ("gguf-metadata",), "Q8_0"),
)

#: offset, first bytes there in lower case, what the file is and what to do about it.
_FOREIGN: Final[tuple[tuple[int, bytes, str], ...]] = (
    (0, b"\x89hdf\r\n\x1a\n", "an HDF5 (Keras) file; this kind is not supported (yet)"),
    (0, b"\x93numpy", "a single NumPy array without a name; save it with numpy.savez"),
    (4, b"ftyp", "an MP4 file; weightvid archives are read by weightvid.loader and `unpack`"),
    (0, b"version https://git-lfs", "a Git LFS pointer, not the file itself; run `git lfs pull`"),
    (0, b"\x1f\x8b", "a gzip file; decompress it first"),
    (257, b"ustar", "a tar archive; extract it first"),
    (0, b"<!doctype", "a web page; the download went wrong"),
    (0, b"<html", "a web page; the download went wrong"),
)


def open_checkpoint(path: str | os.PathLike[str], progress: Report = quiet) -> CheckpointReader:
    """Open a checkpoint; its content decides the kind. No weight is read yet where that can be.

    Parameters
    ----------
    path : str or PathLike
        A file, a Hugging Face folder, or an address (``hf://org/model[@revision]``,
        ``https://...``, ``s3://...``): what lies there is downloaded first.
    progress : callable
        Receives the stage ``download``, counted in bytes.

    Raises
    ------
    CheckpointError, RemoteError
        No checkpoint of a known kind, or a damaged one; or it cannot be read from its address.
    """
    if is_url(path):
        from weightvid.checkpoint.download import open_downloaded

        return open_downloaded(path, progress)
    reader = kind_of_file(Path(path)).open(Path(path))
    reader.location = os.path.abspath(path)  # noqa: PTH100 - links stay as they are named
    return reader


def create_checkpoint(
    path: str | os.PathLike[str],
    contents: Contents,
    *,
    force: bool = False,
    kind: str | None = None,
) -> CheckpointWriter:
    """Start writing a checkpoint; use it as a context manager.

    Parameters
    ----------
    path : str or PathLike
        Destination: a regular file, a folder, or absent; replaced with ``force``.
    contents : Contents
        Every tensor and alias that will be written.
    kind : str or None
        A name in `KINDS`; None goes by the suffix; without one it is a folder.

    Raises
    ------
    CheckpointError, OutputError
        Contents that the kind cannot hold; a destination that exists or cannot be written.
    """
    place = Path(path)
    if str(path) == "-" or (place.exists() and not (place.is_file() or place.is_dir())):
        said = "it is no regular file; a checkpoint cannot go into a pipe"
        raise OutputError(f"cannot write {os.fspath(path)}: {said}")
    return kind_for_output(place, kind).create(place, contents, force=force)


def is_url(source: object) -> TypeGuard[str]:
    """Whether a source is an address rather than a path.

    Examples
    --------
    >>> is_url("https://example.org/m.mp4"), is_url("C://m.mp4"), is_url("models/m.mp4")
    (True, False, False)
    """
    return isinstance(source, str) and _URL.match(source) is not None


def kind_of_file(path: Path) -> Kind:
    """Kind of an existing file, by content, or a CheckpointError that says what it is instead."""
    if path.is_dir():
        package = (path / "Manifest.json").is_file() and (path / "Data").is_dir()
        return kind_for_output(path, "coreml" if package else "folder")
    if path.exists() and not path.is_file():
        raise CheckpointError(f"cannot read {path}: it is no regular file, but a pipe or a device")
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        if str(path) == "-":
            reason = "a checkpoint is read from a file, not from a pipe"
        raise CheckpointError(f"cannot read {os.fspath(path)!r}: {reason}") from None
    if path.suffix == ".distcp" or path.name == ".metadata":
        said = "a part of a checkpoint of torch.distributed; name its folder"
        raise CheckpointError(f"cannot read {path}: it is {said}")
    members = _zip_members(path) if head.startswith(_ZIP_STARTS) else None
    name = _recognise(path.suffix.lower(), head, members)
    if name is None:
        raise CheckpointError(f"cannot read {path}: {_explain(path, head, members)}")
    return kind_for_output(path, name)


def kind_for_output(path: Path, name: str | None = None) -> Kind:
    """Kind to write, by name or else by suffix; without a suffix, a folder.

    Raises
    ------
    CheckpointError
        Neither says one we know.
    """
    suffix = path.suffix.lower()
    # A name such as Qwen2.5-0.5B has no suffix, though it has dots.
    is_folder = path.is_dir() and suffix != ".mlpackage"
    if name is None and (is_folder or not suffix or suffix[1:2].isdigit()):
        name = "folder"
    for kind in KINDS:
        if (kind.name == name) if name is not None else (suffix in kind.suffixes):
            return kind
    if name is not None:
        names = ", ".join(kind.name for kind in KINDS)
        raise CheckpointError(f"unknown checkpoint kind {name!r}; known are {names}")
    raise CheckpointError(
        f"cannot tell from the name {path.name!r} what kind of checkpoint to write; "
        f"use one of {_understood()}; a folder has no suffix, or ends in a slash"
    )


def _understood() -> str:
    """The kinds and their suffixes, for messages."""
    return ", ".join(
        f"{kind.label} ({' '.join(kind.suffixes)})" if kind.suffixes else kind.label
        for kind in KINDS
        if not kind.variant
    )


def _recognise(suffix: str, head: bytes, members: tuple[str, ...] | None) -> str | None:
    """Name of a kind, from a file's first bytes and what lies in it as a zip archive."""
    if members is not None:
        if any(name.rpartition("/")[2] == "data.pkl" for name in members):
            return None if _is_torchscript(members) else "torch"
        empty = not members and suffix == ".npz"
        return "npz" if empty or any(name.endswith(".npy") for name in members) else None
    # 8 bytes of header length, then the header: a JSON object, which the library wants no longer.
    length = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and (length <= 100_000_000 or suffix == ".safetensors"):
        return "safetensors"
    # Before torch 1.6: bare pickles of protocol 2 to 5.
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "torch"
    if head[:4] == b"GGUF":
        return "gguf"
    if head[4:8] == b"TFL3":
        return "tflite"
    # A protobuf message that starts with ``ir_version``, and is named so or names its producer.
    if head[:1] == b"\x08" and (suffix == ".onnx" or head[2:3] == b"\x12"):
        return "onnx"
    # A start unit of few bytes has no other mark.
    return "nnc" if suffix == ".nnc" and head[:1] == b"\0" else None


def _is_torchscript(members: tuple[str, ...] | None) -> bool:
    return any(name.endswith("/constants.pkl") for name in members or ())


def _zip_members(path: Path) -> tuple[str, ...] | None:
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            file.seek(-22 - len(archive.comment), os.SEEK_END)
            whole = file.read(4) == b"PK\5\6"  # nothing follows the directory
            return tuple(archive.namelist()) if whole else None
    except Exception:
        # zipfile lets errors of many kinds out of damaged directories; all of them mean that there
        # is no directory to go by.
        return None


def _explain(path: Path, head: bytes, members: tuple[str, ...] | None) -> str:
    """Why the file is none of our kinds."""
    named = next((kind for kind in KINDS if path.suffix.lower() in kind.suffixes), None)
    known = f"weightvid reads {_understood()}"
    if not head:
        return f"the file is empty ({known})"
    if _is_torchscript(members):
        return (
            "it is a TorchScript program; this kind is not supported: load it with torch.jit.load "
            "and save its state_dict() with torch.save"
        )
    for offset, magic, what in _FOREIGN:
        if head[offset : offset + len(magic)].lower() == magic:
            return f"it is {what}"
    if members is not None:
        if models := [name for name in members if name.endswith(".tflite")]:
            listed = base.shorten(models)
            return f"it is a bundle of LiteRT models; extract it first: it holds {listed}"
        return f"it is a zip archive with neither PyTorch's data.pkl nor .npy arrays ({known})"
    if head.startswith(_ZIP_STARTS):
        return "it is a zip archive (npz or PyTorch) that is cut short, damaged or too long"
    if named is not None:
        return f"it is named like a {named.label} file, but damaged, cut short or misnamed; {known}"
    return f"it is no checkpoint of a known kind; {known}"
