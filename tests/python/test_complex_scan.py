"""The selective scan with complex A (S4D and S5 are this case), whole and step by step."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import reference
from backends import Backend
from cases import COMPLEX_SCAN_CASES, COMPLEX_UPDATE_CASES, ScanCase, StateUpdateCase
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
from sequences import scan_step, scan_steps

from ssmcore import ops

FORMS = ("constant", "shared", "1 group", "3 groups")
OPTIONS = ("D", "z", "delta_bias", "delta_softplus", "initial_state")


def step(backend: Backend, inputs: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """(out, state after) of an update."""
    state = backend.to_device(inputs["state"])
    out = backend.call(ops.selective_state_update, **{**inputs, "state": state})
    return out, backend.to_numpy(state)


def assert_agrees(backend: Backend, inputs: dict[str, Any], dtype: str) -> None:
    out, last_state = backend.call(ops.selective_scan, **inputs)
    expected_out, expected_state = reference.selective_scan(**inputs)
    assert out.dtype == DTYPES[dtype]
    assert last_state.dtype == np.complex64
    assert_close(out, expected_out, dtype)
    assert_close(last_state, expected_state, "float32")


@pytest.mark.parametrize("case", COMPLEX_SCAN_CASES)
def test_agrees_with_reference(backend: Backend, case: ScanCase) -> None:
    assert_agrees(backend, case.inputs(), case.dtype)


@pytest.mark.parametrize(("B", "C"), list(product(FORMS, FORMS)))
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_form_of_B_and_C(backend: Backend, B: str, C: str, dtype: str) -> None:
    assert_agrees(backend, ScanCase(A="complex", B=B, C=C, dtype=dtype).inputs(), dtype)


@pytest.mark.parametrize("options", list(product([False, True], repeat=len(OPTIONS))))
@pytest.mark.parametrize("form", ["constant", "3 groups"])
def test_every_choice_of_options(backend: Backend, form: str, options: tuple[bool, ...]) -> None:
    chosen = dict(zip(OPTIONS, options, strict=True))
    inputs = ScanCase(A="complex", B=form, C=form, seqlen=20, **chosen).inputs()
    assert_agrees(backend, inputs, "float32")


@pytest.mark.parametrize("case", COMPLEX_UPDATE_CASES)
def test_update_agrees_with_reference(backend: Backend, case: StateUpdateCase) -> None:
    inputs = case.inputs()
    expected_out, expected_state = reference.selective_state_update(**inputs)
    out, state = step(backend, inputs)
    assert out.dtype == DTYPES[case.dtype]
    assert_close(out, expected_out, case.dtype)
    assert_close(state, expected_state, "float32")


# --- Properties -----------------------------------------------------------------------------------


@given(
    seqlen=st.integers(2, 150),
    split_at=st.floats(0, 1),
    dim=st.integers(1, 40),
    dstate=st.integers(1, 9),
    B=st.sampled_from(["constant", "shared", "1 group"]),
    dtype=st.sampled_from(list(DTYPES)),
    layout=st.sampled_from(["contiguous", *LAYOUTS]),
)
def test_split_is_whole(
    backend: Backend, seqlen: int, split_at: float, dtype: str, **fields: Any
) -> None:
    inputs = ScanCase(A="complex", seqlen=seqlen, dtype=dtype, **fields).inputs()
    middle = 1 + round(split_at * (seqlen - 2))
    out, last_state = backend.call(ops.selective_scan, **inputs)
    first, state = backend.call(ops.selective_scan, **scan_steps(inputs, 0, middle))
    rest = {**scan_steps(inputs, middle, seqlen), "initial_state": state}
    second, state = backend.call(ops.selective_scan, **rest)
    assert_close(np.concatenate([first, second], axis=-1), out, dtype)
    assert_close(state, last_state, "float32")


@given(
    dim=st.integers(1, 13).map(lambda n: 3 * n),
    dstate=st.integers(1, 9),
    seqlen=st.integers(1, 12),
    groups=st.sampled_from(["shared", "1 group", "3 groups"]),
    dtype=st.sampled_from(list(DTYPES)),
)
def test_steps_are_the_sequence(
    backend: Backend, seqlen: int, groups: str, dtype: str, **fields: Any
) -> None:
    case = ScanCase(A="complex", B=groups, C=groups, seqlen=seqlen, dtype=dtype, **fields)
    inputs = case.inputs()
    out, last_state = backend.call(ops.selective_scan, **inputs)
    state = backend.to_device(inputs["initial_state"].copy())
    steps = [
        backend.call(ops.selective_state_update, state=state, **scan_step(inputs, t))
        for t in range(seqlen)
    ]
    assert_close(np.stack(steps, axis=-1), out, dtype)
    assert_close(backend.to_numpy(state), last_state, "float32")


@given(dim=st.integers(2, 70), seed=st.integers(0, 2**32 - 1))
def test_permuted_channels_permute_the_output(backend: Backend, dim: int, seed: int) -> None:
    inputs = ScanCase(A="complex", dim=dim, B="constant").inputs()
    order = np.random.default_rng(seed).permutation(dim)
    axis = {"u": 1, "delta": 1, "z": 1, "initial_state": 1, "A": 0, "B": 0, "D": 0, "delta_bias": 0}
    permuted = {**inputs, **{name: inputs[name].take(order, axis=k) for name, k in axis.items()}}
    out, last_state = backend.call(ops.selective_scan, **inputs)
    out_permuted, state_permuted = backend.call(ops.selective_scan, **permuted)
    assert_close(out_permuted, out[:, order], "float32")
    assert_close(state_permuted, last_state[:, order], "float32")


def test_permuted_states_leave_the_output(backend: Backend) -> None:
    inputs = ScanCase(A="complex").inputs()
    order = np.random.default_rng(0).permutation(16)
    axis = {"A": 1, "B": 1, "C": 1, "initial_state": 2}
    permuted = {**inputs, **{name: inputs[name].take(order, axis=k) for name, k in axis.items()}}
    out, last_state = backend.call(ops.selective_scan, **inputs)
    out_permuted, state_permuted = backend.call(ops.selective_scan, **permuted)
    assert_close(out_permuted, out, "float32")
    assert_close(state_permuted, last_state[..., order], "float32")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "token-major"])
def test_threads_do_not_change_a_bit(
    backend: Backend, set_num_threads: Any, dtype: str, layout: str
) -> None:
    case = ScanCase(A="complex", batch=3, dim=201, seqlen=70, dtype=dtype, layout=layout)
    inputs = case.inputs()
    set_num_threads(1)
    out, last_state = backend.call(ops.selective_scan, **inputs)
    for threads in (2, 3, 5):
        set_num_threads(threads)
        again, state_again = backend.call(ops.selective_scan, **inputs)
        assert_same_bits(again, out)
        assert_same_bits(state_again, last_state)


def test_real_numbers_as_complex_ones(backend: Backend) -> None:
    """Without imaginary parts y is twice the real scan's, and the states are the same."""
    inputs = ScanCase(D=False, z=False).inputs()
    out, last_state = backend.call(ops.selective_scan, **inputs)
    parts = {
        name: np.stack([inputs[name], 0 * inputs[name]], axis=-1).reshape(2, 16, 2 * 67)
        for name in ("B", "C")
    }
    states = {name: inputs[name].astype(np.complex64) for name in ("A", "initial_state")}
    complex_out, state = backend.call(ops.selective_scan, **{**inputs, **parts, **states})
    assert_close(complex_out, 2 * out, "float32")
    assert_close(state.real, last_state, "float32")
    assert not np.any(state.imag)


# --- Memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["constant", "3 groups"])
@pytest.mark.parametrize("name", ["A", "B", "C", "initial_state"])
def test_zero_strides(backend: Backend, name: str, form: str) -> None:
    inputs = ScanCase(A="complex", B=form, C=form).inputs()
    shape = inputs[name].shape
    for axis in range(len(shape)):
        repeated = np.broadcast_to(inputs[name].take([0], axis=axis), shape)
        assert_agrees(backend, {**inputs, name: repeated}, "float32")


@pytest.mark.parametrize("form", ["constant", "shared"])
@pytest.mark.parametrize("layout", ["padded", "token-major padded", "spread"])
def test_inputs_and_what_lies_around_them_stay(backend: Backend, layout: str, form: str) -> None:
    inputs = ScanCase(A="complex", B=form, C=form, layout=layout).inputs()
    arrays = {name: value for name, value in inputs.items() if isinstance(value, np.ndarray)}
    before = {name: value.copy() for name, value in arrays.items()}
    backend.call(ops.selective_scan, **inputs)
    for name, array in arrays.items():
        assert_same_bits(array, before[name])
        assert_only_poison_around(array)


def test_nan_in_one_channel_stays_there(backend: Backend) -> None:
    inputs = ScanCase(A="complex", dim=37).inputs()
    clean_out, clean_state = backend.call(ops.selective_scan, **inputs)
    inputs["u"][1, 5, 20] = np.nan
    out, last_state = backend.call(ops.selective_scan, **inputs)
    assert np.isnan(out[1, 5, 20:]).all()
    assert np.isnan(last_state[1, 5]).all()
    out[1, 5, 20:] = clean_out[1, 5, 20:]
    last_state[1, 5] = clean_state[1, 5]
    assert_same_bits(out, clean_out)
    assert_same_bits(last_state, clean_state)


# --- Numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("angle", [0.1, 3.2, 30, 100])
def test_large_angles(backend: Backend, angle: float) -> None:
    """Up to 16 turns a step. (Far beyond, the rounding of Δ Im(A) itself shows in float32.)"""
    inputs = ScanCase(A="complex", delta_softplus=False, delta_bias=False).inputs()
    random = np.random.default_rng(2)
    inputs["delta"] = random.uniform(0.5, 1, inputs["delta"].shape).astype(np.float32)
    frequencies = random.uniform(-angle, angle, inputs["A"].shape)
    inputs["A"] = (-random.uniform(0.1, 4, frequencies.shape) + 1j * frequencies).astype("c8")
    assert_agrees(backend, inputs, "float32")


def test_frequencies_of_s4d_lin(backend: Backend) -> None:
    """A[n] = -1/2 + iπn, over its usual range of Δ."""
    inputs = ScanCase(A="complex", B="constant", C="constant", dstate=64, seqlen=300).inputs()
    n = np.arange(64)
    inputs["A"] = np.tile((-0.5 + 1j * np.pi * n).astype(np.complex64), (24, 1))
    inputs["delta_bias"] = np.full(24, -4, np.float32)
    assert_agrees(backend, inputs, "float32")


def test_a_state_that_only_turns_keeps_its_modulus(backend: Backend) -> None:
    inputs = ScanCase(A="complex", seqlen=500, delta_bias=False).inputs()
    inputs["u"][...] = 0
    inputs["A"].real = 0
    _, last_state = backend.call(ops.selective_scan, **inputs)
    assert_close(np.abs(last_state), np.abs(inputs["initial_state"]), "float32")


# --- Bad input ------------------------------------------------------------------------------------


def zeros(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.zeros(shape, dtype)


@pytest.mark.parametrize(
    ("name", "bad", "words"),
    [
        ("A", zeros(24, 16, dtype=np.complex128), ["complex128"]),
        ("A", zeros(24, 0, dtype=np.complex64), ["dstate"]),
        ("B", zeros(2, 16, 67), ["67", "134"]),
        ("B", zeros(2, 16, 67, dtype=np.complex64), []),
        ("B", zeros(2, 16, 134, dtype=np.complex64), ["complex64", "float32"]),
        ("B", zeros(24, 16), ["float32", "complex64"]),
        ("C", zeros(2, 3, 16, 67), ["67", "134"]),
        ("C", zeros(2, 5, 16, 134), ["5", "24"]),
        ("C", zeros(24, 15, dtype=np.complex64), ["15", "16"]),
        ("initial_state", zeros(2, 24, 16), ["float32", "complex64"]),
        ("u", zeros(2, 24, 67, dtype=np.complex64), ["complex64"]),
    ],
)
def test_bad_argument(backend: Backend, name: str, bad: np.ndarray, words: list[str]) -> None:
    inputs = {**ScanCase(A="complex").inputs(), name: bad}
    with refuses("selective_scan", name, *words):
        backend.call(ops.selective_scan, **inputs)


def test_float64_is_for_real_A(backend: Backend) -> None:
    inputs = {**ScanCase(dtype="float64").inputs(), "A": zeros(24, 16, dtype=np.complex64)}
    with refuses("selective_scan", "A", "complex64", "float64"):
        backend.call(ops.selective_scan, **inputs)


@pytest.mark.parametrize(
    ("name", "bad", "words"),
    [
        ("state", zeros(3, 24, 16), ["float32", "complex64"]),
        ("B", zeros(3, 16), []),
        ("B", zeros(3, 16, 1), ["1", "2"]),
        ("C", zeros(3, 16, dtype=np.complex64), []),
        ("C", zeros(3, 5, 16, 2), ["5", "24"]),
    ],
)
def test_update_bad_argument(
    backend: Backend, name: str, bad: np.ndarray, words: list[str]
) -> None:
    inputs = {**StateUpdateCase(A="complex").inputs(), name: bad}
    with refuses("selective_state_update", name, *words):
        step(backend, inputs)
