import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.nn import functional as fn  # noqa: E402

from weightvid.calibrate import CalibrationConfig, calibrate, load_stats  # noqa: E402
from weightvid.checkpoint import open_checkpoint  # noqa: E402
from weightvid.errors import CheckpointError, OutputError, QuantizationError  # noqa: E402

LAYERS = [
    (nn.Linear(5, 4, bias=False), (7, 3, 5)),
    (nn.Conv1d(4, 6, 3, bias=False), (3, 4, 11)),
    (nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2, bias=False), (3, 4, 11)),
    (nn.Conv2d(3, 5, (3, 2), stride=(2, 1), padding=(1, 0), bias=False), (2, 3, 9, 8)),
    (nn.Conv2d(4, 4, 3, groups=4, padding=1, bias=False), (2, 4, 6, 7)),
    (nn.Conv2d(4, 8, 3, groups=2, dilation=2, padding="same", bias=False), (2, 4, 6, 7)),
    (nn.Conv2d(4, 3, 4, padding="same", bias=False), (2, 4, 6, 7)),
    (nn.Conv2d(4, 3, 2, padding="valid", bias=False), (2, 4, 6, 7)),
    (nn.Conv2d(3, 5, 3, padding=2, padding_mode="reflect", bias=False), (2, 3, 6, 7)),
    (nn.Conv2d(3, 5, 3, padding=1, padding_mode="circular", bias=False), (2, 3, 6, 7)),
    (nn.Conv3d(2, 3, (2, 3, 1), stride=(1, 2, 1), padding=1, bias=False), (2, 2, 4, 5, 6)),
    # Kernel and stride alike: outputs of different taps don't overlap.
    (nn.ConvTranspose1d(4, 3, 2, stride=2, bias=False), (3, 4, 5)),
    (nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2, bias=False), (3, 4, 5, 6)),
]


def expanded(tensor, moments):
    """Sum over inputs of the squared output of a weight, from the moment."""
    matrix = tensor.detach().numpy().astype(np.float64).reshape(len(tensor), -1)
    groups = len(moments.moment)
    parts = np.split(matrix, groups)
    parts = parts if moments.axis else [part.T for part in parts]
    products = zip(parts, moments.moment.astype(np.float64), strict=True)
    return moments.rows * sum(np.einsum("ij,jk,ik->", p, h, p) for p, h in products)


@pytest.mark.filterwarnings("ignore:Using padding")
@pytest.mark.parametrize("layer, shape", LAYERS, ids=lambda v: str(v) if v else None)
def test_the_moment_gives_the_energy_of_the_output(layer, shape):
    torch.manual_seed(0)
    inputs = torch.randn(shape) + 0.3
    stats = calibrate(layer, [inputs[:1], inputs[1:]], config=CalibrationConfig(held_back=0))
    energy = float(layer(inputs).detach().double().square().sum())
    moments = stats.tensors["weight"]
    assert expanded(layer.weight, moments) == pytest.approx(energy, rel=1e-5)
    assert stats.samples == shape[0]
    assert moments.damping == 0.01
    assert moments.gain_db is None


def test_means_are_those_of_the_inputs():
    inputs = torch.randn(50, 6) + torch.arange(6.0)
    stats = calibrate(nn.Linear(6, 3), list(inputs.split(7)))
    mean = stats.tensors["weight"].mean
    np.testing.assert_allclose(mean[0], inputs.mean(0).numpy(), rtol=1e-5, atol=1e-5)


class Attention(nn.Module):
    def __init__(self, **kwargs):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, **kwargs)

    def forward(self, q, k, v):
        return self.attention(q, k, v)[0]


@pytest.mark.parametrize("kwargs", [{}, {"batch_first": True}, {"kdim": 5, "vdim": 6}])
def test_multihead_attention(kwargs):
    torch.manual_seed(0)
    module = Attention(**kwargs).eval()
    key, value = kwargs.get("kdim", 8), kwargs.get("vdim", 8)
    batch = tuple(torch.randn(4, 3, size) for size in (8, key, value))
    expected = module(*batch)
    stats = calibrate(module, [batch], config=CalibrationConfig(held_back=0))
    torch.testing.assert_close(module(*batch), expected)
    if kwargs.get("kdim"):
        for name, inputs in zip(("q", "k", "v"), batch, strict=True):
            found = stats.tensors[f"attention.{name}_proj_weight"].moment[0]
            rows = inputs.reshape(-1, inputs.shape[-1])
            np.testing.assert_allclose(found, (rows.T @ rows / len(rows)).numpy(), atol=1e-5)
    else:
        for place, inputs in enumerate(batch):
            found = stats.tensors["attention.in_proj_weight"].moment[place]
            rows = inputs.reshape(-1, 8)
            np.testing.assert_allclose(found, (rows.T @ rows / len(rows)).numpy(), atol=1e-5)
    out = stats.tensors["attention.out_proj.weight"]
    bias = module.attention.out_proj.bias.detach()
    energy = float((expected.detach() - bias).double().square().sum())
    assert expanded(module.attention.out_proj.weight, out) == pytest.approx(energy, rel=1e-4)


def test_a_transformer_layer_is_seen_behind_its_fast_path():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    stats = calibrate(layer, [torch.randn(2, 5, 8)])
    weights = {"self_attn.in_proj_weight", "self_attn.out_proj.weight"}
    assert set(stats.tensors) == weights | {"linear1.weight", "linear2.weight"}
    assert torch.backends.mha.get_fastpath_enabled()


class Functional(nn.Module):
    """Weights by plain functions, as GPT-2's Conv1D and functional models have them."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(10, 6))
        self.inner = nn.Parameter(torch.randn(6, 4))
        self.outer = nn.Parameter(torch.randn(5, 4))
        self.bias = nn.Parameter(torch.randn(4))

    def forward(self, ids):
        hidden = torch.addmm(self.bias, self.table[ids].reshape(-1, 6), self.inner).relu()
        return {"loss": None, "logits": hidden @ self.outer.T}


def test_functions_are_seen_too():
    torch.manual_seed(0)
    module = Functional()
    ids = torch.tensor([[1, 2, 2], [3, -1, 2]])
    stats = calibrate(module, [ids], config=CalibrationConfig(held_back=0))
    assert set(stats.tensors) == {"table", "inner", "outer"}
    assert stats.tensors["inner"].axis == 0
    assert stats.tensors["outer"].axis == 1
    rows = module.table[ids].reshape(-1, 6).detach()
    expected = (rows.T @ rows / len(rows)).numpy()
    np.testing.assert_allclose(stats.tensors["inner"].moment[0], expected, rtol=1e-4, atol=1e-5)
    assert stats.tensors["table"].counts.tolist() == [0, 1, 3, 1, 0, 0, 0, 0, 0, 1]


def test_embedding_rows_know_what_the_output_sees():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Embedding(20, 3), nn.Linear(3, 2, bias=False))
    with torch.no_grad():
        module[1].weight.copy_(torch.tensor([[5.0, 0.0, 0.0], [0.0, 0.5, 0.0]]))
    ids = [torch.randint(0, 20, (40, 10)) for _ in range(6)]
    stats = calibrate(module, ids, config=CalibrationConfig(held_back=0))
    seen = np.diagonal(stats.tensors["0.weight"].moment[0])
    np.testing.assert_allclose(seen, [25, 0.25, 0], rtol=0.2)
    assert stats.tensors["0.weight"].counts.sum() == 2400
    assert all(p.requires_grad and p.grad is None for p in module.parameters())


def test_the_same_again_in_more_passes():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 7), nn.Linear(7, 2)).train()
    batches = list(torch.randn(40, 6).split(8))
    one = calibrate(module, batches)
    several = calibrate(module, iter(batches), config=CalibrationConfig(memory_bytes=1000))
    assert module.training
    for name, moments in one.tensors.items():
        np.testing.assert_array_equal(several.tensors[name].moment, moments.moment)
    tight = calibrate(module, batches, config=CalibrationConfig(memory_bytes=800))
    assert set(tight.tensors) == {"0.weight", "2.weight"}
    assert "3.weight" in " ".join(tight.notes)


def test_inputs_in_dicts_and_progress():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, *, a, b=None):
            return self.layer(a if b is None else a + b)

    seen = []
    batches = [{"a": torch.ones(4, 3)}, {"a": torch.ones(2, 3), "b": torch.ones(2, 3)}]
    stats = calibrate(Named(), batches, progress=seen.append)
    assert stats.samples == 6
    assert [(p.stage, p.done, p.total) for p in seen][:2] == [
        ("calibrate", 1, 2),
        ("calibrate", 2, 2),
    ]


def test_weights_too_noisy_to_fit_are_left_alone():
    """Held-back inputs that look quite unlike the others: the moment must not be used."""
    torch.manual_seed(0)
    layer = nn.Linear(16, 8, bias=False)
    narrow = torch.randn(16, 1) @ torch.ones(1, 16)
    batches = [narrow + 1e-3 * torch.randn(16, 16) for _ in range(4)]
    batches.append(torch.randn(16, 16) - torch.randn(16, 1))
    stats = calibrate(layer, batches)
    good = calibrate(layer, batches[:4])
    assert stats.tensors["weight"].gain_db < good.tensors["weight"].gain_db
    assert good.tensors["weight"].useful


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_activations_name_the_layer(bad):
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    with torch.no_grad():
        module[0].bias[1] = bad
    with pytest.raises(QuantizationError, match=r"'1\.weight'"):
        calibrate(module, [torch.ones(2, 3)])


def test_what_cannot_be_calibrated_says_so():
    with pytest.raises(QuantizationError, match="no example inputs"):
        calibrate(nn.Linear(3, 2), [])
    with pytest.raises(QuantizationError, match="no layer"):
        calibrate(nn.ReLU(), [torch.ones(2)])
    with pytest.raises(QuantizationError, match="memory limit"):
        calibrate(nn.Linear(30, 2), [torch.ones(1, 30)], config=CalibrationConfig(100))
    for wrong in ({"memory_bytes": 0}, {"held_back": 0.9}, {"dampings": ()}, {"dampings": (0.0,)}):
        with pytest.raises(QuantizationError):
            CalibrationConfig(**wrong)


def test_file_and_its_model(tmp_path):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 3), nn.BatchNorm1d(3))
    ids = [torch.randint(0, 9, (6,)) for _ in range(5)]
    stats = calibrate(module, ids)
    path = tmp_path / "stats.safetensors"
    stats.save(path)
    with pytest.raises(OutputError):
        stats.save(path)
    again = tmp_path / "again.safetensors"
    calibrate(module, ids).save(again)
    assert again.read_bytes() == path.read_bytes()
    loaded = load_stats(path)
    assert loaded.samples == 30
    assert loaded.model_sha256 == stats.model_sha256
    for name, moments in stats.tensors.items():
        found = loaded.tensors[name]
        np.testing.assert_array_equal(found.moment, moments.moment)
        np.testing.assert_array_equal(found.mean, moments.mean)
        assert (found.axis, found.rows) == (moments.axis, moments.rows)
        assert (found.damping, found.gain_db) == (moments.damping, moments.gain_db)
    state = module.state_dict()
    state.pop("2.num_batches_tracked")
    save_into(state, tmp_path / "model.safetensors")
    with open_checkpoint(tmp_path / "model.safetensors") as reader:
        loaded.check(reader)
    with torch.no_grad():
        module[1].weight[0, 0] += 1
    save_into(module.state_dict(), tmp_path / "other.safetensors")
    with (
        open_checkpoint(tmp_path / "other.safetensors") as reader,
        pytest.raises(CheckpointError, match="other weights"),
    ):
        loaded.check(reader)
    save_into({"x": torch.ones(2, 2)}, tmp_path / "third.safetensors")
    with (
        open_checkpoint(tmp_path / "third.safetensors") as reader,
        pytest.raises(CheckpointError, match="another model"),
    ):
        loaded.check(reader)
    with pytest.raises(CheckpointError, match="no calibration"):
        load_stats(tmp_path / "other.safetensors")


def save_into(state, path):
    from safetensors.torch import save_file as save

    save({name: tensor.contiguous() for name, tensor in state.items()}, path)


def test_functional_model_next_to_the_module_api():
    """A convolution called as a function on a parameter of a module."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(2, 3, 3, 3))

        def forward(self, x):
            return fn.conv2d(input=x, weight=self.kernel, stride=2, padding=(1, 1))

    net, inputs = Net(), torch.randn(2, 3, 8, 8)
    stats = calibrate(net, [inputs], config=CalibrationConfig(held_back=0))
    energy = float(net(inputs).detach().double().square().sum())
    assert expanded(net.kernel, stats.tensors["kernel"]) == pytest.approx(energy, rel=1e-5)


def test_inputs_unlike_those_of_training_are_not_used():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
    smooth = fn.avg_pool2d(torch.randn(64, 3, 20, 20), 5, 1) * 5 + 1
    net.train()
    for batch in smooth.split(16) * 20:
        net(batch)
    good = calibrate(net, list(smooth[:16].split(3)))
    assert good.tensors["0.weight"].useful
    bad = calibrate(net, list(torch.randn(16, 3, 16, 16).split(3)))
    assert not any(moments.useful for moments in bad.tensors.values())
    assert "trained on" in bad.notes[0]
    forced = CalibrationConfig(domain_limit=float("inf"))
    assert calibrate(net, [torch.randn(16, 3, 16, 16)], config=forced).notes == ()


class Tied(nn.Module):
    """A table that is the output layer too."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(12, 6)
        self.head = nn.Linear(6, 12, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids):
        return self.head(self.table(ids).tanh())


def test_tied_tables_are_known_by_their_inputs_alone():
    torch.manual_seed(0)
    module = Tied()
    ids = torch.randint(0, 12, (30, 4))
    stats = calibrate(module, [ids], config=CalibrationConfig(held_back=0))
    (moments,) = stats.tensors.values()
    inputs = module.table(ids).tanh().detach().reshape(-1, 6)
    expected = (inputs.T @ inputs / len(inputs)).numpy()
    np.testing.assert_allclose(moments.moment[0], expected, rtol=1e-4, atol=1e-5)
    assert moments.rows == len(inputs)
    assert moments.counts is None
