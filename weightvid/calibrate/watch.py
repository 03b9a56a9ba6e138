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
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Final

import torch
from torch.nn import functional as fn
from torch.overrides import TorchFunctionMode

from weightvid.calibrate.domain import NormCheck

_CHUNK_ELEMENTS: Final = 1 << 23
#: dtypes of weights that may be quantized.
_DTYPES: Final = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_MHA: Final = inspect.signature(fn.multi_head_attention_forward)


@dataclass(frozen=True, slots=True)
class Seen:
    """Inputs of one tensor in one call.

    Attributes
    ----------
    name : str
        Of the weight, in the state dict.
    inputs : torch.Tensor
        Shape (groups, n, C); or, for an embedding table, integer rows of any shape.
    axis : int
        Axis of the weight's matrix along which inputs lie; -1: an embedding table.
    share : tuple of int
        Which group of how many these inputs are for; (0, 1): all.
    gradient : bool
        Gradients by what was looked up in a table, in place of inputs.
    bias : str or None
        Name of what is added to the layer's output.
    """

    name: str
    inputs: torch.Tensor
    axis: int
    share: tuple[int, int] = (0, 1)
    gradient: bool = False
    bias: str | None = None


class Enough(Exception):  # noqa: N818 - no error
    """Ends a run of which nothing more is wanted."""


Sink = Callable[[Seen], None]


class Watch(TorchFunctionMode):  # type: ignore[misc]
    """Reports the inputs of known weights; used as a context manager.

    Parameters
    ----------
    tensors : mapping of str to torch.Tensor
        The model's state dict. Weights are recognised by their memory.
    sink : callable
        Receives every `Seen`, piece by piece, on the model's device.
    gradients : bool
        Make what is looked up in embedding tables a leaf of the graph, and report its gradients.
    norms : NormCheck, optional
        Looks at the inputs of BatchNorm layers.
    wanted : collection of str, optional
        Tensors that are reported; all others cost nothing. None: all.
    stop : str, optional
        A tensor whose use ends the run, by an `Enough`.
    """

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        sink: Sink,
        gradients: bool = False,
        norms: NormCheck | None = None,
        wanted: Collection[str] | None = None,
        stop: str | None = None,
    ) -> None:
        super().__init__()
        self._norms = norms
        self._sink = sink
        self._gradients = gradients
        self._names: dict[Any, tuple[str, bool]] = {}
        self._biases = {
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
        self._stop = stop

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Look at a call, and let it go on."""
        handler = _HANDLERS.get(func)
        given = kwargs or {}
        if func is fn.batch_norm and self._norms is not None:
            self._norms.see(args, given)
        if handler is not None:
            result = handler(self, func, args, given)
            if result is not None:
                return result
        return func(*args, **given)

    def name_of(self, weight: Any) -> tuple[str, bool] | None:
        """Name of a weight, and whether it is the transpose of the tensor of that name."""
        if not isinstance(weight, torch.Tensor) or weight.layout != torch.strided:
            return None
        found = self._names.get(_look(weight))
        if found is not None and found[0] == self._stop:
            raise Enough
        return found

    def bias_of(self, bias: Any) -> str | None:
        """Name of a bias, if it is a whole tensor of the model."""
        if not isinstance(bias, torch.Tensor) or bias.layout != torch.strided:
            return None
        return self._biases.get(_look(bias))

    def matrix_product(
        self, inputs: torch.Tensor, weight: Any, axis: int, bias: Any = None
    ) -> None:
        """Report the inputs of a 2-D weight; along ``axis`` 1 or 0 of the weight as given."""
        found = self.name_of(weight)
        if found is None or weight.ndim != 2:
            return
        name, transposed = found
        rows = inputs.detach().reshape(1, -1, inputs.shape[-1])
        along = 1 - axis if transposed else axis
        self._sink(Seen(name, rows, along, bias=self.bias_of(bias)))

    def send(self, seen: Seen) -> None:
        """Report inputs as they are."""
        self._sink(seen)

    def look_up(self, weight: Any, index: Any, call: Callable[[], Any]) -> Any:
        """Report rows of a table that are looked up by ``call``, and later their gradients."""
        found = self.name_of(weight)
        if found is None or found[1] or not isinstance(index, torch.Tensor):
            return None
        name = found[0]
        self._sink(Seen(name, index.detach(), -1))
        if not (self._gradients and torch.is_grad_enabled()):
            return None
        leaf = call().detach().requires_grad_()
        columns = leaf.shape[-1]
        leaf.register_hook(
            lambda gradient: self._sink(
                Seen(name, gradient.detach().reshape(1, -1, columns), 1, gradient=True)
            )
        )
        return leaf


def _look(tensor: torch.Tensor) -> Any:
    return (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())


def _argument(args: Sequence[Any], kwargs: Mapping[str, Any], place: int, name: str) -> Any:
    return args[place] if len(args) > place else kwargs.get(name)


def _linear(watch: Watch, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    watch.matrix_product(
        _argument(args, kwargs, 0, "input"),
        _argument(args, kwargs, 1, "weight"),
        1,
        _argument(args, kwargs, 2, "bias"),
    )


def _matmul(watch: Watch, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    left, right = args[0], _argument(args, kwargs, 1, "other")
    if right is None:
        right = kwargs.get("mat2")
    if isinstance(left, torch.Tensor) and left.ndim >= 1:
        watch.matrix_product(left, right, 0)


def _addmm(watch: Watch, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    left, right = _argument(args, kwargs, 1, "mat1"), _argument(args, kwargs, 2, "mat2")
    scaled = kwargs.get("beta", 1) != 1 or kwargs.get("alpha", 1) != 1
    bias = None if scaled else _argument(args, kwargs, 0, "input")
    watch.matrix_product(left, right, 0, bias)


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
        both = _spread(0 if padding in (None, "valid") else padding, dims, 0)
        sides = [(p, p) for p in both]
    data = inputs.detach() if inputs.ndim == dims + 2 else inputs.detach()[None]
    outputs = prod(
        (size + sum(side) - r - 1) // s + 1
        for size, side, r, s in zip(data.shape[2:], sides, reach, stride, strict=True)
    )
    step = max(1, _CHUNK_ELEMENTS // max(1, outputs * data.shape[1] * prod(kernel)))
    bias = watch.bias_of(_argument(args, kwargs, 2, "bias"))
    for part in data.split(step):
        patches = fn.pad(part, [side for pair in reversed(sides) for side in pair])
        for dim in range(dims):
            patches = patches.unfold(2 + dim, reach[dim] + 1, stride[dim])
        for dim in range(dims):
            patches = patches[(..., *[slice(None)] * dim, slice(None, None, dilation[dim]),
                               *[slice(None)] * (dims - dim - 1))]  # fmt: skip
        # (B, C, T1.., k1..) -> (groups, B T, C/groups k)
        patches = patches.unflatten(1, (groups, -1)).movedim(1, 0)
        patches = patches.movedim(2, 2 + dims)
        rows = patches.reshape(groups, -1, data.shape[1] // groups * prod(kernel))
        watch.send(Seen(found[0], rows, 1, bias=bias))


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
    bound = _MHA.bind(*args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    sources = [given["query"], given["key"], given["value"]]
    packed = watch.name_of(given["in_proj_weight"])
    for place, inputs in enumerate(sources):
        rows = inputs.detach().reshape(1, -1, inputs.shape[-1])
        if given["use_separate_proj_weight"]:
            weight = given[("q_proj_weight", "k_proj_weight", "v_proj_weight")[place]]
            watch.matrix_product(inputs, weight, 1)
        elif packed is not None:
            bias = watch.bias_of(given["in_proj_bias"])
            watch.send(Seen(packed[0], rows, 1, (place, 3), bias=bias))
    projection = given["out_proj_weight"]
    if watch.name_of(projection) is not None:
        # With no projection, what comes out is the input of the projection.
        bare = dict(given)
        size = projection.shape[1]
        bare["out_proj_weight"] = torch.eye(size, dtype=projection.dtype, device=projection.device)
        bare["out_proj_bias"] = None
        attended, weights = func(**bare)
        watch.matrix_product(attended, projection, 1, given["out_proj_bias"])
        return fn.linear(attended, projection, given["out_proj_bias"]), weights
    return None


def _spread(value: Any, dims: int, default: int) -> list[int]:
    if value is None:
        value = default
    if isinstance(value, int):
        return [value] * dims
    values = [int(v) for v in value]
    return values * dims if len(values) == 1 else values


_Handler = Callable[[Watch, Any, Sequence[Any], Mapping[str, Any]], Any]
_HANDLERS: Final[dict[Any, _Handler]] = {
    fn.linear: _linear,
    torch.matmul: _matmul,
    torch.mm: _matmul,
    torch.Tensor.matmul: _matmul,
    torch.Tensor.__matmul__: _matmul,
    torch.Tensor.mm: _matmul,
    torch.addmm: _addmm,
    fn.embedding: _embedding,
    torch.embedding: _embedding,
    torch.Tensor.__getitem__: _get_item,
    fn.conv1d: _convolution,
    fn.conv2d: _convolution,
    fn.conv3d: _convolution,
    fn.conv_transpose1d: _transposed,
    fn.conv_transpose2d: _transposed,
    fn.conv_transpose3d: _transposed,
    fn.multi_head_attention_forward: _attention,
}
