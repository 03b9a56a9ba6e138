"""From what a reader finds in the file to finished tensors, in order, with the decoder between."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np

from weightvid.beside import ALONE, Side
from weightvid.codec.decode import Decoder, DecoderSettings
from weightvid.container.digits import Inflated, decompress
from weightvid.container.exact import parse_exact
from weightvid.container.reader import ExactPayload, Fragment, Head
from weightvid.container.records import ExactEntry, FrameEntry, Index, Sidecar
from weightvid.container.sidecar import check_frame
from weightvid.errors import CodecError, FormatError
from weightvid.loader.assemble import Array, Assembler, ExactAssembler, Quantized
from weightvid.loader.stream import Spill, Streamed
from weightvid.tile import Samples

Event = Fragment | ExactPayload | Index


@dataclass(frozen=True, slots=True)
class Found:
    """A finished tensor on its way to the user: its id, and its elements or its levels."""

    tensor: int
    value: Array | Quantized | Streamed
    side: Side = ALONE

    def stored(self, check: bool) -> Array:
        """Elements in the tensor's own dtype; ``check`` compares a quantized one's hash."""
        if isinstance(self.value, Quantized):
            return self.value.stored(check, self.side)
        if isinstance(self.value, Streamed):
            parts = [part.reshape(-1) for part in self.value.parts(check)]
            return np.concatenate(parts).reshape(self.value.spec.shape)
        return self.value

    def parts(self, check: bool) -> Iterator[Array]:
        """The same elements in consecutive parts, of any shapes."""
        if isinstance(self.value, np.ndarray):
            return iter((self.value,))
        return self.value.parts(check)


@dataclass(slots=True)
class _Seen:
    """What a stream has shown, to be compared with its index."""

    ribbon: list[int] = field(default_factory=list)
    frames: list[FrameEntry] = field(default_factory=list)
    exact: list[ExactEntry] = field(default_factory=list)
    index: Index | None = None

    def check(self) -> None:
        if self.index is None:
            return
        seen = Index(tuple(self.ribbon), tuple(self.frames), tuple(self.exact), self.index.sqnr_db)
        if self.index != seen:
            raise FormatError("the index does not match what the file holds", code="index")


@dataclass(slots=True)
class _Run:
    """The state of one pass."""

    exact: ExactAssembler
    inflated: dict[int, Inflated] = field(default_factory=dict)
    waiting: deque[Fragment | ExactPayload] = field(default_factory=deque)
    seen: _Seen = field(default_factory=_Seen)
    failure: FormatError | None = None


class Pipeline:
    """Decodes frames and assembles tensors.

    Parameters
    ----------
    head : Head
    threads : int
        Frames decoded at the same time; 0: one per core.
    strict : bool
        Compare the index with what came before it. Without, a file whose boxes were moved by a
        tool that does not know of the index can still be read from front to back.
    """

    def __init__(self, head: Head, threads: int, strict: bool = False) -> None:
        self._strict = strict
        self._tensors = head.header.tensors
        header = head.header
        self._settings = DecoderSettings(head.track.record, header.form, header.codec, threads)
        self._side = Side(threads)

    def close(self) -> None:
        """End the thread that works beside."""
        self._side.close()

    def run(
        self, events: Iterable[Event], assembler: Assembler, spill: Spill | None = None
    ) -> Iterator[Found]:
        """Tensors in the order in which they are complete.

        A defect in the events ends them; what came before it is still decoded and given, and then
        the defect is raised. With ``spill``, large exact tensors may be held outside memory.

        Raises
        ------
        FormatError
            ``packet``, ``order``, ``digest``, ``digits``, ``index``, and whatever the events raise.
        """
        beside = assembler.takes_all and not self._side.alone
        run = _Run(ExactAssembler(self._tensors, spill))
        for fragment, luma in self._decode(events, run):
            # The frame is hashed while it is unfolded; no tensor leaves before.
            checked = self._check(fragment, luma)
            yield from self._boxed(run)
            run.waiting.popleft()
            if beside:
                self._inflate(fragment, run)
            inflated = run.inflated.pop(fragment.sidecar.frame, None)
            found = assembler.add(fragment.sidecar, luma, inflated)
            try:
                done = next(found, None)
            finally:
                checked.result()
            while done is not None:
                yield Found(*done, self._side)
                done = next(found, None)
        yield from self._boxed(run)
        if run.failure is not None:
            raise run.failure
        if self._strict:
            run.seen.check()

    def frames(self, events: Iterable[Event]) -> Iterator[tuple[Sidecar, Samples]]:
        """Each frame's sidecar and luma, shape (height, width); a view until the next is asked."""
        run = _Run(ExactAssembler(self._tensors))
        for fragment, luma in self._decode(events, run):
            self._check(fragment, luma).result()
            run.waiting.popleft()
            yield fragment.sidecar, luma
        if run.failure is not None:
            raise run.failure

    def _check(self, fragment: Fragment, luma: Samples) -> Future[None]:
        return self._side.do(check_frame, fragment.payload, luma, fragment.sidecar.frame)

    def _inflate(self, fragment: Fragment, run: _Run) -> None:
        """Let the digits of a frame and of the next one be inflated, beside."""
        following = next((e for e in run.waiting if isinstance(e, Fragment)), fragment)
        form = self._settings.form
        samples = form.width * form.height
        for sidecar in (fragment.sidecar, following.sidecar):
            if sidecar.frame not in run.inflated:
                run.inflated[sidecar.frame] = {
                    kind: self._side.do(decompress, data, kind, samples)
                    for kind, data in sidecar.digits.items()
                }

    def _decode(self, events: Iterable[Event], run: _Run) -> Iterator[tuple[Fragment, Samples]]:
        """Decoded frames, their digests to be checked; each still waits in ``run``."""
        try:
            decoder = Decoder(self._settings)
            for number, luma in decoder.decode(_packets(events, run)):
                fragment = next(e for e in run.waiting if isinstance(e, Fragment))
                if fragment.sidecar.frame != number:
                    raise FormatError(f"frame {number} comes out of order", code="order")
                yield fragment, luma
        except CodecError as error:
            raise FormatError(str(error), code="packet") from None

    def _boxed(self, run: _Run) -> Iterator[Found]:
        """Tensors of the boxes that come before the next frame."""
        while run.waiting and isinstance(event := run.waiting[0], ExactPayload):
            run.waiting.popleft()
            items = parse_exact(event.box.payload, self._tensors)
            ids = tuple(item.tensor for item in items)
            run.seen.exact.append(ExactEntry(event.box.offset, event.box.size, ids))
            for item in items:
                if done := run.exact.add(item):
                    yield Found(*done)


def _packets(events: Iterable[Event], run: _Run) -> Iterator[tuple[int, bytes]]:
    """Packets for the decoder; all else that happens is noted in ``run``."""
    try:
        for event in events:
            if isinstance(event, Index):
                run.seen.index = event
                continue
            run.waiting.append(event)
            if isinstance(event, Fragment):
                run.seen.frames.append(event.entry)
                run.seen.ribbon += [start.tensor for start in event.sidecar.starts]
                yield event.sidecar.frame, event.packet
    except FormatError as error:
        run.failure = error
