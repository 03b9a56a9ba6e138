"""In which order the layers of a model run, and which of them may be taken together."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Final

import torch

from weightvid.calibrate.outputs import call
from weightvid.calibrate.watch import Seen, Watch

#: batches that show which tensors are used, and how.
LOOK_BATCHES: Final = 2


@dataclass(slots=True)
class Layer:
    """What a look at a few batches shows of a tensor.

    Attributes
    ----------
    name : str
    sums_bytes : int
        Of the sums over its pairs of inputs.
    batch_bytes : int
        Of its inputs in one batch.
    alike : bool
        It gets the very inputs of the layer before it, as queries, keys and values do.
    """

    name: str
    sums_bytes: int
    batch_bytes: int = 0
    alike: bool = False

    @property
    def bytes(self) -> int:
        """Memory that it takes while its inputs are gathered."""
        return self.sums_bytes + self.batch_bytes


@dataclass(slots=True)
class Order:
    """Calls of layers in the order in which they come.

    Attributes
    ----------
    layers : dict of str to Layer
        By name, in order of first use.
    calls : list of str
        Names of all calls of the last batch that was looked at.
    tables : set of str
        Embedding tables.
    """

    layers: dict[str, Layer] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    tables: set[str] = field(default_factory=set)

    def first_after(self, names: Collection[str]) -> str | None:
        """A tensor that is used first after the last use of these: nothing of theirs comes then."""
        last = max((i for i, name in enumerate(self.calls) if name in names), default=-1)
        before = set(self.calls[: last + 1])
        return next((name for name in self.calls[last + 1 :] if name not in before), None)


def look(
    module: torch.nn.Module, batches: Sequence[Any], tensors: Mapping[str, torch.Tensor]
) -> Order:
    """Run a few batches and note what is used."""
    order = Order()
    used: dict[str, int] = {}
    # Held, so that its memory cannot be another tensor's meanwhile.
    previous: list[torch.Tensor] = []

    def note(seen: Seen) -> None:
        order.calls.append(seen.name)
        if seen.axis < 0:
            order.tables.add(seen.name)
            return
        groups, columns = max(len(seen.inputs), seen.share[1]), seen.inputs.shape[-1]
        if seen.name not in order.layers:
            alike = bool(previous) and _same(previous[0], seen.inputs)
            # Two sums of squares, of those that fit and of those that are held back.
            sums = 32 * groups * columns * (columns + 1)
            order.layers[seen.name] = Layer(seen.name, sums, alike=alike)
        previous[:] = [seen.inputs]
        used[seen.name] = used.get(seen.name, 0) + 4 * seen.inputs.numel()

    with Watch(tensors, note):
        for batch in batches:
            order.calls.clear()
            used.clear()
            previous.clear()
            call(module, batch)
            for name, size in used.items():
                layer = order.layers[name]
                layer.batch_bytes = max(layer.batch_bytes, size)
    return order


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors show the same memory, unchanged in between."""
    places = [(t.data_ptr(), t.shape, t.stride()) for t in (one, other)]
    # Tensors of inference mode have no version.
    known = not (one.is_inference() or other.is_inference())
    return places[0] == places[1] and (not known or one._version == other._version)


def stages(
    order: Order, wanted: Collection[str], memory_bytes: int, most: int
) -> list[tuple[str, ...]]:
    """Layers that are taken together, stage after stage.

    Parameters
    ----------
    order : Order
    wanted : collection of str
        Tensors that have a stage.
    memory_bytes : int
        Of one stage; a layer that is larger alone has none.
    most : int
        Stages at most, if memory allows: neighbours are joined, those first that hold least.

    Examples
    --------
    >>> order = Order({n: Layer(n, 10, alike=n == "k") for n in "qkvo"})
    >>> stages(order, "qkvo", 100, 9)
    [('q', 'k'), ('v',), ('o',)]
    >>> stages(order, "qkvo", 20, 1)
    [('q', 'k'), ('v', 'o')]
    """
    found: list[list[Layer]] = []
    for layer in order.layers.values():
        if layer.name not in wanted or layer.bytes > memory_bytes:
            continue
        if layer.alike and found and _size(found[-1]) + layer.bytes <= memory_bytes:
            found[-1].append(layer)
        else:
            found.append([layer])
    while len(found) > most:
        sizes = [_size(a) + _size(b) for a, b in pairwise(found)]
        fits = [place for place, size in enumerate(sizes) if size <= memory_bytes]
        if not fits:
            break
        place = min(fits, key=lambda p: (len(found[p]) + len(found[p + 1]), sizes[p]))
        found[place : place + 2] = [found[place] + found[place + 1]]
    return [tuple(layer.name for layer in stage) for stage in found]


def _size(stage: Sequence[Layer]) -> int:
    return sum(layer.bytes for layer in stage)
