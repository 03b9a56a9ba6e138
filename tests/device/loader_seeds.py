"""``python loader_seeds.py FOLDER`` writes archives for the C loader's fuzz driver to start from.

Their bodies are not deflated: a byte that is changed is one field, and no broken stream. Tensors
come in several parts and boxes; behind an update comes its base, and how long that is.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "data" / "golden"
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tools")]

import fuzz_archives as fuzz  # noqa: E402
from independent import sources  # noqa: E402

from weightvid.checkpoint import from_mapping  # noqa: E402
from weightvid.container import stored_body  # noqa: E402
from weightvid.pack import PackOptions, pack_checkpoint  # noqa: E402


def write_seeds(folder: Path) -> None:
    """Archives of all kinds, and the golden ones."""
    with (
        TemporaryDirectory() as made,
        patch("weightvid.writer.close_body", stored_body),
        patch("weightvid.levels.code.PART_WEIGHTS", 2000),
        patch("weightvid.writer.EXACT_BOX_BYTES", 2000),
    ):
        for number, seed in enumerate(fuzz.seeds(Path(made))):
            data = fuzz.join_boxes(seed.boxes)
            if len(seed.base) == 1:
                base = seed.base[0].read_bytes()
                data += base + len(base).to_bytes(4, "little")
            (folder / f"seed{number}").write_bytes(data)
        sources.write_random(folder / "random", 1)
        with from_mapping(sources.typed(), dtypes=sources.TYPED) as reader:
            pack_checkpoint(reader, folder / "lossless", PackOptions(lossless=True, jobs=1))
    for path in GOLDEN.glob("*.mp4"):
        shutil.copy(path, folder)
    update, base = ((GOLDEN / f"{name}.mp4").read_bytes() for name in ("update", "progressive"))
    (folder / "update with base").write_bytes(update + base + len(base).to_bytes(4, "little"))


if __name__ == "__main__":
    write_seeds(Path(sys.argv[1]))
