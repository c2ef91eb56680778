"""Packed sequences: a batch of 1 cut by cu_seqlens, in the scan and the convolution."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import reference
from backends import Backend
from cases import ConvCase, ScanCase
from helpers import (
    DTYPES,
    LAYOUTS,
    assert_close,
    assert_only_poison_around,
    assert_same_bits,
    place,
    refuses,
    refuses_value,
)
from hypothesis import given
from hypothesis import strategies as st
from sequences import boundaries, conv_steps, scan_steps, separately

from ssmcore import ops

LENGTHS = st.lists(
    st.one_of(st.just(0), st.just(1), st.integers(2, 90)), min_size=1, max_size=6
).filter(any)


def packed_scan(lengths: list[int], **fields: Any) -> dict[str, Any]:
    """The arguments of a packed scan, but for cu_seqlens, with an initial state per sequence."""
    case = ScanCase(batch=1, seqlen=sum(lengths), **fields)
    inputs = case.inputs()
    if case.initial_state:
        rows = replace(case, batch=len(lengths), seqlen=1)
        inputs["initial_state"] = rows.inputs()["initial_state"]
    return inputs


def packed_conv(lengths: list[int], **fields: Any) -> dict[str, Any]:
    """The same for a convolution."""
    case = ConvCase(batch=1, seqlen=sum(lengths), **fields)
    inputs = case.inputs()
    if case.state_len:
        rows = replace(case, batch=len(lengths), seqlen=1)
        inputs["initial_state"] = rows.inputs()["initial_state"]
    return inputs


def assert_packed_is_separate(
    packed: tuple[np.ndarray, np.ndarray],
    separate: list[tuple[np.ndarray, ...] | None],
    initial_state: np.ndarray | None,
) -> None:
    """(out, last states) of a packed call are, to the bit, those of its sequences one by one."""
    out, last_state = packed
    results = [result for result in separate if result is not None]
    assert_same_bits(out, np.concatenate([result[0] for result in results], axis=-1))
    for s, result in enumerate(separate):
        if result is not None:
            expected = result[1][0]
        elif initial_state is not None:
            expected = initial_state[s]
        else:
            expected = np.zeros_like(last_state[s])
        assert_same_bits(last_state[s], expected)


# --- Packed = separate ----------------------------------------------------------------------------


@given(
    lengths=LENGTHS,
    dim=st.sampled_from([1, 3, 24, 39]),
    dstate=st.integers(1, 20),
    dtype=st.sampled_from([*DTYPES, "float64"]),
    A=st.sampled_from(["real", "complex"]),
    B=st.sampled_from(["constant", "shared", "1 group"]),
    initial_state=st.booleans(),
    layout=st.sampled_from(["contiguous", *LAYOUTS]),
)
def test_packed_scan_is_separate_scans(
    backend: Backend, lengths: list[int], dtype: str, A: str, initial_state: bool, **fields: Any
) -> None:
    A = "real" if dtype == "float64" else A
    inputs = packed_scan(lengths, dtype=dtype, A=A, initial_state=initial_state, **fields)
    scan = partial(backend.call, ops.selective_scan)
    assert_packed_is_separate(
        scan(**inputs, cu_seqlens=boundaries(lengths)),
        separately(scan, inputs, lengths, scan_steps),
        inputs["initial_state"],
    )


@given(
    lengths=LENGTHS,
    dim=st.sampled_from([1, 3, 24, 39]),
    width=st.integers(2, 8),
    dtype=st.sampled_from(list(DTYPES)),
    state_len=st.sampled_from([None, 3, 9]),
    layout=st.sampled_from(["contiguous", *LAYOUTS]),
)
def test_packed_convolution_is_separate_convolutions(
    backend: Backend, lengths: list[int], **fields: Any
) -> None:
    inputs = packed_conv(lengths, **fields)
    convolve = partial(backend.call, ops.causal_conv1d, return_final_state=True)
    assert_packed_is_separate(
        convolve(**inputs, cu_seqlens=boundaries(lengths)),
        separately(convolve, inputs, lengths, conv_steps),
        inputs["initial_state"],
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("A", ["real", "complex"])
@pytest.mark.parametrize("groups", ["1 group", "3 groups"])
def test_scan_agrees_with_reference(backend: Backend, dtype: str, A: str, groups: str) -> None:
    lengths = [0, 1, 70, 0, 1, 1, 129, 3, 0]
    inputs = packed_scan(lengths, dtype=dtype, A=A, B=groups, C=groups)
    out, last_state = backend.call(ops.selective_scan, **inputs, cu_seqlens=boundaries(lengths))
    expected = separately(reference.selective_scan, inputs, lengths, scan_steps)
    for s, (begin, end) in enumerate(pairwise(boundaries(lengths))):
        if expected[s] is not None:
            assert_close(out[..., begin:end], expected[s][0], dtype)
            assert_close(last_state[s : s + 1], expected[s][1], "float32")


@pytest.mark.parametrize("dtype", DTYPES)
def test_convolution_agrees_with_reference(backend: Backend, dtype: str) -> None:
    lengths = [0, 1, 70, 0, 1, 1, 300, 2, 0]
    inputs = packed_conv(lengths, dtype=dtype, state_len=5)
    out, final_state = backend.call(
        ops.causal_conv1d, **inputs, cu_seqlens=boundaries(lengths), return_final_state=True
    )
    expected = separately(reference.causal_conv1d, inputs, lengths, conv_steps)
    for s, (begin, end) in enumerate(pairwise(boundaries(lengths))):
        if expected[s] is not None:
            assert_close(out[..., begin:end], expected[s][0], dtype)
            assert_same_bits(final_state[s : s + 1], expected[s][1].astype(DTYPES[dtype]))


def test_sequences_of_one_token_are_a_batch_of_steps(backend: Backend) -> None:
    lengths = [1] * 13
    inputs = packed_scan(lengths)
    out, last_state = backend.call(ops.selective_scan, **inputs, cu_seqlens=boundaries(lengths))
    state = backend.to_device(inputs["initial_state"].copy())
    step = backend.call(
        ops.selective_state_update,
        state=state,
        x=inputs["u"][0].T,
        dt=inputs["delta"][0].T,
        A=inputs["A"],
        B=inputs["B"][0].T,
        C=inputs["C"][0].T,
        D=inputs["D"],
        z=inputs["z"][0].T,
        dt_bias=inputs["delta_bias"],
        dt_softplus=True,
    )
    assert_close(out[0].T, step, "float32")
    assert_close(last_state, backend.to_numpy(state), "float32")


def test_one_sequence_is_no_packing(backend: Backend) -> None:
    inputs = packed_scan([67])
    out, last_state = backend.call(ops.selective_scan, **inputs)
    packed = backend.call(ops.selective_scan, **inputs, cu_seqlens=boundaries([67]))
    assert_same_bits(packed[0], out)
    assert_same_bits(packed[1], last_state)


# --- Other properties -----------------------------------------------------------------------------


@pytest.mark.parametrize("A", ["real", "complex"])
def test_threads_do_not_change_a_bit(backend: Backend, set_num_threads: Any, A: str) -> None:
    lengths = [70, 1, 0, 200, 33]
    scan = {**packed_scan(lengths, dim=201, A=A), "cu_seqlens": boundaries(lengths)}
    conv = {**packed_conv(lengths, dim=201), "cu_seqlens": boundaries(lengths)}
    set_num_threads(1)
    once = (
        *backend.call(ops.selective_scan, **scan),
        *backend.call(ops.causal_conv1d, **conv, return_final_state=True),
    )
    for threads in (2, 3, 5):
        set_num_threads(threads)
        again = (
            *backend.call(ops.selective_scan, **scan),
            *backend.call(ops.causal_conv1d, **conv, return_final_state=True),
        )
        for result, expected in zip(again, once, strict=True):
            assert_same_bits(result, expected)


def test_nan_stays_in_its_sequence(backend: Backend) -> None:
    lengths = [20, 1, 0, 30]
    scan = packed_scan(lengths, dim=37)
    conv = packed_conv(lengths, dim=37)
    clean = backend.call(ops.selective_scan, **scan, cu_seqlens=boundaries(lengths))
    clean_conv = backend.call(
        ops.causal_conv1d, **conv, cu_seqlens=boundaries(lengths), return_final_state=True
    )
    scan["u"][0, 5, 19] = conv["x"][0, 5, 19] = np.nan  # the last step of the first sequence
    out, last_state = backend.call(ops.selective_scan, **scan, cu_seqlens=boundaries(lengths))
    assert np.isnan(out[0, 5, 19]) and np.isnan(last_state[0, 5]).all()
    out[0, 5, 19], last_state[0, 5] = clean[0][0, 5, 19], clean[1][0, 5]
    assert_same_bits(out, clean[0])
    assert_same_bits(last_state, clean[1])

    out, final_state = backend.call(
        ops.causal_conv1d, **conv, cu_seqlens=boundaries(lengths), return_final_state=True
    )
    assert np.isnan(out[0, 5, 19]) and np.isnan(final_state[0, 5, -1])
    out[0, 5, 19], final_state[0, 5, -1] = clean_conv[0][0, 5, 19], clean_conv[1][0, 5, -1]
    assert_same_bits(out, clean_conv[0])
    assert_same_bits(final_state, clean_conv[1])


@pytest.mark.parametrize("layout", ["padded", "token-major padded", "spread"])
def test_inputs_and_what_lies_around_them_stay(backend: Backend, layout: str) -> None:
    lengths = [20, 1, 0, 30]
    cu_seqlens = boundaries(lengths)
    scan = packed_scan(lengths, layout=layout)
    conv = packed_conv(lengths, layout=layout)
    placed = place(cu_seqlens, layout)  # between entries of the most negative integer
    for operator, inputs in ((ops.selective_scan, scan), (ops.causal_conv1d, conv)):
        arrays = {name: value for name, value in inputs.items() if isinstance(value, np.ndarray)}
        before = {name: value.copy() for name, value in arrays.items()}
        dense = backend.call(operator, **inputs, cu_seqlens=cu_seqlens)
        spread = backend.call(operator, **inputs, cu_seqlens=placed)
        assert_same_bits(spread[0], dense[0])
        for name, array in arrays.items():
            assert_same_bits(array, before[name])
            assert_only_poison_around(array)


# --- Bad input ------------------------------------------------------------------------------------


def int32(*entries: int) -> np.ndarray:
    return np.array(entries, np.int32)


BAD_CU_SEQLENS = [
    pytest.param(int32(0, 40, 30, 67), ["cu_seqlens", "30", "40"], id="unsorted"),
    pytest.param(int32(0, -1, 67), ["cu_seqlens", "-1"], id="negative"),
    pytest.param(int32(-1, 30, 67), ["cu_seqlens", "-1", "0"], id="starts-before-0"),
    pytest.param(int32(1, 30, 67), ["cu_seqlens", "1", "0"], id="starts-after-0"),
    pytest.param(int32(0, 30, 66), ["cu_seqlens", "66", "67"], id="ends-before-the-end"),
    pytest.param(int32(0, 30, 68), ["cu_seqlens", "68", "67"], id="ends-beyond-the-end"),
    pytest.param(int32(0, 100, 67), ["cu_seqlens", "67", "100"], id="beyond-the-end-inside"),
    pytest.param(int32(0, 2**31 - 1), ["cu_seqlens", "67"], id="ends-far-beyond"),
    pytest.param(int32(0), ["cu_seqlens", "1"], id="no-sequence"),
    pytest.param(int32(), ["cu_seqlens"], id="no-entry"),
    pytest.param(int32(0, 67)[None], ["cu_seqlens"], id="two-dimensions"),
    pytest.param(np.array([0, 67], np.int64), ["cu_seqlens", "int64", "int32"], id="int64"),
    pytest.param(np.array([0, 67], np.float32), ["cu_seqlens", "float32", "int32"], id="float32"),
    pytest.param([0, 67], ["cu_seqlens", "list"], id="list"),
]


@pytest.mark.parametrize(("cu_seqlens", "words"), BAD_CU_SEQLENS)
def test_bad_cu_seqlens_of_a_scan(backend: Backend, cu_seqlens: Any, words: list[str]) -> None:
    inputs = packed_scan([67], initial_state=False)
    with refuses_value(backend, "selective_scan", *words):
        backend.call(ops.selective_scan, **inputs, cu_seqlens=cu_seqlens)
    with refuses_value(backend, "selective_scan", *words):
        backend.call(ops.selective_scan, **inputs, cu_seqlens=cu_seqlens, chunk_size=1)


@pytest.mark.parametrize(("cu_seqlens", "words"), BAD_CU_SEQLENS)
def test_bad_cu_seqlens_of_a_convolution(
    backend: Backend, cu_seqlens: Any, words: list[str]
) -> None:
    inputs = packed_conv([67], state_len=None)
    with refuses_value(backend, "causal_conv1d", *words):
        backend.call(ops.causal_conv1d, **inputs, cu_seqlens=cu_seqlens, return_final_state=True)


@pytest.mark.parametrize(
    ("operator", "case"),
    [("selective_scan", ScanCase(batch=2)), ("causal_conv1d", ConvCase(batch=2))],
    ids=["scan", "convolution"],
)
def test_a_batch_of_2_is_not_packed(backend: Backend, operator: str, case: Any) -> None:
    with refuses(operator, "cu_seqlens", "batch", "2", "1"):
        backend.call(getattr(ops, operator), **case.inputs(), cu_seqlens=int32(0, 30, 67))


def test_states_are_one_for_each_sequence(backend: Backend) -> None:
    scan, conv = packed_scan([67]), packed_conv([67])
    cu_seqlens = int32(0, 30, 67)
    with refuses("selective_scan", "initial_state", "slots", "1", "2"):
        backend.call(ops.selective_scan, **scan, cu_seqlens=cu_seqlens)
    with refuses("causal_conv1d", "initial_state", "slots", "1", "2"):
        backend.call(ops.causal_conv1d, **conv, cu_seqlens=cu_seqlens)
