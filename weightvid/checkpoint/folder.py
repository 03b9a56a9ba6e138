"""Hugging Face folders: weights in one file or in shards with an index, and the files beside them.

Layout: https://huggingface.co/docs/transformers/big_models (``model.safetensors``, or
``model.safetensors.index.json`` with a ``weight_map`` of tensor name to shard; the same for
``pytorch_model.bin``).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, Final, cast

from weightvid.checkpoint.base import (
    Array,
    CheckpointReader,
    Contents,
    check_contents,
    shorten,
)
from weightvid.checkpoint.folder_writer import open_writer
from weightvid.checkpoint.kinds import kind_of_file
from weightvid.checkpoint.side_files import gather
from weightvid.errors import CheckpointError
from weightvid.spec import TensorSpec

__all__ = ["open_reader", "open_writer"]

#: weights in order of preference, as transformers and diffusers look for them.
_WEIGHTS: Final = (
    "model.safetensors",
    "model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "diffusion_pytorch_model.bin",
)
#: suffixes of the one file that may hold the weights under another name, by preference.
_LONE: Final = ((".safetensors",), (".bin", ".pt", ".pth"))
_INDEX: Final = ".index.json"
_INDEX_LIMIT_BYTES: Final = 1 << 28
#: shards that are kept open: reading goes through them one after another.
_OPEN_SHARDS: Final = 2


def open_shard(path: Path) -> CheckpointReader:
    """Open one file of weights."""
    return cast(CheckpointReader, import_module(kind_of_file(path).module).open_reader(path))


def open_reader(
    path: Path, opener: Callable[[Path], CheckpointReader] = open_shard
) -> CheckpointReader:
    """Open a folder with weights.

    Parameters
    ----------
    path : Path
    opener : callable
        Opens one file of it.

    Raises
    ------
    CheckpointError
        No weights, or several that could be meant; a shard is missing or lacks a tensor that the
        index places there; a damaged file.
    """
    weights = _find(path)
    placed: dict[str, set[str] | None]
    placed = _read_index(weights) if weights.name.endswith(_INDEX) else {weights.name: None}
    return _FolderReader(path, placed, opener)


def _find(folder: Path) -> Path:
    for name in _WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    try:
        names = sorted(entry.name for entry in folder.iterdir() if entry.is_file())
    except OSError as error:
        raise CheckpointError(f"cannot read {folder}: {error.strerror or error}") from None
    for suffixes in _LONE:
        found = [n for n in names if n[0] != "." and Path(n).suffix.lower() in suffixes]
        if len(found) == 1:
            return folder / found[0]
        if found:
            raise CheckpointError(
                f"the folder {folder} holds several files of weights and no index of them "
                f"({shorten(found)}); name one of them"
            )
    raise CheckpointError(
        f"the folder {folder} holds no weights: weightvid looks for {_WEIGHTS[0]}, {_WEIGHTS[4]}, "
        "their .index.json, or a single .safetensors, .bin or .pt file"
    )


def _read_index(path: Path) -> dict[str, set[str] | None]:
    """Shard -> names of its tensors, in the order of the shards' names."""
    try:
        if path.stat().st_size > _INDEX_LIMIT_BYTES:
            raise CheckpointError(f"the index {path} is larger than any")
        record: Any = json.loads(path.read_text("utf-8"))
        pairs = list(record["weight_map"].items())
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is no index of shards: it lacks a weight_map") from None
    shards: dict[str, set[str] | None] = {}
    for tensor, shard in sorted(pairs, key=lambda pair: str(pair[1])):
        if not isinstance(shard, str) or shard in ("", ".", "..") or {"/", "\\"} & set(shard):
            raise CheckpointError(f"{path} places tensor {tensor!r} in {shard!r}, which is no file")
        cast("set[str]", shards.setdefault(shard, set())).add(tensor)
    missing = [shard for shard in shards if not (path.parent / shard).is_file()]
    if missing:
        raise CheckpointError(
            f"the folder {path.parent} lacks {shorten(missing)}, which its index names; "
            "download the rest"
        )
    return shards


class _FolderReader(CheckpointReader):
    def __init__(
        self,
        folder: Path,
        placed: dict[str, set[str] | None],
        opener: Callable[[Path], CheckpointReader],
    ) -> None:
        self._folder = folder
        self._opener = opener
        self._shard_of: dict[str, str] = {}
        self._open: dict[str, CheckpointReader] = {}
        specs: list[TensorSpec] = []
        aliases: dict[str, str] = {}
        skipped: list[str] = []
        metadata: dict[str, str] = {}
        try:
            for shard, names in placed.items():
                contents = self._shard(shard).contents
                self._check(shard, names, contents)
                for spec in contents.tensors:
                    if names is None or spec.name in names:
                        specs.append(spec)
                        self._shard_of[spec.name] = shard
                    else:
                        skipped.append(f"{spec.name} (in {shard}, but not in the index)")
                aliases |= {
                    alias: target
                    for alias, target in contents.aliases.items()
                    if names is None or {alias, target} <= names
                }
                skipped += contents.skipped
                metadata = metadata or dict(contents.metadata)
            files, left_out = gather(folder)
            skipped += [entry for entry in left_out if entry.rpartition(" (")[0] not in placed]
            contents = Contents(tuple(specs), aliases, metadata, tuple(skipped), files)
            check_contents(contents)
        except BaseException:
            self._close_shards()
            raise
        super().__init__(contents)
        self.shareable = all(reader.shareable for reader in self._open.values())

    def _check(self, shard: str, names: set[str] | None, contents: Contents) -> None:
        if names is None:
            return
        there = {spec.name for spec in contents.tensors} | set(contents.aliases)
        if absent := sorted(names - there):
            raise CheckpointError(
                f"the index of {self._folder} places {shorten(absent)} in {shard}, which does not "
                "hold it: index and shards are not of one version"
            )

    def _shard(self, name: str) -> CheckpointReader:
        reader = self._open.pop(name, None)
        if reader is None:
            while len(self._open) >= _OPEN_SHARDS:
                self._open.pop(next(iter(self._open))).close()
            reader = self._opener(self._folder / name)
        self._open[name] = reader
        return reader

    def _read(self, spec: TensorSpec) -> Array:
        return self._holder(spec).read(spec.name)

    def _read_range(self, spec: TensorSpec, first: int, count: int) -> Array:
        return self._holder(spec).read_range(spec.name, first, count)

    def _holder(self, spec: TensorSpec) -> CheckpointReader:
        reader = self._shard(self._shard_of[spec.name])
        if reader.spec(spec.name) != spec:
            raise CheckpointError(f"{self._folder} was changed while it was open")
        return reader

    def _close_shards(self) -> None:
        for reader in self._open.values():
            reader.close()
        self._open = {}

    def close(self) -> None:
        super().close()
        self._close_shards()
