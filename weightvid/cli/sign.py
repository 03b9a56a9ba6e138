"""``weightvid sign``: an archive that others can check to be yours."""

from weightvid.cli import output
from weightvid.cli.output import FORCE, JSON, argument, option


def sign(
    archive: str = argument("ARCHIVE", "The archive (.mp4)."),
    key: str = option(..., "Private key, Ed25519: PEM or OpenSSH, no password.", metavar="KEY"),
    destination: str | None = output.output_option(
        None, "The signed archive, instead of ARCHIVE's place; or the file of the signature.",
        "FILE",
    ),
    detached: bool = option(False, "Write the signature into ARCHIVE.wvsig.", "--detached"),
    openssf: bool = option(
        False, "Write a bundle of OpenSSF's model-signing, ARCHIVE.sig; KEY is on an elliptic "
        "curve then.", "--openssf",
    ),
    force: bool = FORCE,
    json: bool = JSON,
) -> None:  # fmt: skip
    """Sign every frame and box of an archive, so that a loader can check them as they arrive.

    Parity is made anew; signatures by other keys stay.

    [bold]ssh-keygen -t ed25519 -N "" -f owner[/bold]
    [bold]weightvid sign model.mp4 --key owner[/bold]
    [bold]weightvid verify model.mp4 --key owner.pub[/bold]
    """
    from weightvid.sign import sign_archive, sign_for_openssf

    if destination is not None:
        read = {"the archive": archive} if detached or openssf else {}
        output.check_output(destination, {"the key": key, **read})
        if not read:
            output.check_archive_name(destination)
    if openssf:
        made = sign_for_openssf(archive, key, destination or "", force=force)
    else:
        made = sign_archive(archive, key, destination, detached=detached, force=force)
    output.tell(json, made._asdict(), [
        ("signed", archive),
        ("by the key", made.fingerprint),
        ("in", made.output),
        ("frames and boxes", f"{made.units:,}" if made.fingerprint else ""),
    ])  # fmt: skip
