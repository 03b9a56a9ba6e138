"""``weightvid export-int8``: archive to integer ONNX graph."""

from pathlib import Path

from weightvid.cli import output
from weightvid.cli.output import ARCHIVE, FORCE, JSON, option


def export_int8(
    archive: str = ARCHIVE,
    graph: Path = option(..., "The model as float ONNX.", "--graph", "-g", metavar="MODEL.onnx"),
    calibration: Path = option(
        ..., "Example inputs by name, examples along the first axis.",
        "--calibration", metavar="INPUTS.npz",
    ),
    target: Path = output.output_option(..., "The integer graph.", "INT8.onnx"),
    force: bool = FORCE,
    json: bool = JSON,
) -> None:  # fmt: skip
    r"""Write an ONNX graph that computes with the archive's own integers.

    Pack with --integer first. Needs the extra: pip install 'weightvid\[onnxruntime]'

    [bold]weightvid export-int8 model.mp4 -g model.onnx --calibration inputs.npz -o int8.onnx[/bold]
    """
    from weightvid.int8 import export_int8 as run

    output.check_output(
        target, {"the archive": archive, "the graph": graph, "the examples": calibration}
    )
    made = run(archive, graph, calibration, target, force=force)
    output.tell(json, made, [
        ("graph", f"{target}, {output.size(made.file_bytes)}"),
        ("own integers", f"{len(made.own)} layers"),
        ("quantized anew", output.some(made.requantized) if made.requantized else ""),
    ], archive=archive, output=str(target))  # fmt: skip
