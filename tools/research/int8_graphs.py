"""Integer graphs from archives' own levels, in onnxruntime, one thread.

ResNet-20, the keyword model, and the text-direction CNN (a MobileNet) of the package
rapidocr-onnxruntime, where it is installed: the float graph, folded and unfolded zero points, and
the trap: borders left at zero.
"""

from __future__ import annotations

import importlib.util
import json
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from cifar import evaluation_folder, evaluation_script, normalized, stored_images
from safetensors.torch import load_file

from weightvid.int8 import export_int8
from weightvid.pack import PackOptions, pack_checkpoint

RESULTS = Path(__file__).resolve().parents[1] / "results"
STEP_FACTOR = 0.13
Arrays = tuple[Any, Any, Any]


def run(path: Path | bytes, images: Any) -> tuple[Any, float]:
    """Outputs, and milliseconds for an example."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    given = path if isinstance(path, bytes) else str(path)
    session = onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    session.run(None, {name: images[:50]})
    times, found = [], []
    for first in range(0, len(images), 50):
        began = time.perf_counter()
        found.append(session.run(None, {name: images[first : first + 50]})[0])
        times.append(time.perf_counter() - began)
    return np.concatenate(found), 20 * float(np.median(times))


def evaluated(name: str, path: Path) -> Any:
    """Export a model of the evaluation folder; its script."""
    folder = evaluation_folder() / name
    script = evaluation_script(folder)
    net = script.Net().eval()
    net.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            net, (script._data(1)[0],), str(path), dynamo=False, opset_version=17,
            training=torch.onnx.TrainingMode.PRESERVE, input_names=["x"],
            dynamic_axes={"x": {0: "n"}},
        )  # fmt: skip
    return script


def resnet20(path: Path) -> Arrays:
    images, labels = evaluated("cifar10_resnet20", path)._data(1000)
    return normalized(stored_images("train")[0][:500]).numpy(), images.numpy(), labels.numpy()


def keywords(path: Path) -> Arrays:
    """The first half for calibration, the other for judging."""
    features, labels = (x.numpy() for x in evaluated("mlperf_kws", path)._data(1000))
    return features[:500], features[500:], labels[500:]


def text_direction(path: Path) -> Arrays | None:
    """Judged by agreement alone, on pictures that are not its own: CIFAR's, stretched."""
    found = importlib.util.find_spec("rapidocr_onnxruntime")
    if found is None or found.origin is None:
        return None
    models = Path(found.origin).parent / "models"
    path.write_bytes((models / "ch_ppocr_mobile_v2.0_cls_infer.onnx").read_bytes())
    pictures = [
        torch.nn.functional.interpolate(stored_images(name)[0][:200].float(), (48, 192)).numpy()
        for name in ("train", "test")
    ]
    examples, images = (x / 127.5 - 1 for x in pictures)
    return examples, images, None


def measured(there: Path, arrays: Arrays) -> dict[str, Any]:
    """Pack the graph, export it both ways, run everything."""
    examples, inputs, labels = arrays
    options = PackOptions(step_factor=STEP_FACTOR, fidelity="integers")
    packed = pack_checkpoint(there / "float.onnx", there / "model.mp4", options)
    np.savez(there / "examples.npz", examples)
    for kind in ("folded", "unfolded"):
        report = export_int8(
            there / "model.mp4", there / "float.onnx", there / "examples.npz",
            there / f"{kind}.onnx", fold=kind == "folded",
        )  # fmt: skip
    trap, borders = onnx.load(there / "folded.onnx"), 0
    for slot in trap.graph.initializer:
        if slot.name.endswith("_border"):
            borders += 1
            slot.CopyFrom(onnx.numpy_helper.from_array(np.asarray(np.uint8(0)), slot.name))
    outputs, times = {}, {}
    for kind in ("float", "folded", "unfolded"):
        outputs[kind], times[kind] = run(there / f"{kind}.onnx", inputs)
    outputs["borders at zero"], _ = run(trap.SerializeToString(), inputs)
    chosen = {kind: x.argmax(1) for kind, x in outputs.items()}
    found = {
        "agreement_with_float": {
            kind: round(float((x == chosen["float"]).mean() * 100), 2) for kind, x in chosen.items()
        },
        "ms_per_example": {kind: round(value, 3) for kind, value in times.items()},
        "folded_equals_unfolded": bool(np.array_equal(outputs["folded"], outputs["unfolded"])),
        "layers_of_own_integers": len(report.own),
        "layers_requantized": list(report.requantized),
        "borders_that_are_not_zero": borders,
        "archive_bytes": packed.file_bytes,
        "float_bytes": (there / "float.onnx").stat().st_size,
        "int8_bytes": report.file_bytes,
    }
    if labels is not None:
        found["top1"] = {k: round(float((x == labels).mean() * 100), 2) for k, x in chosen.items()}
    return found


def main() -> None:
    torch.set_num_threads(1)
    found = {}
    for make in (resnet20, keywords, text_direction):
        with tempfile.TemporaryDirectory() as name:
            arrays = make(Path(name) / "float.onnx")
            if arrays is not None:
                found[make.__name__] = measured(Path(name), arrays)
                print(json.dumps({make.__name__: found[make.__name__]}, indent=1), flush=True)
    (RESULTS / "research_int8.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
