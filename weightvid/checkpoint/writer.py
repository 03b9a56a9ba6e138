"""What all writers of checkpoints share."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable
from concurrent.futures import Future, wait
from types import TracebackType
from typing import Self

import numpy as np

from weightvid.atomic import AtomicFile
from weightvid.beside import Side
from weightvid.checkpoint.base import Array, Contents, check_contents, shorten
from weightvid.dtypes import stored_dtype
from weightvid.errors import CheckpointError, TensorNotFoundError
from weightvid.spec import TensorSpec


class CheckpointWriter(ABC):
    """A checkpoint that is being written, one tensor at a time, in any order.

    Used as a context manager: a clean exit finishes the file under its real name; an exception
    (KeyboardInterrupt included) removes every trace of it.

    Parameters
    ----------
    contents : Contents
        What will be written; ``skipped`` is ignored.

    Attributes
    ----------
    notes : tuple of str
        What this file kind cannot hold as it is, and what is written instead; known at once.

    Raises
    ------
    CheckpointError
        The kind cannot hold these contents; nothing has been written.
    """

    notes: tuple[str, ...] = ()

    def __init__(self, contents: Contents) -> None:
        check_contents(contents)
        self.contents = contents
        self._todo = {spec.name: spec for spec in contents.tensors}
        self._aliases_of: dict[str, list[str]] = {}
        for alias, name in contents.aliases.items():
            self._aliases_of.setdefault(name, []).append(alias)
        self._collected: Array | None = None

    def write_parts(self, name: str, parts: Iterable[Array]) -> None:
        """Add one tensor whose elements come in consecutive parts, in row-major order.

        Kinds that can write a part of a tensor hold two parts at a time: one is written while the
        next one is made. Others collect them.

        Parameters
        ----------
        name : str
        parts : iterable of ndarray
            Stored elements, of any shapes. Each must stay as it is until the one after the next is
            asked for.

        Raises
        ------
        TensorNotFoundError, CheckpointError, OutputError
            As :meth:`write`; also for too few or too many elements.
        """
        spec = self._wanted(name)
        done, beside = 0, Side(0)
        pending: Future[None] | None = None
        try:
            for part in parts:
                flat = np.ascontiguousarray(part).reshape(-1)
                if done + flat.size > spec.size or flat.dtype != stored_dtype(spec.dtype):
                    raise CheckpointError(f"tensor {name!r} comes as something else than announced")
                if pending is not None:
                    pending.result()
                if 0 < flat.size == spec.size:
                    self._write_part(spec, 0, flat)
                elif flat.size:
                    pending = beside.do(self._write_part, spec, done, flat)
                done += flat.size
            if pending is not None:
                pending.result()
        finally:
            # Nobody may close the file under a thread that writes to it.
            wait([pending] if pending is not None else [])
            beside.close()
        if not spec.size:
            self._write_part(spec, 0, np.empty(0, stored_dtype(spec.dtype)))
        if done != spec.size:
            raise CheckpointError(f"tensor {name!r} has {spec.size} elements, {done} came")
        del self._todo[name]

    def _write_part(self, spec: TensorSpec, first: int, part: Array) -> None:
        """Take a part of a tensor; parts come in order."""
        if part.size == spec.size:
            self._write(spec, part.reshape(spec.shape))
            return
        if first == 0 or self._collected is None:
            self._collected = np.empty(spec.size, part.dtype)
        self._collected[first : first + part.size] = part
        if first + part.size == spec.size:
            whole, self._collected = self._collected, None
            self._write(spec, whole.reshape(spec.shape))

    def _wanted(self, name: str) -> TensorSpec:
        spec = self._todo.get(name)
        if spec is None:
            known = any(name == spec.name for spec in self.contents.tensors)
            if known:
                raise CheckpointError(f"tensor {name!r} was written before")
            raise TensorNotFoundError(f"the output has no tensor {name!r}")
        return spec

    def write(self, name: str, array: Array) -> None:
        """Add one tensor of ``contents.tensors``: stored elements, in its own dtype and shape.

        Raises
        ------
        TensorNotFoundError
            The contents name no such tensor.
        CheckpointError
            Another dtype or shape than announced, or written before.
        OutputError
            Disk full or the like.
        """
        spec = self._wanted(name)
        if array.shape != spec.shape or array.dtype != stored_dtype(spec.dtype):
            raise CheckpointError(
                f"tensor {name!r} was announced as {spec.dtype} {list(spec.shape)}, "
                f"but an array of {array.dtype} {list(array.shape)} came"
            )
        self._write(spec, array if array.flags.c_contiguous else array.copy(order="C"))
        del self._todo[name]

    def commit(self) -> None:
        """Write what is left (aliases too), flush to disk, and rename into place.

        Raises
        ------
        CheckpointError
            A tensor is missing.
        OutputError
            Disk full or the like. Either way nothing is left behind.
        """
        try:
            if self._todo:
                raise CheckpointError(f"tensors never written: {shorten(self._todo)}")
            self._finish()
        except BaseException:
            self.abort()
            raise
        self._publish()

    @abstractmethod
    def abort(self) -> None:
        """Remove what has been written; does nothing after :meth:`commit`."""

    @abstractmethod
    def _write(self, spec: TensorSpec, array: Array) -> None:
        """Write one checked, C-contiguous tensor (and its aliases, if they need bytes)."""

    @abstractmethod
    def _finish(self) -> None:
        """Write what comes after the last tensor."""

    @abstractmethod
    def _publish(self) -> None:
        """Give the output its name; on failure nothing is left."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.commit()
        else:
            self.abort()


class FileWriter(CheckpointWriter):
    """A checkpoint that is one file.

    Parameters
    ----------
    path : str or PathLike
        Destination, a regular file or absent.
    contents : Contents
    force : bool
        Replace a file that exists.

    Raises
    ------
    OutputError
        The destination exists or cannot be written.
    """

    def __init__(
        self, path: str | os.PathLike[str], contents: Contents, *, force: bool = False
    ) -> None:
        super().__init__(contents)
        self._output = AtomicFile(path, force=force)

    def abort(self) -> None:
        """Remove the temporary file; does nothing after :meth:`commit`."""
        self._output.abort()

    def _publish(self) -> None:
        self._output.commit()
