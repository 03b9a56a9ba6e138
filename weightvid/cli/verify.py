"""``weightvid verify``: check an archive's hashes, and compare it with a checkpoint."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from weightvid.cli import output
from weightvid.cli.output import ARCHIVE_OR_PIPE, JSON, check_function, option, usage_error

if TYPE_CHECKING:
    from weightvid.verify import VerifyReport


def verify(
    archive: str = ARCHIVE_OR_PIPE,
    against: str | None = option(None, "The checkpoint to compare tensors with.", metavar="MODEL"),
    min_sqnr: float | None = option(None, "What each SQNR against MODEL must reach.", metavar="DB"),
    evaluate: str = option(
        "", "Judges dicts of all tensors, as for pack: call only what you trust.",
        "--eval", metavar="SCRIPT:FUNCTION",
    ),
    max_kl: float | None = option(None, "At most: mean KL, or 1 - mean cosine.", metavar="NATS"),
    repair: bool = option(False, "Restore damaged bytes first, from the parity.", "--repair"),
    destination: str | None = output.output_option(
        None, "Where the repaired archive goes, instead of the damaged one's place.", "FILE"
    ),
    base: list[str] = output.BASE,
    key: str | None = output.KEY,
    signature: str | None = output.SIGNATURE,
    json: bool = JSON,
) -> None:  # fmt: skip
    """Decode an archive and check the hash of every frame, box and tensor.

    Exit status 3 if anything is damaged or missing; 1 if MODEL has other tensors, or if a tensor or
    the outputs are farther from MODEL than the archive says, or than you allow.

    [bold]weightvid verify model.mp4[/bold]
    [bold]weightvid verify model.mp4 --against model.safetensors --min-sqnr 20[/bold]
    [bold]weightvid verify model.mp4 --repair[/bold]
    [bold]weightvid verify model.mp4 --key owner.pub[/bold]
    """
    from weightvid.archives import open_anywhere
    from weightvid.atomic import atomic_output
    from weightvid.errors import RepairError
    from weightvid.verify import verify_archive

    if min_sqnr is not None and against is None:
        usage_error("an SQNR needs a checkpoint to compare with: --against", "--min-sqnr")
    if bool(evaluate) != (max_kl is not None) or (evaluate and against is None):
        usage_error("--eval, --max-kl and --against belong together", "--eval / --max-kl")
    function = check_function(evaluate, "--eval") if evaluate else None
    source = sys.stdin.buffer if archive == "-" else archive
    failure = None
    if repair or destination is not None:
        try:
            source = archive = _repair(archive, destination)
        except RepairError as error:
            failure = error
    with (
        output.progress_bars() as report,
        output.checked(source, key, signature) as file,
        open_anywhere(file, base=base) as opened,
    ):
        found = verify_archive(
            opened, against, report, min_sqnr_db=min_sqnr, evaluation=function, max_kl=max_kl
        )
    if failure is not None:
        if found.defect is not None:
            raise failure
        output.warn("nothing was repaired: the archive is sound")
        if destination is not None:
            with Path(archive).open("rb") as file, atomic_output(destination) as copy:
                shutil.copyfileobj(file, copy)
    if json:
        output.emit_json(found, archive=archive, against=against, ok=found.ok)
    else:
        _show(found, archive)
    if not found.ok:
        raise typer.Exit(output.FAILED if found.defect is None else output.DAMAGED)


def _repair(archive: str, destination: str | None) -> str:
    """Repair an archive in its place, or into another file; where it is then."""
    from weightvid.checkpoint import is_url
    from weightvid.repair import repair_archive

    if archive == "-" or is_url(archive):
        usage_error("only a file can be repaired; fetch it first", "--repair")
    if destination is not None and Path(destination).is_file():
        usage_error(f"{destination} exists already; name another file", "--output")
    made = repair_archive(archive, destination)
    for first, last in made.spans:
        output.warn(f"restored: {last - first} bytes from byte {first} on")
    return destination or archive


def _show(found: VerifyReport, archive: str) -> None:
    rows = [
        ("archive", archive),
        ("size", f"{output.size(found.file_bytes or 0)}" if found.file_bytes else ""),
        ("frames", f"{found.frames:,}" if found.frames is not None else ""),
        ("tensors", f"{found.tensors_intact} of {found.tensors} intact, {found.weights:,} weights"),
    ]
    problems = [] if found.defect is None else [found.defect.message]
    if found.affected:
        problems.append(f"missing, coarse or damaged: {output.some(found.affected)}")
    lists = found.comparison
    if lists is not None and lists.tensors:
        output.table(
            ("tensor", "dtype", ">weights", ">SQNR dB", ">claimed", ">largest error"),
            [
                (row.name, row.dtype, f"{row.weights:,}",
                 "exact" if row.exact else output.number(row.sqnr_db, 4),
                 output.number(row.claimed_db, 4),
                 "" if row.exact else output.number(row.max_abs_error, 3))
                for row in lists.tensors
            ],
        )  # fmt: skip
        equal, norms = sum(row.exact for row in lists.tensors), lists.norms_db
        pictures = f"{output.db(lists.sqnr_db)} (of those in the pictures)"
        rows += [
            ("bit for bit", f"{equal} of {len(lists.tensors)} tensors"),
            ("SQNR", "" if lists.sqnr_db is None and equal < len(lists.tensors) else pictures),
            ("BatchNorms", "" if norms is None else f"gain and offset {output.db(norms)}"),
            ("largest error", f"{lists.max_abs_error:.6g}"),
            ("divergence", output.number(lists.divergence, 4)),
        ]
    if lists is not None:
        if lists.divergence is not None and lists.divergence > (lists.max_kl or 0):
            problems.append(f"the outputs diverge by {lists.divergence:.4g}, not {lists.max_kl:g}")
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
