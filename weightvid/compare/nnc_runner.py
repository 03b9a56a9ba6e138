"""Runs NNCodec by the Python that has it; imports nothing of weightvid.

``encode FOLDER QP`` codes ``model.npz`` (arrays by number, names in ``names.json``) to
``stream.nnc``; ``decode FOLDER`` restores it to ``restored.npz``, named alike. The last words on
stdout are seconds, imports left out, and peak bytes on top of what was held before.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

# A torch library's definitions vanish with the object.
KEPT: list[Any] = []


def import_codec() -> Any:
    """NNCodec's entry module, also where torchvision's compiled operators do not load.

    NNCodec imports torchvision for data sets that nothing here touches. A CPU build of torch
    beside a CUDA build of torchvision lacks two operators that torchvision's import asks for;
    naming their signatures is enough.
    """
    import torch

    torch.set_num_threads(1)
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        signature = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(operator + signature)
        KEPT.append(library)
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
    return importlib.import_module("nncodec.nnc")


def ready(value: Any) -> Any:
    """An array as NNCodec takes it: float32, or int32 where that holds it."""
    if value.dtype.kind == "f":
        return np.ascontiguousarray(value, np.float32)
    if value.size and np.abs(value.astype(np.float64)).max() >= 2**31:
        raise ValueError("integers beyond 32 bits")
    return np.ascontiguousarray(value.astype(np.int32))


def memory(field: str) -> int:
    """``VmHWM`` (peak) or ``VmRSS`` (now) in bytes; 0 where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
    except (OSError, StopIteration):
        return 0


def work(arguments: list[str]) -> tuple[float, int]:
    """Do a task: seconds and peak bytes."""
    codec, folder = import_codec(), Path(arguments[1])
    if arguments[0] == "encode":
        with np.load(folder / "model.npz", allow_pickle=False) as stored:
            names = json.loads((folder / "names.json").read_text(encoding="utf-8"))
            model = {name: ready(stored[str(n)]) for n, name in enumerate(names)}
        held, began = memory("VmRSS"), time.perf_counter()
        stream = codec.compress(
            model, bitstream_path=None, qp=int(arguments[2]), use_dq=True, return_bitstream=True
        )
        seconds = time.perf_counter() - began
        (folder / "stream.nnc").write_bytes(bytes(stream))
    else:
        data = bytearray((folder / "stream.nnc").read_bytes())
        held, began = memory("VmRSS"), time.perf_counter()
        restored = codec.decompress(data)
        seconds = time.perf_counter() - began
        arrays: dict[str, Any] = {
            str(n): np.asarray(value) for n, value in enumerate(restored.values())
        }
        np.savez(folder / "restored.npz", **arrays)
        (folder / "names.json").write_text(json.dumps(list(restored)), encoding="utf-8")
    return seconds, max(0, memory("VmHWM") - held)


if __name__ == "__main__":
    with contextlib.redirect_stdout(io.StringIO()):
        found = work(sys.argv[1:])
    sys.stdout.write(" ".join(map(str, found)))
