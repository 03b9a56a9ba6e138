"""Runs NNCodec by the Python that has it; imports nothing of weightvid.

``nncodec_child.py FOLDER QP OPT_QP`` codes ``model.npz`` (arrays by number; their names, which the
stream holds, are in ``names.json``) with NNCodec's defaults and dependent quantization (OPT_QP 1:
with its data-free QP for each layer), writes ``stream.nnc``, and restores it to ``restored.npz``.
The last line on stdout: seconds of encoding and of decoding. ``nncodec_child.py FOLDER decode``
only restores ``stream.nnc``, and writes the names.
"""

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
LIBRARIES: list[Any] = []


def import_codec() -> Any:
    """NNCodec's entry module, also where torchvision's compiled operators do not load.

    It imports torchvision, for data sets, whose import asks for two operators that a CPU build of
    torch next to a CUDA build of torchvision lacks; naming their signatures is enough.
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
        LIBRARIES.append(library)
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


def work(folder: Path, qp: int, opt_qp: bool) -> tuple[float, float]:
    """Code and restore a model: seconds of both."""
    codec = import_codec()
    with np.load(folder / "model.npz", allow_pickle=False) as stored:
        names = json.loads((folder / "names.json").read_text(encoding="utf-8"))
        model = {name: ready(stored[str(number)]) for number, name in enumerate(names)}
    began = time.perf_counter()
    stream = codec.compress(
        model, bitstream_path=None, qp=qp, use_dq=True, opt_qp=opt_qp, return_bitstream=True
    )
    coded = time.perf_counter()
    restored = codec.decompress(bytearray(stream))
    decoded = time.perf_counter()
    (folder / "stream.nnc").write_bytes(bytes(stream))
    save(folder, [restored[name] for name in names])
    return coded - began, decoded - coded


def save(folder: Path, tensors: list[Any]) -> None:
    """Arrays by number."""
    arrays: dict[str, Any] = {str(n): np.asarray(tensor) for n, tensor in enumerate(tensors)}
    np.savez(folder / "restored.npz", **arrays)


def decode(folder: Path) -> None:
    """Restore a stream that is there already, and write its names."""
    restored = import_codec().decompress(bytearray((folder / "stream.nnc").read_bytes()))
    (folder / "names.json").write_text(json.dumps(list(restored)), encoding="utf-8")
    save(folder, list(restored.values()))


if __name__ == "__main__":
    place, *settings = sys.argv[1:]
    with contextlib.redirect_stdout(io.StringIO()):
        if settings == ["decode"]:
            seconds: tuple[float, ...] = ()
            decode(Path(place))
        else:
            seconds = work(Path(place), int(settings[0]), settings[1] == "1")
    sys.stdout.write(" ".join(map(str, seconds)))
