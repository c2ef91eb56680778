"""One step of the selective scan."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import reference
from backends import Backend
from cases import NARROW, STATE_UPDATE_CASES, StateUpdateCase, rows
from helpers import (
    DTYPES,
    assert_close,
    assert_only_poison_around,
    assert_same_bits,
    place,
    refuses,
    refuses_value,
    with_adjacent,
)

from ssmcore import ops


def step(backend: Backend, inputs: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """(out, state after); the state of `inputs` is changed in place where the backend shares it."""
    state = backend.to_device(inputs["state"])
    out = backend.call(ops.selective_state_update, **{**inputs, "state": state})
    return out, backend.to_numpy(state)


@pytest.mark.parametrize("case", STATE_UPDATE_CASES)
def test_agrees_with_reference(backend: Backend, case: StateUpdateCase) -> None:
    inputs = case.inputs()
    expected_out, expected_state = reference.selective_state_update(**inputs)
    out, state = step(backend, inputs)
    assert out.dtype == DTYPES[case.dtype]
    assert_close(out, expected_out, case.dtype)
    assert_close(state, expected_state, "float32")


def test_only_the_slots_named_change(backend: Backend) -> None:
    inputs = StateUpdateCase(state_indices=(3, -1, 1)).inputs()
    inputs["state"][[0, 2, 4]] = np.nan
    before = inputs["state"].copy()
    out, state = step(backend, inputs)
    assert np.isfinite(out).all()
    assert_same_bits(state[[0, 2, 4]], before[[0, 2, 4]])
    assert np.isfinite(state[[1, 3]]).all()
    assert not np.any(state[[1, 3]] == before[[1, 3]])


@pytest.mark.parametrize("dim", [8, 1000])
@pytest.mark.parametrize("dstate", [16, 6])
def test_slots_named_twice_by_rows_far_apart(backend: Backend, dim: int, dstate: int) -> None:
    inputs = StateUpdateCase(batch=300, dim=dim, dstate=dstate).inputs()
    inputs["state_indices"] = np.arange(300, dtype=np.int32)
    inputs["state_indices"][7:290] = -1  # which none of them is
    step(backend, inputs)
    inputs["state_indices"][299] = 1
    with refuses_value(backend, "selective_state_update", "state_indices", "1", "twice"):
        step(backend, inputs)


def test_a_negative_slot_starts_from_zeros(backend: Backend) -> None:
    inputs = StateUpdateCase(state_indices=(-1, -7, -1)).inputs()
    inputs["state"][...] = np.nan
    out, _ = step(backend, inputs)
    fresh = {**inputs, "state": zeros(3, 24, 16), "state_indices": None}
    from_zeros, _ = step(backend, fresh)
    assert_same_bits(out, from_zeros)


def test_slots_are_only_a_matter_of_where(backend: Backend) -> None:
    inputs = StateUpdateCase().inputs()
    slots = np.array([4, 0, 2], np.int32)
    state = np.full((5, 24, 16), np.nan, np.float32)
    state[slots] = inputs["state"]
    out, after = step(backend, inputs)
    out_slots, after_slots = step(backend, {**inputs, "state": state, "state_indices": slots})
    assert_same_bits(out_slots, out)
    assert_same_bits(after_slots[slots], after)


@pytest.mark.parametrize("layout", ["padded", "token-major padded", "spread"])
def test_nothing_around_the_state_changes(backend: Backend, layout: str) -> None:
    inputs = StateUpdateCase(dim=37, dstate=11).inputs()
    inputs["state"] = place(inputs["state"], layout)
    _, expected_state = reference.selective_state_update(**inputs)
    _, state = step(backend, inputs)
    assert_close(state, expected_state, "float32")
    assert_only_poison_around(state)


@pytest.mark.parametrize(
    "case",
    rows(
        StateUpdateCase(dim=96),
        batch=(1,),
        dim=(100,),
        dstate=(1, 3, 33),
        dtype=NARROW,
        nheads=(3,),
        D=(False,),
        z=(False,),
        dt_bias=(False,),
        dt_softplus=(False,),
        state_indices=((3, -1, 1),),
    ),
)
def test_adjacent_channels(backend: Backend, case: StateUpdateCase) -> None:
    """As models place A and states; the CPU then works on them in place."""

    def inputs() -> dict[str, Any]:
        arguments = case.inputs()
        for name in ("state", "A"):
            arguments[name] = with_adjacent(arguments[name], axis=-2)
        return arguments

    expected_out, expected_state = reference.selective_state_update(**case.inputs())
    out, state = step(backend, inputs())
    assert_close(out, expected_out, case.dtype)
    assert_close(state, expected_state, "float32")
    if backend.name == "cpu":
        staged_out, staged_state = step(backend, case.inputs())
        assert_same_bits(out, staged_out)
        assert_same_bits(state, staged_state)


@pytest.mark.parametrize("name", ["x", "dt", "A", "B", "C", "D", "z", "dt_bias"])
def test_zero_strides(backend: Backend, name: str) -> None:
    inputs = StateUpdateCase().inputs()
    shape = inputs[name].shape
    for axis in range(len(shape)):
        repeated = np.broadcast_to(inputs[name].take([0], axis=axis), shape)
        arguments = {**StateUpdateCase().inputs(), name: repeated}
        expected_out, expected_state = reference.selective_state_update(**arguments)
        out, state = step(backend, arguments)
        assert_close(out, expected_out, "float32")
        assert_close(state, expected_state, "float32")


def test_threads_do_not_change_a_bit(backend: Backend, set_num_threads: Any) -> None:
    case = StateUpdateCase(batch=5, dim=1001)
    set_num_threads(1)
    out, state = step(backend, case.inputs())
    for threads in (2, 3):
        set_num_threads(threads)
        again, state_again = step(backend, case.inputs())
        assert_same_bits(again, out)
        assert_same_bits(state_again, state)


def test_nan_in_one_channel_stays_there(backend: Backend) -> None:
    case = StateUpdateCase(dim=37)
    clean_out, clean_state = step(backend, case.inputs())
    inputs = case.inputs()
    inputs["x"][1, 5] = np.nan
    out, state = step(backend, inputs)
    assert np.isnan(out[1, 5])
    assert np.isnan(state[1, 5]).all()
    out[1, 5], state[1, 5] = clean_out[1, 5], clean_state[1, 5]
    assert_same_bits(out, clean_out)
    assert_same_bits(state, clean_state)


# --- Bad input ------------------------------------------------------------------------------------


def zeros(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.zeros(shape, dtype)


@pytest.mark.parametrize(
    ("name", "bad", "words"),
    [
        ("state", zeros(3, 24), []),
        ("state", zeros(2, 24, 16), ["2", "3"]),
        ("state", zeros(3, 24, 16, dtype=DTYPES["bfloat16"]), ["bfloat16", "float32"]),
        ("x", zeros(24), []),
        ("x", zeros(3, 24, dtype=np.float64), ["float64"]),
        ("dt", zeros(3, 23), ["23", "24"]),
        ("dt", zeros(3, 24, dtype=np.float16), ["float16", "float32"]),
        ("A", zeros(23, 16), ["23", "24"]),
        ("A", zeros(24, 16, dtype=np.float16), ["float16", "float32"]),
        ("B", zeros(3, 15), ["15", "16"]),
        ("B", zeros(3, 5, 16), ["5", "24"]),
        ("B", zeros(16), []),
        ("C", zeros(2, 16), ["2", "3"]),
        ("D", zeros(24, 16), []),
        ("z", zeros(3, 23), ["23", "24"]),
        ("dt_bias", zeros(23), ["23", "24"]),
        ("state_indices", np.array([0, 1], np.int32), ["2", "3"]),
        ("state_indices", np.array([0, 1, 2], np.int64), ["int64", "int32"]),
        ("state_indices", np.array([0, 1, 3], np.int32), ["3"]),
        ("state_indices", np.array([0, 1, 1], np.int32), ["1"]),
    ],
)
def test_bad_argument(backend: Backend, name: str, bad: np.ndarray, words: list[str]) -> None:
    inputs = {**StateUpdateCase().inputs(), name: bad}
    with refuses_value(backend, "selective_state_update", name, *words):
        step(backend, inputs)


def test_a_refused_call_leaves_the_state(backend: Backend) -> None:
    if not backend.sees_values:
        pytest.skip("where indices are met while it runs, the other rows are updated")
    inputs = StateUpdateCase(state_indices=(0, 1, 5)).inputs()
    before = inputs["state"].copy()
    with refuses("selective_state_update", "state_indices", "5"):
        step(backend, inputs)
    assert_same_bits(inputs["state"], before)
