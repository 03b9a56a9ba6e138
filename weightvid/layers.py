"""Archives of several layers, and updates: each layer adds to what those below decode to.

A progressive archive begins with a coarse model of all tensors; further layers refine it. An update
is an archive whose tensors begin in another one, its base. Both are the same thing: levels of the
difference between the weights and what a loader has by then, so that no error adds up, with the
error feedback of their own that statistics allow. Levels of a difference are mostly zeros, and
chosen for that (`weightvid.levels.descent`).

The ancestor is the Laplacian pyramid: Burt and Adelson, "The Laplacian pyramid as a compact image
code", 1983.
"""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from math import log2
from typing import BinaryIO, Final

import numpy as np

from weightvid import loader
from weightvid.archives import checked_tensors, walk_frames
from weightvid.exact import FULL_BITS, approach, difference, likeness, rounds_mantissas
from weightvid.levels import frames
from weightvid.levels.code import CodedPart, mean_shift, part_rows
from weightvid.levels.feedback import output_error
from weightvid.levels.frames import FrameSize, choose_frame_size, lay_out, ribbon_columns
from weightvid.levels.stats import TensorStats
from weightvid.levels.steps import TensorPlan
from weightvid.levels.trellis import sign_coded_bits
from weightvid.loader import Archive, Array, End, Floats, Layers, tensor_sha256, to_float32
from weightvid.progress import Progress, Report
from weightvid.repair import add_parity
from weightvid.survey import Survey
from weightvid.tasks import PartTask, Tally, Written, code_task, encode_frames, track_of
from weightvid.video import CODECS
from weightvid.workers import Workers
from weightvid.writer import ArchiveWriter

#: steps of a difference, in those that a whole tensor would have, and the price of a bit; the price
#: where a base errs little more than an archive of the model itself would: what is left there are
#: the changes of the training, which point one way in all tensors and do more harm than noise.
UPDATE_STEP, UPDATE_PRICE, NEAR_PRICE = 0.8, 0.08, 0.07
#: of a progressive archive, the part of all bits that the first layer gets, and the price of a bit
#: there: about what a smaller error saves in the refinement. That depends on the errors of weights
#: as well, which the damping stands for. A tensor is complete at once, by its last steps, where
#: coarse ones would be less than so many times larger.
FIRST_SHARE, COARSE_PRICE, COARSE_DAMPING, _LEAST_RATIO = 0.4, 0.07, 20.0, 1.5
#: mantissa bits of differences of 1-D floats, where floats keep fewer than all.
DIFFERENCE_BITS: Final = 8
#: a base is near a tensor whose error it has less than this times as large as an archive of the
#: model itself would, and as good at this times.
_NEAR, _AS_GOOD = 1.4, 1.015

Coded = list[CodedPart]


def encode_layers(
    survey: Survey, file: BinaryIO, base: Archive | None, workers: Workers, progress: Report
) -> Written:
    """Write an archive of so many layers as the options say, or an update to a base."""
    pile, parity = _Pile(survey, workers, progress), survey.options.parity
    if base is None:
        pile.refine(survey.options.layers)
    else:
        pile.update(base)
    made = pile.write(file, base)
    return replace(made, file_bytes=add_parity(file, parity)) if parity else made


@dataclass(slots=True)
class _Layer:
    """Parts of quantized tensors, and items of exact ones, of which some are differences."""

    plans: dict[int, TensorPlan]
    coded: dict[int, Coded] = field(default_factory=dict)
    exact: list[tuple[int, Array]] = field(default_factory=list)


class _Pile:
    """Layers that are coded one upon the other."""

    def __init__(self, survey: Survey, workers: Workers, progress: Report) -> None:
        self._survey, self._workers, self._progress = survey, workers, progress
        self._layers: list[_Layer] = []
        self._mantissa_bits = survey.mantissa_bits(survey.first_factor)
        #: stored elements that a loader has by now, flat.
        self._below: dict[int, Array] = {}
        self._masks = [0] * len(survey.specs)
        self._tallies: dict[int, Tally] = {}
        #: by the number of a bias: what the weights of its layer take from the mean outputs.
        self._shifts: dict[int, Floats] = {}
        self._ends: dict[tuple[int, int], End] = {}

    def refine(self, layers: int) -> None:
        """Code a model in so many layers."""
        survey, factor, done = self._survey, self._survey.first_factor, set[int]()
        fine = survey.plans(factor)
        octaves = (1 - FIRST_SHARE) * _normal_bits(fine, survey.stats) / max(1, layers - 1)
        for left in reversed(range(layers)):
            plans = {
                number: plan.priced(COARSE_PRICE)
                if plan.step > _LEAST_RATIO * fine[number].step
                else fine[number]
                for number, plan in survey.plans(factor * 2 ** (octaves * left)).items()
            }
            wanted = {number: plan for number, plan in plans.items() if number not in done}
            coded = self._code(wanted, added=left + 1 < layers, damping=COARSE_DAMPING)
            done |= {number for number, plan in plans.items() if plan is fine[number]}
            self._add(_Layer(plans, dict(coded)))

    def update(self, base: Archive) -> None:
        """Code what changes a base into the model."""
        found = {spec.name: (spec, array.reshape(-1)) for spec, array in checked_tensors(base)}
        found |= {alias: found[base.spec(alias).name] for alias in base.header.aliases}
        for number, spec in enumerate(self._survey.specs):
            if spec.name in found and found[spec.name][0][1:] == spec[1:]:
                self._below[number] = found[spec.name][1]
                self._masks[number] = 1
        plans = self._survey.plans(self._survey.first_factor)
        made, changes, steps = _Layer(dict(plans)), dict[int, TensorPlan](), _steps(base)
        for number, plan in plans.items():
            if number not in self._below:
                continue
            weights = self._weights(plan)
            error = weights - to_float32(self._below[number], plan.spec.dtype)
            spread = float(np.square(plan.column_steps().astype(np.float64)).mean()) / 12
            price = UPDATE_PRICE
            if float(np.square(error).mean(dtype=np.float64)) < 2 * _NEAR * spread:
                # With the base's own step, a tensor that was not trained gives the base again.
                step = min(steps.get(plan.spec.name, plan.step), _NEAR * plan.step)
                [(_, parts)] = self._code({number: plan.with_step(step)}, added=False)
                alone = np.concatenate([part.stored.reshape(-1) for part in parts])
                usual = self._harm(weights - to_float32(alone, plan.spec.dtype), plan, number)
                harm = self._harm(error, plan, number)
                if harm <= _AS_GOOD * usual:
                    self._shift(number, error.reshape(-1, plan.view.columns), plan)
                    continue
                price = NEAR_PRICE if harm <= _NEAR * usual else UPDATE_PRICE
            changes[number] = plan.with_step(plan.step * UPDATE_STEP).priced(price)
        fresh = {number: plan for number, plan in plans.items() if number not in self._below}
        for number, coded in self._code(changes, added=True):
            if _bits(coded) < _fresh_bits(self._weights(plans[number]), plans[number]):
                made.plans[number], made.coded[number] = changes[number], coded
            else:
                fresh[number] = plans[number]
        made.coded |= dict(self._code(fresh, added=False))
        for number in fresh:
            self._masks[number] = 0
        self._add(made)

    def _weights(self, plan: TensorPlan) -> Floats:
        return to_float32(self._survey.reader.read(plan.spec.name).reshape(-1), plan.spec.dtype)

    def _shift(self, number: int, error: Floats, plan: TensorPlan) -> None:
        """Have a bias make up for what a tensor that stays as it is takes from the mean outputs."""
        moments = self._survey.moments.get(number)
        if moments is not None and moments.bias is not None:
            moments.add_shift(self._shifts, mean_shift(error, moments, plan))

    def _harm(self, error: Floats, plan: TensorPlan, number: int) -> float:
        """What an error of all weights costs at the outputs, as far as that is known."""
        moments, rows = self._survey.moments.get(number), error.reshape(-1, plan.view.columns)
        if moments is None or not moments.axis:
            return float(np.square(rows).sum(dtype=np.float64))
        return output_error(rows, moments.moment)

    def _code(
        self, plans: Mapping[int, TensorPlan], *, added: bool, damping: float = 1.0
    ) -> Iterator[tuple[int, Coded]]:
        """Parts of tensors by their plans; those with a price are damped so many times more."""
        survey = self._survey

        def tasks() -> Iterator[PartTask]:
            for number, plan in plans.items():
                columns = plan.view.columns
                for first, count in part_rows(plan):
                    span = slice(first * columns, (first + count) * columns)
                    piece = self._workers.piece(
                        survey.reader, plan.spec.name, span.start, count * columns
                    )
                    below = self._below[number][span] if added else None
                    moments = survey.moments.get(number)
                    if moments is not None and plan.price:
                        moments = replace(moments, damping=damping * moments.damping)
                    yield PartTask(piece, plan, number, first, moments, below)

        results = self._workers.map(code_task, tasks())
        for number, plan in plans.items():
            yield number, [next(results) for _ in part_rows(plan)]

    def _add(self, made: _Layer) -> None:
        """Put a layer on the pile: what a loader has from now on includes it."""
        survey, layer = self._survey, len(self._layers)
        for number, coded in made.coded.items():
            tally = self._tallies[number] = Tally(survey.specs[number].name)
            for part in coded:
                tally.add(part)
                if part.shift is not None:
                    survey.moments[number].add_shift(self._shifts, part.shift)
            self._below[number] = np.concatenate([part.stored.reshape(-1) for part in coded])
            digest = tensor_sha256(self._below[number])[: loader.TENSOR_SHA_BYTES]
            self._ends[layer, number] = End(number, digest, tally.sqnr_db)
            self._masks[number] |= 2 << layer
        made.coded = {
            number: [replace(part, stored=np.empty(0)) for part in coded]
            for number, coded in made.coded.items()
        }
        exact = survey.exact_tensors(made.plans, self._shifts, self._mantissa_bits, self._below)
        arrays = ((number, np.ascontiguousarray(array).reshape(-1)) for number, array in exact)
        self._shifts = {}
        for _, group in groupby(arrays, lambda item: likeness(survey.specs[item[0]])[:3]):
            wanted = [(n, self._near(n, flat)) for n, flat in group]
            changed = [
                (n, array)
                for n, array in wanted
                if n not in self._below or self._below[n].tobytes() != array.tobytes()
            ]
            small = all(n in self._below and array.itemsize <= 8 for n, array in changed)
            items = [(n, difference(self._below[n], a)) for n, a in changed] if small else changed
            if small and not self._layers and _packed(items) >= _packed(changed):
                items, small = changed, False
            for number, array in changed:
                self._below[number] = array
                self._masks[number] = (self._masks[number] if small else 0) | 2 << layer
            made.exact += items
        self._layers.append(made)

    def _near(self, number: int, flat: Array) -> Array:
        """Elements of an exact tensor, or such near them that differ little from those so far."""
        spec, below = self._survey.specs[number], self._below.get(number)
        kept = self._mantissa_bits == FULL_BITS or self._survey.keeps(spec.name)
        if below is None or kept or not rounds_mantissas(spec):
            return flat
        return approach(below, flat, DIFFERENCE_BITS)

    def write(self, file: BinaryIO, base: Archive | None) -> Written:
        survey, options = self._survey, self._survey.options
        total = sum(
            part.part.size for layer in self._layers for own in layer.coded.values() for part in own
        )
        video = options.video.for_levels(total)
        size = self._frame_size(base)
        kernels = sorted(
            {k for layer in self._layers for p in layer.plans.values() for k in p.kernel}
        )
        layers = Layers(len(self._layers), base.root if base else b"", tuple(self._masks))
        header = survey.header(kernels, layers)
        files = survey.reader.contents.files if options.side_files else ()
        writer = ArchiveWriter(file, track_of(video, *size), header, files)
        for place, layer in enumerate(self._layers):
            if place:
                writer.end_layer()
            turns = sorted(layer.coded, key=survey.turn)
            items = [(part, part.samples) for number in turns for part in layer.coded[number]]
            for frame, packet in encode_frames(lay_out(items, size), video, self._workers):
                parts = []
                for coded, column in frame.starts:
                    bases = (kernels.index(k) for k in layer.plans[coded.part.tensor].kernel)
                    parts.append(replace(coded.part, column=column, bases=tuple(bases)))
                ends = tuple(
                    self._ends[place, coded.part.tensor]
                    for coded in frame.ends
                    if coded is layer.coded[coded.part.tensor][-1]
                )
                sidecar = loader.Sidecar(len(writer.frames), packet.sha256, tuple(parts), ends)
                writer.add_frame(sidecar, packet.data)
                self._progress(Progress("encode", place + 1, len(self._layers), unit="layers"))
            writer.add_exact(sorted(layer.exact, key=lambda item: survey.turn(item[0])))
        for number, flat in self._below.items():
            writer.heads[number] = tensor_sha256(flat)[: loader.TENSOR_SHA_BYTES]
        weights = sum(survey.specs[number].size for number in self._tallies)
        tallies = list(self._tallies.values())
        return Written.close(writer, survey.first_factor, weights, tallies)

    def _frame_size(self, base: Archive | None) -> FrameSize:
        """One that suits all layers.

        An update has one frame if that can be; else frames like those of its base, which fit one
        track with them.
        """
        columns = max(
            sum(ribbon_columns(part.part.size) for own in layer.coded.values() for part in own)
            for layer in self._layers
        )
        if base is None:
            return choose_frame_size(columns, frames.FEWEST_FRAMES // len(self._layers))
        size = choose_frame_size(columns, 1)
        same = base.track.entry == CODECS[self._survey.options.video.codec].entry
        return FrameSize(*base.track[:2]) if same and columns > size.columns else size


def _steps(archive: Archive) -> dict[str, float]:
    """Step of each quantized tensor, the last one in a chain, by all its names."""
    known, names = _steps(archive.base) if archive.base else {}, list(archive)
    last = {part.tensor: part.step for each, _ in walk_frames(archive) for part in each.parts}
    known |= {names[number]: step for number, step in last.items()}
    aliases = archive.header.aliases.items()
    return known | {alias: known[names[n]] for alias, n in aliases if names[n] in known}


def _normal_bits(plans: Mapping[int, TensorPlan], stats: Mapping[int, TensorStats]) -> float:
    """About the bits of a weight, on average, if weights are distributed normally."""
    root = 4.13  # of 2 pi e
    bits = [p.spec.size * log2(root * stats[n].scale / p.step) for n, p in plans.items()]
    return max(0.0, sum(bits) / max(1, sum(plan.spec.size for plan in plans.values())))


def _bits(coded: Sequence[CodedPart]) -> float:
    levels = np.concatenate([part.samples for part in coded]).astype(np.int16) - 128
    return float(sign_coded_bits(levels) * levels.size)


def _fresh_bits(weights: Floats, plan: TensorPlan) -> float:
    """About what a tensor costs that is added to nothing; a transform is left out."""
    levels = np.rint(weights / np.float32(plan.step)).astype(np.int32)
    return float(sign_coded_bits(np.clip(levels, -127, 127)) * levels.size)


def _packed(items: Sequence[tuple[int, Array]]) -> int:
    """Bytes of exact elements of one size, deflated by byte planes."""
    planes = [flat.view(np.uint8).reshape(-1, flat.itemsize) for _, flat in items]
    return len(zlib.compress(np.concatenate(planes).T.tobytes(), 9)) if planes else 0
