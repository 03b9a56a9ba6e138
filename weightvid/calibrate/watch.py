"""Seeing every layer's inputs, and what pulls at them: torch's own functions are watched.

Modules and functional models alike end in a handful of functions (``linear``, ``conv2d``, ...). A
torch function mode sees each call; the weight among its arguments says whose input this is. So
padding modes, wrappers and functional models need no code of their own.

Not every output of a layer matters as much as the next, and the errors that a weight makes at many
places of a sample add up. With random directions r at the model's output y, the gradient of
``r y`` by the weights is, for each sample, ``A = sum_t g_t x_t'`` over the places t where the layer
is used, x being its inputs and g the gradients by what it makes of them: what **pulls** at it. An
error E of the weights changes ``r y`` by ``<A, E>``. So the second moment of the rows of A takes
the place of the inputs' own. An embedding table has no inputs; there the gradients by what was
looked up do.

Sources: Martens and Grosse, "Optimizing neural networks with Kronecker-factored approximate
curvature", 2015; Tseng et al., "Model-preserving adaptive rounding", 2025.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from typing import Any, Final

import torch
from torch.nn import functional as fn
from torch.overrides import TorchFunctionMode

_CHUNK_ELEMENTS: Final = 1 << 23
#: dtypes of weights that may be quantized.
_DTYPES: Final = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_ATTENTION: Final = inspect.signature(fn.multi_head_attention_forward)

#: lays out the inputs of a call, and the gradients by its result, of all turns, if they are known.
Lay = Callable[[torch.Tensor, "torch.Tensor | None"], "Iterator[Seen]"]


@dataclass(frozen=True, slots=True)
class Seen:
    """Inputs of one tensor in one call.

    ``inputs`` have the shape (groups, n, C), and lie along ``axis`` of the weight's matrix; axis -1
    means integer rows of an embedding table. ``share`` says which group of how many they are for;
    (0, 1): all. They are of so many ``samples``. ``pulls``, shape (turns, groups, n, O), are the
    gradients by what the layer made of them. ``looked_up``: gradients by rows of a table, in place
    of inputs. ``added``, shape (groups, n, O): what the results were added to, if it is known.
    """

    name: str
    inputs: torch.Tensor
    axis: int
    share: tuple[int, int] = (0, 1)
    samples: int = 1
    pulls: torch.Tensor | None = None
    looked_up: bool = False
    added: torch.Tensor | None = None

    @property
    def groups(self) -> int:
        """Groups of the tensor."""
        return max(len(self.inputs), self.share[1])


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """Inputs of a call, as they were, and gradients by its result, of as many turns as came.

    And at most one tensor of the result's shape, which it was added to.
    """

    name: str
    inputs: torch.Tensor
    lay: Lay
    pulls: list[torch.Tensor] = field(default_factory=list)
    added: list[torch.Tensor] = field(default_factory=list)

    def seen(self) -> Iterator[Seen]:
        """The inputs, laid out piece by piece."""
        laid = self.lay(self.inputs, torch.stack(self.pulls) if self.pulls else None)
        if not self.added:
            return laid
        # Results, what they are added to and gradients by them have one layout.
        beside = self.lay(self.inputs, self.added[0][None])
        pairs = zip(laid, beside, strict=True)
        return (replace(a, added=None if b.pulls is None else b.pulls[0]) for a, b in pairs)


class Enough(BaseException):
    """Ends a forward pass that has nothing more to show; no `except Exception` stops it."""


class Watch(TorchFunctionMode):  # type: ignore[misc]
    """Reports the inputs of known weights; used as a context manager.

    Weights are recognised by their memory. ``send`` receives every `Seen`, piece by piece; with
    ``gradients`` when `flush` is called after some turns of ``backward``, and gradients of what is
    looked up in tables too; ``norms`` the inputs, running mean and running variance of BatchNorm
    layers. Only ``wanted`` tensors are reported (None: all).
    """

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        send: Callable[[Seen], None] = lambda _: None,
        gradients: bool = False,
        norms: Callable[[Any, Any, Any], None] | None = None,
        wanted: Collection[str] | None = None,
    ) -> None:
        super().__init__()
        self.send, self.gradients, self._norms = send, gradients, norms
        #: what takes the mean outputs of each call of a weight: a tensor's name, and its sign.
        self._biases: dict[str, list[tuple[str, int] | None]] = defaultdict(list)
        #: the weight of the last call without a bias, and what came out of it, in which version.
        self._unbiased: str | None = None
        self._output: tuple[str | None, Any, int | None] = None, None, None
        #: each place of a sample counts alone, as the tokens of a text do.
        self.alone = False
        #: of a name, bytes of inputs and of the result: whether a call stays in `kept`, or is
        #: forgotten; None: all are reported.
        self.keeps: Callable[[str, int, int], bool] | None = None
        #: after so many calls of these layers `Enough` is raised.
        self.until: Mapping[str, float] = {}
        #: calls that are kept learn what their results are added to; until the next layer is
        #: called, which `Enough` waits for.
        self.sums = False
        self._made: tuple[Call, Any, int | None] | None = None
        #: ids of what came since, and may depend on that result.
        self._later = set[int]()
        #: what the call that is under way is to report.
        self._waiting: list[Call] = []
        self.kept: list[Call] = []
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
        if func in _ADDS and len(args) == 2 and not kwargs:
            self._add(*args)
        if func not in _CALLS:
            return self._came(call())
        if self._seen_all():
            raise Enough
        handler, names = _CALLS[func]
        self._unbiased = None
        result = handler(self, {**dict(zip(names, args, strict=False)), **call.keywords}, call)
        result = call() if result is None else result
        result = self.reported(result)
        if self._seen_all() and not self.sums:
            raise Enough
        if self._unbiased is not None:
            self._output = self._unbiased, result, _version(result)
        return self._came(result)

    def bias_of(self, name: str) -> tuple[str, int] | None:
        """What takes the shifts of a weight's mean outputs: the same in all of its calls."""
        found = set(self._biases.get(name, ()))
        return found.pop() if len(found) == 1 else None

    @property
    def calls(self) -> dict[str, int]:
        """How often each layer was called."""
        return {name: len(found) for name, found in self._biases.items()}

    def called(self, name: str, bias: Any) -> None:
        """Note a call of a layer, and what is added to its outputs."""
        known = self._vectors.get(_look(bias))
        self._biases[name].append(None if known is None else (known, 1))
        self._unbiased = name if known is None else None

    def normalized(self, inputs: Any, mean: Any, variance: Any) -> None:
        """Note that a running mean is subtracted, from what the layer before puts out."""
        if self._norms is not None and mean is not None and variance is not None:
            self._norms(inputs, mean, variance)
        name, *output = self._output
        known = self._vectors.get(_look(mean))
        same = output[0] is inputs and output[1] == _version(inputs)
        if name is not None and same and known is not None:
            self._biases[name][-1] = known, -1
        self._output = None, None, None

    def name_of(self, weight: Any) -> tuple[str, bool] | None:
        """Name of a weight, and whether it is the transpose of the tensor of that name."""
        return self._weights.get(_look(weight))

    def product(
        self, inputs: Any, weight: Any, axis: int, bias: Any = None, share: tuple[int, int] = (0, 1)
    ) -> None:
        """Report the inputs of a 2-D weight; along ``axis`` 1 or 0 of the weight as given."""
        found = self.name_of(weight)
        if found is None or weight.ndim != 2 or not isinstance(inputs, torch.Tensor):
            return
        name, transposed = found
        self.called(name, bias)
        axis = 1 - axis if transposed else axis
        samples = inputs.shape[:-1].numel() if self.alone else len(inputs)

        def lay(inputs: torch.Tensor, pulls: torch.Tensor | None) -> Iterator[Seen]:
            rows = _rows(inputs)
            own = None if pulls is None else pulls.reshape(len(pulls), *rows.shape[:2], -1)
            yield Seen(name, rows, axis, share, samples, own)

        self.wait(name, inputs, lay)

    def wait(self, name: str, inputs: torch.Tensor, lay: Lay) -> None:
        """Report some inputs, which a function lays out, when the call has its result."""
        self._waiting.append(Call(name, inputs.detach(), lay))

    def _seen_all(self) -> bool:
        return bool(self.until) and self.until == self.calls

    def _came(self, result: Any) -> Any:
        if self._made is not None:
            self._later.add(id(result))
        return result

    def _add(self, one: Any, other: Any) -> None:
        """Note what the result of the last call is added to, if that is one of both."""
        call, result, version = self._made or (None, None, None)
        if call is None or not (one is result or other is result) or version != _version(result):
            return
        self._made, other = None, other if one is result else one
        alike = isinstance(other, torch.Tensor) and other.shape == result.shape
        if alike and other.numel() and id(other) not in self._later:
            call.added.append(other.detach().clone())

    def reported(self, result: Any) -> Any:
        """The result of the call whose inputs wait, which gradients come to if they are wanted."""
        gradients = self.gradients and torch.is_grad_enabled()
        while self._waiting:
            call = self._waiting.pop(0)
            if self.keeps is not None:
                if not self.keeps(call.name, call.inputs.nbytes, result.nbytes):
                    continue
            elif not gradients:
                for seen in call.seen():
                    self.send(seen)
                continue
            # Of the inputs as they are now, whatever changes them later.
            self.kept.append(replace(call, inputs=call.inputs.clone()))
            if gradients:
                if not result.requires_grad:
                    result = result.detach().requires_grad_().clone()
                result.register_hook(self.kept[-1].pulls.append)
            self._made = (self.kept[-1], result, _version(result)) if self.sums else None
            self._later.clear()
        return result

    def flush(self, end: bool) -> None:
        """Report the inputs of all calls with the pulls of the turns since; at the end for good."""
        for call in self.kept:
            for seen in call.seen() if call.pulls else ():
                self.send(seen)
            call.pulls.clear()
        if end:
            self.kept.clear()


def _look(tensor: Any) -> Any:
    """What tells a tensor's memory from any other; None if it has none of its own."""
    if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
        return None
    return (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())


def _version(tensor: Any) -> int | None:
    """What changes when a tensor is changed in place; None where torch doesn't count."""
    counts = isinstance(tensor, torch.Tensor) and not tensor.is_inference()
    return tensor._version if counts else None


def _rows(inputs: torch.Tensor) -> torch.Tensor:
    *rows, columns = inputs.shape
    return inputs.detach().reshape(1, prod(rows), columns)


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
    leaf.register_hook(lambda g: watch.send(Seen(found[0], _rows(g), 1, looked_up=True)))
    return leaf.clone()  # which may be changed in place


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

    def lay(data: torch.Tensor, pulls: torch.Tensor | None) -> Iterator[Seen]:
        if pulls is not None:
            pulls = pulls.reshape(len(pulls), len(data), *pulls.shape[-dims - 1 :])
        for first in range(0, len(data), step):
            part = data[first : first + step]
            patches = fn.pad(part, [side for pair in reversed(sides) for side in pair])
            for dim in range(dims):
                patches = patches.unfold(2 + dim, reach[dim] + 1, stride[dim])
            every = [slice(None, None, d) for d in dilation]
            # (B, C, T1.., k1..) -> (groups, B T, C/groups k)
            patches = patches[(..., *every)].unflatten(1, (groups, -1)).movedim(1, 0)
            patches = patches.movedim(2, 2 + dims)
            rows = patches.reshape(groups, -1, data.shape[1] // groups * prod(kernel))
            own = None
            if pulls is not None:
                own = _by_group(pulls[:, first : first + step], dims, groups)
                own = own.unflatten(1, (len(pulls), -1)).transpose(0, 1)
            yield Seen(found[0], rows, 1, samples=len(part), pulls=own)

    watch.wait(found[0], data, lay)


def _by_group(data: torch.Tensor, dims: int, groups: int) -> torch.Tensor:
    """(B, C, T1..) to (groups, B T, C/groups)."""
    data = data.detach().reshape(-1, *data.shape[-dims - 1 :])
    grouped = data.movedim(1, -1).unflatten(-1, (groups, -1)).movedim(-2, 0)
    return grouped.reshape(groups, -1, data.shape[1] // groups)


def _spread(value: Any, dims: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return [int(v) for v in values] * (dims if len(values) == 1 else 1)


def _transposed(watch: Watch, given: _Given, call: Any) -> None:
    inputs, weight, found = given["input"], given["weight"], watch.name_of(given["weight"])
    if found is None:
        return
    data = inputs.detach() if inputs.ndim == weight.ndim else inputs.detach()[None]
    groups = given.get("groups", 1)
    # An input meets outputs at many places here, so the inputs alone are taken.
    name = found[0]
    watch.wait(name, data, lambda x, _: iter([Seen(name, _by_group(x, x.ndim - 2, groups), 0)]))


def _attention(watch: Watch, given: _Given, call: Any) -> Any:
    bound = _ATTENTION.bind(*call.args, **call.keywords)
    bound.apply_defaults()
    given = bound.arguments
    separate, biases = given["use_separate_proj_weight"], given["in_proj_bias"]
    made: dict[str, Any] = {}

    def project(inputs: Any, weight: Any, bias: Any) -> Any:
        """The inputs, places before samples, through one of the layers; reports what waits."""
        return watch.reported(fn.linear(inputs.transpose(0, -2), weight, bias)).transpose(0, -2)

    for place, source in enumerate(("query", "key", "value")):
        inputs, bias = given[source], None if biases is None else biases.chunk(3)[place]
        if separate:
            weight = given[f"{source[0]}_proj_weight"]
            watch.product(inputs.transpose(0, -2), weight, 1)
        else:
            weight = given["in_proj_weight"].chunk(3)[place]
            watch.product(inputs.transpose(0, -2), given["in_proj_weight"], 1, biases, (place, 3))
        made[source] = project(inputs, weight, bias)
    projection, bias = given["out_proj_weight"], given["out_proj_bias"]
    # With identities for projections, what comes out is the input of the last one.
    none = torch.eye(projection.shape[1], dtype=projection.dtype, device=projection.device)
    made |= {"in_proj_weight": none.repeat(3, 1), "in_proj_bias": None, "out_proj_weight": none}
    made |= {"out_proj_bias": None, "use_separate_proj_weight": False}
    attended, weights = call.func(**{**given, **made})
    watch.product(attended.transpose(0, -2), projection, 1, bias)
    return project(attended, projection, bias), weights


_ADDS: Final = (torch.add, torch.Tensor.add, torch.Tensor.add_, torch.Tensor.__add__,
                torch.Tensor.__iadd__, torch.Tensor.__radd__)  # fmt: skip
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
