"""The convolution's update with a circular state: input number i is at i modulo state_len."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import reference
from backends import Backend
from cases import CIRCULAR_CONV_CASES, ConvCase, ConvUpdateCase
from helpers import (
    DTYPES,
    assert_close,
    assert_only_poison_around,
    assert_same_bits,
    place,
    refuses_value,
)
from hypothesis import given
from hypothesis import strategies as st

from ssmcore import ops


def update(backend: Backend, inputs: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """(out, conv_state after) of an update; the state is changed in place where it is shared."""
    state = backend.to_device(inputs["conv_state"])
    out = backend.call(ops.causal_conv1d_update, **{**inputs, "conv_state": state})
    return out, backend.to_numpy(state)


def int32(*entries: int) -> np.ndarray:
    return np.array(entries, np.int32)


@pytest.mark.parametrize("case", CIRCULAR_CONV_CASES)
def test_agrees_with_reference(backend: Backend, case: ConvUpdateCase) -> None:
    inputs = case.inputs()
    expected_out, expected_state = reference.causal_conv1d_update(**inputs)
    out, state = update(backend, inputs)
    assert out.dtype == DTYPES[case.dtype]
    assert_close(out, expected_out, case.dtype)
    assert_same_bits(state.copy(), expected_state.astype(DTYPES[case.dtype]))


# --- Properties -----------------------------------------------------------------------------------


@given(
    tokens=st.lists(st.integers(1, 12), min_size=1, max_size=6),
    width=st.integers(2, 8),
    more_state=st.integers(0, 5),
    dim=st.integers(1, 40),
    dtype=st.sampled_from(list(DTYPES)),
)
def test_updates_are_the_sequence(
    backend: Backend, tokens: list[int], width: int, more_state: int, dim: int, dtype: str
) -> None:
    """From a state of zeros, round and round; at the end it holds the last inputs."""
    state_len, seqlen = width - 1 + more_state, sum(tokens)
    case = ConvCase(seqlen=seqlen, dim=dim, width=width, dtype=dtype, state_len=None)
    inputs = case.inputs()
    out = backend.call(ops.causal_conv1d, **inputs)

    state = backend.to_device(np.zeros((2, dim, state_len), DTYPES[dtype]))
    arguments = {name: inputs[name] for name in ("weight", "bias", "activation")}
    parts, seen = [], 0
    for count in tokens:
        x = inputs["x"][..., seen : seen + count]
        parts.append(
            backend.call(
                ops.causal_conv1d_update,
                x=x,
                conv_state=state,
                cache_seqlens=int32(seen, seen),
                **arguments,
            )
        )
        seen += count
    assert_close(np.concatenate(parts, axis=-1), out, dtype)
    expected = np.zeros((2, dim, state_len), DTYPES[dtype])
    for i in range(seqlen):
        expected[..., i % state_len] = inputs["x"][..., i]
    assert_same_bits(backend.to_numpy(state), expected)


@given(
    seen=st.lists(st.integers(0, 50), min_size=3, max_size=3),
    tokens=st.one_of(st.none(), st.integers(1, 20)),
    width=st.integers(2, 8),
    state_len=st.integers(1, 12),
)
def test_circular_is_shifted(
    backend: Backend, seen: list[int], tokens: int | None, width: int, state_len: int
) -> None:
    """A circular state is a shifted one turned by the inputs seen, before and after."""
    inputs = ConvUpdateCase(tokens=tokens, width=width, state_len=state_len).inputs()
    shifted = inputs["conv_state"]

    def turned(state: np.ndarray, seen: list[int]) -> np.ndarray:
        return np.stack([np.roll(row, n, axis=-1) for row, n in zip(state, seen, strict=True)])

    circular = turned(shifted, seen)
    expected_out, expected_state = update(backend, inputs)
    out, state = update(backend, {**inputs, "conv_state": circular, "cache_seqlens": int32(*seen)})
    assert_same_bits(out, expected_out)
    assert_same_bits(state, turned(expected_state, [n + (tokens or 1) for n in seen]))


def test_slots_are_only_a_matter_of_where(backend: Backend) -> None:
    seen = int32(7, 0, 4)
    inputs = {**ConvUpdateCase(tokens=4, state_len=6).inputs(), "cache_seqlens": seen}
    slots = int32(4, 0, 2)
    state = np.full((5, 24, 6), np.nan, np.float32)
    state[slots] = inputs["conv_state"]
    out, after = update(backend, inputs)
    out_slots, after_slots = update(
        backend, {**inputs, "conv_state": state, "state_indices": slots}
    )
    assert_same_bits(out_slots, out)
    assert_same_bits(after_slots[slots], after)
    assert np.isnan(after_slots[[1, 3]]).all()


def test_a_negative_slot_starts_from_zeros(backend: Backend) -> None:
    inputs = ConvUpdateCase(tokens=5, state_indices=(-1, 2, -9), cache_seqlens=(4, 1, 9)).inputs()
    inputs["conv_state"][[0, 1, 3, 4]] = np.nan
    before = inputs["conv_state"].copy()
    out, state = update(backend, inputs)
    sequence = {name: inputs[name] for name in ("x", "weight", "bias", "activation")}
    from_zeros = backend.call(ops.causal_conv1d, **sequence)
    assert_close(out[[0, 2]], from_zeros[[0, 2]], "float32")
    assert_same_bits(state[[0, 1, 3, 4]], before[[0, 1, 3, 4]])


def test_threads_do_not_change_a_bit(backend: Backend, set_num_threads: Any) -> None:
    case = ConvUpdateCase(dim=1001, tokens=5, state_len=7, cache_seqlens=(5, 0, 12))
    set_num_threads(1)
    once = update(backend, case.inputs())
    for threads in (2, 3):
        set_num_threads(threads)
        for result, expected in zip(update(backend, case.inputs()), once, strict=True):
            assert_same_bits(result, expected)


@pytest.mark.parametrize("layout", ["padded", "token-major padded", "spread"])
@pytest.mark.parametrize("tokens", [None, 2, 7])
def test_nothing_around_the_state_changes(
    backend: Backend, layout: str, tokens: int | None
) -> None:
    case = ConvUpdateCase(dim=37, tokens=tokens, state_len=5, cache_seqlens=(6, 0, 3))
    inputs = case.inputs()
    inputs["conv_state"] = place(inputs["conv_state"], layout)
    _, expected_state = reference.causal_conv1d_update(**inputs)
    _, state = update(backend, inputs)
    assert_same_bits(state.copy(), expected_state.astype(np.float32))
    assert_only_poison_around(state)


def test_only_the_window_is_read(backend: Backend) -> None:
    """Entries older than width - 1 may hold anything, and only they may not matter."""
    inputs = ConvUpdateCase(state_len=9, cache_seqlens=(12, 4, 0)).inputs()
    clean, _ = update(backend, {**inputs, "conv_state": inputs["conv_state"].copy()})
    for row, seen in enumerate((12, 4, 0)):
        window = {(seen - i) % 9 for i in (1, 2, 3)}
        older = [place for place in range(9) if place not in window]
        inputs["conv_state"][row][:, older] = np.nan
    out, _ = update(backend, inputs)
    assert_same_bits(out, clean)


# --- Bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "bad", "words"),
    [
        ("cache_seqlens", np.zeros(3, np.int64), ["int64", "int32"]),
        ("cache_seqlens", np.zeros(2, np.int32), ["2", "3"]),
        ("cache_seqlens", np.zeros((3, 1), np.int32), []),
        ("cache_seqlens", int32(4, -1, 0), ["-1", "0"]),
        ("conv_state", np.zeros((3, 24, 2), np.float32), ["2", "3"]),
        ("conv_state", np.zeros((3, 24, 0), np.float32), ["state_len"]),
        ("state_indices", int32(0, 1, 1), ["1", "twice"]),
        ("state_indices", int32(0, 1, 3), ["3"]),
    ],
)
def test_bad_argument(backend: Backend, name: str, bad: np.ndarray, words: list[str]) -> None:
    inputs = {**ConvUpdateCase(cache_seqlens=(4, 0, 2)).inputs(), name: bad}
    before = inputs["conv_state"].copy()
    with refuses_value(backend, "causal_conv1d_update", name, *words):
        update(backend, inputs)
    assert_same_bits(inputs["conv_state"], before)
