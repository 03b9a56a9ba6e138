"""``weightvid verify``: check an archive's hashes, and compare it with a checkpoint."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from weightvid.cli import output
from weightvid.cli.options import Json, Threads

if TYPE_CHECKING:
    from weightvid.verify import Comparison, VerifyReport


def verify(
    archive: Annotated[
        str,
        typer.Argument(
            metavar="ARCHIVE", help="The archive (.mp4): a file, an address, or - for a pipe."
        ),
    ],
    against: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="The checkpoint to compare with, tensor by tensor."),
    ] = None,
    threads: Threads = 0,
    json: Json = False,
) -> None:
    """Decode an archive and check the hash of every frame, box and tensor.

    Exit status 1 if anything is damaged or missing, or if MODEL has other tensors.

    [bold]weightvid verify model.mp4[/bold]
    [bold]weightvid verify model.mp4 --against model.safetensors[/bold]
    """
    from weightvid.verify import verify_archive

    source = sys.stdin.buffer if archive == "-" else archive
    with output.progress_bars() as report:
        found = verify_archive(source, against, report, threads=threads)
    if json:
        output.emit_json(
            found,
            archive=archive,
            against=against,
            ok=found.ok,
        )
    else:
        _show(found, archive)
    if not found.ok:
        raise typer.Exit(1)


def _show(found: VerifyReport, archive: str) -> None:
    if found.comparison is not None:
        _compare(found.comparison)
    rows = [
        ("archive", f"{archive}, {output.size(found.file_bytes)}"),
        ("tensors", f"{found.tensors_whole} of {found.tensors} whole"),
        ("weights", output.count(found.weights)),
    ]
    if found.frames is not None:
        rows.append(("frames", output.count(found.frames)))
    if found.comparison is not None:
        exact = sum(row.exact for row in found.comparison.tensors)
        rows += [
            ("exact", f"{exact} tensors, bit for bit"),
            ("SQNR", output.db(found.comparison.sqnr_db)),
            ("largest error", f"{found.comparison.max_abs_error:.6g}"),
        ]
    rows += [("time", f"{found.seconds:.1f} s"), ("result", "ok" if found.ok else "FAILED")]
    output.facts(rows)
    _complain(found)


def _compare(comparison: Comparison) -> None:
    output.table(
        ("tensor", "dtype", ">weights", ">SQNR dB", ">largest error"),
        [
            (
                row.name,
                row.dtype,
                output.count(row.weights),
                "exact" if row.exact else output.number(row.sqnr_db, 4),
                "" if row.exact else output.number(row.max_abs_error, 3),
            )
            for row in comparison.tensors
        ],
    )


def _complain(found: VerifyReport) -> None:
    problems = []
    if found.defect is not None:
        problems.append(output.cause(found.defect))
    if found.affected:
        problems.append(f"missing or damaged: {output.some(found.affected)}")
    if found.comparison is not None:
        lists = found.comparison
        for what, names in (
            ("only in the checkpoint", lists.missing),
            ("only in the archive", lists.extra),
            ("of another type or shape", lists.mismatched),
        ):
            if names:
                problems.append(f"{what}: {output.some(names)}")
    for problem in problems:
        output.error(problem)
