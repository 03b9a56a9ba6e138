"""Archives at paths and addresses: opened, walked without decoding, and read when damaged."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np

from weightvid import checkpoint, loader
from weightvid.container import root_of
from weightvid.errors import CodecError, FormatError, TruncatedError
from weightvid.exact import ahead
from weightvid.loader import Archive, Array, Part, Sidecar, TensorSpec, dequantize, from_float32
from weightvid.progress import Progress, Report, quiet

#: where an archive is: a path, an address, or an open file.
Location = str | os.PathLike[str] | BinaryIO


def open_file(location: Location, stack: ExitStack) -> BinaryIO:
    """A file at a path or address, which the stack closes; one that is open already stays so."""
    if not isinstance(location, (str, os.PathLike)):
        return location
    if checkpoint.is_url(location):
        from weightvid.remote import open_remote

        return stack.enter_context(open_remote(location))
    return stack.enter_context(Path(location).open("rb"))


@contextmanager
def open_anywhere(
    location: Location | Archive,
    decoder: str | loader.PacketDecoder = "software",
    base: Sequence[Location] = (),
    layers: int = loader.MAX_LAYERS,
) -> Iterator[Archive]:
    """Archive at a path, an address, or in a file: decoded on all cores, every hash checked.

    A file or an archive that was given open stays open. ``base``: what the archive is an update to,
    of a chain the oldest first; ``layers``: how many are read. What fails is a FormatError,
    OSError or RemoteError.
    """
    if isinstance(location, Archive):
        yield location
        return
    with ExitStack() as stack:
        file = open_file(location, stack)
        archive = loader.open_archive(
            file, decoder=decoder, threads=0, check_tensors=True, layers=layers
        )
        if base:
            archive.use_base(stack.enter_context(open_chain(base))[-1])
        yield archive


@contextmanager
def seekable(location: Location) -> Iterator[Location]:
    """An archive that can be read in any order: what comes by a pipe, in a temporary copy."""
    with ExitStack() as stack:
        named = isinstance(location, (str, os.PathLike))
        if named and not checkpoint.is_url(location) and Path(cast(str, location)).is_fifo():
            location = stack.enter_context(Path(cast(str, location)).open("rb"))
        if not isinstance(location, (str, os.PathLike)) and not location.seekable():
            copy = stack.enter_context(tempfile.TemporaryFile(prefix="weightvid-"))
            shutil.copyfileobj(location, copy)
            location = cast(BinaryIO, copy)
        yield location


@contextmanager
def open_chain(bases: Sequence[Location]) -> Iterator[list[Archive]]:
    """An archive and the updates to it, the oldest first: the last reads as if it stood alone."""
    with ExitStack() as stack:
        archives = [stack.enter_context(open_anywhere(location)) for location in bases]
        first = archives[0].header.layers
        if archives[1:] and first and first.base and archives[0].base is None:
            raise FormatError(f"{bases[0]} is itself an update: its base must come first", "base")
        for before, after in pairwise(archives):
            after.use_base(before)
        yield archives


def checked_tensors(
    archive: Archive, heads: dict[int, bytes] | None = None
) -> Iterator[tuple[TensorSpec, Array]]:
    """All tensors, then a FormatError (``tensor-digest``) unless their hashes give the root.

    ``heads`` receives the heads of the hashes, by the numbers of the tensors.
    """
    numbers = {spec.name: number for number, spec in enumerate(archive.header.tensors)}
    heads = {} if heads is None else heads
    for spec, array in archive.stored_items():
        heads[numbers[spec.name]] = loader.tensor_sha256(array)[: loader.TENSOR_SHA_BYTES]
        yield spec, array
    if archive.root != root_of(archive.header.tensors, heads):
        raise FormatError("the tensors are not those of the archive's root", "tensor-digest")


class Defect(NamedTuple):
    """The first thing found wrong: its stable code (see FORMAT.md), message and byte offset."""

    code: str
    message: str
    offset: int | None = None


@dataclass(slots=True)
class Salvage:
    """Iterates over the whole tensors of an archive, and remembers what was wrong.

    A defect does not end the iteration where the archive has its index: the tensors that have not
    come yet are then tried one by one. With ``rows``, a tensor of several parts is given, too, of
    which some are whole: other rows are zero. Known after the iteration are the first ``defect``
    met; the names that are ``missing``, and of those that came ``coarse``, without all layers; and
    of tensors that came in part what is ``lost``, and zero: first row, and rows, of each span.
    Progress is reported as ``stage``.
    """

    archive: Archive
    progress: Report = quiet
    stage: str = ""
    rows: bool = False
    defect: Defect | None = None
    missing: tuple[str, ...] = ()
    coarse: tuple[str, ...] = ()
    lost: dict[str, list[tuple[int, int]]] = field(default_factory=dict)

    def __iter__(self) -> Iterator[tuple[TensorSpec, Array]]:
        specs, done, done_bytes = self.archive.header.tensors, 0, 0
        total, total_bytes = sum(s.size for s in specs), sum(s.stored_bytes for s in specs)
        for spec, array in self._tensors():
            yield spec, array
            done, done_bytes = done + spec.size, done_bytes + spec.stored_bytes
            self.progress(Progress(self.stage, done, total, done_bytes, total_bytes))

    def _tensors(self) -> Iterator[tuple[TensorSpec, Array]]:
        left = {spec.name: spec for spec in self.archive.header.tensors}
        try:
            for spec, array in self.archive.stored_items():
                del left[spec.name]
                yield spec, array
            if self.archive.source.seekable:
                _ = self.archive.root  # an error, if no index is where it should be
        except (FormatError, CodecError) as error:
            if self.defect is None:
                code, offset = getattr(error, "code", "decode"), getattr(error, "offset", None)
                self.defect = Defect(code, str(error), offset)
            self.coarse = getattr(error, "coarse", ())
            for name, array in self._one_by_one(set(left)):
                yield left.pop(name), array
            for number, spec in enumerate(self.archive.header.tensors if self.rows else ()):
                found = self._in_part(number, spec) if spec.name in left else None
                if found is not None:
                    yield left.pop(spec.name), found
        self.missing = tuple(left)

    def _one_by_one(self, names: Collection[str]) -> Iterator[tuple[str, Array]]:
        """Tensors that can be read by the index; a damaged frame is decoded once, not for each."""
        archive, bad = self.archive, set[int]()
        for number, spec in enumerate(archive.header.tensors if archive.index else ()):
            spans = archive.index.spans.get(number, ()) if archive.index else ()
            frame = spans[0].start if [len(span) for span in spans] == [1] else -1
            if spec.name in names and frame not in bad:
                try:
                    array = archive.stored(spec.name)
                except (FormatError, CodecError) as error:
                    # What is wrong with one tensor, or with the base, says nothing of the frame.
                    if frame >= 0 and archive.base is None and not getattr(error, "tensor", ""):
                        bad.add(frame)
                    if (coarse := self._coarse(spec.name)) is not None:
                        yield spec.name, coarse
                else:
                    yield spec.name, array

    def _coarse(self, name: str) -> Array | None:
        """The sum of the layers below one that is damaged."""
        archive, layers = self.archive, self.archive.layers
        try:
            for archive.layers in range(layers - 1, 0, -1):
                with suppress(FormatError, CodecError):
                    found = archive.stored(name)
                    self.coarse += (name,)
                    return found
        finally:
            archive.layers = layers
        return None

    def _in_part(self, number: int, spec: TensorSpec) -> Array | None:
        """Elements of the parts of a tensor that lie on whole frames; None if there are none."""
        archive, at, parts = self.archive, 0, dict[int, Array]()

        def take(part: Part, matrix: Array) -> None:
            bases = [archive.header.bases[basis] for basis in part.bases]
            parts[part.first_row] = from_float32(dequantize(matrix, part, bases), spec.dtype)

        spans = archive.index.spans.get(number, ()) if archive.index else ()
        assembler = loader.Assembler(archive.header, number, sink=take)
        for frame in chain(*spans) if archive.header.mask(number) == 2 else ():
            try:
                for sidecar, luma in archive.frames(range(frame, frame + 1)):
                    all(assembler.add(sidecar, luma))
            except (FormatError, CodecError):
                assembler = loader.Assembler(archive.header, number, sink=take)
        if not parts:
            return None
        columns = next(iter(parts.values())).shape[1]
        array = np.zeros((spec.size // columns, columns), loader.DTYPES[spec.dtype])
        lost = self.lost[spec.name] = []
        for first, elements in [*sorted(parts.items()), (len(array), array[:0])]:
            if first > at:
                lost.append((at, first - at))
            array[first : first + len(elements)] = elements
            at = first + len(elements)
        return array.reshape(spec.shape)


def read_tensors(archive: Archive, names: Collection[str]) -> Iterator[tuple[TensorSpec, Array]]:
    """Tensors of these names, without decoding many frames of others.

    A FormatError or CodecError says that the archive is damaged there; a TruncatedError names those
    of ``names`` that are missing.
    """
    wanted = {number: s for number, s in enumerate(archive.header.tensors) if s.name in names}
    if archive.index is not None:
        spans = archive.index.spans
        frames = sum(len(span) for number in wanted for span in spans.get(number, ()))
        if frames < len(archive.index.frames):
            for number in sorted(wanted, key=lambda n: [s.start for s in spans.get(n, ())]):
                yield wanted[number], archive.stored(wanted[number].name)
            return
    left, everything = {s.name for s in wanted.values()}, len(archive.header.tensors)
    try:
        for spec, array, _, coming, _ in archive.arrivals():
            if spec.name in left and not coming:
                left.discard(spec.name)
                yield spec, array
            if not left and len(wanted) < everything:
                return  # the rest of a pipe need not arrive
    except TruncatedError as error:
        if len(wanted) == everything:
            raise
        why = f"the archive is cut short; missing or coarse: {', '.join(sorted(left))}"
        lost, coarse = left.difference(error.coarse), left.intersection(error.coarse)
        raise TruncatedError(why, error.offset, sorted(lost), sorted(coarse)) from None


def stored_pieces(archive: Archive) -> Iterator[tuple[TensorSpec, int, Array]]:
    """Consecutive stored elements of all tensors in file order, all hashes checked.

    Yields
    ------
    TensorSpec, int, ndarray
        Tensor, number of the first element, elements; of an archive of one layer a part at a time,
        so that no whole tensor is ever in memory. A FormatError comes where the archive is
        damaged or cut short; ``tensor-digest`` at the last piece of a tensor.
    """
    header, ready = archive.header, list[tuple[int, int, Array]]()
    if header.layers is not None:  # sums need whole tensors
        yield from ((spec, 0, array.reshape(-1)) for spec, array in archive.stored_items())
        return

    def take(part: Part, matrix: Array) -> None:
        bases = [header.bases[basis] for basis in part.bases]
        values = dequantize(matrix, part, bases)
        dtype = header.tensors[part.tensor].dtype
        ready.append((part.tensor, part.first_row * part.columns, from_float32(values, dtype)))

    def parse(event: Any) -> list[tuple[int, int, Array]]:
        return list(loader.parse_exact(event, header)) if isinstance(event, bytes) else []

    assembler, digests = loader.Assembler(header, sink=take), dict[int, Any]()
    left = {number: spec.size for number, spec in enumerate(header.tensors)}
    try:
        for event, parsed in ahead(parse, archive.events()):
            ready.extend(parsed.result())
            if isinstance(event, tuple):
                all(assembler.add(*event))
            for number, first, elements in ready:
                spec, flat = header.tensors[number], np.ascontiguousarray(elements).reshape(-1)
                if first != spec.size - left.get(number, -1):
                    why = f"parts of tensor {spec.name!r} are out of order"
                    raise FormatError(why, "order", tensor=spec.name)
                if isinstance(event, tuple):
                    digests.setdefault(number, hashlib.sha256()).update(flat)
                left[number] -= flat.size
                if isinstance(event, bytes) and not left[number]:
                    del left[number]
                yield spec, first, flat
            ready.clear()
            for end in event[0].ends if isinstance(event, tuple) else ():
                found, name = digests.pop(end.tensor, None), header.tensors[end.tensor].name
                size = loader.TENSOR_SHA_BYTES
                if left.pop(end.tensor, 1) or found.digest()[:size] != end.sha256:
                    why = f"tensor {name!r} is not what was packed"
                    raise FormatError(why, "tensor-digest", tensor=name)
    except TruncatedError as error:
        missing = [header.tensors[number].name for number in left]
        why = f"the archive is cut short; missing: {', '.join(missing[:5]) or 'its index'}"
        raise TruncatedError(why, error.offset, missing) from None
    if left:
        name = header.tensors[min(left)].name
        raise FormatError(f"tensor {name!r} is not in the archive", "order", tensor=name)


def walk_boxes(file: BinaryIO, at: int = 0) -> Iterator[tuple[bytes, int, int]]:
    """Type (16 bytes of ours), offset and bytes of each whole box of a file that can seek."""
    end = file.seek(0, os.SEEK_END)
    while at + 8 <= end:
        file.seek(at)
        head = file.read(24)
        size, kind = int.from_bytes(head[:4], "big"), head[4:8]
        if not 8 <= size <= end - at:
            return
        yield head[8:24] if kind == b"uuid" else kind, at, size
        at += size


class Tail(NamedTuple):
    """The end of a whole archive: offset of the index, the boxes behind it, offset of mfra."""

    start: int
    boxes: tuple[tuple[bytes, int, int], ...]
    mfra: int


def find_tail(file: BinaryIO) -> Tail:
    """Index and what is behind it, in a file that can seek; a TruncatedError without an index."""
    file.seek(4)
    if file.read(4) != b"ftyp":
        raise FormatError("this is not a weightvid archive", "ftyp", 0)
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 16))
    end = file.read(16)
    mfra = size - int.from_bytes(end[12:], "big")
    if end[4:8] == b"mfro" and mfra >= 4:
        file.seek(mfra - 4)
        index = mfra - int.from_bytes(file.read(4), "little")
        boxes = tuple(walk_boxes(file, index)) if index >= 0 else ()
        if boxes and boxes[0][0] == loader.INDEX_UUID and boxes[-1][:2] == (b"mfra", mfra):
            return Tail(index, boxes[1:-1], mfra)
    raise TruncatedError("the archive has no index: it is cut short or damaged", size)


def walk_frames(archive: Archive) -> Iterator[tuple[Sidecar, int]]:
    """Sidecars and bytes of packets of all whole frames; a FormatError if a sidecar is damaged."""
    file, sidecar = archive.source.file, None
    for kind, offset, size in walk_boxes(file):
        if kind == loader.FRAME_UUID:
            file.seek(offset + 24)
            body = loader.open_body(file.read(size - 24), f"the sidecar at byte {offset}")
            sidecar = loader.parse_sidecar(body, archive.header)
        elif kind == b"mdat" and sidecar is not None:
            yield sidecar, size - 8


def place_parts(
    sidecars: Iterable[Sidecar], archive: Archive
) -> Iterator[list[tuple[int, int, int]]]:
    """For each frame what lies on it: number of the tensor, first ribbon column, columns."""
    capacity = archive.track.width * (archive.track.height // loader.BAND)
    going_on: list[tuple[int, int]] = []
    for sidecar in sidecars:
        pieces = [(tensor, 0, left) for tensor, left in going_on]
        pieces += [(own.tensor, own.column, -(-own.size // loader.BAND)) for own in sidecar.parts]
        going_on = [(tensor, at + n - capacity) for tensor, at, n in pieces if at + n > capacity]
        yield [(tensor, at, max(0, min(n, capacity - at))) for tensor, at, n in pieces]
