"""``weightvid.numpy`` and ``weightvid.torch``, and what ``import weightvid`` offers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import small_models

import weightvid
import weightvid.numpy
from weightvid.errors import CheckpointError, OutputError
from weightvid.loader import open_archive
from weightvid.pack import PackOptions


def imported_by(code: str) -> set[str]:
    run = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nprint(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).resolve().parent.parent,
    )
    return set(run.stdout.split())


def test_package_offers_everything_lazily() -> None:
    for name in weightvid.__all__:
        assert getattr(weightvid, name) is not None
    assert set(weightvid.__all__) <= set(dir(weightvid))
    with pytest.raises(AttributeError, match="nonsense"):
        weightvid.nonsense  # noqa: B018
    heavy = {"numpy", "av", "torch", "typer", "rich", "safetensors"}
    assert imported_by("import weightvid").isdisjoint(heavy)


def test_loading_with_numpy_needs_no_encoder() -> None:
    found = imported_by("import weightvid.numpy")
    assert found.isdisjoint({"weightvid.pack", "weightvid.video", "torch", "typer"})


def test_numpy_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "m.mp4"
    source = small_models.small()
    report = weightvid.numpy.save_file(source, path, {"who": "me"}, recipe="fine")
    assert report.file_bytes == path.stat().st_size
    found = weightvid.numpy.load_file(path)
    # A tied name stands behind the tensors of the source.
    assert found.keys() == source.keys()
    assert found["head.weight"] is found["embed.weight"]
    for name, array in source.items():
        assert found[name].dtype == array.dtype
        assert found[name].shape == array.shape
    assert np.abs(found["conv.weight"] - source["conv.weight"]).max() < 0.05
    with open_archive(path) as archive:
        assert archive.header.metadata == {"who": "me"}
        assert archive.header.about["recipe"] == "fine"


def test_saving_replaces_unless_options_say_otherwise(tmp_path: Path) -> None:
    path = tmp_path / "m.mp4"
    arrays = {"w": small_models.weights(1, 30, 30)}
    weightvid.numpy.save_file(arrays, path)
    weightvid.numpy.save_file(arrays, path)
    with pytest.raises(OutputError):
        weightvid.numpy.save_file(arrays, path, options=PackOptions())


@pytest.fixture
def torch() -> Any:
    return pytest.importorskip("torch", reason="needs the extra: weightvid[torch]")


def make_module(torch: Any) -> Any:
    """A network with tied weights and buffers."""
    torch.manual_seed(0)
    nn = torch.nn
    parts = {"embed": nn.Embedding(64, 48), "conv": nn.Conv2d(8, 16, 3), "norm": nn.BatchNorm2d(16)}
    module = nn.ModuleDict({**parts, "head": nn.Linear(48, 64, bias=False)})
    module["head"].weight = module["embed"].weight
    module["norm"].running_mean.normal_()
    return module


@pytest.fixture
def saved(torch: Any, tmp_path: Path) -> Path:
    from weightvid.torch import save_file

    path = tmp_path / "m.mp4"
    save_file(make_module(torch), path, recipe="fine")
    return path


def test_torch_round_trip(torch: Any, saved: Path) -> None:
    from weightvid.torch import load_file

    state = make_module(torch).state_dict()
    found = load_file(saved)
    assert found.keys() == state.keys()
    assert found["head.weight"] is found["embed.weight"]
    for name, tensor in state.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.allclose(found[name].float(), tensor.float(), atol=0.2)
    assert torch.equal(found["norm.running_mean"], state["norm.running_mean"])
    module = make_module(torch).to("meta")
    module.load_state_dict(load_file(saved), assign=True)
    assert all(torch.equal(tensor, found[name]) for name, tensor in module.state_dict().items())


def test_torch_types(torch: Any, tmp_path: Path) -> None:
    from weightvid.torch import load_file, save_file

    torch.manual_seed(1)
    tensors = {
        "bf16": torch.randn(40, 40).bfloat16(),
        "half": torch.randn(40, 40).half(),
        "strided": torch.randn(40, 60).T,
        "f8": torch.randn(8).to(torch.float8_e4m3fn),
        "flag": torch.tensor([True, False]),
        "scalar": torch.tensor(3),
        "parameter": torch.nn.Parameter(torch.randn(30, 30)),
    }
    save_file(tensors, tmp_path / "m.mp4")
    found = load_file(tmp_path / "m.mp4")
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
    assert torch.equal(found["f8"].view(torch.uint8), tensors["f8"].view(torch.uint8))


@pytest.mark.parametrize("make", ["meta", "sparse", "text"])
def test_what_cannot_be_saved(torch: Any, tmp_path: Path, make: str) -> None:
    from weightvid.torch import save_file

    value = {
        "meta": lambda: torch.empty(3, device="meta"),
        "sparse": lambda: torch.eye(3).to_sparse(),
        "text": lambda: "hello",
    }[make]()
    with pytest.raises(CheckpointError, match="'odd'"):
        save_file({"odd": value}, tmp_path / "m.mp4")
    assert not list(tmp_path.iterdir())


class FakeCodecs(SimpleNamespace):
    """PyNvVideoCodec as its guide describes it, decoding by FFmpeg."""

    def __init__(self, torch: Any) -> None:
        import ctypes

        import av

        def create(gpuid: int, codec: str, **options: Any) -> Any:
            assert (gpuid, options["usedevicememory"], options["latency"]) == (0, True, "zero")

            def decode(packet: Any) -> list[Any]:
                self.frames += 1
                data = ctypes.string_at(packet.bsl_data, packet.bsl)
                context: Any = av.CodecContext.create(codec, "r")
                (frame,) = [*context.decode(av.Packet(data)), *context.decode(None)]
                return [torch.from_numpy(frame.reformat(format="nv12").to_ndarray())]

            return SimpleNamespace(Decode=decode)

        super().__init__(
            CreateDecoder=create,
            PacketData=SimpleNamespace,
            cudaVideoCodec=SimpleNamespace(HEVC="hevc"),
            DisplayDecodeLatencyType=SimpleNamespace(ZERO="zero"),
            VideoPacketFlag=SimpleNamespace(ENDOFPICTURE=1),
            frames=0,
        )


def test_nvdec_gives_the_same_bits(torch: Any, saved: Path) -> None:
    from weightvid.torch import _nvdec, load_file

    codecs = FakeCodecs(torch)
    with open_archive(saved, decoder=_nvdec(codecs, 0), check_tensors=True) as archive:
        found = dict(archive.items())
    assert codecs.frames == 1
    for name, tensor in load_file(saved).items():
        assert np.array_equal(found[name], tensor.numpy())
