"""Root-mean-square normalisation, with and without a residual."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import reference
from backends import Backend
from cases import NORM_CASES, NormCase
from helpers import DTYPES, assert_close, assert_only_poison_around, assert_same_bits, refuses

from ssmcore import ops


@pytest.mark.parametrize("case", NORM_CASES)
def test_agrees_with_reference(backend: Backend, case: NormCase) -> None:
    inputs = case.inputs()
    expected_out, expected_residual = reference.rms_norm(**inputs)
    if case.residual_dtype is None:
        out = backend.call(ops.rms_norm, **inputs)
    else:
        out, residual_out = backend.call(ops.rms_norm, **inputs)
        assert residual_out.dtype == DTYPES[case.residual_dtype]
        assert_close(residual_out, expected_residual, case.residual_dtype)
    assert out.dtype == DTYPES[case.dtype]
    assert_close(out, expected_out, case.dtype)


def test_default_eps(backend: Backend) -> None:
    inputs = NormCase(residual_dtype=None, scale=1e-3).inputs()
    expected, _ = reference.rms_norm(inputs["x"], inputs["weight"], eps=1e-5)
    assert_close(
        backend.call(ops.rms_norm, x=inputs["x"], weight=inputs["weight"]), expected, "float32"
    )


def test_rows_of_zeros_stay_zeros(backend: Backend) -> None:
    out = backend.call(
        ops.rms_norm, x=np.zeros((3, 17), np.float32), weight=np.ones(17, np.float32)
    )
    assert_same_bits(out, np.zeros((3, 17), np.float32))


def test_squares_beyond_the_range_of_float16(backend: Backend) -> None:
    x = np.full((2, 33), 6e4, np.float16)
    weight = np.ones(33, np.float32)
    out = backend.call(ops.rms_norm, x=x, weight=weight)
    assert_close(out, np.ones((2, 33)), "float16")


def test_rows_are_independent(backend: Backend) -> None:
    inputs = NormCase(shape=(7, 129), residual_dtype=None).inputs()
    clean = backend.call(ops.rms_norm, **inputs)
    inputs["x"][3, 100] = np.nan
    out = backend.call(ops.rms_norm, **inputs)
    assert np.isnan(out[3]).all()
    out[3] = clean[3]
    assert_same_bits(out, clean)


def test_threads_do_not_change_a_bit(backend: Backend, set_num_threads: Any) -> None:
    inputs = NormCase(shape=(501, 257)).inputs()
    set_num_threads(1)
    out, residual_out = backend.call(ops.rms_norm, **inputs)
    for threads in (2, 3):
        set_num_threads(threads)
        again, residual_again = backend.call(ops.rms_norm, **inputs)
        assert_same_bits(again, out)
        assert_same_bits(residual_again, residual_out)


@pytest.mark.parametrize("name", ["x", "weight", "residual"])
def test_zero_strides(backend: Backend, name: str) -> None:
    inputs = NormCase().inputs()
    shape = inputs[name].shape
    for axis in range(len(shape)):
        arguments = {**inputs, name: np.broadcast_to(inputs[name].take([0], axis=axis), shape)}
        expected, _ = reference.rms_norm(**arguments)
        assert_close(backend.call(ops.rms_norm, **arguments)[0], expected, "float32")


@pytest.mark.parametrize("layout", ["padded", "spread"])
def test_inputs_and_what_lies_around_them_stay(backend: Backend, layout: str) -> None:
    inputs = NormCase(layout=layout).inputs()
    arrays = {name: value for name, value in inputs.items() if isinstance(value, np.ndarray)}
    before = {name: value.copy() for name, value in arrays.items()}
    backend.call(ops.rms_norm, **inputs)
    for name, array in arrays.items():
        assert_same_bits(array, before[name])
        assert_only_poison_around(array)


@pytest.mark.parametrize(
    ("name", "bad", "words"),
    [
        ("x", np.zeros((5, 96), np.int64), ["int64"]),
        ("weight", np.zeros(95, np.float32), ["95", "96"]),
        ("weight", np.zeros((1, 96), np.float32), []),
        ("residual", np.zeros((4, 96), np.float32), ["4", "5"]),
        ("residual", np.zeros((5, 95), np.float32), ["95", "96"]),
        ("residual", np.zeros((5, 96), np.float64), ["float64"]),
        ("eps", -1.0, ["-1"]),
    ],
)
def test_bad_argument(backend: Backend, name: str, bad: Any, words: list[str]) -> None:
    inputs = {**NormCase().inputs(), name: bad}
    with refuses("rms_norm", name, *words):
        backend.call(ops.rms_norm, **inputs)
