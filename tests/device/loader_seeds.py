"""``python loader_seeds.py FOLDER`` writes archives for the C loader's fuzz driver to start from.

Their bodies are not deflated: a byte that is changed is one field, and no broken stream.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tools")]

import fuzz  # noqa: E402
from independent import sources  # noqa: E402

from weightvid.checkpoint import from_mapping  # noqa: E402
from weightvid.container import stored_body  # noqa: E402
from weightvid.pack import PackOptions, pack_checkpoint  # noqa: E402


def write_seeds(folder: Path) -> None:
    """Archives of all kinds, and the golden ones."""
    with TemporaryDirectory() as made, patch("weightvid.writer.close_body", stored_body):
        for number, seed in enumerate(fuzz.seeds(Path(made))):
            (folder / f"seed{number}").write_bytes(fuzz.join_boxes(seed.boxes))
        sources.write_random(folder / "random", 1)
        with from_mapping(sources.typed(), dtypes=sources.TYPED) as reader:
            pack_checkpoint(reader, folder / "lossless", PackOptions(lossless=True, jobs=1))
    for path in (ROOT / "data" / "golden").glob("*.mp4"):
        shutil.copy(path, folder)


if __name__ == "__main__":
    write_seeds(Path(sys.argv[1]))
