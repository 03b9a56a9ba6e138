"""``weightvid demo``: a digit classifier there and back."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from weightvid.cli import output
from weightvid.cli.options import Json


def demo(
    folder: Annotated[
        Path, typer.Option("--output", "-o", metavar="FOLDER", help="Where the two files go.")
    ] = Path("weightvid-demo"),
    json: Json = False,
) -> None:
    """Pack the sample network, unpack it, and count the digits it still reads right.

    [bold]weightvid demo[/bold]
    """
    from weightvid import demo as work

    terminal = sys.stderr.isatty()

    def announce(stage: str) -> None:
        if terminal:
            typer.echo(f"{stage} ...", err=True)

    report = work.run(work.sample_dir(), folder, announce)
    if json:
        output.emit_json(report)
        return
    output.table(
        ("stored as", ">size", ">bits/weight", ">digits read right", ">agrees with fp32"),
        [
            (
                row.name,
                output.size(row.file_bytes),
                f"{row.bits_per_weight:.2f}",
                f"{row.correct} of {report.images}",
                f"{100 * row.agreement:.1f} %",
            )
            for row in report.rows
        ],
    )
    output.facts(
        [
            ("weights", output.count(report.weights)),
            ("bit-exact", f"{report.exact_tensors} of {report.tensors} tensors"),
            ("packed in", f"{report.pack_s:.2f} s, every hash checked"),
            ("unpacked in", f"{report.unpack_s:.2f} s, every hash checked"),
            ("archive", report.archive),
            ("restored", report.restored),
        ]
    )
