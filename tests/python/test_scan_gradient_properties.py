"""The scan's backward against itself: split, packed, in other memory, with other threads."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import reference_gradients
from backends import Backend
from cases import ScanCase
from helpers import DTYPES, LAYOUTS, assert_close, assert_only_poison_around, assert_same_bits
from hypothesis import given
from hypothesis import strategies as st
from scan_gradients import assert_all_close, backward, output_gradients, saved_states, tolerance
from sequences import boundaries, scan_steps

from ssmcore import ops

# Gradients that every step has its own of, and so every sequence.
PER_STEP = ("du", "ddelta", "dB", "dC", "dz")


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
def test_saved_states_spare_computing_them(
    backend: Backend, chunk_size: int, dtype: str, A: str, **fields: Any
) -> None:
    case = ScanCase(dtype=dtype, A="real" if dtype == "float64" else A, **fields)
    inputs = case.inputs()
    *_, states = backend.call(ops.selective_scan, **inputs, chunk_size=chunk_size)
    inputs.update(output_gradients(case))
    expected = backward(backend, **inputs)
    saved = {"chunk_states": states, "chunk_size": chunk_size}
    assert_all_close(backward(backend, **inputs, **saved), expected, inputs)


@given(
    seqlen=st.integers(2, 150),
    split_at=st.floats(0, 1),
    dim=st.integers(1, 40),
    dstate=st.integers(1, 20),
    dtype=st.sampled_from([*DTYPES, "float64"]),
    A=st.sampled_from(["real", "complex"]),
    layout=st.sampled_from(["contiguous", *LAYOUTS]),
)
def test_two_halves_are_the_whole(
    backend: Backend, seqlen: int, split_at: float, dtype: str, A: str, **fields: Any
) -> None:
    """With the state handed forward and its gradient handed back."""
    A = "real" if dtype == "float64" else A
    case = ScanCase(seqlen=seqlen, dtype=dtype, A=A, **fields)
    inputs, outputs = case.inputs(), output_gradients(case)
    middle = 1 + round(split_at * (seqlen - 2))
    whole = backward(backend, **inputs, **outputs)

    first, second = scan_steps(inputs, 0, middle), scan_steps(inputs, middle, seqlen)
    _, second["initial_state"] = backend.call(ops.selective_scan, **first)
    late = backward(backend, **{**outputs, "dout": outputs["dout"][..., middle:]}, **second)
    early = backward(
        backend,
        **first,
        dout=outputs["dout"][..., :middle],
        dlast_state=late["dinitial_state"],
    )
    joined = {
        name: np.concatenate([early[name], late[name]], axis=-1)
        if name in PER_STEP
        else early[name] + late[name]
        for name in whole
    }
    joined["dinitial_state"] = early["dinitial_state"]
    assert_all_close(joined, whole, inputs)


@given(
    lengths=st.lists(
        st.one_of(st.just(0), st.just(1), st.integers(2, 90)), min_size=1, max_size=12
    ).filter(any),
    chunk_size=st.one_of(st.none(), st.integers(1, 100)),
    A=st.sampled_from(["real", "complex"]),
    B=st.sampled_from(["constant", "shared", "3 groups"]),
    dtype=st.sampled_from([*DTYPES, "float64"]),
)
def test_packed_is_separate(
    backend: Backend,
    lengths: list[int],
    chunk_size: int | None,
    A: str,
    B: str,
    dtype: str,
) -> None:
    A = "real" if dtype == "float64" else A
    case = ScanCase(batch=1, seqlen=sum(lengths), A=A, B=B, dtype=dtype, initial_state=False)
    inputs, outputs = case.inputs(), output_gradients(replace(case, batch=len(lengths)))
    outputs["dout"] = outputs["dout"][:1]
    states = replace(case, batch=len(lengths), initial_state=True).inputs()["initial_state"]
    inputs["initial_state"] = states
    cu_seqlens = boundaries(lengths)
    saved = saved_states(backend, {**inputs, "cu_seqlens": cu_seqlens}, chunk_size)
    packed = backward(backend, **inputs, **outputs, **saved, cu_seqlens=cu_seqlens)

    sums = {name: np.zeros_like(packed[name]) for name in packed}
    for s, (begin, end) in enumerate(pairwise(cu_seqlens)):
        row = slice(s, s + 1)
        if begin == end:
            assert_same_bits(packed["dinitial_state"][row], outputs["dlast_state"][row])
            continue
        steps = {**scan_steps(inputs, begin, end), "initial_state": states[row]}
        saved = saved_states(backend, steps, chunk_size)
        steps["dout"], steps["dlast_state"] = (
            outputs["dout"][..., begin:end],
            outputs["dlast_state"][row],
        )
        alone = backward(backend, **steps, **saved)
        assert_same_bits(packed["dinitial_state"][row], alone["dinitial_state"])
        for name, gradient in alone.items():
            if name in PER_STEP and not (name == "dB" and B == "constant"):
                parts = gradient.shape[-1] // (end - begin)
                mine = packed[name][..., parts * begin : parts * end]
                assert np.array_equal(mine, gradient), name
            elif name != "dinitial_state":
                sums[name] += gradient
    for name in packed.keys() - {*PER_STEP, "dinitial_state"}:
        assert_close(packed[name], sums[name], tolerance(packed[name].dtype, packed["du"].dtype))


@pytest.mark.parametrize("A", ["real", "complex"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("B", ["shared", "constant", "3 groups"])
def test_threads_do_not_change_a_bit(
    backend: Backend, set_num_threads: Any, dtype: str, A: str, B: str
) -> None:
    case = ScanCase(batch=3, dim=201, seqlen=130, dstate=7, dtype=dtype, A=A, B=B)
    arguments = {**case.inputs(), **output_gradients(case)}
    set_num_threads(1)
    once = backward(backend, **arguments)
    for threads in (1, 2, 3, 5):
        set_num_threads(threads)
        again = backward(backend, **arguments)
        for name, gradient in once.items():
            assert_same_bits(again[name], gradient)


def test_rows_do_not_depend_on_the_batch(backend: Backend) -> None:
    case = ScanCase(batch=5, dim=150)
    arguments = {**case.inputs(), **output_gradients(case)}
    whole = backward(backend, **arguments)
    per_row = ("u", "delta", "z", "B", "C", "initial_state", "dout", "dlast_state")
    alone = backward(backend, **{**arguments, **{name: arguments[name][2:3] for name in per_row}})
    for name in (*PER_STEP, "dinitial_state"):
        assert_same_bits(alone[name], np.ascontiguousarray(whole[name][2:3]))


# --- Memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "name",
    ["u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state", "dout", "dlast_state"],
)
def test_zero_strides(backend: Backend, name: str, dtype: str) -> None:
    case = ScanCase(dtype=dtype)
    inputs = {**case.inputs(), **output_gradients(case)}
    shape = inputs[name].shape
    for axis in range(len(shape)):
        repeated = np.broadcast_to(inputs[name].take([0], axis=axis), shape)
        arguments = {**inputs, name: repeated}
        expected = reference_gradients.selective_scan_bwd(**arguments)
        assert_all_close(backward(backend, **arguments), expected, inputs)


@pytest.mark.parametrize("layout", ["padded", "token-major padded", "spread"])
def test_inputs_and_what_lies_around_them_stay(backend: Backend, layout: str) -> None:
    case = ScanCase(layout=layout)
    inputs = case.inputs()
    arrays = {name: value for name, value in inputs.items() if isinstance(value, np.ndarray)}
    before = {name: value.copy() for name, value in arrays.items()}
    backward(backend, **inputs, **output_gradients(case))
    for name, array in arrays.items():
        assert_same_bits(array, before[name])
        assert_only_poison_around(array)


def test_nan_in_one_channel_stays_there(backend: Backend) -> None:
    case = ScanCase(dim=37)
    arguments = {**case.inputs(), **output_gradients(case)}
    clean = backward(backend, **arguments)
    arguments["u"][1, 5, 20] = np.nan
    spoilt = backward(backend, **arguments)
    # h is NaN from there on, and so is what is multiplied with it; du is not.
    assert np.isnan(spoilt["dA"][5]).all() and np.isnan(spoilt["ddelta"][1, 5, 20:]).all()
    assert np.isnan(spoilt["dB"][1, :, 20]).all() and np.isnan(spoilt["dC"][1, :, 20:]).all()
    assert_same_bits(spoilt["du"], clean["du"])
    assert_same_bits(spoilt["dinitial_state"], clean["dinitial_state"])
    spoilt["dA"][5] = clean["dA"][5]
    spoilt["dB"][1, :, 20] = clean["dB"][1, :, 20]
    # A GPU sums up eight steps at once, with zeros for all but one of them.
    spoilt["dC"][1, :, 16:] = clean["dC"][1, :, 16:]
    spoilt["ddelta"][1, 5, 20:] = clean["ddelta"][1, 5, 20:]
    for name in ("dA", "dB", "dC", "ddelta"):
        assert_same_bits(spoilt[name], clean[name])


@pytest.mark.parametrize("grows", [False, True], ids=["decaying", "growing"])
@pytest.mark.parametrize("of_u, of_dout", [(1, 1), (1e-12, 1), (1, 1e-12), (1e10, 1e10)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_magnitudes(backend: Backend, dtype: str, of_u: float, of_dout: float, grows: bool) -> None:
    """States and their gradients of any size, and A that lets them grow a thousandfold."""
    case = ScanCase(dim=70, seqlen=96, dtype=dtype, delta_bias=False, delta_softplus=False)
    inputs = {**case.inputs(), **output_gradients(case)}
    inputs["A"] = np.random.default_rng(0).uniform(0.1, 1, inputs["A"].shape).astype(np.float32)
    inputs["A"] *= 1 if grows else -10
    inputs["delta"] = (np.abs(inputs["delta"].astype(np.float64)) * 0.1).astype(DTYPES[dtype])
    for name, factor in (("u", of_u), ("dout", of_dout)):
        inputs[name] = (inputs[name].astype(np.float64) * factor).astype(DTYPES[dtype])
    for name in ("initial_state", "dlast_state"):
        if inputs.get(name) is not None:
            inputs[name] = inputs[name] * np.float32(of_u if name == "initial_state" else of_dout)
    expected = reference_gradients.selective_scan_bwd(**inputs)
    assert_all_close(backward(backend, **inputs), expected, inputs)
