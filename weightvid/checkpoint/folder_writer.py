"""Writing a Hugging Face folder: safetensors, in shards where it is large, and the side files."""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
import weakref
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from weightvid.atomic import output_error, refuse_address
from weightvid.checkpoint import safetensors
from weightvid.checkpoint.base import Array, Contents, check_contents
from weightvid.checkpoint.writer import CheckpointWriter
from weightvid.errors import CheckpointError, OutputError
from weightvid.spec import SideFile, TensorSpec, is_safe_path

#: what transformers puts into one shard at most.
SHARD_BYTES: Final = 5_000_000_000
#: weights that an older version of a folder may hold, which would be loaded instead of ours.
_STALE: Final = re.compile(
    r"(model|pytorch_model|diffusion_pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?"
)


def open_writer(path: Path, contents: Contents, *, force: bool = False) -> CheckpointWriter:
    """Start a folder (see :func:`weightvid.checkpoint.create_checkpoint`)."""
    return _FolderWriter(path, contents, force=force)


@dataclass(frozen=True, slots=True)
class _Shard:
    """One file of weights: its name, and what lies in it."""

    name: str
    contents: Contents


def plan_shards(contents: Contents, stem: str, limit_bytes: int) -> list[_Shard]:
    """Cut contents into files of at most ``limit_bytes`` of tensors (or of a single one)."""
    aliases: dict[str, list[str]] = {}
    for alias, target in contents.aliases.items():
        aliases.setdefault(target, []).append(alias)
    groups: list[list[TensorSpec]] = [[]]
    taken = 0
    for spec in contents.tensors:
        size = safetensors.file_bytes(spec) * (1 + len(aliases.get(spec.name, ())))
        if groups[-1] and taken + size > limit_bytes:
            groups.append([])
            taken = 0
        groups[-1].append(spec)
        taken += size
    shards = []
    for number, specs in enumerate(groups, 1):
        part = f"-{number:05d}-of-{len(groups):05d}" if len(groups) > 1 else ""
        tied = {alias: spec.name for spec in specs for alias in aliases.get(spec.name, ())}
        # transformers refuses weights that do not say which framework they are from.
        metadata = {"format": "pt", **contents.metadata}
        inside = Contents(tuple(specs), tied, metadata)
        shards.append(_Shard(f"{stem}{part}.safetensors", inside))
    return shards


class _FolderWriter(CheckpointWriter):
    """Shards and side files in a hidden folder beside the destination, renamed at the end."""

    def __init__(self, path: Path, contents: Contents, *, force: bool) -> None:
        check_contents(contents)
        self._target = Path(os.path.realpath(path))
        self._shown = os.fspath(path)
        self._merge = _check_target(self._target, self._shown, force)
        self._files = [file for file in contents.files if file.role == "file"]
        for file in self._files:
            if not is_safe_path(file.path):
                raise CheckpointError(f"the side file {file.path!r} would leave its folder")
        shards = plan_shards(contents, _stem(self._files), SHARD_BYTES)
        super().__init__(replace(contents, files=()))
        self._folder = self._target.parent / f".weightvid-{secrets.token_hex(8)}.tmp"
        self._cleanup = weakref.finalize(self, _remove, self._folder, os.getpid())
        self._writers: list[CheckpointWriter] = []
        self._writer_of: dict[str, CheckpointWriter] = {}
        self._weight_map: dict[str, str] = {}
        try:
            self._folder.mkdir()
            for shard in shards:
                writer = safetensors.open_writer(self._folder / shard.name, shard.contents)
                self._writers.append(writer)
                self._writer_of |= {spec.name: writer for spec in shard.contents.tensors}
                names = [spec.name for spec in shard.contents.tensors]
                self._weight_map |= dict.fromkeys([*names, *shard.contents.aliases], shard.name)
                self.notes += writer.notes
        except OSError as error:
            self.abort()
            raise self._failed(error) from None
        except BaseException:
            self.abort()
            raise
        self._index = f"{_stem(self._files)}.safetensors.index.json" if len(shards) > 1 else ""

    def _failed(self, error: OSError) -> OutputError:
        return error if isinstance(error, OutputError) else output_error(self._shown, error)

    def _write(self, spec: TensorSpec, array: Array) -> None:
        self._writer_of[spec.name].write(spec.name, array)

    def write_parts(self, name: str, parts: Iterable[Array]) -> None:
        """Add one tensor whose elements come in consecutive parts."""
        spec = self._wanted(name)
        self._writer_of[spec.name].write_parts(name, parts)
        del self._todo[name]

    def _finish(self) -> None:
        try:
            for writer in self._writers:
                writer.commit()
            if self._index:
                text = json.dumps(self._index_record(), indent=2, ensure_ascii=False)
                (self._folder / self._index).write_text(text + "\n", "utf-8")
            for file in self._files:
                path = self._folder / file.path
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("xb") as stream:
                    stream.write(file.data)
        except OSError as error:
            raise self._failed(error) from None

    def _index_record(self) -> dict[str, Any]:
        sizes = {spec.name: safetensors.file_bytes(spec) for spec in self.contents.tensors}
        total = sum(sizes[self.contents.aliases.get(name, name)] for name in self._weight_map)
        return {"metadata": {"total_size": total}, "weight_map": self._weight_map}

    def _publish(self) -> None:
        try:
            if self._merge:
                self._move_files()
            else:
                with suppress(FileNotFoundError):
                    self._target.rmdir()  # empty: checked before, and again by rmdir itself
                self._folder.rename(self._target)
        except OSError as error:
            raise self._failed(error) from None
        finally:
            self.abort()

    def _move_files(self) -> None:
        """Replace the files of a folder that exists one by one; others in it stay."""
        made = {path.relative_to(self._folder): path for path in _files(self._folder)}
        for old in self._target.iterdir():
            if _STALE.fullmatch(old.name) and Path(old.name) not in made and old.is_file():
                old.unlink()
        for relative, path in made.items():
            destination = self._target / relative
            destination.parent.mkdir(parents=True, exist_ok=True)
            path.replace(destination)

    def abort(self) -> None:
        """Remove the hidden folder; does nothing after :meth:`commit`."""
        for writer in self._writers:
            writer.abort()
        self._cleanup()


def _stem(files: list[SideFile]) -> str:
    """What weights are called in this folder: diffusers looks for another name."""
    for file in files:
        if file.path == "config.json" and b'"_diffusers_version"' in file.data:
            return "diffusion_pytorch_model"
    return "model"


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())


def _check_target(target: Path, shown: str, force: bool) -> bool:
    """Whether the files go into a folder that holds others already."""
    refuse_address(shown)
    if not target.parent.is_dir():
        error = OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        raise output_error(shown, error)
    if not target.exists():
        return False
    if not target.is_dir():
        raise OutputError(f"cannot write the folder {shown}: a file has that name")
    if not any(target.iterdir()):
        return False
    if not force:
        made = OutputError(
            f"the folder {shown} is not empty; use --force (force=True) to replace files in it"
        )
        made.errno = errno.EEXIST
        raise made
    return True


def _remove(folder: Path, owner: int) -> None:
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)
