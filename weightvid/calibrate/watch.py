"""Seeing every layer's inputs, and summing them up: torch's own functions are watched.

Modules and functional models alike end in a handful of functions (``linear``, ``conv2d``, ...). A
torch function mode sees each call; the weight among its arguments says whose input this is. So
padding modes, wrappers and functional models need no code of their own.

An embedding table has no inputs to shape errors by: an error of a row goes straight to the layers
behind. What they make of it is known from gradients: with random directions r at the model's output
y, the second moment of the gradients of ``r y`` by what was looked up says which errors the output
sees. It takes the place of the inputs' moment, along the columns of the table.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as fn
from torch.overrides import TorchFunctionMode

from weightvid.errors import QuantizationError

_CHUNK_ELEMENTS: Final = 1 << 23
#: dtypes of weights that may be quantized.
_DTYPES: Final = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
#: rows of inputs multiplied at once in float32 before they are added up in float64.
_ROWS: Final = 4096
#: of BatchNorm, as it is by default.
_EPSILON: Final = 1e-5
#: factors of the sums of products: x' x', x x', x x.
_PRODUCTS: Final = ((0, 0), (1, 0), (1, 1))
_ATTENTION: Final = inspect.signature(fn.multi_head_attention_forward)

Means = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Seen:
    """Inputs of one tensor in one call.

    ``inputs`` have the shape (groups, n, C), and lie along ``axis`` of the weight's matrix; axis -1
    means integer rows of an embedding table. ``share`` says which group of how many they are for;
    (0, 1): all. ``gradient``: gradients by what was looked up, in place of inputs. ``harm``, shape
    (n,): squared gradients by what the layer made of each input, summed over its outputs.
    """

    name: str
    inputs: torch.Tensor
    axis: int
    share: tuple[int, int] = (0, 1)
    gradient: bool = False
    harm: torch.Tensor | None = None

    @property
    def groups(self) -> int:
        """Groups of the tensor."""
        return max(len(self.inputs), self.share[1])


class Watch(TorchFunctionMode):  # type: ignore[misc]
    """Reports the inputs of known weights; used as a context manager.

    Weights are recognised by their memory. ``send`` receives every `Seen`, piece by piece; with
    ``gradients`` also those by what is looked up in tables, and, if ``harms`` is set, inputs of
    linear layers as soon as their harm is known; ``norms`` the inputs, running mean and
    running variance of BatchNorm layers. Only ``wanted`` tensors are reported (None: all).
    """

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        send: Callable[[Seen], None],
        gradients: bool = False,
        norms: Callable[[Any, Any, Any], None] | None = None,
        wanted: Collection[str] | None = None,
    ) -> None:
        super().__init__()
        self.send, self.gradients, self._norms = send, gradients, norms
        #: what takes the mean outputs of each call of a weight: a tensor's name, and its sign.
        self._biases: dict[str, list[tuple[str, int] | None]] = defaultdict(list)
        #: the weight of the last call without a bias, and what came out of it.
        self._unbiased: str | None = None
        self._output: tuple[str | None, Any] = None, None
        self.harms = False
        #: inputs of the call that is under way.
        self._waiting: list[Seen] = []
        self._weights: dict[Any, tuple[str, bool]] = {}
        self._vectors: dict[Any, str] = {}
        for name, tensor in tensors.items():
            if tensor.dtype not in _DTYPES or tensor.is_meta or _look(tensor) is None:
                continue
            if tensor.ndim == 1:
                self._vectors.setdefault(_look(tensor), name)
            elif tensor.ndim and (wanted is None or name in wanted):
                self._weights.setdefault(_look(tensor), (name, False))
                if tensor.ndim == 2:
                    self._weights.setdefault(_look(tensor.T), (name, True))

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Look at a call, and let it go on."""
        call = partial(func, *args, **(kwargs or {}))
        if func not in _CALLS:
            return call()
        handler, names = _CALLS[func]
        self._unbiased = None
        result = handler(self, {**dict(zip(names, args, strict=False)), **call.keywords}, call)
        result = call() if result is None else result
        while self._waiting:
            self._report(self._waiting.pop(0), result)
        if self._unbiased is not None:
            self._output = self._unbiased, result
        return result

    def bias_of(self, name: str) -> tuple[str, int] | None:
        """What takes the shifts of a weight's mean outputs: the same in all of its calls."""
        found = set(self._biases[name])
        return found.pop() if len(found) == 1 else None

    def called(self, name: str, bias: Any) -> None:
        """Note a call of a layer, and what is added to its outputs."""
        known = self._vectors.get(_look(bias))
        self._biases[name].append(None if known is None else (known, 1))
        self._unbiased = name if known is None else None

    def normalized(self, inputs: Any, mean: Any, variance: Any) -> None:
        """Note that a running mean is subtracted, from what the layer before puts out."""
        if self._norms is not None and mean is not None and variance is not None:
            self._norms(inputs, mean, variance)
        name, output = self._output
        known = self._vectors.get(_look(mean))
        if name is not None and output is inputs and known is not None:
            self._biases[name][-1] = known, -1
        self._output = None, None

    def name_of(self, weight: Any) -> tuple[str, bool] | None:
        """Name of a weight, and whether it is the transpose of the tensor of that name."""
        return self._weights.get(_look(weight))

    def product(self, inputs: Any, weight: Any, axis: int, bias: Any = None) -> None:
        """Report the inputs of a 2-D weight; along ``axis`` 1 or 0 of the weight as given."""
        found = self.name_of(weight)
        if found is None or weight.ndim != 2 or not isinstance(inputs, torch.Tensor):
            return
        name, transposed = found
        self.called(name, bias)
        self._waiting.append(Seen(name, _rows(inputs), 1 - axis if transposed else axis))

    def _report(self, seen: Seen, output: Any) -> None:
        if not (self.harms and isinstance(output, torch.Tensor) and output.requires_grad):
            self.send(seen)
            return
        inputs = seen.inputs.clone()  # which nothing can change before the gradient comes

        def harmed(gradient: torch.Tensor) -> None:
            harm = _rows(gradient)[0].float().square().sum(1)
            self.send(replace(seen, inputs=inputs, harm=harm))

        output.register_hook(harmed)


def _look(tensor: Any) -> Any:
    """What tells a tensor's memory from any other; None if it has none of its own."""
    if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
        return None
    return (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())


def _rows(inputs: torch.Tensor) -> torch.Tensor:
    return inputs.detach().reshape(1, -1, inputs.shape[-1])


# Each takes the watch, the arguments by name, and the call; what it returns is the call's result.
_Given = Mapping[str, Any]


def _linear(watch: Watch, given: _Given, call: Any) -> None:
    watch.product(given["input"], given["weight"], 1, given.get("bias"))


def _matmul(watch: Watch, given: _Given, call: Any) -> None:
    watch.product(given["input"], given.get("other", given.get("mat2")), 0)


def _addmm(watch: Watch, given: _Given, call: Any) -> None:
    scaled = given.get("beta", 1) != 1 or given.get("alpha", 1) != 1
    watch.product(given["mat1"], given["mat2"], 0, None if scaled else given["input"])


def _batch_norm(watch: Watch, given: _Given, call: Any) -> None:
    watch.normalized(given["input"], given.get("running_mean"), given.get("running_var"))


def _look_up(watch: Watch, given: _Given, call: Any) -> Any:
    """Rows of a table, and later their gradients."""
    found, index = watch.name_of(given["weight"]), given.get("input", given.get("indices"))
    whole = isinstance(index, torch.Tensor) and index.dtype in (torch.int64, torch.int32)
    if found is None or found[1] or not whole:
        return None
    watch.send(Seen(found[0], index.detach(), -1))
    if not (watch.gradients and torch.is_grad_enabled()):
        return None
    leaf = call().detach().requires_grad_()
    leaf.register_hook(lambda g: watch.send(Seen(found[0], _rows(g), 1, gradient=True)))
    return leaf


def _convolution(watch: Watch, given: _Given, call: Any) -> None:
    inputs, weight, found = given["input"], given["weight"], watch.name_of(given["weight"])
    if found is None:
        return
    kernel = tuple(weight.shape[2:])
    dims, groups, padding = len(kernel), given.get("groups", 1), given.get("padding", 0)
    stride, dilation = (_spread(given.get(key, 1), dims) for key in ("stride", "dilation"))
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if padding == "same":
        sides = [(r // 2, r - r // 2) for r in reach]
    else:
        sides = [(p, p) for p in _spread(0 if padding == "valid" else padding, dims)]
    data = inputs.detach() if inputs.ndim == dims + 2 else inputs.detach()[None]
    places = prod(
        (size + sum(side) - r - 1) // s + 1
        for size, side, r, s in zip(data.shape[2:], sides, reach, stride, strict=True)
    )
    step = max(1, _CHUNK_ELEMENTS // max(1, places * data.shape[1] * prod(kernel)))
    watch.called(found[0], given.get("bias"))
    for part in data.split(step):
        patches = fn.pad(part, [side for pair in reversed(sides) for side in pair])
        for dim in range(dims):
            patches = patches.unfold(2 + dim, reach[dim] + 1, stride[dim])
        every = [slice(None, None, d) for d in dilation]
        # (B, C, T1.., k1..) -> (groups, B T, C/groups k)
        patches = patches[(..., *every)].unflatten(1, (groups, -1)).movedim(1, 0)
        patches = patches.movedim(2, 2 + dims)
        rows = patches.reshape(groups, -1, data.shape[1] // groups * prod(kernel))
        watch.send(Seen(found[0], rows, 1))


def _spread(value: Any, dims: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return [int(v) for v in values] * (dims if len(values) == 1 else 1)


def _transposed(watch: Watch, given: _Given, call: Any) -> None:
    inputs, weight, found = given["input"], given["weight"], watch.name_of(given["weight"])
    if found is None:
        return
    data = inputs.detach() if inputs.ndim == weight.ndim else inputs.detach()[None]
    groups = given.get("groups", 1)
    rows = data.movedim(1, -1).unflatten(-1, (groups, -1)).movedim(-2, 0)
    watch.send(Seen(found[0], rows.reshape(groups, -1, data.shape[1] // groups), 0))


def _attention(watch: Watch, given: _Given, call: Any) -> Any:
    bound = _ATTENTION.bind(*call.args, **call.keywords)
    bound.apply_defaults()
    given = bound.arguments
    packed = watch.name_of(given["in_proj_weight"])
    for place, source in enumerate(("query", "key", "value")):
        if given["use_separate_proj_weight"]:
            watch.product(given[source], given[f"{source[0]}_proj_weight"], 1)
        elif packed is not None:
            watch.called(packed[0], given["in_proj_bias"])
            watch.send(Seen(packed[0], _rows(given[source]), 1, (place, 3)))
    projection, bias = given["out_proj_weight"], given["out_proj_bias"]
    if watch.name_of(projection) is None:
        return None
    # With no projection, what comes out is the input of the projection.
    none = torch.eye(projection.shape[1], dtype=projection.dtype, device=projection.device)
    attended, weights = call.func(**{**given, "out_proj_weight": none, "out_proj_bias": None})
    watch.product(attended, projection, 1, bias)
    return fn.linear(attended, projection, bias), weights


_CONVOLVED: Final = ("input", "weight", "bias", "stride", "padding")
#: what handles the calls of a function, and the names of its arguments by place.
_CALLS: Final[dict[Any, tuple[Callable[[Watch, _Given, Any], Any], Sequence[str]]]] = {
    fn.linear: (_linear, ("input", "weight", "bias")),
    torch.addmm: (_addmm, ("input", "mat1", "mat2")),
    fn.embedding: (_look_up, ("input", "weight")),
    torch.embedding: (_look_up, ("weight", "indices")),
    torch.Tensor.__getitem__: (_look_up, ("weight", "indices")),
    fn.batch_norm: (_batch_norm, ("input", "running_mean", "running_var")),
    fn.multi_head_attention_forward: (_attention, ()),
    **dict.fromkeys((torch.matmul, torch.mm, torch.Tensor.matmul, torch.Tensor.__matmul__,
                     torch.Tensor.mm), (_matmul, ("input", "other"))),
    **dict.fromkeys((fn.conv1d, fn.conv2d, fn.conv3d),
                    (_convolution, (*_CONVOLVED, "dilation", "groups"))),
    **dict.fromkeys((fn.conv_transpose1d, fn.conv_transpose2d, fn.conv_transpose3d),
                    (_transposed, (*_CONVOLVED, "output_padding", "groups"))),
}  # fmt: skip


def nats_apart(
    mean: torch.Tensor, variance: torch.Tensor, known: torch.Tensor, known_variance: torch.Tensor
) -> torch.Tensor:
    """Kullback-Leibler divergence of normal distributions from known ones, by channel."""
    ratio = (variance + _EPSILON) / (known_variance + _EPSILON)
    apart = (mean - known).square() / (known_variance + _EPSILON)
    return 0.5 * (ratio + apart - 1.0 - ratio.log())


@dataclass(frozen=True, slots=True, eq=False)
class InputMeans:
    """Means over inputs x' of one tensor, and over the inputs x of the original model with them.

    ``moment``, ``cross`` and ``original`` (groups, C, C) are means of x' x'^T, x x'^T and x x^T,
    ``mean`` and ``original_mean`` (groups, C) those of x' and x. Of one run x' and x are the same.
    """

    moment: Means
    cross: Means
    original: Means
    mean: Means
    original_mean: Means

    def centred(self) -> InputMeans:
        """Covariances in place of second moments."""
        moment = self.moment - self.mean[:, :, None] * self.mean[:, None, :]
        cross = self.cross - self.original_mean[:, :, None] * self.mean[:, None, :]
        return replace(self, moment=moment, cross=cross)


class Sums:
    """Sums over the inputs of one tensor, which the first of them tell the shapes of.

    Inputs count by the harm that errors of what the layer makes of them do, where that is known.
    """

    def __init__(self) -> None:
        #: axis, groups and columns.
        self.form: tuple[int, int, int] | None = None

    def _start(self, seen: Seen, products: int) -> None:
        self.form = self.axis, groups, columns = seen.axis, seen.groups, seen.inputs.shape[-1]
        # Apple's GPUs have no float64.
        device = torch.device("cpu") if seen.inputs.device.type == "mps" else seen.inputs.device
        shape = (products, groups, columns, columns)
        self._square = torch.zeros(shape, dtype=torch.float64, device=device)
        self._total = torch.zeros(shape[:3], dtype=torch.float64, device=device)
        self._rows = np.zeros(groups)

    def add(self, seen: Seen, original: Seen | None = None) -> None:
        """Take in a piece, of both runs if there are two; refuse NaN, infinity, another form."""
        if self.form is None:
            self._start(seen, 1 if original is None else 3)
        if self.form != (seen.axis, seen.groups, seen.inputs.shape[-1]):
            raise QuantizationError(
                f"tensor {seen.name!r} is used in two ways that don't go together"
            )
        place, shares = seen.share
        for group, inputs in enumerate(seen.inputs):
            target = place if shares > 1 else group
            for first in range(0, len(inputs), _ROWS):
                rows = slice(first, first + _ROWS)
                here = [inputs[rows].to(torch.float32)]
                if original is not None:
                    here.append(original.inputs[group][rows].to(torch.float32))
                weighted = [x if seen.harm is None else seen.harm[rows, None] * x for x in here]
                for number, (left, right) in enumerate(_PRODUCTS[: 2 * len(here) - 1]):
                    self._square[number, target] += weighted[left].T @ here[right]
                for number, each in enumerate(weighted):
                    self._total[number, target] += each.sum(0, dtype=torch.float64)
            # Of a NaN or infinity in any input, this diagonal knows.
            if not bool(torch.isfinite(self._square[0, target].diagonal()).all()):
                raise QuantizationError(
                    f"the inputs of tensor {seen.name!r} hold NaN or infinity (or squares "
                    "beyond float32); look at the layer before it, or at the example inputs"
                )
            self._rows[target] += len(inputs) if seen.harm is None else float(seen.harm.sum())

    def add_all(self, other: Sums) -> None:
        """Take in the sums of another one, of the same form."""
        self._square += other._square
        self._total += other._total
        self._rows += other._rows

    @property
    def weight(self) -> float:
        """What all inputs count together."""
        return float(self._rows.sum())

    def means(self) -> InputMeans:
        """Means over all inputs."""
        count = np.where(self._rows > 0, self._rows, 1.0)
        square = list(self._square.cpu().numpy() / count[:, None, None])
        total = self._total.cpu().numpy() / count[:, None]
        moment, cross, original = square if len(square) == 3 else square * 3
        return InputMeans(moment, cross, original, total[0], total[min(1, len(square) - 1)])
