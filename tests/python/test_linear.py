"""Matrix products with a model's weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import reference
from backends import Backend
from cases import LINEAR_CASES, LinearCase
from helpers import DTYPES, assert_close, assert_only_poison_around, assert_same_bits, refuses

from ssmcore import ops


@pytest.mark.parametrize("case", LINEAR_CASES)
def test_agrees_with_reference(backend: Backend, case: LinearCase) -> None:
    inputs = case.inputs()
    out = backend.call(ops.linear, **inputs)
    assert out.dtype == DTYPES[case.dtype]
    assert_close(out, reference.linear(**inputs), case.dtype)


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_weight_dtype_with_any_activation(
    backend: Backend, rows: int, dtype: str, weight_dtype: str
) -> None:
    inputs = LinearCase(rows=(rows,), dtype=dtype, weight_dtype=weight_dtype).inputs()
    assert_close(backend.call(ops.linear, **inputs), reference.linear(**inputs), dtype)


def test_sums_in_float32(backend: Backend) -> None:
    """A sum of ones that a bfloat16 or float16 accumulator would stop taking."""
    for dtype in ("bfloat16", "float16"):
        ones = np.ones((1, 4096), DTYPES[dtype])
        out = backend.call(ops.linear, x=ones, weight=ones)
        assert out.astype(np.float32).item() == 4096


def test_rows_are_independent(backend: Backend) -> None:
    inputs = LinearCase(rows=(9,)).inputs()
    clean = backend.call(ops.linear, **inputs)
    inputs["x"][4, 7] = np.nan
    out = backend.call(ops.linear, **inputs)
    assert np.isnan(out[4]).all()
    others = np.arange(9) != 4
    assert_same_bits(out[others], clean[others])


@pytest.mark.parametrize(("in_features", "out_features"), [(320, 96), (77, 33), (1536, 80)])
@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_batch_invariant_rows(
    backend: Backend, dtype: str, weight_dtype: str, in_features: int, out_features: int
) -> None:
    case = LinearCase((1000,), in_features, out_features, dtype, weight_dtype, bias_dtype=dtype)
    inputs = case.inputs()
    together = backend.call(ops.linear, **inputs, batch_invariant=True)
    for rows in (1, 3, 64, 333):
        some = {**inputs, "x": inputs["x"][400 : 400 + rows]}
        out = backend.call(ops.linear, **some, batch_invariant=True)
        assert_same_bits(out, together[400 : 400 + rows])


@pytest.mark.parametrize("rows", [1, 8, 64, 500])
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_call_same_bits(backend: Backend, dtype: str, rows: int) -> None:
    """Also where a sum is long and the outputs are few, so that it is worth splitting."""
    inputs = LinearCase((rows,), 5120, 96, dtype, dtype).inputs()
    out = backend.call(ops.linear, **inputs)
    for _ in range(5):
        assert_same_bits(backend.call(ops.linear, **inputs), out)


@pytest.mark.parametrize("rows", [1, 200])
@pytest.mark.parametrize("weight_dtype", DTYPES)
def test_threads_do_not_change_a_bit(
    backend: Backend, set_num_threads: Any, rows: int, weight_dtype: str
) -> None:
    case = LinearCase(rows=(rows,), in_features=300, out_features=501, weight_dtype=weight_dtype)
    inputs = case.inputs()
    set_num_threads(1)
    out = backend.call(ops.linear, **inputs)
    for threads in (2, 3):
        set_num_threads(threads)
        assert_same_bits(backend.call(ops.linear, **inputs), out)


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("name", ["x", "weight", "bias"])
def test_zero_strides(backend: Backend, name: str, rows: int) -> None:
    inputs = LinearCase(rows=(rows,)).inputs()
    inputs[name] = np.broadcast_to(inputs[name][:1], inputs[name].shape)
    assert_close(backend.call(ops.linear, **inputs), reference.linear(**inputs), "float32")


@pytest.mark.parametrize("rows", [1, 40])
def test_overlapping_rows(backend: Backend, rows: int) -> None:
    """Rows a single element apart, as of a sliding window."""
    signal = LinearCase(rows=(1,), in_features=500).inputs()["x"][0]
    windows = np.lib.stride_tricks.sliding_window_view(signal, 96)
    inputs = {"x": windows[:rows], "weight": windows[:70]}
    assert_close(backend.call(ops.linear, **inputs), reference.linear(**inputs), "float32")


@pytest.mark.parametrize("layout", ["padded", "spread"])
def test_inputs_and_what_lies_around_them_stay(backend: Backend, layout: str) -> None:
    inputs = LinearCase(layout=layout).inputs()
    before = {name: value.copy() for name, value in inputs.items()}
    backend.call(ops.linear, **inputs)
    for name, array in inputs.items():
        assert_same_bits(array, before[name])
        assert_only_poison_around(array)


@pytest.mark.parametrize(
    ("name", "bad", "words"),
    [
        ("x", np.zeros((5, 96), np.int32), ["int32"]),
        ("weight", np.zeros((70, 95), np.float32), ["95", "96"]),
        ("weight", np.zeros(96, np.float32), []),
        ("weight", np.zeros((70, 96)), ["float64"]),
        ("weight", np.zeros((70, 96), np.int32), ["int32"]),
        ("bias", np.zeros(69, np.float32), ["69", "70"]),
        ("bias", np.zeros((1, 70), np.float32), []),
        ("bias", np.zeros(70), ["float64"]),
    ],
)
def test_bad_argument(backend: Backend, name: str, bad: np.ndarray, words: list[str]) -> None:
    inputs = {**LinearCase().inputs(), name: bad}
    with refuses("linear", name, *words):
        backend.call(ops.linear, **inputs)
