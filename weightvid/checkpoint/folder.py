"""Hugging Face folders: weights in one file or in shards with an index, and the side files.

Layout: https://huggingface.co/docs/transformers/big_models (``model.safetensors``, or
``model.safetensors.index.json`` with a ``weight_map`` of tensor name to shard; the same for
``pytorch_model.bin``). What is written is safetensors, in shards where it is large.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Final

from weightvid.atomic import refuse_address
from weightvid.checkpoint import kind_of_file, safetensors
from weightvid.checkpoint.base import (
    CheckpointReader,
    CheckpointWriter,
    Contents,
    first_line,
    shorten,
)
from weightvid.errors import CheckpointError, OutputError
from weightvid.loader import Array
from weightvid.spec import (
    SIDE_FILE_BYTES,
    SIDE_FILES,
    SIDE_FILES_BYTES,
    SideFile,
    TensorSpec,
    is_safe_path,
)

INDEX: Final = ".index.json"
#: weights, in whatever kind: those that are not packed are the same model again.
WEIGHTS: Final = frozenset(
    {
        *(".safetensors", ".bin", ".pt", ".pth", ".th", ".ckpt", ".onnx", ".gguf", ".h5", ".keras"),
        *(".msgpack", ".tflite", ".ot", ".npz", ".mlmodel", ".onnx_data", ".data", ".pdparams"),
        *(".tar", ".gz", ".zip", ".mp4"),
    }
)
#: what training leaves next to the weights.
_STATE: Final = frozenset({"optimizer", "scheduler", "training_args", "rng_state", "scaler"})
#: weights in order of preference, each in one file or in shards, as transformers and diffusers
#: look for them; else the one file of one of these suffixes.
_WEIGHTS: Final = ("model.safetensors", "diffusion_pytorch_model.safetensors", "pytorch_model.bin")
_LONE: Final = ((".safetensors",), (".bin", ".pt", ".pth"))
#: shards that stay open: reading goes through them one after another.
_OPEN_SHARDS: Final = 2
#: what transformers puts into one shard at most.
SHARD_BYTES: Final = 5_000_000_000
#: weights that an older version of a folder may hold, which would be loaded instead of ours.
_STALE: Final = re.compile(
    r"(model|pytorch_model|diffusion_pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?"
)


def find_weights(names: Sequence[str]) -> list[str]:
    """Which files of a folder are its weights: one file, an index, or several that could be meant.

    Examples
    --------
    >>> find_weights(["config.json", "pytorch_model.bin", "model.safetensors"])
    ['model.safetensors']
    """
    for name in _WEIGHTS:
        for known in (name, name + INDEX):
            if known in names:
                return [known]
    for suffixes in _LONE:
        if found := sorted(n for n in names if n.lower().endswith(suffixes) and n[0] != "."):
            return found
    return []


class Reader(CheckpointReader):
    """A folder with weights; shards must hold every tensor that the index places in them."""

    def __init__(self, path: Path) -> None:
        self._folder = path
        self._shard_of: dict[str, str] = {}
        self._open: dict[str, CheckpointReader] = {}
        try:
            super().__init__(self._look(_placed(path)))
        except BaseException:
            self._close_shards()
            raise
        self.shareable = all(reader.shareable for reader in self._open.values())

    def _look(self, placed: Mapping[str, set[str] | None]) -> Contents:
        """Contents of all shards together."""
        specs: list[TensorSpec] = []
        aliases: dict[str, str] = {}
        metadata: dict[str, str] = {}
        files, left_out = gather(self._folder)
        skipped = [entry for entry in left_out if entry.rpartition(" (")[0] not in placed]
        for shard, listed in placed.items():
            inside = self._shard(shard).contents
            there = {name for name, _ in inside.rows()}
            names = there if listed is None else listed
            if absent := sorted(names - there):
                raise CheckpointError(
                    f"the index of {self._folder} places {shorten(absent)} in {shard}, which does "
                    "not hold it: index and shards are not of one version"
                )
            specs += [spec for spec in inside.tensors if spec.name in names]
            self._shard_of |= dict.fromkeys(names, shard)
            aliases |= {a: name for a, name in inside.aliases.items() if {a, name} <= names}
            skipped += [
                f"{name} (in {shard}, but not in the index)" for name in sorted(there - names)
            ]
            skipped += inside.skipped
            metadata = metadata or dict(inside.metadata)
        return Contents(tuple(specs), aliases, metadata, tuple(skipped), files)

    def _shard(self, name: str) -> CheckpointReader:
        reader = self._open.pop(name, None)
        if reader is None:
            while len(self._open) >= _OPEN_SHARDS:
                self._open.pop(next(iter(self._open))).close()
            path = self._folder / name
            reader = kind_of_file(path).open(path)
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
        """Close the shards."""
        self._close_shards()
        super().close()


class Writer(CheckpointWriter):
    """Shards and side files in a hidden folder next to the destination, renamed at the end."""

    def __init__(self, path: Path, contents: Contents, *, force: bool = False) -> None:
        super().__init__(path, contents)
        self._target = Path(os.path.realpath(path))
        self._merge = _check_target(self._target, os.fspath(path), force)
        self._files = {file.path: file.data for file in contents.files if file.role == "file"}
        for name in self._files:
            if not is_safe_path(name):
                raise CheckpointError(f"the side file {name!r} would leave its folder")
        self._folder = self._target.parent / f".weightvid-{secrets.token_hex(8)}.tmp"
        self._cleanup = weakref.finalize(self, _remove, self._folder, os.getpid())
        self._writers: dict[str, CheckpointWriter] = {}
        self._weight_map: dict[str, str] = {}
        # Diffusers looks for weights of another name.
        diffusers = b'"_diffusers_version"' in self._files.get("config.json", b"")
        self._stem = "diffusion_pytorch_model" if diffusers else "model"
        with self._removed_on_error():
            self._folder.mkdir()
            for shard, inside in self._plan_shards().items():
                self._writers[shard] = safetensors.Writer(self._folder / shard, inside)
                self._weight_map |= {name: shard for name, _ in inside.rows()}
                self.notes += self._writers[shard].notes

    def _plan_shards(self) -> dict[str, Contents]:
        """Cut contents into files of at most ``SHARD_BYTES`` of tensors (or of a single one)."""
        groups: list[list[TensorSpec]] = [[]]
        taken = 0
        for spec in self.contents.tensors:
            size = safetensors.file_bytes(spec) * len(self._names_of[spec.name])
            if groups[-1] and taken + size > SHARD_BYTES:
                groups.append([])
                taken = 0
            groups[-1].append(spec)
            taken += size
        shards = {}
        # transformers refuses weights that do not say which framework they are from.
        metadata = {"format": "pt", **self.contents.metadata}
        for number, specs in enumerate(groups, 1):
            part = f"-{number:05d}-of-{len(groups):05d}" if len(groups) > 1 else ""
            tied = {alias: spec.name for spec in specs for alias in self._names_of[spec.name][1:]}
            shards[f"{self._stem}{part}.safetensors"] = Contents(tuple(specs), tied, metadata)
        return shards

    def write_parts(self, name: str, parts: Iterable[Array]) -> None:
        """Add one tensor whose elements come in consecutive parts."""
        self._writers[self._weight_map[self._wanted(name).name]].write_parts(name, parts)
        del self._todo[name]

    def _finish(self) -> None:
        for writer in self._writers.values():
            writer.commit()
        files = dict(self._files)
        if len(self._writers) > 1:
            size = sum(safetensors.file_bytes(spec) for _, spec in self.contents.rows())
            record = {"metadata": {"total_size": size}, "weight_map": self._weight_map}
            text = json.dumps(record, indent=2, ensure_ascii=False)
            files[f"{self._stem}.safetensors{INDEX}"] = text.encode()
        for name, data in files.items():
            path = self._folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)

    def _publish(self) -> None:
        if not self._merge:
            with suppress(FileNotFoundError):
                self._target.rmdir()  # empty: checked before, and again by rmdir itself
            self._folder.rename(self._target)
            return
        # Files are replaced one by one; others in the folder stay.
        made = [p.relative_to(self._folder) for p in self._folder.rglob("*") if p.is_file()]
        for old in self._target.iterdir():
            if _STALE.fullmatch(old.name) and Path(old.name) not in made and old.is_file():
                old.unlink()
        for path in made:
            (self._target / path).parent.mkdir(parents=True, exist_ok=True)
            (self._folder / path).replace(self._target / path)
        self._cleanup()

    def abort(self) -> None:
        """Remove the hidden folder; does nothing after :meth:`commit`."""
        for writer in self._writers.values():
            writer.abort()
        self._cleanup()


def _placed(folder: Path) -> Mapping[str, set[str] | None]:
    """Files of weights, with the names of the tensors that an index places there."""
    try:
        names = [entry.name for entry in folder.iterdir() if entry.is_file()]
        weights = find_weights(names)
        if len(weights) != 1:
            said = f"several weights and no index of them ({shorten(weights)}); name one"
            if not weights:
                said = f"no weights; weightvid looks for {shorten(_WEIGHTS)} or their {INDEX}"
            raise CheckpointError(f"the folder {folder} holds {said}")
        if not weights[0].endswith(INDEX):
            return {weights[0]: None}
        index = folder / weights[0]
        pairs = list(json.loads(index.read_text("utf-8"))["weight_map"].items())
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"cannot read {folder}: {error.strerror or error}") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index} is no index of shards: {first_line(error)}") from None
    shards: dict[str, set[str]] = {}
    for tensor, shard in sorted(pairs, key=lambda pair: str(pair[1])):
        if not isinstance(shard, str) or "/" in shard or not is_safe_path(shard):
            raise CheckpointError(f"{index} places {tensor!r} in {shard!r}, which is no file")
        if shard not in names:
            raise CheckpointError(f"the folder {folder} lacks {shard}, which its index names")
        shards.setdefault(shard, set()).add(tensor)
    return shards


def _check_target(target: Path, shown: str, force: bool) -> bool:
    """Whether the files go into a folder that holds others already."""
    refuse_address(shown)
    if not target.parent.is_dir():
        raise OutputError(f"cannot write {shown}: No such file or directory {target.parent}")
    if not target.exists():
        return False
    if not target.is_dir():
        raise OutputError(f"cannot write the folder {shown}: a file has that name")
    full = any(target.iterdir())
    if full and not force:
        raise OutputError(
            f"the folder {shown} is not empty; use --force (force=True) to replace files in it"
        )
    return full


def _remove(folder: Path, owner: int) -> None:
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)


def gather(folder: Path) -> tuple[tuple[SideFile, ...], tuple[str, ...]]:
    """Small files of a model folder, and what is left out as ``"path (why)"``.

    Hidden files, weights and their index files are not side files; weights of a further module of
    sentence-transformers (named in ``modules.json``) are, if small enough.

    Raises
    ------
    CheckpointError
        A file cannot be read.
    """
    modules = _modules(folder)
    files: list[SideFile] = []
    skipped: list[str] = []
    total = 0
    seen: set[str] = set()
    for path in _walk(folder):
        name = path.relative_to(folder).as_posix()
        try:
            size = path.stat().st_size
            if reason := _foreign(PurePosixPath(name), modules):
                pass
            elif not is_safe_path(name) or name.casefold() in seen:
                reason = "its name is not safe on every system"
            elif size > SIDE_FILE_BYTES:
                reason = f"larger than {SIDE_FILE_BYTES >> 20} MiB"
            elif total + size > SIDE_FILES_BYTES or len(files) >= SIDE_FILES:
                reason = f"beyond {SIDE_FILES} files or {SIDE_FILES_BYTES >> 20} MiB of side files"
            else:
                files.append(SideFile(name, path.read_bytes()))
                seen.add(name.casefold())
                total += size
                continue
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from None
        skipped.append(f"{name} ({reason})")
    return tuple(files), tuple(skipped)


def _walk(folder: Path) -> Iterator[Path]:
    """Regular files, neither hidden nor an index of shards, in an order of their names alone."""
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name[0] != "." and name != "__pycache__")
        for name in sorted(names):
            path = Path(root, name)
            if name[0] != "." and not name.endswith(".index.json") and path.is_file():
                yield path


def _foreign(name: PurePosixPath, modules: frozenset[str]) -> str:
    """Why a file is no side file, whatever its size; empty if it is one."""
    if name.suffix.lower() not in WEIGHTS:
        return ""
    if len(name.parts) > 1:
        return "" if str(name.parent) in modules else "other weights"
    state = not _STATE.isdisjoint({name.stem, name.stem.partition("-")[0]})
    return "training state" if state else "other weights"


def _modules(folder: Path) -> frozenset[str]:
    """Sub-folders that sentence-transformers loads."""
    try:
        listed = json.loads((folder / "modules.json").read_text("utf-8"))
        return frozenset(entry["path"] for entry in listed if entry["path"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return frozenset()
