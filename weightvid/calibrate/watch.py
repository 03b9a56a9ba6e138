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

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final

import torch
from torch.overrides import TorchFunctionMode

from weightvid.calibrate.layouts import ADDS, CALLS, Call, Lay, Seen, rows_of

#: dtypes of weights that may be quantized.
_DTYPES: Final = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


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
        #: a call; its result, and views of that; in which version.
        self._made: tuple[Call, list[Any], int | None] | None = None
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
        if func in ADDS and len(args) == 2 and not kwargs:
            self._add(*args)
        if func not in CALLS:
            return self._came(call())
        if self._seen_all():
            raise Enough
        handler, names = CALLS[func]
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
            rows = rows_of(inputs)
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
            if _same_elements(result, self._made[1][0]):  # another view of it
                self._made[1].append(result)
        return result

    def _add(self, one: Any, other: Any) -> None:
        """Note what the result of the last call is added to, if that is one of both."""
        call, results, version = self._made or (None, [], None)
        for result, beside in ((one, other), (other, one)):
            if call is None or not any(result is each for each in results):
                continue
            if version == _version(result):
                self._made = None
                alike = isinstance(beside, torch.Tensor) and beside.shape == result.shape
                if alike and beside.numel() and id(beside) not in self._later:
                    call.added.append(beside.detach().clone())
            return

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
            self._made = (self.kept[-1], [result], _version(result)) if self.sums else None
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


def _same_elements(one: Any, other: Any) -> bool:
    """Whether two tensors are the same elements in the same order, in any shape."""
    places = [_look(each) for each in (one, other)]
    if None in places or places[0][:3] != places[1][:3]:
        return False
    return bool(one.numel() == other.numel() and one.is_contiguous() and other.is_contiguous())


def _version(tensor: Any) -> int | None:
    """What changes when a tensor is changed in place; None where torch doesn't count."""
    counts = isinstance(tensor, torch.Tensor) and not tensor.is_inference()
    return tensor._version if counts else None
