"""Quantizer parameters: what is refused, and that their JSON form is exact."""

from __future__ import annotations

import json
from math import frexp
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightvid.errors import QuantizationError
from weightvid.quantize import TrellisParams, UniformParams, params_from_dict
from weightvid.quantize.params import TRELLIS_STATES, check_step, round_step, step_to_text

steps = st.floats(2.0**-109, 2.0**119, width=32)


@given(steps)
def test_step_text_is_exact(step: float) -> None:
    text = step_to_text(step)
    assert float.fromhex(text) == step
    assert len(text) <= 20


@given(st.floats(1e-30, 1e30), st.integers(2, 20))
def test_rounded_step_is_near_and_short(step: float, bits: int) -> None:
    rounded = round_step(step, bits)
    assert abs(rounded - step) <= step * 2.0**-bits
    mantissa = frexp(rounded)[0] * 2**bits
    assert mantissa == int(mantissa)


@given(
    st.one_of(
        st.builds(UniformParams, steps, st.none() | st.tuples(*[st.integers(-128, 127)] * 3)),
        st.builds(TrellisParams, steps, st.sampled_from(TRELLIS_STATES), st.integers(0, 1)),
    )
)
def test_round_trip_through_json(params: UniformParams | TrellisParams) -> None:
    assert params_from_dict(json.loads(json.dumps(params.to_dict()))) == params
    assert params.unit.dtype == np.float32
    assert params.unit > 0


@pytest.mark.parametrize(
    "step", [0.0, -1.0, float("nan"), float("inf"), 0.1, 2.0**-112, 2.0**125, 1e-320]
)
def test_bad_steps_are_refused(step: float) -> None:
    with pytest.raises(QuantizationError):
        check_step(step)
    with pytest.raises(QuantizationError):
        UniformParams(step)


@pytest.mark.parametrize(
    "record",
    [
        {},
        {"step": 0.25},
        {"step": None},
        {"step": "x"},
        {"step": "0x1p-4" + "0" * 40},
        {"step": "nan"},
        {"step": "inf"},
        {"step": "-0x1p-4"},
        {"step": "0x0p+0"},
        {"step": "0x1p99999"},
        {"step": "0x1.0000000000001p-4"},
        {"step": "0x1p-4", "shifts": [1, 2]},
        {"step": "0x1p-4", "shifts": "abc"},
        {"step": "0x1p-4", "shifts": [1, 2, 3.0]},
        {"step": "0x1p-4", "shifts": [1, 2, True]},
        {"step": "0x1p-4", "shifts": [1, 2, 128]},
        {"step": "0x1p-4", "shifts": [-129, 2, 3]},
        {"step": "0x1p-4", "states": 5},
        {"step": "0x1p-4", "states": "8"},
        {"step": "0x1p-4", "states": True},
        {"step": "0x1p-4", "states": 8, "axis": 2},
        {"step": "0x1p-4", "states": 8, "axis": None},
    ],
)
def test_malformed_records_are_refused(record: dict[str, Any]) -> None:
    with pytest.raises(QuantizationError):
        params_from_dict(record)
