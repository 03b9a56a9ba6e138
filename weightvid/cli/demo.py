"""``weightvid demo``: a digit classifier there and back."""

import shlex
from pathlib import Path

from weightvid.cli import output
from weightvid.cli.output import FORCE, JSON, output_option


def demo(
    folder: str = output_option("weightvid-demo", "Where the files go.", "FOLDER"),
    force: bool = FORCE,
    json: bool = JSON,
) -> None:
    """Pack the sample network, unpack it, and count the digits it still reads right.

    [bold]weightvid demo[/bold]
    """
    from weightvid.demo import run_demo, sample_dir
    from weightvid.errors import OutputError

    def announce(stage: str) -> None:
        if output.on_terminal():
            output.note(f"{stage} ...")

    if not force and any(Path(folder).glob("digits_cnn.*")):
        raise OutputError(f"{folder} holds an earlier demo; use --force to replace it")
    report = run_demo(sample_dir(), Path(folder), announce)
    if json:
        output.emit_json(report._asdict())
        return
    columns = "stored as", ">size", ">bits/weight", ">digits read right", ">agrees with fp32"
    rows = [
        (row.name, output.size(row.file_bytes), f"{row.bits_per_weight:.2f}",
         f"{row.correct} of {report.images}", f"{100 * row.agreement:.1f} %")
        for row in report.rows
    ]  # fmt: skip
    output.table(columns, rows)
    archive = shlex.quote(report.archive if folder[0] != "-" else f"./{report.archive}")
    output.facts([
        ("weights", f"{report.weights:,}"),
        ("packed in", f"{report.pack_s:.2f} s, every hash checked"),
        ("unpacked in", f"{report.unpack_s:.2f} s, every hash checked"),
        ("restored", report.restored),
        ("next", f"weightvid inspect {archive} --tensors"),
        ("", f"weightvid verify {archive} --against {shlex.quote(report.source)}"),
        ("", "weightvid pack YOUR_MODEL.safetensors"),
    ])  # fmt: skip
