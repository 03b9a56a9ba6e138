"""The records of an archive: the manifest and its sidecars.

FORMAT.md is the specification; names here are those of its JSON keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from weightvid.codec.form import Form
from weightvid.codec.tracks import DEFAULT_CODEC
from weightvid.container.digits import Kind
from weightvid.quantize.params import Params
from weightvid.spec import TensorSpec
from weightvid.tile import PLAIN_LAYOUT, FrameGeometry, Layout

#: format version of new archives.
VERSION: Final = (2, 0)
#: major versions that can be read.
MAJOR_VERSIONS: Final = (1, 2)
#: decimals of the SQNR of a tensor, which is for people.
SQNR_PLACES: Final = 1
#: of the SHA-256 of a tensor, the first 16 bytes are kept: in a small archive of many tensors the
#: hashes would otherwise be the largest part of the metadata.
TENSOR_HASH_BYTES: Final = 16


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A side file of the archive, as the header lists it.

    Attributes
    ----------
    path, role : str
        As in :class:`~weightvid.spec.SideFile`.
    size : int
        Bytes of the file.
    codec : str
        How its bytes are compressed: ``raw``, ``deflate`` or ``lzma2``.
    box_bytes : int
        Size of its box; the boxes follow the header in the order of the list.
    """

    path: str
    role: str
    size: int
    codec: str
    box_bytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """The model header: everything that is known before the first frame.

    Attributes
    ----------
    geometry : FrameGeometry
        Frame size.
    tensors : tuple of TensorSpec
        All distinct tensors; a tensor's **id** is its place here.
    aliases : mapping of str to str
        Further names of tensors (tied weights).
    metadata : mapping of str to str
        The source checkpoint's own text pairs.
    about : mapping
        Free information for people: generator, recipe, source kind.
    files : tuple of StoredFile
        Side files.
    codec : str
        Of the track: a name of :data:`weightvid.codec.tracks.TRACKS`.
    bit_depth : int
        Bits of a sample.
    """

    geometry: FrameGeometry
    tensors: tuple[TensorSpec, ...]
    aliases: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)
    version: tuple[int, int] = VERSION
    files: tuple[StoredFile, ...] = ()
    codec: str = DEFAULT_CODEC
    bit_depth: int = 8

    @property
    def form(self) -> Form:
        """Of the track's pictures."""
        return Form(self.geometry.width, self.geometry.height, self.bit_depth)


@dataclass(frozen=True, slots=True)
class Escapes:
    """Levels outside the sample range, listed exactly.

    Attributes
    ----------
    index : ndarray of int64
        Ascending positions in the row-major tensor.
    level : ndarray of int32
        The true levels there.
    """

    index: npt.NDArray[np.int64]
    level: npt.NDArray[np.int32]

    def placed_in(self, levels: npt.NDArray[np.integer], first: int = 0) -> npt.NDArray[np.integer]:
        """True levels of consecutive elements, of which number ``first`` of the tensor is first.

        Returns
        -------
        ndarray
            ``levels`` itself if none of them is an escape, else int32.
        """
        begin, end = np.searchsorted(self.index, (first, first + levels.size))
        if begin == end:
            return levels
        wide = levels.astype(np.int32)
        wide.reshape(-1)[self.index[begin:end] - first] = self.level[begin:end]
        return wide


NO_ESCAPES: Final = Escapes(np.empty(0, np.int64), np.empty(0, np.int32))


@dataclass(frozen=True, slots=True)
class TensorStart:
    """A tensor whose first ribbon column lies in this frame."""

    tensor: int
    params: Params
    escapes: Escapes = NO_ESCAPES
    layout: Layout = PLAIN_LAYOUT


@dataclass(frozen=True, slots=True)
class TensorEnd:
    """A tensor whose last ribbon column lies in this frame.

    Attributes
    ----------
    tensor : int
        Id.
    sha256 : bytes
        First 16 bytes of the SHA-256 of the dequantized elements: little-endian, in the tensor's
        own dtype, row-major.
    sqnr_db : float or None
        Signal-to-quantization-noise ratio; None when there is no noise.
    """

    tensor: int
    sha256: bytes
    sqnr_db: float | None


@dataclass(frozen=True, slots=True)
class Sidecar:
    """What precedes a frame: which tensors start and end in it, and the digits of its samples.

    Attributes
    ----------
    frame : int
        Number of the frame, from 0.
    starts, ends : tuples
        In the order of the ribbon.
    digits : mapping of Kind to bytes
        Streams of digits, compressed.
    carried : mapping of Kind to int
        How many digits of each stream belong to the tensor that began in an earlier frame.
    """

    frame: int
    starts: tuple[TensorStart, ...] = ()
    ends: tuple[TensorEnd, ...] = ()
    digits: Mapping[Kind, bytes] = field(default_factory=dict)
    carried: Mapping[Kind, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class FrameEntry:
    """Where a frame lies: offset of its sidecar box, sizes of that box and of moof + mdat."""

    offset: int
    sidecar_bytes: int
    fragment_bytes: int

    @property
    def end(self) -> int:
        """Offset of what follows."""
        return self.offset + self.sidecar_bytes + self.fragment_bytes


@dataclass(frozen=True, slots=True)
class ExactEntry:
    """Where a box of exact tensors lies, and the ids of the tensors that have a part in it."""

    offset: int
    box_bytes: int
    tensors: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Index:
    """Where everything lies.

    Attributes
    ----------
    ribbon : tuple of int
        Ids of the tensors on the ribbon, in its order.
    frames : tuple of FrameEntry
    exact : tuple of ExactEntry
    sqnr_db : float or None
        Over all quantized tensors; None where the archive does not say.
    """

    ribbon: tuple[int, ...]
    frames: tuple[FrameEntry, ...]
    exact: tuple[ExactEntry, ...]
    sqnr_db: float | None = None
