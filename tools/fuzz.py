"""Reads archives and checkpoints that were changed and sealed again: a result, or an error of ours.

Archives of every kind (transforms, integers, bit-exact floats, H.264, AV1, layers, updates, parity,
signatures, of models with their graphs) are read by every verb and facade, checkpoints of every
kind by their readers:

    python tools/fuzz.py --mutations 100000 --seed 7       (or --seconds 20; or --kind update)
    python tools/fuzz.py --what checkpoints --seconds 20

What raises anything else, warns, takes 2 seconds of the processor or a gigabyte, or fails and has
changed a file, is told with its number, and the exit status is 1 then; ``--first NUMBER --mutations
1`` repeats it. To be fast, FFmpeg decodes only pictures that are new, and nothing waits for a disk.
Linux only, for the limits.
"""

from __future__ import annotations

import argparse
import io
import os
import resource
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, redirect_stderr, redirect_stdout, suppress
from functools import partial
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from fuzz_archives import Seed, mutate, seeds
from fuzz_checkpoints import (
    Checkpoint,
    checkpoint_seeds,
    count_results,
    mutate_checkpoint,
    read_checkpoint,
)

import weightvid.numpy
import weightvid.torch
from weightvid import fetch, loader, repair
from weightvid.archives import open_anywhere
from weightvid.cli.inspect import inspect
from weightvid.errors import WeightvidError
from weightvid.loader import open_archive
from weightvid.preview import preview_archive, preview_kernels
from weightvid.sign import open_signed, sign_archive
from weightvid.unpack import UnpackOptions, unpack_archive
from weightvid.update import apply_updates
from weightvid.verify import verify_archive

CPU_SECONDS, MEMORY_BYTES = 2.0, 1 << 30
#: so many failures are told at most.
MOST_FAILURES = 10
#: what is unpacked to, and the kind where the name does not say it.
OUTPUTS = "out.safetensors", "out.npz", "out.pt", "out.gguf", "out"
KINDS = {"out-folder": "folder", "out.q8_0": "gguf-q8_0", "out.f32": "gguf-f32"}
#: files that hold what is read, or those that a verb makes one by one.
SCRATCH = "mutated.mp4", "arrived", "pictures", "signed.mp4"


def read_all(data: bytes, seed: Seed, random: Random, folder: Path) -> int:
    """Read an archive by public entries, of which some are chosen; how many calls had a result."""
    source: Any = io.BytesIO(data)
    if random.random() < 0.3:
        source = SimpleNamespace(read=source.read, seekable=lambda: False)
    if random.random() < 0.5:
        return count_results(read_archive(source, seed, random, folder))
    weighted = verbs(data, source, seed, random, folder)
    (verb,) = random.choices(list(weighted), list(weighted.values()))
    return count_results([partial(watch, verb, folder)])


def watch(verb: Callable[[], Any], folder: Path) -> None:
    """Run a verb: no file but its output may change, and where it fails, not that one either."""

    def files() -> set[tuple[str, int, int, int]]:
        with os.scandir(folder) as entries:
            found = {entry.name: entry.stat() for entry in entries}
        return {(name, at.st_ino, at.st_size, at.st_mtime_ns) for name, at in found.items()}

    before, may_change = files(), [*SCRATCH]
    try:
        verb()
        may_change += "made.mp4", "out"
    finally:
        changed = {name for name, *_ in before ^ files() if not name.startswith((*may_change,))}
        if changed:
            raise RuntimeError(f"changed: {sorted(changed)}")


def choose_base(seed: Seed, random: Random, folder: Path) -> tuple[Path, ...]:
    """What an update is to, or sometimes something else."""
    wrong = (), seed.base[::-1], seed.base[:1], (folder / "0.mp4",), (folder / "3.mp4",)
    return seed.base if random.random() < 0.85 else random.choice(wrong)


def verbs(
    data: bytes, source: Any, seed: Seed, random: Random, folder: Path
) -> dict[Callable[[], Any], float]:
    """What the command line and the facades do with an archive, and how often (drawing is slow)."""
    base = choose_base(seed, random, folder)
    output = random.choice((f"out{Path(seed.kind).suffix}", random.choice((*OUTPUTS, *KINDS))))
    unpacked = UnpackOptions(
        kind=KINDS.get(output), partial=random.random() < 0.5, force=True, base=base,
        dtype=random.choice((None, None, "F16")), tensors=random.choice(((), ("conv", "bias"))),
        layers=random.choice((1, 2, 16)),
    )  # fmt: skip
    path = folder / "mutated.mp4"
    key, public, made = folder / "key", folder / "key.pub", folder / "made.mp4"

    def written() -> Path:
        path.write_bytes(data)
        return path

    def read(how: Callable[[Any], Any]) -> None:
        with open_anywhere(source, base=base) as archive:
            how(archive)

    def shown() -> None:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            inspect(str(written()), random.random() < 0.5, random.random() < 0.2,
                    random.random() < 0.4)  # fmt: skip

    def arrived() -> None:
        with (folder / "arrived").open("w+b") as file:
            file.write(data)
            trusted, layers = random.choice((0, len(data))), random.choice((1, 2, 16))
            found = fetch._Arrived(file, trusted, layers, b"")
            for length in (len(data) // 2, len(data)):
                found.check(length)

    def merged() -> None:
        apply_updates((*base, source)[0], [*base[1:], source], made, force=True)
        if not base or base != seed.base:
            raise RuntimeError("merged with a wrong base")

    def signed() -> None:
        place = path if seed.base or random.random() < 0.5 else folder / "signed.mp4"
        if sign_archive(written(), key, place, force=True) and random.random() < 0.5:
            place = written()
        with open_signed(place, public) as file:
            dict(open_archive(file).items())

    drawn = partial(preview_archive, source, folder / "pictures", scale=1, force=True)
    return {
        shown: 1, arrived: 3, signed: 1, merged: 6 if seed.base else 2,
        lambda: read(partial(verify_archive, against=folder / "source.safetensors")): 1,
        lambda: read(verify_archive): 3,
        lambda: unpack_archive(source, folder / output, unpacked): 6,
        lambda: drawn(tensor=random.choice((None, "*"))): 0.3,
        lambda: preview_kernels(source, folder / "pictures", scale=1, force=True): 0.2,
        lambda: read(weightvid.numpy.load_file): 2,
        partial(weightvid.torch.load_file, source): 1,
        lambda: repair.repair_archive(written(), made, force=True): 2,
    }  # fmt: skip


def read_archive(
    source: Any, seed: Seed, random: Random, folder: Path
) -> Iterator[Callable[[], Any]]:
    """Calls of the loader."""
    with suppress(WeightvidError):
        base = [path.read_bytes() for path in choose_base(seed, random, folder)] or None
        layers, check = random.choice((1, 2, 16)), random.random() < 0.5
        archive = open_archive(source, base=base, layers=layers, check_tensors=check)
        frames = range(len(archive.index.frames) if archive.index else 1)
        calls: list[Callable[[], Any]] = [
            lambda: dict(archive.items()), lambda: list(archive.frames(frames[:99])),
            *(partial(archive.read_file, file.path) for file in archive.header.files[:2]),
        ]  # fmt: skip
        for name in random.sample(list(archive)[:99], min(2, len(archive))):
            calls += (partial(get, name) for get in (archive.levels, archive.info, archive.get))
        yield from random.sample(calls, min(3, len(calls)))


class QuickDecoder(loader.Decoder):
    """FFmpeg for pictures that have not been decoded before."""

    _known: dict[tuple[loader.Track, bytes], Any] = {}  # noqa: RUF012 - of all decoders

    def __init__(self, track: loader.Track, device: str = "software", threads: int = 1) -> None:
        self._track, self._settings, self._begun = track, (device, threads), False

    def decode(self, number: int, data: bytes | None) -> list[tuple[int, Any]]:
        """Numbers and luma of the frames that come out; of known packets at once."""
        if data is None:
            return super().decode(number, None) if self._begun else []
        luma = None if self._begun else self._known.get((self._track, data))
        if luma is not None:
            return [(number, luma)]
        if not self._begun:
            super().__init__(self._track, *self._settings)
            self._begun = True
        return super().decode(number, data)

    def remember(self, data: bytes) -> None:
        """Decode a packet by itself, for later."""
        alone = loader.Decoder(self._track)
        with suppress(WeightvidError):
            ((_, luma),) = *alone.decode(0, data), *alone.decode(0, None)
            self._known[self._track, data] = luma.copy()


def remember(seed: Seed) -> None:
    """Decode the pictures of an archive."""
    track = loader.parse_moov(next(box.payload for box in seed.boxes if box.kind == b"moov"))
    for box in seed.boxes:
        if box.kind == b"mdat":
            QuickDecoder(track).remember(box.payload)


def main() -> None:
    parser = argparse.ArgumentParser(description="mutate archives and checkpoints, and read them")
    for name, default in (("mutations", 1 << 62), ("seconds", 1e9), ("seed", 1), ("first", 0)):
        parser.add_argument(f"--{name}", type=type(default), default=default)
    parser.add_argument("--what", choices=("archives", "checkpoints"), default="archives")
    parser.add_argument("--kind", default="", help="of archives (update, ...) or checkpoints")
    options, memory = parser.parse_args(), Path("/dev/shm")
    parent = memory if memory.is_dir() else None
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="fuzz-", dir=parent))
        stack.enter_context(patch("tempfile.tempdir", folder))
        stack.enter_context(patch("os.fsync"))
        failures = fuzz(options, Path(folder))
    raise SystemExit(failures > 0)


def fuzz(options: argparse.Namespace, folder: Path) -> int:
    """Read mutations for a while; how many failed."""
    kinds: dict[str, list[Seed | Checkpoint]] = {}
    for seed in seeds(folder) if options.what == "archives" else checkpoint_seeds():
        kinds.setdefault(seed.kind, []).append(seed)
        if isinstance(seed, Seed):
            remember(seed)
    if options.kind and options.kind not in kinds:
        raise SystemExit(f"--kind {options.kind}: choose one of {', '.join(kinds)}")
    chosen = [kinds[options.kind]] if options.kind else list(kinds.values())
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES,) * 2)
    signal.signal(signal.SIGPROF, too_slow)
    warnings.simplefilter("error")
    number, results, failures, slowest = options.first, 0, 0, 0.0
    began, end = time.monotonic(), options.first + options.mutations
    while number < end and time.monotonic() - began < options.seconds:
        random, before = Random(f"{options.seed} {number}"), time.process_time()
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        try:
            results += read_one(random.choice(random.choice(chosen)), random, folder)
        except KeyboardInterrupt:
            raise
        except BaseException:
            signal.setitimer(signal.ITIMER_PROF, 0)
            print(f"mutation {number} of seed {options.seed}:", flush=True)
            traceback.print_exc()
            failures += 1
            if failures == MOST_FAILURES:
                break
        signal.setitimer(signal.ITIMER_PROF, 0)
        slowest, number = max(slowest, time.process_time() - before), number + 1
        if not number % 10_000:
            print(f"{number} mutations, {failures} failures", flush=True)
    print(f"{number - options.first} mutations, {results} results, {slowest:.2f} s at most")
    return failures


def read_one(seed: Seed | Checkpoint, random: Random, folder: Path) -> int:
    """Mutate and read an archive or a checkpoint; how many calls had a result."""
    if isinstance(seed, Checkpoint):
        return read_checkpoint(mutate_checkpoint(seed, random), random, folder)
    decoder = QuickDecoder if random.random() < 0.995 else loader.Decoder
    with patch.object(loader, "Decoder", decoder):
        return read_all(mutate(seed.boxes, random), seed, random, folder)


def too_slow(*_: object) -> None:
    raise TimeoutError(f"more than {CPU_SECONDS:g} s of the processor")


if __name__ == "__main__":
    main()
