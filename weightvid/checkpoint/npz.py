"""NumPy .npz files, read and written one member at a time.

Format: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html
"""

from __future__ import annotations

import ast
import io
import os
import re
import warnings
import zipfile
import zlib
from math import prod
from pathlib import Path
from typing import IO, Any, Final, NamedTuple

import numpy as np

from weightvid.checkpoint.base import (
    Array,
    CheckpointReader,
    Contents,
    check_contents,
    check_spec,
    raw_bytes,
    shorten,
    tied_note,
)
from weightvid.checkpoint.writer import CheckpointWriter, FileWriter
from weightvid.dtypes import RAW_BITS, name_of, stored_dtype, to_float32
from weightvid.errors import CheckpointError
from weightvid.spec import TensorSpec

_MEMBER_SUFFIX: Final = ".npy"
#: deflate cannot do better than 1032:1 (bz2 and lzma are not read: numpy does not write them);
#: a member that claims more is a trap, not an array.
_MAX_RATIO: Final = 1032
_COMPRESSIONS: Final = frozenset({zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED})
_CHUNK_BYTES: Final = 1 << 20
_NAME_LIMIT_BYTES: Final = 65535
#: what zipfile and numpy let out of damaged members.
_DAMAGE: Final = (
    zipfile.BadZipFile,
    zlib.error,
    OSError,
    EOFError,
    ValueError,
    SyntaxError,
    TypeError,
    KeyError,
    NotImplementedError,
    RuntimeError,
    MemoryError,
    OverflowError,
)


class _Member(NamedTuple):
    """Where and how one array lies in the archive."""

    info: zipfile.ZipInfo
    header_bytes: int
    fortran: bool


def open_reader(path: Path) -> CheckpointReader:
    """Open an .npz file; arrays of objects or records are reported in ``contents.skipped``.

    Raises
    ------
    CheckpointError
        The file or a member is damaged.
    """
    try:
        archive = zipfile.ZipFile(path)
    except Exception as error:
        raise CheckpointError(f"{path} is no valid npz file: {error}") from None
    try:
        return _NpzReader(path, archive)
    except BaseException:
        archive.close()
        raise


def open_writer(path: Path, contents: Contents, *, force: bool = False) -> CheckpointWriter:
    """Start an .npz file (see :func:`weightvid.checkpoint.create_checkpoint`)."""
    return _NpzWriter(path, contents, force=force)


class _NpzReader(CheckpointReader):
    def __init__(self, path: Path, archive: zipfile.ZipFile) -> None:
        self._path = path
        self._archive = archive
        self._members: dict[str, _Member] = {}
        self._refused: dict[str, str] = {}
        specs: list[TensorSpec] = []
        skipped: list[str] = []
        for info in archive.infolist():
            name = info.filename.removesuffix(_MEMBER_SUFFIX)
            if name == info.filename:
                skipped.append(f"{info.filename} (no .npy array)")
                continue
            if name in self._members or name in self._refused:
                raise CheckpointError(f"{path} holds two arrays named {name!r}")
            found = self._examine(name, info)
            if isinstance(found, str):
                self._refused[name] = found
                skipped.append(f"{name} ({found})")
            else:
                specs.append(found)
        super().__init__(Contents(tuple(specs), skipped=tuple(skipped)))

    def _examine(self, name: str, info: zipfile.ZipInfo) -> TensorSpec | str:
        """Spec of a member, or what it is if it cannot be stored."""
        if info.compress_type not in _COMPRESSIONS:
            raise CheckpointError(f"array {name!r} in {self._path} has an unknown compression")
        try:
            with self._archive.open(info) as member:
                shape, fortran, dtype, header_bytes = _read_header(member)
        except _DAMAGE as error:
            raise self._damaged(name, error) from None
        if dtype is None or dtype.hasobject:
            return "array of Python objects or records"
        try:
            spec = TensorSpec(name, name_of(dtype), shape)
        except CheckpointError:
            return f"array of {dtype}"
        check_spec(spec)
        data_bytes = prod(shape) * dtype.itemsize
        if info.file_size != header_bytes + data_bytes:
            raise CheckpointError(
                f"array {name!r} in {self._path} should have {data_bytes} bytes and has "
                f"{info.file_size - header_bytes}"
            )
        if info.file_size > _MAX_RATIO * (info.compress_size + 64):
            raise CheckpointError(f"array {name!r} in {self._path} claims an impossible size")
        self._members[name] = _Member(info, header_bytes, fortran)
        return spec

    def read(self, name: str) -> Array:
        """See :meth:`CheckpointReader.read`; a refused array is named with the reason."""
        if name in self._refused:
            raise CheckpointError(f"{name!r} is an {self._refused[name]}, which is not read")
        return super().read(name)

    def _read(self, spec: TensorSpec) -> Array:
        member = self._members[spec.name]
        data = np.empty(spec.stored_bytes, np.uint8)
        try:
            with self._archive.open(member.info) as file:
                _skip(file, member.header_bytes)
                _fill(file, data)
                # The checksum is compared only when the reader meets the end.
                if file.read(1):
                    raise EOFError("more bytes than its header says")
        except _DAMAGE as error:
            raise self._damaged(spec.name, error) from None
        flat = data.view(stored_dtype(spec.dtype))
        if member.fortran:
            return flat.reshape(spec.shape[::-1]).T.copy(order="C")
        return flat.reshape(spec.shape)

    def _damaged(self, name: str, error: BaseException) -> CheckpointError:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return CheckpointError(f"array {name!r} in {self._path} is damaged: {reason}")

    def close(self) -> None:
        super().close()
        self._archive.close()


class _NpzWriter(FileWriter):
    """One stored (uncompressed) zip member per tensor, with fixed time stamps."""

    def __init__(self, path: Path, contents: Contents, *, force: bool) -> None:
        check_contents(contents)
        _check_names(contents)
        super().__init__(path, contents, force=force)
        self.notes = _notes(contents)
        try:
            self._zip = zipfile.ZipFile(self._output.file, "w", allowZip64=True)
        except BaseException:
            self._output.abort()
            raise

    def _write(self, spec: TensorSpec, array: Array) -> None:
        if spec.dtype == "BF16":
            array = to_float32(array, "BF16")
        header = io.BytesIO()
        shape = {"descr": array.dtype.str, "fortran_order": False, "shape": array.shape}
        np.lib.format.write_array_header_1_0(header, shape)
        for name in (spec.name, *self._aliases_of.get(spec.name, ())):
            # ZipInfo's own date (1980) rather than now: the same tensors give the same bytes.
            info = zipfile.ZipInfo(name + _MEMBER_SUFFIX)
            with self._zip.open(info, "w", force_zip64=True) as member:
                member.write(header.getvalue())
                data = raw_bytes(array)
                for start in range(0, data.size, _CHUNK_BYTES):
                    member.write(data[start : start + _CHUNK_BYTES].data)

    def _finish(self) -> None:
        self._zip.close()

    def abort(self) -> None:
        """Remove the temporary file."""
        # Forgets its file, or ZipFile would try to write its directory when it is collected.
        self._zip.fp = None
        super().abort()


def _read_header(
    member: IO[bytes],
) -> tuple[tuple[int, ...], bool, np.dtype[Any] | None, int]:
    """Shape, Fortran order?, dtype (None: records with odd names), bytes of the header."""
    version = np.lib.format.read_magic(member)
    if version not in ((1, 0), (2, 0)):
        if version == (3, 0):
            return (), False, None, 0
        raise ValueError(f"unknown .npy version {version}")
    length_bytes = 2 if version == (1, 0) else 4
    prefix = member.read(length_bytes)
    length = int.from_bytes(prefix, "little")
    # numpy's own limit: ast.literal_eval may crash on longer text.
    if length > 10_000:
        raise ValueError(f"a header of {length} bytes")
    text = member.read(length)
    if len(prefix) < length_bytes or len(text) < length:
        raise EOFError("the header is cut short")
    # Python 2 wrote long integers as 3L.
    fields = ast.literal_eval(re.sub(r"(?<=\d)L\b", "", text.decode("latin1")))
    if not isinstance(fields, dict) or set(fields) != {"descr", "fortran_order", "shape"}:
        raise ValueError("the header is no array description")
    shape = fields["shape"]
    if not isinstance(shape, tuple) or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"the shape {shape!r} is impossible")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dtype = np.lib.format.descr_to_dtype(fields["descr"])
    header_bytes = np.lib.format.MAGIC_LEN + length_bytes + length
    return shape, bool(fields["fortran_order"]), dtype, header_bytes


def _skip(file: IO[bytes], count: int) -> None:
    if len(file.read(count)) != count:
        raise EOFError("it ends early")


def _fill(file: IO[bytes], data: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
    at = 0
    while at < data.size:
        piece = file.read(min(_CHUNK_BYTES, data.size - at))
        if not piece:
            raise EOFError("it ends early")
        data[at : at + len(piece)] = np.frombuffer(piece, np.uint8)
        at += len(piece)


def _check_names(contents: Contents) -> None:
    for name in (*(spec.name for spec in contents.tensors), *contents.aliases):
        try:
            encoded = (name + _MEMBER_SUFFIX).encode()
        except UnicodeEncodeError:
            raise CheckpointError(f"the tensor name {name!r} is not valid Unicode") from None
        # zipfile would cut the first and rewrite the second.
        odd = "\0" in name or (os.sep != "/" and os.sep in name)
        if odd or len(encoded) > _NAME_LIMIT_BYTES:
            raise CheckpointError(f"an npz file cannot hold the tensor name {name[:80]!r}")


def _notes(contents: Contents) -> tuple[str, ...]:
    notes: list[str] = []
    widened = [spec.name for spec in contents.tensors if spec.dtype == "BF16"]
    if widened:
        notes.append(
            f"npz has no bfloat16; written as float32, which holds it exactly: {shorten(widened)}"
        )
    for dtype in sorted(RAW_BITS - {"BF16"}):
        names = [spec.name for spec in contents.tensors if spec.dtype == dtype]
        if names:
            notes.append(
                f"npz has no {dtype}; its bits are written as {stored_dtype(dtype)}: "
                f"{shorten(names)}"
            )
    if contents.metadata:
        notes.append(f"npz has no metadata; dropped: {shorten(contents.metadata)}")
    return (*notes, *tied_note(contents))
