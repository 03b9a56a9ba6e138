"""PyTorch files: state dicts in, state dicts out, and no code run on the way."""

from __future__ import annotations

import io
import pickle
import sys
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import save

from weightvid.checkpoint import from_mapping, open_checkpoint
from weightvid.errors import CheckpointError

torch = pytest.importorskip("torch")

from weightvid.checkpoint.torch_file import from_stored, to_stored  # noqa: E402

W = torch.ones(2, 2)
OPTIMIZER = {"state": {0: {"m": W.clone(), "v": W.clone()}}, "param_groups": [{"lr": 0.1}]}


class Run:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


class Custom:
    """Something that weights_only must not build."""


class DTensor:
    """Stands for torch's own, which is allowed where torch.distributed has been imported."""


def dump(path: Path, value: object, **options: object) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(value, path, **options)
    return path


@pytest.mark.parametrize("legacy", [False, True])
def test_a_real_state_dict(tmp_path: Path, legacy: bool) -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    state = model.to(memory_format=torch.channels_last).state_dict()
    path = dump(tmp_path / "m.pth", state, _use_new_zipfile_serialization=not legacy)
    with open_checkpoint(path) as reader:
        assert [spec.name for spec in reader.contents.tensors] == list(state)
        assert reader.contents.skipped == ()
        for name, tensor in state.items():
            got = reader.read(name)
            assert got.shape == tuple(tensor.shape)
            assert not got.flags.writeable
            assert np.array_equal(got, tensor.numpy())
        known = reader.read("0.weight")
    assert np.array_equal(known, state["0.weight"].numpy())


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("legacy", [False, True])
def test_later_protocols(tmp_path: Path, protocol: int, legacy: bool) -> None:
    options = {"pickle_protocol": protocol, "_use_new_zipfile_serialization": not legacy}
    half = torch.arange(3, dtype=torch.bfloat16)
    state = OrderedDict(w=W, tied=W, p=torch.nn.Parameter(W + 1), h=half, again=half.float())
    path = dump(
        tmp_path / "m.pt", {"model": state, "epoch": 3, "names": {"a": "w" * 300}}, **options
    )
    with open_checkpoint(path) as reader:
        assert [spec.name for spec in reader.contents.tensors] == ["w", "p", "h", "again"]
        assert reader.contents.aliases == {"tied": "w"}
        assert reader.contents.skipped == ("epoch (int)", "names (dict)")
        assert reader.read("p").tolist() == [[2, 2], [2, 2]]
        assert reader.read("again").tolist() == [0, 1, 2]
    code = dump(tmp_path / "code.pt", {"w": W, "run": Run(tmp_path / "ran")}, **options)
    with pytest.raises(CheckpointError, match="it holds Python objects"):
        open_checkpoint(code)
    assert not (tmp_path / "ran").exists()


def test_a_pickle_that_repeats_a_string_without_end() -> None:
    from weightvid.checkpoint.torch_file import protocol_2

    text = "s" * 100_000
    start = b"\x80\x04X" + len(text).to_bytes(4, "little") + text.encode() + b"\x94"
    bomb = start + b"h\x000" * 10_000 + b"."
    assert pickle.loads(bomb) == text
    with pytest.raises(pickle.UnpicklingError, match="repeated too often"):
        protocol_2(io.BytesIO(bomb))


def test_a_small_file_that_would_fill_memory(tmp_path: Path) -> None:
    made, path = dump(tmp_path / "m.pt", {"w": torch.zeros(20, 1 << 20)}), tmp_path / "d.pt"
    with zipfile.ZipFile(made) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    assert path.stat().st_size < 1 << 20
    with pytest.raises(CheckpointError, match="deflated to a few"):
        open_checkpoint(path)


@pytest.mark.parametrize(("name", "average"), [("params", "params_ema"), ("model", "ema")])
def test_averages_of_the_weights(tmp_path: Path, name: str, average: str) -> None:
    path = dump(tmp_path / "m.pth", {name: {"w": W}, average: {"w": W + 1}})
    with open_checkpoint(path) as reader:
        assert reader.read("w").tolist() == [[2, 2], [2, 2]]
        assert reader.contents.skipped == (f"{name} (dict with 1 tensor)",)


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_name_that_says_something_else(tmp_path: Path, protocol: int) -> None:
    path = dump(tmp_path / "m.safetensors", {"w": W}, pickle_protocol=protocol)
    with open_checkpoint(path) as reader:
        assert reader.read("w").tolist() == [[1, 1], [1, 1]]


def test_what_we_write_loads_strictly_and_tied(tmp_path: Path) -> None:
    model = torch.nn.ModuleDict({"a": torch.nn.Embedding(6, 4), "b": torch.nn.Linear(4, 6, False)})
    model["b"].weight = model["a"].weight
    with open_checkpoint(dump(tmp_path / "in.pt", model.state_dict())) as reader:
        assert reader.contents.aliases == {"b.weight": "a.weight"}
        assert save(tmp_path / "out.bin", reader) == ()
    state = torch.load(tmp_path / "out.bin", weights_only=True)
    assert isinstance(state, OrderedDict)
    assert state["a.weight"].data_ptr() == state["b.weight"].data_ptr()
    model.load_state_dict(state)


def test_views_of_one_storage(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    views = {
        "base": base,
        "again": base.view(3, 4),
        "parameter": torch.nn.Parameter(base),
        "transposed": base.T,
        "column": base[:, 1],
        "expanded": base[:1].expand(5, 4),
        "conjugate": torch.tensor([1 + 2j]).conj(),
        "empty": torch.empty(0),
        "empty too": torch.empty(0),
    }
    with open_checkpoint(dump(tmp_path / "m.pt", views)) as reader:
        assert reader.contents.aliases == {"again": "base", "parameter": "base"}
        for name, view in views.items():
            assert np.array_equal(reader.read(name), view.detach().resolve_conj().numpy())


@pytest.mark.parametrize(
    ("value", "names", "skipped"),
    [
        (W, "tensor", ""),
        ({0: W, "x": None, "lr": 0.1}, "0", "lr (float), x (NoneType)"),
        ({"model": {"w": W}, "optimizer": OPTIMIZER}, "w", "optimizer (dict with 2 tensors)"),
        ({"c": {"module": {"w": W, "n": 1}, "it": 2}}, "w", "c.it (int), n (int)"),
        ({"model": {"w": W}, "step": W[0]}, "w", "step (tensor outside the weights)"),
        ({"a": {"w": W}, "b": {"w": W + 1, "k": ()}}, "a.w b.w", "b.k (tuple)"),
        ({"w": W, "l": [W, W], "n": {"l": [W]}}, "w", "l (list with 2 tensors), n (dict)"),
        ({1: W, "1": W + 1}, "1", "1 (tensor; the name is taken)"),
    ],
)
def test_where_the_weights_are(tmp_path: Path, value: Any, names: str, skipped: str) -> None:
    with open_checkpoint(dump(tmp_path / "m.pt", value)) as reader:
        assert " ".join(spec.name for spec in reader.contents.tensors) == names
        assert ", ".join(sorted(reader.contents.skipped)) == skipped


@pytest.mark.parametrize("value", [[W], 3, {"a": 1}, {"a": [W]}, OPTIMIZER["param_groups"]])
def test_no_named_tensors(tmp_path: Path, value: object) -> None:
    with pytest.raises(CheckpointError, match="holds no named tensors: "):
        open_checkpoint(dump(tmp_path / "m.pt", value))


def test_tangled_dicts(tmp_path: Path) -> None:
    """Dicts shared 2**40 times, dicts in themselves, and dicts 5000 deep end in a bounded time."""
    node: dict[str, object] = {"w": W}
    for _ in range(40):
        node = {"a": node, "b": node}
    loop: dict[str, object] = {"w": W}
    loop["model"] = loop
    for value in (node, loop):
        with open_checkpoint(dump(tmp_path / "m.pt", value)) as reader:
            assert len(reader.contents.tensors) == 1
    deep: dict[str, object] = {"w": W}
    for _ in range(5000):
        deep = {"x": deep, "v": W}
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(100_000)
    try:
        dump(tmp_path / "deep.pt", deep)
    finally:
        sys.setrecursionlimit(limit)
    with pytest.raises(CheckpointError, match="dicts in dicts without end"):
        open_checkpoint(tmp_path / "deep.pt")


def test_tensors_of_an_unsupported_make_are_reported(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value = {
            "ok": W,
            "quantized": torch.quantize_per_tensor(W, 0.1, 0, torch.qint8),
            "sparse": W.to_sparse(),
            "meta": torch.empty(3, device="meta"),
            "nested": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
            "expanded": torch.zeros(1).expand(1 << 40),
        }
    with open_checkpoint(dump(tmp_path / "m.pt", value)) as reader:
        assert [spec.name for spec in reader.contents.tensors] == ["ok"]
        said = dict(item.split(" ", 1) for item in reader.contents.skipped)
    assert said["quantized"] == "(quantized tensor (torch.qint8))"
    assert set(said) == set(value) - {"ok"}


def test_code_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "p.bin").write_bytes(pickle.dumps({"a": Custom()}, 5))
    dump(tmp_path / "a.pt", {"w": W, "x": Custom()})
    dump(tmp_path / "b.pt", torch.nn.Linear(2, 2))
    for path in tmp_path.iterdir():
        with pytest.raises(CheckpointError, match=r"could run code.*state_dict\(\)") as caught:
            open_checkpoint(path)
        assert "\n" not in str(caught.value)


def test_parts_of_a_distributed_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"it holds DTensors, .*full_state_dict=True"):
        open_checkpoint(dump(tmp_path / "m.pt", {"w": DTensor()}))


def test_what_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = from_mapping({"\ud800": np.ones(1, np.float32)}, metadata={"format": "pt"})
    notes = save(tmp_path / "m.pt", source)
    assert notes == ("a state_dict has no metadata; dropped: format",)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(CheckpointError, match=r"pip install 'weightvid\[torch\]'"):
        open_checkpoint(tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match="pip install"):
        save(tmp_path / "out.pt", source)


def test_what_cannot_be_converted() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        fake = torch.empty(2)
    for tensor, said in ((fake, "FakeTensor"), (torch.empty(2, device="meta"), "meta tensor")):
        with pytest.raises(CheckpointError, match=said):
            to_stored(tensor)
    for array, name, said in (
        (np.zeros(2, np.uint8), "F6_E2M3", "no element type"),
        (np.zeros(2, np.float32), "BF16", "is not BF16"),
        (np.zeros(3, np.uint8), "F4", "pairs"),
    ):
        with pytest.raises(CheckpointError, match=said):
            from_stored(array, name)
