"""Outputs of the caller's own making: their layouts, and what they overlap.

`ssmcore.ops` makes its own, so only callers of the native functions pass outputs. (What is updated
in place comes from the caller either way.)
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cases import ConvCase, ConvUpdateCase, NormCase, ScanCase, StateUpdateCase
from helpers import LAYOUTS, assert_only_poison_around, assert_same_bits, place, refuses

from ssmcore import _core, ops


def scan() -> dict[str, Any]:
    inputs = ScanCase().inputs()
    return {
        **inputs,
        "out": np.empty((2, 24, 67), np.float32),
        "last_state": np.empty((2, 24, 16), np.float32),
        "chunk_states": np.empty((2, 3, 24, 16), np.float32),
        "chunk_size": 30,
        "delta_sum": np.empty((2, 24), np.float32),
    }


def state_update() -> dict[str, Any]:
    return {**StateUpdateCase().inputs(), "out": np.empty((3, 24), np.float32)}


def conv() -> dict[str, Any]:
    return {
        **ConvCase().inputs(),
        "out": np.empty((2, 24, 67), np.float32),
        "final_state": np.empty((2, 24, 3), np.float32),
    }


def conv_update() -> dict[str, Any]:
    return {**ConvUpdateCase().inputs(), "out": np.empty((3, 24), np.float32)}


def norm() -> dict[str, Any]:
    inputs = NormCase(z_dtype="float32").inputs()
    return {
        **inputs,
        "group_size": 0,
        "out": np.empty((5, 96), np.float32),
        "residual_out": np.empty((5, 96), np.float32),
    }


OPERATORS = pytest.mark.parametrize(
    ("operator", "arguments", "outputs"),
    [
        ("selective_scan", scan, ("out", "last_state", "chunk_states", "delta_sum")),
        ("selective_state_update", state_update, ("out", "state")),
        ("causal_conv1d", conv, ("out", "final_state")),
        ("causal_conv1d_update", conv_update, ("out", "conv_state")),
        ("rms_norm", norm, ("out", "residual_out")),
    ],
)


@OPERATORS
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_is_contiguous(
    operator: str, arguments: Any, outputs: tuple[str, ...], layout: str
) -> None:
    """Whatever the strides of an output: the same bits, and nothing written around them."""
    expected, call = arguments(), arguments()
    getattr(_core, operator)(**expected)
    for name in outputs:
        call[name] = place(call[name], layout)
    getattr(_core, operator)(**call)
    for name in outputs:
        assert_same_bits(call[name].copy(order="C"), expected[name])
        if layout != "token-major":
            assert_only_poison_around(call[name])


# --- Overlap --------------------------------------------------------------------------------------


def overlapping(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Arrays like these two, the second beginning at the last element of the first."""
    memory = np.full(first.size + second.size - 1, 0.25, np.float32)
    pair = (memory[: first.size].reshape(first.shape), memory[first.size - 1 :])
    return pair[0], pair[1].reshape(second.shape)


OVERLAPS = [
    *(("selective_scan", scan, "out", other) for other in ("u", "delta", "A", "B", "C", "D", "z")),
    ("selective_scan", scan, "out", "delta_bias"),
    ("selective_scan", scan, "out", "initial_state"),
    ("selective_scan", scan, "out", "last_state"),
    ("selective_scan", scan, "out", "chunk_states"),
    ("selective_scan", scan, "out", "delta_sum"),
    ("selective_scan", scan, "last_state", "u"),
    ("selective_scan", scan, "last_state", "initial_state"),
    ("selective_scan", scan, "last_state", "chunk_states"),
    ("selective_scan", scan, "chunk_states", "initial_state"),
    ("selective_scan", scan, "chunk_states", "delta_sum"),
    ("selective_scan", scan, "delta_sum", "delta"),
    *(
        ("selective_state_update", state_update, output, other)
        for output in ("out", "state")
        for other in ("x", "dt", "A", "B", "C", "D", "z", "dt_bias")
    ),
    ("selective_state_update", state_update, "out", "state"),
    *(
        ("causal_conv1d", conv, output, other)
        for output in ("out", "final_state")
        for other in ("x", "weight", "bias", "initial_state")
    ),
    ("causal_conv1d", conv, "out", "final_state"),
    *(
        ("causal_conv1d_update", conv_update, output, other)
        for output in ("out", "conv_state")
        for other in ("x", "weight", "bias")
    ),
    ("causal_conv1d_update", conv_update, "out", "conv_state"),
    *(
        ("rms_norm", norm, output, other)
        for output in ("out", "residual_out")
        for other in ("x", "weight", "residual", "z")
    ),
    ("rms_norm", norm, "out", "residual_out"),
]


@pytest.mark.parametrize(("operator", "arguments", "output", "other"), OVERLAPS)
def test_overlap_is_refused(operator: str, arguments: Any, output: str, other: str) -> None:
    call = arguments()
    call[output], call[other] = overlapping(call[output], call[other])
    before = call[output].copy(), call[other].copy()
    with refuses(operator, output, other, "overlaps"):
        getattr(_core, operator)(**call)
    assert_same_bits(call[output], before[0])
    assert_same_bits(call[other], before[1])


@pytest.mark.parametrize(
    ("operator", "arguments", "output"),
    [
        ("selective_scan", scan, "out"),
        ("selective_scan", scan, "last_state"),
        ("selective_scan", scan, "chunk_states"),
        ("selective_scan", scan, "delta_sum"),
        ("selective_state_update", state_update, "state"),
        ("causal_conv1d", conv, "out"),
        ("causal_conv1d", conv, "final_state"),
        ("causal_conv1d_update", conv_update, "conv_state"),
        ("rms_norm", norm, "out"),
        ("rms_norm", norm, "residual_out"),
    ],
)
def test_outputs_whose_own_elements_overlap_are_refused(
    operator: str, arguments: Any, output: str
) -> None:
    call = arguments()
    shape = call[output].shape
    memory = np.zeros(call[output].size, np.float32)
    strides = (4, *np.zeros(shape, np.float32).strides[1:])  # rows one element apart
    call[output] = np.lib.stride_tricks.as_strided(memory, shape, strides)
    with refuses(operator, output, "overlap"):
        getattr(_core, operator)(**call)


@OPERATORS
def test_read_only_outputs_are_refused(
    operator: str, arguments: Any, outputs: tuple[str, ...]
) -> None:
    for name in outputs:
        call = arguments()
        call[name].flags.writeable = False
        with refuses(operator, name, "read-only"):
            getattr(_core, operator)(**call)


def test_what_may_be_the_same_memory() -> None:
    """States in and out, and the norm's x and residual."""
    call = scan()
    expected = {**scan(), "out": call["out"].copy(), "last_state": call["last_state"].copy()}
    _core.selective_scan(**expected)
    call["last_state"] = call["initial_state"]
    _core.selective_scan(**call)
    assert_same_bits(call["out"], expected["out"])
    assert_same_bits(call["initial_state"], expected["last_state"])

    call, expected = conv(), conv()
    _core.causal_conv1d(**expected)
    call["final_state"] = call["initial_state"]
    _core.causal_conv1d(**call)
    assert_same_bits(call["out"], expected["out"])
    assert_same_bits(call["initial_state"], expected["final_state"])

    call, expected = norm(), norm()
    _core.rms_norm(**expected)
    call["out"], call["residual_out"] = call["x"], call["residual"]
    _core.rms_norm(**call)
    assert_same_bits(call["x"], expected["out"])
    assert_same_bits(call["residual"], expected["residual_out"])


def test_neighbours_do_not_overlap() -> None:
    """Outputs may be parts of one array, side by side or interleaved."""
    expected, call = conv(), conv()
    _core.causal_conv1d(**expected)
    both = np.full((2, 24, 70), np.nan, np.float32)
    call["out"], call["final_state"] = both[..., :67], both[..., 67:]
    _core.causal_conv1d(**call)
    assert_same_bits(call["out"], expected["out"])
    assert_same_bits(call["final_state"], expected["final_state"])


def test_a_state_over_an_input_is_refused() -> None:
    memory = np.zeros(3 * 24 * 16, np.float32)
    inputs = StateUpdateCase().inputs()
    inputs["state"], inputs["x"] = memory.reshape(3, 24, 16), memory[:72].reshape(3, 24)
    with refuses("selective_state_update", "state", "overlaps", "x"):
        ops.selective_state_update(**inputs)
