"""``weightvid apply``: an archive and updates to it, merged into one archive."""

from pathlib import Path

from weightvid.cli import output
from weightvid.cli.output import FORCE, JSON, argument, output_option


def apply(
    base: str = argument("ARCHIVE", "What the first update is to: a file or an address."),
    updates: list[str] = argument("UPDATE...", "Updates, the oldest first."),
    destination: Path = output_option(..., "The merged archive.", "ARCHIVE"),
    force: bool = FORCE,
    json: bool = JSON,
) -> None:
    """Merge an archive and updates to it into one archive, without quantizing anything again.

    Its tensors have the very hashes that the updates give. Parity and signatures stay behind.

    [bold]weightvid apply v1.mp4 v1-v2.mp4 -o v2.mp4[/bold]
    """
    from weightvid.update import apply_updates

    inputs = {"the archive": base} | {f"the update {each}": each for each in updates}
    output.check_output(destination, inputs)
    output.check_archive_name(str(destination))
    with output.progress_bars() as report:
        made = apply_updates(base, updates, destination, force=force, progress=report)
    output.tell(json, made, [
        ("archive", f"{destination}, {output.size(made.file_bytes)}"),
        ("tensors", f"{made.tensors:,} in {made.layers} layers"),
        ("frames", f"{made.copied} copied, {made.coded} coded again"),
        ("root", made.root),
        ("time", f"{made.seconds:.1f} s"),
    ], archive=str(destination), base=base, updates=updates)  # fmt: skip
