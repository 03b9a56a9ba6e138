"""The container: writes what :mod:`weightvid.loader` reads, each function the inverse of one there.

Boxes are written here and not by FFmpeg's muxer, so that the bytes and the offsets in ``mfra`` do
not depend on FFmpeg's version and our own boxes can stand between the fragments.

Sources: ISO/IEC 14496-12 (boxes); FORMAT.md (ours).
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

from weightvid import loader
from weightvid.errors import FormatError
from weightvid.loader import End, Header, Part, Sidecar, TensorSpec, Track
from weightvid.spec import SideFile

#: one frame lasts one second: slow enough for the level's bit rate whatever the samples.
TIMESCALE: Final = 1
TRACK_ID: Final = 1
_MATRIX: Final = b"".join(
    n.to_bytes(4, "big") for n in (0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000)
)
_SYNC_SAMPLE: Final = 0x02000000
#: strategies of zlib that are tried. Huffman codes alone, or few matches, make quantized weights
#: smaller than matches do that save nothing.
_DEFLATE: Final = (zlib.Z_DEFAULT_STRATEGY, zlib.Z_FILTERED, zlib.Z_HUFFMAN_ONLY)


def _int(value: int, size: int) -> bytes:
    return value.to_bytes(size, "big")


def box(kind: bytes, *parts: bytes) -> bytes:
    """A box with a 32-bit size; a type of 16 bytes makes a ``uuid`` box.

    Examples
    --------
    >>> box(b"free", b"ab").hex()
    '0000000a667265656162'
    """
    head = kind if len(kind) == 4 else b"uuid" + kind
    return b"".join((_int(4 + len(head) + sum(map(len, parts)), 4), head, *parts))


def tail_box(kind: bytes, payload: bytes, before: int = 0) -> bytes:
    """A box between index and mfra: it ends with the distance of its end from the index' start.

    ``before`` is the size of the index box and of what follows it, up to this box.
    """
    distance = before + 24 + len(payload) + 4
    return box(kind, payload, distance.to_bytes(4, "little"))


def full_box(kind: bytes, version: int, flags: int, *parts: bytes) -> bytes:
    """A box that starts with a version and flags."""
    return box(kind, bytes((version,)), _int(flags, 3), *parts)


def ftyp() -> bytes:
    """File type box."""
    return box(b"ftyp", b"iso6", _int(0, 4), b"iso6", b"mp41", loader.BRAND)


def moov(track: Track) -> bytes:
    """Movie box of one fragmented track."""
    mvhd = full_box(
        b"mvhd", 0, 0, bytes(8), _int(TIMESCALE, 4), bytes(4), _int(0x10000, 4), _int(0x100, 2),
        bytes(10), _MATRIX, bytes(24), _int(TRACK_ID + 1, 4),
    )  # fmt: skip
    tkhd = full_box(
        b"tkhd", 0, 3, bytes(8), _int(TRACK_ID, 4), bytes(4 + 4 + 8 + 2 + 2 + 2 + 2), _MATRIX,
        _int(track.width << 16, 4), _int(track.height << 16, 4),
    )  # fmt: skip
    entry = box(
        track.entry, bytes(6), _int(1, 2), bytes(16), _int(track.width, 2), _int(track.height, 2),
        _int(72 << 16, 4), _int(72 << 16, 4), bytes(4), _int(1, 2), bytes(32), _int(24, 2),
        b"\xff\xff", box(loader.TRACKS[track.entry][0], track.record),
    )  # fmt: skip
    stbl = box(
        b"stbl",
        full_box(b"stsd", 0, 0, _int(1, 4), entry),
        full_box(b"stts", 0, 0, bytes(4)),
        full_box(b"stsc", 0, 0, bytes(4)),
        full_box(b"stsz", 0, 0, bytes(8)),
        full_box(b"stco", 0, 0, bytes(4)),
    )
    dinf = box(b"dinf", full_box(b"dref", 0, 0, _int(1, 4), full_box(b"url ", 0, 1)))
    minf = box(b"minf", full_box(b"vmhd", 0, 1, bytes(8)), dinf, stbl)
    mdhd = full_box(b"mdhd", 0, 0, bytes(8), _int(TIMESCALE, 4), bytes(4), b"\x55\xc4", bytes(2))
    hdlr = full_box(b"hdlr", 0, 0, bytes(4), b"vide", bytes(12), b"\0")
    trak = box(b"trak", tkhd, box(b"mdia", mdhd, hdlr, minf))
    trex = full_box(
        b"trex", 0, 0, _int(TRACK_ID, 4), _int(1, 4), _int(1, 4), bytes(4), _int(_SYNC_SAMPLE, 4)
    )
    return box(b"moov", mvhd, trak, box(b"mvex", trex))


def moof(number: int, packet_bytes: int) -> bytes:
    """Movie fragment of frame ``number`` (from 0), whose mdat follows at once."""

    def build(offset: int) -> bytes:
        tfhd = full_box(b"tfhd", 0, 0x020000, _int(TRACK_ID, 4))
        tfdt = full_box(b"tfdt", 0, 0, _int(number, 4))
        trun = full_box(b"trun", 0, 0x201, _int(1, 4), _int(offset, 4), _int(packet_bytes, 4))
        mfhd = full_box(b"mfhd", 0, 0, _int(number + 1, 4))
        return box(b"moof", mfhd, box(b"traf", tfhd, tfdt, trun))

    return build(len(build(0)) + 8)


def mfra(moof_offsets: Sequence[int]) -> bytes:
    """Movie fragment random access box: each frame's time and the offset of its ``moof``."""
    wide = bool(moof_offsets) and moof_offsets[-1] >= 1 << 32
    size = 8 if wide else 4
    entries = b"".join(
        _int(number, size) + _int(offset, size) + b"\x01\x01\x01"
        for number, offset in enumerate(moof_offsets)
    )
    count = _int(len(moof_offsets), 4)
    tfra = full_box(b"tfra", int(wide), 0, _int(TRACK_ID, 4), bytes(4), count, entries)
    return box(b"mfra", tfra, full_box(b"mfro", 0, 0, _int(8 + len(tfra) + 16, 4)))


def uint(value: int) -> bytes:
    """LEB128.

    Examples
    --------
    >>> uint(5).hex(), uint(300).hex()
    ('05', 'ac02')
    """
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def text(value: str) -> bytes:
    """UTF-8 behind its length; lone surrogates are kept."""
    data = value.encode("utf-8", "surrogatepass")
    return uint(len(data)) + data


def record(kind: int, *parts: bytes) -> bytes:
    """A record: type, length, data."""
    data = b"".join(parts)
    return uint(kind) + uint(len(data)) + data


def record_list(kind: int, items: Sequence[bytes]) -> bytes:
    """A record of counted items; nothing if there are none."""
    return record(kind, uint(len(items)), *items) if items else b""


def close_body(*records: bytes) -> bytes:
    """Payload of a box of ours: CRC-32, form, size, and the records, deflated if that is smaller.

    The deflate stream starts a block for each record, as names, hashes and numbers share no code.

    Raises
    ------
    FormatError
        ``limit``: the records are larger than a box may be.
    """
    size = sum(map(len, records))
    if size > loader.MAX_BOX_BYTES:
        raise FormatError(
            f"a box would hold {size} bytes; the format allows {loader.MAX_BOX_BYTES}", code="limit"
        )
    form, data = loader.STORED, b"".join(records)
    for strategy in _DEFLATE:
        packer = zlib.compressobj(9, zlib.DEFLATED, -15, 9, strategy)
        packed = b"".join(packer.compress(part) + packer.flush(zlib.Z_BLOCK) for part in records)
        packed += packer.flush()
        if len(packed) < len(data):
            form, data = loader.DEFLATED, packed
    return _seal(form, size, data)


def stored_body(*records: bytes) -> bytes:
    """Payload of a box whose records are not worth deflating."""
    return _seal(loader.STORED, sum(map(len, records)), *records)


def _seal(form: int, size: int, *data: bytes) -> bytes:
    sealed, crc = (bytes((form,)) + size.to_bytes(4, "little"), *data), 0
    for part in sealed:
        crc = zlib.crc32(part, crc)
    return b"".join((crc.to_bytes(4, "little"), *sealed))


def header_records(header: Header, files: Sequence[tuple[SideFile, int]]) -> list[bytes]:
    """Records of the model header; of each side file the bytes of its box are known."""
    aliases = [text(alias) + uint(number) for alias, number in header.aliases.items()]
    about, metadata = (
        [text(key) + text(value) for key, value in pairs.items()]
        for pairs in (header.about, header.metadata)
    )
    listed = [
        text(file.path) + text(file.role) + uint(len(file.data)) + uint(size)
        for file, size in files
    ]
    bases = [uint(len(basis)) + basis.astype("<f4").tobytes() for basis in header.bases]
    layers = []
    if header.layers is not None:
        total, base, masks = header.layers
        layers = [record(loader.LAYERS, uint(total), uint(len(base)), base, *map(uint, masks))]
    return [
        record(loader.TENSORS, tensor_fields(header.tensors)),
        record_list(loader.ALIASES, aliases),
        record_list(loader.METADATA, metadata),
        record_list(loader.FILES, listed),
        record_list(loader.BASES, bases),
        *layers,
        record_list(loader.ABOUT, about),
    ]


def tensor_fields(tensors: Sequence[TensorSpec]) -> bytes:
    """Names, types and shapes: the data of the record of tensors."""
    codes = {name: uint(code) for code, name in enumerate(loader.DTYPES)}
    return uint(len(tensors)) + b"".join(
        text(name) + codes[dtype] + uint(len(shape)) + b"".join(map(uint, shape))
        for name, dtype, shape in tensors
    )


def root_of(tensors: Sequence[TensorSpec], heads: Mapping[int, bytes]) -> bytes:
    """Root of an archive: SHA-256 of names, types, shapes, and heads of the tensors' SHA-256.

    So archives of the same tensors have the same root, however they came to be.
    """
    every = b"".join(heads[number] for number in range(len(tensors)))
    return hashlib.sha256(tensor_fields(tensors) + every).digest()


def part_record(part: Part) -> bytes:
    """Record of a part."""
    has, fields = 0, [bytes((part.shift,))] if part.bases else []
    if part.frequency_steps is not None:
        has |= loader.HAS_FREQUENCY_STEPS
        fields.append(part.frequency_steps.tobytes())
    if part.row_steps is not None:
        has |= loader.HAS_ROW_STEPS
        fields.append(part.row_steps.tobytes())
    if part.energies is not None:
        has |= loader.HAS_ENERGIES
        fields += [energies.tobytes() for energies in part.energies]
    if part.escapes is not None:
        has |= loader.HAS_ESCAPES
        places, numbers = part.escapes[0], part.escapes[1].astype("<f4").view(np.uint8)
        gaps = map(uint, (np.diff(places, prepend=-1) - 1).tolist())
        fields += [uint(len(places)), *gaps, numbers.reshape(-1, 4).T.tobytes()]
    return record(
        loader.PART,
        uint(part.tensor), uint(part.column // loader.ALIGN), uint(part.first_row),
        uint(part.rows), uint(part.columns), bytes((part.method, has)),
        np.float32(part.step).tobytes(), uint(len(part.bases)), *map(uint, part.bases), *fields,
    )  # fmt: skip


def sidecar_records(sidecar: Sidecar) -> list[bytes]:
    """Records of a sidecar."""
    frame = record(loader.FRAME, uint(sidecar.frame), sidecar.sha256)
    ends = [record(loader.END, *_end_fields(end)) for end in sidecar.ends]
    return [frame, *map(part_record, sidecar.parts), *ends]


def _end_fields(end: End) -> tuple[bytes, ...]:
    hundredths = loader.NO_SQNR
    if end.sqnr_db is not None:
        hundredths = min(max(round(100 * end.sqnr_db), -32768), loader.NO_SQNR - 1)
    return uint(end.tensor), end.sha256, hundredths.to_bytes(2, "little", signed=True)
