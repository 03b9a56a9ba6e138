"""Files without their tensors: what is around them travels, and takes them back.

For kinds whose files hold tensors as they are, so that nobody needs to understand the rest to write
it again: LiteRT and Core ML. A template is one line of JSON, which says where which tensor goes
(name: offset, type, shape, axes), and then the other bytes of the file.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from weightvid.checkpoint import base
from weightvid.errors import CheckpointError
from weightvid.loader import Array, TensorSpec


@dataclass(frozen=True, slots=True)
class Place:
    """A tensor in a file: a view of what is mapped.

    ``axes`` are in the order in which they are shown; empty: as they are stored.
    """

    stored: Array
    dtype: str
    axes: tuple[int, ...] = ()

    @property
    def shown(self) -> Array:
        """The tensor as people, and the transform of kernels, expect it."""
        return self.stored.transpose(self.axes) if self.axes else self.stored

    @property
    def address(self) -> int:
        """Where it lies in memory."""
        return int(self.stored.__array_interface__["data"][0])


def cut(whole: Array, places: Mapping[str, Place]) -> tuple[dict[str, Place], bytes]:
    """Tensors to keep, and the template of their file.

    What shows a part of another tensor, or the same in another shape, is left out: it comes back
    with that one.
    """
    start = int(whole.__array_interface__["data"][0])
    rows: dict[str, list[object]] = {}
    kept: set[str] = set()
    rest: list[bytes] = []
    end = begun = 0
    last: tuple[object, ...] = ()
    for name, place in sorted(places.items(), key=lambda item: item[1].address):
        at = place.address - start
        look = (place.dtype, place.shown.shape, place.axes)
        if at >= end:
            rows[name] = [at, *look]
            rest.append(whole[end:at].tobytes())
            end, begun, last = at + place.stored.nbytes, at, look
        elif at != begun or look != last:
            continue
        kept.add(name)
    text = json.dumps(rows, ensure_ascii=False, separators=(",", ":"))
    template = b"".join((text.encode(), b"\n", *rest, whole[end:].tobytes()))
    return {name: place for name, place in places.items() if name in kept}, template


def tensors_of(template: bytes) -> Iterator[tuple[TensorSpec, int, tuple[int, ...]]]:
    """Tensors of a template in the order of the file, their offsets and axes; nothing is checked.

    What is no template is a CheckpointError.
    """
    try:
        for name, (at, dtype, shape, axes) in json.loads(template.partition(b"\n")[0]).items():
            yield TensorSpec(name, dtype, tuple(shape)), at, tuple(map(int, axes))
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        raise CheckpointError("the graph that travelled with the tensors is damaged") from None


class Writer(base.FileWriter):
    """A file from its template; the contents must hold it, and all of its tensors."""

    #: what carries the template, and how people call such files.
    role: ClassVar[str]
    label: ClassVar[str]

    def _plan(self) -> bytes:
        template = self._side_file(self.role)
        if template is None:
            raise CheckpointError(
                f"the source holds no {self.label} graph: only what was packed from such a model "
                "(with its side files) can be written as one; write .safetensors instead"
            )
        self._rest = memoryview(template)[template.find(b"\n") + 1 :]
        self._places: dict[str, tuple[int, tuple[int, ...]]] = {}
        self._gaps: list[tuple[int, int]] = []
        rows, known = list(tensors_of(template)), dict(self.contents.rows())
        if missing := [wanted.name for wanted, _, _ in rows if wanted.name not in known]:
            said = f"a {self.label} model needs all its weights; missing: {base.shorten(missing)}"
            raise CheckpointError(said)
        end, left = 0, len(self._rest)
        for wanted, at, axes in rows:
            spec = known[wanted.name]
            if (spec.dtype, spec.shape) != (wanted.dtype, wanted.shape):
                raise CheckpointError(
                    f"the {self.label} graph wants another type or shape of {spec.name!r} than "
                    f"{spec.dtype} {list(spec.shape)}: unpack it without converting"
                )
            in_order = type(at) is int and 0 <= at - end <= left
            order = set(axes) == set(range(len(axes))) and len(axes) in (0, len(spec.shape))
            if not (in_order and order):
                raise CheckpointError(f"the {self.label} graph has no room for {spec.name!r}")
            self._gaps.append((end, at - end))
            self._places[wanted.name] = at, axes
            left, end = left - (at - end), at + spec.stored_bytes
        for spec in self.contents.tensors:
            if self._places.keys().isdisjoint(self._names_of[spec.name]):
                raise CheckpointError(f"the {self.label} graph has no tensor {spec.name!r}")
        self._gaps.append((end, left))
        return b""

    def _write(self, spec: TensorSpec, array: Array) -> None:
        for name in self._names_of[spec.name]:
            if name in self._places:
                at, axes = self._places[name]
                stored = array.transpose(np.argsort(axes)) if axes else array
                self._write_at(at, np.ascontiguousarray(stored))

    def _finish(self) -> None:
        rest = self._rest
        for at, size in self._gaps:
            self._output.file.seek(at)
            self._output.file.write(rest[:size])
            rest = rest[size:]
