"""``weightvid verify``: check an archive's hashes, and compare it with a checkpoint."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import typer

from weightvid.cli import output
from weightvid.cli.output import ARCHIVE_OR_PIPE, JSON, option, usage_error

if TYPE_CHECKING:
    from weightvid.verify import VerifyReport


def verify(
    archive: str = ARCHIVE_OR_PIPE,
    against: str | None = option(
        None, "The checkpoint to compare with, tensor by tensor.", metavar="MODEL"
    ),
    min_sqnr: float | None = option(
        None, "What each tensor's SQNR must reach against MODEL.", metavar="DB"
    ),
    json: bool = JSON,
) -> None:
    """Decode an archive and check the hash of every frame, box and tensor.

    Exit status 1 if anything is damaged or missing, if MODEL has other tensors, or if a tensor is
    farther from MODEL than the archive says.

    [bold]weightvid verify model.mp4[/bold]
    [bold]weightvid verify model.mp4 --against model.safetensors --min-sqnr 20[/bold]
    """
    from weightvid.verify import verify_archive

    if min_sqnr is not None and against is None:
        usage_error("an SQNR needs a checkpoint to compare with: --against", "--min-sqnr")
    source = sys.stdin.buffer if archive == "-" else archive
    with output.progress_bars() as report:
        found = verify_archive(source, against, report, min_sqnr_db=min_sqnr)
    if json:
        output.emit_json(found, archive=archive, against=against, ok=found.ok)
    else:
        _show(found, archive)
    if not found.ok:
        raise typer.Exit(1)


def _show(found: VerifyReport, archive: str) -> None:
    rows = [
        ("archive", archive),
        ("size", f"{output.size(found.file_bytes or 0)}" if found.file_bytes else ""),
        ("frames", f"{found.frames:,}" if found.frames is not None else ""),
        ("tensors", f"{found.tensors_intact} of {found.tensors} intact, {found.weights:,} weights"),
    ]
    problems = [] if found.defect is None else [found.defect.message]
    if found.affected:
        problems.append(f"missing or damaged: {output.some(found.affected)}")
    lists = found.comparison
    if lists is not None:
        output.table(
            ("tensor", "dtype", ">weights", ">SQNR dB", ">claimed", ">largest error"),
            [
                (
                    row.name,
                    row.dtype,
                    f"{row.weights:,}",
                    "exact" if row.exact else output.number(row.sqnr_db, 4),
                    output.number(row.claimed_db, 4),
                    "" if row.exact else output.number(row.max_abs_error, 3),
                )
                for row in lists.tensors
            ],
        )
        equal = sum(row.exact for row in lists.tensors)
        rows += [
            ("bit for bit", f"{equal} of {len(lists.tensors)} tensors"),
            ("SQNR", f"{output.db(lists.sqnr_db)} (of those in the pictures)"),
            ("largest error", f"{lists.max_abs_error:.6g}"),
        ]
        problems += [
            f"{what}: {output.some(names)}"
            for what, names in (
                ("only in the checkpoint", lists.missing),
                ("only in the archive", lists.extra),
                ("of another type or shape", lists.mismatched),
                ("worse than it should be", lists.below),
            )
            if names
        ]
    rows += [("time", f"{found.seconds:.1f} s"), ("result", "ok" if found.ok else "FAILED")]
    output.facts(rows)
    for problem in problems:
        output.error(problem)
