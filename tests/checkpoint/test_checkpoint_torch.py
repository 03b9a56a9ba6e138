"""PyTorch files: state dicts in, state dicts out, and no code run on the way."""

from __future__ import annotations

import sys
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest

from weightvid.checkpoint import (
    Contents,
    TensorSpec,
    create_checkpoint,
    from_mapping,
    open_checkpoint,
)
from weightvid.dtypes import STORED
from weightvid.errors import CheckpointError

torch = pytest.importorskip("torch")

from weightvid.checkpoint.torch_file import from_stored, to_stored  # noqa: E402

TORCH_DTYPES = sorted(set(STORED) - {"F6_E2M3", "F6_E3M2"})


class Custom:
    """Something that weights_only must not build."""


def save(path: Path, value: object, **options: object) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(value, path, **options)
    return path


def bits(tensor: object) -> bytes:
    return to_stored(tensor)[1].tobytes()


@pytest.mark.parametrize("legacy", [False, True])
def test_a_real_state_dict(tmp_path: Path, legacy: bool) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Linear(4, 2)
    ).to(memory_format=torch.channels_last)
    state = model.state_dict()
    path = save(tmp_path / "m.pth", state, _use_new_zipfile_serialization=not legacy)
    with open_checkpoint(path) as reader:
        assert [spec.name for spec in reader.contents.tensors] == list(state)
        assert reader.contents.skipped == ()
        assert reader.spec("1.num_batches_tracked").dtype == "I64"
        for name, tensor in state.items():
            got = reader.read(name)
            assert got.shape == tuple(tensor.shape)
            assert not got.flags.writeable
            assert np.array_equal(got, tensor.numpy())
        kept = reader.read("0.weight")
    assert np.array_equal(kept, state["0.weight"].numpy())
    with pytest.raises(CheckpointError, match="closed"):
        reader.read("0.weight")


def test_what_we_write_loads_strictly_and_tied(tmp_path: Path) -> None:
    embedding = torch.nn.Embedding(6, 4)
    head = torch.nn.Linear(4, 6, bias=False)
    head.weight = embedding.weight
    model = torch.nn.ModuleDict({"embedding": embedding, "head": head})
    path = save(tmp_path / "in.pt", model.state_dict())
    with open_checkpoint(path) as reader:
        assert reader.contents.aliases == {"head.weight": "embedding.weight"}
        with create_checkpoint(tmp_path / "out.bin", reader.contents) as writer:
            assert writer.notes == ()
            for spec in reader.contents.tensors:
                writer.write(spec.name, reader.read(spec.name))
    state = torch.load(tmp_path / "out.bin", weights_only=True)
    assert isinstance(state, OrderedDict)
    assert state["head.weight"].data_ptr() == state["embedding.weight"].data_ptr()
    model.load_state_dict(state)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.pt", "out.bin"]


def test_views_of_one_storage(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    views = {
        "base": base,
        "again": base.view(3, 4),
        "parameter": torch.nn.Parameter(base),
        "transposed": base.T,
        "row": base[1],
        "column": base[:, 1],
        "flat": base.reshape(-1),
        "expanded": base[:1].expand(5, 4),
    }
    path = save(tmp_path / "m.pt", views)
    with open_checkpoint(path) as reader:
        assert reader.contents.aliases == {"again": "base", "parameter": "base"}
        for name, view in views.items():
            assert np.array_equal(reader.read(name), view.detach().numpy())


def test_empties_are_not_tied(tmp_path: Path) -> None:
    path = save(tmp_path / "m.pt", {"a": torch.empty(0), "b": torch.empty(0), "c": torch.ones(())})
    with open_checkpoint(path) as reader:
        assert reader.contents.aliases == {}
        assert len(reader.contents.tensors) == 3


W = torch.ones(2, 2)
OPTIMIZER = {"state": {0: {"m": W.clone(), "v": W.clone()}}, "param_groups": [{"lr": 0.1}]}


@pytest.mark.parametrize(
    ("value", "names", "skipped"),
    [
        ({"w": W}, {"w"}, []),
        (W, {"tensor"}, []),
        ({0: W, "x": None, "lr": 0.1}, {"0"}, ["x (NoneType)", "lr (float)"]),
        ({"state_dict": {"w": W}, "epoch": 3}, {"w"}, ["epoch (int)"]),
        (
            {"epoch": 3, "model": {"w": W}, "optimizer": OPTIMIZER, "name": "net"},
            {"w"},
            ["epoch (int)", "optimizer (dict with 2 tensors)", "name (str)"],
        ),
        (
            {"checkpoint": {"module": {"w": W, "n": 1}, "it": 2}},
            {"w"},
            ["checkpoint.it (int)", "n (int)"],
        ),
        (
            {"model": {"w": W}, "ema": {"w": W}, "step": torch.tensor(1)},
            {"w"},
            ["ema (dict with 1 tensor)", "step (tensor outside the weights)"],
        ),
        ({"net_g": {"w": W}, "best": 0.5}, {"w"}, ["best (float)"]),
        (
            {"gen": {"w": W}, "disc": {"w": W.clone(), "k": ()}, "opt": OPTIMIZER},
            {"gen.w", "disc.w"},
            ["disc.k (tuple)", "opt (dict with 2 tensors)"],
        ),
        ({"w": W, "sub": {"v": W.clone(), "s": {}}}, {"w", "sub.v"}, ["sub.s (dict)"]),
        (
            {"w": W, "list": [W, W], "nested": {"l": [W]}},
            {"w"},
            ["list (list with 2 tensors)", "nested (dict)"],
        ),
        ({"a.b": W, "a": {"b": W.clone()}}, {"a.b"}, ["a.b (tensor; the name is taken)"]),
        ({1: W, "1": W.clone()}, {"1"}, ["1 (tensor; the name is taken)"]),
    ],
)
def test_where_the_weights_are(
    tmp_path: Path, value: object, names: set[str], skipped: list[str]
) -> None:
    with open_checkpoint(save(tmp_path / "m.pt", value)) as reader:
        contents = reader.contents
        assert {spec.name for spec in contents.tensors} == names
        assert sorted(contents.skipped) == sorted(skipped)


@pytest.mark.parametrize("value", [[W], 3, {"a": 1}, {"a": [W]}, OPTIMIZER["param_groups"]])
def test_no_named_tensors(tmp_path: Path, value: object) -> None:
    with pytest.raises(CheckpointError, match="holds no named tensors: "):
        open_checkpoint(save(tmp_path / "m.pt", value))


def test_tangled_dicts(tmp_path: Path) -> None:
    """Dicts shared 2**40 times, dicts in themselves, and dicts 5000 deep end in a bounded time."""
    node: dict[str, object] = {"w": W}
    for _ in range(40):
        node = {"a": node, "b": node}
    with open_checkpoint(save(tmp_path / "shared.pt", node)) as reader:
        assert len(reader.contents.tensors) == 1
        assert len(reader.contents.skipped) == 40
    loop: dict[str, object] = {"w": W}
    loop["model"] = loop
    with open_checkpoint(save(tmp_path / "loop.pt", loop)) as reader:
        assert [spec.name for spec in reader.contents.tensors] == ["w"]
    limit = sys.getrecursionlimit()
    deep: dict[str, object] = {"w": W}
    for _ in range(5000):
        deep = {"x": deep, "v": W}
    sys.setrecursionlimit(100_000)
    try:
        save(tmp_path / "deep.pt", deep)
    finally:
        sys.setrecursionlimit(limit)
    with pytest.raises(CheckpointError, match="nested too deep"):
        open_checkpoint(tmp_path / "deep.pt")


def test_tensors_of_an_unsupported_make_are_reported(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value = {
            "ok": W,
            "quantized": torch.quantize_per_tensor(W, 0.1, 0, torch.qint8),
            "sparse": W.to_sparse(),
            "csr": W.to_sparse_csr(),
            "meta": torch.empty(3, device="meta"),
            "nested": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
            "expanded": torch.zeros(1).expand(1 << 40),
        }
    with open_checkpoint(save(tmp_path / "m.pt", value)) as reader:
        assert [spec.name for spec in reader.contents.tensors] == ["ok"]
        said = dict(item.split(" ", 1) for item in reader.contents.skipped)
        assert said["quantized"] == "(quantized tensor (torch.qint8))"
        assert said["sparse"].startswith("(sparse tensor")
        assert set(said) == set(value) - {"ok"}


def test_python_objects_are_refused_in_one_line(tmp_path: Path) -> None:
    for name, value in (("a.pt", {"w": W, "x": Custom()}), ("b.pt", torch.nn.Linear(2, 2))):
        with pytest.raises(CheckpointError, match="Python objects") as caught:
            open_checkpoint(save(tmp_path / name, value))
        assert "\n" not in str(caught.value)
        assert "state_dict()" in str(caught.value)
        assert caught.value.__suppress_context__


def test_torchscript_is_named(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)).save(tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match="TorchScript"):
        open_checkpoint(tmp_path / "m.pt")


def test_a_deflated_archive(tmp_path: Path) -> None:
    value = {"w": torch.arange(1000.0)}
    stored = save(tmp_path / "stored.pt", value)
    with (
        zipfile.ZipFile(stored) as source,
        zipfile.ZipFile(tmp_path / "small.pt", "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for name in source.namelist():
            target.writestr(name, source.read(name))
    with open_checkpoint(tmp_path / "small.pt") as reader:
        assert np.array_equal(reader.read("w"), np.arange(1000, dtype=np.float32))


@pytest.mark.parametrize("legacy", [False, True])
def test_damage(tmp_path: Path, legacy: bool) -> None:
    path = save(tmp_path / "m.pt", {"w": W}, _use_new_zipfile_serialization=not legacy)
    blob = path.read_bytes()
    for end in range(2, len(blob) - 1, max(1, len(blob) // 40)):
        path.write_bytes(blob[:end])
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(path)
        assert "\n" not in str(caught.value)
    for at in range(0, len(blob), 3):
        path.write_bytes(blob[:at] + bytes([blob[at] ^ 1 << at % 8]) + blob[at + 1 :])
        try:
            with open_checkpoint(path) as reader:
                for spec in reader.contents.tensors:
                    assert reader.read(spec.name).shape == spec.shape
        except CheckpointError as error:
            assert "\n" not in str(error)


def test_other_pickles(tmp_path: Path) -> None:
    import pickle

    for protocol in (2, 5):
        (tmp_path / "m.bin").write_bytes(pickle.dumps({"a": Custom()}, protocol))
        with pytest.raises(CheckpointError):
            open_checkpoint(tmp_path / "m.bin")


def test_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "m.pt", {"w": W})
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(CheckpointError, match=r"pip install 'weightvid\[torch\]'"):
        open_checkpoint(path)
    contents = Contents((TensorSpec("w", "F32", (2,)),))
    with pytest.raises(CheckpointError, match="pip install"):
        create_checkpoint(tmp_path / "out.pt", contents)
    assert not (tmp_path / "out.pt").exists()


class TestConversion:
    @pytest.mark.parametrize("name", TORCH_DTYPES)
    @pytest.mark.parametrize("shape", [(), (4,), (0, 2), (3, 2, 4)])
    def test_there_and_back(self, name: str, shape: tuple[int, ...]) -> None:
        if name == "F4" and not shape:
            with pytest.raises(CheckpointError, match="pairs"):
                from_stored(np.zeros(shape, np.uint8), name)
            return
        rng = np.random.default_rng(1)
        top = {"F4": 16, "BOOL": 2}.get(name, 256)
        size = int(np.prod(shape)) * STORED[name].itemsize
        array = rng.integers(0, top, size, dtype=np.uint8).view(STORED[name]).reshape(shape)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tensor = from_stored(array, name)
        back, got = to_stored(tensor)
        assert back == name
        assert (got.dtype, got.shape) == (array.dtype, shape)
        assert got.tobytes() == array.tobytes()

    @pytest.mark.parametrize("name", ["F32", "BF16", "F8_E5M2", "I64", "BOOL", "C64", "U16"])
    def test_memory_is_shared(self, name: str) -> None:
        array = np.zeros((2, 3), STORED[name])
        tensor = from_stored(array, name)
        assert tensor.data_ptr() == array.ctypes.data
        assert np.shares_memory(to_stored(tensor)[1], array)
        array.flags.writeable = False
        assert from_stored(array, name).data_ptr() != array.ctypes.data

    def test_strides_gradients_and_conjugates(self) -> None:
        for dtype in (torch.float32, torch.bfloat16, torch.float8_e5m2):
            tensor = torch.arange(6.0).reshape(2, 3).to(dtype).T
            assert bits(tensor) == bits(tensor.contiguous())
        parameter = torch.nn.Parameter(torch.ones(2))
        assert to_stored(parameter)[1].tolist() == [1, 1]
        conjugate = torch.tensor([1 + 2j]).conj()
        assert to_stored(conjugate)[1].tolist() == [1 - 2j]
        assert to_stored(conjugate.imag)[1].tolist() == [-2]

    @pytest.mark.parametrize("name", ["F6_E2M3", "npy:>f4", "npy:<U3"])
    def test_types_torch_lacks(self, name: str) -> None:
        with pytest.raises(CheckpointError, match="no element type"):
            from_stored(np.zeros(2, np.uint8), name)

    def test_wrong_array_and_tensor(self) -> None:
        with pytest.raises(CheckpointError, match="is not BF16"):
            from_stored(np.zeros(2, np.float32), "BF16")
        with pytest.raises(CheckpointError, match="meta tensor"):
            to_stored(torch.empty(2, device="meta"))
        from torch._subclasses.fake_tensor import FakeTensorMode

        with FakeTensorMode():
            fake = torch.empty(2)
        with pytest.raises(CheckpointError, match="FakeTensor"):
            to_stored(fake)


def test_metadata_has_no_home(tmp_path: Path) -> None:
    source = from_mapping({"w": np.ones(1, np.float32)}, metadata={"format": "pt"})
    with create_checkpoint(tmp_path / "m.pt", source.contents) as writer:
        assert writer.notes == ("a state_dict has no metadata; dropped: format",)
        writer.write("w", source.read("w"))


@pytest.mark.parametrize("name", ["", "a/b", "nul\0nul", "ä\u2603", "\ud800"])
def test_odd_names(tmp_path: Path, name: str) -> None:
    source = from_mapping({name: np.ones(2, np.float32)})
    with create_checkpoint(tmp_path / "m.pt", source.contents) as writer:
        writer.write(name, source.read(name))
    with open_checkpoint(tmp_path / "m.pt") as reader:
        assert reader.read(name).tolist() == [1, 1]
