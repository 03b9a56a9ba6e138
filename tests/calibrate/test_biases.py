import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

import weightvid.torch  # noqa: E402
from weightvid.calibrate import CalibrationConfig, calibrate, load_stats  # noqa: E402
from weightvid.pack import PackOptions  # noqa: E402
from weightvid.packing import quantizer, schedule  # noqa: E402
from weightvid.packing.biases import Corrections, bias_numbers  # noqa: E402
from weightvid.spec import TensorSpec  # noqa: E402


class Conv1D(nn.Module):
    """As GPT-2 has it: the weight is (inputs, outputs)."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.bias = nn.Parameter(torch.randn(outputs))
        self.weight = nn.Parameter(torch.randn(inputs, outputs))

    def forward(self, x):
        return torch.addmm(self.bias, x, self.weight)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 16, 3, padding=1, groups=2)
        self.linear = nn.Linear(16, 48)
        self.last = Conv1D(48, 24)
        self.attention = nn.MultiheadAttention(24, 2)

    def forward(self, x):
        x = self.last(self.linear(self.conv(x).relu().mean((2, 3))).relu())
        return self.attention(x, x, x)[0]


@pytest.fixture(scope="module")
def calibrated():
    torch.manual_seed(0)
    net = Net().eval()
    images = torch.rand(60, 8, 6, 6)
    config = CalibrationConfig(held_back=0, sensitivity_samples=0)
    return net, images, calibrate(net, list(images.split(10)), config=config)


def packed(calibrated, tmp_path, **given):
    net, _, stats = calibrated
    options = {"calibration": stats, "step_factor": 0.8, "mantissa_bits": 23, "force": True}
    options.update(given)
    weightvid.torch.save_file(
        net.state_dict(), tmp_path / "model.mp4", options=PackOptions(**options)
    )
    return weightvid.torch.load_file(tmp_path / "model.mp4")


BIASES = ["conv.bias", "linear.bias", "last.bias", "attention.in_proj_bias"]


def test_the_bias_of_each_layer_is_known(calibrated, tmp_path):
    _, _, stats = calibrated
    stats.save(tmp_path / "stats.safetensors")
    for found in (stats, load_stats(tmp_path / "stats.safetensors")):
        biases = {name: moments.bias for name, moments in found.tensors.items()}
        assert biases == {
            "conv.weight": "conv.bias",
            "linear.weight": "linear.bias",
            "last.weight": "last.bias",
            "attention.in_proj_weight": "attention.in_proj_bias",
            "attention.out_proj.weight": "attention.out_proj.bias",
        }


@pytest.mark.parametrize("blocks", [False, True])
def test_mean_outputs_are_as_before(calibrated, tmp_path, monkeypatch, blocks):
    """Layer by layer, on the original inputs: the quantized layer's mean output is right."""
    if blocks:
        for module in (quantizer, schedule):
            monkeypatch.setattr(module, "BATCH_WEIGHTS", 200)
    net, images, _ = calibrated
    restored = packed(calibrated, tmp_path)
    seen = {}
    hooks = [
        module.register_forward_hook(lambda m, i, o, name=name: seen.update({name: (i[0], o)}))
        for name, module in net.named_modules()
        if name in ("conv", "linear", "last")
    ]
    with torch.no_grad():
        net(images)
        for hook in hooks:
            hook.remove()
        for name, (inputs, output) in seen.items():
            layer = net.get_submodule(name)
            other = type(layer).__new__(type(layer))
            nn.Module.__init__(other)
            other.__dict__.update({k: v for k, v in layer.__dict__.items() if k != "_parameters"})
            other._parameters = {
                part: nn.Parameter(restored[f"{name}.{part}"]) for part in ("weight", "bias")
            }
            axes = tuple(i for i in range(output.ndim) if i != 1)
            wanted, found = output.mean(axes), other(inputs).mean(axes)
            plain = found - restored[f"{name}.bias"] + layer.bias
            assert (found - wanted).abs().max() < 1e-4
            assert (plain - wanted).abs().max() > 1e-3


def test_biases_that_are_to_be_kept_stay(calibrated, tmp_path):
    net, _, _ = calibrated
    restored = packed(calibrated, tmp_path, keep=("linear.bias",))
    state = net.state_dict()
    assert torch.equal(restored["linear.bias"], state["linear.bias"])
    for name in ("conv.bias", "last.bias", "attention.in_proj_bias"):
        assert not torch.equal(restored[name], state[name])
    restored = packed(calibrated, tmp_path, keep=("conv.weight",))
    assert torch.equal(restored["conv.bias"], state["conv.bias"])


def test_without_statistics_biases_stay(calibrated, tmp_path):
    net, _, _ = calibrated
    restored = packed(calibrated, tmp_path, calibration=None)
    for name in BIASES:
        assert torch.equal(restored[name], net.state_dict()[name])


def specs(*sizes):
    return [TensorSpec(str(n), "F32", (size,)) for n, size in enumerate(sizes)]


def test_a_bias_waits_for_its_weight():
    values = np.arange(3, dtype=np.float32)

    def read(first, count):
        return values[first : first + count]

    corrections = Corrections(specs(9, 3, 3), {0: 1})
    assert corrections.kept(1, read) == []
    assert [n for n, _ in corrections.kept(2, read)] == [2]
    ((number, corrected),) = corrections.quantized(0, np.ones(3, np.float32))
    assert number == 1
    assert corrected(1, 2).tolist() == [2, 3]
    assert corrections.quantized(2, None) == []


@pytest.mark.parametrize("shift", [None, np.ones(2, np.float32), np.full(3, np.nan, np.float32)])
def test_shifts_that_are_no_use_leave_the_bias(shift):
    def read(first, count):
        return np.zeros(count, np.float32)

    corrections = Corrections(specs(9, 3), {0: 1})
    assert corrections.quantized(0, shift) == []
    ((_, found),) = corrections.kept(1, read)
    assert found is read


def test_shared_biases_are_not_touched(calibrated):
    _, _, stats = calibrated
    moments = {0: stats.tensors["conv.weight"], 1: stats.tensors["conv.weight"]}
    tensors = [
        TensorSpec("a", "F32", (16, 36)),
        TensorSpec("b", "F32", (16, 36)),
        TensorSpec("conv.bias", "F32", (16,)),
    ]
    assert bias_numbers(tensors, moments, {0, 1}, ()) == {}
    assert bias_numbers(tensors, moments, {0}, ()) == {0: 2}
    assert bias_numbers(tensors, moments, {0}, ("*.bias",)) == {}
