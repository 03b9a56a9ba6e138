"""Whoever does the work, the bytes are the same; and what goes wrong there comes back."""

from __future__ import annotations

import gc
import os
import pickle
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pytest
from small_models import weights

import weightvid
from weightvid import workers
from weightvid.checkpoint import create_checkpoint, from_mapping, open_checkpoint
from weightvid.errors import CheckpointError, ClusterError, FormatError, QuantizationError
from weightvid.pack import PackOptions, pack_checkpoint
from weightvid.workers import Piece, Workers, open_workers


class Foreign(Executor):
    """Threads that look like processes elsewhere, as those of a Dask worker do."""

    def __init__(self, count: int) -> None:
        self._threads = ThreadPoolExecutor(count)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        return self._threads.submit(fn, *args, **kwargs)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Several parts, frames and boxes; workers can open it themselves."""
    spread = np.exp2(np.random.default_rng(1).uniform(-8, 8, (90, 1)))
    arrays = {f"w{i}": weights(i, 90, 200 + i) for i in range(5)}
    arrays |= {f"conv{i}": weights(i, 32, 16, 3, 3) for i in range(3)}
    arrays |= {"rows": (weights(9, 90, 90) * spread).astype(np.float32), "bias": weights(8, 300)}
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    source = from_mapping(arrays)
    with create_checkpoint(path, source.contents) as writer:
        for spec in source.contents.tensors:
            writer.write(spec.name, source.read(spec.name))
    return path


def packed(model: Path, path: Path, by: Any, jobs: int = 2) -> bytes:
    pack_checkpoint(model, path, PackOptions(workers=by, jobs=jobs, force=True))
    return path.read_bytes()


@pytest.fixture(scope="module", autouse=True)
def forget() -> Iterator[None]:
    """What these tests' threads have open ends with them, and not with a warning at exit."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        workers._reader.cache_clear()
        gc.collect()


@pytest.fixture(scope="module")
def alone(model: Path) -> bytes:
    return packed(model, model.with_suffix(".mp4"), None, jobs=1)


@pytest.mark.parametrize(
    ("by", "jobs"),
    [("threads", 2), ("threads", 3), ("processes", 1), ("processes", 2), (Foreign(4), 4)],
)
def test_the_bytes_of_one_worker(
    model: Path, alone: bytes, tmp_path: Path, by: Any, jobs: int
) -> None:
    assert packed(model, tmp_path / "m.mp4", by, jobs) == alone


def test_a_checkpoint_in_memory(model: Path, alone: bytes, tmp_path: Path) -> None:
    """Its elements travel to the workers."""
    with open_checkpoint(model) as reader, ProcessPoolExecutor(2, get_context("spawn")) as pool:
        arrays = {spec.name: reader.read(spec.name) for spec in reader.contents.tensors}
        options = PackOptions(workers=pool, jobs=2)
        pack_checkpoint(from_mapping(arrays), tmp_path / "m.mp4", options)
        assert pool.submit(abs, -1).result() == 1, "it stays open"
    assert (tmp_path / "m.mp4").read_bytes() == alone


@pytest.mark.skipif(find_spec("distributed") is None, reason="needs the extra: weightvid[dask]")
def test_dask(model: Path, alone: bytes, tmp_path: Path) -> None:
    """In a process of its own: what it leaves open there ends with it."""
    assert by_script(model, tmp_path / "m.mp4", "dask") == alone


@pytest.mark.skipif(find_spec("ray") is None, reason="needs the extra: weightvid[ray]")
def test_ray(model: Path, alone: bytes, tmp_path: Path) -> None:
    assert by_script(model, tmp_path / "m.mp4", "ray") == alone


def by_script(model: Path, path: Path, by: str) -> bytes:
    script = path.with_suffix(".py")
    script.write_text(
        "from weightvid.pack import PackOptions, pack_checkpoint\n"
        "if __name__ == '__main__':\n"
        f"    options = PackOptions(workers={by!r}, jobs=2)\n"
        f"    pack_checkpoint({str(model)!r}, {str(path)!r}, options)\n"
    )
    root = str(Path(weightvid.__file__).parents[1])
    run = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=False,
        cwd=path.parent, env={**os.environ, "PYTHONPATH": root},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return path.read_bytes()


def test_packings_in_one_worker_do_not_close_each_others_checkpoint(tmp_path: Path) -> None:
    """A worker that serves many keeps some open; what it lets go is still whole for its reader."""
    pieces = []
    for number in range(20):
        path = tmp_path / f"{number}.safetensors"
        source = from_mapping({"w": np.full((40, 40), number, np.float32)})
        with create_checkpoint(path, source.contents) as writer:
            writer.write("w", source.read("w"))
        status = path.stat()
        pieces.append(Piece("w", 3, 50, None, (str(path), status.st_size, status.st_mtime_ns)))
    code = (
        "import pickle, sys, threading\n"
        "pieces = pickle.load(sys.stdin.buffer)\n"
        "def read(): \n"
        "    for _ in range(9):\n"
        "        for number, piece in enumerate(pieces):\n"
        "            assert (piece.read() == number).all()\n"
        "    done.append(1)\n"
        "done = []\n"
        "threads = [threading.Thread(target=read) for _ in range(4)]\n"
        "[t.start() for t in threads]; [t.join() for t in threads]\n"
        "print(len(done))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], input=pickle.dumps(pieces), capture_output=True, check=False,
        env={**os.environ, "PYTHONPATH": str(Path(weightvid.__file__).parents[1])},
    )  # fmt: skip
    assert run.stdout == b"4\n", run.stderr


def test_another_file_of_the_same_name_is_told(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    for number in range(2):
        source = from_mapping({"w": np.full((40, 40 + number), number, np.float32)})
        with create_checkpoint(path, source.contents, force=True) as writer:
            writer.write("w", source.read("w"))
        with open_checkpoint(path) as reader:
            piece = Workers(None, 1, remote=True).piece(reader, "w", 0, 9)
            assert piece.array is None
            assert (piece.read() == number).all()


def fail(number: int) -> int:
    """Runs in a worker."""
    errors = {
        3: QuantizationError("as it was"), 4: FormatError("broken", "limit", 7, "w"),
        5: CheckpointError("gone"),
    }  # fmt: skip
    if number in errors:
        raise errors[number]
    return number


def die(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.mark.parametrize("by", ["threads", "processes"])
def test_errors_of_workers_come_back(by: str) -> None:
    """However slow they are: nothing waits for a time here."""
    with open_workers(by, 2) as opened:
        assert list(opened.map(fail, [0, 1, 2, 6])) == [0, 1, 2, 6]
        for bad, kind in ((3, QuantizationError), (4, FormatError), (5, CheckpointError)):
            results = opened.map(fail, [0, 1, bad, 2, *range(20)])
            assert [next(results), next(results)] == [0, 1]
            with pytest.raises(kind) as caught:
                list(results)
            with pytest.raises(kind) as here:
                fail(bad)
            assert str(caught.value) == str(here.value)
        assert list(opened.map(fail, [7])) == [7], "the others go on"


@pytest.mark.skipif(os.name == "nt", reason="signals are POSIX's")
def test_a_worker_that_is_killed() -> None:
    with open_workers("processes", 2) as opened, pytest.raises(ClusterError, match="fewer --jobs"):
        list(opened.map(die, range(9)))


def test_order_and_how_far_ahead() -> None:
    """Results come in order, and items are taken as they are needed."""
    taken: list[int] = []
    with open_workers("threads", 3) as opened:
        barrier = Barrier(3)
        items = (taken.append(n) or n for n in range(99))  # type: ignore[func-returns-value]
        results = opened.map(lambda n: (barrier.wait(), n)[1], items)
        assert [next(results) for _ in range(9)] == list(range(9))
        assert len(taken) < 9 + 3 * 3
        barrier.abort()
        results.close()


@pytest.mark.parametrize("name", ["slurm", "daskk", ""])
def test_unknown_workers(name: str) -> None:
    with pytest.raises(ClusterError, match="unknown workers"), open_workers(name):
        pass


@pytest.mark.parametrize(("name", "module"), [("dask", "distributed"), ("ray", "ray")])
def test_a_missing_library(monkeypatch: pytest.MonkeyPatch, name: str, module: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ClusterError, match=rf"weightvid\[{name}\]"), open_workers(name):
        pass
