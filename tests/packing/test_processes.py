"""Packing by processes of this machine: the same bytes, and all of them end, whatever happens."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from archives import normal, save

import weightvid
from weightvid.checkpoint import from_mapping, open_checkpoint
from weightvid.errors import CheckpointError, ClusterError, QuantizationError
from weightvid.pack import PackOptions, pack_checkpoint
from weightvid.packing import engines
from weightvid.packing.children import ONE_THREAD, ProcessExecutor
from weightvid.packing.engines import local_engine
from weightvid.progress import Progress

psutil = pytest.importorskip("psutil", reason="needs the extra dask, which brings it")

ROOT = str(Path(weightvid.__file__).parent.parent)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A large tensor of several blocks, small ones in company, convolutions, kept ones."""
    embedding = normal(1, 12000, 500) * np.exp(normal(2, 12000, 1, scale=0.7))
    embedding[17, 3] = 40.0
    arrays = {"embedding": embedding.astype(np.float32), "norm": normal(3, 500)}
    arrays |= {f"layer{i}.weight": normal(4 + i, 600, 500) for i in range(4)}
    arrays |= {f"conv{i}.weight": normal(9 + i, 64, 32, 3, 3) for i in range(3)}
    return save(arrays, tmp_path_factory.mktemp("model") / "model.safetensors")


@pytest.fixture(scope="module")
def alone(model: Path) -> bytes:
    path = model.with_name("alone.mp4")
    pack_checkpoint(model, path, PackOptions(jobs=1))
    return path.read_bytes()


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that takes many seconds to pack, and processes by default."""
    arrays = {f"w{i}": normal(i, 1024, 1024) for i in range(24)}
    return save(arrays, tmp_path_factory.mktemp("large") / "large.safetensors")


def children(process: int | None = None) -> list[Any]:
    found: list[Any] = psutil.Process(process).children(recursive=True)
    return found


@pytest.mark.parametrize("jobs", [1, 2, 3])
def test_the_bytes_of_one_worker(model: Path, alone: bytes, tmp_path: Path, jobs: int) -> None:
    path = tmp_path / "model.mp4"
    before = set(children())
    seen: set[Any] = set()

    def told(progress: Progress) -> None:
        assert not progress.workers, "those of one machine have no lines of their own"
        seen.update(set(children()) - before)

    pack_checkpoint(model, path, PackOptions(jobs=jobs, cluster="processes"), told)
    assert path.read_bytes() == alone
    assert len(seen) == jobs - 1, "this process works too"
    assert not set(children()) - before


def test_the_work_is_shared() -> None:
    with ProcessExecutor(3) as executor:
        found = list(executor.map(_sleep_and_tell, range(30)))
    assert len(set(found)) > 1
    assert os.getpid() in found


def _sleep_and_tell(_: int) -> int:
    time.sleep(0.2)
    return os.getpid()


def test_a_script_without_a_guard(model: Path, alone: bytes, tmp_path: Path) -> None:
    """Processes import the program's modules, and not the script that packs."""
    script, path = tmp_path / "script.py", tmp_path / "model.mp4"
    script.write_text(
        "print('once')\n"
        "from weightvid.pack import PackOptions, pack_checkpoint\n"
        f"options = PackOptions(jobs=3, cluster='processes')\n"
        f"pack_checkpoint({str(model)!r}, {str(path)!r}, options)\n"
    )
    # A module of the folder in which it runs must not be taken for one of the library's.
    (tmp_path / "json.py").write_text("raise SystemExit('a wrong module')\n")
    done = subprocess.run(
        [sys.executable, "-P", str(script)],
        env={**os.environ, "PYTHONPATH": ROOT},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "once\n", "")
    assert path.read_bytes() == alone


def test_a_worker_that_is_killed(large: Path, tmp_path: Path) -> None:
    """As the kernel does where memory is short: one error that says so, and no file."""
    before = set(children())
    killed: list[Any] = []

    def told(progress: Progress) -> None:
        if progress.stage == "encode" and not killed:
            killed.extend(set(children()) - before)
            killed[0].send_signal(signal.SIGKILL)

    with pytest.raises(ClusterError, match=r"SIGKILL.*fewer --jobs"):
        options = PackOptions(jobs=3, cluster="processes")
        pack_checkpoint(large, tmp_path / "model.mp4", options, told)
    assert not list(tmp_path.iterdir())
    assert not set(children()) - before


def test_workers_are_other_processes_with_one_thread_of_algebra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Unless the user says otherwise."""
    for name in ONE_THREAD:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    with ProcessExecutor(2, here=False) as executor:
        found = set(executor.map(_process_and_threads, range(20)))
    assert os.getpid() not in {process for process, _ in found}
    assert {threads for _, threads in found} == {("3", "1", "1")}


def _process_and_threads(_: int) -> tuple[int, tuple[str | None, ...]]:
    return os.getpid(), tuple(os.environ.get(name) for name in ONE_THREAD)


def test_errors_of_workers_come_back(tmp_path: Path) -> None:
    with ProcessExecutor(2) as executor:
        busy = executor.submit(time.sleep, 30 if os.name == "nt" else 3)
        with pytest.raises(QuantizationError, match="as it was") as caught:
            executor.submit(_fail, QuantizationError("as it was")).result()
        assert "in a worker process" in caught.value.__notes__[0]
        with pytest.raises(RuntimeError, match="_Unportable"):
            executor.submit(_fail_unportably).result()
        busy.result()


def _fail(error: Exception) -> None:
    raise error


def _fail_unportably() -> None:
    class _Unportable(Exception):
        """No other process can know it."""

    raise _Unportable


def test_a_checkpoint_that_vanished(model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model.safetensors"
    copy.write_bytes(model.read_bytes())
    with open_checkpoint(copy) as reader:
        copy.unlink()
        with pytest.raises(CheckpointError, match="worker cannot read"):
            pack_checkpoint(
                reader, tmp_path / "model.mp4", PackOptions(jobs=2, cluster="processes")
            )
    assert not list(tmp_path.iterdir())


def test_a_process_that_cannot_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with pytest.raises(ClusterError, match=r"cannot be started.*--jobs 1"):
        ProcessExecutor(2)


def test_a_process_that_fails_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weightvid.packing.children._PROGRAM", "raise SystemExit(7)")
    with (
        ProcessExecutor(2) as executor,
        pytest.raises(ClusterError, match=r"did not start.*status 7"),
    ):
        for future in [executor.submit(time.sleep, 0.5) for _ in range(20)]:
            future.result()


def test_which_engine(
    model: Path, large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes for large models that they can open themselves without ado."""
    with open_checkpoint(large) as reader:
        assert local_engine(reader, 2) == "processes"
        assert local_engine(reader, 1) == "threads"
        monkeypatch.setattr(sys, "frozen", True, raising=False)
        assert local_engine(reader, 2) == "threads"
        monkeypatch.undo()
    with open_checkpoint(model) as reader:
        assert local_engine(reader, 2) == "threads"
    monkeypatch.setattr(engines, "PROCESS_WEIGHTS", 1)
    with open_checkpoint(model) as reader:
        assert local_engine(reader, 2) == "processes"
    assert local_engine(from_mapping({"w": normal(1, 60, 60)}), 2) == "threads"
    np.savez(tmp_path / "model.npz", w=normal(1, 60, 60))
    with open_checkpoint(tmp_path / "model.npz") as reader:
        assert local_engine(reader, 2) == "threads"


def _start(model: Path, path: Path) -> tuple[subprocess.Popen[bytes], list[Any]]:
    """A packing under way on the command line, and its processes."""
    command = "from weightvid.cli import main; main()"
    packing = subprocess.Popen(
        [sys.executable, "-c", command, "pack", str(model), "-o", str(path), "--jobs", "3"],
        env={**os.environ, "PYTHONPATH": ROOT},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    _until(lambda: packing.poll() is not None or _size_of_any(path.parent) > 0)
    assert packing.poll() is None, packing.communicate()
    found = children(packing.pid)
    assert len(found) == 2, "large models have processes by default"
    return packing, found


def _size_of_any(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)


@pytest.mark.skipif(os.name == "nt", reason="signals are POSIX's")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interruption_ends_all(large: Path, tmp_path: Path, number: int, status: int) -> None:
    """A terminal sends Ctrl-C to all processes of the group."""
    packing, workers = _start(large, tmp_path / "model.mp4")
    os.killpg(packing.pid, number)
    _, error = packing.communicate(timeout=300)
    assert packing.returncode == status, error
    assert error.strip() == (b"interrupted" if number == signal.SIGINT else b"")
    assert not list(tmp_path.iterdir())
    assert not any(worker.is_running() for worker in workers)


@pytest.mark.skipif(os.name == "nt", reason="signals are POSIX's")
def test_workers_end_with_the_one_that_has_them(large: Path, tmp_path: Path) -> None:
    packing, workers = _start(large, tmp_path / "model.mp4")
    packing.kill()
    _, error = packing.communicate(timeout=300)
    assert error == b""
    _until(lambda: not any(_alive(worker) for worker in workers))
    assert not any(_alive(worker) for worker in workers)


def _alive(process: Any) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
