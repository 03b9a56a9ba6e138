"""What every checkpoint reader offers, whatever the file kind, and what contents are."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from weightvid.closing import Closing
from weightvid.dtypes import stored_dtype
from weightvid.errors import CheckpointError, TensorNotFoundError
from weightvid.spec import SideFile, TensorSpec

Array = npt.NDArray[np.generic]


@dataclass(frozen=True, slots=True)
class Contents:
    """What a checkpoint holds, known without reading any weight.

    Attributes
    ----------
    tensors : tuple of TensorSpec
        Distinct tensors in file order; aliases are not repeated here.
    aliases : mapping of str to str
        Name -> name in ``tensors`` of the tensor it shares all its storage with (tied weights).
    metadata : mapping of str to str
        Free text pairs of the file (``__metadata__`` of safetensors).
    skipped : tuple of str
        Entries that cannot be stored (no tensors, or tensors of an unsupported make), each as
        ``"name (what it is)"``.
    files : tuple of SideFile
        Small other files of the model, and what its kind needs besides the tensors.
    """

    tensors: tuple[TensorSpec, ...]
    aliases: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()
    files: tuple[SideFile, ...] = ()


class CheckpointReader(Closing):
    """A source of tensors that are read one at a time (by one thread).

    Parameters
    ----------
    contents : Contents
        What the source holds.

    Attributes
    ----------
    location : str or None
        What :func:`weightvid.checkpoint.open_checkpoint` opened, so that another process can open
        it too; None for a source that lives in this process alone.
    shareable : bool
        It costs next to nothing to open, and a range of a tensor is read without the rest, so
        that many processes of this machine may well have it open at once.
    """

    contents: Contents
    location: str | None = None
    shareable: bool = False

    def __init__(self, contents: Contents) -> None:
        self.contents = contents
        self._specs = {spec.name: spec for spec in contents.tensors}
        self._closed = False
        self._last: tuple[str, Array] | None = None

    def spec(self, name: str) -> TensorSpec:
        """Spec of a tensor; an alias answers with the tensor it stands for.

        Raises
        ------
        TensorNotFoundError
            No such tensor.
        """
        spec = self._specs.get(self.contents.aliases.get(name, name))
        if spec is None:
            raise TensorNotFoundError(f"the checkpoint has no tensor {name!r}")
        return spec

    def read(self, name: str) -> Array:
        """Stored elements of one tensor.

        Parameters
        ----------
        name : str
            A name in ``contents.tensors`` or ``contents.aliases``.

        Returns
        -------
        ndarray
            C-contiguous, of the tensor's shape and ``stored_dtype``; read-only or a fresh copy:
            callers must not write into it.

        Raises
        ------
        TensorNotFoundError
            No such tensor.
        CheckpointError
            The file is damaged there, or the reader is closed.
        """
        if self._closed:
            raise CheckpointError("the checkpoint is closed")
        return self._read(self.spec(name))

    def read_range(self, name: str, first: int, count: int) -> Array:
        """Some consecutive elements of one tensor, in row-major order.

        Kinds that can read a part of a tensor do; of others the whole tensor is read, and kept
        until ranges of another one are asked for.

        Parameters
        ----------
        name : str
        first, count : int
            Elements ``first .. first + count``.

        Returns
        -------
        ndarray, shape (count,)
            As :meth:`read` gives them.

        Raises
        ------
        TensorNotFoundError, CheckpointError
            As :meth:`read`; also for a range that leaves the tensor.
        """
        if self._closed:
            raise CheckpointError("the checkpoint is closed")
        spec = self.spec(name)
        if not 0 <= first <= first + count <= spec.size:
            raise CheckpointError(
                f"tensor {name!r} has {spec.size} elements, not {first} .. {first + count}"
            )
        return self._read_range(spec, first, count)

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
        """End a long read in another thread with an error there; close follows.

        Does nothing for files of this machine, which are read in no time.
        """
        return

    def close(self) -> None:
        """Release the file. Reading afterwards is an error; arrays already read stay valid."""
        self._closed = True
        self._last = None


def check_contents(contents: Contents) -> None:
    """Refuse contents no file could hold.

    Raises
    ------
    CheckpointError
        A name twice, an alias of nothing, an unknown dtype, an impossible shape, metadata that
        is no text.
    """
    names: set[str] = set()
    for spec in contents.tensors:
        if spec.name in names:
            raise CheckpointError(f"two tensors are named {spec.name!r}")
        names.add(spec.name)
        check_spec(spec)
    for alias, name in contents.aliases.items():
        if alias in names:
            raise CheckpointError(f"{alias!r} is the name of a tensor and of an alias")
        if name not in names:
            raise CheckpointError(f"alias {alias!r} stands for {name!r}, which is no tensor")
    for key, value in contents.metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise CheckpointError(f"metadata must be text pairs, not {key!r}: {value!r}")


def check_spec(spec: TensorSpec) -> None:
    """Refuse a dtype we don't know and a shape numpy cannot have; allocates nothing.

    Raises
    ------
    CheckpointError
        Naming the tensor.
    """
    dtype = stored_dtype(spec.dtype)
    try:
        np.broadcast_to(np.zeros((), dtype), spec.shape)
    except (ValueError, TypeError, OverflowError, MemoryError):
        raise CheckpointError(
            f"tensor {spec.name!r} has the impossible shape {shorten(spec.shape)}"
        ) from None


def raw_bytes(array: Array) -> npt.NDArray[np.uint8]:
    """Bytes of a C-contiguous array as a flat view (numpy lends no buffer of dates or empties)."""
    if array.size == 0:
        return np.empty(0, np.uint8)
    return array.reshape(-1).view(np.uint8)


def shorten(items: Iterable[object], limit: int = 8) -> str:
    """The first few items, comma-separated, and how many more there are."""
    listed = [str(item) for item in items]
    more = f", ... ({len(listed)} in all)" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more


def tied_note(contents: Contents) -> tuple[str, ...]:
    """Note of the writers whose format cannot share storage."""
    if not contents.aliases:
        return ()
    return (f"tied tensors are written as full copies: {shorten(contents.aliases)}",)
