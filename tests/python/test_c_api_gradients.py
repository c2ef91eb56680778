"""The backwards through the C interface give what they give through Python."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from c_interface import LIBRARY, Status, call, call_in_poison, create, fails, gradient, struct
from cases import ConvCase, LinearCase, LossCase, NormCase
from gradients import random_like
from helpers import assert_same_bits
from test_conv_gradients import with_outputs
from test_cross_entropy import backward_arguments
from test_dense_gradients import linear_arguments, norm_arguments

from ssmcore import ops


@pytest.fixture(scope="module")
def context() -> Iterator[ctypes.c_void_p]:
    handle = create("context_create", None)
    yield handle
    LIBRARY.ssmcore_context_destroy(handle)


def assert_as_in_python(
    context: ctypes.c_void_p, name: str, fields: dict[str, Any], expected: dict[str, np.ndarray]
) -> None:
    """It overwrites NaN, in a workspace of NaN, and adds to what it wrote when told to."""
    actual = {n: np.full_like(array, np.nan) for n, array in expected.items()}
    call_in_poison(name, context, **fields, **{n: gradient(array) for n, array in actual.items()})
    for n, array in expected.items():
        assert_same_bits(actual[n], array)
    added = {n: gradient(array, accumulate=True) for n, array in actual.items()}
    call_in_poison(name, context, **fields, **added)
    for n, array in expected.items():
        assert_same_bits(actual[n], array + array)


def test_causal_conv1d_bwd(context: ctypes.c_void_p) -> None:
    arguments = with_outputs(ConvCase().inputs())
    expected = ops.causal_conv1d_bwd(**arguments)._asdict()
    assert_as_in_python(context, "causal_conv1d_bwd", {**arguments, "activation": 1}, expected)


def test_causal_conv1d_bwd_of_numbered_steps(context: ctypes.c_void_p) -> None:
    arguments = ConvCase(state_len=None, activation=None).inputs()
    del arguments["initial_state"]
    arguments["dout"] = random_like(arguments["x"])
    arguments["seq_idx"] = np.repeat(np.array([[4, -1], [2, 3]], np.int32), [30, 37], axis=1)
    expected = ops.causal_conv1d_bwd(**arguments)
    written = {"dx": expected.dx, "dweight": expected.dweight}
    assert_as_in_python(context, "causal_conv1d_bwd", {**arguments, "activation": 0}, written)


def test_rms_norm_bwd(context: ctypes.c_void_p) -> None:
    arguments = norm_arguments(NormCase(z_dtype="float32", group_size=24, norm_before_gate=True))
    expected = ops.rms_norm_bwd(**arguments)._asdict()
    assert_as_in_python(context, "rms_norm_bwd", arguments, expected)


def test_linear_bwd(context: ctypes.c_void_p) -> None:
    arguments = linear_arguments(LinearCase())
    expected = ops.linear_bwd(**arguments)._asdict()
    del arguments["bias"]
    assert_as_in_python(context, "linear_bwd", arguments, expected)


def test_embedding_bwd(context: ctypes.c_void_p) -> None:
    token_ids = np.array([3, 0, 3, 4])
    dout = random_like(np.empty((4, 19), np.float32))
    expected = {"dweight": ops.embedding_bwd(dout, token_ids, 7)}
    fields = {"token_ids": token_ids, "dout": dout}
    assert_as_in_python(context, "embedding_bwd", fields, expected)


@pytest.mark.parametrize("ignore_index", [-100, 3])
def test_cross_entropy(context: ctypes.c_void_p, ignore_index: int) -> None:
    inputs = LossCase(ignore_index=ignore_index).inputs()
    loss, lse = ops.cross_entropy(**inputs, reduction="none", return_lse=True)
    mean = ops.cross_entropy(**inputs)
    fields = {**inputs, "ignore_index": 0 if ignore_index == -100 else ignore_index}
    outputs = {n: np.full(7, np.nan, np.float32) for n in ("loss", "lse")}
    outputs["mean_loss"] = np.full(1, np.nan, np.float32)
    call_in_poison("cross_entropy_fwd", context, **fields, **outputs)
    assert_same_bits(outputs["loss"], loss)
    assert_same_bits(outputs["lse"], lse)
    assert_same_bits(outputs["mean_loss"][0], mean[()])


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_cross_entropy_bwd(context: ctypes.c_void_p, reduction: str) -> None:
    arguments = backward_arguments(LossCase(), reduction)
    expected = {"dlogits": ops.cross_entropy_bwd(**arguments)}
    dloss = arguments.pop("dloss").reshape(-1)
    arguments["dmean_loss" if arguments.pop("reduction") == "mean" else "dloss"] = dloss
    assert_as_in_python(context, "cross_entropy_bwd", arguments, expected)


def test_workspace_too_small_and_missing_arguments(context: ctypes.c_void_p) -> None:
    arguments = linear_arguments(LinearCase())
    dx = np.empty_like(arguments["x"])
    fields = {"weight": arguments["weight"], "dout": arguments["dout"], "dx": gradient(dx)}
    args = struct("linear_bwd_args", **fields)
    bytes_needed = ctypes.c_size_t()
    function = LIBRARY.ssmcore_linear_bwd_workspace_size
    assert function(context, ctypes.byref(args), ctypes.byref(bytes_needed)) == Status.OK
    assert bytes_needed.value > 0
    del fields["weight"]
    with fails(Status.INVALID_ARGUMENT, "linear_bwd", "weight"):
        call("linear_bwd", context, **fields)
