"""In which order the layers of a model are used, and what must be known to quantize them in it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from math import ceil
from typing import Final, TypeVar

import torch

from weightvid.calibrate.layouts import Seen
from weightvid.calibrate.state import (
    Batches,
    State,
    are_read,
    count_samples,
    first_output,
    samples_of,
)
from weightvid.calibrate.watch import Watch

#: batches that show which tensors are used, and how.
_LOOK_BATCHES: Final = 2
#: outputs, in one direction each, whose gradients are enough.
_PULLS: Final = 1000
Found = TypeVar("Found")


@dataclass(slots=True)
class Order:
    """What a look at a few batches shows: tensors in the order of first use.

    ``shapes`` gives groups, columns, and elements of the inputs of one call; ``sources`` numbers
    inputs, which queries, keys and values have in common; ``calls`` counts those of a layer in a
    pass. ``reads``: the model is a language model, and the batches hold text of the kind that
    it would write. ``differentiable``: gradients of the output are known, in so many ``turns``.
    """

    shapes: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    tables: set[str] = field(default_factory=set)
    sources: dict[str, int] = field(default_factory=dict)
    calls: dict[str, float] = field(default_factory=dict)
    reads: bool = False
    differentiable: bool = False
    turns: int = 0


def look(state: State, batches: Batches) -> Order:
    """Run a few batches and note what is used."""
    order, last, source, samples = Order(), torch.empty(0), 0, max(1, count_samples(batches))

    def note(seen: Seen) -> None:
        nonlocal last, source
        if seen.axis < 0:
            order.tables.add(seen.name)
            order.shapes[seen.name] = 1, state.tensors[seen.name].shape[-1], 0
        elif seen.name not in order.tables:
            kinds = [(each.device, each.dtype) for each in (last, seen.inputs)]
            source += not (kinds[0] == kinds[1] and torch.equal(last, seen.inputs))
            order.sources.setdefault(seen.name, source)
            last = seen.inputs
            size = seen.inputs.numel(), order.shapes.get(seen.name, (0, 0, 0))[2]
            order.shapes[seen.name] = seen.groups, seen.inputs.shape[-1], max(size)

    looked = [batch for batch, _ in batches[:_LOOK_BATCHES]]
    with Watch(state.tensors, note) as watch:
        order.reads = are_read(looked, [first_output(state.run(batch)) for batch in looked])
    order.calls = {name: count / len(looked) for name, count in watch.calls.items()}
    with suppress(Exception), torch.enable_grad(), Watch(state.tensors, lambda _: None, True):
        output, share = first_output(state.run(looked[0])), samples_of(looked[0]) / samples
        order.turns = sum(1 for _ in pulls(output, False, torch.Generator(), share))
        order.differentiable = order.turns > 0
    return order


def with_or_without(order: Order, run: Callable[[], Found]) -> Found:
    """What is found with gradients; without, if anything fails with them."""
    try:
        return run()
    except Exception:
        if not order.differentiable:
            raise
        order.differentiable = False
        return run()


def pulls(
    output: torch.Tensor | None, reads: bool, draws: torch.Generator, share: float = 0.0
) -> Iterator[None]:
    """Let gradients come, of an output in random directions, once or some times.

    Their second moments say what matters to the squared change of the output; of a language model,
    by the likelihood of tokens drawn from it (the Fisher information), to the KL divergence. Where
    all batches, of which this is a ``share``, give few outputs, there are more directions.
    """
    if output is None or not output.requires_grad or not output.numel():
        return
    rows = output.numel() // output.shape[-1] if output.ndim > 1 else output.numel()
    turns = max(1, ceil(_PULLS * share / max(1, rows)))
    for turn in range(turns):
        with torch.enable_grad():
            if reads:
                spread = output.float().log_softmax(-1).flatten(0, -2)
                drawn = torch.multinomial(spread.detach().exp().cpu(), 1, generator=draws)
                total = spread.gather(1, drawn.to(spread.device)).sum()
            else:
                total = (output * torch.randn(output.shape, generator=draws).to(output)).sum()
            total.backward(retain_graph=turn + 1 < turns)
        yield


def stages(
    sizes: Mapping[str, int], memory_bytes: int, sources: Mapping[str, int] | None = None
) -> list[tuple[str, ...]]:
    """Layers that are taken together, stage after stage, by the bytes that each takes.

    One that is larger alone has no stage. With ``sources`` only layers of one go together.

    Examples
    --------
    >>> sizes = dict.fromkeys("qkvo", 10)
    >>> stages(sizes, 20), stages(sizes, 99, {"q": 0, "k": 0, "v": 0, "o": 3})
    ([('q', 'k'), ('v', 'o')], [('q', 'k', 'v'), ('o',)])
    """
    found: list[list[str]] = []
    for name in (name for name, size in sizes.items() if size <= memory_bytes):
        last = found[-1] if found else []
        room = sum(sizes[other] for other in last) + sizes[name] <= memory_bytes
        alike = sources is None or (last and sources[last[-1]] == sources[name])
        if found and room and alike:
            last.append(name)
        else:
            found.append([name])
    return [tuple(stage) for stage in found]
