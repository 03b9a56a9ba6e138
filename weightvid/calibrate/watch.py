"""Seeing every layer's inputs: torch's own functions are watched while the model runs.

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
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Final

import torch
from torch.nn import functional as fn
from torch.overrides import TorchFunctionMode

_CHUNK_ELEMENTS: Final = 1 << 23
#: dtypes of weights that may be quantized.
_DTYPES: Final = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_ATTENTION: Final = inspect.signature(fn.multi_head_attention_forward)

#: a tensor that makes up for shifts of mean outputs, and its sign.
Bias = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Seen:
    """Inputs of one tensor in one call.

    ``inputs`` have the shape (groups, n, C), and lie along ``axis`` of the weight's matrix; axis -1
    means integer rows of an embedding table. ``share`` says which group of how many they are for;
    (0, 1): all. ``gradient``: gradients by what was looked up, in place of inputs.
    """

    name: str
    inputs: torch.Tensor
    axis: int
    share: tuple[int, int] = (0, 1)
    gradient: bool = False

    @property
    def groups(self) -> int:
        """Groups of the tensor."""
        return max(len(self.inputs), self.share[1])


class Enough(Exception):  # noqa: N818 - no error
    """Ends a run of which nothing more is wanted."""


class Watch(TorchFunctionMode):  # type: ignore[misc]
    """Reports the inputs of known weights; used as a context manager.

    Weights are recognised by their memory. ``sink`` receives every `Seen`, piece by piece; with
    ``gradients`` also those by what is looked up in tables; ``norms`` the inputs, running mean and
    running variance of BatchNorm layers. Only ``wanted`` tensors are reported (None: all), and the
    use of ``stop`` ends the run by an `Enough`.
    """

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        sink: Callable[[Seen], None],
        gradients: bool = False,
        norms: Callable[[Any, Any, Any], None] | None = None,
        wanted: Collection[str] | None = None,
        stop: str | None = None,
    ) -> None:
        super().__init__()
        self.send, self._gradients, self._norms, self._stop = sink, gradients, norms, stop
        self._calls: Counter[str] = Counter()
        self._biased: Counter[tuple[str, Bias]] = Counter()
        #: the weight of the last call, and what came out of it.
        self._last: str | None = None
        self._output: tuple[str | None, Any] = None, None
        self._names: dict[Any, tuple[str, bool]] = {}
        self._vectors = {
            _look(tensor): name
            for name, tensor in reversed(list(tensors.items()))
            if tensor.ndim == 1 and tensor.dtype in _DTYPES and not tensor.is_meta
        }
        for name, tensor in tensors.items():
            if tensor.ndim < 2 or tensor.is_meta or tensor.dtype not in _DTYPES:
                continue
            self._names.setdefault(_look(tensor), (name, False))
            if tensor.ndim == 2:
                self._names.setdefault(_look(tensor.T), (name, True))
        if wanted is not None:
            kept = {*wanted, stop}
            self._names = {key: to for key, to in self._names.items() if to[0] in kept}

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Look at a call, and let it go on."""
        given = kwargs or {}
        if func is fn.batch_norm:
            self._batch_norm(*(_argument(args, given, place, name) for place, name in _NORM))
        handler = _HANDLERS.get(func)
        if handler is None:
            return func(*args, **given)
        self._last = None
        result = handler(self, func, args, given)
        result = func(*args, **given) if result is None else result
        if self._last is not None:
            self._output = self._last, result
        return result

    def bias_of(self, name: str) -> Bias | None:
        """What takes the shifts of a weight's mean outputs: the same in all of its calls."""
        found = [bias for (weight, bias) in self._biased if weight == name]
        if len(found) == 1 and self._biased[name, found[0]] == self._calls[name]:
            return found[0]
        return None

    def _batch_norm(self, inputs: Any, mean: Any, variance: Any) -> None:
        """A running mean is subtracted from what the layer before puts out."""
        if self._norms is not None and mean is not None and variance is not None:
            self._norms(inputs, mean, variance)
        name, output = self._output
        if name is not None and output is inputs:
            self._note_bias(name, mean, -1)
        self._output = None, None

    def _note_bias(self, name: str, bias: Any, sign: int = 1) -> None:
        known = self._vectors.get(_look(bias)) if isinstance(bias, torch.Tensor) else None
        if known is not None:
            self._biased[name, (known, sign)] += 1
            self._last = None  # what comes after has no further bias to give

    def called(self, name: str, bias: Any) -> None:
        """Note a call of a layer, and what is added to its outputs."""
        self._calls[name] += 1
        self._last = name
        self._note_bias(name, bias)

    def name_of(self, weight: Any) -> tuple[str, bool] | None:
        """Name of a weight, and whether it is the transpose of the tensor of that name."""
        if not isinstance(weight, torch.Tensor) or weight.layout != torch.strided:
            return None
        found = self._names.get(_look(weight))
        if found is not None and found[0] == self._stop:
            raise Enough
        return found

    def product(self, inputs: Any, weight: Any, axis: int, bias: Any = None) -> None:
        """Report the inputs of a 2-D weight; along ``axis`` 1 or 0 of the weight as given."""
        found = self.name_of(weight)
        if found is None or weight.ndim != 2 or not isinstance(inputs, torch.Tensor):
            return
        name, transposed = found
        rows = inputs.detach().reshape(1, -1, inputs.shape[-1])
        self.called(name, bias)
        self.send(Seen(name, rows, 1 - axis if transposed else axis))

    def look_up(self, weight: Any, index: Any, call: Callable[[], Any]) -> Any:
        """Report rows of a table that are looked up by ``call``, and later their gradients."""
        found = self.name_of(weight)
        if found is None or found[1] or not isinstance(index, torch.Tensor):
            return None
        name = found[0]
        self.send(Seen(name, index.detach(), -1))
        if not (self._gradients and torch.is_grad_enabled()):
            return None
        leaf = call().detach().requires_grad_()
        columns = leaf.shape[-1]

        def sent(gradient: torch.Tensor) -> None:
            self.send(Seen(name, gradient.detach().reshape(1, -1, columns), 1, gradient=True))

        leaf.register_hook(sent)
        return leaf


def _look(tensor: torch.Tensor) -> Any:
    if tensor.layout != torch.strided:
        return None
    return (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())


def _argument(args: Sequence[Any], kwargs: Mapping[str, Any], place: int, name: str) -> Any:
    return args[place] if len(args) > place else kwargs.get(name)


def _linear(watch: Watch, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    given = enumerate(("input", "weight", "bias"))
    inputs, weight, bias = (_argument(args, kwargs, place, name) for place, name in given)
    watch.product(inputs, weight, 1, bias)


def _matmul(watch: Watch, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    left, right = args[0], _argument(args, kwargs, 1, "other")
    right = kwargs.get("mat2") if right is None else right
    if isinstance(left, torch.Tensor) and left.ndim >= 1:
        watch.product(left, right, 0)


def _addmm(watch: Watch, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    left, right = _argument(args, kwargs, 1, "mat1"), _argument(args, kwargs, 2, "mat2")
    scaled = kwargs.get("beta", 1) != 1 or kwargs.get("alpha", 1) != 1
    watch.product(left, right, 0, None if scaled else _argument(args, kwargs, 0, "input"))


def _embedding(watch: Watch, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    first, second = _argument(args, kwargs, 0, "input"), _argument(args, kwargs, 1, "weight")
    if func is torch.embedding:
        first, second = second if second is not None else kwargs.get("indices"), first
    return watch.look_up(second, first, lambda: func(*args, **kwargs))


def _get_item(watch: Watch, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    index = args[1]
    if isinstance(index, torch.Tensor) and index.dtype in (torch.int64, torch.int32):
        return watch.look_up(args[0], index, lambda: func(*args, **kwargs))
    return None


def _convolution(watch: Watch, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    inputs, weight = _argument(args, kwargs, 0, "input"), _argument(args, kwargs, 1, "weight")
    found = watch.name_of(weight)
    if found is None:
        return
    kernel = tuple(weight.shape[2:])
    dims = len(kernel)
    stride = _spread(_argument(args, kwargs, 3, "stride"), dims, 1)
    dilation = _spread(_argument(args, kwargs, 5, "dilation"), dims, 1)
    groups = _argument(args, kwargs, 6, "groups") or 1
    padding = _argument(args, kwargs, 4, "padding")
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if padding == "same":
        sides = [(r // 2, r - r // 2) for r in reach]
    else:
        sides = [(p, p) for p in _spread(None if padding == "valid" else padding, dims, 0)]
    data = inputs.detach() if inputs.ndim == dims + 2 else inputs.detach()[None]
    places = prod(
        (size + sum(side) - r - 1) // s + 1
        for size, side, r, s in zip(data.shape[2:], sides, reach, stride, strict=True)
    )
    step = max(1, _CHUNK_ELEMENTS // max(1, places * data.shape[1] * prod(kernel)))
    watch.called(found[0], _argument(args, kwargs, 2, "bias"))
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


def _transposed(watch: Watch, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    inputs, weight = _argument(args, kwargs, 0, "input"), _argument(args, kwargs, 1, "weight")
    found = watch.name_of(weight)
    if found is None:
        return
    data = inputs.detach() if inputs.ndim == weight.ndim else inputs.detach()[None]
    groups = _argument(args, kwargs, 6, "groups") or 1
    rows = data.movedim(1, -1).unflatten(-1, (groups, -1)).movedim(-2, 0)
    watch.send(Seen(found[0], rows.reshape(groups, -1, data.shape[1] // groups), 0))


def _attention(watch: Watch, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    bound = _ATTENTION.bind(*args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    packed = watch.name_of(given["in_proj_weight"])
    if given["use_separate_proj_weight"]:
        for source in ("query", "key", "value"):
            watch.product(given[source], given[f"{source[0]}_proj_weight"], 1)
    elif packed is not None:
        watch.called(packed[0], given["in_proj_bias"])
        for place, source in enumerate(("query", "key", "value")):
            rows = given[source].detach().reshape(1, -1, given[source].shape[-1])
            watch.send(Seen(packed[0], rows, 1, (place, 3)))
    projection = given["out_proj_weight"]
    if watch.name_of(projection) is None:
        return None
    # With no projection, what comes out is the input of the projection.
    bare = dict(given)
    size = projection.shape[1]
    bare["out_proj_weight"] = torch.eye(size, dtype=projection.dtype, device=projection.device)
    bare["out_proj_bias"] = None
    attended, weights = func(**bare)
    watch.product(attended, projection, 1, given["out_proj_bias"])
    return fn.linear(attended, projection, given["out_proj_bias"]), weights


def _spread(value: Any, dims: int, default: int) -> list[int]:
    values = [default] if value is None else [value] if isinstance(value, int) else list(value)
    return [int(v) for v in values] * (dims if len(values) == 1 else 1)


_NORM: Final = tuple(enumerate(("input", "running_mean", "running_var")))
_Handler = Callable[[Watch, Any, Sequence[Any], Mapping[str, Any]], Any]
_HANDLERS: Final[dict[Any, _Handler]] = {
    fn.linear: _linear,
    torch.addmm: _addmm,
    fn.embedding: _embedding,
    torch.embedding: _embedding,
    torch.Tensor.__getitem__: _get_item,
    fn.multi_head_attention_forward: _attention,
    **dict.fromkeys((torch.matmul, torch.mm, torch.Tensor.matmul, torch.Tensor.__matmul__,
                     torch.Tensor.mm), _matmul),
    **dict.fromkeys((fn.conv1d, fn.conv2d, fn.conv3d), _convolution),
    **dict.fromkeys((fn.conv_transpose1d, fn.conv_transpose2d, fn.conv_transpose3d), _transposed),
}  # fmt: skip
