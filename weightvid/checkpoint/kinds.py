"""The table of checkpoint kinds, and how a file's content tells which one it is.

To add a kind: write its module (``open_reader``, ``open_writer``) and add a row to ``KINDS``.
"""

from __future__ import annotations

import os
import stat
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from weightvid.errors import CheckpointError

_HEAD_BYTES: Final = 512
_ZIP_STARTS: Final = (b"PK\x03\x04", b"PK\x05\x06")
#: longest header the safetensors library accepts.
_SAFETENSORS_HEADER_LIMIT: Final = 100_000_000


@dataclass(frozen=True, slots=True)
class Probe:
    """What can be seen of a path at a glance.

    Attributes
    ----------
    path : Path
        As the user wrote it.
    is_folder : bool
        Then the rest is empty.
    head : bytes
        At most the first 512 bytes.
    members : tuple of str or None
        Names in a zip archive; None if the file is none (or one without its directory).
    """

    path: Path
    is_folder: bool = False
    head: bytes = b""
    members: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of checkpoint.

    Attributes
    ----------
    name : str
        What ``create_checkpoint(kind=...)`` takes.
    label : str
        What messages call it.
    suffixes : tuple of str
        Lower case, with the dot.
    module : str
        Imported when a file of this kind is opened.
    recognises : callable
        True if the content is of this kind.
    roles : tuple of str
        Roles of the side files that a checkpoint of this kind takes back.
    variant : str
        Handed to ``open_writer``, where one module writes several kinds; those are never read.
    """

    name: str
    label: str
    suffixes: tuple[str, ...]
    module: str
    recognises: Callable[[Probe], bool]
    roles: tuple[str, ...] = ()
    variant: str = ""


def _is_safetensors(probe: Probe) -> bool:
    """8 bytes of header length, then the header: a JSON object."""
    if probe.head[8:9] != b"{":
        return False
    length = int.from_bytes(probe.head[:8], "little")
    return length <= _SAFETENSORS_HEADER_LIMIT or probe.path.suffix.lower() == ".safetensors"


def _is_torch(probe: Probe) -> bool:
    """A zip with a pickle in it, or (before torch 1.6) bare pickles of protocol 2 to 5."""
    if probe.members is not None:
        return _has_pickle(probe) and not _is_torchscript(probe)
    return probe.head[:1] == b"\x80" and probe.head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")


def _is_npz(probe: Probe) -> bool:
    """A zip with .npy members; a zip without any member only if it is named .npz."""
    if not probe.members:
        return probe.members == () and probe.path.suffix.lower() == ".npz"
    return any(name.endswith(".npy") for name in probe.members) and not _has_pickle(probe)


def _is_gguf(probe: Probe) -> bool:
    return probe.head[:4] == b"GGUF"


def _is_onnx(probe: Probe) -> bool:
    """A protobuf message that starts with ``ir_version`` and is named so, or names its producer."""
    if probe.head[:1] != b"\x08":
        return False
    return probe.path.suffix.lower() == ".onnx" or probe.head[2:3] == b"\x12"


def _never(probe: Probe) -> bool:
    return False


def _is_folder(probe: Probe) -> bool:
    """Any folder: its reader says what is missing in it."""
    return probe.is_folder


def _has_pickle(probe: Probe) -> bool:
    return any(name == "data.pkl" or name.endswith("/data.pkl") for name in probe.members or ())


def _is_torchscript(probe: Probe) -> bool:
    members = probe.members or ()
    return _has_pickle(probe) and any(name.endswith("/constants.pkl") for name in members)


KINDS: Final[tuple[Kind, ...]] = (
    Kind(
        "safetensors",
        "safetensors",
        (".safetensors",),
        "weightvid.checkpoint.safetensors",
        _is_safetensors,
    ),
    Kind(
        "torch",
        "PyTorch",
        (".pt", ".pth", ".th", ".bin"),
        "weightvid.checkpoint.torch_file",
        _is_torch,
    ),
    Kind("npz", "NumPy npz", (".npz",), "weightvid.checkpoint.npz", _is_npz),
    Kind("gguf", "GGUF", (".gguf",), "weightvid.checkpoint.gguf", _is_gguf, ("gguf-metadata",)),
    Kind("onnx", "ONNX", (".onnx",), "weightvid.checkpoint.onnx_file", _is_onnx, ("onnx-graph",)),
    Kind("folder", "Hugging Face folder", (), "weightvid.checkpoint.folder", _is_folder, ("file",)),
    *(
        Kind(
            f"gguf-{variant}",
            "GGUF",
            (),
            "weightvid.checkpoint.gguf",
            _never,
            ("gguf-metadata",),
            variant,
        )
        for variant in ("f32", "q8_0")
    ),
)

#: offset, first bytes there, what the file is and what to do about it.
_FOREIGN: Final[tuple[tuple[int, bytes, str], ...]] = (
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 (Keras) file; this kind is not supported (yet)"),
    (4, b"TFL3", "a TensorFlow Lite file; this kind is not supported"),
    (0, b"\x93NUMPY", "a single NumPy array without a name; save it with numpy.savez"),
    (4, b"ftyp", "an MP4 file; weightvid archives are read by weightvid.loader and `unpack`"),
    (0, b"version https://git-lfs", "a Git LFS pointer, not the file itself; run `git lfs pull`"),
    (0, b"\x1f\x8b", "a gzip file; decompress it first"),
    (0, b"\xfd7zXZ\x00", "an xz file; decompress it first"),
    (0, b"\x28\xb5\x2f\xfd", "a zstd file; decompress it first"),
    (257, b"ustar", "a tar archive; extract it first"),
    (0, b"<!DOCTYPE", "a web page; the download went wrong"),
    (0, b"<html", "a web page; the download went wrong"),
)


def kind_of_file(path: Path) -> Kind:
    """Kind of an existing file, by content.

    Raises
    ------
    CheckpointError
        Missing, unreadable, or not a checkpoint that we understand: the message says what it is.
    """
    probe = _look(path)
    for kind in KINDS:
        if kind.recognises(probe):
            return kind
    raise CheckpointError(f"cannot read {path}: {_explain(probe)}")


def kind_for_output(path: Path, name: str | None = None) -> Kind:
    """Kind to write, by name or else by suffix; without a suffix, a folder.

    Raises
    ------
    CheckpointError
        Neither says one we know.
    """
    suffix = path.suffix.lower()
    if name is None and (path.is_dir() or not suffix):
        name = "folder"
    for kind in KINDS:
        if (kind.name == name) if name is not None else (suffix in kind.suffixes):
            return kind
    if name is not None:
        names = ", ".join(kind.name for kind in KINDS)
        raise CheckpointError(f"unknown checkpoint kind {name!r}; known are {names}")
    raise CheckpointError(
        f"cannot tell from the name {path.name!r} what kind of checkpoint to write; "
        f"use one of {understood()}, where a folder has no suffix"
    )


def understood() -> str:
    """The kinds and their suffixes, for messages.

    Examples
    --------
    >>> understood()  # doctest: +ELLIPSIS
    'safetensors (.safetensors), PyTorch (.pt .pth .th .bin), NumPy npz (.npz), GGUF (.gguf), ...'
    """
    return ", ".join(
        f"{kind.label} ({' '.join(kind.suffixes)})" if kind.suffixes else kind.label
        for kind in KINDS
        if not kind.variant
    )


def _look(path: Path) -> Probe:
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            return Probe(path, is_folder=True)
        if not stat.S_ISREG(mode):
            raise CheckpointError(
                f"cannot read {path}: a checkpoint must be a regular file, not a pipe or a device"
            )
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
    except (OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(f"cannot read {os.fspath(path)!r}: {reason}") from None
    return Probe(path, head=head, members=_zip_members(path) if _is_zip(head) else None)


def _is_zip(head: bytes) -> bool:
    return head.startswith(_ZIP_STARTS)


def _zip_members(path: Path) -> tuple[str, ...] | None:
    try:
        with zipfile.ZipFile(path) as archive:
            return tuple(archive.namelist())
    except Exception:
        # zipfile lets struct.error, UnicodeDecodeError, NotImplementedError, ... out of damaged
        # directories; all of them mean that there is no directory to go by.
        return None


def _explain(probe: Probe) -> str:
    """Why the file is none of our kinds."""
    suffix = probe.path.suffix.lower()
    named = next((kind for kind in KINDS if suffix in kind.suffixes), None)
    known = f"weightvid reads {understood()}"
    if not probe.head:
        return f"the file is empty ({known})"
    if _is_torchscript(probe):
        return (
            "it is a TorchScript program; this kind is not supported: load it with torch.jit.load "
            "and save its state_dict() with torch.save"
        )
    for offset, magic, what in _FOREIGN:
        if probe.head[offset : offset + len(magic)] == magic:
            return f"it is {what}"
    if _is_zip(probe.head):
        if probe.members is None:
            return "it is a zip archive (npz or PyTorch) that is cut short or damaged"
        return f"it is a zip archive with neither PyTorch's data.pkl nor .npy arrays ({known})"
    if named is not None:
        return (
            f"it is named like a {named.label} file, but its content is that of no checkpoint "
            f"(damaged, cut short, or misnamed); {known}"
        )
    return f"it is no checkpoint of a known kind; {known}"
