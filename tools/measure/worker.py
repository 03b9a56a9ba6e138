"""One measured run of weightvid in a process of its own: ``worker.py TASK JSON``.

Prints JSON. Times begin after the imports. Memory is the kernel's high-water mark of this process's
own memory (``VmHWM``), less what was resident after the imports; ``ru_maxrss`` would begin
with the parent's, which it inherits through ``vfork``. Worker processes that the task started and
waited for are counted, from their first instruction on: their CPU time, and the memory of the
largest of them (``ru_maxrss``, so never too little).
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

Record = dict[str, Any]
KIB: Final = 1024


def memory_bytes(field: str) -> int:
    """``VmHWM`` (peak) or ``VmRSS`` (now) of this process; elsewhere than on Linux the peak."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return next(int(line.split()[1]) * KIB for line in lines if line.startswith(field))


def measured(work: Callable[[], Any]) -> Record:
    """Run it: wall and CPU seconds, memory above what was resident before."""
    before = memory_bytes("VmRSS")
    wall, cpu, main = time.perf_counter(), time.process_time(), time.thread_time()
    work()
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "wall_s": time.perf_counter() - wall,
        "cpu_s": time.process_time() - cpu + children.ru_utime + children.ru_stime,
        "main_thread_cpu_s": time.thread_time() - main,
        "import_bytes": before,
        "peak_bytes": memory_bytes("VmHWM") - before,
        "largest_child_bytes": children.ru_maxrss * KIB,
    }


def pack(settings: Record) -> Record:
    """Pack ``source`` to ``archive`` with ``options``, by threads or processes as `pack` does."""
    from safetensors import safe_open  # noqa: F401 - what packing imports is no part of it

    from weightvid.checkpoint import open_checkpoint
    from weightvid.pack import PackOptions, pack_checkpoint
    from weightvid.packing.engines import local_engine

    given = settings["options"]

    def work() -> None:
        with open_checkpoint(settings["source"]) as reader:
            cluster = given.get("cluster") or local_engine(reader, given.get("jobs", 0))
            options = PackOptions(force=True, **{**given, "cluster": cluster})
            pack_checkpoint(reader, settings["archive"], options)

    return measured(work)


def unpack(settings: Record) -> Record:
    """Unpack ``archive`` to ``destination``."""
    from safetensors import safe_open  # noqa: F401 - as above

    from weightvid.unpack import UnpackOptions, unpack_archive

    options = UnpackOptions(force=True)
    return measured(lambda: unpack_archive(settings["archive"], settings["destination"], options))


def iterate(settings: Record) -> Record:
    """Every tensor of ``archive`` once, none kept; ``check``: hashes of tensors, too."""
    from weightvid.loader import open_archive

    def work() -> None:
        threads, check = settings.get("threads", 0), settings.get("check", True)
        with open_archive(settings["archive"], threads=threads, check_tensors=check) as archive:
            for _ in archive:
                pass

    return measured(work)


def decode(settings: Record) -> Record:
    """FFmpeg alone on the packets, and the loader with fewer and more hashes, in turns."""
    import av

    from measure.archives import fragments
    from weightvid.loader import open_archive

    packets = [fragment.packet for fragment in fragments(Path(settings["archive"]))]
    with open_archive(settings["archive"]) as archive:
        extradata = archive.track.record

    def bare() -> None:
        context: Any = av.CodecContext.create("hevc", "r")
        context.extradata = extradata
        context.thread_type, context.thread_count = "FRAME", settings["threads"]
        frames = 0
        for packet in [*map(av.Packet, packets), None]:
            frames += len(context.decode(packet))
        if frames != len(packets):
            raise SystemExit(f"{frames} frames from {len(packets)} packets")

    contenders: dict[str, Callable[[], Record]] = {
        "bare": lambda: measured(bare),
        "usual": lambda: iterate(settings | {"check": False}),
        "all": lambda: iterate(settings),
    }
    rounds = [{n: run() for n, run in contenders.items()} for _ in range(settings["repeats"])]
    return {name: [each[name] for each in rounds] for name in contenders}


TASKS: Final = {"pack": pack, "unpack": unpack, "iterate": iterate, "decode": decode}


def run(task: str, **settings: Any) -> Record:
    """Run a task in a new process.

    Raises
    ------
    SystemExit
        It failed.
    """
    import os
    import subprocess

    command = [sys.executable, str(Path(__file__).resolve()), task, json.dumps(settings)]
    # What is installed has its bytecode; worker processes are not to compile it each time.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"{task} failed: {done.stderr[-2000:]}")
    found: Record = json.loads(done.stdout)
    return found


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    print(json.dumps(TASKS[sys.argv[1]](json.loads(sys.argv[2]))))
