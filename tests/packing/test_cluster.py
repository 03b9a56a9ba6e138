"""Packing on clusters: the bytes of a local run, also when workers die."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from archives import normal, save

import weightvid
from weightvid.checkpoint import from_mapping, open_checkpoint
from weightvid.errors import CheckpointError, ClusterError
from weightvid.pack import PackOptions, pack_checkpoint
from weightvid.packing.engines import open_workers
from weightvid.progress import Progress

distributed = pytest.importorskip("distributed", reason="needs the extra dask")
dask = pytest.importorskip("dask", reason="needs the extra dask")

WORKERS = 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A large tensor of several blocks, small ones in company, a kept one."""
    embedding = normal(1, 12000, 500) * np.exp(normal(2, 12000, 1, scale=0.7))
    embedding[17, 3] = 40.0
    arrays = {"embedding": embedding.astype(np.float32), "norm": normal(3, 500)}
    arrays |= {f"layer{i}.weight": normal(4 + i, 600, 500) for i in range(4)}
    return save(arrays, tmp_path_factory.mktemp("model") / "model.safetensors")


@pytest.fixture(scope="module")
def local(model: Path) -> bytes:
    path = model.with_name("local.mp4")
    pack_checkpoint(model, path, PackOptions(jobs=2))
    return path.read_bytes()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A Dask cluster of worker processes; each has weightvid from this checkout."""
    # A busy machine takes its time to start processes.
    patience = {
        f"distributed.{key}": "300s" for key in ("comm.timeouts.connect", "comm.timeouts.tcp")
    }
    with (
        dask.config.set(patience),
        distributed.LocalCluster(
            n_workers=WORKERS, threads_per_worker=1, processes=True, dashboard_address="127.0.0.1:0"
        ) as made,
    ):
        yield made


def run_cli(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """The command line, with weightvid from where the tests have it."""
    root = str(Path(weightvid.__file__).parent.parent)
    return subprocess.run(
        [sys.executable, "-c", "from weightvid.cli import main; main()", *arguments],
        env=os.environ | {"PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def pack(model: Path, path: Path, where: str, told: list[Progress]) -> bytes:
    pack_checkpoint(model, path, PackOptions(cluster=where, verify=False), told.append)
    return path.read_bytes()


def test_worker_processes_give_the_bytes_of_a_local_run(
    model: Path, local: bytes, cluster: Any, tmp_path: Path
) -> None:
    told: list[Progress] = []
    assert pack(model, tmp_path / "there.mp4", cluster.scheduler_address, told) == local
    shares = told[-1].workers
    assert len(shares) > 1, "more than one process did the work"
    assert sum(share.done for share in shares) == told[-1].total
    here = f":{os.getpid()}"
    assert not any(share.name.endswith(here) for share in shares)


def test_a_worker_that_is_killed(model: Path, local: bytes, cluster: Any, tmp_path: Path) -> None:
    """What it had in hand is done again by others; the bytes are the same."""
    killed: list[str] = []
    path = tmp_path / "killed.mp4"
    options = PackOptions(cluster=cluster.scheduler_address, verify=False)
    with distributed.Client(cluster.scheduler_address) as client:
        pids = client.run(os.getpid)

        def told(progress: Progress) -> None:
            if progress.stage != "encode" or progress.done < progress.total // 4 or killed:
                return
            busy = [address for address, tasks in client.processing().items() if tasks]
            if busy:
                killed.append(busy[0])
                os.kill(pids[busy[0]], signal.SIGKILL)

        pack_checkpoint(model, path, options, told)
    assert killed
    assert path.read_bytes() == local


def test_a_checkpoint_that_workers_do_not_see(cluster: Any, tmp_path: Path) -> None:
    """Errors of workers come back as they are."""
    model = save({"a.weight": normal(1, 300, 400)}, tmp_path / "model.safetensors")
    target = tmp_path / "model.mp4"
    with open_checkpoint(model) as reader:
        model.unlink()
        with pytest.raises(CheckpointError, match="worker cannot read"):
            pack_checkpoint(reader, target, PackOptions(cluster=cluster.scheduler_address))
    assert not target.exists()


def test_a_checkpoint_in_memory_is_refused(cluster: Any, tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="shared storage"):
        pack_checkpoint(
            from_mapping({"w": normal(1, 50, 60)}),
            tmp_path / "model.mp4",
            PackOptions(cluster=cluster.scheduler_address),
        )
    assert list(tmp_path.iterdir()) == []


def test_an_executor_of_ones_own(model: Path, local: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.mp4"
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, context) as executor:
        pack_checkpoint(model, path, PackOptions(cluster=executor, verify=False))
        assert executor.submit(abs, -1).result() == 1, "it stays open"
    assert path.read_bytes() == local


@pytest.mark.skipif(find_spec("ray") is None, reason="needs the extra ray")
def test_ray_gives_the_bytes_of_a_local_run(model: Path, local: bytes, tmp_path: Path) -> None:
    """In a process of its own: what Ray leaves open there ends with it."""
    path = tmp_path / "model.mp4"
    done = run_cli(["pack", str(model), "-o", str(path), "--cluster", "ray", "--jobs", "2"])
    assert done.returncode == 0, done.stderr
    assert path.read_bytes() == local


#: packs on a Ray cluster of this machine, and kills a worker while it is in a task.
_RAY_KILLING = """
import json, os, signal, sys
import psutil
from weightvid.pack import PackOptions, pack_checkpoint

model, path, jobs = sys.argv[1], sys.argv[2], int(sys.argv[3])
killed, shares = [], []

def told(progress):
    shares[:] = [(share.name, share.done) for share in progress.workers]
    if progress.stage != "encode" or progress.done < progress.total // 4 or killed:
        return
    for process in psutil.Process().children(recursive=True):
        # A worker of Ray is called after the task that it is in; one that waits, ray::IDLE.
        if process.cmdline()[:1] == ["ray::_call"]:
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed.append(process.pid)
            return

pack_checkpoint(model, path, PackOptions(cluster="ray", jobs=jobs, verify=False), told)
print(json.dumps({"killed": killed, "shares": shares, "here": os.getpid()}))
"""


@pytest.mark.skipif(find_spec("ray") is None, reason="needs the extra ray")
def test_a_worker_of_ray_that_is_killed(model: Path, local: bytes, tmp_path: Path) -> None:
    """What it had in hand is done again by others; the bytes are the same."""
    script, path = tmp_path / "script.py", tmp_path / "model.mp4"
    script.write_text(_RAY_KILLING)
    done = subprocess.run(
        [sys.executable, str(script), str(model), str(path), str(WORKERS)],
        env=os.environ | {"PYTHONPATH": str(Path(weightvid.__file__).parent.parent)},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    pids = {int(name.rpartition(":")[2]) for name, _ in told["shares"]}
    assert len(told["killed"]) == 1
    assert len(pids) > 1, "more than one process did the work"
    assert told["here"] not in pids
    assert path.read_bytes() == local


def test_a_cluster_that_does_not_answer(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weightvid.packing.engines._CONNECT_S", 1)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(ClusterError, match="does not answer"):
            pack_checkpoint(model, tmp_path / "model.mp4", PackOptions(cluster=address))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["slurm", "daskk", ""])
def test_an_unknown_cluster(name: str) -> None:
    with pytest.raises(ClusterError, match="no cluster"), open_workers(name):
        pass


@pytest.mark.parametrize("name", ["dask", "ray"])
def test_a_missing_library(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, {"dask": "distributed", "ray": "ray"}[name], None)
    with (
        pytest.raises(ClusterError, match=rf"pip install 'weightvid\[{name}\]'"),
        open_workers(name),
    ):
        pass
