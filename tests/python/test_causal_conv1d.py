"""The causal depthwise convolution, over a sequence and for its next tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import reference
from backends import Backend
from cases import CONV_CASES, CONV_UPDATE_CASES, NARROW, ConvCase, ConvUpdateCase, rows
from helpers import (
    DTYPES,
    LAYOUTS,
    assert_close,
    assert_only_poison_around,
    assert_same_bits,
    place,
    refuses,
    refuses_value,
    with_adjacent,
)
from hypothesis import given
from hypothesis import strategies as st

from ssmcore import ops


def update(backend: Backend, inputs: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """(out, conv_state after) of an update; the state is changed in place where it is shared."""
    state = backend.to_device(inputs["conv_state"])
    out = backend.call(ops.causal_conv1d_update, **{**inputs, "conv_state": state})
    return out, backend.to_numpy(state)


@pytest.mark.parametrize("case", CONV_CASES)
def test_agrees_with_reference(backend: Backend, case: ConvCase) -> None:
    inputs = case.inputs()
    out, final_state = backend.call(ops.causal_conv1d, **inputs, return_final_state=True)
    expected_out, expected_state = reference.causal_conv1d(**inputs)
    assert out.dtype == DTYPES[case.dtype]
    assert_close(out, expected_out, case.dtype)
    assert_same_bits(final_state, expected_state.astype(DTYPES[case.dtype]))


@pytest.mark.parametrize("case", CONV_UPDATE_CASES)
def test_update_agrees_with_reference(backend: Backend, case: ConvUpdateCase) -> None:
    inputs = case.inputs()
    expected_out, expected_state = reference.causal_conv1d_update(**inputs)
    out, state = update(backend, inputs)
    assert out.dtype == DTYPES[case.dtype]
    assert_close(out, expected_out, case.dtype)
    assert_same_bits(state.copy(), expected_state.astype(DTYPES[case.dtype]))


def test_out_alone_is_the_default(backend: Backend) -> None:
    inputs = ConvCase().inputs()
    out, _ = backend.call(ops.causal_conv1d, **inputs, return_final_state=True)
    assert_same_bits(backend.call(ops.causal_conv1d, **inputs), out)


# --- Properties -----------------------------------------------------------------------------------


@given(
    seqlen=st.integers(2, 60),
    split_at=st.floats(0, 1),
    dim=st.integers(1, 40),
    width=st.integers(2, 8),
    dtype=st.sampled_from(list(DTYPES)),
    layout=st.sampled_from(["contiguous", *LAYOUTS]),
)
def test_split_is_whole(
    backend: Backend,
    seqlen: int,
    split_at: float,
    dim: int,
    width: int,
    dtype: str,
    layout: str,
) -> None:
    case = ConvCase(seqlen=seqlen, dim=dim, width=width, dtype=dtype, layout=layout)
    inputs = {**case.inputs(), "return_final_state": True}
    middle = 1 + round(split_at * (seqlen - 2))
    out, final_state = backend.call(ops.causal_conv1d, **inputs)

    first, state = backend.call(ops.causal_conv1d, **{**inputs, "x": inputs["x"][..., :middle]})
    rest = {**inputs, "x": inputs["x"][..., middle:], "initial_state": state}
    second, state = backend.call(ops.causal_conv1d, **rest)
    assert_close(np.concatenate([first, second], axis=-1), out, dtype)
    assert_same_bits(state, final_state)


@given(
    tokens=st.lists(st.integers(1, 5), min_size=1, max_size=5),
    dim=st.integers(1, 40),
    width=st.integers(2, 8),
    dtype=st.sampled_from(list(DTYPES)),
)
def test_updates_are_the_sequence(
    backend: Backend, tokens: list[int], dim: int, width: int, dtype: str
) -> None:
    inputs = ConvCase(seqlen=sum(tokens), dim=dim, width=width, dtype=dtype).inputs()
    out, final_state = backend.call(ops.causal_conv1d, **inputs, return_final_state=True)

    x = inputs["x"]
    state = backend.to_device(inputs["initial_state"].copy())
    arguments = {name: inputs[name] for name in ("weight", "bias", "activation")}
    parts = [
        backend.call(ops.causal_conv1d_update, x=part, conv_state=state, **arguments)
        for part in np.split(x, np.cumsum(tokens)[:-1], axis=-1)
    ]
    assert_close(np.concatenate(parts, axis=-1), out, dtype)
    assert_same_bits(backend.to_numpy(state), final_state)


@pytest.mark.parametrize(
    "case",
    rows(
        ConvUpdateCase(dim=96),
        batch=(1,),
        dim=(100,),
        width=(2, 3, 7),
        dtype=NARROW,
        bias=(False,),
        activation=(None,),
        state_len=(4,),
        state_indices=((3, -1, 1),),
    ),
)
def test_update_of_adjacent_channels(backend: Backend, case: ConvUpdateCase) -> None:
    """As models place weights and states; the CPU then works on them in place."""

    def inputs(adjacent_axis: int) -> dict[str, Any]:
        arguments = case.inputs()
        for name in ("weight", "bias"):
            if arguments[name] is not None:
                arguments[name] = arguments[name].astype(np.float32)
        for name in ("weight", "conv_state"):
            arguments[name] = with_adjacent(arguments[name], adjacent_axis)
        return arguments

    expected_out, expected_state = reference.causal_conv1d_update(**inputs(-1))
    out, state = update(backend, inputs(-2))
    assert_close(out, expected_out, case.dtype)
    assert_same_bits(state, expected_state.astype(state.dtype))
    if backend.name == "cpu":
        staged_out, staged_state = update(backend, inputs(-1))
        assert_same_bits(out, staged_out)
        assert_same_bits(state, staged_state)


@given(seqlen=st.integers(2, 60), cause=st.floats(0, 1))
def test_is_causal(backend: Backend, seqlen: int, cause: float) -> None:
    """A change of x(t) changes out(t) to out(t + width - 1), and nothing else."""
    inputs = ConvCase(seqlen=seqlen, activation=None).inputs()
    before = backend.call(ops.causal_conv1d, **inputs)
    t = round(cause * (seqlen - 1))
    inputs["x"][:, :, t] += 1
    after = backend.call(ops.causal_conv1d, **inputs)
    changed = np.zeros(seqlen, bool)
    changed[t : t + 4] = True
    assert_same_bits(after[..., ~changed], before[..., ~changed])
    assert not np.any(after[..., changed] == before[..., changed])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "token-major"])
def test_threads_do_not_change_a_bit(
    backend: Backend, set_num_threads: Any, dtype: str, layout: str
) -> None:
    inputs = ConvCase(batch=3, dim=201, seqlen=300, dtype=dtype, layout=layout).inputs()
    set_num_threads(1)
    out = backend.call(ops.causal_conv1d, **inputs)
    for threads in (2, 3, 5):
        set_num_threads(threads)
        assert_same_bits(backend.call(ops.causal_conv1d, **inputs), out)


# --- Memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x", "weight", "bias", "initial_state"])
def test_zero_strides(backend: Backend, name: str) -> None:
    inputs = ConvCase().inputs()
    shape = inputs[name].shape
    for axis in range(len(shape)):
        arguments = {**inputs, name: np.broadcast_to(inputs[name].take([0], axis=axis), shape)}
        expected_out, _ = reference.causal_conv1d(**arguments)
        assert_close(backend.call(ops.causal_conv1d, **arguments), expected_out, "float32")


@pytest.mark.parametrize("layout", ["padded", "token-major padded", "spread"])
def test_inputs_and_what_lies_around_them_stay(backend: Backend, layout: str) -> None:
    inputs = ConvCase(layout=layout).inputs()
    arrays = {name: value for name, value in inputs.items() if isinstance(value, np.ndarray)}
    before = {name: value.copy() for name, value in arrays.items()}
    backend.call(ops.causal_conv1d, **inputs, return_final_state=True)
    for name, array in arrays.items():
        assert_same_bits(array, before[name])
        assert_only_poison_around(array)


@pytest.mark.parametrize("layout", ["padded", "token-major padded", "spread"])
@pytest.mark.parametrize("tokens", [None, 2, 7])
def test_nothing_around_the_state_changes(
    backend: Backend, layout: str, tokens: int | None
) -> None:
    inputs = ConvUpdateCase(dim=37, tokens=tokens, state_len=5).inputs()
    inputs["conv_state"] = place(inputs["conv_state"], layout)
    _, expected_state = reference.causal_conv1d_update(**inputs)
    _, state = update(backend, inputs)
    assert_same_bits(state.copy(), expected_state.astype(np.float32))
    assert_only_poison_around(state)


def test_only_the_slots_named_change(backend: Backend) -> None:
    inputs = ConvUpdateCase(state_indices=(3, -1, 1)).inputs()
    inputs["conv_state"][[0, 2, 4]] = np.nan
    before = inputs["conv_state"].copy()
    out, state = update(backend, inputs)
    assert np.isfinite(out).all()
    assert_same_bits(state[[0, 2, 4]], before[[0, 2, 4]])
    assert_same_bits(state[[3, 1], :, -1], inputs["x"][[0, 2]])


def test_nan_in_one_channel_stays_there(backend: Backend) -> None:
    inputs = ConvCase(dim=37).inputs()
    clean = backend.call(ops.causal_conv1d, **inputs)
    inputs["x"][1, 5, 20] = np.nan
    out = backend.call(ops.causal_conv1d, **inputs)
    assert np.isnan(out[1, 5, 20:24]).all()
    out[1, 5, 20:24] = clean[1, 5, 20:24]
    assert_same_bits(out, clean)


def test_silu_saturates(backend: Backend) -> None:
    inputs = ConvCase(state_len=None, bias=False).inputs()
    inputs["x"] = np.full_like(inputs["x"], 1e4)
    inputs["weight"] = np.full_like(inputs["weight"], -1)
    assert np.abs(backend.call(ops.causal_conv1d, **inputs)).max() < 1e-30


# --- Bad input ------------------------------------------------------------------------------------


def zeros(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.zeros(shape, dtype)


@pytest.mark.parametrize(
    ("name", "bad", "words"),
    [
        ("x", zeros(24, 67), []),
        ("x", zeros(2, 24, 67, dtype=np.int32), ["int32"]),
        ("weight", zeros(23, 4), ["23", "24"]),
        ("weight", zeros(24, 1, 4), []),
        ("weight", zeros(24, 1), ["1", "2", "8"]),
        ("weight", zeros(24, 9), ["9", "2", "8"]),
        ("weight", zeros(24, 4, dtype=np.float16), ["float16", "float32"]),
        ("bias", zeros(23), ["23", "24"]),
        ("bias", zeros(24, dtype=np.float16), ["float16", "float32"]),
        ("initial_state", zeros(2, 24, 2), ["2", "3"]),
        ("initial_state", zeros(3, 24, 3), ["3", "2"]),
        ("initial_state", zeros(2, 24, 3, dtype=np.float16), ["float16", "float32"]),
        ("activation", "relu", ["relu", "silu"]),
    ],
)
def test_bad_argument(backend: Backend, name: str, bad: Any, words: list[str]) -> None:
    inputs = {**ConvCase().inputs(), name: bad}
    with refuses("causal_conv1d", name, *words):
        backend.call(ops.causal_conv1d, **inputs)


@pytest.mark.parametrize(
    ("name", "bad", "words"),
    [
        ("x", zeros(24), []),
        ("x", zeros(3, 24, dtype=np.float64), ["float64"]),
        ("conv_state", zeros(3, 24), []),
        ("conv_state", zeros(3, 24, 2), ["2", "3"]),
        ("conv_state", zeros(4, 24, 3), ["4", "3"]),
        ("conv_state", zeros(3, 24, 3, dtype=np.float16), ["float16", "float32"]),
        ("weight", zeros(24, 9), ["9", "2", "8"]),
        ("bias", zeros(23), ["23", "24"]),
        ("activation", "relu", ["relu", "silu"]),
        ("state_indices", np.array([0, 1], np.int32), ["2", "3"]),
        ("state_indices", np.array([0, 1, 2], np.int64), ["int64", "int32"]),
        ("state_indices", np.array([0, 1, 3], np.int32), ["3"]),
        ("state_indices", np.array([0, 1, 1], np.int32), ["1"]),
    ],
)
def test_update_bad_argument(backend: Backend, name: str, bad: Any, words: list[str]) -> None:
    inputs = {**ConvUpdateCase().inputs(), name: bad}
    with refuses_value(backend, "causal_conv1d_update", name, *words):
        update(backend, inputs)
