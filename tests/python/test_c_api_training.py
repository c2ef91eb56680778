"""Training through the C interface gives what Python gives."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import c_interface as c
import numpy as np
import pytest
from cases import BlockCase
from helpers import assert_close, assert_same_bits
from model_fixtures import BUNDLED, DATA
from test_mamba_block_gradients import by_name, initial, output_gradients

import ssmcore
from ssmcore import ops


@pytest.fixture(scope="module")
def context() -> Iterator[ctypes.c_void_p]:
    handle = c.create("context_create", None)
    yield handle
    c.LIBRARY.ssmcore_context_destroy(handle)


@pytest.fixture
def model(context: ctypes.c_void_p) -> Iterator[ctypes.c_void_p]:
    options = c.struct("model_options", trainable=1)
    handle = c.create("model_load", context, str(BUNDLED).encode(), ctypes.byref(options))
    yield handle
    c.LIBRARY.ssmcore_model_free(handle)


@pytest.fixture(scope="module")
def step() -> dict[str, np.ndarray]:
    text = np.frombuffer((DATA / "val_kjv.txt").read_bytes()[:122], np.uint8).reshape(2, 61)
    return {"token_ids": text[:, :-1].astype(np.int64), "targets": text[:, 1:].astype(np.int32)}


# Gradients by the names of weights, and what MambaBlockBwdArgs calls them.
BLOCK_GRADIENTS = {
    "in_proj.weight": "din_proj",
    "in_proj.bias": "din_proj_bias",
    "conv1d.weight": "dconv_weight",
    "conv1d.bias": "dconv_bias",
    "x_proj.weight": "dx_proj",
    "dt_proj.weight": "ddt_proj",
    "dt_proj.bias": "ddt_bias",
    "A_log": "dA",
    "D": "dD",
    "out_proj.weight": "dout_proj",
    "out_proj.bias": "dout_proj_bias",
}


def block_weights(weights: dict[str, np.ndarray], A: np.ndarray) -> ctypes.Structure:
    """The arrays must live as long as what is returned."""
    return c.struct(
        "mamba_block_weights",
        **{
            BLOCK_GRADIENTS[name][1:]: weight[:, 0] if name == "conv1d.weight" else weight
            for name, weight in weights.items()
            if name != "A_log"
        },
        A=A,
    )


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("keep", [(), ("u",), ("u", "delta")], ids=["least", "u", "all"])
def test_block(context: ctypes.c_void_p, keep: tuple[str, ...], accumulate: bool) -> None:
    """Forward and backward in memory of NaN; gradients are added to where that is asked."""
    case = BlockCase(seqlen=100, proj_bias=True)
    inputs = {**case.inputs(), **initial(case.states())}
    douts = output_gradients(case)
    out, saved, *states = ops.mamba_block_train_fwd(**inputs, return_states=True, keep=keep)
    kept = {name: np.full_like(a, np.nan) for name, a in saved.arrays().items() if a is not None}
    expected_kept = {name: array.copy() for name, array in saved.arrays().items() if name in kept}
    expected = by_name(ops.mamba_block_bwd(saved=saved, **inputs, **douts))

    A = -np.exp(inputs["weights"]["A_log"])
    weights = block_weights(inputs["weights"], A)
    c_saved = c.struct("mamba_block_saved", **kept)
    outputs = [np.empty_like(array) for array in (out, *states)]
    names = ("out", "final_conv_state", "last_ssm_state")
    written = dict(zip(names, outputs, strict=True))
    common = {**inputs, "weights": weights, "saved": c_saved}
    c.call_in_poison("mamba_block_train_fwd", context, **common, **written)
    for output, array in zip(outputs, (out, *states), strict=True):
        assert_close(output, array, "float32", rounded=True)
    for name, array in expected_kept.items():
        assert_close(kept[name], array, "float32", rounded=True)

    before = np.float32(1 if accumulate else np.nan)
    there = {name: np.full_like(array, before) for name, array in expected.items()}
    gradients = {
        BLOCK_GRADIENTS.get(name, f"d{name}"): c.gradient(
            array[:, 0] if name == "conv1d.weight" else array, accumulate=accumulate
        )
        for name, array in there.items()
    }
    c.call_in_poison("mamba_block_bwd", context, **common, **douts, **gradients)
    expected["A_log"] = expected["A_log"] / A
    for name, array in expected.items():
        total = array + before if accumulate else array
        assert_close(there[name], total, "float32", rounded=True)


def test_block_without_what_is_saved(context: ctypes.c_void_p) -> None:
    case = BlockCase()
    inputs, dout = case.inputs(), output_gradients(case)["dout"]
    A = -np.exp(inputs["weights"]["A_log"])
    weights = block_weights(inputs["weights"], A)
    arguments = {"x": inputs["x"], "weights": weights, "dout": dout}
    with c.fails(c.Status.INVALID_ARGUMENT, "mamba_block_bwd: saved is NULL"):
        c.call("mamba_block_bwd", context, **arguments)
    with c.fails(c.Status.INVALID_ARGUMENT, "mamba_block_bwd: saved xz is missing"):
        c.call("mamba_block_bwd", context, **arguments, saved=c.struct("mamba_block_saved"))


def named(gradients: dict[str, tuple[np.ndarray, bool]]) -> dict[str, Any]:
    """The fields of the arguments that name gradients and whether they are added to."""
    kind = c.STRUCTS["ssmcore_named_gradient"]
    entries = (kind * len(gradients))()
    entries.kept = []  # what their pointers point to
    for entry, (name, (array, accumulate)) in zip(entries, gradients.items(), strict=True):
        text, gradient = (
            ctypes.create_string_buffer(name.encode()),
            c.gradient(array, accumulate=accumulate),
        )
        entries.kept += [text, gradient]
        entry.name, entry.gradient = ctypes.addressof(text), gradient
    return {"gradients": entries, "num_gradients": len(gradients)}


def parameter(model: ctypes.c_void_p, index: int) -> tuple[str, np.ndarray]:
    """Its name, and its memory as an array."""
    info = c.struct("model_parameter")
    get = c.LIBRARY.ssmcore_model_get_parameter
    c.check(get(model, ctypes.c_int64(index), ctypes.byref(info)))
    shape = ctypes.cast(info.tensor.shape, ctypes.POINTER(ctypes.c_int64))[: info.tensor.ndim]
    values = ctypes.cast(info.tensor.data, ctypes.POINTER(ctypes.c_float))
    return ctypes.string_at(info.name).decode(), np.ctypeslib.as_array(values, tuple(shape))


def parameters(model: ctypes.c_void_p) -> dict[str, np.ndarray]:
    count = ctypes.c_int64()
    c.check(c.LIBRARY.ssmcore_model_num_parameters(model, ctypes.byref(count)))
    return dict(parameter(model, index) for index in range(count.value))


def test_parameters(model: ctypes.c_void_p) -> None:
    expected = ssmcore.load(trainable=True).parameters
    given = parameters(model)
    assert set(given) == set(expected)
    for name, array in expected.items():
        assert_same_bits(given[name], array)
    for index in (-1, len(expected)):
        with c.fails(c.Status.INVALID_ARGUMENT, f"model_get_parameter: index is {index}"):
            parameter(model, index)


@pytest.mark.parametrize("recompute_layers", [0, 1])
def test_loss_and_gradients(
    model: ctypes.c_void_p, step: dict[str, np.ndarray], recompute_layers: int
) -> None:
    expected_loss, expected = ssmcore.load().loss_and_gradients(**step)
    loss = np.empty(1, np.float32)
    gradients = {name: (np.full_like(array, np.nan), False) for name, array in expected.items()}
    added = "backbone.layers.0.mixer.A_log"
    gradients[added] = (np.ones_like(expected[added]), True)
    c.call_in_poison(
        "model_loss_and_gradients",
        model,
        **step,
        loss=loss,
        recompute_layers=recompute_layers,
        **named(gradients),
    )
    assert loss[0] == pytest.approx(expected_loss, rel=1e-6)
    for name, (array, accumulate) in gradients.items():
        before = np.float32(1 if accumulate else 0)
        assert_close(array, expected[name] + before, "float32", rounded=True)


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("name", ["token_ids", "targets"])
def test_integers_that_lie_apart(
    model: ctypes.c_void_p, step: dict[str, np.ndarray], name: str, dtype: type
) -> None:
    losses = []
    apart = np.full((60, 4), -5, dtype)
    apart[:, ::2] = step[name].T
    for array in (step[name].astype(dtype), apart[:, ::2].T):
        losses.append(np.empty(1, np.float32))
        c.call("model_loss_and_gradients", model, **{**step, name: array}, loss=losses[-1])
    assert_same_bits(*losses)


def test_packed(model: ctypes.c_void_p, step: dict[str, np.ndarray]) -> None:
    packed = {name: array.reshape(1, -1) for name, array in step.items()}
    cu_seqlens = np.array([0, 60, 60, 120], np.int32)
    loss = np.empty(1, np.float32)
    c.call("model_loss_and_gradients", model, **packed, cu_seqlens=cu_seqlens, loss=loss)
    assert loss[0] == pytest.approx(ssmcore.load().loss_and_gradients(**step)[0], rel=1e-6)
    c.call(
        "model_loss_and_gradients",
        model,
        **packed,
        cu_seqlens=cu_seqlens,
        loss=loss,
        num_targets=240,
    )
    assert 2 * loss[0] == pytest.approx(ssmcore.load().loss_and_gradients(**step)[0], rel=1e-6)


def test_the_model_follows_its_parameters(
    model: ctypes.c_void_p, step: dict[str, np.ndarray]
) -> None:
    def loss() -> float:
        result = np.empty(1, np.float32)
        c.call("model_loss_and_gradients", model, **step, loss=result)
        return float(result[0])

    before = loss()
    scale = parameters(model)["backbone.norm_f.weight"]
    scale *= 0.5
    c.check(c.LIBRARY.ssmcore_model_refresh(model))
    other = ssmcore.load(trainable=True)
    other.parameters["backbone.norm_f.weight"][...] *= 0.5
    other.refresh()
    assert loss() == pytest.approx(other.loss_and_gradients(**step)[0], rel=1e-6)
    assert loss() > before + 0.1


def test_refuses_bad_gradients(model: ctypes.c_void_p, step: dict[str, np.ndarray]) -> None:
    loss = np.empty(1, np.float32)
    with c.fails(c.Status.INVALID_ARGUMENT, "loss_and_gradients: gradients is NULL"):
        c.call("model_loss_and_gradients", model, **step, loss=loss, num_gradients=1)
    with c.fails(c.Status.INVALID_ARGUMENT, "loss_and_gradients", "no.such"):
        gradients = named({"no.such": (np.empty(3, np.float32), False)})
        c.call("model_loss_and_gradients", model, **step, loss=loss, **gradients)
    with c.fails(c.Status.INVALID_ARGUMENT, "loss_and_gradients: loss is missing"):
        c.call("model_loss_and_gradients", model, **step)
