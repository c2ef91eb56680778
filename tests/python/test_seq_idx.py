"""The convolution over sequences that are numbered step by step."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import reference
from backends import Backend
from cases import ConvCase
from helpers import (
    DTYPES,
    LAYOUTS,
    assert_close,
    assert_only_poison_around,
    assert_same_bits,
    place,
    refuses,
)
from hypothesis import given
from hypothesis import strategies as st
from sequences import boundaries

from ssmcore import ops


def inputs_of(**fields: Any) -> dict[str, Any]:
    """Arguments of a convolution that `seq_idx` may join."""
    inputs = ConvCase(**fields, state_len=None).inputs()
    del inputs["initial_state"]
    return inputs


def numbers(batch: int, seqlen: int, seed: int = 0) -> np.ndarray:
    """Runs of 1 to 12 steps of one number, a fifth of them negative."""
    random = np.random.default_rng(seed)
    seq_idx = np.empty((batch, seqlen), np.int32)
    for row in seq_idx:
        begin = 0
        while begin < seqlen:
            end = begin + random.integers(1, 13)
            row[begin:end] = random.choice([-(2**31), -1, 0, 1, 2, 3, 4, 5, 6, 2**31 - 1])
            begin = end
    return seq_idx


@pytest.mark.parametrize("width", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("seqlen", [1, 3, 67, 300, 600])
@pytest.mark.parametrize("layout", ["contiguous", "token-major", "spread"])
def test_agrees_with_reference(backend: Backend, width: int, seqlen: int, layout: str) -> None:
    inputs = inputs_of(width=width, seqlen=seqlen, layout=layout)
    seq_idx = numbers(2, seqlen)
    seq_idx[:, 0] = 3  # an output other than 0, at least
    out = backend.call(ops.causal_conv1d, **inputs, seq_idx=place(seq_idx, layout))
    assert_close(out, reference.causal_conv1d_numbered(**inputs, seq_idx=seq_idx), "float32")
    assert not np.any(out.swapaxes(1, 2)[seq_idx < 0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_dtypes_and_options(
    backend: Backend, dtype: str, bias: bool, activation: str | None
) -> None:
    inputs = inputs_of(dtype=dtype, bias=bias, activation=activation)
    seq_idx = numbers(2, 67)
    out = backend.call(ops.causal_conv1d, **inputs, seq_idx=seq_idx)
    assert out.dtype == DTYPES[dtype]
    assert_close(out, reference.causal_conv1d_numbered(**inputs, seq_idx=seq_idx), dtype)


@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=12),
    dim=st.integers(1, 40),
    width=st.integers(2, 8),
    dtype=st.sampled_from(list(DTYPES)),
    layout=st.sampled_from(["contiguous", *LAYOUTS]),
)
def test_runs_of_numbers_are_packed_sequences(
    backend: Backend, lengths: list[int], dtype: str, **fields: Any
) -> None:
    inputs = inputs_of(batch=1, seqlen=sum(lengths), dtype=dtype, **fields)
    seq_idx = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)[None]
    numbered = backend.call(ops.causal_conv1d, **inputs, seq_idx=seq_idx)
    packed = backend.call(ops.causal_conv1d, **inputs, cu_seqlens=boundaries(lengths))
    assert_close(numbered, packed, dtype)


def test_one_number_is_one_sequence(backend: Backend) -> None:
    inputs = inputs_of(seqlen=300)
    plain = backend.call(ops.causal_conv1d, **inputs)
    for number in (0, 7):
        seq_idx = np.broadcast_to(np.int32(number), (2, 300))
        assert_close(backend.call(ops.causal_conv1d, **inputs, seq_idx=seq_idx), plain, "float32")


def test_only_whether_numbers_are_equal_matters(backend: Backend) -> None:
    inputs = inputs_of()
    seq_idx = numbers(2, 67)
    others = np.where(seq_idx < 0, -5, 1_000_000 - seq_idx % 1000)
    out = backend.call(ops.causal_conv1d, **inputs, seq_idx=seq_idx)
    same = backend.call(ops.causal_conv1d, **inputs, seq_idx=others.astype(np.int32))
    assert_same_bits(same, out)


def test_negative_steps_are_zeros_whatever_they_hold(backend: Backend) -> None:
    inputs = inputs_of()
    seq_idx = numbers(2, 67)
    clean = backend.call(ops.causal_conv1d, **inputs, seq_idx=seq_idx)
    inputs["x"].swapaxes(1, 2)[seq_idx < 0] = np.nan
    assert_same_bits(backend.call(ops.causal_conv1d, **inputs, seq_idx=seq_idx), clean)
    nowhere = np.full_like(seq_idx, -1)
    assert not np.any(backend.call(ops.causal_conv1d, **inputs, seq_idx=nowhere))


def test_nan_stays_in_its_sequence(backend: Backend) -> None:
    inputs = inputs_of()
    seq_idx = np.repeat(np.arange(7, dtype=np.int32), 10)[None, :67].repeat(2, axis=0)
    clean = backend.call(ops.causal_conv1d, **inputs, seq_idx=seq_idx)
    inputs["x"][1, 5, 28] = np.nan  # the last but one of its sequence
    out = backend.call(ops.causal_conv1d, **inputs, seq_idx=seq_idx)
    assert np.isnan(out[1, 5, 28:30]).all()
    out[1, 5, 28:30] = clean[1, 5, 28:30]
    assert_same_bits(out, clean)


def test_threads_do_not_change_a_bit(backend: Backend, set_num_threads: Any) -> None:
    inputs = inputs_of(batch=3, dim=201, seqlen=300)
    seq_idx = numbers(3, 300)
    set_num_threads(1)
    out = backend.call(ops.causal_conv1d, **inputs, seq_idx=seq_idx)
    for threads in (2, 3, 5):
        set_num_threads(threads)
        assert_same_bits(backend.call(ops.causal_conv1d, **inputs, seq_idx=seq_idx), out)


@pytest.mark.parametrize("layout", ["padded", "token-major padded", "spread"])
def test_inputs_and_what_lies_around_them_stay(backend: Backend, layout: str) -> None:
    inputs = {**inputs_of(layout=layout), "seq_idx": place(numbers(2, 67), layout)}
    arrays = {name: value for name, value in inputs.items() if isinstance(value, np.ndarray)}
    before = {name: value.copy() for name, value in arrays.items()}
    backend.call(ops.causal_conv1d, **inputs)
    for name, array in arrays.items():
        assert_same_bits(array, before[name])
        if name != "seq_idx":
            assert_only_poison_around(array)


# --- Bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (np.zeros((2, 67), np.int64), ["int64", "int32"]),
        (np.zeros((2, 67), np.float32), ["float32", "int32"]),
        (np.zeros((2, 66), np.int32), ["66", "67"]),
        (np.zeros((1, 67), np.int32), ["1", "2"]),
        (np.zeros(67, np.int32), []),
        (np.zeros((2, 67), np.int32)[:, ::-1], ["negative", "stride"]),
    ],
)
def test_bad_seq_idx(backend: Backend, bad: np.ndarray, words: list[str]) -> None:
    with refuses("causal_conv1d", "seq_idx", *words):
        backend.call(ops.causal_conv1d, **inputs_of(), seq_idx=bad)


@pytest.mark.parametrize(
    ("name", "value", "word"),
    [
        ("initial_state", np.zeros((1, 24, 3), np.float32), "initial_state"),
        ("return_final_state", True, "final_state"),
        ("cu_seqlens", boundaries([30, 37]), "cu_seqlens"),
    ],
)
def test_what_seq_idx_excludes(backend: Backend, name: str, value: Any, word: str) -> None:
    arguments = {**inputs_of(batch=1), "seq_idx": np.zeros((1, 67), np.int32), name: value}
    with refuses("causal_conv1d", "seq_idx", word):
        backend.call(ops.causal_conv1d, **arguments)
