"""A calibrated archive made better, if it can be: layer by layer, at the very steps it has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf, log
from typing import Any, BinaryIO, Final

from weightvid.loader import open_archive
from weightvid.packing.quantizer import Fixed
from weightvid.planning.examples import Examples, Recalibrated
from weightvid.planning.search import Trial
from weightvid.planning.survey import Survey
from weightvid.planning.target import SIZE_TOLERANCE
from weightvid.progress import Report

Encode = Callable[[float, Mapping[str, Any], Mapping[int, Fixed] | None], Trial]

#: harm goes with 4**-bits: what a bit for every weight is worth, in the logarithm of the harm.
_PER_BIT: Final = 2 * log(2)
#: sizes are aimed at this little below their bound, in parts of the tolerance.
_AIM: Final = 0.4
#: a size that is missed is corrected twice at most.
_MOST_TRIES: Final = 3


@dataclass(frozen=True, slots=True)
class Refined:
    """What came of it.

    Attributes
    ----------
    made : Trial
        The archive that was kept, which was written last.
    encodings : int
        Further ones that it took.
    told : str
        Which one was kept, and why.
    """

    made: Trial
    encodings: int
    told: str


class Refiner:
    """Quantizes layer by layer, and keeps what is better on held-back inputs.

    Parameters
    ----------
    surveyed : Survey
    examples : Examples
    encode : callable
        Writes the archive of a step factor, with entries for its header, and levels if they are
        known.
    stream : binary file object
        Holds the last archive.
    progress : callable
    """

    def __init__(
        self,
        surveyed: Survey,
        examples: Examples,
        encode: Encode,
        stream: BinaryIO,
        progress: Report,
    ) -> None:
        self._surveyed = surveyed
        self._examples = examples
        self._encode = encode
        self._stream = stream
        self._progress = progress

    def run(self, plain: Trial) -> Refined:
        """Better the archive that has just been written.

        Parameters
        ----------
        plain : Trial
            Of the statistics alone.
        """
        target = self._surveyed.options.target
        if target is not None and target.kind == "sqnr":
            return Refined(plain, 0, "plain: a target of SQNR is about the weights alone")
        before = self._loss()
        factor, tries = plain.factor, 0
        while True:
            steps = self._surveyed.steps(factor)
            found = self._examples.recalibrate(self._surveyed, steps, self._progress)
            if isinstance(found, str):
                return Refined(plain, 0, f"plain: {found}")
            made = self._encode(factor, {"sequential": _about(found)}, found.fixed)
            tries += 1
            if self._met(made) or tries == _MOST_TRIES:
                break
            factor = self._corrected(made)
        after = self._loss()
        facts = (
            f"mean squared change of the outputs {before:.3g} -> {after:.3g} on held-back inputs, "
            f"{self._rate(plain):.3f} -> {self._rate(made):.3f} bits per weight"
        )
        bound = self._bound
        if bound is not None and made.file_bytes > bound:
            why = "the sequential one missed the target"
        elif _change(before, after) + _PER_BIT * (self._rate(made) - self._rate(plain)) < 0:
            return Refined(made, tries, f"sequential, {_about(found)}; {facts}")
        else:
            why = "the sequential one was no better"
        again = self._encode(plain.factor, {"sequential": f"no: {why}"}, None)
        return Refined(again, tries + 1, f"plain: {why} ({facts})")

    @property
    def _bound(self) -> float | None:
        """Bytes that the archive may have."""
        target = self._surveyed.options.target
        if target is None:
            return None
        return target.value * (self._surveyed.weights / 8 if target.kind == "bpw" else 1.0)

    def _met(self, made: Trial) -> bool:
        bound = self._bound
        return bound is None or bound * (1 - SIZE_TOLERANCE) <= made.file_bytes <= bound

    def _corrected(self, made: Trial) -> float:
        """Step factor for the bound: a bit for every quantized weight halves it."""
        aim = (self._bound or made.file_bytes) * (1 - _AIM * SIZE_TOLERANCE)
        coded = sum(stats.spec.size for stats in self._surveyed.stats.values())
        return made.factor * float(2 ** (8 * (made.file_bytes - aim) / max(1, coded)))

    def _rate(self, made: Trial) -> float:
        return 8 * made.file_bytes / max(1, self._surveyed.weights)

    def _loss(self) -> float:
        """Of the archive in the stream, really decoded."""
        self._stream.seek(0)
        with open_archive(self._stream) as opened:
            return self._examples.loss({spec.name: array for spec, array in opened.iter_stored()})


def _about(found: Recalibrated) -> str:
    return f"{found.layers} of {len(found.fixed)} tensors, {found.refitted} fitted anew"


def _change(before: float, after: float) -> float:
    """Logarithm of a ratio of losses."""
    if not before > 0.0:
        return 0.0 if not after > 0.0 else inf
    return log(max(after, 1e-300) / before)
