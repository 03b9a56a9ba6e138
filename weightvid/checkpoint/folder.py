"""Hugging Face folders: weights in one file or in shards with an index, and the side files.

Layout: https://huggingface.co/docs/transformers/big_models (``model.safetensors``, or
``model.safetensors.index.json`` with a ``weight_map`` of tensor name to shard; the same for
``pytorch_model.bin``). What is written is safetensors, in shards where it is large.
"""

import json
import os
import re
import shutil
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, Final

from weightvid.atomic import hold, output_error, refuse_address, remove_remains, temporary_path
from weightvid.checkpoint import base, kind_of_file, safetensors
from weightvid.errors import CheckpointError, OutputError
from weightvid.loader import Array, TensorSpec
from weightvid.spec import SIDE_FILE_BYTES, SIDE_FILES, SIDE_FILES_BYTES, SideFile, is_safe_path

INDEX: Final = ".index.json"
#: role of an empty side file that is named as the weights are, where that is not as usual.
WEIGHTS_ROLE: Final = "weights"
#: weights, in whatever kind: those that are not packed are the same model again.
WEIGHTS: Final = frozenset(
    ".safetensors .bin .pt .pth .th .ckpt .onnx .gguf .h5 .keras .msgpack .tflite .ot .npz "
    ".mlmodel .onnx_data .data .pdparams .tar .gz .zip .mp4".split()
)
#: what training leaves next to the weights.
_STATE: Final = frozenset({"optimizer", "scheduler", "training_args", "rng_state", "scaler"})
#: weights in order of preference, each in one file or in shards, as transformers and diffusers
#: look for them; else the index of a variant; else the one file of one of these suffixes.
_WEIGHTS: Final = ("model.safetensors", "diffusion_pytorch_model.safetensors", "pytorch_model.bin")
_LONE: Final = ((".safetensors",), (".bin", ".pt", ".pth"))
_INDEX: Final = re.compile(r"(.+)\.(safetensors|bin)\.index((?:\.[\w-]+)?)\.json")
#: checkpoints that are files, which a folder may hold nothing else of.
FILES: Final = (".gguf", ".onnx", ".npz", ".tflite")
_DISTRIBUTED: Final = (
    "a checkpoint of torch.distributed; make one file of it: python -m "
    "torch.distributed.checkpoint.format_utils dcp_to_torch {} model.pt"
)
#: code that Python runs without being asked.
_STARTUP: Final = frozenset({"sitecustomize.py", "usercustomize.py", "__pycache__"})
#: what transformers puts into one shard at most.
SHARD_BYTES: Final = 5_000_000_000
#: weights that an older version of a folder may hold, which would be loaded instead of ours.
_STALE: Final = (
    r"(model|pytorch_model|diffusion_pytorch_model|{})(-\d+-of-\d+)?"
    r"\.(safetensors|bin)(\.index(\.[\w-]+)?\.json)?"
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
    for suffix in ("safetensors", "bin"):
        if found := sorted(n for n in names if (m := _INDEX.fullmatch(n)) and m[2] == suffix):
            return found
    for suffixes in _LONE:
        if found := sorted(n for n in names if n.lower().endswith(suffixes) and n[0] != "."):
            return found
    return []


def is_index(name: str) -> bool:
    """Whether a file says which shards the tensors are in."""
    return _INDEX.fullmatch(name) is not None


class Reader(base.CheckpointReader):
    """A folder with weights; shards must hold every tensor that the index places in them."""

    def __init__(self, path: Path) -> None:
        self._folder = path
        self._shard_of: dict[str, str] = {}
        self._open: dict[str, base.CheckpointReader] = {}
        try:
            super().__init__(self._look(*_placed(path)))
        except BaseException:
            self.close()
            raise
        self.shareable = all(reader.shareable for reader in self._open.values())

    def _look(self, weights: str, placed: Mapping[str, set[str] | None]) -> base.Contents:
        specs: list[TensorSpec] = []
        aliases: dict[str, str] = {}
        metadata: dict[str, str] = {}
        path = self._folder / "modules.json"
        fits = path.is_file() and path.stat().st_size <= SIDE_FILE_BYTES
        modules = _modules(path.read_bytes() if fits else b"")
        files, left_out = gather(self._folder, lambda name: _foreign(name, modules))
        files = (*_weights_name(weights), *files)
        skipped = [entry for entry in left_out if entry.rpartition(" (")[0] not in placed]
        taken = {name for listed in placed.values() for name in listed or ()}
        for shard, listed in placed.items():
            inside = self._shard(shard).contents
            there = {name for name, _ in inside.rows()}
            # What the index does not know of is loaded all the same.
            names = (listed or set()) | (there - taken)
            taken |= names
            if absent := sorted(names - there):
                raise CheckpointError(
                    f"the index of {self._folder} places {base.shorten(absent)} in {shard}, which "
                    "does not hold it: index and shards are not of one version"
                )
            specs += [spec for spec in inside.tensors if spec.name in names]
            self._shard_of |= dict.fromkeys(names, shard)
            aliases |= {a: name for a, name in inside.aliases.items() if {a, name} <= names}
            why = f"of {shard}: the model has it from another shard"
            skipped += [f"{name} ({why})" for name in sorted(there - names)]
            skipped += inside.skipped
            metadata = metadata or dict(inside.metadata)
        return base.Contents(tuple(specs), aliases, metadata, tuple(skipped), files)

    def _shard(self, name: str) -> base.CheckpointReader:
        reader = self._open.pop(name, None)
        if reader is None:
            while len(self._open) >= 2:  # reading goes through them one after another
                self._open.pop(next(iter(self._open))).close()
            path = self._folder / name
            reader = kind_of_file(path).open(path)
        self._open[name] = reader
        return reader

    def _read(self, spec: TensorSpec) -> Array:
        return self._holder(spec).read(spec.name)

    def _read_range(self, spec: TensorSpec, first: int, count: int) -> Array:
        return self._holder(spec).read_range(spec.name, first, count)

    def _holder(self, spec: TensorSpec) -> base.CheckpointReader:
        reader = self._shard(self._shard_of[spec.name])
        if reader.spec(spec.name) != spec:
            raise CheckpointError(f"{self._folder} was changed while it was open")
        return reader

    def close(self) -> None:
        """Close the shards."""
        for reader in self._open.values():
            reader.close()
        self._open = {}
        super().close()


class Writer(base.CheckpointWriter):
    """Shards and side files in a hidden folder next to the destination, renamed at the end."""

    weights_writer: ClassVar[type[base.FileWriter]] = safetensors.Writer

    def __init__(self, path: Path, contents: base.Contents, *, force: bool = False) -> None:
        super().__init__(path, contents)
        self._target = Path(os.path.realpath(path))
        self._merge = _check_target(self._target, os.fspath(path), force)
        self._files = self._side_files()
        files = tuple(SideFile(name, data) for name, data in self._files.items())
        self.contents = replace(contents, files=files)
        self._writers: dict[str, base.CheckpointWriter] = {}
        self._weight_map: dict[str, str] = {}
        self._stem = self._name_weights(contents.files)
        self._make_folder()
        with self._removed_on_error():
            self._check_places(self._files)
            for shard, inside in self._plan_shards().items():
                (self._folder / shard).parent.mkdir(parents=True, exist_ok=True)
                self._writers[shard] = self.weights_writer(self._folder / shard, inside)
                self._weight_map |= {name: shard for name, _ in inside.rows()}
                self.notes += self._writers[shard].notes

    def _side_files(self) -> dict[str, bytes]:
        """Files besides the weights, by their paths, without what is run or loaded unasked."""
        found = {file.path: file.data for file in self.contents.files if file.role == "file"}
        modules, left_out = _modules(found.get("modules.json", b"")), []
        for name in tuple(found):
            if not is_safe_path(name):
                raise CheckpointError(f"the side file {name!r} would leave its folder")
            path = PurePosixPath(name)
            if _foreign(path, modules) or _is_startup(name) or is_index(path.name):
                del found[name]
                left_out.append(name)
        if left_out:
            self.notes += (f"side files that are not restored: {base.shorten(left_out)}",)
        return found

    def _make_folder(self) -> None:
        """Make the hidden folder, which stays marked as in use while its descriptor is open."""
        remove_remains(self._target.parent)
        while True:
            self._folder = temporary_path(self._target.parent)
            try:
                self._folder.mkdir()
            except OSError as error:
                raise output_error(self._path, error) from None
            held = os.open(self._folder, os.O_RDONLY) if os.name == "posix" else None
            self._cleanup = weakref.finalize(self, _remove, self._folder, os.getpid(), held)
            if held is None or hold(held, self._folder):
                return
            self._cleanup()

    def _name_weights(self, files: Iterable[SideFile]) -> str:
        """Name of the weights without suffix: as in the source, or as a library looks for them."""
        for file in files:
            stem = file.path.removesuffix(".safetensors")
            named = file.role == WEIGHTS_ROLE and is_safe_path(stem) and not _is_startup(stem)
            if named and "/" not in stem and stem != file.path:
                return stem
        diffusers = b'"_diffusers_version"' in self._files.get("config.json", b"")
        return "diffusion_pytorch_model" if diffusers else "model"

    def _plan_shards(self) -> dict[str, base.Contents]:
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
            shards[f"{self._stem}{part}.safetensors"] = base.Contents(tuple(specs), tied, metadata)
        return shards

    def write_parts(self, name: str, parts: Iterable[Array]) -> None:
        """Add one tensor whose elements come in consecutive parts."""
        try:
            self._writers[self._weight_map[self._wanted(name).name]].write_parts(name, parts)
        except OutputError as error:
            raise output_error(self._path, error) from None
        del self._todo[name]

    def _finish(self) -> None:
        for writer in self._writers.values():
            writer.commit()
        for name, data in (self._files | self._index()).items():
            path = self._folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        self.file_bytes = sum(p.stat().st_size for p in self._folder.rglob("*") if p.is_file())

    def _index(self) -> dict[str, bytes]:
        """The file that says which shard holds what, if there is more than one."""
        if len(self._writers) < 2:
            return {}
        size = sum(safetensors.file_bytes(spec) for _, spec in self.contents.rows())
        record = {"metadata": {"total_size": size}, "weight_map": self._weight_map}
        text = json.dumps(record, indent=2, ensure_ascii=False)
        name, dot, variant = self._stem.partition(".")
        return {f"{name}.safetensors.index{dot}{variant}.json": text.encode()}

    def _publish(self) -> None:
        if not self._merge:
            with suppress(FileNotFoundError):
                self._target.rmdir()  # empty: checked before, and again by rmdir itself
            self._folder.rename(self._target)
            self._cleanup()
            return
        # Into a folder that has files: replace only what a new one replaces, and old weights, which
        # go last; others in the folder stay.
        made = [p.relative_to(self._folder) for p in self._folder.rglob("*") if p.is_file()]
        self._check_places(made)
        for path in made:
            try:
                (self._target / path).parent.mkdir(parents=True, exist_ok=True)
                (self._folder / path).replace(self._target / path)
            except OSError as error:
                raise self._keep(path, error) from None
        stale = re.compile(_STALE.format(re.escape(self._stem)))
        for old in self._target.iterdir():
            if stale.fullmatch(old.name) and Path(old.name) not in made and not old.is_dir():
                old.unlink()
        self._cleanup()

    def _check_places(self, made: Iterable[str | Path]) -> None:
        """Refuse links on the way to a file, which may lead anywhere, and folders in its place."""
        for path in made if self._merge else ():
            place = self._target / path
            if place.is_dir() and not place.is_symlink():
                raise OutputError(f"cannot write {place}: it is a folder")
            for parent in Path(path).parents:
                way = self._target / parent
                if parent.parts and (way.is_symlink() or (way.exists() and not way.is_dir())):
                    what = "a link, which is not followed" if way.is_symlink() else "no folder"
                    raise OutputError(f"cannot write {place}: {way} is {what}")

    def _keep(self, path: Path, error: OSError) -> OutputError:
        """Leave the new files that are not in place under a name that people see."""
        self._cleanup.detach()
        kept = self._target.with_name(f"{self._target.name}.{self._folder.name[11:-4]}")
        with suppress(OSError):
            self._folder.rename(kept)
        made = output_error(self._target / path, error)
        return OutputError(f"{made}; the new files that have not their place yet are in {kept}")

    def abort(self) -> None:
        """Remove the hidden folder; does nothing after :meth:`commit`."""
        for writer in self._writers.values():
            writer.abort()
        self._cleanup()


def _placed(folder: Path) -> tuple[str, Mapping[str, set[str] | None]]:
    """The weights or their index, and files with the names of the tensors that it places there."""
    names = [entry.name for entry in folder.iterdir() if entry.is_file()]
    weights = find_weights(names)
    if len(weights) > 1:
        listed = base.shorten(weights)
        raise CheckpointError(f"{folder} holds several weights and no index ({listed}); name one")
    if not weights:
        inner = [f"{sub.parent.name}/{sub.name}" for sub in folder.glob("*/*") if sub.is_file()]
        raise CheckpointError(advice(str(folder), names + inner))
    if not is_index(weights[0]):
        return weights[0], {weights[0]: None}
    index = folder / weights[0]
    with base.explained(f"{index} is no index of shards"):
        pairs = list(read_json(index)["weight_map"].items())
        if not pairs:
            raise ValueError("its weight_map is empty")
    shards: dict[str, set[str]] = {}
    for tensor, shard in sorted(pairs, key=lambda pair: str(pair[1])):
        if not isinstance(shard, str) or "/" in shard or not is_safe_path(shard):
            raise CheckpointError(f"{index} places {tensor!r} in {shard!r}, which is no file")
        if shard not in names:
            raise CheckpointError(f"the folder {folder} lacks {shard}, which its index names")
        shards.setdefault(shard, set()).add(tensor)
    return weights[0], shards


def read_json(path: Path) -> Any:
    """A small regular file; some editors of Windows put a byte order mark before it."""
    if not path.is_file() or path.stat().st_size > SIDE_FILE_BYTES:
        raise ValueError("it is no file, or too large")
    return json.loads(path.read_text("utf-8-sig"))


def advice(where: str, names: Collection[str]) -> str:
    """What a folder holds that has no weights (files of it and of its folders), and what to do."""
    if any(name == ".metadata" or name.endswith(".distcp") for name in names):
        return f"the folder {where} holds {_DISTRIBUTED.format(where)}"
    inside: dict[str, list[str]] = {}
    for name in names:
        inside.setdefault(name.rpartition("/")[0], []).append(name.rpartition("/")[2])
    models = [name for name in names if name.lower().endswith(FILES)]
    models += [
        sub
        for sub, files in inside.items()
        if sub and ".mlpackage/" not in sub and (find_weights(files) or "Manifest.json" in files)
    ]
    if models:
        listed = base.shorten(f"{where}/{name}" for name in sorted(models))
        return f"the folder {where} has no weights but models; pack them one by one: {listed}"
    known = f"{base.shorten(_WEIGHTS)}, or their {INDEX}"
    found = base.shorten(sorted(names)) or "nothing"
    return f"{where} holds no weights that weightvid looks for ({known}); the folder has {found}"


def _weights_name(name: str) -> tuple[SideFile, ...]:
    """A side file that says how the weights are named, where no library would look for that."""
    stem, _, suffix = name.rpartition(".")
    if index := _INDEX.fullmatch(name):
        stem, suffix = index[1] + index[3], index[2]
    if suffix == "bin" and not stem.startswith("diffusion"):
        stem = stem.replace("pytorch_model", "model")
    if suffix not in ("safetensors", "bin") or f"{stem}.safetensors" in _WEIGHTS:
        return ()
    return (SideFile(f"{stem}.safetensors", b"", WEIGHTS_ROLE),)


def _check_target(target: Path, shown: str, force: bool) -> bool:
    """Whether the files go into a folder that holds others already."""
    refuse_address(shown)
    try:
        target.parent.stat()
    except OSError as error:
        raise output_error(shown, error) from None
    if not target.exists():
        return False
    if not target.is_dir():
        raise OutputError(f"cannot write the folder {shown}: a file has that name")
    full = any(target.iterdir())
    if full and not force:
        why = "is not empty; use --force (force=True) to replace files in it"
        raise OutputError(f"the folder {shown} {why}")
    return full


def _remove(folder: Path, owner: int, held: int | None) -> None:
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)
        if held is not None:
            os.close(held)


def _is_startup(name: str) -> bool:
    """Whether a file is hidden, or is run without being asked for."""
    return any(part.startswith(".") or part.lower() in _STARTUP for part in name.split("/"))


def gather(
    folder: Path, foreign: Callable[[PurePosixPath], str]
) -> tuple[tuple[SideFile, ...], tuple[str, ...]]:
    """Small files of a model folder, and what is left out as ``"path (why)"``.

    Hidden files and index files of weights are not side files; ``foreign`` says of others why they
    are not, or nothing. A file that cannot be read is a CheckpointError.
    """
    files: list[SideFile] = []
    skipped: list[str] = []
    total = 0
    seen: set[str] = set()
    for path in _walk(folder):
        name = path.relative_to(folder).as_posix()
        reason = foreign(PurePosixPath(name))
        with base.explained(f"cannot read {path}"):
            size = path.stat().st_size
            if reason:
                pass
            elif not base.is_inside(path, folder):
                reason = "a link that leads out of the folder"
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
        skipped.append(f"{name} ({reason})")
    return tuple(files), tuple(skipped)


def _walk(folder: Path) -> Iterator[Path]:
    """Regular files, neither hidden nor an index of shards, in an order of their names alone."""
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name[0] != "." and name != "__pycache__")
        for name in sorted(names):
            path = Path(root, name)
            indexes = name.endswith(INDEX) or is_index(name)
            if not _is_startup(name) and not indexes and path.is_file():
                yield path


def _foreign(name: PurePosixPath, modules: frozenset[str]) -> str:
    """Why a file is no side file, whatever its size; empty if it is one."""
    if name.suffix.lower() not in WEIGHTS:
        return ""
    if len(name.parts) > 1:
        return "" if str(name.parent) in modules else "other weights"
    state = not _STATE.isdisjoint({name.stem, name.stem.partition("-")[0]})
    return "training state" if state else "other weights"


def _modules(text: bytes) -> frozenset[str]:
    """Sub-folders that sentence-transformers loads."""
    try:
        listed = json.loads(text.decode("utf-8-sig"))
        return frozenset(entry["path"] for entry in listed if entry["path"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return frozenset()
