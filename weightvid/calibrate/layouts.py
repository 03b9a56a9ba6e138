"""How torch's functions use their weights: the inputs of each, laid out as rows that it multiplies.

A handler for each function finds the weight among the arguments and tells the watch how its inputs,
and gradients by its result, become rows.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import TYPE_CHECKING, Any, Final

import torch
from torch.nn import functional as fn

if TYPE_CHECKING:
    from weightvid.calibrate.watch import Watch

_CHUNK_ELEMENTS: Final = 1 << 23
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


def rows_of(inputs: torch.Tensor) -> torch.Tensor:
    """Inputs (..., C) as one group of rows, shape (1, n, C)."""
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
    leaf.register_hook(lambda g: watch.send(Seen(found[0], rows_of(g), 1, looked_up=True)))
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


ADDS: Final = (torch.add, torch.Tensor.add, torch.Tensor.add_, torch.Tensor.__add__,
                torch.Tensor.__iadd__, torch.Tensor.__radd__)  # fmt: skip
_CONVOLVED: Final = ("input", "weight", "bias", "stride", "padding")
#: what handles the calls of a function, and the names of its arguments by place.
CALLS: Final[dict[Any, tuple[Callable[[Watch, _Given, Any], Any], Sequence[str]]]] = {
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
