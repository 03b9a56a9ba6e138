"""``report.html``: one page that needs no network."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Final

from weightvid.compare.report.results import Results, write

_HOLE: Final = "@DATA@"


def write_page(folder: Path, results: Results) -> Path:
    """Write ``report.html``: the page, with the results inside.

    Raises
    ------
    OutputError
    """
    page = files("weightvid.compare.report").joinpath("report.html").read_text(encoding="utf-8")
    before, _, after = page.partition(_HOLE)
    return write(folder / "report.html", (before + _embedded(results.record()) + after).encode())


def _embedded(record: object) -> str:
    r"""JSON that no name of a tensor or a path can lead out of its element.

    Examples
    --------
    >>> _embedded({"path": "</script>"})
    '{"path":"\\u003c/script>"}'
    """
    return json.dumps(record, separators=(",", ":")).replace("<", "\\u003c")
