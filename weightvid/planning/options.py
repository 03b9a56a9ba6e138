"""Settings of one packing."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import Any, Final

from weightvid import allocate
from weightvid.calibration import CalibrationStats
from weightvid.codec.encode import DEFAULT_ENCODER, Lossy, Video, find_program
from weightvid.errors import QuantizationError
from weightvid.planning.examples import Examples
from weightvid.planning.function import Function
from weightvid.planning.target import Target
from weightvid.quantize import TrellisParams
from weightvid.quantize.mantissa import FULL_BITS

MIN_MANTISSA_BITS: Final = 11
Judge = Callable[[dict[str, Any]], Any]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """How a model is judged.

    Attributes
    ----------
    function : str, Function or callable
        ``module:function``, ``script.py:function``, or the function itself. It gets a dict of
        name to tensor (torch tensors if its module imports torch, else numpy arrays) and returns
        a number, or logits of shape (..., classes), or unit vectors, or a tuple of outputs and
        labels or a number.
    lower_is_better : bool
        The number is a loss.
    cache : path or None
        Folder where finished evaluations are kept; None: the user's cache folder.
    budget : int or None
        Evaluations at most, or nearly; None: eleven for each quantized tensor, and a few.
    """

    function: str | Function | Judge
    lower_is_better: bool = False
    cache: str | os.PathLike[str] | None = None
    budget: int | None = None


@dataclass(frozen=True, slots=True)
class PackOptions:
    """Settings of one packing.

    Attributes
    ----------
    recipe : str
        ``balanced``, ``small`` or ``fine``.
    rule : str
        ``fidelity``: steps that keep the network's outputs; ``sqnr``: one step for all tensors,
        without noise shaping, which keeps the weights themselves.
    step_factor : float or None
        k of the step rule, instead of the recipe's.
    target : Target or None
        Search the step factor for this, instead of taking the recipe's.
    evaluation : Evaluation or None
        Measure how sensitive each tensor is, and choose the steps by that.
    states : int
        States of the trellis: 4, 8, 16, 32 or 64; 0: the plain uniform quantizer.
    shaping : bool
        Round convolutions with noise shaping: smaller errors of the layers' outputs, larger ones
        of the weights themselves.
    mantissa_bits : int or None
        Mantissa bits that 1-D float32 biases, norms and statistics keep, 11..23, instead of the
        recipe's.
    calibration : path, CalibrationStats, Examples or None
        Statistics of this very model: its tensors are quantized with error feedback. Tensors
        without statistics are packed as ever. With the model and its example inputs themselves
        (`weightvid.calibrate.Examples`), its layers are also quantized one after another for the
        inputs that the quantized layers before them make, where that is better.
    lossy : Lossy or None
        Let the codec quantize samples of fine steps, instead of coding levels losslessly; step
        factor, recipe, states and shaping play no part then.
    keep : tuple of str
        Shell-style patterns of tensor names that are kept exactly.
    side_files : bool
        Store the small other files of a folder: configuration, tokenizer.
    codec : str
        Encoder of the frames: a name of :data:`weightvid.codec.registry.CODECS`.
    bit_depth : int
        Bits of a sample: 8, or 10 if ``lossy``.
    whole_video : bool
        Put every level into the pictures, and nothing beside them: larger files, of which a
        decoder in hardware does all the work.
    preset : str
        The encoder's; empty: its usual one.
    ffmpeg : str or None
        The ffmpeg program, for encoders that PyAV lacks; None: the system's, or imageio-ffmpeg's.
    jobs : int
        Workers side by side, on this machine; 0: one per core.
    cluster : str, Executor or None
        Who quantizes and encodes. None or ``threads``: threads of this process; ``processes``: this
        process and others that it starts on this machine, which is faster for large models in
        files. Or the workers of a cluster: ``dask`` or ``ray`` starts one on this machine, of
        ``jobs`` processes; ``tcp://host:port`` is a Dask scheduler's address, and
        ``ray://host:port`` or ``ray:auto`` a Ray cluster's. Any ``concurrent.futures.Executor``
        will do. The archive's bytes are the same.
    force : bool
        Replace an existing file.
    verify : bool
        Decode the archive and check it before it gets its name.
    """

    recipe: str = allocate.DEFAULT_RECIPE
    rule: str = allocate.DEFAULT_RULE
    step_factor: float | None = None
    target: Target | None = None
    evaluation: Evaluation | None = None
    states: int = 8
    shaping: bool = True
    mantissa_bits: int | None = None
    calibration: str | os.PathLike[str] | CalibrationStats | Examples | None = None
    lossy: Lossy | None = None
    keep: tuple[str, ...] = ()
    side_files: bool = True
    codec: str = DEFAULT_ENCODER
    bit_depth: int = 8
    whole_video: bool = False
    preset: str = ""
    ffmpeg: str | None = None
    jobs: int = 0
    cluster: str | Executor | None = None
    force: bool = False
    verify: bool = True

    @property
    def kept_mantissa_bits(self) -> int:
        """Mantissa bits of 1-D weights: the option, or else the recipe's."""
        if self.mantissa_bits is not None:
            return self.mantissa_bits
        return allocate.recipe(self.recipe).mantissa_bits

    @property
    def first_factor(self) -> float:
        """The step factor asked for: the option, or else the recipe's."""
        return self.step_factor or allocate.recipe(self.recipe).step_factor

    @property
    def shapes_noise(self) -> bool:
        """Whether convolutions are rounded with noise shaping."""
        return self.shaping and self.rule != "sqnr"

    def video(self) -> Video:
        """How the frames are coded.

        Raises
        ------
        CodecError
            There is no such encoder, it cannot be used here, or its stream fits no archive.
        """
        made = Video(self.codec, self.preset, self.lossy, self.bit_depth)
        program = find_program(self.codec, self.ffmpeg)
        return replace(made, program=program, whole=self.whole_video)

    @property
    def examples(self) -> Examples | None:
        """A model with example inputs, if that is what calibrates."""
        known = self.calibration
        return known if isinstance(known, Examples) else None

    def check(self) -> None:
        """Refuse settings that contradict each other or themselves.

        Raises
        ------
        QuantizationError, CodecError
        """
        allocate.recipe(self.recipe)
        allocate.check_rule(self.rule)
        if self.step_factor is not None:
            allocate.check_factor(self.step_factor)
            if self.target is not None:
                raise QuantizationError("a target and a step factor exclude each other")
        aims = (self.target, self.calibration, self.evaluation)
        if self.lossy is not None and aims != (None, None, None):
            raise QuantizationError("a lossy codec takes no target, calibration or evaluation")
        if self.target is not None and self.target.measured and self.evaluation is None:
            raise QuantizationError(f"a target of {self.target.kind} needs an evaluation")
        if self.examples is not None and self.evaluation is not None:
            raise QuantizationError(
                "an evaluation takes calibration statistics, but no model with example inputs"
            )
        if self.evaluation is not None and self.rule == "sqnr":
            raise QuantizationError("an evaluation and the rule sqnr exclude each other")
        self.video()
        if self.states:
            TrellisParams(1.0, self.states)
        if not MIN_MANTISSA_BITS <= self.kept_mantissa_bits <= FULL_BITS:
            raise QuantizationError(
                f"mantissas keep {MIN_MANTISSA_BITS}..{FULL_BITS} bits, not {self.mantissa_bits}"
            )
        if self.jobs < 0:
            raise QuantizationError(f"the number of jobs must not be negative, as {self.jobs} is")
