"""Run NNCodec (MPEG NNC) on a checkpoint: one bitstream and one reconstruction per QP.

NNCodec wants its own environment (tools/NNCODEC.md), so this file imports nothing of weightvid but
the one file that knows how to import NNCodec::

    python tools/peer_nncodec.py model.safetensors -28 -24 -20 --opt-qp --out points.json

Per point: bytes, bits per weight, CPU and wall seconds of encoder and decoder, SQNR over the float
weights. The reconstructed state dict goes to ``--save DIR`` as safetensors, which the evaluation
scripts read.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import math
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

# Behind all else on the path: a folder of weightvid's, of which one file alone knows NNCodec.
sys.path.append(str(Path(__file__).resolve().parents[1] / "weightvid" / "compare"))
Tensors = dict[str, npt.NDArray[Any]]


def load_tensors(path: Path) -> Tensors:
    """Every tensor of a safetensors file; floats as float32 (BF16 too), integers as stored."""
    import torch
    from safetensors.torch import load_file

    return {
        name: (value.to(torch.float32) if value.is_floating_point() else value).numpy()
        for name, value in load_file(path).items()
    }


def for_nncodec(tensors: Tensors) -> Tensors:
    """The codec takes float32 and int32 alone; integers that do not fit are refused.

    Raises
    ------
    ValueError
        An integer tensor leaves the range of int32.
    """
    ready: Tensors = {}
    for name, value in tensors.items():
        if value.dtype == np.float32:
            ready[name] = np.ascontiguousarray(value)
            continue
        if value.size and np.abs(value.astype(np.float64)).max() >= 2**31:
            raise ValueError(f"{name}: integers beyond 32 bits")
        ready[name] = np.ascontiguousarray(value.astype(np.int32))
    return ready


def sqnr_db(source: Tensors, restored: Tensors) -> float:
    """10 log10(sum x^2 / sum (x - x')^2) over all float tensors with two or more dimensions."""
    signal = noise = 0.0
    for name, value in source.items():
        if value.dtype == np.float32 and value.ndim >= 2:
            x = value.astype(np.float64)
            signal += float(np.square(x).sum())
            noise += float(np.square(x - restored[name]).sum())
    return 10 * math.log10(signal / noise) if noise else math.inf


def timed(call: Any) -> tuple[Any, float, float]:
    """Run ``call`` with its chatter swallowed: result, wall seconds, CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):
        result = call()
    return result, time.perf_counter() - wall, time.process_time() - cpu


def measure(tensors: Tensors, qp: int, args: argparse.Namespace) -> tuple[dict[str, Any], Tensors]:
    """Encode at one QP and decode again: the point's figures and the restored tensors."""
    nnc = importlib.import_module("nnc_runner").import_codec()
    stream, encode_wall_s, encode_cpu_s = timed(
        lambda: nnc.compress(
            for_nncodec(tensors),
            bitstream_path=None,
            qp=qp,
            use_dq=not args.no_dq,
            opt_qp=args.opt_qp,
            row_skipping=not args.no_row_skipping,
            return_bitstream=True,
        )
    )
    decoded, decode_wall_s, decode_cpu_s = timed(lambda: nnc.decompress(bytearray(stream)))
    restored = {
        name: np.asarray(decoded[name]).reshape(value.shape).astype(value.dtype)
        for name, value in tensors.items()
    }
    weights = sum(value.size for value in tensors.values() if value.dtype == np.float32)
    point = {
        "qp": qp,
        "dependent_quantization": not args.no_dq,
        "opt_qp": args.opt_qp,
        "row_skipping": not args.no_row_skipping,
        "bytes": len(stream),
        "bits_per_weight": 8 * len(stream) / weights,
        "sqnr_db": sqnr_db(tensors, restored),
        "encode_wall_s": encode_wall_s,
        "encode_cpu_s": encode_cpu_s,
        "decode_wall_s": decode_wall_s,
        "decode_cpu_s": decode_cpu_s,
    }
    return point, restored


def save_tensors(tensors: Tensors, path: Path) -> None:
    """Write one reconstruction as safetensors."""
    from safetensors.numpy import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, path)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Command line; QPs are negative, so they may follow the checkpoint directly."""
    parser = argparse.ArgumentParser(description="NNCodec on a checkpoint, one point per QP")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("qp", type=int, nargs="+")
    parser.add_argument("--opt-qp", action="store_true", help="its data-free QP per layer")
    parser.add_argument("--no-dq", action="store_true", help="plain instead of trellis")
    parser.add_argument("--no-row-skipping", action="store_true", help="off: it is its default")
    parser.add_argument("--out", type=Path, help="JSON file for the points")
    parser.add_argument("--save", type=Path, help="folder for the reconstructions")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Print one line per point, write the JSON and the reconstructions."""
    args = parse(argv)
    tensors = load_tensors(args.checkpoint)
    points = []
    for qp in args.qp:
        point, restored = measure(tensors, qp, args)
        points.append(point)
        if args.save is not None:
            label = f"{args.checkpoint.stem}_qp{qp}{'_opt' if args.opt_qp else ''}"
            save_tensors(restored, args.save / f"{label}.safetensors")
        print(
            f"qp {qp:4d}  {point['bytes']:>11,d} B  {point['bits_per_weight']:6.3f} bpw  "
            f"{point['sqnr_db']:6.2f} dB  encode {point['encode_cpu_s']:7.2f} s  "
            f"decode {point['decode_cpu_s']:6.2f} s"
        )
    if args.out is not None:
        report = {"peer": "nncodec", "version": version("nncodec"), "points": points}
        report["checkpoint"] = args.checkpoint.name
        args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
