"""NumPy arrays and torch tensors: which the operators take, what they return, and that nothing is
copied on the way."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from calls import CALLS, IN_PLACE, as_tuple
from cases import BlockCase, ScanCase
from helpers import (
    DTYPES,
    assert_close,
    assert_only_poison_around,
    assert_same_bits,
    place,
    refuses,
)

import ssmcore
from ssmcore import ops


def to_torch(array: Any) -> Any:
    """A torch tensor in the same memory, of the same strides; anything but an array as it is."""
    if not isinstance(array, np.ndarray):
        return array
    if array.dtype == DTYPES["bfloat16"]:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def to_numpy(array: Any) -> np.ndarray:
    if isinstance(array, np.ndarray):
        return array
    if array.dtype == torch.bfloat16:
        return array.view(torch.int16).numpy().view(DTYPES["bfloat16"])
    return array.numpy()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CALLS)
def test_torch_and_numpy_give_the_same_bits(name: str, dtype: str) -> None:
    operator = getattr(ops, name)
    from_numpy = as_tuple(operator(**CALLS[name](dtype)))
    arguments = {key: to_torch(value) for key, value in CALLS[name](dtype).items()}
    from_torch = as_tuple(operator(**arguments))
    assert len(from_torch) == len(from_numpy)
    for ours, theirs in zip(from_numpy, from_torch, strict=True):
        assert type(ours) is np.ndarray
        assert type(theirs) is torch.Tensor
        assert_same_bits(to_numpy(theirs), ours)


@pytest.mark.parametrize("dtype", DTYPES)
def test_result_dtypes(dtype: str) -> None:
    out, last_state = ops.selective_scan(**CALLS["selective_scan"](dtype))
    assert (out.dtype, last_state.dtype) == (DTYPES[dtype], np.float32)
    out, final_state = ops.causal_conv1d(**CALLS["causal_conv1d"](dtype), return_final_state=True)
    assert (out.dtype, final_state.dtype) == (DTYPES[dtype], DTYPES[dtype])
    assert ops.embedding(**CALLS["embedding"](dtype)).dtype == DTYPES[dtype]
    assert ops.sample(**CALLS["sample"](dtype)).dtype == np.int64


def test_the_first_argument_decides_the_kind() -> None:
    inputs = ScanCase().inputs()
    mixed = {key: to_torch(value) if key != "u" else value for key, value in inputs.items()}
    out, last_state = ops.selective_scan(**mixed)
    assert type(out) is type(last_state) is np.ndarray
    mixed = {key: value if key != "u" else to_torch(value) for key, value in inputs.items()}
    out_torch, state_torch = ops.selective_scan(**mixed)
    assert type(out_torch) is type(state_torch) is torch.Tensor
    assert_same_bits(to_numpy(out_torch), out)


def test_the_weight_of_an_embedding_decides_the_kind() -> None:
    token_ids, weight = CALLS["embedding"]("float32").values()
    assert type(ops.embedding(to_torch(token_ids), weight)) is np.ndarray
    assert type(ops.embedding(token_ids, to_torch(weight))) is torch.Tensor


@pytest.mark.parametrize("first", ["numpy", "torch"])
def test_a_block_of_mixed_kinds(first: str) -> None:
    inputs = BlockCase().inputs()
    expected = ops.mamba_block(**inputs)
    if first == "torch":
        out = ops.mamba_block(to_torch(inputs["x"]), inputs["weights"])
    else:
        weights = {name: to_torch(value) for name, value in inputs["weights"].items()}
        out = ops.mamba_block(inputs["x"], weights)
    assert isinstance(out, torch.Tensor if first == "torch" else np.ndarray)
    assert_close(to_numpy(out), expected, "float32")


@pytest.mark.parametrize("name", CALLS)
def test_results_are_new_memory(name: str) -> None:
    arguments = CALLS[name]("float32")
    for result in as_tuple(getattr(ops, name)(**arguments)):
        assert result.flags.writeable
        for value in arguments.values():
            if isinstance(value, np.ndarray):
                assert not np.shares_memory(result, value)


@pytest.mark.parametrize("name", CALLS)
def test_read_only_inputs(name: str) -> None:
    arguments = CALLS[name]("float32")
    expected = as_tuple(getattr(ops, name)(**CALLS[name]("float32")))
    for key, value in arguments.items():
        if isinstance(value, np.ndarray) and key not in ("state", "conv_state"):
            value.flags.writeable = False
    for result, same in zip(as_tuple(getattr(ops, name)(**arguments)), expected, strict=True):
        assert_same_bits(result, same)


def test_a_gradient_is_not_lost_silently() -> None:
    x, weight = torch.ones(3, 5), torch.nn.Parameter(torch.ones(7, 5))
    with refuses("linear", "weight", "gradient"):
        ops.linear(x, weight)
    assert torch.equal(ops.linear(x, weight.detach()), torch.full((3, 7), 5.0))


def test_parameters_under_no_grad() -> None:
    x, weight = torch.ones(3, 5), torch.nn.Parameter(torch.ones(7, 5))
    arguments = {
        key: to_torch(value) for key, value in CALLS["selective_state_update"]("float32").items()
    }
    expected = CALLS["selective_state_update"]("float32")
    ops.selective_state_update(**expected)
    with torch.no_grad():
        assert torch.equal(ops.linear(x, weight), torch.full((3, 7), 5.0))
        ops.selective_state_update(**{**arguments, "state": arguments["state"].requires_grad_()})
    assert_same_bits(to_numpy(arguments["state"].detach()), expected["state"])


@pytest.mark.parametrize(
    ("name", "argument"),
    [("selective_scan", "u"), ("causal_conv1d", "x"), ("rms_norm", "residual"), ("linear", "x")],
)
def test_strides_beyond_32_bits(name: str, argument: str) -> None:
    """Two rows more than 2³¹ elements apart, in memory that is never touched in between."""
    arguments = CALLS[name]("float16")
    expected = as_tuple(getattr(ops, name)(**arguments))
    near = arguments[argument]
    memory = np.zeros(2**31 + 7 + near[0].size, np.float16)
    strides = (2 * (2**31 + 7), *near.strides[1:])
    far = np.lib.stride_tricks.as_strided(memory, near.shape, strides)
    far[...] = near
    results = as_tuple(getattr(ops, name)(**{**arguments, argument: far}))
    for result, same in zip(results, expected, strict=True):
        assert_same_bits(result, same)


# --- In place, which shows that nothing is copied -------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "token-major", "padded", "spread"])
@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize(("name", "state"), IN_PLACE.items())
def test_states_change_in_the_memory_of_the_caller(
    name: str, state: str, kind: str, layout: str, dtype: str
) -> None:
    expected = CALLS[name](dtype)
    expected_out = getattr(ops, name)(**expected)

    arguments = CALLS[name](dtype)
    memory = arguments[state] = place(arguments[state], layout)
    if kind == "torch":
        arguments = {key: to_torch(value) for key, value in arguments.items()}
    out = getattr(ops, name)(**arguments)
    assert_close(to_numpy(out), expected_out, dtype)
    assert_close(memory, expected[state], "float32")
    if layout in ("padded", "spread"):
        assert_only_poison_around(memory)


@pytest.mark.parametrize(("name", "state"), IN_PLACE.items())
def test_read_only_states_are_refused(name: str, state: str) -> None:
    arguments = CALLS[name]("float32")
    arguments[state].flags.writeable = False
    before = arguments[state].copy()
    with refuses(name, state, "read-only"):
        getattr(ops, name)(**arguments)
    assert_same_bits(arguments[state], before)


@pytest.mark.parametrize(("name", "state"), IN_PLACE.items())
def test_states_whose_elements_overlap_are_refused(name: str, state: str) -> None:
    arguments = {key: to_torch(value) for key, value in CALLS[name]("float32").items()}
    arguments[state] = arguments[state][:1].expand_as(arguments[state])
    with refuses(name, state, "overlap"):
        getattr(ops, name)(**arguments)


# --- What is not an array the operators take ------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in CALLS if name != "sample"])
def test_other_devices_are_refused(name: str) -> None:
    arguments = {key: to_torch(value) for key, value in CALLS[name]("float32").items()}
    arrays = [key for key, value in arguments.items() if isinstance(value, torch.Tensor)]
    for key in arrays:
        with refuses(name, key, "meta"):
            getattr(ops, name)(**{**arguments, key: arguments[key].to("meta")})


@pytest.mark.parametrize("bad", [None, [[1.0]], 1.0, "u"], ids=["None", "list", "float", "str"])
def test_what_is_no_array_is_refused(bad: Any) -> None:
    with refuses("linear", "x"):
        ops.linear(bad, np.ones((7, 5), np.float32))
    with refuses("linear", "weight"):
        ops.linear(np.ones((3, 5), np.float32), bad)


def test_byte_order_of_another_machine_is_refused() -> None:
    swapped = np.ones((3, 5), np.dtype(np.float32).newbyteorder())
    with refuses("linear", "x"):
        ops.linear(swapped, np.ones((7, 5), np.float32))


def test_negative_strides_are_refused() -> None:
    with refuses("rms_norm", "x", "negative", "stride"):
        ops.rms_norm(np.ones((3, 5), np.float32)[::-1], np.ones(5, np.float32))


def test_errors_of_both_families() -> None:
    assert issubclass(ssmcore.InvalidArgumentError, ssmcore.Error)
    assert issubclass(ssmcore.InvalidArgumentError, ValueError)
