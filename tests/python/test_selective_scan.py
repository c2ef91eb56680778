"""The selective scan over a whole sequence."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import reference
from backends import Backend
from cases import FLOAT64_SCAN_CASES, SCAN_CASES, ScanCase
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


@pytest.mark.parametrize("case", SCAN_CASES)
def test_agrees_with_reference(backend: Backend, case: ScanCase) -> None:
    inputs = case.inputs()
    out, last_state = backend.call(ops.selective_scan, **inputs)
    expected_out, expected_state = reference.selective_scan(**inputs)
    assert out.dtype == DTYPES[case.dtype]
    assert last_state.dtype == np.float32
    assert_close(out, expected_out, case.dtype)
    assert_close(last_state, expected_state, "float32")


@pytest.mark.parametrize("layout", ["contiguous", "token-major"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "dim", "seqlen", "dstate"),
    [
        (1, 16, 264, 16),
        (1, 2080, 72, 16),
        (2, 4096, 40, 16),
        (9, 4096, 40, 4),
        (2, 160, 264, 32),
        (2, 80, 264, 64),
        (2, 40, 264, 128),
        (2, 24, 136, 256),
    ],
)
def test_sizes_that_vectors_divide(
    backend: Backend, batch: int, dim: int, seqlen: int, dstate: int, dtype: str, layout: str
) -> None:
    """Aligned operands, and sizes for which a GPU's work is shared out differently."""
    case = ScanCase(batch, dim, seqlen, dstate, dtype, layout=layout)
    inputs = case.inputs()
    out, last_state = backend.call(ops.selective_scan, **inputs)
    expected_out, expected_state = reference.selective_scan(**inputs)
    assert_close(out, expected_out, dtype)
    assert_close(last_state, expected_state, "float32")


@pytest.mark.parametrize("layout", ["contiguous", "token-major", "spread"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_long_row_of_few_channels(backend: Backend, dtype: str, layout: str) -> None:
    """On a GPU such a row is cut into parts that run side by side."""
    inputs = ScanCase(1, 16, 40_003, dtype=dtype, layout=layout).inputs()
    inputs["A"][:4] /= 64  # several parts are remembered
    out, last_state = backend.call(ops.selective_scan, **inputs)
    expected_out, expected_state = reference.selective_scan(**inputs)
    assert_close(out, expected_out, dtype)
    assert_close(last_state, expected_state, "float32")


@pytest.mark.parametrize("case", FLOAT64_SCAN_CASES)
def test_float64_agrees_with_reference(backend: Backend, case: ScanCase) -> None:
    inputs = case.inputs()
    out, last_state = backend.call(ops.selective_scan, **inputs)
    expected_out, expected_state = reference.selective_scan(**inputs)
    assert out.dtype == last_state.dtype == np.float64
    assert_close(out, expected_out, "float64")
    assert_close(last_state, expected_state, "float64")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["constant", "3 groups"])
def test_narrow_types_agree_with_float64(backend: Backend, dtype: str, form: str) -> None:
    inputs = ScanCase(dtype=dtype, B=form, C=form, seqlen=200).inputs()
    out, last_state = backend.call(ops.selective_scan, **inputs)
    wide = {
        name: value.astype(np.float64) if isinstance(value, np.ndarray) else value
        for name, value in inputs.items()
    }
    expected_out, expected_state = backend.call(ops.selective_scan, **wide)
    assert_close(out, expected_out, dtype)
    assert_close(last_state, expected_state, "float32")


def test_out_alone(backend: Backend) -> None:
    inputs = ScanCase().inputs()
    out, _ = backend.call(ops.selective_scan, **inputs)
    alone = backend.call(ops.selective_scan, **inputs, return_last_state=False)
    assert_same_bits(alone, out)


def test_defaults_are_the_plain_recurrence(backend: Backend) -> None:
    inputs = ScanCase(delta_softplus=False).inputs()
    plain = {name: inputs[name] for name in ("u", "delta", "A", "B", "C")}
    out, last_state = backend.call(ops.selective_scan, **plain)
    expected_out, expected_state = reference.selective_scan(**plain)
    assert_close(out, expected_out, "float32")
    assert_close(last_state, expected_state, "float32")


# --- Properties -----------------------------------------------------------------------------------


@given(
    seqlen=st.integers(2, 150),
    split_at=st.floats(0, 1),
    dim=st.integers(1, 40),
    dstate=st.integers(1, 20),
    dtype=st.sampled_from(list(DTYPES)),
    layout=st.sampled_from(["contiguous", *LAYOUTS]),
)
def test_split_is_whole(
    backend: Backend,
    seqlen: int,
    split_at: float,
    dim: int,
    dstate: int,
    dtype: str,
    layout: str,
) -> None:
    inputs = ScanCase(seqlen=seqlen, dim=dim, dstate=dstate, dtype=dtype, layout=layout).inputs()
    middle = 1 + round(split_at * (seqlen - 2))
    out, last_state = backend.call(ops.selective_scan, **inputs)

    first, state = backend.call(ops.selective_scan, **scan_steps(inputs, 0, middle))
    rest = {**scan_steps(inputs, middle, seqlen), "initial_state": state}
    second, state = backend.call(ops.selective_scan, **rest)
    assert_close(np.concatenate([first, second], axis=-1), out, dtype)
    assert_close(state, last_state, "float32")


@given(
    dim=st.integers(1, 40),
    dstate=st.integers(1, 20),
    seqlen=st.integers(1, 12),
    dtype=st.sampled_from(list(DTYPES)),
)
def test_steps_are_the_sequence(
    backend: Backend, dim: int, dstate: int, seqlen: int, dtype: str
) -> None:
    inputs = ScanCase(dim=dim, dstate=dstate, seqlen=seqlen, dtype=dtype).inputs()
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
    inputs = ScanCase(dim=dim, B="constant").inputs()
    order = np.random.default_rng(seed).permutation(dim)
    axis = {"u": 1, "delta": 1, "z": 1, "initial_state": 1, "A": 0, "B": 0, "D": 0, "delta_bias": 0}
    permuted = {**inputs, **{name: inputs[name].take(order, axis=k) for name, k in axis.items()}}
    out, last_state = backend.call(ops.selective_scan, **inputs)
    out_permuted, state_permuted = backend.call(ops.selective_scan, **permuted)
    assert_close(out_permuted, out[:, order], "float32")
    assert_close(state_permuted, last_state[:, order], "float32")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "token-major"])
def test_threads_do_not_change_a_bit(
    backend: Backend, set_num_threads: Any, dtype: str, layout: str
) -> None:
    inputs = ScanCase(batch=3, dim=201, seqlen=130, dtype=dtype, layout=layout).inputs()
    set_num_threads(1)
    out, last_state = backend.call(ops.selective_scan, **inputs)
    for threads in (2, 3, 5):
        set_num_threads(threads)
        again, state_again = backend.call(ops.selective_scan, **inputs)
        assert_same_bits(again, out)
        assert_same_bits(state_again, last_state)


def test_calls_from_several_threads_at_a_time(backend: Backend) -> None:
    cases = [ScanCase(dim=dim, seqlen=200) for dim in (40, 64, 129, 300)]
    expected = [backend.call(ops.selective_scan, **case.inputs()) for case in cases]

    def repeatedly(case: ScanCase) -> list[tuple[np.ndarray, np.ndarray]]:
        return [backend.call(ops.selective_scan, **case.inputs()) for _ in range(10)]

    with ThreadPoolExecutor(len(cases)) as pool:
        for results, (out, last_state) in zip(pool.map(repeatedly, cases), expected, strict=True):
            for again, state_again in results:
                assert_same_bits(again, out)
                assert_same_bits(state_again, last_state)


# --- Memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "name", ["u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state"]
)
def test_zero_strides(backend: Backend, name: str, dtype: str) -> None:
    inputs = ScanCase(dtype=dtype).inputs()
    shape = inputs[name].shape
    for axis in range(len(shape)):
        repeated = np.broadcast_to(inputs[name].take([0], axis=axis), shape)
        arguments = {**inputs, name: repeated}
        out, last_state = backend.call(ops.selective_scan, **arguments)
        expected_out, expected_state = reference.selective_scan(**arguments)
        assert_close(out, expected_out, dtype)
        assert_close(last_state, expected_state, "float32")


@pytest.mark.parametrize("layout", ["padded", "token-major padded", "spread"])
def test_inputs_and_what_lies_around_them_stay(backend: Backend, layout: str) -> None:
    inputs = ScanCase(layout=layout).inputs()
    arrays = {name: value for name, value in inputs.items() if isinstance(value, np.ndarray)}
    before = {name: value.copy() for name, value in arrays.items()}
    backend.call(ops.selective_scan, **inputs)
    for name, array in arrays.items():
        assert_same_bits(array, before[name])
        assert_only_poison_around(array)


def test_nan_in_one_channel_stays_there(backend: Backend) -> None:
    inputs = ScanCase(dim=37).inputs()
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
    inputs = ScanCase(D=False, delta_bias=False, initial_state=False).inputs()
    delta = np.random.default_rng(1).uniform(low, high, inputs["delta"].shape)
    inputs["delta"] = delta.astype(np.float32)
    out, last_state = backend.call(ops.selective_scan, **inputs)
    expected_out, expected_state = reference.selective_scan(**inputs)
    assert_close(out, expected_out, "float32")
    assert_close(last_state, expected_state, "float32")


def test_delta_so_negative_that_nothing_happens(backend: Backend) -> None:
    inputs = ScanCase(D=False, z=False, delta_bias=False).inputs()
    inputs["delta"] = np.full_like(inputs["delta"], -1000)
    _, last_state = backend.call(ops.selective_scan, **inputs)
    assert_same_bits(last_state, inputs["initial_state"])


def test_gate_saturates(backend: Backend) -> None:
    inputs = ScanCase().inputs()
    ungated, _ = backend.call(ops.selective_scan, **{**inputs, "z": None})
    shut, _ = backend.call(ops.selective_scan, **{**inputs, "z": np.full_like(inputs["z"], -1e4)})
    open_, _ = backend.call(ops.selective_scan, **{**inputs, "z": np.full_like(inputs["z"], 1e4)})
    assert np.abs(shut).max() < 1e-30
    assert_close(open_, 1e4 * ungated, "float32")


def test_state_keeps_float32_under_narrow_activations(backend: Backend) -> None:
    """A sum of many small terms, which a bfloat16 state would stop taking."""
    one = np.ones((1, 1, 2000), DTYPES["bfloat16"])
    A = np.zeros((1, 1), np.float32)
    delta = np.full_like(one, 2.0**-7)
    _, last_state = backend.call(ops.selective_scan, u=one, delta=delta, A=A, B=one, C=one)
    assert_close(last_state, np.full((1, 1, 1), 2000 * 2.0**-7), "float32")


# --- Bad input ------------------------------------------------------------------------------------


def zeros(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.zeros(shape, dtype)


@pytest.mark.parametrize(
    ("name", "bad", "words"),
    [
        ("u", zeros(24, 67), []),
        ("delta", zeros(2, 24, 67, dtype=np.float64), ["float64", "float32"]),
        ("u", zeros(2, 24, 67, dtype=np.int32), ["int32"]),
        ("u", zeros(2, 24, 0), []),
        ("delta", zeros(2, 24, 66), ["66", "67"]),
        ("delta", zeros(2, 24, 67, dtype=np.float16), ["float16", "float32"]),
        ("A", zeros(23, 16), ["23", "24"]),
        ("A", zeros(24), []),
        ("A", zeros(24, 0), ["dstate"]),
        ("A", zeros(24, 16, dtype=np.float16), ["float16", "float32"]),
        ("B", zeros(2, 15, 67), ["15", "16"]),
        ("B", zeros(67), []),
        ("B", zeros(2, 5, 16, 67), ["5", "24"]),
        ("B", zeros(2, 0, 16, 67), []),
        ("B", zeros(24, 16, dtype=np.float16), ["float16", "float32"]),
        ("C", zeros(2, 8, 67), ["8", "16"]),
        ("C", zeros(3, 16, 67), ["3", "2"]),
        ("D", zeros(23), ["23", "24"]),
        ("D", zeros(24, dtype=np.float16), ["float16", "float32"]),
        ("z", zeros(2, 23, 67), ["23", "24"]),
        ("z", zeros(2, 24, 67, dtype=DTYPES["bfloat16"]), ["bfloat16", "float32"]),
        ("delta_bias", zeros(1), ["1", "24"]),
        ("initial_state", zeros(2, 24, 15), ["15", "16"]),
        ("initial_state", zeros(2, 24, 16, dtype=DTYPES["bfloat16"]), ["bfloat16", "float32"]),
        ("u", zeros(2, 24, 67)[:, :, ::-1], ["negative", "stride"]),
    ],
)
def test_bad_argument(backend: Backend, name: str, bad: np.ndarray, words: list[str]) -> None:
    inputs = {**ScanCase().inputs(), name: bad}
    with refuses("selective_scan", name, *words):
        backend.call(ops.selective_scan, **inputs)


def test_groups_must_agree(backend: Backend) -> None:
    inputs = {**ScanCase(B="3 groups").inputs(), "C": zeros(2, 2, 16, 67)}
    with refuses("selective_scan", "C", "ngroups", "2", "3"):
        backend.call(ops.selective_scan, **inputs)
