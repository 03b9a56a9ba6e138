"""NumPy .npz files, read and written one member at a time.

Format: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html
"""

import os
import warnings
import zipfile
from math import prod
from pathlib import Path
from typing import IO, Any, Final

import numpy as np

from weightvid.checkpoint import base
from weightvid.errors import CheckpointError
from weightvid.loader import Array, TensorSpec, to_float32
from weightvid.spec import RAW_BITS, name_of, stored_dtype

_NPY: Final = ".npy"
#: deflate cannot do better than 1032:1 (bz2 and lzma are not read: numpy does not write them);
#: a member that claims more is a trap, not an array.
_MAX_RATIO: Final = 1032
_FORMAT: Final = np.lib.format


class Reader(base.CheckpointReader):
    """An .npz file; arrays of objects or records are reported in ``contents.skipped``."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._archive = zipfile.ZipFile(path)
        self._members: dict[str, zipfile.ZipInfo] = {}
        specs: list[TensorSpec] = []
        skipped: list[str] = []
        try:
            for info in self._archive.infolist():
                found = self._examine(info)
                if isinstance(found, TensorSpec):
                    specs.append(found)
                    self._members[found.name] = info
                else:
                    skipped.append(f"{info.filename.removesuffix(_NPY)} ({found})")
            super().__init__(base.Contents(tuple(specs), skipped=tuple(skipped)))
        except BaseException:
            self._archive.close()
            raise

    def _examine(self, info: zipfile.ZipInfo) -> TensorSpec | str:
        """Spec of a member, or what it is if it cannot be stored."""
        name = info.filename.removesuffix(_NPY)
        what = f"array {name!r} in {self._path}"
        if name == info.filename:
            return "no .npy array"
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise CheckpointError(f"{what} has an unknown compression")
        with base.explained(f"{what} is damaged"), self._archive.open(info) as member:
            shape, dtype = _read_header(member)
            data_bytes = info.file_size - member.tell()
        if dtype.hasobject:
            return "array of Python objects or records"
        try:
            spec = TensorSpec(name, name_of(dtype.newbyteorder("<")), shape)
        except CheckpointError:
            return f"array of {dtype}"
        wanted = prod(shape) * dtype.itemsize
        if data_bytes != wanted:
            raise CheckpointError(f"{what} should have {wanted} bytes and has {data_bytes}")
        if info.file_size > _MAX_RATIO * (info.compress_size + 64):
            raise CheckpointError(f"{what} claims an impossible size")
        return spec

    def _read(self, spec: TensorSpec) -> Array:
        with warnings.catch_warnings(), self._archive.open(self._members[spec.name]) as file:
            warnings.simplefilter("ignore")
            array: Array = _FORMAT.read_array(file, allow_pickle=False)
            file.read(1)  # the checksum is compared only when the reader meets the end
        return array.astype(stored_dtype(spec.dtype), "C", copy=False)

    def close(self) -> None:
        """Close the archive."""
        self._archive.close()
        super().close()


class Writer(base.FileWriter):
    """An .npz file: one stored (uncompressed) zip member per tensor, with fixed time stamps."""

    _zip: zipfile.ZipFile | None = None

    def _plan(self) -> bytes:
        for name, _ in self.contents.rows():
            # zipfile would cut the first and rewrite the second.
            odd = "\0" in name or (os.sep != "/" and os.sep in name)
            if odd or len(base.encode_name(name)) > 65535:
                raise CheckpointError(f"an npz file cannot hold the tensor name {name[:80]!r}")
        dtypes = {spec.dtype for spec in self.contents.tensors}
        for dtype in sorted(RAW_BITS & dtypes):
            said = f"npz has no {dtype}; its bits are written as {stored_dtype(dtype)}"
            if dtype == "BF16":
                said = "npz has no bfloat16; written as float32, which holds it exactly"
            named = (spec.name for spec in self.contents.tensors if spec.dtype == dtype)
            self.notes += (f"{said}: {base.shorten(named)}",)
        if self.contents.metadata:
            self.notes += (f"npz has no metadata; dropped: {base.shorten(self.contents.metadata)}",)
        self.notes += base.tied_note(self.contents.aliases)
        return b""

    def _write(self, spec: TensorSpec, array: Array) -> None:
        if spec.dtype == "BF16":
            array = to_float32(array, "BF16")
        for name in self._names_of[spec.name]:
            # ZipInfo's own date (1980) rather than now: the same tensors give the same bytes.
            info = zipfile.ZipInfo(name + _NPY)
            with self._archive().open(info, "w", force_zip64=True) as member:
                _FORMAT.write_array(member, array, version=(1, 0), allow_pickle=False)

    def _archive(self) -> zipfile.ZipFile:
        if self._zip is None:
            self._zip = zipfile.ZipFile(self._output.file, "w", allowZip64=True)
        return self._zip

    def _finish(self) -> None:
        self._archive().close()

    def abort(self) -> None:
        """Remove the temporary file."""
        # Forgets its file, or ZipFile would try to write its directory when it is collected.
        if self._zip is not None:
            self._zip.fp = None
        super().abort()


def _read_header(member: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and dtype of an array; records with odd names (version 3.0) count as objects."""
    version = _FORMAT.read_magic(member)
    if version == (3, 0):
        return (), np.dtype(object)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"unknown .npy version {version}")
    read = _FORMAT.read_array_header_1_0 if version == (1, 0) else _FORMAT.read_array_header_2_0
    # Headers of Python 2 (3L for 3) are read, with a warning that nobody needs.
    with warnings.catch_warnings(action="ignore"):
        shape, _, dtype = read(member)
    if any(isinstance(n, bool) or n < 0 for n in shape):
        raise ValueError(f"the shape {shape!r} is impossible")
    return shape, dtype
