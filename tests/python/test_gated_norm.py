"""The RMS norm with a gate (Mamba-2) and in groups."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import reference
from backends import Backend
from cases import GATED_NORM_CASES, NormCase
from helpers import (
    DTYPES,
    LAYOUTS,
    assert_close,
    assert_only_poison_around,
    assert_same_bits,
    refuses,
)
from hypothesis import given
from hypothesis import strategies as st

from ssmcore import ops

GATED = NormCase(residual_dtype=None, z_dtype="float32", group_size=24)


@pytest.mark.parametrize("case", GATED_NORM_CASES)
@pytest.mark.parametrize("norm_before_gate", [False, True])
def test_agrees_with_reference(backend: Backend, case: NormCase, norm_before_gate: bool) -> None:
    inputs = {**case.inputs(), "norm_before_gate": norm_before_gate}
    expected_out, expected_residual = reference.rms_norm(**inputs)
    if case.residual_dtype is None:
        out = backend.call(ops.rms_norm, **inputs)
    else:
        out, residual_out = backend.call(ops.rms_norm, **inputs)
        assert residual_out.dtype == DTYPES[case.residual_dtype]
        assert_close(residual_out, expected_residual, case.residual_dtype)
    assert out.dtype == DTYPES[case.dtype]
    assert_close(out, expected_out, case.dtype)


def test_the_gate_comes_first_by_default(backend: Backend) -> None:
    inputs = GATED.inputs()
    del inputs["norm_before_gate"]
    expected, _ = reference.rms_norm(**inputs, norm_before_gate=False)
    assert_close(backend.call(ops.rms_norm, **inputs), expected, "float32")


# --- Properties -----------------------------------------------------------------------------------


@given(
    group_size=st.integers(1, 70),
    groups=st.integers(1, 9),
    rows=st.integers(1, 20),
    gated=st.booleans(),
    norm_before_gate=st.booleans(),
    dtype=st.sampled_from(list(DTYPES)),
    layout=st.sampled_from(["contiguous", *LAYOUTS]),
)
def test_groups_are_norms_of_their_own(
    backend: Backend,
    group_size: int,
    groups: int,
    rows: int,
    gated: bool,
    norm_before_gate: bool,
    dtype: str,
    layout: str,
) -> None:
    case = NormCase(
        shape=(rows, groups * group_size),
        dtype=dtype,
        residual_dtype=None,
        z_dtype=dtype if gated else None,
        group_size=group_size,
        norm_before_gate=norm_before_gate,
        layout=layout,
    )
    inputs = case.inputs()
    out = backend.call(ops.rms_norm, **inputs)
    for begin in range(0, groups * group_size, group_size):
        part = slice(begin, begin + group_size)
        alone = {
            **inputs,
            "x": inputs["x"][:, part],
            "weight": inputs["weight"][part],
            "z": inputs["z"][:, part] if gated else None,
            "group_size": None,
        }
        assert_close(out[:, part], backend.call(ops.rms_norm, **alone), dtype, rounded=True)


@given(seed=st.integers(0, 2**32 - 1), norm_before_gate=st.booleans())
def test_permuted_channels_permute_the_output(
    backend: Backend, seed: int, norm_before_gate: bool
) -> None:
    """Within groups, and whole groups."""
    inputs = replace(GATED, norm_before_gate=norm_before_gate).inputs()
    random = np.random.default_rng(seed)
    within = np.concatenate([24 * g + random.permutation(24) for g in random.permutation(4)])
    permuted = {**inputs, **{name: inputs[name][..., within] for name in ("x", "weight", "z")}}
    out = backend.call(ops.rms_norm, **inputs)
    assert_close(backend.call(ops.rms_norm, **permuted), out[..., within], "float32")


@pytest.mark.parametrize("norm_before_gate", [False, True])
def test_no_weight_is_a_weight_of_ones(backend: Backend, norm_before_gate: bool) -> None:
    inputs = replace(GATED, weight_dtype=None, norm_before_gate=norm_before_gate).inputs()
    ones = {**inputs, "weight": np.ones(96, np.float32)}
    assert_same_bits(backend.call(ops.rms_norm, **inputs), backend.call(ops.rms_norm, **ones))


def test_threads_do_not_change_a_bit(backend: Backend, set_num_threads: Any) -> None:
    inputs = replace(GATED, shape=(501, 264), residual_dtype="float32").inputs()
    set_num_threads(1)
    once = backend.call(ops.rms_norm, **inputs)
    for threads in (2, 3):
        set_num_threads(threads)
        for again, expected in zip(backend.call(ops.rms_norm, **inputs), once, strict=True):
            assert_same_bits(again, expected)


@pytest.mark.parametrize("norm_before_gate", [False, True])
@pytest.mark.parametrize("name", ["x", "weight", "z"])
def test_zero_strides(backend: Backend, name: str, norm_before_gate: bool) -> None:
    inputs = replace(GATED, norm_before_gate=norm_before_gate).inputs()
    shape = inputs[name].shape
    for axis in range(len(shape)):
        arguments = {**inputs, name: np.broadcast_to(inputs[name].take([0], axis=axis), shape)}
        expected, _ = reference.rms_norm(**arguments)
        assert_close(backend.call(ops.rms_norm, **arguments), expected, "float32")


@pytest.mark.parametrize("layout", ["padded", "spread"])
def test_inputs_and_what_lies_around_them_stay(backend: Backend, layout: str) -> None:
    inputs = replace(GATED, shape=(5, 72), layout=layout).inputs()
    arrays = {name: value for name, value in inputs.items() if isinstance(value, np.ndarray)}
    before = {name: value.copy() for name, value in arrays.items()}
    backend.call(ops.rms_norm, **inputs)
    for name, array in arrays.items():
        assert_same_bits(array, before[name])
        assert_only_poison_around(array)


@pytest.mark.parametrize("name", ["x", "z"])
def test_nan_stays_in_its_group(backend: Backend, name: str) -> None:
    """A gate after the norm reaches its own element alone, anything before it the whole group."""
    for norm_before_gate in (False, True):
        inputs = replace(GATED, norm_before_gate=norm_before_gate).inputs()
        clean = backend.call(ops.rms_norm, **inputs)
        inputs[name][3, 30] = np.nan  # in the second group
        out = backend.call(ops.rms_norm, **inputs)
        reached = slice(30, 31) if name == "z" and norm_before_gate else slice(24, 48)
        assert np.isnan(out[3, reached]).all()
        out[3, reached] = clean[3, reached]
        assert_same_bits(out, clean)


def test_the_gate_saturates(backend: Backend) -> None:
    inputs = replace(GATED, norm_before_gate=True).inputs()
    ungated = backend.call(ops.rms_norm, **{**inputs, "z": None})
    shut = backend.call(ops.rms_norm, **{**inputs, "z": np.full_like(inputs["z"], -1e4)})
    open_ = backend.call(ops.rms_norm, **{**inputs, "z": np.full_like(inputs["z"], 1e4)})
    assert np.abs(shut).max() < 1e-30
    assert_close(open_, 1e4 * ungated, "float32")


# --- Bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "bad", "words"),
    [
        ("z", np.zeros((4, 96), np.float32), ["4", "5"]),
        ("z", np.zeros((5, 95), np.float32), ["95", "96"]),
        ("z", np.zeros((5, 96)), ["float64"]),
        ("z", 1.0, []),
        ("group_size", 0, ["0"]),
        ("group_size", -24, ["-24"]),
        ("group_size", 25, ["25", "96"]),
        ("group_size", 192, ["192", "96"]),
        ("group_size", 24.0, ["24.0"]),
        ("x", np.zeros((5, 0), np.float32), []),
    ],
)
def test_bad_argument(backend: Backend, name: str, bad: Any, words: list[str]) -> None:
    inputs = {**GATED.inputs(), name: bad}
    if name == "x":
        inputs["z"] = bad
    with refuses("rms_norm", name, *words):
        backend.call(ops.rms_norm, **inputs)
