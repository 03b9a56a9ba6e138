"""What every checkpoint reader and writer offers, whatever the file kind."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from errno import EEXIST
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from types import ModuleType
from typing import Final, Self

import numpy as np

from weightvid.atomic import AtomicFile, output_error
from weightvid.errors import CheckpointError, TensorNotFoundError, WeightvidError
from weightvid.loader import Array, Bytes, TensorSpec
from weightvid.spec import SIDE_FILE_BYTES, SideFile, name_of, stored_dtype

_MESSAGE_LETTERS: Final = 300


@dataclass(frozen=True, slots=True)
class Contents:
    """What a checkpoint holds, known without reading any weight.

    ``tensors`` are distinct and in file order. ``aliases`` name the tensor whose storage they
    share (tied weights). ``metadata`` are free text pairs. ``skipped`` are entries that cannot be
    stored, each as ``"name (what it is)"``. ``files`` are small other files of the model, and what
    its kind needs besides the tensors.
    """

    tensors: tuple[TensorSpec, ...]
    aliases: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()
    files: tuple[SideFile, ...] = ()

    def rows(self) -> list[tuple[str, TensorSpec]]:
        """Every name with the spec of its tensor: first the tensors, then the aliases."""
        by_name = {spec.name: spec for spec in self.tensors}
        return [*by_name.items(), *((a, by_name[name]) for a, name in self.aliases.items())]


class CheckpointReader(ABC):
    """A source of tensors that are read one at a time; threads wait for each other."""

    contents: Contents
    #: path of the opened file or folder, for another process to open; None: it is in memory alone.
    location: str | None = None
    #: cheap to open, and ranges are read without the rest: many processes may have it open at once.
    shareable: bool = False
    #: a folder that is removed when the reader is closed.
    temporary: TemporaryDirectory[str] | None = None

    def __init__(self, contents: Contents) -> None:
        _check(contents)
        self.contents = contents
        self._specs = {spec.name: spec for spec in contents.tensors}
        self._closed = False
        self._last: tuple[str, Array] | None = None
        self._lock = Lock()

    def spec(self, name: str) -> TensorSpec:
        """Spec of a tensor (or TensorNotFoundError); an alias answers with what it stands for."""
        spec = self._specs.get(self.contents.aliases.get(name, name))
        if spec is None:
            raise TensorNotFoundError(f"the checkpoint has no tensor {name!r}")
        return spec

    def read(self, name: str) -> Array:
        """Stored elements of one tensor or alias; callers must not write into them.

        Returns
        -------
        ndarray
            C-contiguous, of the tensor's shape and ``stored_dtype``; read-only or a fresh copy.

        Raises
        ------
        TensorNotFoundError, CheckpointError
            No such tensor; or the file is damaged there, or the reader is closed.
        """
        with self._lock, explained(f"tensor {name!r} is damaged"):
            return self._read(self._wanted(name))

    def read_range(self, name: str, first: int, count: int) -> Array:
        """Elements ``first .. first + count`` of one tensor, in row-major order: shape (count,).

        Kinds that can read a part of a tensor do; others read the tensor, and keep it until a
        range of another one is asked for. Errors are those of `read`; also a range that leaves the
        tensor.
        """
        spec = self._wanted(name)
        if not 0 <= first <= first + count <= spec.size:
            there = f"tensor {name!r} has {spec.size} elements"
            raise CheckpointError(f"{there}, not {first} .. {first + count}")
        with self._lock, explained(f"tensor {name!r} is damaged"):
            return self._read_range(spec, first, count)

    def _wanted(self, name: str) -> TensorSpec:
        if self._closed:
            raise CheckpointError("the checkpoint is closed")
        return self.spec(name)

    def _read_range(self, spec: TensorSpec, first: int, count: int) -> Array:
        """Elements of a range that is known to exist."""
        if count == spec.size:
            return self._read(spec).reshape(-1)
        if self._last is None or self._last[0] != spec.name:
            self._last = None
            self._last = spec.name, self._read(spec).reshape(-1)
        return self._last[1][first : first + count]

    @abstractmethod
    def _read(self, spec: TensorSpec) -> Array:
        """Elements of a tensor that is known to exist."""

    def stop(self) -> None:
        """Let every further read fail, from any thread; the owner closes the reader afterwards."""
        self._closed = True

    def close(self) -> None:
        """Release the file. Reading afterwards is an error; arrays already read stay valid."""
        self._closed = True
        self._last = None
        if self.temporary is not None:
            self.temporary.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class ArrayReader(CheckpointReader):
    """A reader over arrays by name, in memory or mapped; nothing is copied before it is read.

    Names whose arrays show the same memory the same way (address, dtype, shape, strides) become
    aliases of the first of them, so tied weights stay tied. Types that numpy lacks come as raw
    bits, and ``dtypes`` names them (``{"w": "BF16"}``). ``read`` gives read-only views of
    contiguous arrays, copies of others. A name that is no string, or an array whose elements have
    no name or not that of ``dtypes``, is a CheckpointError.

    >>> with ArrayReader({"w": np.zeros((2, 3), np.float32)}) as reader:
    ...     reader.contents.tensors
    (TensorSpec(name='w', dtype='F32', shape=(2, 3)),)
    """

    def __init__(
        self,
        arrays: Mapping[str, Array],
        dtypes: Mapping[str, str] | None = None,
        metadata: Mapping[str, str] | None = None,
        skipped: Iterable[str] = (),
        files: tuple[SideFile, ...] = (),
    ) -> None:
        specs: list[TensorSpec] = []
        aliases: dict[str, str] = {}
        first_of: dict[tuple[object, ...], str] = {}
        self._arrays: dict[str, Array] = {}
        for name, value in arrays.items():
            if not isinstance(name, str):
                raise CheckpointError(f"tensor names must be strings, not {name!r}")
            if not isinstance(value, (np.ndarray, np.generic)):
                raise CheckpointError(f"{name!r} is no numpy array but {type(value).__name__}")
            array = np.asarray(value)
            try:
                dtype = (dtypes or {}).get(name) or name_of(array.dtype)
                if array.dtype != stored_dtype(dtype):
                    raise CheckpointError(f"an array of {array.dtype} is not {dtype}")
            except CheckpointError as error:
                raise CheckpointError(f"{name!r}: {error}") from None
            look = (array.__array_interface__["data"][0], dtype, array.shape, array.strides)
            if array.size and look in first_of:
                aliases[name] = first_of[look]
                continue
            first_of[look] = name
            self._arrays[name] = array
            specs.append(TensorSpec(name, dtype, array.shape))
        known = Contents(tuple(specs), aliases, dict(metadata or {}), tuple(skipped), files)
        super().__init__(known)

    def _read(self, spec: TensorSpec) -> Array:
        array = self._arrays[spec.name]
        shown = array.view() if array.flags.c_contiguous else array.copy(order="C")
        shown.flags.writeable = False
        return shown

    def close(self) -> None:
        """Let the arrays go."""
        super().close()
        self._arrays = {}


class CheckpointWriter(ABC):
    """A checkpoint that is being written, one tensor at a time, in any order.

    Used as a context manager: a clean exit finishes the file under its real name; an exception
    (KeyboardInterrupt included) removes every trace of it.
    """

    #: what this file kind cannot hold as it is, and what is written instead; known at once.
    notes: tuple[str, ...] = ()
    file_bytes = 0  #: of all its files; known after :meth:`commit`

    def __init__(self, path: Path, contents: Contents) -> None:
        _check(contents)
        self._path = path
        self.contents = contents
        self._todo = {spec.name: spec for spec in contents.tensors}
        #: tensor -> names under which a kind without aliases writes it.
        self._names_of = {spec.name: [spec.name] for spec in contents.tensors}
        for alias, name in contents.aliases.items():
            self._names_of[name].append(alias)

    def write(self, name: str, array: Array) -> None:
        """Add one tensor of ``contents.tensors``: stored elements, in its own dtype and shape.

        Raises
        ------
        TensorNotFoundError, CheckpointError, OutputError
            No such tensor; another dtype or shape than announced, or written before; disk full.
        """
        spec = self._wanted(name)
        if array.shape != spec.shape or array.dtype != stored_dtype(spec.dtype):
            raise CheckpointError(
                f"tensor {name!r} was announced as {spec.dtype} {list(spec.shape)}, "
                f"but an array of {array.dtype} {list(array.shape)} came"
            )
        self.write_parts(name, [array])

    @abstractmethod
    def write_parts(self, name: str, parts: Iterable[Array]) -> None:
        """Add one tensor whose elements come in consecutive parts, in row-major order.

        Parts have any shapes. Kinds that can write a part hold one at a time; others collect them.
        Errors are those of `write`; also too few or too many elements.
        """

    def _wanted(self, name: str) -> TensorSpec:
        spec = self._todo.get(name)
        if spec is None and name in self._names_of:
            raise CheckpointError(f"tensor {name!r} was written before")
        if spec is None:
            raise TensorNotFoundError(f"the output has no tensor {name!r}")
        return spec

    def _side_file(self, role: str) -> bytes | None:
        """What the contents hold of a role."""
        return next((file.data for file in self.contents.files if file.role == role), None)

    def commit(self) -> None:
        """Write what is left, flush to disk, and rename into place.

        Where a tensor is missing, or the disk is full, an error says so and nothing is left.
        """
        with self._removed_on_error():
            if self._todo:
                raise CheckpointError(f"tensors never written: {shorten(self._todo)}")
            self._finish()
            self._publish()

    @contextmanager
    def _removed_on_error(self) -> Iterator[None]:
        """Leave nothing behind, and say of an error of the system which output it is about."""
        try:
            yield
        except BaseException as error:
            self.abort()
            if isinstance(error, OSError) and error.errno not in (None, EEXIST):
                raise output_error(self._path, error) from None
            raise

    @abstractmethod
    def abort(self) -> None:
        """Remove what has been written; does nothing after :meth:`commit`."""

    def _finish(self) -> None:
        """Write what comes after the last tensor."""
        return

    @abstractmethod
    def _publish(self) -> None:
        """Give the output its name; on failure nothing is left."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.commit()
        else:
            self.abort()


class FileWriter(CheckpointWriter):
    """A checkpoint that is one file; ``variant`` tells kinds apart that one module writes."""

    def __init__(
        self, path: Path, contents: Contents, *, force: bool = False, variant: str = ""
    ) -> None:
        super().__init__(path, contents)
        self._force, self._variant = force, variant
        self._collected: Array | None = None
        header = self._plan()
        self._output = AtomicFile(path, force=force)
        with self._removed_on_error():
            self._output.file.write(header)

    def _plan(self) -> bytes:
        """How the file begins; refuses what the kind cannot hold, and sets ``notes``."""
        return b""

    def write_parts(self, name: str, parts: Iterable[Array]) -> None:
        """Add one tensor whose elements come in consecutive parts."""
        spec = self._wanted(name)
        dtype, done = stored_dtype(spec.dtype), 0
        for part in parts:
            flat = np.ascontiguousarray(part).reshape(-1)
            if done + flat.size > spec.size or flat.dtype != dtype:
                raise CheckpointError(f"tensor {name!r} comes as something else than announced")
            if flat.size:
                self._write_part(spec, done, flat)
            done += flat.size
        if done != spec.size:
            raise CheckpointError(f"tensor {name!r} has {spec.size} elements, {done} came")
        if not spec.size:
            self._write(spec, np.empty(spec.shape, dtype))
        del self._todo[name]

    def _write_part(self, spec: TensorSpec, first: int, part: Array) -> None:
        """Take a part of a tensor; parts come in order."""
        if part.size == spec.size:
            self._write(spec, part.reshape(spec.shape))
            return
        if first == 0 or self._collected is None:
            self._collected = np.empty(0, part.dtype)
        if first + part.size > self._collected.size:
            # By what has come, not by what a shape claims.
            size = min(spec.size, 2 * (first + part.size))
            self._collected.resize(size, refcheck=False)
        self._collected[first : first + part.size] = part
        if first + part.size == spec.size:
            array, self._collected = self._collected, None
            self._write(spec, array.reshape(spec.shape))

    @abstractmethod
    def _write(self, spec: TensorSpec, array: Array) -> None:
        """Write one checked, C-contiguous tensor (and its aliases, if they need bytes)."""

    def _write_at(self, offset: int, data: Array) -> None:
        self._output.file.seek(offset)
        self._output.file.write(raw_bytes(data).data)

    def abort(self) -> None:
        """Remove the temporary file; does nothing after :meth:`commit`."""
        self._output.abort()

    def _publish(self) -> None:
        self._output.commit()
        self.file_bytes = self._path.stat().st_size


def _check(contents: Contents) -> None:
    """Refuse contents no file could hold; allocates nothing."""
    names: set[str] = set()
    for spec in contents.tensors:
        if spec.name in names:
            raise CheckpointError(f"two tensors are named {spec.name!r}")
        names.add(spec.name)
        dtype = stored_dtype(spec.dtype)
        try:
            np.broadcast_to(np.zeros((), dtype), spec.shape)
        except (ValueError, TypeError, OverflowError, MemoryError):
            raise CheckpointError(
                f"tensor {spec.name!r} has the impossible shape {shorten(spec.shape)}"
            ) from None
    for alias, name in contents.aliases.items():
        if alias in names:
            raise CheckpointError(f"{alias!r} is the name of a tensor and of an alias")
        if name not in names:
            raise CheckpointError(f"alias {alias!r} stands for {name!r}, which is no tensor")
    for key, value in contents.metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise CheckpointError(f"metadata must be text pairs, not {key!r}: {value!r}")


def raw_bytes(array: Array) -> Bytes:
    """Bytes of a C-contiguous array as a flat view (numpy lends no buffer of dates or empties)."""
    return array.reshape(-1).view(np.uint8) if array.size else np.empty(0, np.uint8)


def need(module: str, extra: str) -> ModuleType:
    """Import a module of an optional package, or say how to get it."""
    try:
        return import_module(module)
    except ImportError as error:
        raise CheckpointError(
            f"the {extra} package is needed for this ({error}): pip install 'weightvid[{extra}]'"
        ) from None


def as_side_file(path: str, data: bytes, role: str) -> tuple[tuple[SideFile, ...], tuple[str, ...]]:
    """What a kind needs besides the tensors, or a note for ``skipped`` where it is too large."""
    if len(data) > SIDE_FILE_BYTES:
        return (), (f"{path} (larger than {SIDE_FILE_BYTES >> 20} MiB)",)
    return (SideFile(path, data, role),), ()


def unique(name: str, taken: dict[str, int]) -> str:
    """A name that is not taken yet: the one wanted, or with a number; from now on it is taken.

    Examples
    --------
    >>> taken = {}
    >>> [unique("w", taken) for _ in range(3)]
    ['w', 'w.1', 'w.2']
    """
    made = name
    while made in taken:
        made, taken[name] = f"{name}.{taken[name]}", taken[name] + 1
    taken[made] = 1
    return made


def is_inside(path: Path, folder: Path) -> bool:
    """Whether a file really lies in a folder, or where the hub's cache keeps what it links to."""
    real, root = path.resolve(), folder.resolve()
    cached = root.parent.name == "snapshots" and real.parent == root.parent.parent / "blobs"
    return cached or real.is_relative_to(root)


def encode_name(name: str) -> bytes:
    """UTF-8 of a tensor's name, or an error where it is not valid Unicode."""
    try:
        return name.encode()
    except UnicodeEncodeError:
        raise CheckpointError(f"the tensor name {name!r} is not valid Unicode") from None


def shorten(items: Iterable[object], limit: int = 8) -> str:
    """The first few items, comma-separated, and how many there are.

    Examples
    --------
    >>> shorten("abcd", limit=2)
    'a, b, ... (4 in all)'
    """
    listed = [str(item) for item in items]
    more = f", ... ({len(listed)} in all)" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more


def first_line(error: BaseException) -> str:
    """First line of an error's message, if not too long, or its type if it has none."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:_MESSAGE_LETTERS]


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Make a CheckpointError, ``what: why``, of what a damaged file brings out of a library."""
    try:
        yield
    except WeightvidError:
        raise
    except Exception as error:
        raise CheckpointError(f"{what}: {first_line(error)}") from None


def tied_note(aliases: Collection[str]) -> tuple[str, ...]:
    """Note of the writers whose format cannot share storage."""
    said = f"tied tensors are written as full copies: {shorten(aliases)}"
    return (said,) if aliases else ()
