"""What a scan writes on request: the states every K steps, and the sum of Δ."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import reference
from backends import Backend
from cases import ScanCase
from helpers import DTYPES, LAYOUTS, assert_close, assert_same_bits, refuses
from hypothesis import given
from hypothesis import strategies as st
from sequences import boundaries, scan_steps

from ssmcore import _core, ops


def ends_of_chunks(seqlen: int, chunk_size: int) -> list[int]:
    """After how many steps a state is asked for."""
    return [*range(chunk_size, seqlen, chunk_size), seqlen]


@given(
    seqlen=st.integers(1, 150),
    chunk_size=st.integers(1, 160),
    dim=st.sampled_from([1, 3, 24, 39]),
    dstate=st.sampled_from([1, 5, 16, 70]),
    dtype=st.sampled_from([*DTYPES, "float64"]),
    A=st.sampled_from(["real", "complex"]),
    B=st.sampled_from(["constant", "shared", "1 group"]),
    layout=st.sampled_from(["contiguous", *LAYOUTS]),
)
def test_states_are_those_of_prefixes(
    backend: Backend, seqlen: int, chunk_size: int, dtype: str, A: str, **fields: Any
) -> None:
    """Every chunk state ends the scan of its prefix, and the rest can be resumed from it."""
    A = "real" if dtype == "float64" else A
    case = ScanCase(seqlen=seqlen, dtype=dtype, A=A, **fields)
    state_dtype = "float64" if dtype == "float64" else "float32"
    inputs = case.inputs()
    out, last_state, chunk_states = backend.call(
        ops.selective_scan, **inputs, chunk_size=chunk_size
    )
    ends = ends_of_chunks(seqlen, chunk_size)
    assert chunk_states.shape == (2, len(ends), *last_state.shape[1:])
    assert chunk_states.dtype == last_state.dtype
    assert_same_bits(chunk_states[:, -1], last_state)
    for i in {0, len(ends) // 2, len(ends) - 1}:
        _, state = backend.call(ops.selective_scan, **scan_steps(inputs, 0, ends[i]))
        assert_close(chunk_states[:, i], state, state_dtype)
        if ends[i] < seqlen:
            rest = scan_steps(inputs, ends[i], seqlen)
            rest["initial_state"] = chunk_states[:, i]
            out_rest, last_of_rest = backend.call(ops.selective_scan, **rest)
            # Small pieces of a tensor have no scale of their own.
            resumed = np.concatenate([out[..., : ends[i]], out_rest], axis=-1)
            assert_close(resumed, out, dtype)
            assert_close(last_of_rest, last_state, state_dtype)


@given(
    lengths=st.lists(
        st.one_of(st.just(0), st.just(1), st.integers(2, 90)), min_size=1, max_size=6
    ).filter(any),
    chunk_size=st.integers(1, 100),
    A=st.sampled_from(["real", "complex"]),
    dtype=st.sampled_from([*DTYPES, "float64"]),
)
def test_packed_is_separate(
    backend: Backend, lengths: list[int], chunk_size: int, A: str, dtype: str
) -> None:
    A = "real" if dtype == "float64" else A
    inputs = ScanCase(batch=1, seqlen=sum(lengths), A=A, dtype=dtype, initial_state=False).inputs()
    asked = {"chunk_size": chunk_size, "return_delta_sum": True}
    cu_seqlens = boundaries(lengths)
    _, last_state, chunk_states, delta_sum = backend.call(
        ops.selective_scan, **inputs, **asked, cu_seqlens=cu_seqlens
    )
    states = []
    for s, length in enumerate(lengths):
        if length == 0:
            assert not np.any(last_state[s]) and not np.any(delta_sum[s])
            continue
        steps = scan_steps(inputs, cu_seqlens[s], cu_seqlens[s + 1])
        _, state, chunks, total = backend.call(ops.selective_scan, **steps, **asked)
        assert_same_bits(last_state[s], state[0])
        assert_same_bits(delta_sum[s], total[0])
        states.append(chunks)
    assert_same_bits(chunk_states, np.concatenate(states, axis=1))


@pytest.mark.parametrize("dtype", [*DTYPES, "float64"])
@pytest.mark.parametrize("delta_softplus", [False, True])
@pytest.mark.parametrize("delta_bias", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", *LAYOUTS])
def test_delta_sum(
    backend: Backend, dtype: str, delta_softplus: bool, delta_bias: bool, layout: str
) -> None:
    case = ScanCase(dtype=dtype, delta_softplus=delta_softplus, seqlen=300, layout=layout)
    inputs = replace(case, delta_bias=delta_bias).inputs()
    _, delta_sum = backend.call(
        ops.selective_scan, **inputs, return_last_state=False, return_delta_sum=True
    )
    delta = reference.fp64(inputs["delta"])
    if delta_bias:
        delta = delta + reference.fp64(inputs["delta_bias"])[:, None]
    if delta_softplus:
        delta = reference.softplus(delta)
    parameter = "float64" if dtype == "float64" else "float32"
    assert delta_sum.dtype == parameter
    assert_close(delta_sum, delta.sum(axis=-1), parameter)


@pytest.mark.parametrize("layout", ["contiguous", "token-major"])
@pytest.mark.parametrize("chunk_size", [100, 2048])
def test_long_row_of_few_channels(backend: Backend, chunk_size: int, layout: str) -> None:
    """On a GPU such a row is cut into parts of whole chunks, here of 2,400 or 2,048 steps."""
    case = ScanCase(1, 16, 20_003, layout=layout)
    inputs = case.inputs()
    inputs["A"][:4] /= 64  # several parts are remembered
    asked = {"chunk_size": chunk_size, "return_delta_sum": True}
    out, last_state, chunk_states, delta_sum = backend.call(ops.selective_scan, **inputs, **asked)
    expected_out, expected_state = reference.selective_scan(**inputs)
    assert_close(out, expected_out, "float32")
    assert_close(last_state, expected_state, "float32")
    ends = ends_of_chunks(case.seqlen, chunk_size)
    assert chunk_states.shape[1] == len(ends)
    assert_same_bits(chunk_states[:, -1], last_state)
    for i in (0, len(ends) // 3, len(ends) // 2, len(ends) - 2):
        _, expected_state = reference.selective_scan(**scan_steps(inputs, 0, ends[i]))
        assert_close(chunk_states[:, i], expected_state, "float32")
    delta = reference.softplus(
        reference.fp64(inputs["delta"]) + reference.fp64(inputs["delta_bias"])[:, None]
    )
    assert_close(delta_sum, delta.sum(axis=-1), "float32")


@pytest.mark.parametrize("A", ["real", "complex"])
def test_a_state_put_before_decays_by_the_sum(backend: Backend, A: str) -> None:
    """h(L) from h0 is h(L) from zeros + exp(A ΣΔ) h0: how parts of a sequence are joined."""
    case = ScanCase(A=A, seqlen=9)
    inputs = case.inputs()
    _, with_state, delta_sum = backend.call(ops.selective_scan, **inputs, return_delta_sum=True)
    from_zeros = {**inputs, "initial_state": None}
    _, without_state = backend.call(ops.selective_scan, **from_zeros)
    decay = np.exp(reference.fp64(inputs["A"]) * reference.fp64(delta_sum)[..., None])
    assert_close(with_state, without_state + decay * inputs["initial_state"], "float32")


def test_order_of_what_is_returned(backend: Backend) -> None:
    inputs = ScanCase().inputs()
    out, last_state = backend.call(ops.selective_scan, **inputs)
    asked = {"chunk_size": 30, "return_delta_sum": True}
    everything = backend.call(ops.selective_scan, **inputs, **asked)
    assert [result.shape for result in everything] == [
        (2, 24, 67),
        (2, 24, 16),
        (2, 3, 24, 16),
        (2, 24),
    ]
    assert_same_bits(everything[0], out)
    assert_same_bits(everything[1], last_state)
    without_state = backend.call(ops.selective_scan, **inputs, **asked, return_last_state=False)
    assert len(without_state) == 3
    for result, expected in zip(without_state[1:], everything[2:], strict=True):
        assert_same_bits(result, expected)


def test_threads_do_not_change_a_bit(backend: Backend, set_num_threads: Any) -> None:
    inputs = ScanCase(batch=3, dim=201, seqlen=130).inputs()
    asked = {"chunk_size": 17, "return_delta_sum": True}
    set_num_threads(1)
    once = backend.call(ops.selective_scan, **inputs, **asked)
    for threads in (2, 3, 5):
        set_num_threads(threads)
        again = backend.call(ops.selective_scan, **inputs, **asked)
        for result, expected in zip(again, once, strict=True):
            assert_same_bits(result, expected)


def test_nan_reaches_the_states_after_it(backend: Backend) -> None:
    inputs = ScanCase(dim=37).inputs()
    asked = {"chunk_size": 10, "return_delta_sum": True}
    *_, clean_states, clean_sum = backend.call(ops.selective_scan, **inputs, **asked)
    inputs["u"][1, 5, 20] = np.nan  # in the third chunk
    inputs["delta"][0, 7, 3] = np.nan
    *_, states, delta_sum = backend.call(ops.selective_scan, **inputs, **asked)
    assert np.isnan(states[1, 2:, 5]).all() and np.isnan(states[0, :, 7]).all()
    assert np.isnan(delta_sum[0, 7])
    states[1, 2:, 5], states[0, :, 7] = clean_states[1, 2:, 5], clean_states[0, :, 7]
    delta_sum[0, 7] = clean_sum[0, 7]
    assert_same_bits(states, clean_states)
    assert_same_bits(delta_sum, clean_sum)


# --- Bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_size", [0, -3, 2.5, "64"])
def test_bad_chunk_size(backend: Backend, chunk_size: Any) -> None:
    with refuses("selective_scan", "chunk_size", "1"):
        backend.call(ops.selective_scan, **ScanCase().inputs(), chunk_size=chunk_size)


@pytest.mark.parametrize(
    ("name", "bad", "words"),
    [
        ("chunk_states", np.zeros((2, 2, 24, 16), np.float32), ["2", "3"]),
        ("chunk_states", np.zeros((2, 3, 24, 16), np.float64), ["float64", "float32"]),
        ("delta_sum", np.zeros((2, 23), np.float32), ["23", "24"]),
        ("delta_sum", np.zeros((2, 24), np.float16), ["float16", "float32"]),
        ("last_state", np.zeros((1, 24, 16), np.float32), ["1", "2"]),
    ],
)
def test_bad_output(name: str, bad: np.ndarray, words: list[str]) -> None:
    """Outputs that the native module refuses; `ops` makes no such ones."""
    outputs = {
        "out": np.zeros((2, 24, 67), np.float32),
        "chunk_states": np.zeros((2, 3, 24, 16), np.float32),
    }
    with refuses("selective_scan", name, *words):
        _core.selective_scan(**ScanCase().inputs(), **{**outputs, name: bad}, chunk_size=30)
