"""``weightvid.numpy`` and ``weightvid.torch``, and what ``import weightvid`` offers."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_models

import weightvid
import weightvid.numpy
from weightvid.errors import CheckpointError, OutputError, TruncatedError
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
    assert found.isdisjoint({"weightvid.pack", "weightvid.codec.encode", "safetensors", "typer"})


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
    """A network with tied weights, buffers of both kinds, and a frozen parameter."""

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(64, 48)
            self.conv = torch.nn.Conv2d(8, 16, 3)
            self.norm = torch.nn.BatchNorm2d(16)
            self.head = torch.nn.Linear(48, 64, bias=False)
            self.head.weight = self.embed.weight
            self.conv.bias.requires_grad_(False)
            self.register_buffer("scratch", torch.zeros(3), persistent=False)

    torch.manual_seed(0)
    module = Net()
    module.norm.running_mean.normal_()
    return module


@pytest.fixture
def saved(torch: Any, tmp_path: Path) -> Path:
    from weightvid.torch import save_file

    path = tmp_path / "m.mp4"
    save_file(make_module(torch).state_dict(), path, recipe="fine")
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


def test_module_is_filled_in_place(torch: Any, saved: Path) -> None:
    from weightvid.torch import load_file, load_into

    module = make_module(torch)
    torch.nn.init.zeros_(module.embed.weight)
    module.conv.half()
    memory = {name: p.data_ptr() for name, p in module.named_parameters()}
    report = load_into(module, saved)
    assert report == type(report)((), (), ())
    assert {name: p.data_ptr() for name, p in module.named_parameters()} == memory
    assert module.conv.weight.dtype == torch.float16
    assert not module.conv.bias.requires_grad
    found = load_file(saved)
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, found[name].to(tensor.dtype))


def test_meta_module_gets_memory_and_stays_tied(torch: Any, saved: Path) -> None:
    from weightvid.torch import load_file, load_into

    module = make_module(torch).to("meta")
    module.head.weight = module.embed.weight
    report = load_into(module, saved)
    assert report.meta_keys == ("scratch",)
    assert module.head.weight is module.embed.weight
    assert isinstance(module.embed.weight, torch.nn.Parameter)
    assert module.embed.weight.requires_grad
    assert not module.conv.bias.requires_grad
    found = load_file(saved)
    for name, tensor in module.state_dict().items():
        assert tensor.device.type == "cpu"
        assert torch.equal(tensor, found[name])


def test_untied_meta_module_shares_no_memory(torch: Any, saved: Path) -> None:
    from weightvid.torch import load_into

    module = make_module(torch)
    module.head.weight = torch.nn.Parameter(torch.zeros(64, 48))
    module = module.to("meta")
    load_into(module, saved)
    assert torch.equal(module.head.weight, module.embed.weight)
    assert module.head.weight.data_ptr() != module.embed.weight.data_ptr()


def test_names_are_checked_before_anything_changes(torch: Any, saved: Path) -> None:
    from weightvid.torch import load_into

    module = make_module(torch)
    module.extra = torch.nn.Linear(2, 2)
    del module.norm
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(CheckpointError, match=r"missing.*extra\.weight.*unexpected.*norm\.weight"):
        load_into(module, saved)
    assert all(torch.equal(before[n], t) for n, t in module.state_dict().items())
    report = load_into(module, saved, strict=False)
    assert report.missing_keys == ("extra.weight", "extra.bias")
    assert "norm.running_var" in report.unexpected_keys
    assert not torch.equal(before["embed.weight"], module.embed.weight)


def test_shapes_must_fit_even_without_strict(torch: Any, saved: Path) -> None:
    from weightvid.torch import load_into

    module = make_module(torch)
    module.conv = torch.nn.Conv2d(8, 16, 5)
    with pytest.raises(CheckpointError, match=r"conv\.weight is \[16, 8, 3, 3\]"):
        load_into(module, saved, strict=False)


def test_one_name_of_a_tied_tensor_is_enough(torch: Any, tmp_path: Path) -> None:
    from weightvid.torch import load_into, save_file

    state = make_module(torch).state_dict()
    del state["head.weight"]
    save_file(state, tmp_path / "m.mp4")
    module = make_module(torch)
    load_into(module, tmp_path / "m.mp4")
    assert module.head.weight is module.embed.weight


def test_cut_archive_raises(torch: Any, saved: Path) -> None:
    from weightvid.torch import load_into

    saved.write_bytes(saved.read_bytes()[:-400])
    with pytest.raises(TruncatedError):
        load_into(make_module(torch), saved)
