"""What an archive is made of, measured on the file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from weightvid.container import reader
from weightvid.container.reader import Fragment
from weightvid.container.source import Source
from weightvid.loader import open_archive
from weightvid.summary import summarize_archive

Levels = npt.NDArray[np.integer[Any]]
#: parts of an archive that are no metadata, beside the stream.
_CONTENTS = ("orders", "plain_tensors", "exact_tensors")


@dataclass(frozen=True, slots=True)
class Account:
    """Bytes of an archive, and the zero-order entropy of its levels.

    Attributes
    ----------
    file_bytes, stream_bytes, plain_bytes, exact_bytes : int
        Whole file; packets and digits; levels kept as plain streams; exact tensors.
    layout_bytes : int
        What the orders (energies) and folds of the tensors add to the sidecars.
    metadata_bytes : int
        The rest: boxes, sidecars, header, index.
    video_entropy_bytes, plain_entropy_bytes : float
        Sum over the tensors of weights x zero-order entropy, for tensors on frames and for
        tensors in plain streams.
    """

    file_bytes: int
    stream_bytes: int
    plain_bytes: int
    exact_bytes: int
    layout_bytes: int
    metadata_bytes: int
    video_entropy_bytes: float
    plain_entropy_bytes: float

    @property
    def overhead(self) -> float:
        """Packets and digits over the entropy of the levels on frames, as a fraction; 0: none."""
        return self.stream_bytes / self.video_entropy_bytes - 1 if self.stream_bytes else 0.0

    @property
    def overhead_with_layout(self) -> float:
        """The same with orders and folds counted."""
        if not self.stream_bytes:
            return 0.0
        return (self.stream_bytes + self.layout_bytes) / self.video_entropy_bytes - 1

    @property
    def metadata_share(self) -> float:
        """Metadata over the file without its exact tensors."""
        return self.metadata_bytes / (self.file_bytes - self.exact_bytes)


def restored_state(path: Path) -> dict[str, Any]:
    """All tensors of an archive as torch tensors, every hash checked."""
    from weightvid.torch import load_file

    return load_file(path, threads=1)


def entropy_bits(levels: Levels) -> float:
    """Zero-order entropy of all levels together, in bits."""
    counts = np.unique(levels, return_counts=True)[1]
    return float((counts * (np.log2(levels.size) - np.log2(counts))).sum())


def quantized_levels(path: Path, coding: str | None = None) -> Iterator[Levels]:
    """Levels of every quantized tensor, in the order of the source; of one coding, if named."""
    with open_archive(path) as archive:
        for name in archive.names:
            info = archive.info(name)
            if info.params is not None and not info.alias_of and coding in (None, info.coding):
                yield archive.levels(name).levels


def exact_names(path: Path) -> list[str]:
    """Distinct tensors that are stored exactly."""
    with open_archive(path) as archive:
        infos = (archive.info(name) for name in archive.names)
        return [info.name for info in infos if info.coding == "exact" and not info.alias_of]


def fragments(path: Path) -> Iterator[Fragment]:
    """Every frame's packet with its sidecar, in file order."""
    with path.open("rb") as stream:
        source = Source(stream)
        head = reader.read_head(source)
        for event in reader.read_events(source, head):
            if isinstance(event, Fragment):
                yield event


def account(path: Path) -> Account:
    """Where an archive's bytes go, beside the entropy of its levels."""
    parts = summarize_archive(path).account
    stream = parts["packets"] + parts["digits"]
    file_bytes = path.stat().st_size
    return Account(
        file_bytes=file_bytes,
        stream_bytes=stream,
        plain_bytes=parts["plain_tensors"],
        exact_bytes=parts["exact_tensors"],
        layout_bytes=parts["orders"],
        metadata_bytes=file_bytes - stream - sum(parts[name] for name in _CONTENTS),
        video_entropy_bytes=sum(map(entropy_bits, quantized_levels(path, "video"))) / 8,
        plain_entropy_bytes=sum(map(entropy_bits, quantized_levels(path, "plain"))) / 8,
    )
