"""The backward of the selective scan, against a sequential fp64 reference, finite differences, the
published CUDA operators' gradients, and itself."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import reference
import reference_gradients
from backends import Backend
from cases import (
    COMPLEX_SCAN_CASES,
    FLOAT64_SCAN_CASES,
    LARGE_SCAN_CASES,
    SCAN_CASES,
    ScanCase,
)
from finite_differences import numerical_gradient
from helpers import (
    DTYPES,
    assert_close,
    assert_same_bits,
    refuses,
    relative_error,
)
from scan_gradients import (
    Arrays,
    assert_agrees,
    assert_all_close,
    backward,
    output_gradients,
    saved_states,
)
from test_golden_ops import COMPLEX_SCANS, REAL_SCANS, load, scan_inputs

from ssmcore import ops

FORMS = ("constant", "shared", "1 group", "3 groups")
OPTIONS = ("D", "z", "delta_bias", "delta_softplus", "initial_state")


@pytest.mark.parametrize(
    "case", [*SCAN_CASES, *LARGE_SCAN_CASES, *FLOAT64_SCAN_CASES, *COMPLEX_SCAN_CASES]
)
def test_agrees_with_reference(backend: Backend, case: ScanCase) -> None:
    assert_agrees(backend, case)


@pytest.mark.parametrize(("B", "C"), list(product(FORMS, FORMS)))
@pytest.mark.parametrize("A", ["real", "complex"])
@pytest.mark.parametrize("dtype", [*DTYPES, "float64"])
def test_every_form_of_B_and_C(backend: Backend, B: str, C: str, A: str, dtype: str) -> None:
    case = ScanCase(B=B, C=C, A=A if dtype != "float64" else "real", dtype=dtype)
    assert_agrees(backend, case)


@pytest.mark.parametrize("options", list(product([False, True], repeat=len(OPTIONS))))
@pytest.mark.parametrize("form", ["constant", "3 groups"])
def test_every_choice_of_options(backend: Backend, form: str, options: tuple[bool, ...]) -> None:
    chosen = dict(zip(OPTIONS, options, strict=True))
    assert_agrees(backend, ScanCase(B=form, C=form, seqlen=20, **chosen))


@pytest.mark.parametrize("chunk_size", [None, 30, 64])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 70])
def test_long_rows_of_few_channels(
    backend: Backend, dim: int, dtype: str, chunk_size: int | None
) -> None:
    """Which a GPU cuts into parts that run side by side."""
    case = ScanCase(batch=1, dim=dim, seqlen=1500, dtype=dtype)
    inputs = {**case.inputs(), **output_gradients(case)}
    # Slow decay, so that what comes from one part to the next counts.
    inputs["A"] = inputs["A"] / 100
    expected = reference_gradients.selective_scan_bwd(**inputs)
    saved = saved_states(backend, {name: inputs[name] for name in case.inputs()}, chunk_size)
    actual = backward(backend, **inputs, **saved)
    assert_all_close(actual, expected, inputs)
    for name, gradient in backward(backend, **inputs, **saved).items():
        assert_same_bits(gradient, actual[name])


@pytest.mark.parametrize("dim", [256, 700])
@pytest.mark.parametrize("batch", [1, 11])
def test_sums_over_many_channels_and_rows(backend: Backend, dim: int, batch: int) -> None:
    assert_agrees(backend, ScanCase(batch=batch, dim=dim, dstate=5, seqlen=70))


@pytest.mark.parametrize("dstate", [17, 100, 256])
@pytest.mark.parametrize("form", ["constant", "shared", "2 groups"])
@pytest.mark.parametrize("A", ["real", "complex"])
def test_many_states(backend: Backend, A: str, form: str, dstate: int) -> None:
    assert_agrees(backend, ScanCase(dim=70, dstate=dstate, A=A, B=form, C=form))


# --- Finite differences ---------------------------------------------------------------------------

SMALL = ScanCase(batch=2, dim=6, seqlen=5, dstate=2, dtype="float64")


@pytest.mark.parametrize("scan", [reference.selective_scan, ops.selective_scan])
@pytest.mark.parametrize("delta_softplus", [False, True])
@pytest.mark.parametrize(("B", "C"), [("constant", "3 groups"), ("3 groups", "1 group")])
def test_agrees_with_finite_differences(
    backend: Backend, scan: Any, delta_softplus: bool, B: str, C: str
) -> None:
    case = replace(SMALL, B=B, C=C, delta_softplus=delta_softplus)
    inputs, outputs = case.inputs(), output_gradients(case)
    gradients = backward(backend, **inputs, **outputs)
    assert_is_gradient(scan, inputs, outputs, gradients)


@pytest.mark.parametrize(("B", "C"), [("constant", "3 groups"), ("3 groups", "constant")])
def test_complex_reference_agrees_with_finite_differences(B: str, C: str) -> None:
    case = replace(SMALL, dtype="float32", A="complex", B=B, C=C)
    inputs = {
        name: reference.fp64(value) if isinstance(value, np.ndarray) else value
        for name, value in case.inputs().items()
    }
    outputs = output_gradients(case)
    gradients = reference_gradients.selective_scan_bwd(**inputs, **outputs)
    assert_is_gradient(reference.selective_scan, inputs, outputs, gradients)


def assert_is_gradient(scan: Any, inputs: Arrays, outputs: Arrays, gradients: Arrays) -> None:
    """`gradients` are those of what weighs the scan's results with `outputs`."""

    def loss() -> float:
        out, last_state = scan(**inputs)
        of_state = (np.conj(outputs["dlast_state"]) * last_state).real.sum()
        return float((outputs["dout"] * out).sum() + of_state)

    arrays = {f"d{n}": value for n, value in inputs.items() if isinstance(value, np.ndarray)}
    assert gradients.keys() == arrays.keys()
    for name, array in arrays.items():
        reals = array.view(np.float64)
        expected = numerical_gradient(loss, reals, np.arange(reals.size))
        actual = np.ascontiguousarray(gradients[name]).view(np.float64).reshape(-1)
        assert relative_error(actual, expected) < 1e-8, name


# --- The published operators ----------------------------------------------------------------------


@pytest.mark.parametrize("case", [*REAL_SCANS, *COMPLEX_SCANS])
def test_agrees_with_published_gradients(backend: Backend, case: str) -> None:
    tensors = load(case)
    inputs = scan_inputs(tensors)
    dout = tensors["dout"].astype(inputs["u"].dtype)
    for gradients in (
        backward(backend, **inputs, dout=dout),
        reference_gradients.selective_scan_bwd(**inputs, dout=dout),
    ):
        assert gradients.keys() == {f"d{n}" for n in inputs if n != "delta_softplus"}
        for name, gradient in gradients.items():
            assert_close(gradient, tensors[name], str(tensors["dtype"]), rounded=True)


# --- Numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high"),
    [
        pytest.param(-40, -15, id="softplus-without-cancellation"),
        pytest.param(-2, 2, id="softplus-around-zero"),
        pytest.param(19, 21, id="softplus-threshold"),
        pytest.param(50, 1000, id="state-decays-at-once"),
    ],
)
def test_range_of_delta(backend: Backend, low: float, high: float) -> None:
    case = ScanCase(D=False, delta_bias=False)
    inputs = {**case.inputs(), **output_gradients(case)}
    delta = np.random.default_rng(1).uniform(low, high, inputs["delta"].shape)
    inputs["delta"] = delta.astype(np.float32)
    expected = reference_gradients.selective_scan_bwd(**inputs)
    assert_all_close(backward(backend, **inputs), expected, inputs)


def test_gate_saturates(backend: Backend) -> None:
    case = ScanCase()
    inputs = {**case.inputs(), **output_gradients(case), "dlast_state": None}
    shut = np.full_like(inputs["z"], -1e4)
    for gradient in backward(backend, **{**inputs, "z": shut}).values():
        assert np.abs(gradient).max() < 1e-30
    # A gate of z as good as multiplies by z.
    wide = np.full_like(inputs["z"], 64)
    open_ = backward(backend, **{**inputs, "z": wide})
    scaled = backward(backend, **{**inputs, "z": None, "dout": 64 * inputs["dout"]})
    for name, gradient in scaled.items():
        assert_close(open_[name], gradient, "float32")


# --- What is asked for ----------------------------------------------------------------------------


def test_only_what_is_needed(backend: Backend) -> None:
    case = ScanCase()
    arguments = {**case.inputs(), **output_gradients(case)}
    everything = backward(backend, **arguments)
    for name, gradient in everything.items():
        only = backward(backend, **arguments, needs=[name.removeprefix("d")])
        assert only.keys() == {name}
        assert_same_bits(only[name], gradient)


def test_without_a_gradient_of_the_state(backend: Backend) -> None:
    case = ScanCase()
    arguments = {**case.inputs(), **output_gradients(case)}
    zeros = np.zeros_like(arguments.pop("dlast_state"))
    with_zeros = backward(backend, **arguments, dlast_state=zeros)
    for name, gradient in backward(backend, **arguments).items():
        assert_same_bits(gradient, with_zeros[name])


# --- Bad input ------------------------------------------------------------------------------------


def zeros(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.zeros(shape, dtype)


@pytest.mark.parametrize(
    ("name", "bad", "words"),
    [
        ("u", zeros(24, 67), []),
        ("delta", zeros(2, 24, 66), ["66", "67"]),
        ("A", zeros(23, 16), ["23", "24"]),
        ("B", zeros(2, 15, 67), ["15", "16"]),
        ("C", zeros(2, 5, 16, 67), ["5", "24"]),
        ("z", zeros(2, 23, 67), ["23", "24"]),
        ("dout", zeros(2, 24, 66), ["66", "67"]),
        ("dout", zeros(2, 24, 67, dtype=np.float16), ["float16", "float32"]),
        ("dlast_state", zeros(2, 24, 15), ["15", "16"]),
        ("dlast_state", zeros(2, 24, 16, dtype=np.complex64), ["complex64", "float32"]),
        ("initial_state", zeros(1, 24, 16), ["1", "2"]),
        ("chunk_states", zeros(2, 2, 24, 16), ["2", "3"]),
        ("chunk_states", zeros(2, 3, 24, 16, dtype=np.float64), ["float64", "float32"]),
        ("chunk_size", 0, ["1"]),
        ("chunk_size", 2.5, ["1"]),
        ("needs", ["x"], ["'x'"]),
    ],
)
def test_bad_argument(backend: Backend, name: str, bad: Any, words: list[str]) -> None:
    case = ScanCase()
    saved = {"chunk_states": zeros(2, 3, 24, 16), "chunk_size": 30}
    arguments = {**case.inputs(), **output_gradients(case), **saved, name: bad}
    with refuses("selective_scan_bwd", name, *words):
        backend.call(ops.selective_scan_bwd, **arguments)
