"""JAX arrays: inputs of every operator, results in JAX without a copy, never changed in place."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from calls import CALLS, IN_PLACE, as_tuple
from cases import BlockCase, ConvCase, ConvUpdateCase, ScanCase, StateUpdateCase
from helpers import DTYPES, assert_close, assert_same_bits, refuses
from model_fixtures import bundled_model

from ssmcore import ops
from ssmcore._outputs import library_of

jax = pytest.importorskip("jax", reason="JAX is optional: pip install 'jax[cpu]'")


def to_jax(value: Any) -> Any:
    """A JAX array with the values of a NumPy one; anything else as it is."""
    if isinstance(value, dict):
        return {name: to_jax(entry) for name, entry in value.items()}
    return jax.numpy.array(value) if isinstance(value, np.ndarray) else value


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [name for name in CALLS if name not in IN_PLACE])
def test_jax_and_numpy_give_the_same_bits(name: str, dtype: str) -> None:
    operator = getattr(ops, name)
    expected = as_tuple(operator(**CALLS[name](dtype)))
    results = as_tuple(operator(**to_jax(CALLS[name](dtype))))
    for ours, theirs in zip(expected, results, strict=True):
        assert isinstance(theirs, jax.Array)
        if name == "sample":  # int64, which is not JAX's integer by default
            ours = ours.astype(np.int32)
        assert_same_bits(np.asarray(theirs), ours)


@pytest.mark.parametrize("dtype", [*DTYPES, "complex64", "int32"])
def test_results_are_handed_over_without_a_copy(dtype: str) -> None:
    library = library_of(jax.numpy.ones(3))
    for shape in ((3, 5), (1,), (7, 64, 3)):
        memory = library.empty(shape, dtype)
        memory[...] = 7
        array = library.hand_over(memory)
        assert array.unsafe_buffer_pointer() == memory.ctypes.data
        assert_same_bits(np.asarray(array), memory)


def test_every_result_of_a_scan() -> None:
    inputs = ScanCase(batch=1, initial_state=False, A="complex").inputs()
    asked = {"cu_seqlens": np.array([0, 30, 30, 67], np.int32), "chunk_size": 20}
    expected = ops.selective_scan(**inputs, **asked, return_delta_sum=True)
    results = ops.selective_scan(**to_jax({**inputs, **asked}), return_delta_sum=True)
    for ours, theirs in zip(expected, results, strict=True):
        assert isinstance(theirs, jax.Array)
        assert_same_bits(np.asarray(theirs), ours)


def test_a_block() -> None:
    inputs = BlockCase().inputs()
    out = ops.mamba_block(**to_jax(inputs))
    assert isinstance(out, jax.Array)
    assert_same_bits(np.asarray(out), ops.mamba_block(**inputs))


def test_logits_of_a_model() -> None:
    model = bundled_model()
    for ids in (np.array([1, 2, 3], np.int32), np.array([[1, 2], [3, 4]], np.int32)):
        expected, _ = model.forward(ids)
        logits, state = model.forward(to_jax(ids))
        assert isinstance(logits, jax.Array)
        assert_same_bits(np.asarray(logits), expected)
        following = to_jax(np.full(state.num_slots, 7, np.int32))
        assert isinstance(model.step(following, state), jax.Array)


def test_values_that_are_still_being_computed() -> None:
    @jax.jit
    def slowly(x: Any) -> Any:
        for _ in range(20):
            x = x @ x / 700
        return x

    x = slowly(jax.numpy.ones((700, 700)))  # returns before it is done
    ones = np.ones((1, 700), np.float32)
    assert_close(np.asarray(ops.linear(x, ones)), np.full((700, 1), 700), "float32")


def test_results_outlive_their_inputs() -> None:
    kept = [ops.rms_norm(jax.numpy.full((4, 64), n + 1.0), None) for n in range(50)]
    for out in kept:
        assert_close(np.asarray(out + 0), np.ones((4, 64)), "float32")


# --- In place -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("selective_state_update", ["state", "selective_scan", "initial_state"]),
        ("causal_conv1d_update", ["conv_state", "causal_conv1d", "initial_state"]),
    ],
)
def test_states_are_refused(name: str, words: list[str]) -> None:
    arguments = to_jax(CALLS[name]("float32"))
    before = np.array(arguments[IN_PLACE[name]])
    with refuses(name, "JAX", *words):
        getattr(ops, name)(**arguments)
    assert_same_bits(np.asarray(arguments[IN_PLACE[name]]), before)


@pytest.mark.parametrize("state", ["conv_state", "ssm_state"])
def test_states_of_a_block_are_refused(state: str) -> None:
    case = BlockCase()
    states = {**case.states(), state: to_jax(case.states()[state])}
    with refuses("mamba_block", state, "JAX", "NumPy"):
        ops.mamba_block(**to_jax(case.inputs()), **states)


@pytest.mark.parametrize(("name", "state"), IN_PLACE.items())
def test_states_may_be_numpy_arrays(name: str, state: str) -> None:
    expected = CALLS[name]("float32")
    expected_out = getattr(ops, name)(**expected)
    arguments = CALLS[name]("float32")
    out = getattr(ops, name)(**{**to_jax(arguments), state: arguments[state]})
    assert isinstance(out, jax.Array)
    assert_same_bits(np.asarray(out), expected_out)
    assert_same_bits(arguments[state], expected[state])


def test_functional_form_of_a_step() -> None:
    inputs = StateUpdateCase().inputs()
    arrays = to_jax(inputs)
    out, state = ops.selective_scan(
        *(arrays[name][..., None] for name in ("x", "dt")),
        arrays["A"],
        *(arrays[name][..., None] for name in ("B", "C")),
        arrays["D"],
        arrays["z"][..., None],
        arrays["dt_bias"],
        True,
        initial_state=arrays["state"],
    )
    expected = ops.selective_state_update(**inputs)
    assert_same_bits(np.asarray(out[..., 0]), expected)
    assert_same_bits(np.asarray(state), inputs["state"])


def test_functional_form_of_a_convolution_step() -> None:
    inputs = ConvUpdateCase(tokens=2).inputs()
    arrays = to_jax(inputs)
    out, state = ops.causal_conv1d(
        *(arrays[name] for name in ("x", "weight", "bias", "activation")),
        initial_state=arrays["conv_state"],
        return_final_state=True,
    )
    expected = ops.causal_conv1d_update(**inputs)
    assert_same_bits(np.asarray(out), expected)
    assert_same_bits(np.asarray(state), inputs["conv_state"])


# --- Inside transformations -----------------------------------------------------------------------


def test_traced_arrays_are_refused() -> None:
    inputs = to_jax(ConvCase().inputs())
    with refuses("causal_conv1d", "x", "DLPack"):
        jax.jit(lambda x: ops.causal_conv1d(x, inputs["weight"]))(inputs["x"])
