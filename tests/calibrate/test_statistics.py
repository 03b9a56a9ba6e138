"""What calibration sees of each kind of layer, next to sums made by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from weightvid.calibrate import Calibration, CalibrationConfig, CalibrationStats, calibrate
from weightvid.calibrate.stats import load_stats
from weightvid.checkpoint import from_mapping
from weightvid.errors import QuantizationError
from weightvid.loader import open_archive
from weightvid.pack import PackOptions, pack_checkpoint

torch = pytest.importorskip("torch", reason="needs the extra: weightvid[torch]")
from weightvid.calibrate.state import change_of, describe_change  # noqa: E402

nn = torch.nn

ALL = CalibrationConfig(held_back=0)


def outer(inputs: Any) -> Any:
    """Mean of x x' over all rows of inputs, shape (..., C), a 1 appended to each."""
    rows = nn.functional.pad(
        inputs.detach().double().reshape(-1, inputs.shape[-1]), (0, 1), value=1
    )
    return (rows.T @ rows / len(rows)).numpy()


def pulled(
    run: Any, weights: Sequence[Sequence[Any]], *batches: Any, turned: bool = False
) -> list[Any]:
    """Mean of A'A over all samples, each run alone; A are gradients by matrices side by side.

    ``turned``: of A A', of the first matrices alone.
    """
    draws, sums, count = torch.Generator().manual_seed(0), [0.0] * len(weights), 0
    samples = sum(map(len, batches))
    for batch in batches:
        output = run(batch)
        rows = output.numel() // output.shape[-1] // len(batch) * samples
        for _ in range(-(-1000 // rows)):
            direction = torch.randn(output.shape, generator=draws)
            for sample, pull in zip(batch.split(1), direction.split(1), strict=True):
                change, count = (run(sample) * pull).sum(), count + 1
                for place, parts in enumerate(weights):
                    found = torch.autograd.grad(change, parts, retain_graph=True)
                    rows = torch.cat([part.double().flatten(1) for part in found], 1)
                    rows = found[0].double().flatten(1).T if turned else rows
                    sums[place] += (rows.T @ rows).numpy()
    return [each / count for each in sums]


def statistics(module: Any, *batches: Any) -> CalibrationStats:
    torch.manual_seed(0)
    return calibrate(module, batches, ALL)


@pytest.mark.parametrize(
    ("layer", "shape", "groups"),
    [
        (nn.Linear(5, 4, bias=False), (7, 3, 5), 1),
        (nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2, bias=False), (3, 4, 11), 2),
        (nn.Conv2d(3, 5, (3, 2), stride=(2, 1), padding=(1, 0), bias=False), (2, 3, 9, 8), 1),
        (nn.Conv2d(4, 4, 3, groups=4, padding=1, bias=False), (2, 4, 6, 7), 4),
        (nn.Conv2d(4, 8, 3, groups=2, dilation=2, padding="same", bias=False), (2, 4, 6, 7), 2),
        (nn.Conv2d(3, 5, 3, padding=2, padding_mode="reflect", bias=False), (2, 3, 6, 7), 1),
    ],
    ids=str,
)  # fmt: skip
def test_moments_are_those_of_gradients(layer: Any, shape: Any, groups: int) -> None:
    """By the weights, sample by sample, and by a bias, which is the weight of a 1."""
    batches = (torch.randn(shape) + 0.3).split([1, shape[0] - 1])
    stats = statistics(layer, *batches)
    found = stats.tensors["weight"]
    assert (found.axis, len(found.mean), stats.samples) == (1, groups, shape[0])
    assert (found.damping, found.gain_db, found.bias) == (0.01, None, None)
    outputs = torch.cat([layer(batch) for batch in batches]).detach().double()
    outputs = outputs.movedim(-1 if layer.weight.ndim == 2 else 1, -1).chunk(groups, -1)
    weights = np.split(layer.weight.detach().double().flatten(1).numpy(), groups)
    for weight, mean, share in zip(weights, found.mean, outputs, strict=True):
        np.testing.assert_allclose(weight @ mean, share.flatten(0, -2).mean(0), atol=1e-5)
    own = [
        (part.clone().requires_grad_(), torch.zeros(len(part), 1, requires_grad=True))
        for part in layer.weight.detach().chunk(groups)
    ]

    def run(inputs: Any) -> Any:
        whole, bias = (torch.cat(parts) for parts in zip(*own, strict=True))
        output = torch.func.functional_call(layer, {"weight": whole}, (inputs,))
        return output + bias.reshape(-1, *[1] * (layer.weight.ndim - 2))

    for moment, square in zip(found.moment, pulled(run, own, *batches), strict=True):
        np.testing.assert_allclose(moment, square, rtol=1e-3, atol=1e-3)
    assert (found.outputs is None) == (layer.weight.ndim > 2)
    if found.outputs is not None:
        (square,) = pulled(run, own, *batches, turned=True)
        np.testing.assert_allclose(found.outputs, square, rtol=1e-3, atol=1e-3)


def test_outputs_make_up_for_one_another_where_that_is_better(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(24, 48), nn.Tanh(), nn.Linear(48, 3))
    inputs = torch.randn(800, 8) @ torch.randn(8, 24)
    stats = calibrate(net, inputs[:500].split(50))
    first, last = (stats.tensors[f"{place}.weight"] for place in (0, 2))
    assert first.outputs is not None
    assert last.outputs is not None
    alone = {name: replace(known, outputs=None) for name, known in stats.tensors.items()}
    checkpoint = from_mapping({n: p.detach().numpy() for n, p in net.named_parameters()})
    expected, errors = net(inputs[500:]), list[float]()
    for path, known in (tmp_path / "1", stats), (tmp_path / "2", replace(stats, tensors=alone)):
        options = PackOptions(calibration=Calibration(known), step_factor=0.5, jobs=1)
        pack_checkpoint(checkpoint, path, options)
        with open_archive(path) as archive, torch.no_grad():
            state = {name: torch.from_numpy(np.array(archive[name])) for name in archive}
            found = torch.func.functional_call(net, state, (inputs[500:],))
            errors.append(float((found - expected).square().mean()))
    assert errors[0] < 0.8 * errors[1]


@pytest.mark.parametrize("layer", [nn.ConvTranspose1d(4, 3, 2, stride=2),
                                   nn.ConvTranspose2d(4, 6, 3, groups=2)], ids=str)  # fmt: skip
def test_inputs_of_transposed_convolutions_lie_along_the_rows(layer: Any) -> None:
    inputs = torch.randn(3, 4, *(5, 6)[: layer.weight.ndim - 2]) + 0.3
    found = statistics(layer, inputs).tensors["weight"]
    assert found.axis == 0
    parts = inputs.movedim(1, -1).chunk(layer.groups, -1)
    for part, moment, mean in zip(parts, found.moment, found.mean, strict=True):
        np.testing.assert_allclose(moment, outer(part), atol=1e-5)
        np.testing.assert_allclose(mean, part.flatten(0, -2).mean(0), atol=1e-5)


class Attention(nn.Module):
    """Queries, keys and values from the columns of one tensor."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.sizes, more = sizes, {"kdim": sizes[1], "vdim": sizes[2]}
        self.inner = nn.MultiheadAttention(sizes[0], 2, batch_first=True, **more)

    def forward(self, inputs: Any, **weights: Any) -> Any:
        parts = tuple(inputs.split(self.sizes, -1))
        return torch.func.functional_call(self.inner, weights, parts)[0]


@pytest.mark.parametrize("sizes", [(8, 8, 8), (8, 5, 6)])
def test_attention(sizes: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    module, inputs = Attention(*sizes).eval(), torch.randn(4, 3, sum(sizes))
    inner, packed = module.inner, len({*sizes}) == 1
    found, leaf = statistics(module, inputs).tensors, inner.out_proj.weight
    named = [("in_proj_weight", place) for place in range(3)]
    if not packed:
        named = [(f"{part}_proj_weight", 0) for part in "qkv"]
    parts = inner.in_proj_weight.detach().chunk(3) if packed else (
        inner.q_proj_weight, inner.k_proj_weight, inner.v_proj_weight
    )  # fmt: skip
    own = [(part.detach().clone().requires_grad_(),) for part in parts]

    def run(inputs: Any) -> Any:
        given = [part for (part,) in own]
        weights = {"in_proj_weight": torch.cat(given)} if packed else {
            name: part for (name, _), part in zip(named, given, strict=True)
        }  # fmt: skip
        return module(inputs, **weights)

    *squares, last = pulled(run, [*own, (leaf,)], inputs)
    for (name, place), square in zip(named, squares, strict=True):
        moment = found[f"inner.{name}"].moment[place, :-1, :-1]
        np.testing.assert_allclose(moment, square, rtol=1e-3, atol=1e-3)
    moment = found["inner.out_proj.weight"].moment[0, :-1, :-1]
    np.testing.assert_allclose(moment, last, rtol=1e-3, atol=1e-3)
    assert found["inner.out_proj.weight"].bias == "inner.out_proj.bias"


class Functional(nn.Module):
    """Weights that plain functions use, as GPT-2's Conv1D; an output layer that is the table."""

    def __init__(self, **shapes: Any) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))

    def forward(self, ids: Any) -> dict[str, Any]:
        self.hidden = torch.addmm(self.shift, self.table[ids], self.inner).relu()
        return {"loss": None, "logits": (self.hidden @ self.outer.T) @ self.table.T}


def test_functions_and_tied_tables() -> None:
    net = Functional(table=(10, 6), inner=(6, 4), outer=(6, 4), shift=4)
    ids = torch.tensor([1, 2, 2, 3, -1, 2])
    found = statistics(net, ids).tensors
    # A table that is an output layer too is known by the inputs of that layer alone.
    table, head = net.table.detach(), net.table.detach().clone().requires_grad_()

    def run(ids: Any) -> Any:
        hidden = torch.addmm(net.shift, table[ids], net.inner).relu()
        return (hidden @ net.outer.T) @ head.T

    squares = pulled(run, [(net.outer,), (head,)], ids)
    for name, square in zip(("outer", "table"), squares, strict=True):
        assert found[name].axis == 1
        np.testing.assert_allclose(found[name].moment[0, :-1, :-1], square, rtol=1e-3, atol=1e-3)
    assert (found["inner"].axis, found["inner"].bias) == (0, "shift")


def test_tables_know_what_the_output_sees() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Embedding(20, 3), nn.Linear(3, 2, bias=False))
    with torch.no_grad():
        module[1].weight.copy_(torch.tensor([[5.0, 0.0, 0.0], [0.0, 0.5, 0.0]]))
    found = statistics(module, *torch.randint(0, 20, (6, 40, 10)))
    seen = np.diagonal(found.tensors["0.weight"].moment[0])[:3]
    np.testing.assert_allclose(seen, [25, 0.25, 0], rtol=0.2)
    assert all(p.requires_grad and p.grad is None for p in module.parameters())


def test_rows_that_are_used_often_have_finer_steps(tmp_path: Path) -> None:
    """Of words as frequent as in text; not of positions, whatever came most."""
    torch.manual_seed(0)
    words, places = nn.Embedding(64, 16), nn.Embedding(64, 16)
    net = nn.Sequential(words, nn.Linear(16, 8, bias=False))
    shares = 1 / (1 + torch.arange(64).roll(32).float())
    batches = torch.multinomial(shares, 2000, True).reshape(10, 10, 20)
    stats = calibrate(net, list(batches), CalibrationConfig(trust_inputs=True))
    stats.save(tmp_path / "stats")
    steps = load_stats(tmp_path / "stats").tensors["0.weight"].row_steps
    assert steps is not None
    assert steps[32:36].max() < 0 < steps[:32].mean()
    arrays = {name: tensor.numpy() for name, tensor in net.state_dict().items()}
    options = PackOptions(calibration=Calibration(stats), jobs=1, step_factor=0.3)
    report = pack_checkpoint(from_mapping(arrays), tmp_path / "m.mp4", options)
    assert report.coded_weights == 64 * 16
    with open_archive(tmp_path / "m.mp4") as archive:
        errors = np.square(archive["0.weight"] - arrays["0.weight"]).mean(1)
    assert 2 * errors[32:36].mean() < errors[:32].mean()
    found = calibrate(nn.Sequential(places, net[1]), [torch.arange(40).expand(3, 40)] * 6)
    assert found.tensors["0.weight"].row_steps is None


def test_what_the_outputs_care_for() -> None:
    """White inputs, 1,000 of them: each of the 48 x 64 errors counts alike, once for each input."""
    torch.manual_seed(1)
    layer, inputs = nn.Linear(64, 48, bias=False), torch.randn(1000, 64).split(50)
    found = calibrate(layer, inputs, CalibrationConfig(trust_inputs=True)).sensitivity
    assert found["weight"] == pytest.approx(1000 * 48 * 64, rel=0.25)
    # Without BatchNorm nobody can tell whether the inputs are good for that.
    assert calibrate(layer, inputs).sensitivity == {}


class Rounded(nn.Linear):
    """What comes out is a number that has no gradient."""

    def forward(self, inputs: Any) -> Any:
        return super().forward(inputs).detach().round()


def test_outputs_without_gradients() -> None:
    inputs = torch.randn(20, 4)
    stats = statistics(Rounded(4, 3), inputs)
    np.testing.assert_allclose(stats.tensors["weight"].moment[0], outer(inputs), atol=1e-5)
    assert "no gradients" in stats.notes[0]


def test_text_counts_by_what_errors_do_to_the_next_token() -> None:
    """A small error of one tensor has a KL divergence of half its harm."""
    torch.manual_seed(0)
    hidden, last = nn.Linear(6, 5, bias=False), nn.Linear(5, 40, bias=False)
    net = nn.Sequential(nn.Embedding(40, 6), hidden, nn.ReLU(), last)
    with torch.no_grad():
        last.weight *= 4
        text = torch.randint(40, (96, 1))
        for _ in range(63):
            spread = net(text[:, -1]).softmax(-1)
            text = torch.cat([text, torch.multinomial(spread, 1)], 1)
    # With so much damping no error makes up for another, and all cost a thousand times as much.
    config = CalibrationConfig(dampings=(1e3,))
    known = calibrate(net, text.split(8), config)
    assert known.confirmed  # by the text itself
    harms = known.sensitivity
    assert {*harms} == {"0.weight", "1.weight", "3.weight"}
    with torch.no_grad():
        before = net(text).log_softmax(-1)
        for name, weight in net.named_parameters():
            if name in harms:
                known, divergence = weight.clone(), 0.0
                for _ in range(10):
                    weight.add_(0.01 * torch.randn_like(weight))
                    after = net(text).log_softmax(-1)
                    divergence += float((before.exp() * (before - after)).sum()) / 10
                    weight.copy_(known)
                assert divergence == pytest.approx(0.5e-4 * harms[name] / 1001, rel=0.3)
    # Of any other text nobody can tell whether it is the right one.
    assert calibrate(net, torch.randint(40, (96, 64)).split(8)).sensitivity == {}


def test_held_back_inputs_unlike_the_others() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(16, 16, bias=False)
    narrow = torch.randn(4, 16, 1) @ torch.ones(1, 16) + 1e-3 * torch.randn(4, 16, 16)
    others = torch.randn(16, 16)
    stats = calibrate(layer, list(narrow))
    good = stats.tensors["weight"]
    bad = calibrate(layer, [*narrow, others - others.mean(1, keepdim=True)])
    assert good.useful
    assert (good.gain_db or 0) > 10
    assert stats.gained.startswith("outputs on inputs held back, without -> with: KL divergence")
    one = calibrate(layer, [torch.cat(list(narrow))])
    assert one.gained.startswith("nothing was held back")
    assert one.tensors["weight"].gain_db is None
    assert not bad.tensors["weight"].useful
    assert any("no better than without" in note for note in bad.notes)


def test_statistics_that_fit_only_their_own_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weightvid.calibrate.trial._LEAST_GAIN_DB", -100.0)
    torch.manual_seed(0)
    config, layer = CalibrationConfig(dampings=(0.001,)), nn.Linear(64, 64, bias=False)
    stats = calibrate(layer, torch.randn(8, 64).split(1), config)
    assert "the model as a whole is no better" in stats.refused
    assert not stats.tensors["weight"].useful


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_numbers_that_are_none_are_named(bad: float) -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    with torch.no_grad():
        module[0].bias[1] = bad
    with pytest.raises(QuantizationError, match=r"'1\.weight' hold NaN or infinity"):
        calibrate(module, [torch.ones(2, 3)])


def test_what_cannot_be_calibrated_says_so() -> None:
    ones = torch.ones(1, 30)
    for module, batches, message in ((nn.Linear(3, 2), [], "no example inputs"),
                                     (nn.ReLU(), [ones], "no layer was seen"),
                                     (nn.Linear(30, 2), [ones], "memory limit")):  # fmt: skip
        with pytest.raises(QuantizationError, match=message):
            calibrate(module, batches, CalibrationConfig(memory_bytes=100))


def test_of_text_the_divergence_counts() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 5)
    shifted, other = logits + 3.0, logits + 0.1 * torch.randn(2, 3, 5)
    assert change_of([logits], [shifted], reads=True) == pytest.approx(0.0, abs=1e-9)
    assert change_of([logits], [shifted]) > change_of([logits], [other]) > 0.0
    known, found = logits.log_softmax(-1), other.log_softmax(-1)
    expected = float((known.exp() * (known - found)).sum())
    assert change_of([logits], [other], reads=True) == pytest.approx(expected, rel=1e-4)
    said = describe_change([logits], [other], 2, reads=True)
    assert said.startswith(f"KL divergence {expected / 6:.3g}, mean squared change")
