"""What a comparison leaves in its folder: JSON, CSV, plots, and one page to look at."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from weightvid.compare.report.page import write_page
from weightvid.compare.report.results import Results, write_csv, write_json


def write_all(folder: Path, results: Results) -> dict[str, Path]:
    """Write everything; plots only where matplotlib is installed.

    Returns
    -------
    dict of str to Path
        What was written.

    Raises
    ------
    OutputError
    """
    written = {
        "results": write_json(folder, results),
        "table": write_csv(folder, results),
    }
    if find_spec("matplotlib") is not None:
        from weightvid.compare.report.plot import write_plots

        written |= write_plots(folder, results)
    written["report"] = write_page(folder, results)
    return written
