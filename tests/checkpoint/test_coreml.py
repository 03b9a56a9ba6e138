"""Core ML packages in and out: blobs by the names of the program, the rest as templates."""

from __future__ import annotations

import gc
import json
import random
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import normal, save

from weightvid.checkpoint import Contents, create_checkpoint, kind_of_file, open_checkpoint
from weightvid.errors import CheckpointError, OutputError
from weightvid.loader import TensorSpec
from weightvid.spec import SideFile

coremltools: Any = pytest.importorskip("coremltools")
from coremltools.converters.mil.mil import Builder  # noqa: E402

CONV, DENSE = normal(1, 6, 4, 3, 3), normal(2, 8, 24).astype("f2")
MODEL = Path("Data", "com.apple.CoreML", "model.mlmodel")
BLOBS = Path("Data", "com.apple.CoreML", "weights", "weight.bin")


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A convolution and a dense layer, made by coremltools."""

    @Builder.program(input_specs=[Builder.TensorSpec(shape=(1, 4, 4, 4))])  # type: ignore[untyped-decorator]
    def program(x: Any) -> Any:
        x = Builder.conv(x=x, weight=CONV, bias=np.arange(6, dtype="f4"), name="conv")
        x = Builder.reshape(x=x, shape=(1, 24))
        x = Builder.cast(x=x, dtype="fp16")
        x = Builder.linear(x=x, weight=DENSE, bias=np.zeros(8, "f2"), name="dense")
        return Builder.cast(x=x, dtype="fp32")

    path = tmp_path_factory.mktemp("coreml") / "net.mlpackage"
    with warnings.catch_warnings():
        # coremltools leaves its temporary folders to the garbage collector.
        warnings.simplefilter("ignore", ResourceWarning)
        coremltools.convert(
            program, convert_to="mlprogram", compute_precision=coremltools.precision.FLOAT32,
            minimum_deployment_target=coremltools.target.iOS16, skip_model_load=True,
        ).save(str(path))  # fmt: skip
        gc.collect()
    return path


def files_of(package: Path) -> dict[str, bytes]:
    return {
        path.relative_to(package).as_posix(): path.read_bytes()
        for path in package.rglob("*")
        if path.is_file()
    }


def loaded(package: Path) -> dict[str, Any]:
    """Constants as coremltools reads them."""
    from coremltools.converters.mil.frontend.milproto.load import load

    model = coremltools.models.MLModel(str(package), skip_model_load=True)
    spec = model.get_spec()
    program = load(
        spec,
        specification_version=spec.specificationVersion,
        file_weights_dir=model.weights_dir,
    )
    outputs = (op.outputs[0] for op in program.functions["main"].operations)
    return {out.name: out.val for out in outputs if isinstance(out.val, np.ndarray)}


def test_a_program_there_and_back(tmp_path: Path, package: Path) -> None:
    assert kind_of_file(package).name == "coreml"
    with open_checkpoint(package) as reader:
        found = {spec.name: reader.read(spec.name) for spec in reader.contents.tensors}
        conv, dense = (name for name in found if found[name].ndim > 1)
        assert np.array_equal(found[conv], CONV)
        assert np.array_equal(found[dense], DENSE)
        save(tmp_path / "same.mlpackage", reader)
        with create_checkpoint(tmp_path / "twice.mlpackage", reader.contents) as writer:
            for name, array in found.items():
                writer.write(name, 2 * array)
    assert files_of(tmp_path / "same.mlpackage") == files_of(package)
    before, after = loaded(package), loaded(tmp_path / "twice.mlpackage")
    assert before.keys() == after.keys()
    for name, array in before.items():
        assert np.array_equal(after[name], array * (2 if name in found else 1))
    with pytest.raises(OutputError, match="not empty"), open_checkpoint(package) as reader:
        save(tmp_path / "twice.mlpackage", reader)
    with open_checkpoint(package) as reader:
        save(tmp_path / "twice.mlpackage", reader, force=True)
    assert files_of(tmp_path / "twice.mlpackage") == files_of(package)
    assert len(list(tmp_path.iterdir())) == 2


def test_weights_that_are_integers_already(tmp_path: Path, package: Path) -> None:
    """Integers are listed; their scales stay in the file, bit for bit."""
    optimize = coremltools.optimize.coreml
    settings = optimize.OpLinearQuantizerConfig(mode="linear_symmetric", weight_threshold=16)
    path = tmp_path / "m.mlpackage"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        model = coremltools.models.MLModel(str(package), skip_model_load=True)
        config = optimize.OptimizationConfig(global_config=settings)
        optimize.linear_quantize_weights(model, config).save(str(path))
        del model
        gc.collect()
    with open_checkpoint(path) as reader:
        kinds = {spec.dtype for spec in reader.contents.tensors if len(spec.shape) > 1}
        assert kinds == {"I8"}
        assert not [s for s in reader.contents.tensors if "scale" in s.name]
        save(tmp_path / "same.mlpackage", reader)
    assert files_of(tmp_path / "same.mlpackage") == files_of(path)


def test_hostile_packages(tmp_path: Path, package: Path) -> None:
    """Each cut and flip of the model and its blobs gives a model or an error of ours."""
    broken = tmp_path / "m.mlpackage"
    shutil.copytree(package, broken)
    chance, refused = random.Random(1), 0
    for part in (MODEL, BLOBS, Path("Manifest.json")):
        sound = (package / part).read_bytes()
        contents = [sound[: len(sound) * n // 20] for n in range(20)]
        for _ in range(150):
            flipped = bytearray(sound)
            flipped[chance.randrange(len(sound))] = chance.choice([0, 255, chance.randrange(256)])
            contents.append(bytes(flipped))
        for content in contents:
            (broken / part).write_bytes(content)
            try:
                with open_checkpoint(broken) as reader:
                    for spec in reader.contents.tensors:
                        reader.read(spec.name)
            except CheckpointError as error:
                refused += 1
                assert len(str(error)) < 600
        (broken / part).write_bytes(sound)
    assert refused > 60


def test_a_package_in_a_store(package: Path) -> None:
    store = pytest.importorskip("fsspec").filesystem("memory")
    for name, data in files_of(package).items():
        store.pipe(f"/coreml/net.mlpackage/{name}", data)
    with open_checkpoint(package) as here, open_checkpoint("memory://coreml/net.mlpackage") as far:
        assert far.contents == here.contents
    with pytest.raises(CheckpointError, match=r"one by one: memory://coreml/net\.mlpackage$"):
        open_checkpoint("memory://coreml")


def test_places_outside(tmp_path: Path, package: Path) -> None:
    broken = tmp_path / "m.mlpackage"
    shutil.copytree(package, broken)
    manifest = json.loads((package / "Manifest.json").read_text())
    for item in manifest["itemInfoEntries"].values():
        item["path"] = "../../../net.mlmodel"
    (broken / "Manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="not in the package"):
        open_checkpoint(broken)
    shutil.copy(package / "Manifest.json", broken)
    sound = (package / MODEL).read_bytes()
    at = sound.index(b"@model_path/weights/weight.bin")
    (broken / MODEL).write_bytes(sound[: at + 12] + b"../../we" + sound[at + 20 :])
    with pytest.raises(CheckpointError, match="not in the package"):
        open_checkpoint(broken)
    (broken / MODEL).write_bytes(sound)
    (broken / BLOBS).rename(tmp_path / "weight.bin")
    with pytest.raises(CheckpointError, match="its weights are missing"):
        open_checkpoint(broken)
    (broken / BLOBS).symlink_to(tmp_path / "weight.bin")
    with pytest.raises(CheckpointError, match="a link that leads out"):
        open_checkpoint(broken)


def test_another_kind_of_model(tmp_path: Path, package: Path) -> None:
    broken = tmp_path / "m.mlpackage"
    shutil.copytree(package, broken)
    old = coremltools.proto.Model_pb2.Model(specificationVersion=4)
    old.neuralNetwork.layers.add().name = "dense"
    (broken / MODEL).write_bytes(old.SerializeToString())
    with pytest.raises(CheckpointError, match="it holds a neuralNetwork, and only ML programs"):
        open_checkpoint(broken)


def test_what_cannot_be_written(tmp_path: Path, package: Path) -> None:
    with open_checkpoint(package) as reader:
        specs, files = reader.contents.tensors, reader.contents.files
    stray = SideFile("Data/../../x", b"", "coreml-file")
    for contents, said in (
        (Contents(specs), "holds no Core ML program"),
        (Contents(specs[1:], files=files), "needs all its weights; missing"),
        (Contents((*specs, TensorSpec("new", "F32", (3,))), files=files), "has no tensor 'new'"),
        (Contents(specs, files=(*files, stray)), "has no place in a package"),
    ):
        with pytest.raises(CheckpointError, match=said):
            create_checkpoint(tmp_path / "n.mlpackage", contents)
    assert not list(tmp_path.iterdir())
