"""Parity: erasure blocks beside an archive, by which damaged bytes are restored bit for bit.

The bytes of a file are laid out row by row on a grid; the parity is a few further rows, by a
Reed-Solomon code over each column (zfec). A burst touches a column only as often as rows fit into
it, wherever it strikes: the header, the index and the parity itself are no exceptions. CRC-32s tell
which bytes are damaged; FORMAT.md describes the box.
"""

import os
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple

import numpy as np

from weightvid.archives import find_tail
from weightvid.atomic import atomic_output
from weightvid.container import record, stored_body, tail_box, uint
from weightvid.errors import QuantizationError, RepairError
from weightvid.loader import Bytes

PARITY_UUID: Final = b"weightvid-parity"
SEAL, TABLE, ROWS, ROW_HASHES = 96, 98, 100, 102
MIN_SHARE, MAX_SHARE = 0.005, 0.2
#: bytes of a file that one parity box protects, at most.
_SECTION: Final = 1 << 28
#: rows and parity rows of a grid together, as the code is over GF(256); parity rows.
_CODE, _MAX_ROWS = 256, 8
#: before, after, indexed, section, sections, row, group, rows, CRC-32 of the table; then its own.
_SEAL: Final = struct.Struct("<QIIHHIIBI")
_SEAL_BYTES: Final = _SEAL.size + 4
_SEAL_HEAD: Final = bytes((SEAL, _SEAL_BYTES))
Span = tuple[int, int]
#: bytes of a line of the grid: its number, where, what.
_Patch = tuple[int, slice, Bytes]


class _Seal(NamedTuple):
    """What a parity box says of itself, at both of its ends.

    Bytes before the first parity box, and behind the last; from the start of the index to the first
    parity box; number of this section, and how many there are; bytes of a row of the grid, and of
    what a CRC-32 is of; parity rows; CRC-32 of the table of CRC-32s.
    """

    before: int
    after: int
    indexed: int
    section: int
    sections: int
    row: int
    group: int
    rows: int
    table_crc: int

    def is_possible(self, size: int) -> bool:
        """Whether a file of this size can have it."""
        counts = self.row > 0 and self.group > 0 and 0 < self.rows < _CODE
        inside = self.section < self.sections and self.before + self.after < size
        return counts and inside and _Layout(self).lines + self.rows <= _CODE

    def pack(self) -> bytes:
        fields = _SEAL.pack(*self)
        return fields + zlib.crc32(fields).to_bytes(4, "little")


class _Layout:
    """Where things lie in the stream of one section: its bytes, its box, the bytes behind it."""

    def __init__(self, seal: _Seal) -> None:
        self.seal, n, row, rows = seal, seal.section, seal.row, seal.rows
        self.start = seal.before * n // seal.sections
        self.data = seal.before * (n + 1) // seal.sections - self.start
        self.after = seal.after if n + 1 == seal.sections else 0
        self.groups = -(-(self.data + self.after) // seal.group)
        parity, hashes = rows * row, -(-rows * row // seal.group)
        self.table = self.data + 33 + 2 + _SEAL_BYTES + 1 + len(uint(4 * self.groups))
        self.parity = self.table + 4 * self.groups + 1 + len(uint(parity))
        self.hashes = self.parity + parity + 1 + len(uint(4 * hashes))
        self.behind = self.hashes + 4 * hashes + 2 + _SEAL_BYTES + 4
        self.size = self.behind + self.after
        self.box_bytes, self.row_hashes = self.behind - self.data, hashes
        self.lines = -(-self.size // row)

    def group_spans(self, group: int) -> list[Span]:
        """Where the bytes of a group lie: in two places, if the box is between them."""
        first, last = group * self.seal.group, (group + 1) * self.seal.group
        last, gap = min(last, self.data + self.after), self.box_bytes
        here = [(first, min(last, self.data)), (max(first, self.data) + gap, last + gap)]
        return [span for span in here if span[0] < span[1]]


class _Grid:
    """The stream of one section, and its parity."""

    def __init__(self, layout: _Layout, stream: Bytes) -> None:
        self.layout, seal = layout, layout.seal
        rows = stream[layout.parity :][: seal.rows * seal.row].reshape(seal.rows, seal.row)
        self.parity = np.roll(rows, layout.parity % seal.row, axis=1)
        self.row_hashes = stream[layout.hashes : layout.hashes + 4 * layout.row_hashes].tobytes()
        self.code = np.zeros((layout.lines, seal.row), np.uint8)
        self.stream = self.code.reshape(-1)  # what a box holds besides its table counts as zero
        self._table = slice(layout.table, layout.table + 4 * layout.groups)
        for part in (slice(0, layout.data), self._table, slice(layout.behind, layout.size)):
            self.stream[part] = stream[part]
        self._decoder = _zfec().Decoder(layout.lines, layout.lines + seal.rows)

    @property
    def table(self) -> bytes:
        return self.stream[self._table].tobytes()

    @property
    def table_is_right(self) -> bool:
        return zlib.crc32(self.table) == self.layout.seal.table_crc

    def group_crc(self, group: int) -> bytes:
        crc = 0
        for first, last in self.layout.group_spans(group):
            crc = zlib.crc32(self.stream[first:last].data, crc)
        return crc.to_bytes(4, "little")

    def bad_groups(self) -> list[int]:
        table, groups = self.table, range(self.layout.groups)
        return [n for n in groups if self.group_crc(n) != table[4 * n : 4 * n + 4]]

    def bad_parity(self) -> list[Span]:
        """Spans of the parity that do not match their CRC-32s."""
        layout, seal, bad = self.layout, self.layout.seal, []
        flat = np.roll(self.parity, -(layout.parity % seal.row), axis=1).reshape(-1)
        for n in range(layout.row_hashes):
            part, crc = flat[n * seal.group : (n + 1) * seal.group], self.row_hashes[4 * n :][:4]
            if zlib.crc32(part.data) != int.from_bytes(crc, "little"):
                first = layout.parity + n * seal.group
                bad.append((first, first + part.size))
        return bad

    def encode(self) -> None:
        """Make table and parity anew."""
        layout = self.layout
        made = b"".join(map(self.group_crc, range(layout.groups)))
        self.stream[self._table] = np.frombuffer(made, np.uint8)
        lines, rows = layout.lines, layout.seal.rows
        encoder = _zfec().Encoder(lines, lines + rows)
        found = encoder.encode(list(self.code), list(range(lines, lines + rows)))
        self.parity = np.stack([np.frombuffer(row, np.uint8) for row in found])

    def decode(self, bad: Sequence[Span]) -> list[_Patch] | None:
        """What damaged spans should hold, by all that is not damaged; None: too much is."""
        layout, row, rows = self.layout, self.layout.seal.row, self.layout.seal.rows
        parity = layout.parity, layout.parity + rows * row
        edges = sorted({0, row, *(end % row for span in (*bad, parity) for end in span)})
        patches: list[_Patch] = []
        for left, right in pairwise(edges):
            lost, spare = set[int](), set(range(rows))
            for first, last in bad:
                for cell in range(first + (left - first) % row, last, row):
                    if parity[0] <= cell < parity[1]:
                        spare.discard((cell - parity[0]) // row)
                    else:
                        lost.add(cell // row)
            if len(lost) > len(spare):
                return None
            if lost:
                patches += self._column(slice(left, right), sorted(lost), sorted(spare))
        return patches

    def _column(self, here: slice, lost: list[int], spare: list[int]) -> Iterator[_Patch]:
        blocks, ids = list(self.code[:, here]), list(range(self.layout.lines))
        for line, instead in zip(lost, spare, strict=False):
            blocks[line], ids[line] = self.parity[instead, here], self.layout.lines + instead
        found = self._decoder.decode(blocks, ids)
        return ((line, here, np.frombuffer(found[line], np.uint8)) for line in lost)

    def put(self, patches: Sequence[_Patch]) -> list[_Patch]:
        """Write bytes; gives those that were there."""
        before = [(line, here, self.code[line, here].copy()) for line, here, _ in patches]
        for line, here, data in patches:
            self.code[line, here] = data
        return before

    def box(self) -> bytes:
        layout, seal = self.layout, self.layout.seal
        flat = np.roll(self.parity, -(layout.parity % seal.row), axis=1).tobytes()
        crcs = (zlib.crc32(flat[at : at + seal.group]) for at in range(0, len(flat), seal.group))
        sealed = record(SEAL, seal._replace(table_crc=zlib.crc32(self.table)).pack())
        hashes = record(ROW_HASHES, *(crc.to_bytes(4, "little") for crc in crcs))
        table, rows = record(TABLE, self.table), record(ROWS, flat)
        before = sum(_Layout(seal._replace(section=n)).box_bytes for n in range(seal.section))
        body = stored_body(sealed, table, rows, hashes, sealed)
        return tail_box(PARITY_UUID, body, seal.indexed + before)


def _zfec() -> Any:
    try:
        return import_module("zfec")
    except ImportError:
        why = "parity needs the package zfec: pip install 'weightvid[repair]'"
        raise RepairError(why) from None


def _choose(before: int, after: int, share: float) -> _Seal:
    """Grid of a file: as many parity rows as there may be, and CRC-32s for what is left."""
    check_share(share)
    sections = -(-before // _SECTION)
    size = -(-before // sections) + after
    seal = _Seal(before, after, 0, 0, sections, 1, size, 1, 0)
    # Without the head of the box and its seals.
    budget = int(share * size) - _Layout(seal).box_bytes - 8
    for rows in range(_MAX_ROWS, 0, -1):
        row = -(-int(size * (1 + share)) // (_CODE - rows))
        if budget - rows * row >= max(24, budget // 20):
            break
    else:  # a file of a few kilobytes
        rows, row = 1, max(64, -(-(size + 512) // (_CODE - 1)))
        budget = row + 64
    hashes = min(budget - rows * row - 8, max(16, budget // 8))
    group = max(64, -(-4 * (size + budget) // hashes))
    row = (budget - 4 * -(-size // group) - 4 * -(-budget // group)) // rows
    return seal._replace(row=row, group=group, rows=rows)


def check_share(share: float) -> None:
    """Refuse a share of parity (QuantizationError), or any without its package (RepairError)."""
    if not MIN_SHARE <= share <= MAX_SHARE:
        raise QuantizationError(
            f"a parity of {100 * share:g} % is not possible; allowed are {100 * MIN_SHARE:g} to "
            f"{100 * MAX_SHARE:g} %"
        )
    _zfec()


def add_parity(file: BinaryIO, share: float) -> int:
    """Put parity into a whole archive, instead of what it has; gives the new size of the file.

    A RepairError without the package zfec; a FormatError if the archive is not whole.

    Parameters
    ----------
    file : binary file object
        Open for reading and writing.
    share : float
        Bytes of the parity by those of the file: 0.005 to 0.2 (else a QuantizationError).
        What belongs to it (hashes, sizes) is counted; a file of a few kilobytes gets more, as
        parity has a least size.
    """
    tail = find_tail(file)
    before = min((at for kind, at, _ in tail.boxes if kind == PARITY_UUID), default=tail.mfra)
    file.seek(tail.mfra)
    after = file.read()
    seal = _choose(before, len(after), share)._replace(indexed=before - tail.start)
    boxes = []
    for section in range(seal.sections):
        layout = _Layout(seal._replace(section=section))
        file.seek(layout.start)
        parts = file.read(layout.data), bytes(layout.box_bytes), after[: layout.after]
        grid = _Grid(layout, np.frombuffer(b"".join(parts), np.uint8))
        grid.encode()
        boxes.append(grid.box())
    file.seek(before)
    file.writelines((*boxes, after))
    file.truncate()
    return file.tell()


@dataclass(frozen=True, slots=True)
class RepairReport:
    """What a repair did.

    ``parity_bytes`` are those of the parity boxes; ``restored_bytes`` those of the ``spans`` that
    were damaged: the first byte, and the one behind the last.
    """

    file_bytes: int
    parity_bytes: int
    restored_bytes: int
    spans: tuple[Span, ...]


def repair_archive(
    archive: str | os.PathLike[str],
    destination: str | os.PathLike[str] | None = None,
    *,
    force: bool = False,
) -> RepairReport:
    """Restore the damaged bytes of an archive that has parity.

    A RepairError says that there is no parity, or the damage is larger than it can restore.

    Parameters
    ----------
    archive : path
    destination : path, optional
        Where the repaired archive goes; None: it takes the place of the damaged one, if there was
        any damage. Appears whole, or not at all.
    force : bool
        Replace a destination that exists.
    """
    path, mended, parity = Path(archive), dict[Span, bytes](), 0
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        for layout in map(_Layout, _find_seals(file, size)):
            at, parts = layout.seal.before + parity, list[bytes]()
            places = (layout.start, layout.data), (at, layout.box_bytes)
            for place, count in (*places, (size - layout.after, layout.after)):
                file.seek(place)
                parts.append(file.read(count))
            damaged = np.frombuffer(b"".join(parts), np.uint8)
            grid = _Grid(layout, damaged)
            _mend(grid)
            grid.encode()
            grid.stream[layout.data : layout.behind] = np.frombuffer(grid.box(), np.uint8)
            differ = np.flatnonzero(grid.stream[: layout.size] != damaged)
            parity += layout.box_bytes
            shift = np.where(differ < layout.data, layout.start, at - layout.data)
            for first, last in _runs((differ + shift).tolist()):
                gap = layout.start if first < layout.start + layout.data else at - layout.data
                mended[first, last] = grid.stream[first - gap : last - gap].tobytes()
    if mended or destination is not None:
        to, forced = destination or path, force or destination is None
        with atomic_output(to, force=forced) as output, path.open("rb") as file:
            shutil.copyfileobj(file, output)
            for (first, _), data in mended.items():
                output.seek(first)
                output.write(data)
    restored = sum(last - first for first, last in mended)
    return RepairReport(size, parity, restored, tuple(sorted(mended)))


def _runs(places: Sequence[int]) -> list[Span]:
    """Spans of damaged bytes; those less than 64 apart are one."""
    spans: list[Span] = []
    for place in places:
        if spans and place - spans[-1][1] < 64:
            spans[-1] = spans[-1][0], place + 1
        else:
            spans.append((place, place + 1))
    return spans


def _find_seals(file: BinaryIO, size: int) -> list[_Seal]:
    """Seals of all sections, from wherever in the file one is whole."""
    file.seek(0)
    found, kept, sections = dict[int, _Seal](), b"", 1
    while block := file.read(1 << 24):
        data, at = kept + block, -1
        while (at := data.find(_SEAL_HEAD, at + 1)) >= 0:
            fields = data[at + 2 : at + 2 + _SEAL_BYTES]
            if zlib.crc32(fields[:-4]).to_bytes(4, "little") == fields[-4:]:
                seal = _Seal(*_SEAL.unpack(fields[:-4]))
                if seal.is_possible(size):
                    found.setdefault(seal.section, seal)
                    sections = seal.sections
        kept = data[-_SEAL_BYTES - 1 :]
    seals = [found[section] for section in range(sections) if section in found]
    if len(seals) < sections:
        raise RepairError(
            "the archive has no parity, or none that is left: pack --parity makes it; of a damaged "
            "archive without, `weightvid unpack --partial` saves what is whole"
        )
    boxes = sum(_Layout(seal).box_bytes for seal in seals)
    expected = seals[0].before + boxes + seals[0].after
    if size != expected:
        why = f"the file has {size} bytes and should have {expected}: bytes are missing or inserted"
        raise RepairError(f"{why}, which parity cannot restore; fetch it again")
    return seals


def _mend(grid: _Grid) -> None:
    layout, parity = grid.layout, grid.bad_parity()
    table = layout.table, layout.table + 4 * layout.groups
    if not grid.table_is_right:
        # A burst may begin before the table that it hits.
        near = max(0, table[0] - layout.seal.rows * layout.seal.row), table[1]
        tries = chain(([table, *parity], [table]), ([w] for w in _windows(layout, near)))
        stream = grid.stream.copy()
        if not any(_fits(grid, spans, lambda: grid.table_is_right) for spans in tries):
            raise RepairError("the parity is too damaged to repair the archive")
        # What came right with it, or wrong, the table will tell.
        stream[slice(*table)] = grid.stream[slice(*table)]
        grid.stream[:] = stream
    groups = grid.bad_groups()
    spans = [span for group in groups for span in layout.group_spans(group)]
    if not spans:
        return
    region = min(first for first, _ in spans), max(last for _, last in spans)
    tries = chain(([*spans, *parity], spans), ([w] for w in _windows(layout, region)))
    if not any(_fits(grid, bad, lambda: not grid.bad_groups()) for bad in tries):
        raise RepairError(
            f"the damage is larger than the parity can restore: {len(groups)} of {layout.groups} "
            f"blocks of {layout.seal.group} bytes, the first at byte "
            f"{layout.start + layout.group_spans(groups[0])[0][0]}; "
            "`weightvid unpack --partial` saves what is whole"
        )


def _fits(grid: _Grid, bad: Sequence[Span], is_right: Callable[[], bool]) -> bool:
    """Restore damaged spans; undo it if what comes is not right."""
    patches = grid.decode(bad)
    if patches is None:
        return False
    before = grid.put(patches)
    fits = is_right()
    if not fits:
        grid.put(before)
    return fits


def _windows(layout: _Layout, region: Span) -> Iterator[Span]:
    """Where a burst within a region may lie, if all of the region is more than can be restored."""
    whole = layout.seal.rows * layout.seal.row
    step = max(1, whole // 8)
    # What one burst damages is no longer than this.
    if region[1] - region[0] <= whole + 2 * layout.seal.group + layout.box_bytes:
        for first in range(*region, step):
            yield first, min(first + whole, layout.size)
