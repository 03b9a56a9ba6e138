"""Models that do what models do: they change things in place, branch, remember, and draw."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import log10
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="calibration needs the extra 'torch'")
from torch import nn  # noqa: E402

from weightvid.calibrate import Calibration, CalibrationConfig, calibrate  # noqa: E402
from weightvid.calibrate.layers import refit  # noqa: E402
from weightvid.calibrate.layouts import Seen  # noqa: E402
from weightvid.calibrate.state import change_of, first_output, running  # noqa: E402
from weightvid.calibrate.sums import Sums  # noqa: E402
from weightvid.calibrate.trial import Check  # noqa: E402
from weightvid.calibrate.watch import Watch  # noqa: E402
from weightvid.checkpoint import from_mapping  # noqa: E402
from weightvid.errors import EvaluationError, QuantizationError  # noqa: E402
from weightvid.pack import PackOptions, pack_checkpoint  # noqa: E402

NO_GRADIENTS = "outputs have no gradients that can be used, to say which errors matter"


def batches(count: int = 5, rows: int = 32, columns: int = 24) -> list[Any]:
    draws = torch.Generator().manual_seed(0)
    mixed = torch.randn(8, columns, generator=draws)
    some = [torch.randn(rows, 8 + columns, generator=draws) for _ in range(count)]
    return [(each[:, :8] @ mixed + 0.2 * each[:, 8:]) / 3 for each in some]


class By(nn.Module):
    """Layers, and what forward does with them."""

    def __init__(self, function: Callable[[Any, Any], Any], **layers: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        for name, shape in layers.items():
            setattr(self, name, nn.Linear(*shape) if isinstance(shape, tuple) else shape)

    def forward(self, x: Any) -> Any:
        return self.function(self, x)


@pytest.fixture
def two() -> dict[str, tuple[int, int]]:
    return {"a": (24, 48), "o": (48, 10)}


def test_scaled_in_place_before_a_norm_its_mean_takes_no_shift() -> None:
    for change, taker in ((lambda y: y, ("n.running_mean", -1)), (lambda y: y.div_(50), None)):
        net = By(
            lambda s, x, change=change: s.n(change(s.c(x))),
            c=nn.Linear(24, 8, bias=False), n=nn.BatchNorm1d(8),
        )  # fmt: skip
        with running(net) as state, Watch(state.tensors, lambda _: None) as watch:
            net(batches()[0])
        assert watch.bias_of("c.weight") == taker


def test_passes_end_once_their_layers_were_seen(tmp_path: Path) -> None:
    """And one for the original model shows as many layers as memory has room for."""
    ran: list[str] = []

    def forward(s: Any, x: Any) -> Any:
        try:
            y = s.b(torch.relu(s.a(x)).detach())
        except Exception:  # which is no place for what ends a pass
            ran.append("caught")
            raise
        ran.append("first")
        y = s.o(torch.relu(y).detach()).detach()
        ran.append("whole")
        return y

    net, made = By(forward, a=(24, 48), b=(48, 48), o=(48, 10)), []
    arrays = {name: tensor.numpy().copy() for name, tensor in net.state_dict().items()}
    for memory in (1 << 30, 130_000):
        config = CalibrationConfig(memory_bytes=memory, trust_inputs=True)
        known = Calibration.from_examples(net, batches(), config)
        assert NO_GRADIENTS in known.stats.notes
        ran.clear()
        path = tmp_path / f"{memory}.mp4"
        options = PackOptions(calibration=known, step_factor=0.5, jobs=1)
        pack_checkpoint(from_mapping(arrays), path, options)
        made.append((ran.count("first"), ran.count("whole"), path.read_bytes()))
    # A look (2, and 1 with gradients), 5 batches for the original and for the last layer of the
    # quantized model, the outputs held back (1) of three models.
    assert made[0][:2] == (3 + 5 + 5 + 3, 3 + 3)
    # A pass for `a` and `b`, whose first batch shows what there is room for; and one for `o`.
    assert made[1] == (made[0][0] + 1, *made[0][1:])
    assert "caught" not in ran


@pytest.mark.parametrize(("forward", "known"), [
    (lambda x, y: x + y, True), (lambda x, y: y + x, True), (lambda x, y: torch.add(y, x), True),
    (lambda x, y: y.add_(x), True), (lambda x, y: x + torch.dropout(y, 0.5, False), True),
    (lambda x, y: y + y, False), (lambda x, y: y + y.pow(3) * 0.1, False),
    (lambda x, y: x + y.relu(), False), (lambda x, y: y + x[0], False),
    (lambda x, y: y + 1, False), (lambda x, y: x.add(x), False),
    (lambda x, y: x + y.mul_(2), False),
    (lambda x, y: (x + 1, y + x)[1], True), (lambda x, y: torch.add(y, x, alpha=2), False),
    (lambda x, y: x + y.view(-1).view(x.shape), True), (lambda x, y: x + y.T.contiguous().T, False),
    (lambda x, y: y + y.view(x.shape), False), (lambda x, y: (y.view(-1), x + y)[1], True),
    (lambda x, y: x + y.view(-1).relu().view(x.shape), False),
])  # fmt: skip
def test_what_a_result_is_added_to(forward: Any, known: bool) -> None:
    net, x = By(lambda s, x: forward(x, s.a(x)), a=(24, 24)), batches()[0]
    with torch.no_grad(), Watch(dict(net.named_parameters())) as watch:
        watch.keeps, watch.sums = lambda *_: True, True
        net(x)
    (seen,) = watch.kept[0].seen()
    assert (seen.added is not None) == known
    assert seen.added is None or torch.equal(seen.added[0], x)


@pytest.mark.parametrize("corrected", [False, True])
def test_weights_make_up_for_what_is_missing_besides(corrected: bool) -> None:
    """Of outputs ``W x + h``, where the quantized model has h' in place of h."""
    draws = np.random.default_rng(0)
    w, mixed = draws.normal(size=(3, 4)), draws.normal(size=(4, 3))
    x = draws.normal(size=(500, 4)) + 1
    near, added = x + 0.1 * draws.normal(size=x.shape), draws.normal(size=(500, 3))
    short = added - 0.3 * near @ mixed - 0.2
    sums, rows = Sums(), lambda matrix: torch.from_numpy(matrix)[None]
    for first in range(0, 500, 100):
        runs = [
            Seen("w", rows(given[first : first + 100]), 1, added=rows(other[first : first + 100]))
            for given, other in ((near, short), (x, added))
        ]
        assert sums.add(*runs)
    means = sums.means()
    check = Check(w.astype(np.float32), 1, means, means)
    found = refit(check, means.inner(corrected), 1e-9)
    shift = check.shift(found) * corrected
    asked = x @ w.T + added - short
    design = np.column_stack([near, np.ones(500)]) if corrected else near
    best = np.linalg.lstsq(design, asked, rcond=None)[0]
    np.testing.assert_allclose(found, best[:4].T, atol=1e-4)
    np.testing.assert_allclose(shift, best[4] if corrected else 0, atol=1e-4)
    off = float(np.square(asked - near @ found.T - shift).mean(0).sum())
    coded = SimpleNamespace(values=found, bits=0.0)
    assert check.cost_db(coded, corrected) == pytest.approx(10 * log10(off), abs=1e-3)


def test_inputs_and_buffers_stay_what_they_are() -> None:
    def forward(s: Any, x: Any) -> Any:
        s.n.running_mean += 1
        x -= 0.3
        return s.o(s.n(x))

    given, net = batches(), By(forward, n=nn.BatchNorm1d(24), o=(24, 10))
    stats = calibrate(net, given)
    assert all(torch.equal(a, b) for a, b in zip(given, batches(), strict=True))
    assert not net.n.running_mean.any()
    again = calibrate(net, given)
    assert (stats.tensors["o.weight"].mean == again.tensors["o.weight"].mean).all()


def test_what_forward_draws_is_the_same_each_time(two: Any) -> None:
    net = By(lambda s, x: s.o(torch.dropout(s.a(x), 0.5, True)), **two)
    torch.manual_seed(7)
    first = torch.rand(3)
    torch.manual_seed(7)
    found = [calibrate(net, batches()) for _ in range(2)]
    assert torch.equal(first, torch.rand(3))
    assert found[0].gained == found[1].gained != ""


def experts(s: Any, x: Any) -> Any:
    some = x[:, 0] > 2.0
    y = torch.zeros_like(x)
    for which, expert in ((some, s.rare), (~some, s.usual)):
        y[which] = expert(x[which])
    return s.o(y)


@pytest.mark.parametrize(
    ("net", "inputs"),
    [
        (By(experts, rare=(24, 24), usual=(24, 24), o=(24, 10)), batches(5, 8)),
        (By(lambda s, x: s.o(s.a(x) * s.t(torch.ones(len(x), 8))), a=(24, 48), t=(8, 48),
            o=(48, 10)), batches()),
        (By(lambda s, x: s.o(s.a(x + 1e4).relu()), a=(24, 48), o=(48, 10)), batches()),
    ],
    ids=["rare", "constant", "far from zero"],
)  # fmt: skip
def test_inputs_that_hardly_vary(net: nn.Module, inputs: list[Any]) -> None:
    stats = calibrate(net, inputs)
    assert stats.tensors["o.weight"].useful
    assert not stats.refused


def remembering(s: Any, x: Any) -> Any:
    s.h = torch.tanh(s.a(x) + getattr(s, "h", 0))
    return s.o(s.h)


class Broken(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(context: Any, x: Any) -> Any:
        return x.clamp(-1, 1)

    @staticmethod
    def backward(context: Any, gradient: Any) -> Any:
        raise ValueError("inference only")


def normalized(s: Any, x: Any) -> Any:
    h = s.a(x * (torch.arange(len(x)) < 20)[:, None])
    return s.o(h / h.square().sum(-1, keepdim=True).sqrt().clamp(min=1e-6))


def asserting(s: Any, x: Any) -> Any:
    h = s.a(x)
    assert not h.requires_grad
    return s.o(h)


@pytest.mark.parametrize(
    "forward",
    [remembering, normalized, asserting, lambda s, x: s.o(Broken.apply(s.a(x))),
     torch.inference_mode()(lambda s, x: s.o(s.a(x)))],
    ids=["remembers", "NaN", "asserts", "broken", "inference"],
)  # fmt: skip
def test_where_gradients_fail_it_goes_without(forward: Any) -> None:
    stats = calibrate(By(forward, a=nn.Linear(24, 48, bias=False), o=(48, 10)), batches())
    assert stats.notes[0] == NO_GRADIENTS
    assert stats.tensors.keys() == {"a.weight", "o.weight"}


def test_a_weight_that_is_used_both_ways_is_left_out() -> None:
    net = By(lambda s, x: s.o(s.a(x) @ s.a.weight), a=(24, 16), o=(24, 10))
    stats = calibrate(net, batches())
    assert stats.tensors.keys() == {"o.weight"}
    assert any("'a.weight' is left out: it is used in two ways" in note for note in stats.notes)


@dataclass
class Found:
    count: int
    boxes: Any


def test_outputs_of_all_kinds(two: Any) -> None:
    plain = By(lambda s, x: s.o(s.a(x)), **two)
    for wrap in (
        lambda y: Found(3, y), lambda y: (y.argmax(1), {"y": y}), torch.Tensor.cfloat,
        lambda y: y[:, 0], lambda y: y.sum(),
    ):  # fmt: skip
        net = By(lambda s, x, wrap=wrap: wrap(plain(x)), net=plain)
        assert first_output(net(batches()[0])) is not None
        assert "without -> with" in calibrate(net, batches()).gained
    for wrap in (torch.argmax, lambda y: y[y > 9]):
        net = By(lambda s, x, wrap=wrap: wrap(plain(x)), net=plain)
        assert calibrate(net, batches()).gained.startswith("outputs cannot be compared")
    detector = [torch.ones(2, 4)], [torch.ones(3, 4)]
    assert change_of(*detector) == 0


def test_bytes_are_tokens_too() -> None:
    net = By(lambda s, x: s.o(s.e(x.long())), e=nn.Embedding(256, 16), o=(16, 256))
    draws = torch.Generator().manual_seed(0)
    texts = [torch.randint(0, 256, (4, 9), dtype=torch.uint8, generator=draws) for _ in range(5)]
    assert {"e.weight", "o.weight"} >= calibrate(net, texts).tensors.keys() > set()


@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions_of_one_sample_without_a_batch(groups: int) -> None:
    torch.manual_seed(0)
    layer, x = nn.Conv2d(8, 6, 3, padding=1, groups=groups), torch.randn(8, 700, 700)

    def seen(inputs: Any) -> list[Seen]:
        found: list[Seen] = []
        with running(layer) as state, torch.enable_grad():
            with Watch(state.tensors, found.append, gradients=True) as watch:
                result = layer(inputs)
            torch.manual_seed(1)
            (result * torch.randn(result.shape[-3:])).sum().backward()
            watch.flush(end=True)
        return found

    for one, other in zip(seen(x), seen(x[None]), strict=True):
        assert torch.equal(one.inputs, other.inputs)
        assert torch.equal(one.pulls, other.pulls)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (batches()[0], r"of type Tensor, not a list of batches; of one tensor, give inputs\.split"),
        ({"x": batches()[0]}, "of type dict, not a list"),
        (None, "of type NoneType, not a list"),
        ([1, 2], "batch 0 is of type int; a batch is a tensor"),
        ([(3, None)], "batch 0 is of type tuple"),
        ([batches()[0][:0]], "no example inputs"),
    ],
)
def test_inputs_that_are_none(inputs: Iterable[Any], message: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        calibrate(nn.Linear(24, 10), inputs)


def test_inputs_that_fail_say_how() -> None:
    def endless() -> Iterable[Any]:
        yield batches()[0]
        raise OSError("disk gone")

    with pytest.raises(EvaluationError, match=r"example inputs fail: OSError: disk gone"):
        calibrate(nn.Linear(24, 10), endless())


def test_a_module_that_fails_says_how() -> None:
    with pytest.raises(EvaluationError, match=r"fails on example inputs: TypeError: .*takes 2"):
        calibrate(nn.Linear(24, 10), [[x, x] for x in batches()])  # as a DataLoader gives them
    with pytest.raises(EvaluationError, match=r"RuntimeError: mat1 and mat2 shapes"):
        calibrate(nn.Linear(3, 10), batches())


def test_weights_that_cannot_be_replaced_are_named() -> None:
    with torch.inference_mode():
        frozen = nn.Linear(24, 10)
    shared = nn.Linear(24, 10)
    shared.weight = nn.Parameter(torch.randn(1, 24).expand(10, 24))
    for net, why in (
        (frozen, "tensor 'weight' of the module was made in inference mode"),
        (nn.LazyLinear(10), "tensor 'weight' of the module has no shape yet"),
        (shared, "tensor 'weight' of the module has elements that share memory"),
    ):
        with pytest.raises(QuantizationError, match=why):
            calibrate(net, batches())


def test_a_table_that_forward_scales_down_stays_what_it_is(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(300, 24, max_norm=1.0), nn.Linear(24, 32))
    arrays = {name: tensor.numpy().copy() for name, tensor in net.state_dict().items()}
    known = calibrate(net, torch.randint(0, 300, (100, 8)).split(20))
    assert (net.state_dict()["0.weight"].numpy() == arrays["0.weight"]).all()
    options = PackOptions(calibration=Calibration(known), jobs=1)
    pack_checkpoint(from_mapping(arrays), tmp_path / "m.mp4", options)
