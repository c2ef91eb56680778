"""The Mamba block as a whole: its projections, convolution, scan and gate."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import reference
from backends import Backend
from cases import BLOCK_CASES, BlockCase
from helpers import (
    DTYPES,
    assert_close,
    assert_same_bits,
    refuses,
    refuses_value,
)
from hypothesis import given
from hypothesis import strategies as st
from sequences import boundaries

from ssmcore import ops


def with_states(
    backend: Backend, inputs: dict[str, Any], states: dict[str, np.ndarray]
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(out, states after); `states` themselves are left as they are."""
    on_device = {name: backend.to_device(state.copy()) for name, state in states.items()}
    out = backend.call(ops.mamba_block, **inputs, **on_device)
    return out, {name: backend.to_numpy(state) for name, state in on_device.items()}


@pytest.mark.parametrize("case", BLOCK_CASES)
def test_agrees_with_reference(backend: Backend, case: BlockCase) -> None:
    inputs, states = case.inputs(), case.states()
    out, after = with_states(backend, inputs, states)
    expected_out, conv_state, ssm_state = reference.mamba_block(**inputs, **states)
    assert out.dtype == DTYPES[case.dtype]
    assert_close(out, expected_out, case.dtype)
    assert_close(after["conv_state"], conv_state, case.dtype)
    assert_close(after["ssm_state"], ssm_state, case.dtype)


@pytest.mark.parametrize("seqlen", [1, 35])
@pytest.mark.parametrize("dtype", DTYPES)
def test_from_the_start(backend: Backend, dtype: str, seqlen: int) -> None:
    """Without states, and with states of zeros: the same, to the bit."""
    case = BlockCase(dtype=dtype, seqlen=seqlen)
    inputs = case.inputs()
    out = backend.call(ops.mamba_block, **inputs)
    assert_close(out, reference.mamba_block(**inputs)[0], dtype)
    zeros = {name: np.zeros_like(state) for name, state in case.states().items()}
    assert_same_bits(with_states(backend, inputs, zeros)[0], out)


@pytest.mark.parametrize("view", ["new axis", "transposed"])
def test_single_steps_of_any_stride(backend: Backend, view: str) -> None:
    """The stride of a dimension of size 1 means nothing."""
    inputs = BlockCase(batch=4, seqlen=1).inputs()
    expected = backend.call(ops.mamba_block, **inputs)
    rows = np.ascontiguousarray(inputs["x"][:, 0])
    strided = rows[:, None] if view == "new axis" else rows[None].transpose(1, 0, 2)
    assert strided.shape == inputs["x"].shape
    assert_same_bits(backend.call(ops.mamba_block, **{**inputs, "x": strided}), expected)


@pytest.mark.parametrize("parameter", ["in_proj.bias", "conv1d.bias", "out_proj.bias"])
def test_optional_parameters(backend: Backend, parameter: str) -> None:
    inputs = BlockCase(proj_bias=True).inputs()
    complete = backend.call(ops.mamba_block, **inputs)
    del inputs["weights"][parameter]
    out = backend.call(ops.mamba_block, **inputs)
    assert_close(out, reference.mamba_block(**inputs)[0], "float32")
    assert not np.allclose(out, complete, rtol=1e-3)


@given(
    seqlen=st.integers(2, 40),
    split_at=st.floats(0, 1),
    dim=st.integers(1, 40),
    d_model=st.integers(1, 20),
    width=st.integers(2, 8),
    dtype=st.sampled_from(list(DTYPES)),
)
def test_split_is_whole(
    backend: Backend,
    seqlen: int,
    split_at: float,
    dim: int,
    d_model: int,
    width: int,
    dtype: str,
) -> None:
    case = BlockCase(seqlen=seqlen, dim=dim, d_model=d_model, width=width, dtype=dtype)
    inputs, states = case.inputs(), case.states()
    middle = 1 + round(split_at * (seqlen - 2))
    out, after = with_states(backend, inputs, states)

    begin, rest = inputs["x"][:, :middle].copy(), inputs["x"][:, middle:].copy()
    first, between = with_states(backend, {**inputs, "x": begin}, states)
    second, last = with_states(backend, {**inputs, "x": rest}, between)
    assert_close(np.concatenate([first, second], axis=1), out, dtype, rounded=True)
    for name in states:
        assert_close(last[name], after[name], dtype, rounded=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_steps_are_the_sequence(backend: Backend, dtype: str) -> None:
    case = BlockCase(dtype=dtype, seqlen=12)
    inputs, states = case.inputs(), case.states()
    out, after = with_states(backend, inputs, states)
    steps = []
    for t in range(12):
        x = inputs["x"][:, t : t + 1].copy()
        step, states = with_states(backend, {**inputs, "x": x}, states)
        steps.append(step)
    assert_close(np.concatenate(steps, axis=1), out, dtype, rounded=True)
    for name in states:
        assert_close(states[name], after[name], dtype, rounded=True)


FALCON = {"dt_B_C_norm_eps": 1e-2}  # large enough to matter


@pytest.mark.parametrize("case", BLOCK_CASES)
def test_norms_of_delta_B_and_C(backend: Backend, case: BlockCase) -> None:
    """FalconMamba's block agrees with the reference, and is another than Mamba's."""
    inputs, states = {**case.inputs(), **FALCON}, case.states()
    out, after = with_states(backend, inputs, states)
    expected_out, conv_state, ssm_state = reference.mamba_block(**inputs, **states)
    assert_close(out, expected_out, case.dtype)
    assert_close(after["conv_state"], conv_state, case.dtype)
    assert_close(after["ssm_state"], ssm_state, case.dtype)
    assert not np.allclose(out, with_states(backend, case.inputs(), states)[0], rtol=1e-2)


@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=5).filter(any),
    dtype=st.sampled_from(list(DTYPES)),
    falcon=st.booleans(),
    data=st.data(),
)
def test_packed_is_separate(
    backend: Backend, lengths: list[int], dtype: str, falcon: bool, data: st.DataObject
) -> None:
    """Packed sequences on slots of their own: as each alone; no other slot changes."""
    num_slots = 7
    slots = data.draw(st.permutations(range(num_slots)))[: len(lengths)]
    case = BlockCase(batch=1, seqlen=sum(lengths), dtype=dtype)
    inputs = {**case.inputs(), **(FALCON if falcon else {})}
    states = replace(case, batch=num_slots).states()
    cu_seqlens = boundaries(lengths)
    packing = {"cu_seqlens": cu_seqlens, "state_indices": np.array(slots, np.int32)}
    out, after = with_states(backend, {**inputs, **packing}, states)

    expected = {name: state.copy() for name, state in states.items()}
    for slot, (begin, end) in zip(slots, pairwise(cu_seqlens), strict=True):
        if begin == end:
            continue  # its state stays
        x = inputs["x"][:, begin:end].copy()
        before = {name: state[slot : slot + 1] for name, state in states.items()}
        alone, last = with_states(backend, {**inputs, "x": x}, before)
        assert_close(out[:, begin:end], alone, dtype, rounded=True)
        for name in states:
            expected[name][slot] = last[name][0]
    for name in states:
        assert_close(after[name], expected[name], dtype, rounded=True)
        others = [
            slot
            for slot in range(num_slots)
            if slot not in slots or lengths[slots.index(slot)] == 0
        ]
        assert_same_bits(after[name][others], states[name][others])


def test_packed_without_slots(backend: Backend) -> None:
    """Sequence s then uses row s of the states; without states each begins with zeros."""
    case = BlockCase(batch=1, seqlen=35)
    inputs = {**case.inputs(), "cu_seqlens": boundaries([20, 0, 15])}
    states = replace(case, batch=3).states()
    in_order = {**inputs, "state_indices": np.arange(3, dtype=np.int32)}
    out, after = with_states(backend, inputs, states)
    expected, expected_after = with_states(backend, in_order, states)
    assert_same_bits(out, expected)
    for name in states:
        assert_same_bits(after[name], expected_after[name])
    zeros = {name: np.zeros_like(state) for name, state in states.items()}
    from_zeros, _ = with_states(backend, inputs, zeros)
    assert_same_bits(backend.call(ops.mamba_block, **inputs), from_zeros)


def test_steps_on_slots(backend: Backend) -> None:
    """A step of some of the running sequences; a negative slot is a new one that leaves nothing."""
    case = BlockCase(batch=3, seqlen=1)
    inputs, states = case.inputs(), replace(case, batch=5).states()
    slots = np.array([4, -1, 0], np.int32)
    out, after = with_states(backend, {**inputs, "state_indices": slots}, states)
    before = {name: state[slots] for name, state in states.items()}
    for state in before.values():
        state[1] = 0
    expected, expected_after = with_states(backend, inputs, before)
    assert_same_bits(out, expected)
    for name in states:
        assert_same_bits(after[name][[4, 0]], expected_after[name][[0, 2]])
        assert_same_bits(after[name][[1, 2, 3]], states[name][[1, 2, 3]])


def test_threads_do_not_change_a_bit(backend: Backend, set_num_threads: Any) -> None:
    case = BlockCase(batch=3, seqlen=100, d_model=100, dim=201)
    set_num_threads(1)
    out, states = with_states(backend, case.inputs(), case.states())
    for threads in (2, 3):
        set_num_threads(threads)
        again, states_again = with_states(backend, case.inputs(), case.states())
        assert_same_bits(again, out)
        for name in states:
            assert_same_bits(states_again[name], states[name])


def test_sequences_are_independent(backend: Backend) -> None:
    case = BlockCase(batch=4)
    clean, clean_states = with_states(backend, case.inputs(), case.states())
    inputs = case.inputs()
    inputs["x"][2, 10, 3] = np.nan
    out, states = with_states(backend, inputs, case.states())
    others = np.arange(4) != 2
    assert np.isnan(out[2, 10:]).all()
    assert_same_bits(out[2, :10], clean[2, :10])
    assert_same_bits(out[others], clean[others])
    for name in states:
        assert_same_bits(states[name][others], clean_states[name][others])


def test_inputs_stay(backend: Backend) -> None:
    inputs = BlockCase().inputs()
    before = {"x": inputs["x"].copy(), **{k: v.copy() for k, v in inputs["weights"].items()}}
    with_states(backend, inputs, BlockCase().states())
    for name, array in {"x": inputs["x"], **inputs["weights"]}.items():
        assert_same_bits(array, before[name])


# --- Bad input ------------------------------------------------------------------------------------


def zeros(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.zeros(shape, dtype)


REQUIRED = (
    "in_proj.weight",
    "conv1d.weight",
    "x_proj.weight",
    "dt_proj.weight",
    "dt_proj.bias",
    "A_log",
    "D",
    "out_proj.weight",
)


@pytest.mark.parametrize("parameter", REQUIRED)
def test_missing_weight(backend: Backend, parameter: str) -> None:
    inputs = BlockCase().inputs()
    del inputs["weights"][parameter]
    with refuses("mamba_block", parameter):
        backend.call(ops.mamba_block, **inputs)


def test_unknown_weight(backend: Backend) -> None:
    inputs = BlockCase().inputs()
    inputs["weights"]["norm.weight"] = zeros(32)
    with refuses("mamba_block", "norm.weight"):
        backend.call(ops.mamba_block, **inputs)


# What the parameters are called in messages: the names of MambaBlockWeights.
NAMES = {
    "in_proj.weight": "in_proj",
    "in_proj.bias": "in_proj_bias",
    "conv1d.weight": "conv_weight",
    "conv1d.bias": "conv_bias",
    "x_proj.weight": "x_proj",
    "dt_proj.weight": "dt_proj",
    "dt_proj.bias": "dt_bias",
    "A_log": "A",
    "D": "D",
    "out_proj.weight": "out_proj",
    "out_proj.bias": "out_proj_bias",
}


@pytest.mark.parametrize(
    ("name", "bad", "words"),
    [
        ("in_proj.weight", zeros(128, 31), ["31", "32"]),
        ("in_proj.weight", zeros(127, 32), ["127", "128"]),
        ("in_proj.bias", zeros(127), ["127", "128"]),
        ("conv1d.weight", zeros(63, 1, 4), ["63", "64"]),
        ("conv1d.weight", zeros(64, 1, 9), ["9", "2", "8"]),
        ("conv1d.bias", zeros(63), ["63", "64"]),
        ("x_proj.weight", zeros(33, 64), ["33", "34"]),
        ("x_proj.weight", zeros(34, 63), ["63", "64"]),
        ("dt_proj.weight", zeros(63, 2), ["63", "64"]),
        ("dt_proj.bias", zeros(63), ["63", "64"]),
        ("A_log", zeros(64), []),
        ("D", zeros(64, 16), []),
        ("out_proj.weight", zeros(32, 63), ["63", "64"]),
        ("out_proj.weight", zeros(32, 64, dtype=np.float64), ["float64"]),
        ("out_proj.bias", zeros(31), ["31", "32"]),
    ],
)
def test_bad_weight(backend: Backend, name: str, bad: np.ndarray, words: list[str]) -> None:
    inputs = BlockCase().inputs()
    inputs["weights"][name] = bad
    with refuses("mamba_block", NAMES[name], *words):
        backend.call(ops.mamba_block, **inputs)


def test_convolution_weight_must_be_depthwise(backend: Backend) -> None:
    inputs = BlockCase().inputs()
    inputs["weights"]["conv1d.weight"] = zeros(64, 2, 4)
    with refuses("mamba_block", "conv1d.weight"):
        backend.call(ops.mamba_block, **inputs)


@pytest.mark.parametrize(
    ("name", "bad", "words"),
    [
        ("x", zeros(2, 32), []),
        ("x", zeros(2, 35, 32, dtype=np.int32), ["int32"]),
        ("x", zeros(2, 32, 35).swapaxes(1, 2), ["contiguous"]),
        ("conv_state", zeros(2, 64, 2), ["2", "3"]),
        ("conv_state", zeros(2, 64, 3, dtype=np.float16), ["float16", "float32"]),
        ("ssm_state", zeros(3, 64, 16), ["3", "2"]),
        ("ssm_state", zeros(2, 64, 16, dtype=np.float16), ["float16", "float32"]),
        ("cu_seqlens", np.array([0, 35], np.int32), ["batch", "2"]),
        ("state_indices", np.array([0, 2], np.int32), ["2"]),
        ("state_indices", np.array([1, 1], np.int32), ["1", "twice"]),
        ("state_indices", np.array([0], np.int32), ["1", "2"]),
        ("dt_B_C_norm_eps", 0.0, ["0.0"]),
        ("dt_B_C_norm_eps", -1e-5, ["-1e-05"]),
    ],
)
def test_bad_argument(backend: Backend, name: str, bad: Any, words: list[str]) -> None:
    case = BlockCase()
    inputs = {**case.inputs(), **case.states(), name: bad}
    with refuses_value(backend, "mamba_block", name, *words):
        backend.call(ops.mamba_block, **inputs)


def test_slots_need_a_state(backend: Backend) -> None:
    slots = np.arange(2, dtype=np.int32)
    with refuses("mamba_block", "state_indices", "conv_state", "ssm_state"):
        backend.call(ops.mamba_block, **BlockCase().inputs(), state_indices=slots)


@pytest.mark.parametrize("ends", [[0, 34], [1, 35], [0, 20, 10, 35], [0, -1, 35], [0]])
def test_bad_boundaries(backend: Backend, ends: list[int]) -> None:
    inputs = BlockCase(batch=1).inputs()
    with refuses_value(backend, "mamba_block", "cu_seqlens"):
        backend.call(ops.mamba_block, **inputs, cu_seqlens=np.array(ends, np.int32))
