"""One step of the selective scan for heads of channels, as Mamba-2 has them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import reference
from backends import Backend
from cases import HEADS_UPDATE_CASES, StateUpdateCase
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

HEADS = StateUpdateCase(nheads=6, ngroups=2)


def step(backend: Backend, inputs: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """(out, state after); the state of `inputs` is changed in place where the backend shares it."""
    state = backend.to_device(inputs["state"])
    out = backend.call(ops.selective_state_update, **{**inputs, "state": state})
    return out, backend.to_numpy(state)


def as_mamba2(inputs: dict[str, Any]) -> dict[str, Any]:
    """One number a head in dt, A, D and dt_bias, repeated by strides of 0."""
    shared = {}
    for name, of_head in (
        ("dt", np.s_[:, :, :1]),
        ("A", np.s_[:, :1, :1]),
        ("D", np.s_[:, :1]),
        ("dt_bias", np.s_[:, :1]),
    ):
        shared[name] = np.broadcast_to(inputs[name][of_head], inputs[name].shape)
        assert 0 in shared[name].strides
    return {**inputs, **shared}


@pytest.mark.parametrize("case", HEADS_UPDATE_CASES)
def test_agrees_with_reference(backend: Backend, case: StateUpdateCase) -> None:
    inputs = case.inputs()
    expected_out, expected_state = reference.selective_state_update(**inputs)
    out, state = step(backend, inputs)
    assert out.dtype == DTYPES[case.dtype]
    assert_close(out, expected_out, case.dtype)
    assert_close(state, expected_state, "float32")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("A", ["real", "complex"])
@pytest.mark.parametrize("headdim", [1, 4, 64])
@pytest.mark.parametrize("indices", [None, (4, -1, 2)])
def test_mamba2_shapes(
    backend: Backend, dtype: str, A: str, headdim: int, indices: tuple[int, ...] | None
) -> None:
    case = StateUpdateCase(
        nheads=6, dim=6 * headdim, ngroups=2, dtype=dtype, A=A, dstate=64, state_indices=indices
    )
    inputs = as_mamba2(case.inputs())
    expected_out, expected_state = reference.selective_state_update(**inputs)
    dense = {
        name: value.copy() if isinstance(value, np.ndarray) else value
        for name, value in inputs.items()
    }
    out, state = step(backend, inputs)
    assert_close(out, expected_out, dtype)
    assert_close(state, expected_state, "float32")
    out_dense, state_dense = step(backend, dense)
    assert_same_bits(out, out_dense)
    assert_same_bits(state, state_dense)


# --- Properties -----------------------------------------------------------------------------------


@given(
    nheads=st.integers(1, 12),
    headdim=st.integers(1, 40),
    dstate=st.integers(1, 40),
    dtype=st.sampled_from(list(DTYPES)),
    A=st.sampled_from(["real", "complex"]),
)
def test_heads_are_only_a_matter_of_shape(
    backend: Backend, nheads: int, headdim: int, **fields: Any
) -> None:
    """With B and C of one group for each head, heads side by side are dim channels in groups."""
    dim = nheads * headdim
    heads = StateUpdateCase(nheads=nheads, dim=dim, ngroups=nheads, **fields).inputs()
    flat = StateUpdateCase(dim=dim, ngroups=nheads, **fields).inputs()
    for name in ("state", "x", "dt", "A", "D", "z", "dt_bias"):
        flat[name] = heads[name].reshape(flat[name].shape).copy()
    for name in ("B", "C"):
        flat[name] = heads[name].copy()
    out, state = step(backend, heads)
    out_flat, state_flat = step(backend, flat)
    assert_same_bits(out.reshape(out_flat.shape), out_flat)
    assert_same_bits(state.reshape(state_flat.shape), state_flat)


@given(seed=st.integers(0, 2**32 - 1))
def test_permuted_heads_permute_the_output(backend: Backend, seed: int) -> None:
    case = StateUpdateCase(nheads=6)  # one group for all
    order = np.random.default_rng(seed).permutation(6)
    axis = {"state": 1, "x": 1, "dt": 1, "z": 1, "A": 0, "D": 0, "dt_bias": 0}
    inputs = case.inputs()
    permuted = {**inputs, **{name: inputs[name].take(order, axis=k) for name, k in axis.items()}}
    out_permuted, state_permuted = step(backend, permuted)
    out, state = step(backend, inputs)
    assert_close(out_permuted, out[:, order], "float32")
    assert_close(state_permuted, state[:, order], "float32")


@pytest.mark.parametrize("name", ["x", "dt", "A", "B", "C", "D", "z", "dt_bias"])
def test_zero_strides(backend: Backend, name: str) -> None:
    shape = HEADS.inputs()[name].shape
    for axis in range(len(shape)):
        inputs = HEADS.inputs()
        inputs[name] = np.broadcast_to(inputs[name].take([0], axis=axis), shape)
        expected_out, expected_state = reference.selective_state_update(**inputs)
        out, state = step(backend, inputs)
        assert_close(out, expected_out, "float32")
        assert_close(state, expected_state, "float32")


def test_negative_slots_are_skipped(backend: Backend) -> None:
    case = StateUpdateCase(nheads=6, ngroups=2, state_indices=(3, -1, 1))
    inputs = case.inputs()
    inputs["state"][[0, 2, 4]] = np.nan
    before = inputs["state"].copy()
    out, state = step(backend, inputs)
    assert_same_bits(state[[0, 2, 4]], before[[0, 2, 4]])
    assert not np.any(state[[1, 3]] == before[[1, 3]])
    fresh = {**inputs, "state": np.zeros((3, 6, 4, 16), np.float32), "state_indices": None}
    from_zeros, _ = step(backend, fresh)
    assert_same_bits(out[1], from_zeros[1])


@pytest.mark.parametrize("layout", ["padded", "token-major padded", "spread"])
def test_nothing_around_the_state_changes(backend: Backend, layout: str) -> None:
    inputs = StateUpdateCase(nheads=3, dim=39, dstate=11).inputs()
    inputs["state"] = place(inputs["state"], layout)
    _, expected_state = reference.selective_state_update(**inputs)
    _, state = step(backend, inputs)
    assert_close(state, expected_state, "float32")
    assert_only_poison_around(state)


def test_threads_do_not_change_a_bit(backend: Backend, set_num_threads: Any) -> None:
    case = StateUpdateCase(batch=5, nheads=24, dim=24 * 37, ngroups=3)
    set_num_threads(1)
    once = step(backend, as_mamba2(case.inputs()))
    for threads in (2, 3):
        set_num_threads(threads)
        again = step(backend, as_mamba2(case.inputs()))
        for result, expected in zip(again, once, strict=True):
            assert_same_bits(result, expected)


def test_nan_in_one_channel_stays_there(backend: Backend) -> None:
    clean_out, clean_state = step(backend, HEADS.inputs())
    inputs = HEADS.inputs()
    inputs["x"][1, 5, 2] = np.nan
    out, state = step(backend, inputs)
    assert np.isnan(out[1, 5, 2])
    assert np.isnan(state[1, 5, 2]).all()
    out[1, 5, 2], state[1, 5, 2] = clean_out[1, 5, 2], clean_state[1, 5, 2]
    assert_same_bits(out, clean_out)
    assert_same_bits(state, clean_state)


# --- Bad input ------------------------------------------------------------------------------------


def zeros(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.zeros(shape, dtype)


@pytest.mark.parametrize(
    ("name", "bad", "words"),
    [
        ("state", zeros(3, 24, 16), []),
        ("state", zeros(3, 6, 5, 16), ["headdim", "5", "4"]),
        ("state", zeros(2, 6, 4, 16), ["2", "3"]),
        ("state", zeros(3, 6, 4, 16, dtype=np.complex64), ["complex64", "float32"]),
        ("x", zeros(3, 6, 4, 1), []),
        ("dt", zeros(3, 6), []),
        ("dt", zeros(3, 6, 1), ["1", "4"]),
        ("A", zeros(6), []),
        ("A", zeros(6, 4, 0), ["dstate"]),
        ("A", zeros(5, 4, 16), ["5", "6"]),
        ("B", zeros(3, 4, 16), ["4", "nheads", "6"]),
        ("B", zeros(3, 0, 16), []),
        ("C", zeros(3, 3, 16), ["ngroups", "3", "2"]),
        ("D", zeros(6), []),
        ("z", zeros(3, 6, 3), ["3", "4"]),
        ("dt_bias", zeros(6, 1), ["1", "4"]),
        ("state_indices", np.array([0, 1, 1], np.int32), ["1", "twice"]),
        ("state_indices", np.array([0, 1, 3], np.int32), ["3"]),
        ("state_indices", np.array([0, 1, 2], np.int64), ["int64", "int32"]),
    ],
)
def test_bad_argument(backend: Backend, name: str, bad: np.ndarray, words: list[str]) -> None:
    with refuses_value(backend, "selective_state_update", name, *words):
        step(backend, {**HEADS.inputs(), name: bad})
