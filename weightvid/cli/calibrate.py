"""``weightvid calibrate``: what a model's layers see, for smaller archives."""

from pathlib import Path
from typing import Any

from weightvid.cli import output
from weightvid.cli.output import FORCE, JSON, argument, check_function, option, usage_error


def calibrate(
    script: str = argument(
        "SCRIPT:FUNCTION",
        "A Python file, and a function in it that takes nothing and returns a torch module and an "
        "iterable of example inputs.",
    ),
    path: Path = output.output_option(Path("stats.safetensors"), "The statistics.", "STATS"),
    memory: int = option(1024, "Limit of a pass; more layers take more.", min=1, metavar="MB"),
    trust_inputs: bool = option(
        False, "The inputs are of the kind that the model is used on; models with BatchNorm know "
        "by themselves.", "--trust-inputs",
    ),
    force: bool = FORCE,
    json: bool = JSON,
) -> None:  # fmt: skip
    """Run a model on a few hundred example inputs and keep what its layers see.

    No labels and no training. Packing with the statistics gives a smaller archive at the same
    fidelity. The script is run as Python code: call only what you trust.

    [bold]weightvid calibrate script.py:examples -o stats.safetensors[/bold]
    [bold]weightvid pack model.safetensors --calibrate stats.safetensors[/bold]
    """
    if path.exists() and not force:
        usage_error(f"{path} exists; --force replaces it", "--output")
    output.check_output(path, {"the script": script.rpartition(":")[0]})
    with output.others_on_stderr():
        module, inputs = load_examples(script, "SCRIPT:FUNCTION")
    if inputs is None:
        usage_error("the function must return inputs, too; pack makes some", "SCRIPT:FUNCTION")
    from weightvid.calibrate import CalibrationConfig
    from weightvid.calibrate import calibrate as run

    config = CalibrationConfig(memory_bytes=memory << 20, trust_inputs=trust_inputs)
    with output.progress_bars() as report, output.others_on_stderr():
        made = run(module, inputs, config, report)
    made.save(path, force=force)
    for note in made.notes:
        output.warn(note)
    tensors = [
        {"name": name, "gain_db": tensor.gain_db, "used": tensor.useful}
        for name, tensor in made.tensors.items()
    ]
    used = [tensor for tensor in tensors if tensor["used"]]
    gains = sorted(tensor["gain_db"] for tensor in used if tensor["gain_db"] is not None)
    record = {"samples": made.samples, "model_sha256": made.model_sha256, "tensors": tensors}
    middle = f"; {gains[len(gains) // 2]:.1f} dB less output error (median)" if gains else ""
    output.tell(json, record, [
        ("statistics", f"{path}, {output.size(path.stat().st_size)}"),
        ("samples", f"{made.samples:,}"),
        ("tensors", f"{len(used)} of {len(tensors)} are quantized with them{middle}"),
        ("gain", made.gained),
    ], stats=str(path), notes=made.notes, gained=made.gained)  # fmt: skip


def load_examples(script: str, name: str) -> tuple[Any, Any]:
    """The module and the inputs that a function of a script returns; None for inputs it lacks."""
    check_function(script, name)
    from weightvid.calibrate.evaluation import load_function, one_line
    from weightvid.checkpoint.torch_file import import_torch
    from weightvid.errors import EvaluationError

    function: Any = load_function(script)[0]
    torch = import_torch()
    try:
        given = function()
    except (Exception, SystemExit) as error:
        raise EvaluationError(f"{script} failed: {one_line(error)}") from error
    if isinstance(given, torch.nn.Module):
        return given, None
    pair = isinstance(given, tuple) and len(given) == 2
    if not pair or not isinstance(given[0], torch.nn.Module):
        usage_error("the function must return two things: a module and its inputs", name)
    return given[0], given[1]
