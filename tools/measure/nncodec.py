"""NNCodec's points, made by ``tools/peer_nncodec.py`` in its own environment."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]
TOOL = Path(__file__).resolve().parent.parent / "peer_nncodec.py"


def run(
    python: Path, checkpoint: Path, qps: Sequence[int], opt_qp: bool, restore: bool
) -> Iterator[tuple[Record, dict[str, Any]]]:
    """Code a checkpoint at each QP.

    Yields
    ------
    (dict, dict)
        The point as the tool reports it, with ``version``, and the restored tensors (none unless
        ``restore``).

    Raises
    ------
    SystemExit
        The tool failed.
    """
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = [str(python), str(TOOL), str(checkpoint), *map(str, qps)]
        command += ["--out", str(folder / "points.json")]
        command += ["--save", str(folder)] if restore else []
        command += ["--opt-qp"] if opt_qp else []
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"NNCodec failed on {checkpoint.name}: {done.stderr[-2000:]}")
        report = json.loads((folder / "points.json").read_text(encoding="utf-8"))
        for point in report["points"]:
            label = f"{checkpoint.stem}_qp{point['qp']}{'_opt' if opt_qp else ''}"
            state = load_file(folder / f"{label}.safetensors") if restore else {}
            yield {**point, "version": report["version"]}, state
