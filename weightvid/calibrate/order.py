"""What a model is run on and in which order; and what a look at a few batches tells of both."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from math import ceil, inf
from typing import Any, Final, TypeVar

import torch

from weightvid.calibrate.layouts import Seen
from weightvid.calibrate.state import State, first_output, first_tensor, samples_of
from weightvid.calibrate.watch import Watch

#: batches that show which tensors are used, and how.
_LOOK_BATCHES: Final = 2
#: text whose tokens surprise a language model by so many nats more than its own would is foreign;
#: the training text of lm_books has 0.01.
_SURPRISE: Final = 0.5
#: outputs, in one direction each, whose gradients are enough.
_PULLS: Final = 1000
#: of BatchNorm, as it is by default.
_EPSILON: Final = 1e-5
#: a batch, and whether it is held back.
Batches = Sequence[tuple[Any, bool]]
Found = TypeVar("Found")


def held_back(inputs: Iterable[Any], part: float) -> Batches:
    """Batches, each with whether it is held back: evenly spaced; none where all would be.

    Examples
    --------
    >>> held_back("abcd", 0.5), held_back("a", 0.5)
    ([('a', False), ('b', True), ('c', False), ('d', True)], [('a', False)])
    """
    batches = list(inputs)
    span = min(len(batches), max(2, round(1 / part))) if part > 0.0 else 0
    return [(b, span > 1 and place % span == span - 1) for place, b in enumerate(batches)]


def count_samples(batches: Batches) -> int:
    """Samples of all batches."""
    return sum(samples_of(batch) for batch, _ in batches)


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


def are_read(batches: Sequence[Any], outputs: Sequence[torch.Tensor | None]) -> bool:
    """Whether a language model put out something of texts of the kind that it would write."""
    return all(surprise(*each) < _SURPRISE for each in zip(batches, outputs, strict=True))


def surprise(batch: Any, output: torch.Tensor | None) -> float:
    """By how many nats a batch's tokens are less likely than a model's own; infinity without any.

    The mean negative log likelihood of the next tokens, less the entropy of the outputs.
    """
    tokens = first_tensor(batch)
    if output is None or output.ndim != 3 or tokens is None or tokens.is_floating_point():
        return inf
    known = (tokens >= 0) & (tokens.long() < output.shape[2])
    if tokens.shape != output.shape[:2] or not bool(known.all()):
        return inf
    spread = output[:, :-1].float().log_softmax(-1)
    found = spread.gather(2, tokens[:, 1:, None].to(spread.device).long())[..., 0]
    return float(((spread.exp() * spread).sum(-1) - found).mean()) if found.numel() else inf


def nats_apart(
    mean: torch.Tensor, variance: torch.Tensor, known: torch.Tensor, known_variance: torch.Tensor
) -> torch.Tensor:
    """Kullback-Leibler divergence of normal distributions from known ones, by channel."""
    ratio = (variance + _EPSILON) / (known_variance + _EPSILON)
    apart = (mean - known).square() / (known_variance + _EPSILON)
    return 0.5 * (ratio + apart - 1.0 - ratio.log())


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
