"""``weightvid fetch``: an archive from web servers."""

from weightvid.cli import output
from weightvid.cli.output import FORCE, JSON, option, usage_error


def fetch(
    urls: list[str] = output.argument(
        "URL...", "http:// or https:// addresses of one file: where one fails, the next goes on."
    ),
    archive: str = output.output_option(
        "", "Where it goes. Default: the name in the address, here.", "ARCHIVE"
    ),
    sha256: str = option("", "What the whole file must have.", metavar="HEX"),
    key: str = option("", "Public key by which the archive must be signed.", metavar="KEY"),
    layers: int = option(
        0, "Stop after so many layers of an archive that has several; called again without it (and "
        "with --force), the rest follows.", metavar="N", min=0, show_default=False,
    ),
    base: list[str] = option(
        [], "Refuse an update to anything but this archive; of a chain of updates the oldest "
        "first.", "--base", "-b", metavar="ARCHIVE",
    ),
    patience: float = option(
        14.0, "Seconds that a server may take to answer, and for the next 4 kB.",
        metavar="SECONDS", min=0.1,
    ),
    restart: bool = option(False, "Forget what an earlier attempt left.", "--restart"),
    force: bool = FORCE,
    json: bool = JSON,
) -> None:  # fmt: skip
    """Download an archive; called again, it goes on where it broke off.

    Each frame is decoded and checked as it arrives, and fetched again if it is damaged.

    [bold]weightvid fetch https://example.org/model.mp4[/bold]
    [bold]weightvid fetch https://one.example/m.mp4 https://two.example/m.mp4 -o model.mp4[/bold]
    [bold]weightvid fetch https://example.org/model.mp4 --layers 1[/bold]
    """
    from weightvid.errors import RemoteError
    from weightvid.fetch import FetchOptions, fetch_archive
    from weightvid.remote import file_name, is_web, shown

    for url in urls:
        if not is_web(url):
            usage_error(f"{shown(url)} is no http:// or https:// address", "URL")
    destination = archive or file_name(urls[0])
    if not destination:
        usage_error("the address has no file name; say where the archive goes", "--output")
    output.check_output(destination, {f"the base {each}": each for each in base})
    options = FetchOptions(force, restart, sha256, key, layers, tuple(base), patience)
    try:
        options.check()
    except RemoteError as error:
        usage_error(str(error), "--sha256 / --key / --layers")
    with output.progress_bars() as report:
        found = fetch_archive(urls, destination, options, report)
    resumed = f", {output.size(found.resumed_at)} were there" if found.resumed_at else ""
    output.tell(json, found, [
        ("archive", destination),
        ("size", f"{output.size(found.file_bytes)}{resumed}"),
        ("frames", f"{found.frames:,}, every one checked"),
        ("layers", f"{found.layers} of {found.layers_of}" if found.layers_of > 1 else ""),
        ("from", output.some(found.sources)),
        ("interruptions", f"{found.interruptions}" if found.interruptions else ""),
        ("time", f"{found.seconds:.1f} s"),
    ], archive=destination)  # fmt: skip
